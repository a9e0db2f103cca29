//! Sub-page write permissions: what the processor does with a write that EPT allows to be judged by
//! the 128-byte piece of the page that it goes to (SDM Vol. 3, "Sub-Page Write Permissions"; SPEC
//! 1.2).
//!
//! The walk of [`stage2`](super::stage2) comes first and decides alone unless it ends at an entry
//! for 4 KiB that has the sub-page bit, may be read, and may not be written. Then a write to what a
//! linear address translates to is handed to [`judge`]. A write that is part of the guest's page
//! walk never is.

use super::stage2::{Stop, read_entry};
use crate::machine::Machine;
use std::fmt;
use twofold_arch::sppt::{SUB_PAGE_BYTES, SpptEntry, WriteVector};
use twofold_arch::{Gpa, Hpa, Level, PAGE_SIZE};

/// There cannot be a sub-page permission table there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct InvalidSppt {
    pub(crate) root: Option<Hpa>,
}

impl fmt::Display for InvalidSppt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let root = self.root.map_or(0, Hpa::get);
        write!(
            f,
            "no processor with EPT takes {root:#x} for a sub-page permission table: it has to be a \
             multiple of 4096 within the physical addresses"
        )
    }
}

impl std::error::Error for InvalidSppt {}

/// What the table says of a write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Verdict {
    /// Every sub-page that it touches may be written.
    Allowed,
    /// The byte at this distance from the first is the first that must not be written.
    Denied(u64),
    /// A table is missing: exit reason 66 with bit 11 of its qualification.
    Miss,
    /// A reserved bit is set: exit reason 66 without it.
    Misconfigured,
}

/// Judges a write of `bytes` at `gpa` that lies in one page by the table at `root`, of a machine
/// whose physical addresses have `maxphyaddr` bits.
///
/// The table has four levels whatever EPT has. Bits of the address beyond them do not count.
pub(super) fn judge(
    machine: &Machine,
    root: Hpa,
    maxphyaddr: u8,
    gpa: u64,
    bytes: u64,
) -> Result<Verdict, Stop> {
    let gfn = Gpa::new(gpa).frame();
    let entry_of = |table: Hpa, level: Level| {
        read_entry(machine.host(table) + level.index(gfn) * size_of::<u64>())
    };
    let mut table = root;
    for level in [Level::L512G, Level::L1G, Level::L2M] {
        table = match SpptEntry::decode(entry_of(table, level)?, maxphyaddr) {
            SpptEntry::NotPresent => return Ok(Verdict::Miss),
            SpptEntry::Reserved => return Ok(Verdict::Misconfigured),
            SpptEntry::Table(below) => below,
        };
    }
    Ok(
        match WriteVector(entry_of(table, Level::L4K)?).access_map() {
            None => Verdict::Misconfigured,
            Some(map) => {
                let offset = gpa & (PAGE_SIZE - 1);
                match map.first_denied(offset, bytes) {
                    None => Verdict::Allowed,
                    Some(denied) => Verdict::Denied(denied - offset),
                }
            }
        },
    )
}

/// Bytes from `linear` to the end of its sub-page.
pub(super) const fn rest_of_sub_page(linear: u64) -> u64 {
    SUB_PAGE_BYTES - (linear & (SUB_PAGE_BYTES - 1))
}
