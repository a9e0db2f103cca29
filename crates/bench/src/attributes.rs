//! Private and shared frames of a confidential guest.

use crate::host::PoolHost;
use crate::measure::{Contest, Meter, per_item};
use crate::peers::rangemap;
use crate::random;
use crate::report::{Reach, Row};
use anyhow::Result;
use std::hint::black_box;
use twofold_arch::{Gfn, PAGE_SIZE};
use twofold_mmu::{AccessKind, Config, Conversion, Ept, Mmu, PrivateMemory};

const PAGES: u64 = (1 << 30) / PAGE_SIZE;
const CHANGES: u64 = 1 << 8;
const FRAMES: usize = 1 << 14;

/// Both contenders, with the same attributes: all frames shared, or every second one private.
struct Attributes {
    mmu: Mmu<Ept, PoolHost>,
    ranges: rangemap::Attributes,
}

impl Attributes {
    fn new(every_second: bool) -> Result<Self> {
        let config = Config {
            private_memory: Some(PrivateMemory {
                access: AccessKind::ByAttribute,
                conversion: Conversion::ZapOpposite,
            }),
            ..Config::default()
        };
        let mut attributes = Self {
            mmu: Mmu::new(PoolHost::default(), config),
            ranges: rangemap::Attributes::default(),
        };
        if every_second {
            for gfn in (0..PAGES).step_by(2) {
                set(&attributes.mmu, gfn, 1, true)?;
                attributes.ranges.set(gfn..gfn + 1, true);
            }
        }
        Ok(attributes)
    }
}

fn set(mmu: &Mmu<Ept, PoolHost>, gfn: u64, pages: u64, private: bool) -> Result<()> {
    mmu.set_attributes(Gfn::new(gfn)..Gfn::new(gfn + pages), private)?;
    Ok(())
}

fn set_all(meter: Meter) -> Result<Row> {
    let what = "attributes: set 1 GiB";
    let Attributes { mmu, mut ranges } = Attributes::new(false)?;
    let figures = Contest::new(what)
        .ours(|| {
            let mut result = Ok(());
            let figure = per_item(CHANGES, || {
                result = (0..CHANGES).try_for_each(|i| set(&mmu, 0, PAGES, i % 2 == 0));
            });
            result?;
            Ok(figure)
        })
        .peer("rangemap", || {
            Ok(per_item(CHANGES, || {
                (0..CHANGES).for_each(|i| ranges.set(0..PAGES, i % 2 == 0));
            }))
        })
        .run(meter)?;
    Ok(Row {
        what,
        unit: "ns",
        reach: Reach::AtMost(300.0),
        figures,
        obstacle: "two locks, and a summary of 512 regions to compare and to write".into(),
    })
}

fn flip_one(meter: Meter) -> Result<Row> {
    let what = "attributes: flip one page";
    let Attributes { mmu, mut ranges } = Attributes::new(true)?;
    let gfns = random::below(PAGES, FRAMES);
    // A frame that comes twice is set twice: the second time there is nothing to do.
    let mut private = [false; 2];
    let [ours, theirs] = private.each_mut();
    let figures = Contest::new(what)
        .ours(|| {
            *ours = !*ours;
            let mut result = Ok(());
            let figure = per_item(FRAMES as u64, || {
                result = gfns.iter().try_for_each(|&gfn| set(&mmu, gfn, 1, *ours));
            });
            result?;
            Ok(figure)
        })
        .peer("rangemap", || {
            *theirs = !*theirs;
            Ok(per_item(FRAMES as u64, || {
                for &gfn in &gfns {
                    ranges.set(gfn..gfn + 1, *theirs);
                }
            }))
        })
        .run(meter)?;
    Ok(Row {
        what,
        unit: "ns",
        reach: Reach::AtMost(20.0),
        figures,
        obstacle: "two locks, the slots' and the writers', and the range is looked at three times: whether there is anything to do, whether there is memory for it, to do it".into(),
    })
}

fn look_up(meter: Meter) -> Result<Row> {
    let what = "attributes: look one page up";
    let Attributes { mmu, ranges } = Attributes::new(true)?;
    let gfns = random::below(PAGES, FRAMES);
    let count = |private: &dyn Fn(u64) -> bool| gfns.iter().filter(|&&gfn| private(gfn)).count();
    let expected = count(&|gfn| gfn % 2 == 0);
    anyhow::ensure!(
        count(&|gfn| ranges.is_private(gfn)) == expected
            && count(&|gfn| mmu.is_private(Gfn::new(gfn))) == expected,
        "every second frame should be private"
    );
    let figures = Contest::new(what)
        .ours(|| {
            Ok(per_item(FRAMES as u64, || {
                let private = gfns.iter().filter(|&&gfn| mmu.is_private(Gfn::new(gfn)));
                black_box(private.count());
            }))
        })
        .peer("rangemap", || {
            Ok(per_item(FRAMES as u64, || {
                black_box(gfns.iter().filter(|&&gfn| ranges.is_private(gfn)).count());
            }))
        })
        .run(meter)?;
    Ok(Row {
        what,
        unit: "ns",
        reach: Reach::AtMost(2.0),
        figures,
        obstacle:
            "four loads that depend on each other: a directory, a chunk, its summary, its bitmap"
                .into(),
    })
}

/// The rows about attributes. Nothing is mapped: what a change takes out of tables is the subject of
/// the rows about zapping.
pub(crate) fn rows(meter: Meter) -> Result<Vec<Row>> {
    Ok(vec![set_all(meter)?, flip_one(meter)?, look_up(meter)?])
}
