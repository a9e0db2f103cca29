//! Finding, adding and deleting one of 32,764 slots.

use crate::host::{Arena, GUEST_MEMORY};
use crate::measure::{in_turns, nanoseconds_per_item};
use crate::peers::vm_memory::Regions;
use crate::report::{Reach, Row};
use anyhow::Result;
use std::hint::black_box;
use twofold_arch::{Gpa, PAGE_SIZE};
use twofold_mmu::{Config, Ept, Mmu, Region};

const SLOTS: u64 = 32_764;
const LOOKUPS: u64 = 1 << 16;
const CHANGES: u64 = 1 << 10;

/// Where slot number `index` is: one page, then a hole.
fn gpa_of(index: u64) -> u64 {
    (1 << 32) + index * 2 * PAGE_SIZE
}

/// Guest-physical addresses in slots chosen at random.
fn random_addresses() -> Vec<u64> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..LOOKUPS)
        .map(|_| gpa_of(next() % (SLOTS - 1)) + 8)
        .collect()
}

/// The rows about slots.
pub(crate) fn rows() -> Result<Vec<Row>> {
    let mmu = Mmu::<Ept, Arena>::new(Arena::new(64), Config::default());
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
    let addresses = random_addresses();
    let mut reader = mmu.reader();

    let [ours, theirs] = in_turns([
        &mut || {
            nanoseconds_per_item(LOOKUPS, || {
                for &gpa in &addresses {
                    black_box(mmu.lookup(&mut reader, 0, Gpa::new(gpa)));
                }
            })
        },
        &mut || {
            nanoseconds_per_item(LOOKUPS, || {
                for &gpa in &addresses {
                    black_box(peer.find(gpa));
                }
            })
        },
    ]);
    let lookup = Row {
        what: "slot lookup, 32,764 slots",
        ours,
        unit: "ns",
        reach: Reach::AtMost(40.0),
        compared: vec![("vm-memory".into(), theirs)],
    };

    let last = (SLOTS - 1) as u32;
    let mut failed = 0;
    let [ours, theirs] = in_turns([
        &mut || {
            nanoseconds_per_item(CHANGES, || {
                for _ in 0..CHANGES {
                    let added = mmu.set_region(region(last, 0x10_0000, PAGE_SIZE));
                    let deleted = mmu.set_region(region(last, 0x10_0000, 0));
                    failed += u32::from(added.is_err()) + u32::from(deleted.is_err());
                }
            })
        },
        &mut || {
            nanoseconds_per_item(1, || {
                _ = black_box(peer.add_and_remove(0x10_0000, PAGE_SIZE))
            })
        },
    ]);
    anyhow::ensure!(failed == 0, "{failed} slot changes were refused");
    let change = Row {
        what: "slot add and delete, 32,764 slots, in the MMU",
        ours,
        unit: "ns",
        reach: Reach::AtMost(1000.0),
        compared: vec![("vm-memory".into(), theirs)],
    };
    Ok(vec![lookup, change])
}
