//! Single mechanisms of the MMU, each in a test of its own.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use common::vm::{HVA, LOG, READONLY, Vm, fixed};
use common::{Found, HostState, Processor, TestHost, World, region};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use twofold_arch::{Gfn, Level, Pferr};
use twofold_mmu::{Config, DirtyLogError, Ept, Fault, FaultError, Mmu, Npt, Outcome, RootRole};

#[test]
fn a_large_host_page_is_mapped_large_where_the_slot_allows_it() {
    fn check<F: Processor>() {
        let mut vm = Vm::<F>::new();
        *vm.world.level.lock().unwrap() = Level::L1G;
        // From 2M below the second gigabyte to half a gigabyte above the third.
        vm.slot(0, 0x7_fe00, 0x200 + 0x4_0000 + 0x2_0000 + 5, 0);
        assert_eq!(vm.fault(0x7_fe01, Pferr::WRITE), fixed(Level::L2M));
        assert_eq!(vm.fault(0x8_1234, Pferr::WRITE), fixed(Level::L1G));
        assert_eq!(vm.fault(0xc_0003, Pferr::WRITE), fixed(Level::L2M));
        assert_eq!(vm.fault(0xe_0004, Pferr::WRITE), fixed(Level::L4K));
        assert_eq!(
            vm.found(0x7_ffff),
            Vm::<F>::page(0x7_ffff, true, Level::L2M)
        );
        assert_eq!(
            vm.found(0xb_ffff),
            Vm::<F>::page(0xb_ffff, true, Level::L1G)
        );
        assert_eq!(vm.found(0xe_0003), Found::Nothing);
        assert_eq!(vm.fault(0x8_0000, Pferr::FETCH), Ok(Outcome::Spurious));
        let stats = vm.mmu.stats();
        assert_eq!((stats.pages_4k, stats.pages_2m, stats.pages_1g), (1, 2, 1));
        // A change of one page takes the whole mapping.
        let page = HVA + (0x9_0000 << 12);
        drop(vm.mmu.host_change(page..page + 1));
        assert_eq!(vm.found(0x8_0000), Found::Nothing);
        assert_eq!(vm.mmu.stats().pages_1g, 0);
        // Smaller mappings give way to a larger one, those elsewhere in it are mapped again.
        *vm.world.level.lock().unwrap() = Level::L4K;
        assert_eq!(vm.fault(0x8_0000, Pferr::WRITE), fixed(Level::L4K));
        *vm.world.level.lock().unwrap() = Level::L1G;
        assert_eq!(vm.fault(0x8_0001, Pferr::WRITE), fixed(Level::L1G));
        assert_eq!(
            vm.found(0x8_0000),
            Vm::<F>::page(0x8_0000, true, Level::L1G)
        );
    }
    check::<Ept>();
    check::<Npt>();
}

#[test]
fn host_and_guest_that_are_not_congruent_are_mapped_small() {
    let mut vm = Vm::<Ept>::new();
    *vm.world.level.lock().unwrap() = Level::L1G;
    vm.mmu
        .set_region(region(0, 0, 0x1000, (HVA >> 12) + 1, 0))
        .unwrap();
    assert_eq!(vm.fault(0x300, Pferr::WRITE), fixed(Level::L4K));
}

#[test]
fn logging_maps_small_and_splits_large_mappings() {
    let mut vm = Vm::<Ept>::new();
    *vm.world.level.lock().unwrap() = Level::L2M;
    vm.slot(0, 0, 0x1000, 0);
    assert_eq!(vm.fault(0x201, Pferr::WRITE), fixed(Level::L2M));
    vm.slot(0, 0, 0x1000, LOG);
    assert_eq!(vm.found(0x201), Vm::<Ept>::page(0x201, false, Level::L4K));
    assert_eq!(vm.fault(0x201, Pferr::WRITE), fixed(Level::L4K));
    let mut bits = [0; 64];
    vm.mmu.dirty_log_get(0, 0, &mut bits).unwrap();
    assert_eq!(bits[8], 2);
    assert_eq!(bits.iter().map(|word| word.count_ones()).sum::<u32>(), 1);
}

