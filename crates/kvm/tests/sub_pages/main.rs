//! Sub-page write protection as a program uses it: the calls and their errors, what a guest's writes
//! end in, and what everything else that is done to guest memory makes of it (SPEC 1.5).
// UNSAFETY: changes the program's own memory, and reads what is mapped.
#![expect(unsafe_code)]
#![expect(clippy::unwrap_used)] // Helpers outside #[test] functions.

mod calls;
#[path = "../common/mod.rs"]
mod common;
mod dirty;
mod exits;
mod memory;
mod migration;
mod modes;
mod random;

use common::*;
use kvm_bindings::*;
use twofold_abi::spp::{
    KVM_CAP_X86_SPP, KVM_EXIT_SPP, KVM_SUBPAGE_FULL_ACCESS, KVM_SUBPAGE_MAX_PAGES, kvm_spp_exit,
};

const PAGE: u64 = 4096;
/// Tables of the guest: the code is in the first page of this slot.
const TABLES: u64 = 0x2000;
/// The table that maps the first 2 MiB by pages.
const LAST_TABLE: u64 = TABLES + 3 * PAGE;
/// The interrupt descriptor table, and handlers that halt.
const IDT: u64 = TABLES + 4 * PAGE;
const HANDLERS: u64 = TABLES + 5 * PAGE;
const GDT: u64 = TABLES + 6 * PAGE;
const STACK: u64 = TABLES + 8 * PAGE;
const LOW_BYTES: u64 = 0x1_0000;
/// Where the data is: the slot whose pages are protected.
const DATA: u64 = 0x10_0000;
const PAGES: u64 = 16;

/// Why the guest came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Halt,
    /// It wanted to write this byte, with an instruction of so many bytes.
    Denied {
        address: u64,
        length: u8,
    },
    Other(u32),
}

fn denied(address: u64, length: u8) -> End {
    End::Denied { address, length }
}

/// A VM with one vCPU in 64-bit mode, whose first 2 MiB are mapped one to one.
struct Guarded {
    vcpu: Fd,
    run: Memory,
    vm: Fd,
    low: Memory,
    data: Memory,
    _kvm: Fd,
}

fn enable(vm: &Fd, capability: u32, argument: u64) -> Result<i32, Errno> {
    let mut cap = kvm_enable_cap {
        cap: capability,
        ..Default::default()
    };
    cap.args[0] = argument;
    vm.set(KVM_ENABLE_CAP, cap)
}

/// `KVM_SUBPAGES_SET_ACCESS` with exactly these bytes.
fn request(gfn: u64, pages: u32, flags: u32, maps: &[u32]) -> Vec<u32> {
    let mut words = vec![gfn as u32, (gfn >> 32) as u32, pages, flags];
    words.extend_from_slice(maps);
    words
}

fn set_access(vm: &Fd, gfn: u64, maps: &[u32]) -> Result<i32, Errno> {
    let words = request(gfn, maps.len() as u32, 0, maps);
    vm.call(KVM_SUBPAGES_SET_ACCESS, words.as_ptr().addr())
}

fn get_access(vm: &Fd, gfn: u64, pages: usize) -> Result<Vec<u32>, Errno> {
    let mut words = request(gfn, pages as u32, 0, &vec![0x5a5a_5a5a; pages]);
    let count = vm.call(KVM_SUBPAGES_GET_ACCESS, words.as_mut_ptr().addr())?;
    assert_eq!(count as usize, pages);
    Ok(words.split_off(4))
}

impl Guarded {
    fn new() -> Self {
        Self::with(|_| (), 0)
    }

    /// `prepare` is called before there is a vCPU; `flags` are those of the slot.
    fn with(prepare: impl FnOnce(&Fd), flags: u32) -> Self {
        let kvm = Fd::open();
        let vm = kvm.descriptor(KVM_CREATE_VM, 0);
        assert_eq!(enable(&vm, KVM_CAP_X86_SPP, 0), Ok(0));
        prepare(&vm);
        let low = Memory::new(LOW_BYTES as usize);
        let slot = region(0, CODE, LOW_BYTES, low.address());
        assert_eq!(vm.set(KVM_SET_USER_MEMORY_REGION, slot), Ok(0));
        let vcpu = vm.descriptor(KVM_CREATE_VCPU, 0);
        let run = Memory::of_vcpu(&vcpu);
        let guarded = Self {
            vcpu,
            run,
            vm,
            low,
            data: Memory::new((PAGES * PAGE) as usize),
            _kvm: kvm,
        };
        guarded.set_slot(flags);
        guarded.start_64_bit();
        guarded
    }

