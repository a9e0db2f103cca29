//! What was wrong with the patches of 2020 (SPEC 1.7), by the numbers there. Those that are about
//! ioctls and the emulator have their tests elsewhere; `docs/spp.md` says which, and why others
//! cannot exist here.

use crate::common::PLENTY;
use crate::common::guarded::{AT_ONCE, Guarded, Refused, Written, vector};
use crate::common::vm::{HVA, Vm, fixed};
use crate::common::{Found, region};
use crate::paths::huge;
use crate::{at, config, maps, vm};
use proptest::prelude::*;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use twofold_arch::sppt::AccessMap;
use twofold_arch::{Gfn, Gpa, Level, Pferr};
use twofold_mmu::{Ept, Mmu, MmuFormat, RootRole, SubPageError};

fn sppt(vm: &Vm<Ept>) -> twofold_arch::Hpa {
    vm.mmu.sppt_root(RootRole::NORMAL).unwrap()
}

fn live(vm: &Vm<Ept>) -> usize {
    vm.world.live_tables.load(Ordering::Relaxed)
}

#[test]
fn d1_a_region_of_which_the_range_has_one_frame_is_cut_like_the_others() {
    let mut vm = vm();
    vm.slot(0, 0, 2048, 0);
    for gfn in [100, 512] {
        vm.protect(gfn, 0x3);
        assert!(vm.write(at(gfn, 1)).is_done());
    }
    // 412 frames of the first region, one of the second.
    vm.mmu
        .set_access(0, Gfn::new(100), &maps(&[0x1; 413]))
        .unwrap();
    for gfn in [100, 512] {
        let found = vector(&vm.world, sppt(&vm), Gpa::new(at(gfn, 0)));
        assert_eq!(found, Err(Refused::Miss));
        assert_eq!(vm.write(at(gfn, 1)), Written::Denied);
        assert!(vm.write(at(gfn, 0)).is_done());
    }
    vm.is_sound();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    /// D2: loops that count by the wrong bound. D3: maps that land on other frames. D5: edges.
    #[test]
    fn d2_d3_d5_every_frame_of_any_range_gets_its_own_map_and_no_other_frame_gets_any(
        first in 0u64..1536,
        set in prop::collection::vec(prop_oneof![Just(u32::MAX), Just(0), any::<u32>()], 1..=512),
        host in prop_oneof![Just(Level::L4K), Just(Level::L2M), Just(Level::L1G)],
        mapped in 0u64..4,
    ) {
        let mut vm = huge(host);
        vm.slot(0, 0, 2048, 0);
        for gfn in (mapped..2048).step_by(97).take(if mapped == 0 { 0 } else { 22 }) {
            prop_assert!(vm.write(at(gfn, 0)).is_done());
        }
        vm.mmu.set_access(0, Gfn::new(first), &maps(&set)).unwrap();
        vm.is_sound();
        for gfn in 0u64..2048 {
            let map = match gfn.checked_sub(first) {
                Some(index) => set.get(index as usize).copied().unwrap_or(u32::MAX),
                None => u32::MAX,
            };
            prop_assert_eq!(vm.map_of(gfn), map);
            let sub_page = (gfn * 7 + 3) % 32;
            let allowed = map >> sub_page & 1 != 0;
            prop_assert_eq!(vm.write(at(gfn, sub_page)).is_done(), allowed, "gfn {:#x}", gfn);
        }
        vm.is_sound();
    }
}

#[test]
fn d4_ranges_that_wrap_or_end_beyond_the_table_are_refused() {
    let vm = vm();
    vm.slot(0, 0, 16, 0);
    for first in [u64::MAX, u64::MAX - 511, 1 << 52, (1 << 36) - 511] {
        let refused = vm.mmu.set_access(0, Gfn::new(first), &maps(&[0; 512]));
        assert_eq!(refused, Err(SubPageError::Range), "{first:#x}");
        let refused = vm.mmu.get_access(0, Gfn::new(first), &mut maps(&[0; 512]));
        assert_eq!(refused, Err(SubPageError::Range), "{first:#x}");
    }
}

