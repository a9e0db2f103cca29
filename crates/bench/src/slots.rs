//! Finding, adding and deleting one of 32,764 slots.

use crate::host::{GUEST_MEMORY, PoolHost};
use crate::measure::{Contest, Meter, per_item};
use crate::peers::vm_memory::Regions;
use crate::pool;
use crate::random;
use crate::report::{Reach, Row};
use anyhow::Result;
use std::hint::black_box;
use twofold_arch::{Gpa, PAGE_SIZE};
use twofold_mmu::{Config, Ept, Mmu, Region};

const SLOTS: u64 = 32_764;
const LOOKUPS: usize = 1 << 16;
const CHANGES: u64 = 1 << 10;

/// Where slot number `index` is: one page, then a hole.
fn gpa_of(index: u64) -> u64 {
    (1 << 32) + index * 2 * PAGE_SIZE
}

/// The rows about slots.
pub(crate) fn rows(meter: Meter) -> Result<Vec<Row>> {
    pool::reserve(64)?;
    let mmu = Mmu::<Ept, PoolHost>::new(PoolHost::default(), Config::default());
    let region = |slot, gpa, size| Region {
        slot,
        flags: 0,
        gpa,
        size,
        hva: GUEST_MEMORY,
    };
    for index in 0..SLOTS - 1 {
        mmu.set_region(region(index as u32, gpa_of(index), PAGE_SIZE))?;
    }
    let peer = Regions::new((0..SLOTS - 1).map(|index| (gpa_of(index), PAGE_SIZE)))?;
    let addresses: Vec<_> = random::below(SLOTS - 1, LOOKUPS)
        .into_iter()
        .map(|index| gpa_of(index) + 8)
        .collect();
    let mut reader = mmu.reader();

    let what = "slot lookup, 32,764 slots";
    let figures = Contest::new(what)
        .ours(|| {
            Ok(per_item(LOOKUPS as u64, || {
                for &gpa in &addresses {
                    black_box(mmu.lookup(&mut reader, 0, Gpa::new(gpa)));
                }
            }))
        })
        .peer("vm-memory", || {
            Ok(per_item(LOOKUPS as u64, || {
                for &gpa in &addresses {
                    black_box(peer.find(gpa));
                }
            }))
        })
        .run(meter)?;
    let lookup = Row {
        what,
        unit: "ns",
        reach: Reach::AtMost(40.0),
        figures,
        obstacle: "four levels of nodes, the lower ones not in the first cache".into(),
    };

    let last = (SLOTS - 1) as u32;
    let what = "slot add and delete, 32,764 slots, in the MMU";
    let figures = Contest::new(what)
        .ours(|| {
            let mut result = Ok(());
            let figure = per_item(CHANGES, || {
                for _ in 0..CHANGES {
                    let added = mmu.set_region(region(last, 0x10_0000, PAGE_SIZE));
                    let deleted = mmu.set_region(region(last, 0x10_0000, 0));
                    result = result.and(added).and(deleted);
                }
            });
            result?;
            Ok(figure)
        })
        .peer("vm-memory", || {
            Ok(per_item(1, || {
                _ = black_box(peer.add_and_remove(0x10_0000, PAGE_SIZE));
            }))
        })
        .run(meter)?;
    let change = Row {
        what,
        unit: "ns",
        reach: Reach::AtMost(1000.0),
        figures,
        obstacle: "a deleted slot is waited for".into(),
    };
    Ok(vec![lookup, change])
}
