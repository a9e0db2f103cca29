//! Dirty logs and dirty rings as a program uses them: errors in KVM's order, and what a guest's
//! writes leave in each.

#![expect(clippy::unwrap_used)] // Helpers outside #[test] functions.

mod common;

use common::*;
use kvm_bindings::*;
use std::collections::BTreeSet;
use twofold_kvm::abi;

const LOG: u32 = KVM_MEM_LOG_DIRTY_PAGES;
const RING_BYTES: u64 = 16384;
const RING_OFFSET: usize = 64 * 4096;

fn enable(vm: &Fd, capability: u32, argument: u64) -> Result<i32, Errno> {
    let mut cap = kvm_enable_cap {
        cap: capability,
        ..Default::default()
    };
    cap.args[0] = argument;
    vm.set(KVM_ENABLE_CAP, cap)
}

fn get_log(vm: &Fd, slot: u32, bitmap: &mut [u64]) -> Result<i32, Errno> {
    let mut log = kvm_dirty_log {
        slot,
        ..Default::default()
    };
    log.__bindgen_anon_1.padding2 = bitmap.as_mut_ptr().addr() as u64;
    vm.set(KVM_GET_DIRTY_LOG, log)
}

fn clear_log(vm: &Fd, slot: u32, first: u64, pages: u32, bitmap: &[u64]) -> Result<i32, Errno> {
    let mut log = kvm_clear_dirty_log {
        slot,
        num_pages: pages,
        first_page: first,
        ..Default::default()
    };
    log.__bindgen_anon_1.padding2 = bitmap.as_ptr().addr() as u64;
    vm.set(KVM_CLEAR_DIRTY_LOG, log)
}

fn pages(bitmap: &[u64]) -> Vec<usize> {
    (0..64 * bitmap.len())
        .filter(|page| bitmap[page / 64] >> (page % 64) & 1 == 1)
        .collect()
}

/// Writes to the word at SI of each 4K page up to DI, in a segment with base 0, then halts:
/// `again: mov [si], al; add si, 0x1000; cmp si, di; jne again; hlt`.
const WRITER: &[u8] = &[
    0x88, 0x04, 0x81, 0xc6, 0x00, 0x10, 0x39, 0xfe, 0x75, 0xf6, 0xf4,
];

/// A guest whose code is in a slot of its own, and a slot 1 that logs.
struct Logged {
    guest: Guest,
    memory: Memory,
}

const FIRST: u64 = 0x8000;
const PAGES: u64 = 7;

impl Logged {
    /// `prepare` is called before there is a vCPU.
    fn new(prepare: impl FnOnce(&Fd)) -> Self {
        let kvm = Fd::open();
        let vm = kvm.descriptor(KVM_CREATE_VM, 0);
        prepare(&vm);
        let code = Memory::new(MEMORY_SIZE as usize);
        code.write_bytes(0, WRITER);
        let slot = region(0, CODE, MEMORY_SIZE, code.address());
        assert_eq!(vm.set(KVM_SET_USER_MEMORY_REGION, slot), Ok(0));
        let vcpu = vm.descriptor(KVM_CREATE_VCPU, 0);
        let run = Memory::of_vcpu(&vcpu);
        let guest = Guest {
            vcpu,
            run,
            vm,
            memory: code,
            kvm,
        };
        let memory = Memory::new((PAGES * 4096) as usize);
        let logged = Self { guest, memory };
        logged.set_flags(LOG);
        logged
    }

    fn set_flags(&self, flags: u32) {
        let slot = kvm_userspace_memory_region {
            flags,
            ..region(1, FIRST, PAGES * 4096, self.memory.address())
        };
        assert_eq!(self.guest.vm.set(KVM_SET_USER_MEMORY_REGION, slot), Ok(0));
    }

    /// Lets the guest write to the pages of slot 1 from `first` to before `end`.
    fn write(&self, first: u64, end: u64) -> u32 {
        self.guest.start();
        self.guest.set_regs(|regs| {
            regs.rsi = FIRST + first * 4096;
            regs.rdi = FIRST + end * 4096;
        });
        self.guest.run().unwrap()
    }

    fn log(&self) -> Vec<usize> {
        let mut bitmap = [0];
        assert_eq!(get_log(&self.guest.vm, 1, &mut bitmap), Ok(0));
        pages(&bitmap)
    }

