//! AMD nested page tables: what the processor reads from an entry (APM volume 2, chapters "Page
//! Translation and Protection" and "Nested Paging").
//!
//! The format is that of ordinary long-mode page tables. Every nested access is a user access, so
//! an entry without U denies everything (SPEC 6.13). Accessed and dirty bits are always managed.

use crate::addr::Hpa;
use crate::level::Level;
use bitflags::bitflags;

bitflags! {
    /// The architectural bits of a nested page table entry, without the address.
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
    pub struct NptFlags: u64 {
        /// P: the entry is present. While it is 0 every other bit is ignored.
        const PRESENT = 1 << 0;
        /// RW: writes are allowed.
        const WRITE = 1 << 1;
        /// US: user accesses are allowed; nested accesses are user accesses.
        const USER = 1 << 2;
        /// PWT: write-through.
        const WRITE_THROUGH = 1 << 3;
        /// PCD: not cached.
        const CACHE_DISABLE = 1 << 4;
        /// A: the entry was used.
        const ACCESSED = 1 << 5;
        /// D: the page was written. Ignored in an entry that points to a table.
        const DIRTY = 1 << 6;
        /// PS: the entry maps a 1G or 2M page; in a 4K entry this bit is [`NptFlags::PAT`].
        const LARGE = 1 << 7;
        /// PAT of a 4K entry, the same bit as [`NptFlags::LARGE`].
        const PAT = 1 << 7;
        /// G: global. Ignored in nested tables.
        const GLOBAL = 1 << 8;
        /// PAT of a 2M or 1G entry.
        const PAT_LARGE = 1 << 12;
        /// NX: instruction fetches are not allowed. Reserved while `EFER.NXE` of the host is 0.
        const NO_EXECUTE = 1 << 63;
    }
}

/// The address field at its widest, bits 51:12.
pub const ADDRESS_MASK: u64 = 0x000f_ffff_ffff_f000;

/// What a processor and its host state allow, as far as the meaning of an entry depends on it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NptCaps {
    /// Physical address width in bits, 32 to 52; address bits at or above it are reserved.
    pub maxphyaddr: u8,
    /// Whether the host's `EFER.NXE` is 1. If not, bit 63 is reserved.
    pub no_execute: bool,
    /// Whether 1G pages exist (CPUID 8000_0001 EDX bit 26).
    pub page_1g: bool,
}

impl NptCaps {
    /// Everything, with the given physical address width.
    pub const fn full(maxphyaddr: u8) -> Self {
        Self {
            maxphyaddr,
            no_execute: true,
            page_1g: true,
        }
    }

    const fn page_size_exists(self, level: Level) -> bool {
        match level {
            Level::L4K | Level::L2M => true,
            Level::L1G => self.page_1g,
            Level::L512G | Level::L256T => false,
        }
    }
}

/// What an entry says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NptEntry {
    /// P is 0: a nested page fault without [`Pferr::PRESENT`](crate::Pferr::PRESENT).
    NotPresent,
    /// A pointer to the table of the level below.
    Table {
        /// The table's address.
        hpa: Hpa,
        /// The entry's architectural bits; without `PAT_LARGE`, which is an address bit here.
        flags: NptFlags,
    },
    /// A page.
    Leaf {
        /// The page's address, aligned to the page size of the level.
        hpa: Hpa,
        /// The entry's architectural bits.
        flags: NptFlags,
    },
    /// A reserved bit is set in a present entry: a nested page fault with
    /// [`Pferr::RSVD`](crate::Pferr::RSVD). The mask holds every reserved bit that is set.
    Reserved(u64),
}

/// The reserved bits of a present entry at `level`, for a leaf or for a pointer to a table.
///
/// Bit 7 of an entry that points to a table is what says so, and is counted as reserved only where
/// no leaf can exist. Bit 8 must be zero in entries of levels 3 to 5 that point to tables.
pub const fn reserved_bits(level: Level, leaf: bool, caps: NptCaps) -> u64 {
    let width = (1u64 << caps.maxphyaddr) - 1;
    let mut reserved = ADDRESS_MASK & !width;
    if !caps.no_execute {
        reserved |= NptFlags::NO_EXECUTE.bits();
    }
    if leaf {
        if !matches!(level, Level::L4K) {
            reserved |= (level.bytes() - 1) & ADDRESS_MASK & !NptFlags::PAT_LARGE.bits();
        }
    } else {
        if !caps.page_size_exists(level) {
            reserved |= NptFlags::LARGE.bits();
        }
        if level.number() >= 3 {
            reserved |= NptFlags::GLOBAL.bits();
        }
    }
    reserved
}