#[test]
fn a_page_protected_for_logging_is_given_back_without_asking_the_host() {
    let mut vm = Vm::<Ept>::new();
    vm.slot(0, 0, 0x100, LOG);
    assert_eq!(vm.fault(7, Pferr::WRITE), fixed(Level::L4K));
    let mut bits = [0; 4];
    vm.mmu.dirty_log_get(0, 0, &mut bits).unwrap();
    assert_eq!(
        (bits[0], vm.found(7)),
        (1 << 7, Vm::<Ept>::page(7, false, Level::L4K))
    );
    // The host would refuse: it must not be asked.
    vm.world.memory.lock().unwrap().insert(
        (HVA >> 12) + 7,
        common::HostState {
            frame: 0,
            present: false,
            writable: false,
        },
    );
    assert_eq!(
        vm.fault(7, Pferr::WRITE | Pferr::PRESENT),
        fixed(Level::L4K)
    );
    assert_eq!(vm.found(7), Vm::<Ept>::page(7, true, Level::L4K));
    assert_eq!(vm.reader.stats().pf_fast, 1);
    vm.mmu.dirty_log_get(0, 0, &mut bits).unwrap();
    assert_eq!(bits[0], 1 << 7);
    vm.mmu.dirty_log_get(0, 0, &mut bits).unwrap();
    assert_eq!(bits[0], 0);
}

#[test]
fn the_dirty_log_refuses_what_kvm_refuses() {
    let vm = Vm::<Ept>::new();
    vm.slot(0, 0, 0x100, 0);
    vm.slot(1, 0x100, 0x101, LOG);
    let mut bits = [0; 4];
    assert_eq!(
        vm.mmu.dirty_log_get(2, 0, &mut bits),
        Err(DirtyLogError::Id)
    );
    assert_eq!(
        vm.mmu.dirty_log_get(0, 32764, &mut bits),
        Err(DirtyLogError::Id)
    );
    assert_eq!(
        vm.mmu.dirty_log_get(0, 5, &mut bits),
        Err(DirtyLogError::NotLogged)
    );
    assert_eq!(
        vm.mmu.dirty_log_get(0, 0, &mut bits),
        Err(DirtyLogError::NotLogged)
    );
    assert_eq!(
        vm.mmu.dirty_log_get(0, 1, &mut bits),
        Err(DirtyLogError::Buffer)
    );
}

#[test]
fn a_host_write_is_marked_only_where_the_slot_logs() {
    let mut vm = Vm::<Ept>::new();
    vm.slot(0, 0, 0x40, LOG);
    vm.slot(1, 0x40, 0x40, 0);
    for gfn in [3, 0x41, 0x1000] {
        vm.mmu.mark_dirty(&mut vm.reader, 0, Gfn::new(gfn));
    }
    let mut bits = [0];
    vm.mmu.dirty_log_get(0, 0, &mut bits).unwrap();
    assert_eq!(bits, [8]);
}

#[test]
fn an_access_without_a_slot_is_remembered_until_the_slots_change() {
    fn check<F: Processor>() {
        let mut vm = Vm::<F>::new();
        vm.slot(0, 0, 0x10, 0);
        assert_eq!(vm.fault(0xfee00, Pferr::WRITE), Ok(Outcome::Mmio));
        assert_eq!(vm.found(0xfee00), Found::Refused);
        // The processor now says so itself.
        assert_eq!(vm.fault(0xfee00, Pferr::RSVD), Ok(Outcome::Mmio));
        assert_eq!(vm.reader.stats().pf_mmio_spte_created, 1);
        vm.slot(1, 0xfee00, 1, 0);
        assert_eq!(
            vm.fault(0xfee00, Pferr::RSVD | Pferr::WRITE),
            fixed(Level::L4K)
        );
        assert_eq!(vm.found(0xfee00), Vm::<F>::page(0xfee00, true, Level::L4K));
        // An entry that was replaced meanwhile is simply tried again.
        assert_eq!(vm.fault(0xfee00, Pferr::RSVD), Ok(Outcome::Retry));
    }
    check::<Ept>();
    check::<Npt>();
}

#[test]
fn a_read_only_slot_is_mapped_read_only_and_its_writes_are_mmio() {
    let mut vm = Vm::<Npt>::new();
    vm.slot(0, 0, 0x10, READONLY);
    assert_eq!(vm.fault(2, Pferr::WRITE), Ok(Outcome::Mmio));
    assert_eq!(vm.found(2), Found::Nothing);
    assert_eq!(vm.fault(2, Pferr::USER), fixed(Level::L4K));
    assert_eq!(vm.found(2), Vm::<Npt>::page(2, false, Level::L4K));
    assert_eq!(
        vm.fault(2, Pferr::WRITE | Pferr::PRESENT),
        Ok(Outcome::Mmio)
    );
}

