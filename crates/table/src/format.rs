//! What a table format supplies to the engine.

use core::fmt;
use twofold_arch::{Gpa, Hpa, Level};

/// How far a table is from the pages it maps: 1 for the table whose entries map the smallest
/// pages, growing towards the root. Every format counts this way inside the engine; what its
/// manual calls the level is [`Format::hardware_level`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Height(u8);

impl Height {
    /// The tables whose entries map the smallest pages.
    pub const LEAF: Self = Self(1);

    /// The height with this number; 0 becomes 1.
    pub const fn new(number: u8) -> Self {
        Self(if number == 0 { 1 } else { number })
    }

    /// The number, at least 1.
    pub const fn get(self) -> u8 {
        self.0
    }

    /// One step towards the leaves, or `None` at the leaves.
    pub const fn below(self) -> Option<Self> {
        if self.0 > 1 {
            Some(Self(self.0 - 1))
        } else {
            None
        }
    }

    /// One step towards the root.
    pub const fn above(self) -> Self {
        Self(self.0 + 1)
    }
}

impl From<Level> for Height {
    fn from(level: Level) -> Self {
        Self(level.number())
    }
}

impl fmt::Debug for Height {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "height {}", self.0)
    }
}

/// What an entry is to the engine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Entry {
    /// Nothing, the format's [`Format::EMPTY`] exactly.
    Empty,
    /// Locked by someone who is changing it, or part of a table that has been taken out. Nobody
    /// else may change it; whoever meets it tries again from the root.
    Frozen,
    /// A pointer to a table one step below.
    Table(Hpa),
    /// A mapping.
    Leaf,
    /// Not a mapping for the processor, and not empty for the software: MMIO, for instance.
    Special,
}

/// How a valid entry may become another valid entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Replacement {
    /// In one exchange; no access ever sees a hole (EPT, NPT).
    Direct,
    /// Lock the entry, invalidate the TLBs, then write the new value (arm64 stage 2).
    BreakBeforeMake,
}

/// A table format: geometry, and the values that the engine itself has to know.
///
/// The engine relies on these laws, which the test module `laws` checks for each format:
/// - `decode(EMPTY)` is `Empty`, `decode(FROZEN)` is `Frozen`, at every height;
/// - `decode(table_entry(p))` is `Table(p)` at every height above the leaves;
/// - `decode(link(..))` is `Frozen`, and `link_target` returns what `link` was given;
/// - the processor treats empty, frozen and link values as not present (in entries that have a
///   present bit; see [`sppt`](crate::sppt) for one that has none).
pub trait Format: 'static {
    /// An entry that maps nothing. New tables are filled with it and every zap writes it.
    const EMPTY: u64;
    /// An entry that its owner is changing.
    const FROZEN: u64;
    /// log2 of the bytes in a table page and in the smallest mapping.
    const GRANULE_SHIFT: u32;
    /// log2 of the entries in a table.
    const INDEX_BITS: u32;
    /// The largest root height.
    const MAX_HEIGHT: Height;
    /// The largest number of consecutive pages that form one root table.
    const MAX_ROOT_PAGES: usize;
    /// How valid entries are replaced.
    const REPLACEMENT: Replacement;

    /// What the format's manual calls the level of tables at `height`.
    fn hardware_level(height: Height) -> i8;

    /// Whether an entry at `height` may be a mapping.
    fn may_map(height: Height) -> bool;

    /// What `entry`, found at `height`, is.
    fn decode(entry: u64, height: Height) -> Entry;

    /// The table that `entry`, found at `height` above the leaves, points to: what
    /// [`decode`](Self::decode) says, for a walk that wants nothing else.
    #[inline(always)]
    fn child(entry: u64, height: Height) -> Option<Hpa> {
        match Self::decode(entry, height) {
            Entry::Table(child) => Some(child),
            _ => None,
        }
    }

    /// An entry that points to the table at `child`.
    fn table_entry(child: Hpa) -> u64;

    /// The page that a leaf maps.
    fn leaf_address(entry: u64, height: Height) -> Hpa;

    /// A frozen value that holds the height of its own table and the address of another table (or
    /// none): how tables that have been taken out wait in a list without memory of its own.
    fn link(next: Option<Hpa>, height: Height) -> u64;

    /// What [`link`](Self::link) was given.
    fn link_target(entry: u64) -> (Option<Hpa>, Height);

    /// Entries in a table.
    const ENTRIES: usize = 1 << Self::INDEX_BITS;

    /// log2 of the bytes that an entry at `height` covers.
    #[inline(always)]
    fn shift(height: Height) -> u32 {
        Self::GRANULE_SHIFT + Self::INDEX_BITS * (height.get() as u32 - 1)
    }

    /// Bytes that an entry at `height` covers.
    #[inline(always)]
    fn bytes(height: Height) -> u64 {
        1 << Self::shift(height)
    }

    /// The index of `gpa` in a table at `height`.
    #[inline(always)]
    fn index(gpa: Gpa, height: Height) -> usize {
        (gpa.get() >> Self::shift(height)) as usize & (Self::ENTRIES - 1)
    }
}
