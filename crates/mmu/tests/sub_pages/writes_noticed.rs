//! Dirty logs, ageing, and permissions that come back without a lock: row 10 of the feature table.
//! The random sequences of `tests/model` do the same in every order.

use crate::common::guarded::{AT_ONCE, Guarded, Written, write};
use crate::common::touch;
use crate::common::vm::{LOG, Vm};
use crate::{at, config};
use twofold_arch::{Gfn, Gpa, Level};
use twofold_mmu::{Config, Ept, MmuFormat, RootRole};

const FAULTED: Written = Written::Done {
    faults: 1,
    misses: 0,
};

/// Processors that log by themselves, set accessed and dirty bits, or do neither.
fn every_kind() -> [Config; 3] {
    let kind = |accessed_dirty, pml| Config {
        accessed_dirty,
        pml,
        ..config()
    };
    [kind(true, true), kind(true, false), kind(false, false)]
}

/// A slot that logs, with frame 7 protected and written, and what is dirty taken.
fn logging(config: Config) -> Vm<Ept> {
    let mut vm = Vm::<Ept>::guarded(config);
    vm.slot(0, 0, 64, LOG);
    vm.protect(7, 0x0f);
    assert!(vm.write(at(7, 0)).is_done());
    assert!(vm.write(at(8, 0)).is_done());
    vm.mmu.dirty_log_get(0, 0, &mut [0]).unwrap();
    vm
}

fn dirty(vm: &Vm<Ept>) -> u64 {
    let mut bitmap = [0];
    vm.mmu.dirty_log_get(0, 0, &mut bitmap).unwrap();
    bitmap[0]
}

#[test]
fn an_allowed_write_is_logged_and_a_denied_one_is_not() {
    for config in every_kind() {
        let mut vm = logging(config);
        assert_eq!(vm.write(at(7, 9)), Written::Denied);
        assert_eq!(dirty(&vm), 0);
        if config.pml {
            // The processor logs it: a dirty bit was set.
            let sppt = vm.mmu.sppt_root(RootRole::NORMAL);
            let (root, gpa) = (vm.root.hpa(), Gpa::new(at(7, 2)));
            let logged = write(&vm.world, root, Level::L512G, sppt, gpa, 1, true);
            assert_eq!(logged, Ok(true));
            vm.mmu.drain_pml(&mut vm.reader, 0, [gpa].into_iter());
        } else {
            assert_eq!(vm.write(at(7, 2)), FAULTED);
        }
        assert_eq!(vm.write(at(7, 3)), AT_ONCE);
        assert_eq!(dirty(&vm), 1 << 7, "{config:?}");
        vm.is_sound();
    }
}

#[test]
fn clearing_the_log_never_gives_write_permission() {
    for config in every_kind() {
        let mut vm = logging(config);
        for _ in 0..3 {
            assert_eq!(vm.raw_leaf(7) & Ept::WRITE, 0);
            assert_eq!(
                vm.raw_leaf(7) & Ept::SUB_PAGE_WRITE != 0,
                config.pml,
                "a clean page is found by the processor's log or by a fault"
            );
            assert_eq!(vm.write(at(7, 31)), Written::Denied);
            assert!(vm.write(at(7, 0)).is_done());
            vm.mmu.dirty_log_get(0, 0, &mut [0]).unwrap();
            vm.is_sound();
        }
        // Nor does the end of logging.
        vm.slot(0, 0, 64, 0);
        assert_eq!(vm.write(at(7, 31)), Written::Denied);
        assert!(vm.write(at(7, 1)).is_done());
        vm.is_sound();
    }
}

