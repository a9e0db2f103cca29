//! How much memory tables take, and whether all of it comes back.

use crate::guest::{GIB, Guest, tables};
use crate::mapper::Work;
use crate::measure::{Comparison, Meter, Samples};
use crate::peers;
use crate::pool;
use crate::report::{Reach, Row};
use anyhow::Result;
use twofold_arch::{Level, PAGE_SIZE};

const MIB: f64 = (1 << 20) as f64;

/// The rows about memory. The figures are counts and the same in every run.
pub(crate) fn rows(meter: Meter) -> Result<Vec<Row>> {
    if meter == Meter::Instructions {
        return Ok(Vec::new());
    }
    pool::reserve(2 * tables(GIB))?;
    let before = pool::in_use();
    let taken = || pool::in_use() - before;
    let guest = Guest::new(GIB)?;
    guest.fill()?;
    let filled = taken();
    guest.mmu.zap_all();
    let kept = taken();
    drop(guest);

    let mut figures = Comparison::of(Samples::one((filled * PAGE_SIZE) as f64 / MIB));
    for mut peer in peers::mappers(Work::Map4K, tables(GIB))? {
        // The root was taken before.
        let others = taken() - 1;
        peer.map(GIB, Level::L4K)?;
        let bytes = (taken() - others) * PAGE_SIZE;
        figures
            .peers
            .push((peer.name(), Samples::one(bytes as f64 / MIB)));
    }
    figures.floor = Some(("the leaf entries", Samples::one((GIB / 512) as f64 / MIB)));
    Ok(vec![
        Row {
            what: "memory for tables per GiB mapped as 4K",
            unit: "MiB",
            reach: Reach::AtMost(2.06),
            figures,
            obstacle: "more tables than the mapping needs".into(),
        },
        Row {
            what: "tables that are not back after zapping it",
            unit: "",
            reach: Reach::AtMost(0.0),
            figures: Comparison::of(Samples::one(kept as f64)),
            obstacle: "tables are kept".into(),
        },
    ])
}
