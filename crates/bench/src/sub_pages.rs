//! Sub-page write protection in the MMU: what it costs those who do not use it, and those who do.

use crate::floor::Entries;
use crate::guest::{GIB, Guest, tables};
use crate::measure::{Contest, Meter, per_item};
use crate::pool;
use crate::report::{Reach, Row};
use anyhow::Result;
use std::borrow::Cow;
use twofold_arch::sppt::AccessMap;
use twofold_arch::{Gfn, Gpa};
use twofold_mmu::{RootRole, SUB_PAGE_MAX_PAGES};

/// Microseconds per nanosecond.
const MICRO: f64 = 1e-3;
/// Calls of one round.
const CALLS: u64 = 64;
const PAGES: u64 = SUB_PAGE_MAX_PAGES as u64;

/// A guest whose sub-pages can be protected.
fn enabled() -> Result<Guest> {
    pool::reserve(2 * tables(GIB))?;
    let guest = Guest::new(GIB)?;
    guest.mmu.enable_sub_pages()?;
    Ok(guest)
}

/// Every map is another one than that of the last call, and none is full.
fn maps(call: u64) -> [AccessMap; SUB_PAGE_MAX_PAGES] {
    [AccessMap(0x0f0f_0000 | call as u32 & 0xffff); SUB_PAGE_MAX_PAGES]
}

/// Faults of a guest beside those of one without sub-pages.
fn faults(
    meter: Meter,
    what: &'static str,
    protect: impl FnOnce(&Guest) -> Result<()>,
    obstacle: &'static str,
) -> Result<Row> {
    let guest = enabled()?;
    let plain = Guest::new(GIB)?;
    protect(&guest)?;
    let figures = Contest::new(what)
        .ours(|| guest.timed_fill())
        .peer("not enabled", || plain.timed_fill())
        .run(meter)?;
    Ok(Row {
        what,
        unit: "ns",
        reach: Reach::Anything,
        figures,
        obstacle: Cow::Borrowed(obstacle),
    })
}

fn nothing_protected(meter: Meter) -> Result<Row> {
    let what = "sub-pages: fault, nothing protected";
    faults(meter, what, |_| Ok(()), "a count is looked at")
}

fn one_protected(meter: Meter) -> Result<Row> {
    let what = "sub-pages: fault, a page of another gigabyte protected";
    let protect = |guest: &Guest| {
        let far = Gfn::new(guest.pages());
        guest.mmu.set_region(twofold_mmu::Region {
            slot: 1,
            flags: 0,
            gpa: far.address().get(),
            size: 1 << 21,
            hva: guest.hva().start,
        })?;
        guest.mmu.set_access(0, far, &[AccessMap(0)])?;
        Ok(())
    };
    faults(meter, what, protect, "three counts are looked at")
}

fn every_region(meter: Meter) -> Result<Row> {
    let what = "sub-pages: fault, one page of each 2M protected";
    let protect = |guest: &Guest| {
        for gfn in (0..guest.pages()).step_by(512) {
            guest.mmu.set_access(0, Gfn::new(gfn), &[AccessMap(1)])?;
        }
        Ok(())
    };
    faults(meter, what, protect, "each page's own map is looked at")
}

/// Work on 512 pages, beside exchanges of as many entries.
fn for_512_pages(
    meter: Meter,
    what: &'static str,
    ours: impl FnMut() -> Result<f64>,
    obstacle: &'static str,
) -> Result<Row> {
    let entries = Entries::new(PAGES)?;
    let figures = Contest::new(what)
        .ours(ours)
        .floor("locked exchange of 512 entries", || {
            Ok(per_item(CALLS, || {
                (0..CALLS).for_each(|_| entries.exchange(0..PAGES, 1));
            }))
        })
        .run(meter)?;
    Ok(Row {
        what,
        unit: "µs",
        reach: Reach::Anything,
        figures: figures.times(MICRO),
        obstacle: Cow::Borrowed(obstacle),
    })
}

/// Sets maps of 512 pages, time and again.
fn set(meter: Meter, what: &'static str, mapped: bool) -> Result<Row> {
    let guest = enabled()?;
    if mapped {
        guest.fill()?;
    }
    let root = guest.mmu.load_root(RootRole::NORMAL)?;
    let mut reader = guest.mmu.reader();
    let mut call = 0;
    for_512_pages(
        meter,
        what,
        || {
            let mut result = Ok(());
            let figure = per_item(CALLS, || {
                result = (0..CALLS).try_for_each(|_| {
                    call += 1;
                    if mapped {
                        // As when the guest has written since: there are vectors to be cut off.
                        guest.mmu.sppt_miss(&mut reader, &root, Gpa::new(0))?;
                    }
                    guest.mmu.set_access(0, Gfn::new(0), &maps(call))?;
                    anyhow::Ok(())
                });
            });
            result?;
            Ok(figure)
        },
        "a wait for faults in flight, which a membarrier makes; with vectors a flush too",
    )
}

/// A miss: the vectors of 2M, made from the maps.
fn miss(meter: Meter) -> Result<Row> {
    let what = "sub-pages: miss, 512 vectors made";
    let guest = enabled()?;
    for gfn in (0..guest.pages()).step_by(512) {
        guest.mmu.set_access(0, Gfn::new(gfn), &maps(1))?;
    }
    let root = guest.mmu.load_root(RootRole::NORMAL)?;
    let mut reader = guest.mmu.reader();
    let regions = guest.pages() / 512;
    let mut call = 1;
    for_512_pages(
        meter,
        what,
        || {
            call += 1;
            // Cuts every region off again.
            for gfn in (0..guest.pages()).step_by(512) {
                let map = AccessMap(call & 0xffff);
                guest.mmu.set_access(0, Gfn::new(gfn), &[map])?;
            }
            let mut result = Ok(());
            let figure = per_item(regions, || {
                result = (0..regions).try_for_each(|region| {
                    let gpa = Gpa::new(region << 21);
                    guest.mmu.sppt_miss(&mut reader, &root, gpa).map(|_| ())
                });
            });
            result?;
            Ok(figure)
        },
        "each map is spread over twice as many bits",
    )
}

/// The rows about sub-page write protection.
pub(crate) fn rows(meter: Meter) -> Result<Vec<Row>> {
    Ok(vec![
        nothing_protected(meter)?,
        one_protected(meter)?,
        every_region(meter)?,
        set(meter, "sub-pages: set maps of 512 pages, not mapped", false)?,
        set(
            meter,
            "sub-pages: set maps of 512 pages, mapped and written",
            true,
        )?,
        miss(meter)?,
    ])
}