#[test]
fn d5_the_last_frame_of_a_slot_can_be_protected_and_the_one_after_it_is_none() {
    let mut vm = vm();
    vm.slot(0, 0, 16, 0);
    vm.protect(15, 0);
    assert_eq!(vm.write(at(15, 31)), Written::Denied);
    let refused = vm.mmu.set_access(0, Gfn::new(16), &maps(&[0]));
    assert_eq!(refused, Err(SubPageError::NoSlot(Gfn::new(16))));
    // No frames at all is no error, wherever they would be.
    for first in [0, 16, u64::MAX] {
        assert_eq!(vm.mmu.set_access(0, Gfn::new(first), &[]), Ok(()));
        assert_eq!(vm.mmu.get_access(0, Gfn::new(first), &mut []), Ok(()));
    }
}

/// D6: a map half changed. D7: leaves changed and not flushed.
#[test]
fn d6_d7_a_refused_call_has_changed_no_map_and_no_leaf() {
    let mut vm = vm();
    vm.slot(0, 0, 100, 0);
    for gfn in 0..100 {
        assert!(vm.write(at(gfn, 0)).is_done());
    }
    let (flushes, leaf) = (vm.world.flushes.load(Ordering::Relaxed), vm.raw_leaf(50));
    for count in [101, 300, 512] {
        let refused = vm.mmu.set_access(0, Gfn::new(0), &maps(&vec![0; count]));
        assert_eq!(refused, Err(SubPageError::NoSlot(Gfn::new(100))));
    }
    assert_eq!(vm.raw_leaf(50), leaf);
    assert_eq!(vm.world.flushes.load(Ordering::Relaxed), flushes);
    assert!((0..100).all(|gfn| vm.map_of(gfn) == u32::MAX));
}

/// D8: success although nobody looks. D10: enabled before there is a processor. D11: a processor
/// that comes later. D16: a processor that is not there.
#[test]
fn d8_d10_d11_d16_maps_set_without_any_processor_bind_those_that_come_later() {
    let world = crate::common::World::new(0x1000_0000_0000);
    let host = crate::common::TestHost(Arc::clone(&world));
    let mmu = Mmu::<Ept, _>::new(host, config());
    mmu.enable_sub_pages().unwrap();
    let sppt = mmu.sppt_root(RootRole::NORMAL).unwrap();
    mmu.set_region(region(0, 0, 64, HVA >> 12, 0)).unwrap();
    mmu.set_access(0, Gfn::new(7), &maps(&[2])).unwrap();
    let mut vm = Vm {
        reader: mmu.reader(),
        root: mmu.load_root(RootRole::NORMAL).unwrap(),
        world,
        mmu,
    };
    assert_eq!(vm.mmu.sppt_root(RootRole::NORMAL), Some(sppt));
    assert_eq!(vm.write(at(7, 0)), Written::Denied);
    assert!(vm.write(at(7, 1)).is_done());
    // Every root goes, and maps are set while there is none that is valid.
    vm.mmu.zap_all();
    vm.mmu.set_access(0, Gfn::new(7), &maps(&[4])).unwrap();
    vm.root = vm.root_of(RootRole::NORMAL);
    assert_eq!(vm.write(at(7, 1)), Written::Denied);
    assert!(vm.write(at(7, 2)).is_done());
    vm.is_sound();
}

/// D9: failures that are not looked at. D13: an error that takes along what an earlier call made.
#[test]
fn d9_d13_enabling_without_memory_fails_whole_and_later_failures_take_nothing_along() {
    let vm = Vm::<Ept>::with(config());
    vm.slot(0, 0, 64, 0);
    let before = live(&vm);
    for budget in 0..2 {
        vm.world.budget.store(budget, Ordering::Relaxed);
        assert_eq!(vm.mmu.enable_sub_pages(), Err(SubPageError::OutOfMemory));
        assert_eq!(live(&vm), before);
        assert_eq!(vm.mmu.sppt_root(RootRole::NORMAL), None);
    }
    vm.world.budget.store(PLENTY, Ordering::Relaxed);
    vm.mmu.enable_sub_pages().unwrap();
    vm.protect(7, 2);
    vm.world.budget.store(0, Ordering::Relaxed);
    assert_eq!(vm.mmu.enable_sub_pages(), Ok(()));
    assert_eq!(vm.map_of(7), 2);
}