#[test]
fn what_is_protected_while_it_logs_is_logged_all_the_same() {
    for config in every_kind() {
        let mut vm = Vm::<Ept>::guarded(config);
        vm.slot(0, 0, 64, LOG);
        assert!(vm.write(at(7, 0)).is_done());
        vm.protect(7, 0xff);
        assert_eq!(dirty(&vm), 1 << 7);
        let before = vm.raw_leaf(7);
        assert!(vm.write(at(7, 0)).is_done());
        if config.pml {
            assert!(before & Ept::DIRTY == 0 && vm.raw_leaf(7) & Ept::DIRTY != 0);
        } else {
            assert_eq!(dirty(&vm), 1 << 7);
        }
        // Unprotected again, the next write is noticed too.
        vm.protect(7, u32::MAX);
        if !config.pml {
            assert!(vm.write(at(7, 30)).is_done());
            assert_eq!(dirty(&vm), 1 << 7);
        }
        vm.is_sound();
    }
}

#[test]
fn ageing_takes_reading_along_and_the_next_access_restores_what_the_map_allows() {
    for config in every_kind() {
        let mut vm = Vm::<Ept>::guarded(config);
        vm.slot(0, 0, 64, 0);
        vm.protect(7, 0x0f);
        assert!(vm.write(at(7, 0)).is_done());
        let frame = Gfn::new(7)..Gfn::new(8);
        assert!(vm.mmu.clear_young_gfns(0, frame.clone()));
        assert!(!vm.mmu.test_young_gfns(0, frame.clone()));
        let aged = vm.raw_leaf(7);
        assert_eq!(aged & Ept::WRITE, 0);
        assert_ne!(
            aged & Ept::SUB_PAGE_WRITE,
            0,
            "nothing has to be found again"
        );
        vm.is_sound();
        assert_eq!(vm.write(at(7, 4)), Written::Denied);
        let at_most_a_fault = vm.write(at(7, 3));
        assert_eq!(
            at_most_a_fault,
            if config.accessed_dirty {
                AT_ONCE
            } else {
                FAULTED
            }
        );
        assert!(vm.mmu.test_young_gfns(0, frame.clone()));
        // A read restores no more than that.
        vm.mmu.clear_young_gfns(0, frame);
        let gpa = Gpa::new(at(7, 0));
        let (root, flags) = (vm.root.hpa(), config.accessed_dirty);
        if let Err(error) = touch::<Ept>(&vm.world, root, Level::L512G, gpa, false, flags) {
            vm.fault(7, error).unwrap();
        }
        assert_eq!(vm.raw_leaf(7) & Ept::WRITE, 0);
        assert_eq!(vm.write(at(7, 4)), Written::Denied);
        assert_eq!(vm.write(at(7, 3)), AT_ONCE);
        vm.is_sound();
    }
}

#[test]
fn what_aged_before_it_was_protected_comes_back_protected_and_is_flushed() {
    use std::sync::atomic::Ordering;
    let mut vm = Vm::<Ept>::guarded(Config {
        accessed_dirty: false,
        ..config()
    });
    vm.slot(0, 0, 64, 0);
    assert!(vm.write(at(7, 0)).is_done());
    // Ageing does not flush: a processor may go on writing with its old translation.
    assert!(vm.mmu.clear_young_gfns(0, Gfn::new(7)..Gfn::new(8)));
    let flushes = vm.world.flushes.load(Ordering::Relaxed);
    vm.protect(7, 0);
    assert_eq!(vm.world.flushes.load(Ordering::Relaxed), flushes + 1);
    assert_eq!(vm.write(at(7, 0)), Written::Denied);
    vm.is_sound();
}

#[test]
fn permissions_come_back_without_the_host_and_never_more_than_the_map() {
    let mut vm = logging(config());
    let before = vm.reader.stats();
    assert_eq!(vm.write(at(7, 0)), FAULTED);
    assert_eq!(vm.write(at(8, 0)), FAULTED);
    assert_eq!(vm.reader.stats().pf_fast, before.pf_fast + 2);
    assert_eq!(vm.raw_leaf(7) & Ept::WRITE, 0);
    assert_ne!(vm.raw_leaf(8) & Ept::WRITE, 0);
    // A denied write is not even looked up.
    assert_eq!(vm.write(at(7, 5)), Written::Denied);
    assert_eq!(vm.reader.stats().pf_fast, before.pf_fast + 2);
    assert_eq!(dirty(&vm), 1 << 7 | 1 << 8);
}
