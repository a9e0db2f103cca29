//! Splitting 2M leaves into 4K leaves.

use crate::mapper::{Mapper, Work, check};
use crate::measure::{Contest, Meter, per_item};
use crate::peers;
use crate::pool;
use crate::report::{Reach, Row};
use crate::tables::Tables;
use anyhow::Result;
use twofold_arch::Level;

const BYTES: u64 = 1 << 30;
const LEAVES: u64 = BYTES / Level::L2M.bytes();

/// One round: the range as 2M leaves, then each of them split.
fn round(mapper: &mut dyn Mapper) -> Result<f64> {
    mapper.clear()?;
    mapper.map(BYTES, Level::L2M)?;
    let mut result = Ok(());
    let figure = per_item(LEAVES, || result = mapper.split(BYTES));
    result?;
    check(mapper, 0..BYTES, true)?;
    Ok(figure)
}

/// The row about splitting.
pub(crate) fn rows(meter: Meter) -> Result<Vec<Row>> {
    let what = "split a 2M leaf, no hole";
    let mut peers = peers::mappers(Work::Split, LEAVES + 8)?;
    let mut ours = Tables::new()?;
    let mut contest =
        Contest::new(what)
            .ours(|| round(&mut ours))
            .floor("a page from the pool, filled", || {
                let mut pages = Vec::with_capacity(LEAVES as usize);
                let figure = per_item(LEAVES, || {
                    pages.extend((0..LEAVES).filter_map(|_| pool::take_filled(7)));
                });
                pages.into_iter().for_each(pool::give_back);
                Ok(figure)
            });
    for peer in &mut peers {
        contest = contest.peer(peer.name(), || round(peer.as_mut()));
    }
    Ok(vec![Row {
        what,
        unit: "ns",
        reach: Reach::AtMost(120.0),
        figures: contest.run(meter)?,
        obstacle: "the 512 new entries are written one by one".into(),
    }])
}
