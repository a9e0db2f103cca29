//! Trust domains, as a program builds and runs them (KVM API, "Intel Trust Domain Extensions").
#![expect(clippy::unwrap_used)] // Helpers outside #[test] functions.

mod busy;
mod commands;
#[path = "../common/mod.rs"]
mod common;
mod fuzz;
mod memory;
mod regions;
mod registers;
mod storm;

use common::td::*;
use common::*;
use kvm_bindings::*;
use twofold_kvm::abi;
use twofold_tdx::measurement::{DIGEST, EXTENSION, Measurement};

const PAGE: u64 = 4096;
/// Where a TD begins: the last page below 4 GiB.
const RESET_PAGE: u64 = 0xffff_f000;
/// Pages with a private half, in a slot of their own.
const DATA: u64 = 0x10_0000;
const PAGES: u64 = 16;
const SHARED_BIT: u64 = 1 << 47;
const X2APIC: u32 = 1 << 21;

const KEEP_SIZE: i32 = libc::FALLOC_FL_KEEP_SIZE;
const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE;
/// The table that makes a vCPU fit for a TD.
fn set_cpuid(vcpu: &Fd) {
    #[repr(C)]
    struct Table {
        count: u32,
        padding: u32,
        entries: [kvm_cpuid_entry2; 1],
    }
    let table = Table {
        count: 1,
        padding: 0,
        entries: [kvm_cpuid_entry2 {
            function: 1,
            ecx: X2APIC,
            ..Default::default()
        }],
    };
    assert_eq!(vcpu.set(KVM_SET_CPUID2, table), Ok(0));
}

fn slot(id: u32, gpa: u64, pages: u64, hva: u64, file: &Fd) -> kvm_userspace_memory_region2 {
    kvm_userspace_memory_region2 {
        slot: id,
        flags: KVM_MEM_GUEST_MEMFD,
        guest_phys_addr: gpa,
        memory_size: pages * PAGE,
        userspace_addr: hva,
        guest_memfd: file.0 as u32,
        ..Default::default()
    }
}

/// A TD with one vCPU and two slots that have private halves: the page that it begins in, and data.
struct Td {
    vcpu: Fd,
    run: Memory,
    vm: Fd,
    data_file: Fd,
    _reset_file: Fd,
    _shared: Memory,
    _reset: Memory,
    _kvm: Fd,
}

impl Td {
    /// A TD whose initial memory can be added; all of its memory is private.
    fn new() -> Self {
        Self::with(&InitVm::new(48))
    }

    fn with(request: &InitVm) -> Self {
        let td = Self::without_vcpu_init(request);
        assert_eq!(command(&td.vcpu, INIT_VCPU, 0, 0x1234), Ok(0));
        td
    }

    fn without_vcpu_init(request: &InitVm) -> Self {
        let kvm = Fd::open();
        let vm = kvm.descriptor(KVM_CREATE_VM, KVM_X86_TDX_VM as usize);
        split_irqchip(&vm);
        assert_eq!(init_vm(&vm, request), Ok(0));
        let shared = Memory::new((PAGES * PAGE) as usize);
        let reset = Memory::new(PAGE as usize);
        let create = |size| {
            let mut request = kvm_create_guest_memfd {
                size,
                ..Default::default()
            };
            Fd(vm.with(KVM_CREATE_GUEST_MEMFD, &mut request).unwrap())
        };
        let (reset_file, data_file) = (create(PAGE), create(PAGES * PAGE));
        for region in [
            slot(0, RESET_PAGE, 1, reset.address(), &reset_file),
            slot(1, DATA, PAGES, shared.address(), &data_file),
        ] {
            assert_eq!(vm.set(KVM_SET_USER_MEMORY_REGION2, region), Ok(0));
        }
        let vcpu = vm.descriptor(KVM_CREATE_VCPU, 0);
        let run = Memory::of_vcpu(&vcpu);
        set_cpuid(&vcpu);
        let td = Self {
            vcpu,
            run,
            vm,
            data_file,
            _reset_file: reset_file,
            _shared: shared,
            _reset: reset,
            _kvm: kvm,
        };
        td.set_private(RESET_PAGE, 1, true);
        td.set_private(DATA, PAGES, true);
        td
    }

    fn set_private(&self, gpa: u64, pages: u64, private: bool) {
        let request = kvm_memory_attributes {
            address: gpa,
            size: pages * PAGE,
            attributes: match private {
                true => KVM_MEMORY_ATTRIBUTE_PRIVATE.into(),
                false => 0,
            },
            flags: 0,
        };
        assert_eq!(self.vm.set(KVM_SET_MEMORY_ATTRIBUTES, request), Ok(0));
    }

    fn add(&self, region: &mut Region, flags: u32) -> Result<i32, Errno> {
        let data = std::ptr::from_mut(region).expose_provenance() as u64;
        command(&self.vcpu, INIT_MEM_REGION, flags, data)
    }

    /// Adds one page with this content at `gpa`.
    fn add_page(&self, gpa: u64, content: &Memory) -> Result<i32, Errno> {
        let mut region = Region {
            source: content.address(),
            gpa,
            pages: 1,
        };
        self.add(&mut region, MEASURE)
    }

    fn measurement(&self) -> Option<[u8; DIGEST]> {
        abi::td_measurement(self.vm.0)
    }

    fn finalize(&self) -> Result<i32, Errno> {
        finalize(&self.vm)
    }

    fn prefault(&self, gpa: u64, size: u64) -> (Result<i32, Errno>, u64, u64) {
        let mut request = kvm_pre_fault_memory {
            gpa,
            size,
            ..Default::default()
        };
        let result = self.vcpu.with(KVM_PRE_FAULT_MEMORY, &mut request);
        (result, request.gpa, request.size)
    }
}

/// A page of the program with one byte all over it.
fn page_of(byte: u8) -> Memory {
    let memory = Memory::new(PAGE as usize);
    memory.write_bytes(0, &[byte; PAGE as usize]);
    memory
}
