//! Private memory: attributes, filters, guest memory files and pre-faulting, against a model and
//! against threads. A processor that knows only `twofold-arch` says what is mapped.

#![expect(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use common::vm::{HVA, LOG, Vm};
use common::{Found, HostState, Processor, TestHost, World, region, usual_frame};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
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

/// Acceptance rows 28 and 34.
#[test]
fn a_prefaulted_range_is_mapped_by_attribute_and_nothing_faults_in_it() {
    let mut vm = vm::<Ept>();
    vm.private_slot(0, 0, 3000);
    vm.set(700..1500, true);
    vm.set(1501..1502, true);
    assert_eq!(vm.prefault_all(5..2990), Ok(()));
    for gfn in 0..3000 {
        let private = (700..1500).contains(&gfn) || gfn == 1501;
        let expected = match gfn {
            0..5 | 2990.. => Found::Nothing,
            _ if private => private_page(gfn),
            _ => shared_page(gfn),
        };
        assert_eq!(vm.found(gfn), expected, "{gfn}");
    }
    assert_eq!(vm.mmu.stats().pages_4k, 2985);
}

/// Acceptance row 31.
#[test]
fn prefaulting_again_changes_nothing_and_each_root_has_its_own_slots() {
    let mut vm = vm::<Ept>();
    vm.slot(0, 0, 100, 0);
    vm.slot(1 << 16, 0, 50, 0);
    assert_eq!(vm.prefault_all(0..100), Ok(()));
    // From here on the reader has spare pages for tables at hand.
    assert_eq!(vm.prefault_all(0..100), Ok(()));
    let before = (
        vm.world.live_tables.load(Ordering::Relaxed),
        vm.world.flushes.load(Ordering::Relaxed),
    );
    for _ in 0..5 {
        assert_eq!(vm.prefault_all(0..100), Ok(()));
    }
    let after = (
        vm.world.live_tables.load(Ordering::Relaxed),
        vm.world.flushes.load(Ordering::Relaxed),
    );
    assert_eq!(before, after);
    let smm = RootRole {
        smm: true,
        ..RootRole::NORMAL
    };
    let smm = vm.mmu.load_root(smm).unwrap();
    let normal = std::mem::replace(&mut vm.root, smm);
    assert_eq!(vm.prefault_all(0..50), Ok(()));
    assert_eq!(vm.prefault_all(50..51), Err(PrefaultError::NoSlot));
    assert_eq!(vm.found(49), shared_page(49));
    vm.root = normal;
    assert_eq!(vm.found(99), shared_page(99));
}

/// Acceptance row 32.
#[test]
fn a_prefaulted_page_is_neither_accessed_nor_dirty_nor_marked() {
    fn entry(vm: &Vm<Ept>, gfn: u64) -> u64 {
        let mut table = vm.root.hpa();
        for level in [Level::L512G, Level::L1G, Level::L2M] {
            let entry = vm.world.entry(table, level.index(Gfn::new(gfn)));
            table = twofold_arch::Hpa::new(entry.load(Ordering::Acquire) & 0xf_ffff_ffff_f000);
        }
        let entry = vm.world.entry(table, (gfn % 512) as usize);
        entry.load(Ordering::Acquire)
    }
    const ACCESSED_DIRTY: u64 = 1 << 8 | 1 << 9;
    let mut vm = vm::<Ept>();
    vm.slot(0, 0, 64, 0);
    vm.slot(1, 64, 64, LOG);
    assert_eq!(vm.prefault_all(0..128), Ok(()));
    for gfn in 0..128 {
        assert_eq!(entry(&vm, gfn) & ACCESSED_DIRTY, 0, "{gfn}");
    }
    // The first write to a logged page is still noticed.
    assert_eq!(
        vm.found(64),
        Found::Page {
            frame: usual_frame(HVA + 64 * PAGE),
            write: false,
            level: Level::L4K
        }
    );
    let mut bitmap = [0];
    vm.mmu.dirty_log_get(0, 1, &mut bitmap).unwrap();
    assert_eq!(bitmap, [0]);
    assert_eq!(vm.fault(70, Pferr::WRITE.union(Pferr::PRESENT)), FIXED);
    vm.mmu.dirty_log_get(0, 1, &mut bitmap).unwrap();
    assert_eq!(bitmap, [1 << 6]);
}