#[test]
fn a_write_to_a_page_that_was_read_only_in_the_host_gets_the_hosts_new_page() {
    let mut vm = Vm::<Ept>::new();
    vm.slot(0, 0, 0x10, 0);
    let set = |vm: &Vm<Ept>, frame, writable| {
        let state = common::HostState {
            frame,
            present: true,
            writable,
        };
        vm.world
            .memory
            .lock()
            .unwrap()
            .insert((HVA >> 12) + 3, state);
    };
    set(&vm, 0x777, false);
    assert_eq!(vm.fault(3, Pferr::USER), fixed(Level::L4K));
    // Copied on write behind our back: the old page must leave the TLBs before the new one comes.
    set(&vm, 0x888, true);
    let flushes = vm.world.flushes.load(Ordering::Relaxed);
    assert_eq!(
        vm.fault(3, Pferr::WRITE | Pferr::PRESENT),
        fixed(Level::L4K)
    );
    assert_eq!(vm.world.flushes.load(Ordering::Relaxed), flushes + 1);
    let expected = Found::Page {
        frame: 0x888,
        write: true,
        level: Level::L4K,
    };
    assert_eq!(vm.found(3), expected);
    assert_eq!(vm.mmu.stats().pages_4k, 1);
}

#[test]
fn equal_roles_share_a_root_and_an_obsolete_root_lives_until_it_is_let_go() {
    let vm = Vm::<Ept>::new();
    let same = vm.mmu.load_root(RootRole::NORMAL).unwrap();
    assert_eq!(same.hpa(), vm.root.hpa());
    let smm = RootRole {
        smm: true,
        ..RootRole::NORMAL
    };
    let other = vm.mmu.load_root(smm).unwrap();
    assert_ne!(other.hpa(), vm.root.hpa());
    let live = || vm.world.live_tables.load(Ordering::Relaxed);
    assert_eq!(live(), 2);
    vm.mmu.zap_all();
    assert!(same.is_obsolete() && other.is_obsolete());
    let new = vm.mmu.load_root(RootRole::NORMAL).unwrap();
    assert!(!new.is_obsolete());
    assert_eq!(live(), 3);
    drop(other);
    drop(vm.mmu.load_root(RootRole::NORMAL).unwrap());
    assert_eq!(live(), 2, "the root that nobody has loaded went");
}

#[test]
fn an_obsolete_root_is_never_mapped_into() {
    let mut vm = Vm::<Ept>::new();
    vm.slot(0, 0, 0x10, 0);
    assert_eq!(vm.fault(1, Pferr::WRITE), fixed(Level::L4K));
    vm.mmu.zap_all();
    assert_eq!(vm.fault(1, Pferr::WRITE), Ok(Outcome::ObsoleteRoot));
    assert_eq!(vm.fault(2, Pferr::WRITE), Ok(Outcome::ObsoleteRoot));
    assert_eq!(vm.found(1), Found::Nothing);
}

#[test]
fn faults_retry_while_their_memory_changes_and_others_do_not() {
    let mut vm = Vm::<Ept>::new();
    vm.slot(0, 0, 0x10, 0);
    let change = vm.mmu.begin_host_change(HVA + 0x3000..HVA + 0x5000);
    assert_eq!(vm.fault(3, Pferr::WRITE), Ok(Outcome::Retry));
    assert_eq!(vm.fault(5, Pferr::WRITE), fixed(Level::L4K));
    // A slot that comes while its memory is being changed is covered too.
    vm.mmu
        .set_region(region(1, 0x100, 1, (HVA + 0x4000) >> 12, 0))
        .unwrap();
    assert_eq!(vm.fault(0x100, Pferr::WRITE), Ok(Outcome::Retry));
    vm.mmu.end_host_change(change);
    assert_eq!(vm.fault(3, Pferr::WRITE), fixed(Level::L4K));
    assert_eq!(vm.fault(0x100, Pferr::WRITE), fixed(Level::L4K));
}