/// D14: reading without a lock. Each call of `get_access` sees all of a change or nothing.
#[test]
fn d14_maps_are_read_as_they_are_at_one_moment() {
    let vm = vm();
    vm.slot(0, 0, 1024, 0);
    let end = AtomicBool::new(false);
    std::thread::scope(|threads| {
        threads.spawn(|| {
            for round in 0..60u32 {
                let set = vec![AccessMap(round); 512];
                vm.mmu.set_access(0, Gfn::new(256), &set).unwrap();
            }
            end.store(true, Ordering::Release);
        });
        let mut read = vec![AccessMap(0); 512];
        while !end.load(Ordering::Acquire) {
            vm.mmu.get_access(0, Gfn::new(256), &mut read).unwrap();
            assert!(read.iter().all(|map| *map == read[0]));
        }
    });
}

/// D17: a miss between the cut and the new maps would bring the old ones back. Guests that miss all
/// the time, against a program that sets; `tests/interleavings` does it in every order.
#[test]
fn d17_a_miss_during_a_change_never_brings_old_permissions_back() {
    let vm = vm();
    vm.slot(0, 0, 512, 0);
    vm.protect(7, 1);
    // Bit 1 is allowed while this is even.
    let allowed = AtomicU64::new(1);
    let end = AtomicBool::new(false);
    std::thread::scope(|threads| {
        for _ in 0..2 {
            threads.spawn(|| {
                let mut reader = vm.mmu.reader();
                while !end.load(Ordering::Acquire) {
                    let gpa = Gpa::new(at(7, 1));
                    vm.mmu.sppt_miss(&mut reader, &vm.root, gpa).unwrap();
                }
            });
        }
        for round in 0..400u32 {
            allowed.store(u64::from(round), Ordering::Relaxed);
            vm.protect(7, 1 | (round & 1) << 1);
            let found = vector(&vm.world, sppt(&vm), Gpa::new(at(7, 1)));
            match found {
                Ok(map) => assert_eq!(map.0, 1 | (round & 1) << 1),
                Err(Refused::Miss) => {}
                Err(other) => panic!("{other:?}"),
            }
        }
        end.store(true, Ordering::Release);
    });
    vm.is_sound();
}

/// D18: one root is looked at. D19: a mapping of the frame is passed over.
#[test]
fn d18_d19_no_mapping_of_a_frame_below_any_root_stays_writable() {
    let mut vm = huge(Level::L2M);
    // Two slots with the same host memory, and a range that has parts of both.
    let pages = |id, gfn| region(id, gfn, 512, HVA >> 12, 0);
    vm.mmu.set_region(pages(0, 0)).unwrap();
    vm.mmu.set_region(pages(1, 512)).unwrap();
    let roles = [
        RootRole::NORMAL,
        RootRole {
            level: Level::L256T,
            ..RootRole::NORMAL
        },
        RootRole {
            guest_mode: true,
            ..RootRole::NORMAL
        },
    ];
    let roots = roles.map(|role| vm.root_of(role));
    for root in &roots {
        for gfn in [0, 512] {
            assert!(vm.write_by(root, at(gfn, 0), 1).unwrap().is_done());
        }
    }
    assert_eq!(vm.mmu.stats().pages_2m, 6);
    let all = maps(&[0; 512]);
    vm.mmu.set_access(0, Gfn::new(256), &all).unwrap();
    vm.is_sound();
    let stats = vm.mmu.stats();
    assert_eq!((stats.pages_2m, stats.pages_4k), (0, 6 * 512));
    for root in &roots {
        for gfn in [256, 511, 512, 767] {
            let written = vm.write_by(root, at(gfn, 0), 1).unwrap();
            assert_eq!(written, Written::Denied);
        }
        for gfn in [255, 768] {
            assert_eq!(vm.write_by(root, at(gfn, 0), 1), Ok(AT_ONCE));
        }
    }
}

