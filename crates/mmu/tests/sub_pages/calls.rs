//! Enabling sub-pages, setting and getting maps, and what is refused: rows 1 to 3, 12 and 13 of the
//! feature table.

use crate::common::guarded::{Guarded, Written};
use crate::common::vm::{HVA, READONLY, Vm};
use crate::common::{PLENTY, region};
use crate::{at, config, maps, vm};
use proptest::prelude::*;
use std::sync::atomic::Ordering;
use twofold_arch::sppt::AccessMap;
use twofold_arch::{Gfn, Pferr};
use twofold_mmu::{
    AccessKind, Config, Conversion, Ept, Npt, PrivateMemory, RootRole, SUB_PAGE_MAX_PAGES,
    SubPageError,
};

const FULL: AccessMap = AccessMap::FULL;

#[test]
fn nothing_is_set_or_read_before_sub_pages_are_enabled() {
    let vm = Vm::<Ept>::with(config());
    vm.slot(0, 0, 16, 0);
    let not_enabled = Err(SubPageError::NotEnabled);
    assert_eq!(vm.mmu.set_access(0, Gfn::new(0), &[FULL]), not_enabled);
    assert_eq!(vm.mmu.get_access(0, Gfn::new(0), &mut [FULL]), not_enabled);
    assert_eq!(vm.mmu.set_access(0, Gfn::new(0), &[]), not_enabled);
    assert_eq!(vm.mmu.sppt_root(RootRole::NORMAL), None);
    vm.mmu.enable_sub_pages().unwrap();
    assert_eq!(vm.mmu.set_access(0, Gfn::new(0), &[FULL]), Ok(()));
}

#[test]
fn processors_without_sub_pages_and_trust_domains_cannot_enable_them() {
    let amd = Vm::<Npt>::with(config());
    assert_eq!(amd.mmu.enable_sub_pages(), Err(SubPageError::NotEnabled));
    let td = Vm::<Ept>::with(Config {
        private_memory: Some(PrivateMemory {
            access: AccessKind::ByProcessor,
            conversion: Conversion::ZapOpposite,
        }),
        ..config()
    });
    assert_eq!(td.mmu.enable_sub_pages(), Err(SubPageError::NotEnabled));
}

#[test]
fn each_address_space_has_a_table_that_stays() {
    let vm = vm();
    let smm = RootRole {
        smm: true,
        ..RootRole::NORMAL
    };
    let guest = RootRole {
        guest_mode: true,
        ..RootRole::NORMAL
    };
    let roots = [RootRole::NORMAL, smm, guest].map(|role| vm.mmu.sppt_root(role).unwrap());
    assert_ne!(roots[0], roots[1]);
    assert_eq!(roots[0], roots[2]);
    vm.mmu.enable_sub_pages().unwrap();
    assert_eq!(vm.mmu.sppt_root(RootRole::NORMAL), Some(roots[0]));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    /// Row 2.
    #[test]
    fn maps_are_read_as_they_were_set(
        first in 0u64..1030,
        set in prop::collection::vec(any::<u32>(), SUB_PAGE_MAX_PAGES),
    ) {
        let vm = vm();
        vm.slot(0, 0, 700, 0);
        vm.slot(1, 700, 4096, 0);
        let mut read = vec![AccessMap(0); SUB_PAGE_MAX_PAGES];
        vm.mmu.get_access(0, Gfn::new(first), &mut read).unwrap();
        prop_assert!(read.iter().all(|map| *map == FULL));
        vm.mmu.set_access(0, Gfn::new(first), &maps(&set)).unwrap();
        vm.mmu.get_access(0, Gfn::new(first), &mut read).unwrap();
        prop_assert_eq!(read, maps(&set));
        for beside in [first.checked_sub(1), Some(first + 512)].into_iter().flatten() {
            prop_assert_eq!(vm.map_of(beside), u32::MAX);
        }
        vm.is_sound();
    }
}

