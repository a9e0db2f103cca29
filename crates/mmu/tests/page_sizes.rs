//! Mappings of every size: chosen, split, recovered, kept from being executed, and counted.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use common::vm::{HVA, LOG, Vm, fixed};
use common::{Found, Processor, walk_to_fetch};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use twofold_arch::{Gfn, Level, Pferr};
use twofold_mmu::{Config, Ept, Fault, Npt, Outcome, RootRole};

const EXEC: Pferr = Pferr::FETCH;

/// A VM whose host has huge pages of this size.
fn vm<F: Processor>(level: Level, config: Config) -> Vm<F> {
    let vm = Vm::<F>::with(Config {
        slot_zap_all: false,
        ..config
    });
    *vm.world.level.lock().unwrap() = level;
    *vm.world.level_if_asked.lock().unwrap() = level;
    vm
}

/// What a processor finds at a frame, and whether it may execute it.
fn fetched<F: Processor>(vm: &Vm<F>, gfn: u64) -> (Found, bool) {
    let gpa = Gfn::new(gfn).address();
    walk_to_fetch::<F>(&vm.world, vm.root.hpa(), Level::L512G, gpa)
}

/// Leaves that a processor can find in `gfns`, by size.
fn leaves<F: Processor>(vm: &Vm<F>, gfns: std::ops::Range<u64>) -> [u64; 3] {
    let mut count = [0; 3];
    let mut gfn = gfns.start;
    while gfn < gfns.end {
        match fetched(vm, gfn).0 {
            Found::Page { level, .. } => {
                count[usize::from(level.number()) - 1] += 1;
                gfn = (gfn | (level.frames() - 1)) + 1;
            }
            _ => gfn += 1,
        }
    }
    count
}

fn counted<F: Processor>(vm: &Vm<F>) -> [u64; 3] {
    let stats = vm.mmu.stats();
    [stats.pages_4k, stats.pages_2m, stats.pages_1g]
}

fn live(vm: &Vm<impl Processor>) -> usize {
    vm.world.live_tables.load(Ordering::Relaxed)
}

#[test]
fn logging_splits_without_losing_a_page_and_its_end_brings_huge_pages_back() {
    fn check<F: Processor>(host: Level, eager: bool) {
        let mut vm = vm::<F>(
            host,
            Config {
                eager_split: eager,
                ..Config::default()
            },
        );
        let pages = 2 << 18;
        vm.slot(0, 0, pages, 0);
        for gfn in [0x1_0005, 0x5_0207] {
            assert_eq!(vm.fault(gfn, Pferr::WRITE), fixed(host));
        }
        let (before, tables) = (leaves(&vm, 0..pages), live(&vm));
        assert_eq!(counted(&vm), before);
        let whole = vm.found(0x1_0005);

        vm.slot(0, 0, pages, LOG);
        let small = Vm::<F>::page(0x1_0005, false, Level::L4K);
        let huge = Vm::<F>::page(0x1_0005, false, host);
        assert_eq!(vm.found(0x1_0005), if eager { small } else { huge });
        // Whoever splits, every page of the huge leaf stays mapped.
        assert_eq!(
            vm.fault(0x1_0005, Pferr::WRITE | Pferr::PRESENT),
            fixed(Level::L4K)
        );
        assert_eq!(
            vm.found(0x1_0005),
            Vm::<F>::page(0x1_0005, true, Level::L4K)
        );
        for gfn in (0x1_0000..0x1_0200).filter(|gfn| *gfn != 0x1_0005) {
            assert_eq!(vm.found(gfn), Vm::<F>::page(gfn, false, Level::L4K));
        }
        let split = leaves(&vm, 0..pages);
        let frames = |count: [u64; 3]| count[0] + (count[1] << 9) + (count[2] << 18);
        assert_eq!(frames(split), frames(before));
        assert_eq!(counted(&vm), split);
        let mut bits = vec![0; 1 << 13];
        vm.mmu.dirty_log_get(0, 0, &mut bits).unwrap();
        assert_eq!(bits.iter().map(|word| word.count_ones()).sum::<u32>(), 1);

        vm.slot(0, 0, pages, 0);
        assert_eq!(leaves(&vm, 0..pages), before);
        assert_eq!(counted(&vm), before);
        assert_eq!(live(&vm), tables);
        let Found::Page { level, .. } = vm.found(0x1_0005) else {
            panic!("a hole");
        };
        assert_eq!(level, host);
        // Whether it may be written at once or after a fault, it is the same page.
        let _ = vm.fault(0x1_0005, Pferr::WRITE | Pferr::PRESENT);
        assert_eq!(vm.found(0x1_0005), whole);
    }
    for host in [Level::L2M, Level::L1G] {
        for eager in [true, false] {
            check::<Ept>(host, eager);
            check::<Npt>(host, eager);
        }
    }
}