    fn set_slot(&self, flags: u32) {
        let slot = kvm_userspace_memory_region {
            flags,
            ..region(1, DATA, PAGES * PAGE, self.data.address())
        };
        assert_eq!(self.vm.set(KVM_SET_USER_MEMORY_REGION, slot), Ok(0));
    }

    fn put(&self, gpa: u64, value: u64) {
        self.low.write((gpa - CODE) as usize, value);
    }

    fn start_64_bit(&self) {
        for level in 0..3 {
            self.put(TABLES + level * PAGE, TABLES + (level + 1) * PAGE + 7);
        }
        for page in 0..512 {
            self.put(LAST_TABLE + page * 8, page * PAGE + 7);
        }
        for vector in 0..256 {
            let handler = HANDLERS + vector;
            self.put(IDT + vector * 16, handler | 8 << 16 | 0x8e00 << 32);
            self.put(IDT + vector * 16 + 8, 0);
        }
        self.low
            .write_bytes((HANDLERS - CODE) as usize, &[0xf4; 256]);
        self.put(GDT + 8, 0x00af_9b00_0000_ffff);
        self.put(GDT + 16, 0x00cf_9300_0000_ffff);
        let mut sregs: kvm_sregs = self.vcpu.get(KVM_GET_SREGS);
        let data = kvm_segment {
            selector: 0x10,
            type_: 3,
            present: 1,
            s: 1,
            db: 1,
            g: 1,
            limit: u32::MAX,
            ..Default::default()
        };
        sregs.cs = kvm_segment {
            selector: 8,
            type_: 11,
            l: 1,
            db: 0,
            ..data
        };
        (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
        sregs.gdt.base = GDT;
        sregs.gdt.limit = 23;
        sregs.idt.base = IDT;
        sregs.idt.limit = 0xfff;
        sregs.cr0 = 0x8005_0033;
        sregs.cr3 = TABLES;
        sregs.cr4 = 0x620;
        sregs.efer = 0xd00;
        assert_eq!(self.vcpu.set(KVM_SET_SREGS, sregs), Ok(0));
    }

    fn protect(&self, page: u64, maps: &[u32]) {
        let gfn = (DATA >> 12) + page;
        assert_eq!(
            set_access(&self.vm, gfn, maps),
            Ok(maps.len() as i32),
            "maps of page {page} on"
        );
    }

    fn maps(&self, page: u64, pages: usize) -> Vec<u32> {
        get_access(&self.vm, (DATA >> 12) + page, pages).unwrap()
    }

    /// Puts the vCPU in front of this code, to which a HLT is added.
    fn prepare(&self, code: &[u8], change: impl FnOnce(&mut kvm_regs)) {
        self.low.write_bytes(0, code);
        self.low.write(code.len(), 0xf4_u8);
        let mut regs = kvm_regs {
            rip: CODE,
            rsp: STACK,
            rflags: 2,
            ..Default::default()
        };
        change(&mut regs);
        assert_eq!(self.vcpu.set(KVM_SET_REGS, regs), Ok(0));
    }

    fn resume(&self) -> End {
        assert_eq!(self.vcpu.call(KVM_RUN, 0), Ok(0));
        match self.run.read::<u32>(8) {
            KVM_EXIT_HLT => End::Halt,
            KVM_EXIT_SPP => {
                let exit: kvm_spp_exit = self.run.read(32);
                assert_eq!(exit.pad, [0; 7]);
                denied(exit.addr, exit.insn_len)
            }
            other => End::Other(other),
        }
    }

    fn execute(&self, code: &[u8], change: impl FnOnce(&mut kvm_regs)) -> End {
        self.prepare(code, change);
        self.resume()
    }

    /// `mov [rdi], rax`
    fn store(&self, address: u64, value: u64) -> End {
        self.execute(&[0x48, 0x89, 0x07], |regs| {
            (regs.rdi, regs.rax) = (address, value);
        })
    }

    /// `mov [rdi], al`
    fn store_byte(&self, address: u64, value: u8) -> End {
        self.execute(&[0x88, 0x07], |regs| {
            (regs.rdi, regs.rax) = (address, value.into());
        })
    }

    /// `mov rax, [rdi]`
    fn load(&self, address: u64) -> u64 {
        let end = self.execute(&[0x48, 0x8b, 0x07], |regs| regs.rdi = address);
        assert_eq!(end, End::Halt);
        self.regs().rax
    }

    fn regs(&self) -> kvm_regs {
        self.vcpu.get(KVM_GET_REGS)
    }

    /// What the program sees of the data.
    fn word(&self, address: u64) -> u64 {
        self.data.read((address - DATA) as usize)
    }
}