#[test]
fn a_prefault_uses_huge_pages_where_a_fault_would() {
    let mut vm = vm::<Ept>();
    *vm.world.level_if_asked.lock().unwrap() = Level::L2M;
    vm.slot(0, 0, 2048, 0);
    vm.set(600..601, true);
    let outcome = vm.prefault_all(0..2048);
    // Without a private half one page cannot be mapped; what is before it was.
    assert_eq!(
        outcome,
        Err(PrefaultError::Fault(FaultError::WrongKind {
            private: true
        }))
    );
    let level = |gfn| match vm.found(gfn) {
        Found::Page { level, .. } => Some(level),
        _ => None,
    };
    assert_eq!(level(511), Some(Level::L2M));
    assert_eq!(level(599), Some(Level::L4K));
    assert_eq!(level(600), None);
}

#[test]
fn prefaulting_a_slot_that_is_being_deleted_asks_to_try_again() {
    let world = World::new(0x1000_0000_0000);
    let config = Config {
        slot_zap_all: false,
        ..Config::default()
    };
    let mmu = Arc::new(Mmu::<Ept, _>::new(TestHost(Arc::clone(&world)), config));
    mmu.set_region(region(0, 1, 4, HVA >> 12, 0)).unwrap();
    let root = mmu.load_root(RootRole::NORMAL).unwrap();
    let mut reader = mmu.reader();
    assert_eq!(mmu.prefault(&mut reader, &root, gfns(1..2)), Ok(1));
    // The deletion flushes what was mapped. At that moment the slot is there and invalid.
    let answer = Arc::new(Mutex::new(None));
    let (other, asked) = (Arc::clone(&mmu), Arc::clone(&answer));
    let others = Mutex::new((mmu.reader(), root.clone()));
    *world.on_flush.lock().unwrap() = Some(Arc::new(move || {
        let (reader, root) = &mut *others.lock().unwrap();
        *asked.lock().unwrap() = Some(other.prefault(reader, root, gfns(2..3)));
    }));
    mmu.set_region(region(0, 1, 0, HVA >> 12, 0)).unwrap();
    *world.on_flush.lock().unwrap() = None;
    let during = answer.lock().unwrap().take();
    assert_eq!(during, Some(Err(PrefaultError::SlotChanges)));
    let after = mmu.prefault(&mut reader, &root, gfns(2..3));
    assert_eq!(after, Err(PrefaultError::NoSlot));
}

#[test]
fn prefaulting_stops_where_host_memory_does() {
    let mut vm = vm::<Ept>();
    vm.slot(0, 0, 64, 0);
    let state = HostState {
        frame: 0,
        present: false,
        writable: false,
    };
    vm.world
        .memory
        .lock()
        .unwrap()
        .insert((HVA >> 12) + 40, state);
    let done = vm.mmu.prefault(&mut vm.reader, &vm.root, gfns(0..64));
    assert_eq!(done, Ok(40));
    let next = vm.mmu.prefault(&mut vm.reader, &vm.root, gfns(40..64));
    assert_eq!(next, Err(PrefaultError::Fault(FaultError::BadHostMemory)));
}

// ---- model --------------------------------------------------------------------------------------

const SLOT_PAGES: u64 = 24;
const FRAMES: u64 = 2 * SLOT_PAGES + 4;

#[derive(Clone, Debug)]
enum Op {
    Touch {
        gfn: u64,
        write: bool,
    },
    Prefault {
        start: u64,
        pages: u64,
    },
    Set {
        start: u64,
        pages: u64,
        private: bool,
    },
    /// A hole in the file: its pages are others afterwards.
    Punch {
        start: u64,
        pages: u64,
    },
    HostChange {
        start: u64,
        pages: u64,
    },
    /// Creates the slot, with or without a private half, or deletes it.
    Slot {
        id: u32,
        private: bool,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let range = (0..FRAMES, 1u64..12);
    prop_oneof![
        6 => (0..FRAMES, any::<bool>()).prop_map(|(gfn, write)| Op::Touch { gfn, write }),
        2 => range.clone().prop_map(|(start, pages)| Op::Prefault { start, pages }),
        3 => (range.clone(), any::<bool>())
            .prop_map(|((start, pages), private)| Op::Set { start, pages, private }),
        2 => range.clone().prop_map(|(start, pages)| Op::Punch { start, pages }),
        1 => range.prop_map(|(start, pages)| Op::HostChange { start, pages }),
        1 => (0u32..2, any::<bool>()).prop_map(|(id, private)| Op::Slot { id, private }),
    ]
}

#[derive(Default)]
struct Model {
    /// Slots by id, and whether they have a private half.
    slots: BTreeMap<u32, bool>,
    private: Vec<bool>,
    /// What is mapped: the frame.
    mapped: BTreeMap<u64, (bool, u64)>,
    /// Holes made so far, by file page.
    holes: Vec<u64>,
}

impl Model {
    fn slot(&self, gfn: u64) -> Option<bool> {
        self.slots.get(&((gfn / SLOT_PAGES) as u32)).copied()
    }

