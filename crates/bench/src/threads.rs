//! What a second thread gains. Both contenders' gains are set against the gain of locked exchanges in
//! the same round: what the machine does not give, nobody can use.

use crate::floor::Entries;
use crate::guest::{GIB, Guest, tables};
use crate::measure::{Contest, Meter, per_item};
use crate::peers::axaddrspace::Space;
use crate::pool;
use crate::report::{Reach, Row, number};
use anyhow::{Context, Result, ensure};
use std::iter::StepBy;
use std::ops::Range;
use std::sync::{Barrier, Mutex, PoisonError};
use std::time::Instant;

/// Which pages each of two threads works on.
#[derive(Clone, Copy)]
enum Shares {
    /// One half each.
    Disjoint,
    /// Every second page each: neighbours in a cache line belong to different threads.
    Interleaved,
}

impl Shares {
    fn of(self, pages: u64) -> [StepBy<Range<u64>>; 2] {
        match self {
            Self::Disjoint => [(0..pages / 2).step_by(1), (pages / 2..pages).step_by(1)],
            Self::Interleaved => [(0..pages).step_by(2), (1..pages).step_by(2)],
        }
    }
}

/// Nanoseconds that the slower of two threads needs for its share, once both run.
fn by_two<S: Send>(shares: [S; 2], work: impl Fn(S) -> Result<()> + Sync) -> Result<f64> {
    let ready = Barrier::new(2);
    std::thread::scope(|scope| {
        let threads = shares.map(|share| {
            scope.spawn(|| {
                ready.wait();
                let start = Instant::now();
                work(share)?;
                anyhow::Ok(start.elapsed().as_nanos() as f64)
            })
        });
        let mut slower = 0.0_f64;
        for thread in threads {
            match thread.join() {
                Ok(own) => slower = slower.max(own?),
                Err(_) => anyhow::bail!("a thread panicked"),
            }
        }
        Ok(slower)
    })
}

/// Passes of the floor, so that it lasts long enough for two threads to overlap.
const FLOOR_PASSES: u64 = 16;

fn row(what: &'static str, shares: Shares) -> Result<Row> {
    pool::reserve(4 * tables(GIB))?;
    let guest = Guest::new(GIB)?;
    let pages = guest.pages();
    let entries = Entries::new(pages)?;
    let space = Mutex::new(Space::new(GIB).context("axaddrspace")?);
    let locked = || space.lock().unwrap_or_else(PoisonError::into_inner);
    let exchange = |share: StepBy<Range<u64>>| {
        for _ in 0..FLOOR_PASSES {
            share.clone().for_each(|page| entries.exchange_one(page));
        }
        Ok(())
    };
    let gains = Contest::new(what)
        .ours(|| {
            let one = guest.timed_fill()?;
            guest.mmu.zap_all();
            let two = by_two(shares.of(pages), |share| guest.fault(share))? / pages as f64;
            Ok(one / two)
        })
        .floor("gain of locked exchanges", || {
            let items = FLOOR_PASSES * pages;
            let mut result = Ok(());
            let one = per_item(items, || result = exchange((0..pages).step_by(1)));
            result?;
            Ok(one / (by_two(shares.of(pages), exchange)? / items as f64))
        })
        .peer("axaddrspace behind a lock", || {
            locked().clear()?;
            let fault = |share: StepBy<Range<u64>>| {
                for page in share {
                    ensure!(locked().fault(page..page + 1).is_ok(), "page {page}");
                }
                Ok(())
            };
            let mut result = Ok(());
            let one = per_item(pages, || result = fault((0..pages).step_by(1)));
            result?;
            locked().clear()?;
            let two = by_two(shares.of(pages), fault)? / pages as f64;
            Ok(one / two)
        })
        .run(Meter::Time)?;
    let mut figures = gains.clone();
    let mut spread = (f64::NAN, f64::NAN);
    if let Some((_, floor)) = &gains.floor {
        figures.ours = gains.ours.over(floor);
        for (_, peer) in &mut figures.peers {
            *peer = peer.over(floor);
        }
        spread = floor.quartiles();
    }
    Ok(Row {
        what,
        unit: "",
        reach: Reach::AtLeast(0.9),
        figures,
        obstacle: format!(
            "the floor's own gain was {} to {} in the middle half of the rounds; see \
             docs/performance.md for what this machine can prove",
            number(spread.0),
            number(spread.1)
        )
        .into(),
    })
}

/// The rows about two threads. Instructions say nothing about them.
pub(crate) fn rows(meter: Meter) -> Result<Vec<Row>> {
    if meter == Meter::Instructions {
        return Ok(Vec::new());
    }
    Ok(vec![
        row(
            "two threads, disjoint: gain / floor's gain",
            Shares::Disjoint,
        )?,
        row(
            "two threads, interleaved: gain / floor's gain",
            Shares::Interleaved,
        )?,
    ])
}