    fn stat(&self, name: &str) -> u64 {
        let stats = self.guest.vcpu.descriptor(KVM_GET_STATS_FD, 0);
        let word = |offset: usize| {
            u32::from_le_bytes(stats.read_at(4, offset).try_into().unwrap()) as usize
        };
        let (count, descriptors, data) = (word(8), word(16), word(20));
        for index in 0..count {
            let descriptor = descriptors + index * 64;
            let found = stats.read_at(48, descriptor + 16);
            if found.split(|byte| *byte == 0).next() == Some(name.as_bytes()) {
                let value = stats.read_at(8, data + word(descriptor + 8));
                return u64::from_le_bytes(value.try_into().unwrap());
            }
        }
        panic!("no statistic {name}");
    }
}

/// A vCPU's dirty ring, mapped.
struct Ring {
    memory: Memory,
    next: usize,
}

impl Ring {
    fn new(vcpu: &Fd) -> Self {
        use rustix::mm::{MapFlags, ProtFlags};
        let length = RING_BYTES as usize;
        let check = |prot, flags, offset: usize, length| {
            abi::mmap_check(vcpu.0, prot, flags, offset as i64, length)
        };
        let invalid = Some(Errno::INVAL);
        assert_eq!(check(1, libc::MAP_PRIVATE, RING_OFFSET, length), invalid);
        assert_eq!(check(5, libc::MAP_SHARED, RING_OFFSET, length), invalid);
        assert_eq!(
            check(1, libc::MAP_PRIVATE, RING_OFFSET + length - 4096, 4096),
            invalid
        );
        assert_eq!(check(1, libc::MAP_PRIVATE, 0, RING_OFFSET + 1), invalid);
        assert_eq!(check(1, libc::MAP_PRIVATE, 0, RING_OFFSET), None);
        assert_eq!(
            check(5, libc::MAP_PRIVATE, RING_OFFSET + length, 4096),
            None
        );
        assert_eq!(check(3, libc::MAP_SHARED, RING_OFFSET, length), None);
        // UNSAFETY: maps a file.
        #[expect(unsafe_code)]
        // SAFETY: a new mapping.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                vcpu.borrow(),
                RING_OFFSET as u64,
            )
        };
        let start: *mut u8 = start.unwrap().cast();
        abi::mapped(vcpu.0, start.addr(), length, 3, RING_OFFSET as i64);
        Self {
            memory: Memory { start, length },
            next: 0,
        }
    }

    /// Takes what waits: slot and page of each entry.
    fn harvest(&mut self) -> Vec<(u32, u64)> {
        let mut found = Vec::new();
        loop {
            let at = self.next % (RING_BYTES as usize / 16) * 16;
            if self.memory.read::<u32>(at) != 1 {
                return found;
            }
            found.push((self.memory.read(at + 4), self.memory.read(at + 8)));
            self.memory.write(at, 2_u32);
            self.next += 1;
        }
    }
}

#[test]
fn the_capabilities_answer_what_kvm_answers_on_an_intel_host() {
    let kvm = Fd::open();
    let vm = kvm.descriptor(KVM_CREATE_VM, 0);
    for fd in [&kvm, &vm] {
        let check = |cap: u32| fd.call(KVM_CHECK_EXTENSION, cap as usize);
        assert_eq!(check(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2), Ok(3));
        assert_eq!(check(KVM_CAP_DIRTY_LOG_RING), Ok(1 << 20));
        assert_eq!(check(KVM_CAP_DIRTY_LOG_RING_ACQ_REL), Ok(1 << 20));
        // The first form, which was given up, and that of arm64.
        assert_eq!(check(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT), Ok(0));
        assert_eq!(check(KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP), Ok(0));
    }
}

#[test]
fn manual_protection_takes_its_bits_in_order() {
    let kvm = Fd::open();
    let vm = kvm.descriptor(KVM_CREATE_VM, 0);
    let set = |bits| enable(&vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, bits);
    for bits in [2, 4, 5, 7, 1 << 32, u64::MAX] {
        assert_eq!(set(bits), Err(Errno::INVAL), "{bits:#x}");
    }
    for bits in [1, 3, 0] {
        assert_eq!(set(bits), Ok(0), "{bits:#x}");
    }
}

