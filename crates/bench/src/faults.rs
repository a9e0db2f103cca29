//! The fault path of the MMU alone, without a processor and without the kernel.

use crate::floor::Entries;
use crate::guest::{GIB, Guest, round_faults, tables};
use crate::measure::{Contest, Meter, per_item};
use crate::peers::axaddrspace::Space;
use crate::pool;
use crate::random::Permutation;
use crate::report::{Reach, Row};
use anyhow::{Context, Result};
use twofold_arch::{Level, PAGE_SIZE};

fn in_order(meter: Meter) -> Result<Row> {
    let what = "fault with slot lookup, in order";
    pool::reserve(3 * tables(GIB))?;
    let guest = Guest::new(GIB)?;
    let entries = Entries::new(guest.pages())?;
    let mut space = Space::new(GIB).context("axaddrspace")?;
    let figures = Contest::new(what)
        .ours(|| guest.timed_fill())
        .floor("locked exchange", || {
            Ok(per_item(guest.pages(), || {
                entries.exchange(0..guest.pages(), 1);
            }))
        })
        .peer("axaddrspace", || {
            space.clear()?;
            let mut result = Ok(());
            let figure = per_item(guest.pages(), || result = space.fault(0..guest.pages()));
            result?;
            Ok(figure)
        })
        .run(meter)?;
    Ok(Row {
        what,
        unit: "ns",
        reach: Reach::AtMost(15.0),
        figures,
        obstacle: "the checks that let other threads change slots and host memory while a fault is in flight".into(),
    })
}

/// Pages of a large guest in an order without a pattern, except the first of each table.
fn random_pages(bytes: u64) -> Vec<u64> {
    Permutation::new(bytes / PAGE_SIZE)
        .filter(|page| page % 512 != 0)
        .collect()
}

/// Every table of the guest exists before the first round, so that what is measured is the fault
/// and the misses of its walk. No page is touched twice.
fn at_random(meter: Meter) -> Result<Row> {
    let what = "fault with slot lookup, random over 64 GiB";
    let bytes = meter.large_guest();
    pool::reserve(3 * tables(bytes))?;
    let guest = Guest::new(bytes)?;
    let firsts = || (0..bytes / PAGE_SIZE).step_by((Level::L2M.bytes() / PAGE_SIZE) as usize);
    guest.fault(firsts())?;
    let mut space = Space::new(bytes).context("axaddrspace")?;
    space.fault(firsts())?;
    let entries = Entries::new(guest.pages())?;
    let pages = random_pages(bytes);
    let count = round_faults(meter);
    let [mut ours, mut theirs, mut floors] = [0; 3].map(|_| pages.chunks_exact(count));
    let figures = Contest::new(what)
        .ours(|| {
            let pages = ours.next().context("no pages are left")?;
            let mut result = Ok(());
            let figure = per_item(count as u64, || {
                result = guest.fault(pages.iter().copied());
            });
            result?;
            Ok(figure)
        })
        .floor("locked exchange", || {
            let pages = floors.next().context("no pages are left")?;
            Ok(per_item(count as u64, || {
                pages.iter().for_each(|&page| entries.exchange_one(page));
            }))
        })
        .peer("axaddrspace", || {
            let pages = theirs.next().context("no pages are left")?;
            let mut result = Ok(());
            let figure = per_item(count as u64, || {
                result = space.fault(pages.iter().copied());
            });
            result?;
            Ok(figure)
        })
        .run(meter)?;
    Ok(Row {
        what,
        unit: "ns",
        reach: Reach::AtMost(45.0),
        figures,
        obstacle: "each fault waits for its own cache and TLB misses: at nearly 300 instructions a fault the processor cannot look ahead to the next one's, as it does for a loop of exchanges".into(),
    })
}

/// The rows about faults of one thread.
pub(crate) fn rows(meter: Meter) -> Result<Vec<Row>> {
    Ok(vec![in_order(meter)?, at_random(meter)?])
}