/// D20: what was mapped is dropped instead of weakened.
#[test]
fn d20_reading_a_page_that_becomes_protected_never_stops() {
    for level in [Level::L4K, Level::L2M, Level::L1G] {
        let mut vm = huge(level);
        vm.slot(0, 0, 1 << 18, 0);
        for gfn in [7, 8] {
            assert!(vm.write(at(gfn, 0)).is_done());
        }
        vm.protect(7, 0);
        assert_eq!(vm.found(7), Vm::<Ept>::page(7, false, Level::L4K));
        assert_eq!(vm.found(8), Vm::<Ept>::page(8, true, Level::L4K));
    }
}

/// D21: after the huge leaf of a gigabyte was taken out, the walk went on in physical page 0.
#[test]
fn d21_a_page_of_a_gigabyte_is_protected_without_memory_for_tables() {
    let mut vm = huge(Level::L1G);
    vm.slot(0, 0, 2 << 18, 0);
    for gfn in [5, (1 << 18) + 5] {
        assert_eq!(vm.fault(gfn, Pferr::WRITE), fixed(Level::L1G));
    }
    vm.world.budget.store(0, Ordering::Relaxed);
    let range = (1 << 18) - 256;
    vm.mmu
        .set_access(0, Gfn::new(range), &maps(&[0; 512]))
        .unwrap();
    assert_eq!(vm.found(5), Found::Nothing);
    assert_eq!(vm.found((1 << 18) + 5), Found::Nothing);
    assert_eq!(vm.mmu.stats().pages_1g, 0);
    vm.is_sound();
}

#[test]
fn d22_the_last_full_map_of_a_region_brings_its_huge_page_back() {
    let mut vm = huge(Level::L2M);
    vm.slot(0, 0, 1024, 0);
    assert_eq!(vm.fault(5, Pferr::WRITE), fixed(Level::L2M));
    for _ in 0..3 {
        vm.mmu
            .set_access(0, Gfn::new(5), &maps(&[0, 1, 2]))
            .unwrap();
        assert_eq!(vm.mmu.stats().pages_2m, 0);
        vm.mmu
            .set_access(0, Gfn::new(5), &maps(&[u32::MAX; 2]))
            .unwrap();
        assert_eq!(vm.mmu.stats().pages_2m, 0);
        vm.protect(7, u32::MAX);
        assert_eq!(vm.mmu.stats().pages_2m, 1);
        assert!(vm.write(at(5, 0)).is_done());
    }
    vm.is_sound();
}

#[test]
fn d23_vectors_that_were_cut_are_given_back_and_nothing_misses_for_ever() {
    let mut vm = vm();
    vm.slot(0, 0, 512, 0);
    vm.protect(3, 1);
    vm.protect(9, 1);
    assert!(vm.write(at(3, 0)).is_done());
    assert!(vm.write(at(9, 0)).is_done());
    let mut before = None;
    for round in 1..20 {
        vm.protect(3, 1 | round << 1);
        // A neighbour misses once and finds what it had.
        assert!(matches!(
            vm.write(at(9, 0)),
            Written::Done { misses: 1, .. }
        ));
        assert_eq!(vm.write(at(9, 0)), AT_ONCE);
        // From the second time on no table is missing but the vectors'.
        assert_eq!(*before.get_or_insert(live(&vm)), live(&vm));
    }
    for gfn in [3, 9] {
        vm.protect(gfn, u32::MAX);
    }
    assert_eq!(Some(live(&vm) + 1), before, "nobody needs vectors any more");
    for gfn in 0..16 {
        assert!(matches!(
            vm.write(at(gfn, 5)),
            Written::Done { misses: 0, .. }
        ));
    }
    vm.is_sound();
}

