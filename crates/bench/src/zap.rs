//! Taking a mapped range away.

use crate::floor::Entries;
use crate::guest::{GIB, Guest, tables};
use crate::mapper::{Mapper, Work};
use crate::measure::{Contest, Meter, per_item};
use crate::peers;
use crate::pool;
use crate::report::{Reach, Row};
use crate::tables::Tables;
use anyhow::{Context, Result, ensure};
use std::time::Instant;
use twofold_arch::{Level, PAGE_SIZE};

const PAGES: u64 = GIB / PAGE_SIZE;

/// What the guest cannot reach any more when the flush is done: the caller's processors go on.
fn unlinked(guest: &Guest) -> Result<Row> {
    let what = "zap 1 GiB until unlinked and flushed";
    let entries = Entries::new(1)?;
    let figures = Contest::new(what)
        .ours(|| {
            guest.fill()?;
            let start = Instant::now();
            drop(guest.mmu.host_change(guest.hva()));
            let flushed = guest.mmu.host().flushed().context("nothing was flushed")?;
            Ok(flushed.duration_since(start).as_nanos() as f64 / PAGES as f64)
        })
        .floor("one locked exchange", || {
            Ok(per_item(PAGES, || entries.exchange_one(0)))
        })
        .run(Meter::Time)?;
    Ok(Row {
        what,
        unit: "ns",
        reach: Reach::AtMost(0.05),
        figures,
        obstacle: "the lock, the range of the change and the readers that are waited for".into(),
    })
}

/// The peers' way of doing it, for both rows: nobody else may use their tables.
fn peer_round(mapper: &mut dyn Mapper) -> Result<f64> {
    mapper.clear()?;
    mapper.map(GIB, Level::L4K)?;
    let before = pool::in_use();
    let mut result = Ok(());
    let figure = per_item(PAGES, || result = mapper.unmap(GIB));
    result?;
    ensure!(mapper.find(0).is_none(), "{} still maps", mapper.name());
    ensure!(
        before - pool::in_use() >= GIB / Level::L2M.bytes(),
        "{} kept its tables",
        mapper.name()
    );
    Ok(figure)
}

fn until_back(
    what: &'static str,
    reach: f64,
    obstacle: &'static str,
    meter: Meter,
    ours: impl FnMut() -> Result<f64>,
) -> Result<Row> {
    let mut peers = peers::mappers(Work::Unmap, tables(GIB))?;
    let entries = Entries::new(PAGES)?;
    let mut contest = Contest::new(what).ours(ours).floor("plain load", || {
        Ok(per_item(PAGES, || _ = std::hint::black_box(entries.load())))
    });
    for peer in &mut peers {
        contest = contest.peer(peer.name(), || peer_round(peer.as_mut()));
    }
    Ok(Row {
        what,
        unit: "ns",
        reach: Reach::AtMost(reach),
        figures: contest.run(meter)?,
        obstacle: obstacle.into(),
    })
}

/// The rows about zapping.
pub(crate) fn rows(meter: Meter) -> Result<Vec<Row>> {
    pool::reserve(2 * tables(GIB))?;
    let guest = Guest::new(GIB)?;
    let mut rows = Vec::new();
    if meter == Meter::Time {
        rows.push(unlinked(&guest)?);
    }
    rows.push(until_back(
        "zap 1 GiB until every table is back, shared",
        6.0,
        "every entry is read once more to count the leaves that went with their table",
        meter,
        || {
            guest.fill()?;
            Ok(per_item(PAGES, || drop(guest.mmu.host_change(guest.hva()))))
        },
    )?);
    let mut ours = Tables::new()?;
    rows.push(until_back(
        "zap 1 GiB until every table is back, exclusive",
        0.5,
        "every entry is read once more to count the leaves that went with their table",
        meter,
        || peer_round(&mut ours),
    )?);
    Ok(rows)
}
