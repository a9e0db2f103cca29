//! The whole MMU under a scheduler that decides, at every atomic operation and every access to a
//! table, which thread goes on: `make interleavings`. Real code is run, not a model of it; memory
//! is sequentially consistent here, and what weaker memory adds is explored by `loom` on the
//! protocols alone.
//!
//! Each test tries every schedule with one preemption, or two where that is affordable, and then
//! random ones. `TWOFOLD_INTERLEAVINGS=n` multiplies the random ones by n and allows one preemption
//! more.

#![cfg(shuttle)]
#![allow(clippy::unwrap_used, reason = "a test may fail")]
#![allow(
    unsafe_code,
    reason = "UNSAFETY: implements the unsafe trait and walks raw tables"
)]

#[path = "../common/mod.rs"]
mod common;
mod logging;
mod machine;
mod scheduler;
mod sizes;
mod sub_pages;
mod td;

use common::Processor;
use machine::{Access, Cpu, Machine};
use scheduler::FewPreemptions;
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::thread;
use std::sync::Arc;
use twofold_arch::Level;
use twofold_mmu::{Config, Ept, Npt};

/// Runs `test` under all schedules with up to `preemptions` preemptions, then under random ones.
fn explore(name: &str, preemptions: usize, test: fn()) {
    let more: usize = std::env::var("TWOFOLD_INTERLEAVINGS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(0);
    let mut config = shuttle::Config::new();
    config.stack_size = 0x4_0000;
    config.silence_warnings = true;
    let bound = preemptions + usize::from(more > 0);
    let few = FewPreemptions::new(bound, 2_000_000);
    let exhausted = Arc::clone(&few.exhausted);
    let schedules = shuttle::Runner::new(few, config.clone()).run(test);
    assert!(
        exhausted.load(std::sync::atomic::Ordering::SeqCst),
        "{schedules} schedules were not all with {bound} preemptions"
    );
    let random = 300 * more.max(1);
    shuttle::Runner::new(RandomScheduler::new(random), config.clone()).run(test);
    shuttle::Runner::new(PctScheduler::new(4, random), config).run(test);
    println!(
        "{name}: all {schedules} schedules with {bound} preemptions, {random} random ones twice"
    );
}

fn narrow() -> Config {
    Config {
        slot_zap_all: false,
        ..Config::default()
    }
}

type Work<F> = Box<dyn FnOnce(&Machine<F>) + Send>;

/// Runs each piece of work in a thread of its own.
fn together<M: Send + Sync + 'static>(machine: &Arc<M>, work: Vec<Box<dyn FnOnce(&M) + Send>>) {
    let threads: Vec<_> = work
        .into_iter()
        .map(|work| {
            let machine = Arc::clone(machine);
            thread::spawn(move || work(&machine))
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

/// A processor that makes these accesses, each of which must come to one of `allowed`.
fn guest<F: Processor>(
    mut cpu: Cpu,
    accesses: &'static [(u64, bool)],
    allowed: &'static [Access],
) -> Work<F> {
    Box::new(move |machine| {
        for &(gfn, write) in accesses {
            let outcome = machine.access(&mut cpu, gfn, write);
            assert!(allowed.contains(&outcome), "{gfn:#x}: {outcome:?}");
        }
    })
}

#[test]
fn two_faults_on_one_page_make_one_mapping() {
    explore("two faults on one page", 2, || {
        let machine = Machine::<Ept>::new(2, 0, Level::L4K, narrow());
        let cpus = [machine.cpu(0), machine.cpu(1)];
        let work = cpus.map(|cpu| guest(cpu, &[(1, true)], &[Access::Made]));
        together(&machine, work.into());
        let report = machine.mmu.check();
        assert_eq!((report.tables, report.leaves), (4, [1, 0, 0]));
        machine.finish();
    });
}

#[test]
fn faults_on_neighbours_and_in_the_next_table_share_what_they_can() {
    explore("faults on neighbours", 2, || {
        let machine = Machine::<Npt>::new(2, 0, Level::L4K, narrow());
        let (a, b) = (machine.cpu(0), machine.cpu(1));
        let work = vec![
            guest(a, &[(1, true)], &[Access::Made]),
            guest(b, &[(2, false), (0x201, true)], &[Access::Made]),
        ];
        together(&machine, work);
        let report = machine.mmu.check();
        assert_eq!((report.tables, report.leaves), (5, [3, 0, 0]));
        machine.finish();
    });
}

#[test]
fn a_page_that_changes_during_a_fault_is_never_reached_again() {
    explore("host change", 2, || {
        let machine = Machine::<Ept>::new(1, 0, Level::L4K, narrow());
        let cpu = machine.cpu(0);
        let work: Vec<Work<Ept>> = vec![
            guest(
                cpu,
                &[(1, true), (1, true)],
                &[Access::Made, Access::Lost, Access::GaveUp],
            ),
            Box::new(|machine| machine.change_host(0x1001..0x1002)),
        ];
        together(&machine, work);
        machine.finish();
    });
}

#[test]
fn two_changes_at_once_hide_both_pages() {
    explore("two host changes", 1, || {
        let machine = Machine::<Ept>::new(1, 0, Level::L4K, narrow());
        let cpu = machine.cpu(0);
        let work: Vec<Work<Ept>> = vec![
            guest(
                cpu,
                &[(1, true), (2, true)],
                &[Access::Made, Access::Lost, Access::GaveUp],
            ),
            Box::new(|machine| machine.change_host(0x1001..0x1002)),
            Box::new(|machine| machine.change_host(0x1002..0x1003)),
        ];
        together(&machine, work);
        machine.finish();
    });
}

#[test]
fn a_processor_leaves_an_obsolete_root_before_its_tables_go() {
    explore("zap all", 2, || {
        let machine = Machine::<Ept>::new(1, 0, Level::L4K, narrow());
        let cpu = machine.cpu(0);
        let work: Vec<Work<Ept>> = vec![
            guest(cpu, &[(1, true), (2, true)], &[Access::Made]),
            Box::new(|machine| machine.mmu.zap_all()),
        ];
        together(&machine, work);
        machine.finish();
    });
}

#[test]
fn nothing_is_mapped_for_a_slot_that_is_being_deleted() {
    explore("slot deleted", 2, || {
        let machine = Machine::<Ept>::new(1, 0, Level::L4K, narrow());
        let cpu = machine.cpu(0);
        let all = &[Access::Made, Access::Mmio, Access::Lost, Access::GaveUp];
        let work: Vec<Work<Ept>> = vec![
            guest(cpu, &[(1, true), (0x200, true), (1, false)], all),
            Box::new(|machine| machine.delete_slot(0)),
        ];
        together(&machine, work);
        assert_eq!(machine.mmu.check().leaves, [1, 0, 0]);
        machine.finish();
    });
}

#[test]
fn a_slot_deleted_by_the_fast_zap_takes_its_mappings_along() {
    explore("slot deleted with fast zap", 1, || {
        let machine = Machine::<Npt>::new(2, 0, Level::L4K, Config::default());
        let (a, b) = (machine.cpu(0), machine.cpu(1));
        let all = &[Access::Made, Access::Mmio, Access::Lost, Access::GaveUp];
        let work: Vec<Work<Npt>> = vec![
            guest(a, &[(1, true), (0x200, true)], all),
            guest(b, &[(0x201, true), (2, true)], all),
            Box::new(|machine| machine.delete_slot(0)),
        ];
        together(&machine, work);
        machine.finish();
    });
}

#[test]
fn a_slot_that_appears_ends_mmio() {
    explore("slot created", 2, || {
        let machine = Machine::<Ept>::new(1, 0, Level::L4K, narrow());
        machine.delete_slot(1);
        let cpu = machine.cpu(0);
        let maybe = &[Access::Made, Access::Mmio, Access::Lost];
        let work: Vec<Work<Ept>> = vec![
            guest(cpu, &[(0x201, true), (0x201, true)], maybe),
            Box::new(|machine| machine.set_slot(1, 0)),
        ];
        together(&machine, work);
        machine.finish();
    });
}

#[test]
fn tables_of_a_deleted_slot_are_not_freed_under_a_walker() {
    explore("reclamation", 1, || {
        let machine = Machine::<Ept>::new(2, 0, Level::L4K, narrow());
        let (mut a, b) = (machine.cpu(0), machine.cpu(1));
        machine.access(&mut a, 1, true);
        machine.access(&mut a, 0x201, true);
        let all = &[Access::Made, Access::Mmio, Access::Lost, Access::GaveUp];
        let work: Vec<Work<Ept>> = vec![
            guest(a, &[(0x202, true)], all),
            guest(b, &[(0x201, false)], all),
            Box::new(|machine| machine.mmu.zap_all()),
        ];
        together(&machine, work);
        machine.finish();
    });
}

#[test]
fn a_table_that_a_fault_remembers_is_not_used_once_it_is_unlinked() {
    explore("remembered table", 2, || {
        let machine = Machine::<Ept>::new(1, 0, Level::L4K, narrow());
        let mut cpu = machine.cpu(0);
        machine.access(&mut cpu, 0x200, true);
        let all = &[Access::Made, Access::Lost, Access::GaveUp];
        let work: Vec<Work<Ept>> = vec![
            guest(cpu, &[(0x201, true), (0x202, true)], all),
            Box::new(|machine| machine.change_host(0x3000..0x3200)),
        ];
        together(&machine, work);
        machine.finish();
    });
}
