//! Levels of an x86 second-stage table.

use crate::addr::{Gfn, PAGE_SHIFT};
use core::fmt;

/// A level of an x86 second-stage table, numbered as KVM does: level 1 maps 4 KiB pages, level 2
/// 2 MiB, level 3 1 GiB; levels 4 and 5 only point to tables.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Level {
    /// Entries map 4 KiB pages.
    L4K = 1,
    /// Entries map 2 MiB pages or point to a table of 4 KiB pages.
    L2M = 2,
    /// Entries map 1 GiB pages or point to a table of the level below.
    L1G = 3,
    /// Entries cover 512 GiB; the root of a 4-level table.
    L512G = 4,
    /// Entries cover 256 TiB; the root of a 5-level table.
    L256T = 5,
}

impl Level {
    /// Every level, from the leaves up.
    pub const ALL: [Self; 5] = [Self::L4K, Self::L2M, Self::L1G, Self::L512G, Self::L256T];

    /// The level with this number, 1 to 5.
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::L4K),
            2 => Some(Self::L2M),
            3 => Some(Self::L1G),
            4 => Some(Self::L512G),
            5 => Some(Self::L256T),
            _ => None,
        }
    }

    /// The level's number, 1 to 5.
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// log2 of the bytes that one entry at this level covers.
    pub const fn shift(self) -> u32 {
        PAGE_SHIFT + 9 * (self as u32 - 1)
    }

    /// Bytes that one entry at this level covers.
    pub const fn bytes(self) -> u64 {
        1 << self.shift()
    }

    /// 4 KiB frames that one entry at this level covers.
    pub const fn frames(self) -> u64 {
        1 << (self.shift() - PAGE_SHIFT)
    }

    /// The index of `gfn` in a table at this level, 0 to 511.
    pub const fn index(self, gfn: Gfn) -> usize {
        ((gfn.get() >> (self.shift() - PAGE_SHIFT)) & 511) as usize
    }

    /// The next level towards the leaves, or `None` at the leaves.
    pub const fn below(self) -> Option<Self> {
        Self::from_number(self as u8 - 1)
    }

    /// The next level towards the root, or `None` at level 5.
    pub const fn above(self) -> Option<Self> {
        Self::from_number(self as u8 + 1)
    }

    /// Whether an entry at this level may map a page (levels 1 to 3).
    pub const fn may_map(self) -> bool {
        (self as u8) <= 3
    }
}

impl fmt::Debug for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::L4K => "4K",
            Self::L2M => "2M",
            Self::L1G => "1G",
            Self::L512G => "512G",
            Self::L256T => "256T",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_level_covers_512_entries_of_the_level_below() {
        for level in Level::ALL {
            if let Some(below) = level.below() {
                assert_eq!(level.frames(), 512 * below.frames());
                assert_eq!(below.above(), Some(level));
            }
        }
        assert_eq!(Level::L4K.below(), None);
        assert_eq!(Level::L256T.above(), None);
    }

    #[test]
    fn the_indices_of_all_levels_rebuild_the_frame() {
        let gfn = Gfn::new(0x1_2345_6789_abcd & ((1 << 45) - 1));
        let rebuilt: u64 = Level::ALL
            .iter()
            .map(|level| level.index(gfn) as u64 * level.frames())
            .sum();
        assert_eq!(Gfn::new(rebuilt), gfn);
    }
}