#[test]
fn recovery_leaves_alone_what_the_host_has_split() {
    let mut vm = vm::<Ept>(Level::L2M, Config::default());
    vm.slot(0, 0, 0x1000, LOG);
    for gfn in [0x203, 0x204, 0x603] {
        assert_eq!(vm.fault(gfn, Pferr::WRITE), fixed(Level::L4K));
    }
    *vm.world.level_if_asked.lock().unwrap() = Level::L4K;
    vm.slot(0, 0, 0x1000, 0);
    assert_eq!(leaves(&vm, 0..0x1000), [3, 0, 0]);
    *vm.world.level_if_asked.lock().unwrap() = Level::L2M;
    vm.mmu.recover_huge_pages(0, 0);
    assert_eq!(leaves(&vm, 0..0x1000), [0, 2, 0]);
    assert_eq!(counted(&vm), [0, 2, 0]);
}

#[test]
fn a_fault_maps_huge_again_over_small_pages() {
    fn check<F: Processor>() {
        let mut vm = vm::<F>(Level::L2M, Config::default());
        vm.slot(0, 0, 0x1000, LOG);
        assert_eq!(vm.fault(0x203, Pferr::WRITE), fixed(Level::L4K));
        *vm.world.level_if_asked.lock().unwrap() = Level::L4K;
        vm.slot(0, 0, 0x1000, 0);
        let (tables, flushes) = (live(&vm), vm.world.flushes.load(Ordering::Relaxed));
        assert_eq!(vm.fault(0x204, Pferr::WRITE), fixed(Level::L2M));
        assert_eq!(leaves(&vm, 0..0x1000), [0, 1, 0]);
        assert_eq!(counted(&vm), [0, 1, 0]);
        assert_eq!(live(&vm), tables - 1);
        assert_eq!(vm.world.flushes.load(Ordering::Relaxed), flushes + 1);
    }
    check::<Ept>();
    check::<Npt>();
}

#[test]
fn the_host_is_asked_about_its_page_once_for_each_table() {
    let mut vm = vm::<Ept>(Level::L4K, Config::default());
    vm.slot(0, 0x80, 0x1000, 0);
    for gfn in 0x80..0x1080 {
        assert_eq!(vm.fault(gfn, Pferr::WRITE), fixed(Level::L4K));
    }
    // Not for the tables that reach beyond the slot.
    assert_eq!(vm.world.asked.load(Ordering::Relaxed), 7);
    *vm.world.level_if_asked.lock().unwrap() = Level::L2M;
    drop(vm.mmu.host_change_all());
    assert_eq!(vm.fault(0x234, Pferr::USER), fixed(Level::L2M));
    assert_eq!(vm.fault(0x234, Pferr::WRITE), Ok(Outcome::Spurious));
    assert_eq!(vm.world.asked.load(Ordering::Relaxed), 8);
}

fn nx(on: bool) -> Config {
    Config {
        nx_huge_pages: on,
        ..Config::default()
    }
}

