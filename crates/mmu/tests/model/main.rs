//! The MMU against plain maps: the same random operations, and after each of them a processor that
//! walks the tables finds exactly what the maps hold, with the permissions, sizes, accessed and
//! dirty bits they say; no processor holds a translation that should have been flushed; dirty logs
//! and rings read the same; counters are true; the invariants hold. Over EPT and NPT, roots of four
//! and five levels, system management mode and guest mode, host pages of 4K, 2M and 1G, every way
//! of logging, processors with and without accessed and dirty bits, with allocations that fail and
//! hosts that refuse; with sub-pages protected, where processors know such.
//!
//! `TWOFOLD_MODEL_CASES=n` runs n sequences of each format instead of a few hundred.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

#[path = "../common/mod.rs"]
mod common;
mod machine;
mod operations;
mod reference;

use common::Processor;
use machine::Machine;
use operations::{Access, Op, Recorder, Setup, ops, setups};
use proptest::prelude::*;
use std::sync::atomic::{AtomicU64, Ordering};
use twofold_arch::Level;
use twofold_mmu::{Config, Ept, ManualProtect, Npt};

fn cases() -> u32 {
    let cases = std::env::var("TWOFOLD_MODEL_CASES").ok();
    cases.and_then(|cases| cases.parse().ok()).unwrap_or(150)
}

fn config() -> ProptestConfig {
    ProptestConfig {
        failure_persistence: None,
        max_shrink_iters: 20_000,
        ..ProptestConfig::with_cases(cases())
    }
}

static OPERATIONS: AtomicU64 = AtomicU64::new(0);

fn run<F: Processor>(ops: &[Op], setup: Setup) {
    let mut machine = Machine::<F>::new(setup);
    for op in ops {
        machine.apply(op);
    }
    machine.finish();
    OPERATIONS.fetch_add(ops.len() as u64, Ordering::Relaxed);
}

fn sequence() -> impl Strategy<Value = Vec<Op>> {
    prop::collection::vec(ops(), 1..160)
}

proptest! {
    #![proptest_config(config())]

    fn ept(ops in sequence(), setup in setups()) {
        run::<Ept>(&ops, setup);
    }

    fn npt(ops in sequence(), setup in setups()) {
        run::<Npt>(&ops, setup);
    }
}

#[test]
fn ept_holds_what_the_reference_holds() {
    ept();
    println!("{} operations", OPERATIONS.load(Ordering::Relaxed));
}

#[test]
fn npt_holds_what_the_reference_holds() {
    npt();
    println!("{} operations", OPERATIONS.load(Ordering::Relaxed));
}

// What the random sequences have found before.

fn setup(level: Level, accessed_dirty: bool) -> Setup {
    Setup {
        config: Config {
            accessed_dirty,
            ..Config::default()
        },
        recorder: Recorder::Bitmap(ManualProtect::empty()),
        level,
        must_ask: false,
        offset: 0,
        sub_pages: false,
    }
}

fn access(cpu: usize, frame: usize, access: Access) -> Op {
    Op::Access {
        cpu,
        role: 0,
        frame,
        access,
        anyway: false,
    }
}

const CREATE: Op = Op::Create {
    as_id: 0,
    id: 0,
    place: 3,
    distance: 0,
    flags: 0,
};

#[test]
fn a_processor_that_wrote_before_its_page_aged_is_flushed_when_logging_begins() {
    let age = Op::Age {
        as_id: 0,
        frame: 1,
        clear: true,
    };
    let ops = [
        CREATE,
        access(0, 1, Access::Write),
        age,
        access(1, 1, Access::Read),
        Op::Flip { as_id: 0, id: 0 },
    ];
    run::<Ept>(&ops, setup(Level::L4K, false));
}

#[test]
fn a_huge_page_prepared_in_the_place_of_a_table_is_not_dirty() {
    // The first access leaves a table that remembers the absence of memory.
    let ops = [
        access(0, 5, Access::Read),
        CREATE,
        Op::Prefault { role: 0, frame: 5 },
    ];
    run::<Ept>(&ops, setup(Level::L2M, true));
}