#[test]
fn memory_that_goes_with_its_slot_during_a_fault_is_no_error() {
    let world = World::new(0x1000_0000_0000);
    let mmu = Arc::new(Mmu::<Ept, _>::new(
        TestHost(Arc::clone(&world)),
        Config::default(),
    ));
    mmu.set_region(region(0, 1, 4, HVA >> 12, 0)).unwrap();
    let mut reader = mmu.reader();
    let fault = Fault {
        gpa: Gfn::new(1).address(),
        error: Pferr::WRITE,
    };
    let gone = HostState {
        frame: 0,
        present: false,
        writable: false,
    };
    let root = mmu.load_root(RootRole::NORMAL).unwrap();
    let (others_mmu, others_world) = (Arc::clone(&mmu), Arc::clone(&world));
    *world.on_populate.lock().unwrap() = Some(Box::new(move || {
        others_mmu
            .set_region(region(0, 1, 0, HVA >> 12, 0))
            .unwrap();
        others_world.memory.lock().unwrap().insert(HVA >> 12, gone);
    }));
    let outcome = mmu.fault(&mut reader, &root, fault);
    assert!(
        matches!(
            outcome,
            Ok(Outcome::Retry | Outcome::ObsoleteRoot | Outcome::Mmio)
        ),
        "{outcome:?}"
    );
    let root = mmu.load_root(RootRole::NORMAL).unwrap();
    assert_eq!(mmu.fault(&mut reader, &root, fault), Ok(Outcome::Mmio));

    // Without a change of the slots it is one.
    mmu.set_region(region(0, 1, 4, HVA >> 12, 0)).unwrap();
    let root = mmu.load_root(RootRole::NORMAL).unwrap();
    assert_eq!(
        mmu.fault(&mut reader, &root, fault),
        Err(FaultError::BadHostMemory)
    );
}

#[test]
fn memory_that_no_slot_uses_changes_without_barrier_or_flush() {
    let mut vm = Vm::<Ept>::new();
    vm.slot(0, 0, 0x10, 0);
    vm.fault(1, Pferr::WRITE).unwrap();
    let count = |vm: &Vm<Ept>| {
        let (flushes, barriers) = (&vm.world.flushes, &vm.world.barriers);
        flushes.load(Ordering::Relaxed) + barriers.load(Ordering::Relaxed)
    };
    let before = count(&vm);
    drop(vm.mmu.host_change(0x1000..0x2000));
    drop(vm.mmu.host_change(HVA + 0x10_000..HVA + 0x20_000));
    assert_eq!(count(&vm), before);
    drop(vm.mmu.host_change(HVA + 0xf_fff..HVA + 0x20_000));
    assert!(count(&vm) > before);
}

#[test]
fn addresses_beyond_a_four_level_root_are_mmio_and_fit_into_five_levels() {
    let mut vm = Vm::<Ept>::new();
    let far = 1 << 37;
    vm.mmu.set_region(region(0, far, 4, HVA >> 12, 0)).unwrap();
    assert_eq!(vm.fault(far, Pferr::WRITE), Ok(Outcome::Mmio));
    assert_eq!(vm.fault(far + 100, Pferr::WRITE), Ok(Outcome::Mmio));
    vm.root = vm
        .mmu
        .load_root(RootRole {
            level: Level::L256T,
            ..RootRole::NORMAL
        })
        .unwrap();
    assert_eq!(vm.fault(far, Pferr::WRITE), fixed(Level::L4K));
}

#[test]
fn counters_of_a_reader_that_is_gone_are_kept() {
    let mut vm = Vm::<Ept>::new();
    vm.slot(0, 0, 0x10, 0);
    vm.fault(1, Pferr::WRITE).unwrap();
    vm.reader = vm.mmu.reader();
    vm.fault(1, Pferr::WRITE).unwrap();
    let stats = vm.mmu.stats();
    assert_eq!(stats.pages_4k, 1);
    assert_eq!(stats.faults.pf_taken, 2);
    assert_eq!((stats.faults.pf_fixed, stats.faults.pf_spurious), (1, 1));
    assert_eq!(vm.reader.stats().pf_taken, 1);
}

#[test]
#[should_panic(expected = "not its own")]
fn a_reader_of_another_mmu_is_refused() {
    let mut vm = Vm::<Ept>::new();
    let mut other = Vm::<Ept>::new();
    std::mem::swap(&mut vm.reader, &mut other.reader);
    let _ = vm.fault(1, Pferr::WRITE);
}