/// Row 3.
#[test]
fn a_range_that_ends_outside_every_slot_changes_nothing_and_owes_nothing() {
    let mut vm = vm();
    vm.slot(0, 0, 100, 0);
    vm.protect(90, 0xff);
    for gfn in 80..100 {
        assert!(vm.write(at(gfn, 0)).is_done());
    }
    let leaves: Vec<_> = (80..100).map(|gfn| vm.raw_leaf(gfn)).collect();
    let before = (
        vm.world.flushes.load(Ordering::Relaxed),
        vm.world.barriers.load(Ordering::Relaxed),
    );
    let refused = vm.mmu.set_access(0, Gfn::new(80), &maps(&[0; 21]));
    assert_eq!(refused, Err(SubPageError::NoSlot(Gfn::new(100))));
    let after = (
        vm.world.flushes.load(Ordering::Relaxed),
        vm.world.barriers.load(Ordering::Relaxed),
    );
    assert_eq!(before, after);
    for (gfn, leaf) in (80..100).zip(leaves) {
        assert_eq!(vm.map_of(gfn), if gfn == 90 { 0xff } else { u32::MAX });
        assert_eq!(vm.raw_leaf(gfn), leaf);
        assert!(vm.write(at(gfn, 0)).is_done());
    }
    // A hole between two slots is the same.
    vm.slot(1, 101, 100, 0);
    let refused = vm.mmu.set_access(0, Gfn::new(99), &maps(&[0; 3]));
    assert_eq!(refused, Err(SubPageError::NoSlot(Gfn::new(100))));
    let mut read = maps(&[7; 3]);
    let refused = vm.mmu.get_access(0, Gfn::new(99), &mut read);
    assert_eq!(refused, Err(SubPageError::NoSlot(Gfn::new(100))));
    assert_eq!(read, maps(&[7; 3]));
}

#[test]
fn setting_what_is_set_already_touches_nothing() {
    let mut vm = vm();
    vm.slot(0, 0, 100, 0);
    vm.protect(5, 0x0f);
    assert!(vm.write(at(5, 0)).is_done());
    let before = vm.world.barriers.load(Ordering::Relaxed);
    vm.protect(5, 0x0f);
    vm.protect(6, u32::MAX);
    assert_eq!(vm.world.barriers.load(Ordering::Relaxed), before);
    assert!(vm.write(at(5, 1)).is_done());
}

/// Row 12.
#[test]
fn slots_of_before_and_after_have_maps_and_take_only_their_own_along() {
    for slot_zap_all in [false, true] {
        let vm = Vm::<Ept>::with(Config {
            slot_zap_all,
            ..config()
        });
        vm.slot(0, 0, 600, 0);
        vm.mmu.enable_sub_pages().unwrap();
        vm.slot(1, 600, 600, 0);
        let mut vm = vm;
        for gfn in [10, 599, 600, 1199] {
            vm.protect(gfn, 1 << (gfn % 32));
        }
        vm.mmu.set_region(region(1, 600, 0, 0, 0)).unwrap();
        vm.is_sound();
        vm.root = vm.root_of(RootRole::NORMAL);
        for gfn in [10, 599] {
            assert_eq!(vm.map_of(gfn), 1 << (gfn % 32));
            assert!(vm.write(at(gfn, gfn % 32)).is_done());
            assert_eq!(vm.write(at(gfn, (gfn + 1) % 32)), Written::Denied);
        }
        assert_eq!(
            vm.mmu.get_access(0, Gfn::new(599), &mut [FULL; 2]),
            Err(SubPageError::NoSlot(Gfn::new(600)))
        );
        // Another slot in its place begins without protection.
        vm.slot(2, 600, 600, 0);
        for gfn in [600, 1199] {
            assert_eq!(vm.map_of(gfn), u32::MAX);
            assert!(vm.write(at(gfn, 3)).is_done());
        }
        vm.is_sound();
    }
}

#[test]
fn a_slot_that_moves_leaves_its_maps_behind() {
    let mut vm = vm();
    vm.slot(0, 0, 64, 0);
    vm.protect(5, 0);
    assert_eq!(vm.write(at(5, 0)), Written::Denied);
    let moved = region(0, 0x1000, 64, HVA >> 12, 0);
    vm.mmu.set_region(moved).unwrap();
    assert!(vm.write(at(0x1005, 0)).is_done());
    let back = region(0, 0, 64, HVA >> 12, 0);
    vm.mmu.set_region(back).unwrap();
    assert!(vm.write(at(5, 0)).is_done());
    vm.is_sound();
}

#[test]
fn maps_stay_when_a_slot_begins_and_ends_to_log() {
    let mut vm = vm();
    vm.slot(0, 0, 64, 0);
    vm.protect(5, 2);
    for flags in [1, 0] {
        vm.slot(0, 0, 64, flags);
        assert_eq!(vm.map_of(5), 2);
        assert_eq!(vm.write(at(5, 0)), Written::Denied);
        assert!(vm.write(at(5, 1)).is_done());
        vm.is_sound();
    }
}

