//! Private memory: attributes, filters, guest memory files and pre-faulting, against a model and
//! against threads. A processor that knows only `twofold-arch` says what is mapped.

#![expect(clippy::unwrap_used, reason = "a test may fail")]

#[path = "../common/mod.rs"]
mod common;
mod model;
mod prefault;
mod storm;

use common::vm::{HVA, LOG, Vm};
use common::{Found, HostState, Processor, TestHost, World, region, usual_frame};
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use twofold_arch::{Gfn, Level, Pferr};
use twofold_mmu::{
    AccessKind, AttributeError, Config, Conversion, Ept, Fault, FaultError, GuestMemoryError, Mmu,
    Npt, Outcome, PrefaultError, PrivateMemory, RegionError, RootRole,
};

/// Addresses of the guest memory file.
const FILE: u64 = 0x6000_0000_0000;
const GUEST_MEMFD: u32 = 4;
const PAGE: u64 = 4096;

fn protected(conversion: Conversion) -> Config {
    Config {
        slot_zap_all: false,
        private_memory: Some(PrivateMemory {
            access: AccessKind::ByAttribute,
            conversion,
        }),
        ..Config::default()
    }
}

fn vm<F: Processor>() -> Vm<F> {
    Vm::with(protected(Conversion::ZapOpposite))
}

fn gfns(range: Range<u64>) -> Range<Gfn> {
    Gfn::new(range.start)..Gfn::new(range.end)
}

trait Private {
    /// A slot whose private half is at the same distance from the file's start as its frames from 0.
    fn private_slot(&self, id: u32, gfn: u64, pages: u64);
    fn set(&self, range: Range<u64>, private: bool);
    fn punch(&self, range: Range<u64>);
    fn prefault_all(&mut self, range: Range<u64>) -> Result<(), PrefaultError>;
}

impl<F: Processor> Private for Vm<F> {
    fn private_slot(&self, id: u32, gfn: u64, pages: u64) {
        let region = region(id, gfn, pages, (HVA >> 12) + gfn, GUEST_MEMFD);
        self.mmu
            .set_region_with_guest_memory(region, || Ok(FILE + gfn * PAGE))
            .unwrap();
    }

    fn set(&self, range: Range<u64>, private: bool) {
        self.mmu.set_attributes(gfns(range), private).unwrap();
    }

    fn punch(&self, range: Range<u64>) {
        let addresses = FILE + range.start * PAGE..FILE + range.end * PAGE;
        let change = self.mmu.begin_private_change(addresses);
        self.mmu.end_host_change(change);
    }

    fn prefault_all(&mut self, range: Range<u64>) -> Result<(), PrefaultError> {
        let mut start = range.start;
        while start < range.end {
            let left = gfns(start..range.end);
            let done = self.mmu.prefault(&mut self.reader, &self.root, left)?;
            assert!(done > 0 && done <= range.end - start);
            start += done;
        }
        Ok(())
    }
}

fn shared_page(gfn: u64) -> Found {
    Vm::<Ept>::page(gfn, true, Level::L4K)
}

fn private_page(gfn: u64) -> Found {
    Found::Page {
        frame: usual_frame(FILE + gfn * PAGE),
        write: true,
        level: Level::L4K,
    }
}

const READ: Pferr = Pferr::USER;
const FIXED: Result<Outcome, FaultError> = Ok(Outcome::Fixed { level: Level::L4K });

fn the_attribute_says_which_half_is_mapped<F: Processor>() {
    let mut vm = vm::<F>();
    vm.private_slot(0, 0, 16);
    vm.set(4..8, true);
    for gfn in 0..16 {
        assert_eq!(vm.fault(gfn, Pferr::WRITE), FIXED);
        let expected = match (4..8).contains(&gfn) {
            true => private_page(gfn),
            false => shared_page(gfn),
        };
        assert_eq!(vm.found(gfn), expected);
    }
}

#[test]
fn a_fault_maps_the_half_that_the_attribute_says() {
    the_attribute_says_which_half_is_mapped::<Ept>();
    the_attribute_says_which_half_is_mapped::<Npt>();
}

/// Acceptance row 44.
#[test]
fn conversion_takes_the_other_half_and_keeps_its_own() {
    let mut vm = vm::<Ept>();
    vm.private_slot(0, 0, 16);
    vm.set(0..8, true);
    for gfn in 0..16 {
        assert_eq!(vm.fault(gfn, Pferr::WRITE), FIXED);
    }
    // Private to private touches nothing, and takes the shared half of the rest.
    vm.set(0..12, true);
    for gfn in 0..8 {
        assert_eq!(vm.found(gfn), private_page(gfn));
    }
    for gfn in 8..12 {
        assert_eq!(vm.found(gfn), Found::Nothing);
    }
    vm.set(4..16, false);
    for gfn in 0..16 {
        let expected = match gfn {
            0..4 => private_page(gfn),
            4..12 => Found::Nothing,
            _ => shared_page(gfn),
        };
        assert_eq!(vm.found(gfn), expected, "{gfn}");
    }
}