#[test]
fn a_fetch_gets_a_small_page_while_huge_pages_are_not_executable() {
    fn check<F: Processor>(host: Level) {
        let mut vm = vm::<F>(host, nx(true));
        vm.world.no_execute.store(true, Ordering::Relaxed);
        vm.slot(0, 0, 2 << 18, 0);
        // A huge page that is read first.
        assert_eq!(vm.fault(0x203, Pferr::USER), fixed(host));
        assert!(!fetched(&vm, 0x203).1);
        assert_eq!(vm.mmu.stats().nx_lpage_splits, 0);
        assert_eq!(
            vm.fault(0x203, EXEC | Pferr::PRESENT),
            Ok(Outcome::Spurious)
        );
        assert!(fetched(&vm, 0x203).1);
        let splits = u64::from(host.number()) - 1;
        assert_eq!(vm.mmu.stats().nx_lpage_splits, splits);
        assert_eq!(vm.found(0x204), Vm::<F>::page(0x204, true, Level::L4K));
        // Reading does not make a huge page of it again.
        drop(vm.mmu.host_change(HVA + 0x204_000..HVA + 0x205_000));
        assert_eq!(vm.fault(0x204, Pferr::USER), fixed(Level::L4K));
        assert_eq!(vm.mmu.stats().nx_lpage_splits, splits);
        // One that is executed first.
        assert_eq!(vm.fault(0x4_0000, EXEC), fixed(Level::L4K));
        assert_eq!(vm.mmu.stats().nx_lpage_splits, 2 * splits);
        assert_eq!(counted(&vm), leaves(&vm, 0..2 << 18));

        // What is not executed again becomes huge, a part at a time.
        assert_eq!(vm.mmu.recover_nx_huge_pages(0), 0);
        assert!(vm.mmu.recover_nx_huge_pages(2) > 0);
        assert_eq!(vm.found(0x203), Found::Nothing);
        assert!(vm.mmu.stats().nx_lpage_splits < 2 * splits);
        while vm.mmu.recover_nx_huge_pages(1) > 0 {}
        assert_eq!(vm.mmu.stats().nx_lpage_splits, 0);
        assert_eq!(vm.fault(0x203, Pferr::USER), fixed(host));
        assert_eq!(vm.fault(0x4_0000, Pferr::USER), fixed(host));
        assert_eq!(counted(&vm), leaves(&vm, 0..2 << 18));
    }
    for host in [Level::L2M, Level::L1G] {
        check::<Ept>(host);
        check::<Npt>(host);
    }
}

#[test]
fn a_vm_may_do_without_the_mitigation_and_logged_slots_are_not_recovered() {
    let mut vm = vm::<Ept>(Level::L2M, nx(true));
    vm.slot(0, 0, 0x1000, 0);
    assert_eq!(vm.fault(0x203, EXEC), fixed(Level::L4K));
    vm.slot(0, 0, 0x1000, LOG);
    assert_eq!(vm.mmu.recover_nx_huge_pages(1), 0);
    assert_eq!(vm.mmu.stats().nx_lpage_splits, 1);
    // The end of logging does not undo what the mitigation has split.
    vm.slot(0, 0, 0x1000, 0);
    assert_eq!(leaves(&vm, 0..0x1000), [1, 0, 0]);
    vm.mmu.set_nx_huge_pages(false);
    vm.root = vm.mmu.load_root(RootRole::NORMAL).unwrap();
    assert_eq!(vm.mmu.stats().nx_lpage_splits, 0);
    assert_eq!(vm.fault(0x203, EXEC), fixed(Level::L2M));
    assert!(fetched(&vm, 0x203).1);
}

#[test]
fn without_memory_for_tables_a_split_ends_quietly_and_the_fault_says_so() {
    let mut vm = vm::<Ept>(Level::L2M, Config::default());
    vm.slot(0, 0, 0x1000, 0);
    assert_eq!(vm.fault(0x203, Pferr::WRITE), fixed(Level::L2M));
    let budget = vm.world.budget.swap(0, Ordering::Relaxed);
    vm.slot(0, 0, 0x1000, LOG);
    assert_eq!(vm.found(0x203), Vm::<Ept>::page(0x203, false, Level::L2M));
    let _ = vm.fault(0x203, Pferr::WRITE | Pferr::PRESENT);
    vm.world.budget.store(budget, Ordering::Relaxed);
    assert_eq!(
        vm.fault(0x203, Pferr::WRITE | Pferr::PRESENT),
        fixed(Level::L4K)
    );
    assert_eq!(counted(&vm), [512, 0, 0]);
}

