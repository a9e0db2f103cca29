//! Sub-page write permissions: what the processor does with a write that EPT allows to be judged by
//! the 128-byte piece of the page that it goes to (SDM Vol. 3, "Sub-Page Write Permissions"; SPEC
//! 1.2).
//!
//! The walk of [`stage2`](super::stage2) comes first and decides alone unless it ends at an entry
//! for 4 KiB that has the sub-page bit, may be read, and may not be written. Then a write to what a
//! linear address translates to is handed to [`judge`]. A write that is part of the guest's page
//! walk never is.

use super::stage2::{Stop, read_entry};
use super::tlb::Set;
use super::{PAGE_MASK, PAGE_SHIFT};
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
    Allowed {
        /// The address of the page's permissions in this process.
        vector: usize,
    },
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
    let vector = machine.host(table) + Level::L4K.index(gfn) * size_of::<u64>();
    let Some(map) = WriteVector(read_entry(vector)?).access_map() else {
        return Ok(Verdict::Misconfigured);
    };
    let offset = gpa & (PAGE_SIZE - 1);
    Ok(match map.first_denied(offset, bytes) {
        None => Verdict::Allowed { vector },
        Some(denied) => Verdict::Denied(denied - offset),
    })
}

/// Where the permissions of a page are that was written by them before.
#[derive(Clone, Copy, Debug)]
struct Known {
    /// Which page and whose translation; 0 for none.
    tag: u64,
    /// Added to a linear address, wrapping, it gives the address in this process.
    addend: u64,
    /// The address of the vector in this process.
    vector: usize,
}

/// What the processor keeps of pages that it wrote by sub-page permissions: the translation, and
/// where the permissions are. Never the permissions themselves, which are read for each write.
///
/// A page is only kept when its dirty flags are set in both stages and no code was decoded from it.
/// Goes with every flush, and with every drop of permissions to write.
pub(super) struct WriteCache {
    pages: [Known; Self::COUNT],
    is_empty: bool,
}

impl WriteCache {
    const COUNT: usize = 16;
    const NONE: Known = Known {
        tag: 0,
        addend: 0,
        vector: 0,
    };

    pub(super) const fn new() -> Self {
        Self {
            pages: [Self::NONE; Self::COUNT],
            is_empty: true,
        }
    }

    /// Never 0: bit 11 is no part of a page's address.
    const fn tag(set: Set, linear: u64) -> u64 {
        linear & PAGE_MASK | 1 << 11 | set as u64
    }

    fn slot(linear: u64) -> usize {
        (linear >> PAGE_SHIFT) as usize & (Self::COUNT - 1)
    }

    pub(super) fn fill(&mut self, set: Set, linear: u64, addend: u64, vector: usize) {
        self.pages[Self::slot(linear)] = Known {
            tag: Self::tag(set, linear),
            addend,
            vector,
        };
        self.is_empty = false;
    }

    /// Where to write `bytes` at `linear`, all in one page, if that page is known and its
    /// permissions allow that now.
    #[inline]
    pub(super) fn place(&self, set: Set, linear: u64, bytes: u64) -> Option<usize> {
        let known = self.pages[Self::slot(linear)];
        if known.tag != Self::tag(set, linear) {
            return None;
        }
        let map = WriteVector(read_entry(known.vector).ok()?).access_map()?;
        map.allows(linear & !PAGE_MASK, bytes)
            .then(|| linear.wrapping_add(known.addend) as usize)
    }

    #[inline]
    pub(super) fn flush(&mut self) {
        if !self.is_empty {
            *self = Self::new();
        }
    }
}

/// Bytes from `linear` to the end of its sub-page.
pub(super) const fn rest_of_sub_page(linear: u64) -> u64 {
    SUB_PAGE_BYTES - (linear & (SUB_PAGE_BYTES - 1))
}
