//! Harvesting the dirty bitmap of 1 GiB.

use crate::floor::Entries;
use crate::guest::{GIB, Guest, tables};
use crate::measure::{Contest, Meter, per_item};
use crate::peers::vm_memory::Bitmap;
use crate::pool;
use crate::report::{Reach, Row};
use anyhow::{Result, ensure};
use twofold_arch::{Gfn, PAGE_SIZE};
use twofold_mmu::RegionFlags;

const WORDS: usize = (GIB / PAGE_SIZE / 64) as usize;

/// Microseconds per nanosecond.
const MICRO: f64 = 1e-3;

struct Log {
    guest: Guest,
    bitmap: Vec<u64>,
}

impl Log {
    fn new() -> Result<Self> {
        pool::reserve(2 * tables(GIB))?;
        let guest = Guest::new(GIB)?;
        guest.set_flags(RegionFlags::LOG_DIRTY)?;
        Ok(Self {
            guest,
            bitmap: vec![0; WORDS],
        })
    }

    /// Harvests, per item; every word must come out as `expected`.
    fn harvest(&mut self, items: u64, expected: u64) -> Result<f64> {
        let mut result = Ok(());
        let figure = per_item(items, || {
            result = self.guest.mmu.dirty_log_get(0, 0, &mut self.bitmap);
        });
        result?;
        let wrong = self.bitmap.iter().filter(|&&word| word != expected).count();
        ensure!(wrong == 0, "{wrong} words are not {expected:#x}");
        Ok(figure)
    }
}

fn clean(meter: Meter) -> Result<Row> {
    let what = "harvest the dirty bitmap of 1 GiB, clean";
    let mut log = Log::new()?;
    let words = Entries::new(WORDS as u64)?;
    let peer = Bitmap::new(GIB);
    let figures = Contest::new(what)
        .ours(|| log.harvest(1, 0))
        .floor("load of every word", || {
            Ok(per_item(1, || _ = std::hint::black_box(words.load())))
        })
        .peer("vm-memory", || {
            Ok(per_item(1, || _ = std::hint::black_box(peer.harvest())))
        })
        .run(meter)?;
    Ok(Row {
        what,
        unit: "µs",
        reach: Reach::AtMost(2.0),
        figures: figures.times(MICRO),
        obstacle: "every word is read and one is written to the caller's buffer".into(),
    })
}

fn full(meter: Meter) -> Result<Row> {
    let what = "harvest the dirty bitmap of 1 GiB, full, nothing mapped";
    let mut log = Log::new()?;
    let words = Entries::new(WORDS as u64)?;
    let peer = Bitmap::new(GIB);
    let figures = Contest::new(what)
        .ours(|| {
            let mut reader = log.guest.mmu.reader();
            for gfn in 0..log.guest.pages() {
                log.guest.mmu.mark_dirty(&mut reader, 0, Gfn::new(gfn));
            }
            log.harvest(1, u64::MAX)
        })
        .floor("locked exchange of every word", || {
            Ok(per_item(1, || words.exchange(0..WORDS as u64, 1)))
        })
        .peer("vm-memory", || {
            peer.fill();
            Ok(per_item(1, || _ = std::hint::black_box(peer.harvest())))
        })
        .run(meter)?;
    Ok(Row {
        what,
        unit: "µs",
        reach: Reach::AtMost(22.0),
        figures: figures.times(MICRO),
        obstacle:
            "besides the exchanges, words are tested before and runs of pages are looked up after"
                .into(),
    })
}

fn protected_again(meter: Meter) -> Result<Row> {
    let what = "harvest 1 GiB, each page protected again";
    let mut log = Log::new()?;
    let entries = Entries::new(log.guest.pages())?;
    let pages = log.guest.pages();
    let figures = Contest::new(what)
        .ours(|| {
            log.guest.fill()?;
            log.harvest(pages, u64::MAX)
        })
        .floor("locked exchange", || {
            Ok(per_item(pages, || entries.exchange(0..pages, 1)))
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

/// The rows about dirty bitmaps.
pub(crate) fn rows(meter: Meter) -> Result<Vec<Row>> {
    Ok(vec![clean(meter)?, full(meter)?, protected_again(meter)?])
}