#[test]
fn d24_a_miss_flushes_nothing() {
    let mut vm = vm();
    vm.slot(0, 0, 512, 0);
    vm.mmu.set_access(0, Gfn::new(0), &maps(&[1; 512])).unwrap();
    let (flushes, barriers) = (&vm.world.flushes, &vm.world.barriers);
    let before = (
        flushes.load(Ordering::Relaxed),
        barriers.load(Ordering::Relaxed),
    );
    vm.mmu
        .sppt_miss(&mut vm.reader, &vm.root, Gpa::new(at(5, 0)))
        .unwrap();
    let after = (
        flushes.load(Ordering::Relaxed),
        barriers.load(Ordering::Relaxed),
    );
    assert_eq!(before, after);
}

/// D25: slots of later have no maps. D26: the end of one slot ends the protection of all.
#[test]
fn d25_d26_a_slot_that_comes_later_is_protected_and_its_end_is_its_own() {
    let mut vm = vm();
    vm.slot(0, 0, 64, 0);
    vm.protect(5, 0);
    vm.slot(1, 64, 64, 0);
    vm.protect(70, 0);
    assert_eq!(vm.write(at(70, 0)), Written::Denied);
    vm.mmu.set_region(region(1, 64, 0, 0, 0)).unwrap();
    assert_eq!(vm.write(at(5, 0)), Written::Denied);
    vm.slot(1, 64, 64, 0);
    assert!(vm.write(at(70, 0)).is_done());
    vm.protect(70, 0);
    assert_eq!(vm.write(at(70, 0)), Written::Denied);
    vm.is_sound();
}

#[test]
fn d28_the_table_has_four_levels_below_an_ept_of_five() {
    let mut vm = vm();
    // Bit 47 is in use; bits 56:48 are no part of the walk.
    let far = (1 << 36) - 64;
    vm.mmu.set_region(region(0, far, 64, HVA >> 12, 0)).unwrap();
    vm.mmu
        .set_access(0, Gfn::new(far + 63), &maps(&[2]))
        .unwrap();
    let root = vm.root_of(RootRole {
        level: Level::L256T,
        ..RootRole::NORMAL
    });
    let mut write = |sub_page| vm.write_by(&root, at(far + 63, sub_page), 1).unwrap();
    assert!(write(1).is_done());
    assert_eq!(write(0), Written::Denied);
    let map = vector(&vm.world, sppt(&vm), Gpa::new(at(far + 63, 0)));
    assert_eq!(map, Ok(AccessMap(2)));
    // Where the table does not reach, nothing is protected and everything works.
    let beyond = region(1, 1 << 36, 64, HVA >> 12, 0);
    vm.mmu.set_region(beyond).unwrap();
    assert!(vm.write_by(&root, at(1 << 36, 0), 1).unwrap().is_done());
    vm.is_sound();
}

#[test]
fn d29_permissions_are_reduced_in_the_one_order_that_is_right() {
    let mut vm = vm();
    vm.slot(0, 0, 512, 0);
    vm.protect(9, 3);
    for gfn in [7, 9] {
        assert!(vm.write(at(gfn, 0)).is_done());
    }
    let log = Arc::new(Mutex::new(Vec::new()));
    let (world, table, root) = (Arc::clone(&vm.world), sppt(&vm), vm.root.hpa());
    let events = Arc::clone(&log);
    *vm.world.on_flush.lock().unwrap() = Some(Arc::new(move || {
        // Before any processor forgets what it knew, there is nothing old left to find.
        let cut = vector(&world, table, Gpa::new(at(9, 0)));
        let page = crate::common::walk::<Ept>(&world, root, Level::L512G, Gpa::new(at(7, 0)));
        let read_only = matches!(page, Found::Page { write: false, .. });
        events
            .lock()
            .unwrap()
            .push(format!("flush {cut:?} {read_only}"));
    }));
    let events = Arc::clone(&log);
    *vm.world.on_free.lock().unwrap() = Some(Arc::new(move || {
        events.lock().unwrap().push("free".into());
    }));
    vm.mmu
        .set_access(0, Gfn::new(7), &maps(&[1, u32::MAX, 1]))
        .unwrap();
    *vm.world.on_flush.lock().unwrap() = None;
    *vm.world.on_free.lock().unwrap() = None;
    // One flush for all of it, and vectors that a processor may have been reading go after it.
    assert_eq!(*log.lock().unwrap(), ["flush Err(Miss) true", "free"]);
    for gfn in [7, 9] {
        assert_eq!(vm.write(at(gfn, 1)), Written::Denied);
        assert!(vm.write(at(gfn, 0)).is_done());
    }
}

