//! The fault path of the MMU alone, without a processor and without the kernel.

use crate::host::{Arena, GUEST_MEMORY};
use crate::measure::{in_turns, nanoseconds_per_item};
use crate::peers::axaddrspace::Space;
use crate::report::{Reach, Row};
use anyhow::{Context, Result};
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;
use twofold_arch::{Gpa, Level, PAGE_SIZE, Pferr};
use twofold_mmu::{Config, Ept, Fault, Mmu, Outcome, Region, RootRole};

const BYTES: u64 = 1 << 30;
const PAGES: u64 = BYTES / PAGE_SIZE;
/// Tables for 1 GiB of 4K leaves, two roots and the path between.
const TABLES: u32 = 2 * 512 + 64;

fn mmu() -> Result<Mmu<Ept, Arena>> {
    let mmu = Mmu::new(Arena::new(TABLES), Config::default());
    mmu.set_region(Region {
        slot: 0,
        flags: 0,
        gpa: 0,
        size: BYTES,
        hva: GUEST_MEMORY,
    })?;
    Ok(mmu)
}

/// Faults on every page of `pages`, in order. Returns how many did not end in a new 4K mapping.
fn fault_all(mmu: &Mmu<Ept, Arena>, pages: std::ops::Range<u64>) -> u64 {
    let Ok(root) = mmu.load_root(RootRole::NORMAL) else {
        return pages.end - pages.start;
    };
    let mut reader = mmu.reader();
    let mut wrong = 0;
    for page in pages {
        let fault = Fault {
            gpa: Gpa::new(page * PAGE_SIZE),
            error: Pferr::WRITE,
        };
        let fixed = Ok(Outcome::Fixed { level: Level::L4K });
        wrong += u64::from(mmu.fault(&mut reader, &root, fault) != fixed);
    }
    wrong
}

/// Passes of the floor, so that it lasts long enough for two threads to overlap.
const FLOOR_PASSES: u64 = 16;

/// The floor: a locked exchange into every entry of a table that is there already.
fn store_all(entries: &[AtomicU64], pages: std::ops::Range<u64>) {
    for _ in 0..FLOOR_PASSES {
        for page in pages.clone() {
            entries[page as usize].swap(page | 7, Ordering::SeqCst);
        }
    }
}

/// Nanoseconds that the slower of two threads needs for its half of the pages, once both run.
fn by_two(work: impl Fn(std::ops::Range<u64>) + Sync) -> f64 {
    let ready = Barrier::new(2);
    std::thread::scope(|scope| {
        let threads = [0..PAGES / 2, PAGES / 2..PAGES].map(|half| {
            scope.spawn(|| {
                ready.wait();
                let start = Instant::now();
                work(half);
                start.elapsed().as_nanos() as f64
            })
        });
        // A thread that panicked has measured nothing.
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or(f64::NAN))
            .fold(0.0, |slower, own| {
                if own > slower || own.is_nan() {
                    own
                } else {
                    slower
                }
            })
    })
}

/// The rows about faults.
pub(crate) fn rows() -> Result<Vec<Row>> {
    let mmu = mmu()?;
    let entries: Vec<_> = (0..PAGES).map(|_| AtomicU64::new(1)).collect();
    let mut space = Space::new(BYTES).context("axaddrspace")?;
    let mut wrong = 0;

    let [one, floor_one, peer, two, floor_two] = in_turns([
        &mut || {
            mmu.zap_all();
            nanoseconds_per_item(PAGES, || wrong += fault_all(&mmu, 0..PAGES))
        },
        &mut || nanoseconds_per_item(FLOOR_PASSES * PAGES, || store_all(&entries, 0..PAGES)),
        &mut || {
            space.clear();
            nanoseconds_per_item(PAGES, || space.fault_all())
        },
        &mut || {
            mmu.zap_all();
            by_two(|half| _ = fault_all(&mmu, half)) / PAGES as f64
        },
        &mut || by_two(|half| store_all(&entries, half)) / (FLOOR_PASSES * PAGES) as f64,
    ]);
    anyhow::ensure!(wrong == 0, "{wrong} faults did not end in a new 4K mapping");
    anyhow::ensure!(space.all_mapped(), "axaddrspace did not map every page");

    let floor_gain = floor_one / floor_two;
    Ok(vec![
        Row {
            what: "fault in the MMU with slot lookup, in order",
            ours: one,
            unit: "ns",
            reach: Reach::AtMost(15.0),
            compared: vec![
                ("locked store".into(), floor_one),
                ("axaddrspace".into(), peer),
            ],
        },
        Row {
            what: "two threads, disjoint: gain / gain of locked stores",
            ours: one / two / floor_gain,
            unit: "",
            reach: Reach::AtLeast(0.9),
            compared: vec![
                ("locked stores gain".into(), floor_gain),
                ("ours gains".into(), one / two),
            ],
        },
    ])
}