/// Decodes one entry of a table at `level`.
#[inline]
pub const fn decode(entry: u64, level: Level, caps: NptCaps) -> NptEntry {
    let flags = NptFlags::from_bits_truncate(entry);
    if !flags.contains(NptFlags::PRESENT) {
        return NptEntry::NotPresent;
    }
    let leaf = match level {
        Level::L4K => true,
        _ => flags.contains(NptFlags::LARGE) && caps.page_size_exists(level),
    };
    let reserved = entry & reserved_bits(level, leaf, caps);
    if reserved != 0 {
        return NptEntry::Reserved(reserved);
    }
    if leaf {
        // Bit 12 of a large leaf is PAT, of a 4K leaf the lowest address bit.
        let (address, flags) = match level {
            Level::L4K => (ADDRESS_MASK, flags.difference(NptFlags::PAT_LARGE)),
            _ => (ADDRESS_MASK & !NptFlags::PAT_LARGE.bits(), flags),
        };
        NptEntry::Leaf {
            hpa: Hpa::new(entry & address),
            flags,
        }
    } else {
        NptEntry::Table {
            hpa: Hpa::new(entry & ADDRESS_MASK),
            flags: flags.difference(NptFlags::PAT_LARGE),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(PartialEq, Eq, Debug, Clone, Copy)]
    enum Kind {
        NotPresent,
        Table,
        Leaf,
        Reserved,
    }

    /// The manual's formats written out bit by bit, without the constants above.
    fn by_the_manual(entry: u64, level: u8, caps: NptCaps) -> Kind {
        let bit = |n: u32| entry >> n & 1 == 1;
        let any = |range: core::ops::RangeInclusive<u32>| range.into_iter().any(bit);
        if !bit(0) {
            return Kind::NotPresent;
        }
        if caps.maxphyaddr < 52 && any(u32::from(caps.maxphyaddr)..=51) {
            return Kind::Reserved;
        }
        if bit(63) && !caps.no_execute {
            return Kind::Reserved;
        }
        match level {
            1 => Kind::Leaf,
            2 if bit(7) && any(13..=20) => Kind::Reserved,
            2 if bit(7) => Kind::Leaf,
            2 => Kind::Table,
            3 if bit(7) && !caps.page_1g => Kind::Reserved,
            3 if bit(7) && any(13..=29) => Kind::Reserved,
            3 if bit(7) => Kind::Leaf,
            3 if bit(8) => Kind::Reserved,
            3 => Kind::Table,
            _ if any(7..=8) => Kind::Reserved,
            _ => Kind::Table,
        }
    }

    fn kind(entry: NptEntry) -> Kind {
        match entry {
            NptEntry::NotPresent => Kind::NotPresent,
            NptEntry::Table { .. } => Kind::Table,
            NptEntry::Leaf { .. } => Kind::Leaf,
            NptEntry::Reserved(_) => Kind::Reserved,
        }
    }

    fn all_caps() -> impl Iterator<Item = NptCaps> {
        (0..4u8).flat_map(|bits| {
            [36, 48, 51, 52].map(|maxphyaddr| NptCaps {
                maxphyaddr,
                no_execute: bits & 1 != 0,
                page_1g: bits & 2 != 0,
            })
        })
    }

    #[test]
    fn every_combination_of_low_bits_decodes_as_the_manual_says_at_every_level() {
        for caps in all_caps() {
            for level in Level::ALL {
                for low in 0..1u64 << 13 {
                    for high in [0, 0x4000_0000, 1 << 63, 0x7ff0_0000_0000_0000] {
                        let entry = low | high;
                        assert_eq!(
                            kind(decode(entry, level, caps)),
                            by_the_manual(entry, level.number(), caps),
                            "{entry:#x} at {level} with {caps:?}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn every_single_high_bit_decodes_as_the_manual_says() {
        for caps in all_caps() {
            for level in Level::ALL {
                for low in [0, 1, 7, 0x87, 0x1e7, 0x87 | 1 << 30] {
                    for bit in 12..64 {
                        let entry = low | 1 << bit;
                        assert_eq!(
                            kind(decode(entry, level, caps)),
                            by_the_manual(entry, level.number(), caps),
                            "{entry:#x} at {level} with {caps:?}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn bit_twelve_is_an_address_bit_only_in_small_leaves_and_pointers() {
        let caps = NptCaps::full(51);
        let entry = 0x4000_1087;
        assert_eq!(
            decode(entry, Level::L4K, caps),
            NptEntry::Leaf {
                hpa: Hpa::new(0x4000_1000),
                flags: NptFlags::PRESENT | NptFlags::WRITE | NptFlags::USER | NptFlags::PAT,
            }
        );
        assert_eq!(
            decode(entry, Level::L2M, caps),
            NptEntry::Leaf {
                hpa: Hpa::new(0x4000_0000),
                flags: NptFlags::PRESENT
                    | NptFlags::WRITE
                    | NptFlags::USER
                    | NptFlags::LARGE
                    | NptFlags::PAT_LARGE,
            }
        );
        assert_eq!(
            decode(0x4000_1007, Level::L2M, caps),
            NptEntry::Table {
                hpa: Hpa::new(0x4000_1000),
                flags: NptFlags::PRESENT | NptFlags::WRITE | NptFlags::USER,
            }
        );
    }

    #[test]
    fn the_flags_have_the_documented_bit_numbers() {
        for (flag, bit) in [
            (NptFlags::PRESENT, 0),
            (NptFlags::WRITE, 1),
            (NptFlags::USER, 2),
            (NptFlags::WRITE_THROUGH, 3),
            (NptFlags::CACHE_DISABLE, 4),
            (NptFlags::ACCESSED, 5),
            (NptFlags::DIRTY, 6),
            (NptFlags::LARGE, 7),
            (NptFlags::PAT, 7),
            (NptFlags::GLOBAL, 8),
            (NptFlags::PAT_LARGE, 12),
            (NptFlags::NO_EXECUTE, 63),
        ] {
            assert_eq!(flag.bits(), 1 << bit);
        }
    }
}
