//! Huge leaves that are split and made while processors use them.

use crate::machine::{Access, Cpu, Machine};
use crate::{Work, explore, guest, narrow, together};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use twofold_arch::Level;
use twofold_mmu::{Config, Ept, Npt};

const LOG: u32 = 1;

fn lazy() -> Config {
    Config {
        eager_split: false,
        ..narrow()
    }
}

/// Reads what is mapped, without a fault.
fn reader(mut cpu: Cpu, gfns: &'static [u64]) -> Work<Ept> {
    cpu.faults = 0;
    Box::new(move |machine| {
        for &gfn in gfns {
            assert_eq!(machine.access(&mut cpu, gfn, false), Access::Made);
        }
        assert_eq!(cpu.faults, 0, "the guest met a hole");
    })
}

/// Logging begins on the slot of a huge leaf that two processors use.
fn split_by_logging(config: Config) {
    let machine = Machine::<Ept>::new(2, 0, Level::L2M, config);
    let mut cpus = [machine.cpu(0), machine.cpu(1)];
    for cpu in &mut cpus {
        assert_eq!(machine.access(cpu, 0x200, true), Access::Made);
    }
    assert_eq!(machine.mmu.check().leaves, [0, 1, 0]);
    let [a, b] = cpus;
    let before = Arc::new(Mutex::new(HashMap::new()));
    let begun = Arc::clone(&before);
    let work: Vec<Work<Ept>> = vec![
        guest(a, &[(0x200, true), (0x201, true)], &[Access::Made]),
        reader(b, &[0x202, 0x200]),
        Box::new(move |machine| {
            machine.set_slot(1, LOG);
            *begun.lock().unwrap() = machine.written(1);
        }),
    ];
    together(&machine, work);
    let mut reported = before.lock().unwrap();
    machine.harvest(1, &mut reported);
    machine.check_reported(1, &reported);
    machine.finish();
}

#[test]
fn a_huge_leaf_that_logging_splits_shows_no_hole_and_loses_no_write() {
    explore("eager split", 1, || split_by_logging(narrow()));
}

#[test]
fn a_huge_leaf_that_a_write_splits_shows_no_hole_and_loses_no_write() {
    explore("lazy split", 1, || split_by_logging(lazy()));
}

#[test]
fn two_writes_that_split_one_leaf_are_both_made_and_reported() {
    explore("two splits", 1, || {
        let machine = Machine::<Npt>::new(2, 0, Level::L2M, lazy());
        let mut cpus = [machine.cpu(0), machine.cpu(1)];
        machine.access(&mut cpus[0], 0x202, true);
        machine.set_slot(1, LOG);
        let mut reported = machine.written(1);
        let [a, b] = cpus;
        let work = vec![
            guest(a, &[(0x200, true)], &[Access::Made]),
            guest(b, &[(0x201, true)], &[Access::Made]),
        ];
        together(&machine, work);
        assert_eq!(machine.mmu.check().leaves, [512, 0, 0]);
        machine.harvest(1, &mut reported);
        machine.check_reported(1, &reported);
        machine.finish();
    });
}

#[test]
fn small_leaves_that_become_huge_show_no_hole() {
    explore("recovery", 1, || {
        let machine = Machine::<Ept>::new(2, LOG, Level::L2M, narrow());
        let mut cpus = [machine.cpu(0), machine.cpu(1)];
        for gfn in [0x200, 0x201, 0x202] {
            machine.access(&mut cpus[0], gfn, true);
        }
        let [a, b] = cpus;
        let work: Vec<Work<Ept>> = vec![
            guest(a, &[(0x203, true), (0x200, true)], &[Access::Made]),
            // A processor that still walks the table that goes meets leaves in it until the flush,
            // except in its first entry, where the table waits in a list: there it may fault once.
            reader(b, &[0x201, 0x202]),
            Box::new(|machine| machine.set_slot(1, 0)),
        ];
        together(&machine, work);
        machine.finish();
    });
}

#[test]
fn memory_that_changes_while_its_leaves_become_huge_is_never_reached_again() {
    explore("recovery and host change", 1, || {
        let machine = Machine::<Ept>::new(1, LOG, Level::L2M, narrow());
        let mut cpu = machine.cpu(0);
        machine.access(&mut cpu, 0x200, true);
        let all = &[Access::Made, Access::Lost, Access::GaveUp];
        let work: Vec<Work<Ept>> = vec![
            guest(cpu, &[(0x201, true), (0x200, true)], all),
            Box::new(|machine| machine.set_slot(1, 0)),
            Box::new(|machine| machine.change_host(0x3000..0x3200)),
        ];
        together(&machine, work);
        machine.finish();
    });
}
