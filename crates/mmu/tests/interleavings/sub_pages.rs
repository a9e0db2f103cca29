//! Access maps that change while guests write, miss, age and are logged. Once a call that forbids a
//! write has returned, no write is made.

use crate::logging::collected;
use crate::machine::{Access, Machine};
use crate::{Work, explore, guest, narrow, together};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use twofold_arch::sppt::AccessMap;
use twofold_arch::{Gfn, Level};
use twofold_mmu::{Config, Ept};

const LOG: u32 = 1;
const EITHER: &[Access] = &[Access::Made, Access::Denied, Access::GaveUp];

fn machine(cpus: usize, flags: u32, level: Level, config: Config) -> Arc<Machine<Ept>> {
    let machine = Machine::<Ept>::new(cpus, flags, level, config);
    machine.mmu.enable_sub_pages().unwrap();
    machine
}

/// Forbids writes to a page, and notes how many there were when the call returned.
fn forbid(gfn: u64, writes: &Arc<AtomicU64>) -> Work<Ept> {
    let writes = Arc::clone(writes);
    Box::new(move |machine| writes.store(machine.protect(gfn, false), Ordering::Relaxed))
}

/// Nothing was written after the call had returned.
fn check(machine: Arc<Machine<Ept>>, gfn: u64, writes: &AtomicU64) {
    assert_eq!(machine.writes_to(gfn), writes.load(Ordering::Relaxed));
    machine.finish();
}

#[test]
fn a_fault_in_flight_never_maps_a_page_writable_that_is_protected_meanwhile() {
    explore("protect against fault", 2, || {
        let machine = machine(1, 0, Level::L4K, narrow());
        let cpu = machine.cpu(0);
        let writes = Arc::default();
        let work = vec![
            guest(cpu, &[(1, true), (1, true)], EITHER),
            forbid(1, &writes),
        ];
        together(&machine, work);
        check(machine, 1, &writes);
    });
}

/// Defect D17: what a miss reads is old when it is published.
#[test]
fn a_miss_never_brings_back_what_a_change_has_forbidden() {
    explore("protect against miss", 1, || {
        let machine = machine(2, 0, Level::L4K, narrow());
        let mut cpus = [machine.cpu(0), machine.cpu(1)];
        for (cpu, gfn) in cpus.iter_mut().zip([1, 2]) {
            machine.protect(gfn, true);
            machine.access(cpu, gfn, false);
        }
        let [a, b] = cpus;
        let writes = Arc::default();
        let work = vec![
            guest(a, &[(1, true), (1, true)], EITHER),
            // A neighbour in the same region may write all the time.
            guest(b, &[(2, true), (2, true)], &[Access::Made]),
            forbid(1, &writes),
        ];
        together(&machine, work);
        check(machine, 1, &writes);
    });
}

#[test]
fn a_page_that_ages_comes_back_as_its_map_says() {
    explore("protect against ageing", 1, || {
        let config = Config {
            accessed_dirty: false,
            ..narrow()
        };
        let machine = machine(1, 0, Level::L4K, config);
        let mut cpu = machine.cpu(0);
        machine.access(&mut cpu, 1, true);
        let writes = Arc::default();
        let work = vec![
            guest(cpu, &[(1, false), (1, true), (1, true)], EITHER),
            Box::new(|machine: &Machine<Ept>| {
                machine.mmu.clear_young_gfns(0, Gfn::new(1)..Gfn::new(2));
            }),
            forbid(1, &writes),
        ];
        together(&machine, work);
        check(machine, 1, &writes);
    });
}

fn logging(config: Config, age: bool) {
    let machine = machine(1, LOG, Level::L4K, config);
    machine.protect(1, true);
    collected(machine, false, age);
}

#[test]
fn no_write_to_a_protected_page_escapes_the_harvest() {
    explore("harvest of a protected page", 1, || {
        logging(narrow(), false)
    });
}

#[test]
fn no_write_to_a_protected_page_escapes_the_processors_log() {
    explore("page-modification log of a protected page", 1, || {
        let config = Config {
            pml: true,
            ..narrow()
        };
        logging(config, false);
    });
}

#[test]
fn no_write_to_a_protected_page_that_ages_escapes_the_harvest() {
    explore("ageing and harvest of a protected page", 1, || {
        let config = Config {
            accessed_dirty: false,
            ..narrow()
        };
        logging(config, true);
    });
}

/// The map changes while the page logs, so that one bit gives way to the other and back.
#[test]
fn no_write_escapes_the_harvest_while_its_page_becomes_protected() {
    explore("protect against harvest", 1, || {
        let machine = machine(1, LOG, Level::L4K, narrow());
        let mut cpu = machine.cpu(0);
        machine.access(&mut cpu, 1, true);
        let mut reported = HashMap::new();
        let first = Arc::new(Mutex::new(HashMap::new()));
        let found = Arc::clone(&first);
        let work: Vec<Work<Ept>> = vec![
            guest(cpu, &[(1, true), (1, true)], &[Access::Made]),
            Box::new(move |machine| machine.harvest(0, &mut found.lock().unwrap())),
            Box::new(|machine| {
                machine.protect(1, true);
                let full = [AccessMap::FULL];
                machine.mmu.set_access(0, Gfn::new(1), &full).unwrap();
            }),
        ];
        together(&machine, work);
        reported.extend(first.lock().unwrap().drain());
        machine.harvest(0, &mut reported);
        machine.check_reported(0, &reported);
        machine.finish();
    });
}

#[test]
fn a_slot_that_goes_takes_its_vectors_along_under_a_walker() {
    explore("slot with vectors deleted", 1, || {
        let machine = machine(2, 0, Level::L4K, narrow());
        let mut cpus = [machine.cpu(0), machine.cpu(1)];
        machine.protect(1, true);
        for cpu in &mut cpus {
            machine.access(cpu, 1, true);
        }
        let [a, b] = cpus;
        let all = &[Access::Made, Access::Mmio, Access::Lost, Access::GaveUp];
        let work: Vec<Work<Ept>> = vec![
            guest(a, &[(1, true), (1, true)], all),
            guest(b, &[(1, true)], all),
            Box::new(|machine| machine.delete_slot(0)),
        ];
        together(&machine, work);
        machine.finish();
    });
}

#[test]
fn a_huge_page_gives_way_and_its_neighbours_go_on() {
    explore("protect against huge page", 1, || {
        let machine = machine(2, 0, Level::L2M, narrow());
        let (mut a, b) = (machine.cpu(0), machine.cpu(1));
        machine.access(&mut a, 0x201, true);
        let writes = Arc::default();
        let work = vec![
            guest(a, &[(0x201, true), (0x201, true)], EITHER),
            guest(b, &[(0x202, true), (0x203, true)], &[Access::Made]),
            forbid(0x201, &writes),
        ];
        together(&machine, work);
        check(machine, 0x201, &writes);
    });
}

#[test]
fn a_huge_page_comes_back_under_its_guests() {
    explore("unprotect against huge page", 1, || {
        let machine = machine(2, 0, Level::L2M, narrow());
        let (mut a, b) = (machine.cpu(0), machine.cpu(1));
        machine.protect(0x201, true);
        machine.access(&mut a, 0x201, true);
        let work: Vec<Work<Ept>> = vec![
            guest(a, &[(0x201, true)], &[Access::Made]),
            guest(b, &[(0x202, true)], &[Access::Made]),
            Box::new(|machine| {
                let full = [AccessMap::FULL];
                machine.mmu.set_access(0, Gfn::new(0x201), &full).unwrap();
            }),
        ];
        together(&machine, work);
        machine.finish();
    });
}