#[test]
fn a_cleared_range_is_checked_in_kvms_order() {
    let logged = Logged::new(|vm| {
        assert_eq!(enable(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 1), Ok(0));
    });
    let vm = &logged.guest.vm;
    let bits = [u64::MAX; 2];
    let invalid = Err(Errno::INVAL);
    assert_eq!(clear_log(vm, 2 << 16, 0, 7, &bits), invalid);
    assert_eq!(clear_log(vm, 32764, 0, 7, &bits), invalid);
    assert_eq!(
        clear_log(vm, 5, 1, 7, &bits),
        invalid,
        "alignment before existence"
    );
    assert_eq!(clear_log(vm, 5, 0, 7, &bits), Err(Errno::NOENT));
    assert_eq!(clear_log(vm, 0, 0, 4, &bits), Err(Errno::NOENT));
    assert_eq!(clear_log(vm, 1, 0, 8, &bits), invalid);
    assert_eq!(clear_log(vm, 1, 0, 6, &bits), invalid);
    assert_eq!(clear_log(vm, 1, 64, 0, &bits), invalid);
    assert_eq!(clear_log(vm, 1, 0, u32::MAX, &bits), invalid);
    assert_eq!(clear_log(vm, 1, 0, 7, &bits), Ok(0));
    assert_eq!(clear_log(vm, 1, 0, 0, &bits), Ok(0));
    // A bitmap that is not there is found before anything is cleared.
    assert_eq!(logged.write(0, 3), KVM_EXIT_HLT);
    let nowhere = kvm_clear_dirty_log {
        slot: 1,
        num_pages: 7,
        ..Default::default()
    };
    assert_eq!(vm.set(KVM_CLEAR_DIRTY_LOG, nowhere), Err(Errno::FAULT));
    assert_eq!(logged.log(), [0, 1, 2]);
    assert_eq!(vm.call(KVM_RESET_DIRTY_RINGS, 0), invalid);
}

#[test]
fn a_log_that_is_collected_by_hand_keeps_its_bits_until_they_are_cleared() {
    let logged = Logged::new(|vm| {
        assert_eq!(enable(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 1), Ok(0));
    });
    assert_eq!(logged.log(), []);
    logged.write(1, 5);
    assert_eq!(logged.log(), [1, 2, 3, 4]);
    assert_eq!(logged.log(), [1, 2, 3, 4]);
    let vm = &logged.guest.vm;
    assert_eq!(clear_log(vm, 1, 0, 7, &[0b10110]), Ok(0));
    assert_eq!(logged.log(), [3]);
    logged.write(2, 4);
    assert_eq!(logged.log(), [2, 3]);
}

#[test]
fn a_slot_may_begin_with_every_page_dirty() {
    let logged = Logged::new(|vm| {
        assert_eq!(enable(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 3), Ok(0));
    });
    assert_eq!(logged.log(), [0, 1, 2, 3, 4, 5, 6]);
    logged.set_flags(0);
    logged.write(0, 7);
    logged.set_flags(LOG);
    let vm = &logged.guest.vm;
    assert_eq!(logged.log(), [0, 1, 2, 3, 4, 5, 6]);
    assert_eq!(clear_log(vm, 1, 0, 7, &[!0b1000]), Ok(0));
    assert_eq!(logged.log(), [3]);
    logged.write(5, 7);
    assert_eq!(logged.log(), [3, 5, 6]);
}

#[test]
fn a_collected_page_is_written_again_without_a_fault() {
    let logged = Logged::new(|_| ());
    logged.write(0, 7);
    assert_eq!(logged.log(), [0, 1, 2, 3, 4, 5, 6]);
    let faults = logged.stat("pf_taken");
    logged.write(2, 4);
    assert_eq!(logged.log(), [2, 3]);
    // The processor writes down what it dirties; where it does not, the pages are protected.
    let set = |variable: &str, value: &str| std::env::var(variable).as_deref() == Ok(value);
    let protects =
        set("TWOFOLD_SECOND_STAGE", "npt") || set("TWOFOLD_PML", "N") || set("TWOFOLD_EPTAD", "N");
    let expected = if protects { 2 } else { 0 };
    assert_eq!(logged.stat("pf_taken") - faults, expected);
    assert_eq!(logged.log(), []);
}