#[test]
fn d29_a_narrower_map_is_flushed_although_the_leaf_stays_as_it_is() {
    let mut vm = vm();
    vm.slot(0, 0, 512, 0);
    vm.protect(9, 3);
    assert!(vm.write(at(9, 1)).is_done());
    let (leaf, flushes) = (vm.raw_leaf(9), vm.world.flushes.load(Ordering::Relaxed));
    // A processor may remember the vector that it has read.
    vm.protect(9, 1);
    assert_eq!(vm.raw_leaf(9), leaf);
    assert_eq!(vm.world.flushes.load(Ordering::Relaxed), flushes + 1);
    // What no processor can have read needs no flush.
    vm.protect(9, 3);
    assert_eq!(vm.world.flushes.load(Ordering::Relaxed), flushes + 1);
}

/// D30: whole pages are judged instead of the sub-pages that are touched, and the address is
/// sometimes a frame's. (The emulator's part is tested with the processor.)
#[test]
fn d30_the_first_denied_byte_of_a_write_is_named_by_its_address() {
    let vm = vm();
    vm.slot(0, 0, 64, 0);
    vm.protect(7, 0xffff_0ff0);
    let first = |offset, bytes| {
        let denied = vm.mmu.first_denied(0, Gpa::new(at(7, 0) + offset), bytes);
        denied.map(|gpa| gpa.get() - at(7, 0))
    };
    assert_eq!(first(4 * 128, 8 * 128), None);
    assert_eq!(first(4 * 128 - 1, 2), Some(4 * 128 - 1));
    assert_eq!(first(12 * 128 - 1, 2), Some(12 * 128));
    assert_eq!(first(5 * 128, 4096), Some(12 * 128));
    assert_eq!(first(4095, 1), None);
    assert_eq!(first(0, 0), None);
    assert_eq!(vm.mmu.first_denied(1, Gpa::new(at(7, 0)), 1), None);
}

/// D31: mapped writable first and protected afterwards.
#[test]
fn d31_what_is_mapped_ahead_is_protected_from_the_first_moment() {
    let mut vm = vm();
    vm.slot(0, 0, 512, 0);
    vm.mmu
        .set_access(0, Gfn::new(3), &maps(&[0, 1, u32::MAX]))
        .unwrap();
    let flushes = vm.world.flushes.load(Ordering::Relaxed);
    let all = Gfn::new(0)..Gfn::new(512);
    assert_eq!(vm.mmu.prefault(&mut vm.reader, &vm.root, all), Ok(512));
    assert_eq!(vm.world.flushes.load(Ordering::Relaxed), flushes);
    for gfn in [3, 4] {
        let leaf = vm.raw_leaf(gfn);
        assert_eq!(leaf & (Ept::WRITE | Ept::ACCESSED | Ept::DIRTY), 0);
        assert_ne!(leaf & Ept::SUB_PAGE_WRITE, 0);
    }
    assert_ne!(vm.raw_leaf(5) & Ept::WRITE, 0);
    assert_eq!(vm.write(at(3, 0)), Written::Denied);
    assert!(vm.write(at(4, 0)).is_done());
    vm.is_sound();
}
