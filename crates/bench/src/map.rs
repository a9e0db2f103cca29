//! Mapping a range at once.

use crate::floor::Entries;
use crate::mapper::{Mapper, Work, check};
use crate::measure::{Contest, Meter, per_item};
use crate::peers;
use crate::report::{Reach, Row};
use crate::tables::Tables;
use anyhow::{Result, ensure};
use twofold_arch::Level;

const GIB: u64 = 1 << 30;

/// One round: an empty table, then the whole range.
fn round(mapper: &mut dyn Mapper, bytes: u64, level: Level) -> Result<f64> {
    mapper.clear()?;
    let mut result = Ok(());
    let figure = per_item(bytes / level.bytes(), || result = mapper.map(bytes, level));
    result?;
    check(mapper, 0..bytes, true)?;
    Ok(figure)
}

fn row(
    what: &'static str,
    work: Work,
    level: Level,
    bytes: u64,
    meter: Meter,
    row: impl FnOnce(crate::measure::Comparison) -> Row,
) -> Result<Row> {
    let leaves = bytes / level.bytes();
    let mut peers = peers::mappers(work, leaves / 512 + bytes / GIB + 4)?;
    let mut ours = Tables::new()?;
    let mut entries = Entries::new(leaves)?;
    let mut contest = Contest::new(what)
        .ours(|| round(&mut ours, bytes, level))
        .floor("plain store", || Ok(per_item(leaves, || entries.store(7))));
    for peer in &mut peers {
        contest = contest.peer(peer.name(), || round(peer.as_mut(), bytes, level));
    }
    let figures = contest.run(meter)?;
    ensure!(figures.best_peer().is_some(), "no peer can do {work:?}");
    Ok(row(figures))
}

/// The rows about mapping a range.
pub(crate) fn rows(meter: Meter) -> Result<Vec<Row>> {
    let small = "map 1 GiB as 4K, tables from the warm pool";
    let large = "map 64 GiB as 2M, per block";
    Ok(vec![
        row(small, Work::Map4K, Level::L4K, GIB, meter, |figures| Row {
            what: small,
            unit: "ns",
            reach: Reach::AtMost(0.5),
            figures,
            obstacle: "each entry is made by the leaf encoder and stored on its own".into(),
        })?,
        row(
            large,
            Work::Map2M,
            Level::L2M,
            meter.large_guest(),
            meter,
            |figures| Row {
                what: large,
                unit: "ns",
                reach: Reach::AtMost(2.0),
                figures,
                obstacle: "each table is taken from the pool and filled on its own".into(),
            },
        )?,
    ])
}