/// Row 13.
#[test]
fn private_memory_far_addresses_and_no_memory_are_refused_in_this_order() {
    let config = Config {
        private_memory: Some(PrivateMemory {
            access: AccessKind::ByAttribute,
            conversion: Conversion::ZapOpposite,
        }),
        ..config()
    };
    let vm = Vm::<Ept>::guarded(config);
    vm.slot(0, 0, 64, 0);
    let private = Gfn::new(20)..Gfn::new(30);
    vm.mmu.set_attributes(private, true).unwrap();
    let set = |as_id, first, pages| {
        vm.mmu
            .set_access(as_id, Gfn::new(first), &vec![AccessMap(0); pages])
    };
    assert_eq!(set(0, 0, 513), Err(SubPageError::TooManyPages(513)));
    assert_eq!(set(0, u64::MAX, 513), Err(SubPageError::TooManyPages(513)));
    for first in [u64::MAX, (1 << 36) - 1, 1 << 36, 1 << 52] {
        assert_eq!(set(0, first, 2), Err(SubPageError::Range), "{first:#x}");
    }
    assert_eq!(set(2, 0, 1), Err(SubPageError::Range));
    assert_eq!(
        set(0, (1 << 36) - 2, 2),
        Err(SubPageError::NoSlot(Gfn::new((1 << 36) - 2)))
    );
    assert_eq!(set(1, 0, 1), Err(SubPageError::NoSlot(Gfn::new(0))));
    // Slots first, then attributes.
    assert_eq!(set(0, 15, 60), Err(SubPageError::NoSlot(Gfn::new(64))));
    assert_eq!(set(0, 15, 6), Err(SubPageError::Private(Gfn::new(20))));
    assert_eq!(set(0, 15, 5), Ok(()));
    assert_eq!(set(0, 30, 34), Ok(()));
    assert_eq!(vm.map_of(20), u32::MAX);
    vm.is_sound();
}

#[test]
fn frames_that_become_private_keep_their_maps_for_when_they_are_shared_again() {
    let config = Config {
        private_memory: Some(PrivateMemory {
            access: AccessKind::ByAttribute,
            conversion: Conversion::ZapOpposite,
        }),
        ..config()
    };
    const GUEST_MEMFD: u32 = 4;
    let mut vm = Vm::<Ept>::guarded(config);
    vm.mmu
        .set_region_with_guest_memory(region(0, 0, 64, HVA >> 12, GUEST_MEMFD), || {
            Ok(0x6000_0000_0000)
        })
        .unwrap();
    vm.protect(5, 2);
    assert_eq!(vm.write(at(5, 0)), Written::Denied);
    let frame = Gfn::new(5)..Gfn::new(6);
    vm.mmu.set_attributes(frame.clone(), true).unwrap();
    assert!(vm.write(at(5, 0)).is_done());
    vm.is_sound();
    vm.mmu.set_attributes(frame, false).unwrap();
    assert_eq!(vm.write(at(5, 0)), Written::Denied);
    assert!(vm.write(at(5, 1)).is_done());
    vm.is_sound();
}

#[test]
fn a_read_only_slot_stays_mmio_where_its_maps_would_allow_a_write() {
    let mut vm = vm();
    vm.slot(0, 0, 64, READONLY);
    vm.protect(5, 2);
    vm.fault(5, Pferr::USER).unwrap();
    assert_eq!(vm.write(at(5, 1)), Written::Mmio);
    assert_eq!(vm.write(at(5, 0)), Written::Denied);
    vm.is_sound();
}

#[test]
fn maps_can_be_set_without_memory_for_tables() {
    let mut vm = vm();
    *vm.world.level.lock().unwrap() = twofold_arch::Level::L2M;
    vm.slot(0, 0, 1024, 0);
    assert!(vm.write(at(5, 0)).is_done());
    vm.world.budget.store(0, Ordering::Relaxed);
    vm.protect(5, 2);
    assert_eq!(vm.found(5), crate::common::Found::Nothing);
    vm.is_sound();
    let root = vm.root.clone();
    let failed = vm.write_by(&root, at(5, 1), 1);
    assert_eq!(failed, Err(twofold_mmu::FaultError::OutOfMemory));
    vm.world.budget.store(PLENTY, Ordering::Relaxed);
    assert!(vm.write(at(5, 1)).is_done());
    assert_eq!(vm.write(at(5, 0)), Written::Denied);
    vm.is_sound();
}