#[test]
fn six_roots_exist_side_by_side_and_go_when_nobody_has_them() {
    fn check<F: Processor>() {
        let mut vm = Vm::<F>::new();
        let mut roles = Vec::new();
        for level in [Level::L512G, Level::L256T] {
            for (smm, guest_mode) in [(false, false), (true, false), (false, true)] {
                roles.push(RootRole {
                    level,
                    smm,
                    guest_mode,
                    mirror: false,
                });
            }
        }
        for as_id in 0..2 {
            let region = common::region(as_id << 16, 0, 0x100, (HVA >> 12) + u64::from(as_id), 0);
            vm.mmu.set_region(region).unwrap();
        }
        let roots: Vec<_> = roles
            .iter()
            .map(|role| vm.mmu.load_root(*role).unwrap())
            .collect();
        let found = |vm: &Vm<F>, role: &RootRole, root: &twofold_mmu::Root| {
            let gpa = Gfn::new(3).address();
            common::walk::<F>(&vm.world, root.hpa(), role.level, gpa)
        };
        let fault = Fault {
            gpa: Gfn::new(3).address(),
            error: Pferr::WRITE,
        };
        for (number, (role, root)) in roles.iter().zip(&roots).enumerate() {
            assert_eq!(vm.mmu.fault(&mut vm.reader, root, fault), fixed(Level::L4K));
            for (other, (role, root)) in roles.iter().zip(&roots).enumerate() {
                let is_mapped = found(&vm, role, root) != Found::Nothing;
                assert_eq!(is_mapped, other <= number, "each root has its own tables");
            }
            let Found::Page { frame, .. } = found(&vm, role, root) else {
                panic!("not mapped");
            };
            let hva = HVA + 0x3000 + u64::from(role.as_id()) * 0x1000;
            assert_eq!(frame, common::usual_frame(hva));
            // A second virtual processor with the same role shares the root.
            assert_eq!(vm.mmu.load_root(*role).unwrap().hpa(), root.hpa());
        }
        assert_eq!(vm.mmu.stats().pages_4k, 6);
        // 3 tables below four levels, 4 below five.
        let tables = 3 * 4 + 3 * 5;
        assert_eq!(live(&vm), tables);
        vm.mmu.zap_all();
        assert!(roots.iter().all(|root| root.is_obsolete()));
        assert_eq!(
            live(&vm),
            6,
            "empty roots that virtual processors still have"
        );
        drop(roots);
        vm.root = vm.mmu.load_root(RootRole::NORMAL).unwrap();
        drop(vm.mmu.load_root(RootRole::NORMAL).unwrap());
        assert_eq!(live(&vm), 1);
        assert_eq!(vm.mmu.stats().pages_4k, 0);
    }
    check::<Ept>();
    check::<Npt>();
}

#[test]
fn the_writers_lock_is_free_while_tables_are_taken_apart() {
    let mut vm = Vm::<Ept>::new();
    vm.slot(0, 0, 0x8000, 0);
    for gfn in 0..0x8000 {
        assert_eq!(vm.fault(gfn, Pferr::WRITE), fixed(Level::L4K));
    }
    let tables = live(&vm) as u64 - 1;
    let Vm {
        world, mmu, root, ..
    } = vm;
    let (mmu, freed) = (Arc::new(mmu), Arc::new(AtomicU64::new(0)));
    let (others_mmu, count) = (Arc::downgrade(&mmu), Arc::clone(&freed));
    *world.on_free.lock().unwrap() = Some(Arc::new(move || {
        // Would wait for ever if this thread still held the lock.
        if let Some(mmu) = others_mmu.upgrade() {
            assert!(mmu.slot(0, 0).is_some());
            count.fetch_add(1, Ordering::Relaxed);
        }
    }));
    drop(mmu.host_change_all());
    // The two above the slot's own cover more than the slot.
    assert_eq!(freed.load(Ordering::Relaxed), tables - 2);
    assert_eq!(mmu.stats().pages_4k, 0);
    mmu.zap_all();
    drop(root);
    drop(mmu.load_root(RootRole::NORMAL).unwrap());
    assert_eq!(freed.load(Ordering::Relaxed), tables + 1);
    world.on_free.lock().unwrap().take();
}