#[test]
fn the_size_of_a_ring_is_checked_in_kvms_order() {
    let kvm = Fd::open();
    let vm = kvm.descriptor(KVM_CREATE_VM, 0);
    let set = |bytes| enable(&vm, KVM_CAP_DIRTY_LOG_RING, bytes);
    let invalid = Err(Errno::INVAL);
    for bytes in [0, 1, 16, 2048, 4097, 24576, u64::MAX] {
        assert_eq!(set(bytes), invalid, "{bytes:#x}");
    }
    for bytes in [2 << 20, 1 << 32, 1 << 63] {
        assert_eq!(set(bytes), Err(Errno::TOOBIG), "{bytes:#x}");
    }
    let vcpu = vm.descriptor(KVM_CREATE_VCPU, 0);
    assert_eq!(set(RING_BYTES), invalid, "after a vCPU");
    assert_eq!(vm.call(KVM_RESET_DIRTY_RINGS, 0), invalid);
    let prot = libc::PROT_READ;
    assert_eq!(
        abi::mmap_check(vcpu.0, prot, libc::MAP_PRIVATE, RING_OFFSET as i64, 4096),
        None
    );

    let vm = kvm.descriptor(KVM_CREATE_VM, 0);
    let set = |bytes| enable(&vm, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, bytes);
    assert_eq!(set(1 << 20), Ok(0));
    assert_eq!(set(1 << 20), invalid, "once");
    assert_eq!(vm.call(KVM_RESET_DIRTY_RINGS, 0), Ok(0));
}

#[test]
fn with_rings_there_is_no_dirty_log() {
    let logged =
        Logged::new(|vm| assert_eq!(enable(vm, KVM_CAP_DIRTY_LOG_RING, RING_BYTES), Ok(0)));
    let vm = &logged.guest.vm;
    let none = Err(Errno::NXIO);
    assert_eq!(get_log(vm, 1, &mut [0]), none);
    assert_eq!(get_log(vm, 2 << 16, &mut [0]), none, "before anything else");
    assert_eq!(clear_log(vm, 1, 1, 7, &[0]), none);
}

#[test]
fn a_ring_tells_each_page_that_was_written_since_it_was_reset() {
    let logged =
        Logged::new(|vm| assert_eq!(enable(vm, KVM_CAP_DIRTY_LOG_RING, RING_BYTES), Ok(0)));
    let vm = &logged.guest.vm;
    let mut ring = Ring::new(&logged.guest.vcpu);
    assert_eq!(ring.harvest(), []);
    assert_eq!(logged.write(1, 5), KVM_EXIT_HLT);
    let expected: Vec<_> = (1..5).map(|page| (1, page)).collect();
    assert_eq!(ring.harvest(), expected);
    assert_eq!(logged.write(1, 5), KVM_EXIT_HLT);
    assert_eq!(ring.harvest(), [], "not before the reset");
    assert_eq!(vm.call(KVM_RESET_DIRTY_RINGS, 0), Ok(4));
    assert_eq!(vm.call(KVM_RESET_DIRTY_RINGS, 0), Ok(0));
    assert_eq!(logged.write(4, 7), KVM_EXIT_HLT);
    let found: BTreeSet<_> = ring.harvest().into_iter().collect();
    assert_eq!(found, BTreeSet::from([(1, 4), (1, 5), (1, 6)]));
}

#[test]
fn a_ring_that_is_almost_full_stops_the_vcpu_until_it_is_reset() {
    let logged =
        Logged::new(|vm| assert_eq!(enable(vm, KVM_CAP_DIRTY_LOG_RING, RING_BYTES), Ok(0)));
    let vm = &logged.guest.vm;
    let mut ring = Ring::new(&logged.guest.vcpu);
    let mut told = 0;
    let reason = loop {
        // Logging that begins anew forgets nothing that is in the ring, and finds each page again.
        logged.set_flags(0);
        logged.set_flags(LOG);
        let reason = logged.write(0, 7);
        if reason != KVM_EXIT_HLT {
            break reason;
        }
        told += 7;
        assert!(told < RING_BYTES / 16);
    };
    assert_eq!(reason, KVM_EXIT_DIRTY_RING_FULL);
    assert_eq!(
        logged.guest.run(),
        Ok(KVM_EXIT_DIRTY_RING_FULL),
        "until the reset"
    );
    let harvested = ring.harvest().len();
    assert!(harvested as u64 >= told && harvested < RING_BYTES as usize / 16);
    assert_eq!(logged.guest.run(), Ok(KVM_EXIT_DIRTY_RING_FULL));
    assert_eq!(vm.call(KVM_RESET_DIRTY_RINGS, 0), Ok(harvested as i32));
    assert_eq!(logged.guest.run(), Ok(KVM_EXIT_HLT));
    // What the vCPU could not write before, it has written now.
    let found: BTreeSet<_> = ring.harvest().into_iter().collect();
    assert!(found.contains(&(1, 6)), "{found:?}");
}