#[test]
fn setting_what_is_set_already_flushes_nothing_and_waits_for_nobody() {
    let mut vm = vm::<Ept>();
    vm.private_slot(0, 0, 16);
    vm.set(0..8, true);
    assert_eq!(vm.fault(3, READ), FIXED);
    let before = (
        vm.world.flushes.load(Ordering::Relaxed),
        vm.world.barriers.load(Ordering::Relaxed),
    );
    vm.set(0..8, true);
    vm.set(8..16, false);
    let after = (
        vm.world.flushes.load(Ordering::Relaxed),
        vm.world.barriers.load(Ordering::Relaxed),
    );
    assert_eq!(before, after);
    assert_eq!(vm.found(3), private_page(3));
}

#[test]
fn a_type_that_leaves_conversion_to_the_file_keeps_mappings() {
    let mut vm = Vm::<Ept>::with(protected(Conversion::LeaveToFile));
    vm.private_slot(0, 0, 4);
    assert_eq!(vm.fault(0, READ), FIXED);
    vm.set(0..4, true);
    assert_eq!(vm.found(0), shared_page(0));
    assert_eq!(vm.fault(1, READ), FIXED);
    assert_eq!(vm.found(1), private_page(1));
}

/// Acceptance row 45.
#[test]
fn a_change_of_host_memory_never_takes_private_mappings_and_a_hole_never_shared_ones() {
    let mut vm = vm::<Ept>();
    vm.private_slot(0, 0, 16);
    vm.set(0..8, true);
    for gfn in 0..16 {
        assert_eq!(vm.fault(gfn, READ), FIXED);
    }
    let hva = HVA..HVA + 12 * PAGE;
    let change = vm.mmu.begin_host_change(hva);
    for gfn in 0..16 {
        let expected = match gfn {
            0..8 => private_page(gfn),
            8..12 => Found::Nothing,
            _ => shared_page(gfn),
        };
        assert_eq!(vm.found(gfn), expected);
    }
    assert_eq!(vm.fault(9, READ), Ok(Outcome::Retry));
    vm.mmu.end_host_change(change);
    vm.punch(2..14);
    for gfn in 0..16 {
        let expected = match gfn {
            0..2 => private_page(gfn),
            2..12 => Found::Nothing,
            _ => shared_page(gfn),
        };
        assert_eq!(vm.found(gfn), expected);
    }
}

#[test]
fn a_hole_is_closed_to_faults_until_it_is_done() {
    let mut vm = vm::<Ept>();
    vm.private_slot(0, 0, 16);
    vm.set(0..16, true);
    let change = vm
        .mmu
        .begin_private_change(FILE + 4 * PAGE..FILE + 8 * PAGE);
    assert_eq!(vm.fault(5, READ), Ok(Outcome::Retry));
    assert_eq!(
        vm.mmu.prefault(&mut vm.reader, &vm.root, gfns(5..6)),
        Err(PrefaultError::Retry)
    );
    assert_eq!(vm.fault(8, READ), FIXED);
    vm.mmu.end_host_change(change);
    assert_eq!(vm.fault(5, READ), FIXED);
}

/// Acceptance row 43.
#[test]
fn one_page_of_another_kind_forbids_a_huge_page_until_it_is_flipped_back() {
    let mut vm = vm::<Ept>();
    *vm.world.level.lock().unwrap() = Level::L1G;
    vm.private_slot(0, 0, 1 << 19);
    let gigabyte = Level::L1G.frames();
    vm.set(gigabyte..2 * gigabyte, true);
    let levels = |vm: &mut Vm<Ept>, gfn: u64| match vm.fault(gfn, READ) {
        Ok(Outcome::Fixed { level }) => level,
        other => panic!("{other:?}"),
    };
    assert_eq!(levels(&mut vm, gigabyte + 7), Level::L1G);
    vm.set(gigabyte + 600..gigabyte + 601, false);
    // The gigabyte is gone as a whole, and does not come back.
    assert_eq!(vm.found(gigabyte + 7), Found::Nothing);
    assert_eq!(levels(&mut vm, gigabyte + 7), Level::L2M);
    assert_eq!(levels(&mut vm, gigabyte + 512), Level::L4K);
    assert_eq!(levels(&mut vm, gigabyte + 600), Level::L4K);
    assert_eq!(levels(&mut vm, 9), Level::L1G);
    vm.set(gigabyte + 600..gigabyte + 601, true);
    assert_eq!(vm.found(gigabyte + 600), Found::Nothing);
    vm.mmu.zap_all();
    vm.root = vm.mmu.load_root(RootRole::NORMAL).unwrap();
    assert_eq!(levels(&mut vm, gigabyte + 600), Level::L1G);
}

