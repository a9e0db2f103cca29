//! Taking the permission to write from a range.

use crate::floor::Entries;
use crate::guest::{GIB, Guest, tables};
use crate::mapper::{Mapper, Work, check};
use crate::measure::{Contest, Meter, per_item};
use crate::peers;
use crate::pool;
use crate::report::{Reach, Row};
use crate::tables::Tables;
use anyhow::Result;
use twofold_arch::{Level, PAGE_SIZE};
use twofold_mmu::RegionFlags;

/// While guests run and other threads take faults: dirty logging begins for the slot.
fn live(meter: Meter) -> Result<Row> {
    let what = "write-protect 1 GiB while live";
    pool::reserve(2 * tables(GIB))?;
    let guest = Guest::new(GIB)?;
    let entries = Entries::new(guest.pages())?;
    let figures = Contest::new(what)
        .ours(|| {
            guest.fill()?;
            let mut result = Ok(());
            let figure = per_item(guest.pages(), || {
                result = guest.set_flags(RegionFlags::LOG_DIRTY);
            });
            result?;
            guest.set_flags(RegionFlags::empty())?;
            Ok(figure)
        })
        .floor("locked exchange", || {
            Ok(per_item(guest.pages(), || {
                entries.exchange(0..guest.pages(), 1);
            }))
        })
        .run(meter)?;
    Ok(Row {
        what,
        unit: "ns",
        reach: Reach::AtMost(6.0),
        figures,
        obstacle: "about 70 instructions for each entry besides the locked exchange: what it is, whether it may be written, who has to be told".into(),
    })
}

/// One round: the range writable, then protected.
fn round(mapper: &mut dyn Mapper) -> Result<f64> {
    mapper.clear()?;
    mapper.map(GIB, Level::L4K)?;
    let mut result = Ok(());
    let figure = per_item(GIB / PAGE_SIZE, || result = mapper.write_protect(GIB));
    result?;
    check(mapper, 0..GIB, false)?;
    Ok(figure)
}

/// Where nobody else uses the tables.
fn exclusive(meter: Meter) -> Result<Row> {
    let what = "write-protect 1 GiB where exclusive";
    let mut peers = peers::mappers(Work::WriteProtect, tables(GIB))?;
    let mut ours = Tables::new()?;
    let mut entries = Entries::new(GIB / PAGE_SIZE)?;
    let mut contest = Contest::new(what)
        .ours(|| round(&mut ours))
        .floor("plain change", || {
            Ok(per_item(GIB / PAGE_SIZE, || {
                entries.update(|entry| entry & !2);
            }))
        });
    for peer in &mut peers {
        contest = contest.peer(peer.name(), || round(peer.as_mut()));
    }
    Ok(Row {
        what,
        unit: "ns",
        reach: Reach::AtMost(0.5),
        figures: contest.run(meter)?,
        obstacle: "each entry is decoded before it is changed".into(),
    })
}

/// The rows about write protection.
pub(crate) fn rows(meter: Meter) -> Result<Vec<Row>> {
    Ok(vec![live(meter)?, exclusive(meter)?])
}
