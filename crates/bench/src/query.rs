//! Asking what an address is mapped to, at random.

use crate::floor::BareTables;
use crate::guest::tables;
use crate::mapper::{HOST_BASE, Mapper, Work};
use crate::measure::{Contest, Meter, per_item};
use crate::peers;
use crate::random;
use crate::report::{Reach, Row};
use crate::tables::Tables;
use anyhow::{Result, ensure};
use std::hint::black_box;
use twofold_arch::{Level, PAGE_SIZE};

/// One round: every query.
fn round(mapper: &dyn Mapper, gpas: &[u64]) -> Result<f64> {
    let mut sum = 0;
    let figure = per_item(gpas.len() as u64, || sum = black_box(mapper.find_all(gpas)));
    let expected = gpas
        .iter()
        .fold(0, |sum: u64, gpa| sum.wrapping_add(HOST_BASE + gpa));
    ensure!(sum == expected, "{} found something else", mapper.name());
    Ok(figure)
}

fn row(what: &'static str, bytes: u64, queries: usize, reach: f64, meter: Meter) -> Result<Row> {
    let gpas: Vec<_> = random::below(bytes / PAGE_SIZE, queries)
        .into_iter()
        .map(|page| page * PAGE_SIZE)
        .collect();
    let mut peers = peers::mappers(Work::Map4K, tables(bytes))?;
    let mut ours = Tables::new()?;
    ours.map(bytes, Level::L4K)?;
    for peer in &mut peers {
        peer.map(bytes, Level::L4K)?;
    }
    let bare = BareTables::new(bytes)?;
    let mut contest =
        Contest::new(what)
            .ours(|| round(&ours, &gpas))
            .floor("four bare loads", || {
                Ok(per_item(gpas.len() as u64, || {
                    _ = black_box(bare.find_all(&gpas));
                }))
            });
    for peer in &peers {
        contest = contest.peer(peer.name(), || round(peer.as_ref(), &gpas));
    }
    Ok(Row {
        what,
        unit: "ns",
        reach: Reach::AtMost(reach),
        figures: contest.run(meter)?,
        obstacle: "each level is told apart from a leaf before the walk goes on: 56 instructions, where four bare loads take 20".into(),
    })
}

/// The rows about queries: as many that the list of addresses does not fill the caches in the
/// first, and that their entries do not fit into them in the second.
pub(crate) fn rows(meter: Meter) -> Result<Vec<Row>> {
    let small = "random query over 1 GiB of 4K";
    let large = "random query over 64 GiB of 4K";
    let mut rows = vec![row(small, 1 << 30, 1 << 15, 3.0, meter)?];
    if meter == Meter::Time {
        rows.push(row(large, meter.large_guest(), 1 << 20, 35.0, meter)?);
    }
    Ok(rows)
}