#[test]
fn an_access_that_no_half_can_serve_is_of_the_wrong_kind() {
    let mut vm = vm::<Ept>();
    vm.slot(0, 0, 16, 0);
    vm.set(0..32, true);
    let wrong = Err(FaultError::WrongKind { private: true });
    // No private half, and no slot.
    assert_eq!(vm.fault(3, READ), wrong);
    assert_eq!(vm.fault(20, READ), wrong);
    vm.set(20..21, false);
    assert_eq!(vm.fault(20, READ), Ok(Outcome::Mmio));
    let prefault = vm.mmu.prefault(&mut vm.reader, &vm.root, gfns(3..4));
    assert_eq!(
        prefault,
        Err(PrefaultError::Fault(FaultError::WrongKind {
            private: true
        }))
    );
}

#[test]
fn where_the_processor_says_what_is_private_both_must_agree() {
    let mut config = protected(Conversion::ZapOpposite);
    config.private_memory = Some(PrivateMemory {
        access: AccessKind::ByProcessor,
        conversion: Conversion::ZapOpposite,
    });
    let mut vm = Vm::<Ept>::with(config);
    vm.private_slot(0, 0, 16);
    vm.set(0..1, true);
    let private = READ.union(Pferr::PRIVATE_ACCESS);
    assert_eq!(
        vm.fault(0, READ),
        Err(FaultError::WrongKind { private: false })
    );
    assert_eq!(
        vm.fault(1, private),
        Err(FaultError::WrongKind { private: true })
    );
    assert_eq!(vm.fault(0, private), FIXED);
    assert_eq!(vm.fault(1, READ), FIXED);
}

#[test]
fn slots_of_a_file_are_refused_as_kvm_refuses_them() {
    let vm = vm::<Ept>();
    let at = |id, gfn, pages, flags| region(id, gfn, pages, (HVA >> 12) + gfn, flags);
    let bind = |region, address: Result<u64, GuestMemoryError>| {
        vm.mmu.set_region_with_guest_memory(region, || address)
    };
    for flags in [GUEST_MEMFD | LOG, GUEST_MEMFD | common::vm::READONLY] {
        assert_eq!(
            bind(at(0, 0, 4, flags), Ok(FILE)),
            Err(RegionError::Flags(flags))
        );
    }
    for error in [
        GuestMemoryError::BadDescriptor,
        GuestMemoryError::Unsuitable,
    ] {
        let refused = bind(at(0, 0, 4, GUEST_MEMFD), Err(error));
        assert_eq!(refused, Err(RegionError::GuestMemory(error)));
    }
    assert_eq!(bind(at(0, 0, 4, GUEST_MEMFD), Ok(FILE)), Ok(()));
    let overlap = Err(RegionError::GuestMemory(GuestMemoryError::Overlap));
    assert_eq!(
        bind(at(1, 16, 4, GUEST_MEMFD), Ok(FILE + 3 * PAGE)),
        overlap
    );
    // Slots overlap before files do.
    assert_eq!(
        bind(at(1, 3, 4, GUEST_MEMFD), Ok(FILE + 3 * PAGE)),
        Err(RegionError::Overlap)
    );
    // Neither moved, nor given, nor robbed of a file.
    assert_eq!(
        bind(at(0, 8, 4, GUEST_MEMFD), Ok(FILE)),
        Err(RegionError::Immutable)
    );
    assert_eq!(bind(at(0, 0, 4, 0), Ok(FILE)), Err(RegionError::Immutable));
    assert_eq!(bind(at(0, 0, 0, 0), Ok(FILE)), Ok(()));
    assert_eq!(bind(at(1, 16, 4, GUEST_MEMFD), Ok(FILE + PAGE)), Ok(()));
    assert!(vm.mmu.is_bound(FILE + PAGE..FILE + 2 * PAGE));
    assert!(!vm.mmu.is_bound(FILE..FILE + PAGE));
    let plain = Vm::<Ept>::new();
    let refused = plain
        .mmu
        .set_region_with_guest_memory(at(0, 0, 4, GUEST_MEMFD), || Ok(FILE));
    assert_eq!(refused, Err(RegionError::Flags(GUEST_MEMFD)));
    assert_eq!(
        plain.mmu.set_attributes(gfns(0..1), true),
        Err(AttributeError::Range)
    );
}