    fn frame(&self, gfn: u64, private: bool) -> u64 {
        match private {
            true => usual_frame(FILE + gfn * PAGE) + (self.holes[gfn as usize] << 20),
            false => usual_frame(HVA + gfn * PAGE),
        }
    }

    /// Whether the frame could be mapped; it is now.
    fn map(&mut self, gfn: u64) -> bool {
        let private = self.private[gfn as usize];
        match self.slot(gfn) {
            Some(file) if file || !private => {
                let frame = self.frame(gfn, private);
                self.mapped.insert(gfn, (private, frame));
                true
            }
            _ => false,
        }
    }
}

fn run<F: Processor>(ops: &[Op]) {
    let mut vm = vm::<F>();
    let mut model = Model {
        private: vec![false; FRAMES as usize],
        holes: vec![0; FRAMES as usize],
        ..Model::default()
    };
    for op in ops {
        match *op {
            Op::Touch { gfn, write } => {
                let error = if write { Pferr::WRITE } else { READ };
                let outcome = vm.fault(gfn, error);
                let was = model.mapped.contains_key(&gfn);
                let private = model.private[gfn as usize];
                match outcome {
                    Ok(Outcome::Fixed { .. }) => assert!(!was && model.map(gfn)),
                    Ok(Outcome::Spurious) => assert!(was),
                    Ok(Outcome::Mmio) => assert!(model.slot(gfn).is_none() && !private),
                    Err(FaultError::WrongKind { private: true }) => {
                        assert!(private && model.slot(gfn) != Some(true));
                    }
                    other => panic!("{op:?}: {other:?}"),
                }
            }
            Op::Prefault { start, pages } => {
                let end = (start + pages).min(FRAMES);
                let result = vm.prefault_all(start..end);
                let mut gfn = start;
                while gfn < end && (model.mapped.contains_key(&gfn) || model.map(gfn)) {
                    gfn += 1;
                }
                let expected = match (gfn == end, gfn < end && model.private[gfn as usize]) {
                    (true, _) => Ok(()),
                    (_, true) => Err(FaultError::WrongKind { private: true }.into()),
                    (_, false) => Err(PrefaultError::NoSlot),
                };
                assert_eq!(result, expected, "{op:?}");
            }
            Op::Set {
                start,
                pages,
                private,
            } => {
                let end = (start + pages).min(FRAMES);
                vm.set(start..end, private);
                model.private[start as usize..end as usize].fill(private);
                model
                    .mapped
                    .retain(|gfn, (kind, _)| !(start..end).contains(gfn) || *kind == private);
            }
            Op::Punch { start, pages } => {
                let end = (start + pages).min(FRAMES);
                let addresses = FILE + start * PAGE..FILE + end * PAGE;
                let change = vm.mmu.begin_private_change(addresses);
                for gfn in start..end {
                    model.holes[gfn as usize] += 1;
                    let state = HostState {
                        frame: model.frame(gfn, true),
                        present: true,
                        writable: true,
                    };
                    let mut memory = vm.world.memory.lock().unwrap();
                    memory.insert((FILE >> 12) + gfn, state);
                }
                vm.mmu.end_host_change(change);
                model
                    .mapped
                    .retain(|gfn, (kind, _)| !(start..end).contains(gfn) || !*kind);
            }
            Op::HostChange { start, pages } => {
                let end = (start + pages).min(FRAMES);
                drop(vm.mmu.host_change(HVA + start * PAGE..HVA + end * PAGE));
                model
                    .mapped
                    .retain(|gfn, (kind, _)| !(start..end).contains(gfn) || *kind);
            }
            Op::Slot { id, private } => {
                let first = u64::from(id) * SLOT_PAGES;
                if model.slots.remove(&id).is_some() {
                    let deleted = region(id, first, 0, 0, 0);
                    vm.mmu.set_region(deleted).unwrap();
                    let slot = first..first + SLOT_PAGES;
                    model.mapped.retain(|gfn, _| !slot.contains(gfn));
                } else {
                    match private {
                        true => vm.private_slot(id, first, SLOT_PAGES),
                        false => vm.slot(id, first, SLOT_PAGES, 0),
                    }
                    model.slots.insert(id, private);
                }
            }
        }
        for gfn in 0..FRAMES {
            let expected = model.mapped.get(&gfn).map(|(_, frame)| *frame);
            let found = match vm.found(gfn) {
                Found::Page { frame, level, .. } => {
                    assert_eq!(level, Level::L4K);
                    Some(frame)
                }
                // Remembered absence of memory.
                Found::Nothing | Found::Refused => None,
            };
            assert_eq!(found, expected, "gfn {gfn} after {op:?}");
            assert_eq!(
                vm.mmu.is_private(Gfn::new(gfn)),
                model.private[gfn as usize]
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 160, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_operation_takes_exactly_the_mappings_that_it_should(
        ops in prop::collection::vec(op(), 1..60),
    ) {
        run::<Ept>(&ops);
        run::<Npt>(&ops);
    }
}

// ---- threads ------------------------------------------------------------------------------------

/// Acceptance row 47: processors fault, while others convert, punch holes and delete slots. After each
/// change the one who made it looks at what is mapped. Ends after a number of changes.
#[test]
fn a_storm_of_conversions_holes_and_deletions_never_leaves_a_mapping_of_the_past() {
    const PAGES: u64 = 512;
    const ROUNDS: u64 = 300;
    let Vm {
        world,
        mmu,
        reader,
        root,
    } = vm::<Ept>();
    drop(reader);
    let mmu = Arc::new(mmu);
    let create = |id: u32| {
        let gfn = u64::from(id) * PAGES;
        let region = region(id, gfn, PAGES, (HVA >> 12) + gfn, GUEST_MEMFD);
        mmu.set_region_with_guest_memory(region, || Ok(FILE + gfn * PAGE))
            .unwrap();
    };
    for id in 0..2 {
        create(id);
    }
    let hpa = root.hpa();
    let found = |gfn: u64| common::walk::<Ept>(&world, hpa, Level::L512G, Gfn::new(gfn).address());
    let stop = AtomicBool::new(false);
    let faults = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for seed in 1..3u64 {
            let (mmu, root, stop, faults) = (&mmu, &root, &stop, &faults);
            scope.spawn(move || {
                let mut reader = mmu.reader();
                let mut random = seed;
                while !stop.load(Ordering::Relaxed) {
                    random = random
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    let gfn = Gfn::new(random >> 40 & (2 * PAGES - 1));
                    let error = [READ, Pferr::WRITE][(random >> 33 & 1) as usize];
                    let gpa = gfn.address();
                    match mmu.fault(&mut reader, root, Fault { gpa, error }) {
                        Ok(_) => {
                            faults.fetch_add(1, Ordering::Relaxed);
                        }
                        Err(FaultError::WrongKind { .. }) => {}
                        Err(other) => panic!("{other:?}"),
                    }
                    if random >> 50 & 63 == 0 {
                        let range = gfn..Gfn::new(gfn.get() + 64);
                        let _ = mmu.prefault(&mut reader, root, range);
                    }
                }
            });
        }
        let converter = scope.spawn(|| {
            for round in 0..ROUNDS {
                let start = round * 37 % (PAGES - 64);
                let private = round % 2 == 0;
                mmu.set_attributes(gfns(start..start + 64), private)
                    .unwrap();
                for gfn in start..start + 64 {
                    // Only this thread changes these attributes.
                    if let Found::Page { frame, .. } = found(gfn) {
                        assert_eq!(frame >= usual_frame(FILE), private, "gfn {gfn}");
                    }
                }
            }
        });
        let puncher = scope.spawn(|| {
            for round in 0..ROUNDS {
                let start = round * 53 % (2 * PAGES - 64);
                let file = FILE + start * PAGE..FILE + (start + 64) * PAGE;
                let change = mmu.begin_private_change(file);
                for gfn in start..start + 64 {
                    if let Found::Page { frame, .. } = found(gfn) {
                        assert!(frame < usual_frame(FILE), "a hole is mapped at {gfn}");
                    }
                }
                mmu.end_host_change(change);
            }
        });
        let deleter = scope.spawn(|| {
            for _ in 0..ROUNDS / 4 {
                mmu.set_region(region(1, PAGES, 0, 0, 0)).unwrap();
                for gfn in PAGES..2 * PAGES {
                    let found = found(gfn);
                    assert!(!matches!(found, Found::Page { .. }), "a deleted slot");
                }
                create(1);
            }
        });
        for thread in [converter, puncher, deleter] {
            let result = thread.join();
            if result.is_err() {
                stop.store(true, Ordering::Relaxed);
            }
            result.unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(faults.load(Ordering::Relaxed) > 0);
}
