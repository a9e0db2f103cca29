//! Marking pages against collecting the marks: bitmaps, rings, the processor's log, and ageing.

use crate::common::Processor;
use crate::machine::{Access, Cpu, Machine};
use crate::{Work, explore, guest, narrow, together};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use twofold_arch::{Gfn, Level};
use twofold_mmu::{Config, Ept, ManualProtect, Npt};

const LOG: u32 = 1;

/// Pages and their writes, as far as somebody was told.
type Reported = Arc<Mutex<HashMap<u64, u64>>>;

/// Collects once with `harvest`.
fn collector<F: Processor>(
    reported: &Reported,
    harvest: impl FnOnce(&Machine<F>, &mut HashMap<u64, u64>) + Send + 'static,
) -> Work<F> {
    let reported = Arc::clone(reported);
    Box::new(move |machine| {
        let mut mine = HashMap::new();
        harvest(machine, &mut mine);
        *reported.lock().unwrap() = mine;
    })
}

fn writer<F: Processor>(cpu: Cpu) -> Work<F> {
    guest(cpu, &[(1, true), (2, true), (1, true)], &[Access::Made])
}

/// A guest writes while its writes are collected.
pub(crate) fn collected<F: Processor>(machine: Arc<Machine<F>>, clear: bool, age: bool) {
    let mut cpu = machine.cpu(0);
    machine.access(&mut cpu, 1, true);
    let reported = Reported::default();
    let collect = move |machine: &Machine<F>, reported: &mut _| {
        if age {
            machine.mmu.clear_young_gfns(0, Gfn::new(1)..Gfn::new(2));
        }
        match clear {
            true => machine.harvest_and_clear(0, reported),
            false => machine.harvest(0, reported),
        }
    };
    let work = vec![writer(cpu), collector(&reported, collect)];
    together(&machine, work);
    let mut reported = reported.lock().unwrap();
    collect(&machine, &mut reported);
    machine.check_reported(0, &reported);
    machine.finish();
}

#[test]
fn no_write_escapes_the_harvest() {
    explore("dirty harvest", 2, || {
        let machine = Machine::<Ept>::new(1, LOG, Level::L4K, narrow());
        collected(machine, false, false);
    });
}

#[test]
fn no_write_escapes_the_rings() {
    explore("dirty rings", 2, || {
        let machine = Machine::<Ept>::with_rings(1, LOG, Level::L4K, narrow());
        collected(machine, false, false);
    });
}

#[test]
fn no_write_escapes_when_reading_and_clearing_are_two_calls() {
    explore("read and clear", 2, || {
        let protect = ManualProtect::ENABLE;
        let machine = Machine::<Npt>::with(1, LOG, Level::L4K, narrow(), protect);
        collected(machine, true, false);
    });
}

#[test]
fn no_write_escapes_when_everything_counts_as_dirty_at_first() {
    explore("initially set", 2, || {
        let protect = ManualProtect::all();
        let machine = Machine::<Ept>::with(1, LOG, Level::L4K, narrow(), protect);
        collected(machine, true, false);
    });
}

#[test]
fn no_write_escapes_the_processors_log() {
    explore("page-modification log", 2, || {
        let config = Config {
            pml: true,
            ..narrow()
        };
        let machine = Machine::<Ept>::new(1, LOG, Level::L4K, config);
        collected(machine, false, false);
    });
}

fn no_flags() -> Config {
    Config {
        accessed_dirty: false,
        ..narrow()
    }
}

/// Ageing takes permissions away without a flush, while another processor gets them back and the
/// page is collected.
#[test]
fn no_write_escapes_the_harvest_of_a_page_that_ages() {
    explore("ageing and harvest", 2, || {
        let machine = Machine::<Ept>::new(1, LOG, Level::L4K, no_flags());
        collected(machine, false, true);
    });
}

/// Logging begins while a guest writes and its pages age.
fn logging_begins<F: Processor>(config: Config, ageing: bool) {
    let machine = Machine::<F>::new(2, 0, Level::L4K, config);
    let mut cpus = [machine.cpu(0), machine.cpu(1)];
    for cpu in &mut cpus {
        machine.access(cpu, 1, true);
    }
    let before = Reported::default();
    let begin = collector(&before, move |machine: &Machine<F>, reported| {
        if ageing {
            machine.mmu.clear_young_gfns(0, Gfn::new(1)..Gfn::new(2));
        }
        machine.set_slot(0, LOG);
        *reported = machine.written(0);
    });
    let [a, b] = cpus;
    let mut work = vec![writer(a), begin];
    if ageing {
        work.push(guest(b, &[(1, false)], &[Access::Made]));
    }
    together(&machine, work);
    // Whatever was written until the call returned may be reported or not; from then on it is.
    let mut reported = before.lock().unwrap();
    machine.harvest(0, &mut reported);
    machine.check_reported(0, &reported);
    machine.finish();
}

#[test]
fn a_write_while_logging_begins_is_before_it_or_reported() {
    explore("logging begins", 2, || {
        logging_begins::<Npt>(narrow(), false)
    });
}

#[test]
fn a_write_while_logging_begins_and_pages_age_is_before_it_or_reported() {
    explore("logging begins, ageing", 1, || {
        logging_begins::<Ept>(no_flags(), true);
    });
}
