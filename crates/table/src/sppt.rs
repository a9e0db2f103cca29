//! The sub-page permission table as a format of the engine (SPEC 1.2).
//!
//! Its shape is that of any table of four levels: bits 47:12 of the guest-physical address, nine at
//! a time. What is special is its last level, whose entries have no present bit. Each is a
//! vector of permissions, and 0, the empty value, is the vector that forbids every write; so a
//! table of vectors is always complete ([`Table::link_range`](crate::Table::link_range) of what it
//! covers), and what the processor must not see any more is cut off one level above, where there is
//! a valid bit.
//!
//! A pointer that was [`cut`] leads nowhere for the processor, while the engine still finds the
//! table below it. Only after a flush may it be removed: a table that waits to be given back is
//! linked through its first entry, which is no vector that a processor may read.

use crate::format::{Entry, Format, Height, Replacement};
use crate::x86::ADDRESS_MASK;
use twofold_arch::Hpa;
use twofold_arch::sppt::SpptEntry;

/// The sub-page permission table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sppt {}

/// Bit 0 of an entry above the last level: the processor follows it.
const VALID: u64 = 1;
/// Bit 1 of such an entry without [`VALID`]: only the engine follows it.
const CUT: u64 = 1 << 1;
/// Bits that no vector has together, and neither a valid nor a cut pointer: bits 5 and 7 are
/// reserved in a vector.
const FROZEN: u64 = 0x5a0;
const LINK_HEIGHT_SHIFT: u32 = 52;
const LINK_HEIGHT_MASK: u64 = 7 << LINK_HEIGHT_SHIFT;

/// The pointer `entry`, valid or cut, as one that the processor does not follow.
pub const fn cut(entry: u64) -> u64 {
    entry & !VALID | CUT
}

/// Whether the processor does not follow the pointer `entry`.
pub const fn is_cut(entry: u64) -> bool {
    entry & (VALID | CUT) == CUT
}

impl Format for Sppt {
    const EMPTY: u64 = 0;
    const FROZEN: u64 = FROZEN;
    const GRANULE_SHIFT: u32 = 12;
    const INDEX_BITS: u32 = 9;
    const MAX_HEIGHT: Height = Height::new(4);
    const MAX_ROOT_PAGES: usize = 1;
    const REPLACEMENT: Replacement = Replacement::Direct;

    fn hardware_level(height: Height) -> i8 {
        height.get() as i8
    }

    fn may_map(height: Height) -> bool {
        height == Height::LEAF
    }

    #[inline(always)]
    fn decode(entry: u64, height: Height) -> Entry {
        if entry == Self::EMPTY {
            return Entry::Empty;
        }
        if entry & !(ADDRESS_MASK | LINK_HEIGHT_MASK) == FROZEN {
            return Entry::Frozen;
        }
        match (height, entry & (VALID | CUT)) {
            (Height::LEAF, _) => Entry::Leaf,
            (_, VALID | CUT) => Entry::Table(Hpa::new(entry & ADDRESS_MASK)),
            _ => Entry::Special,
        }
    }

    fn table_entry(child: Hpa) -> u64 {
        SpptEntry::table(child)
    }

    /// Nothing is mapped: what a vector is about is named by its place.
    fn leaf_address(_entry: u64, _height: Height) -> Hpa {
        Hpa::new(0)
    }

    fn link(next: Option<Hpa>, height: Height) -> u64 {
        let next = next.map_or(0, Hpa::get);
        FROZEN | next & ADDRESS_MASK | u64::from(height.get()) << LINK_HEIGHT_SHIFT
    }

    fn link_target(entry: u64) -> (Option<Hpa>, Height) {
        let address = entry & ADDRESS_MASK;
        let height = Height::new(((entry & LINK_HEIGHT_MASK) >> LINK_HEIGHT_SHIFT) as u8);
        ((address != 0).then(|| Hpa::new(address)), height)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use twofold_arch::sppt::{AccessMap, WriteVector};

    const PAGES: [u64; 3] = [0x1000, 0x7fff_f000, 0x000f_ffff_ffff_f000];

    #[test]
    fn the_processor_follows_pointers_and_nothing_else() {
        for page in PAGES.map(Hpa::new) {
            let pointer = Sppt::table_entry(page);
            assert_eq!(SpptEntry::decode(pointer, 52), SpptEntry::Table(page));
            let link = Sppt::link(Some(page), Height::new(3));
            for entry in [cut(pointer), link, Sppt::EMPTY, Sppt::FROZEN] {
                assert_eq!(SpptEntry::decode(entry, 52), SpptEntry::NotPresent);
            }
        }
    }

    #[test]
    fn the_engine_finds_a_table_whether_or_not_the_processor_is_cut_off_from_it() {
        for page in PAGES.map(Hpa::new) {
            let pointer = Sppt::table_entry(page);
            for height in (2..=4).map(Height::new) {
                assert_eq!(Sppt::decode(pointer, height), Entry::Table(page));
                assert_eq!(Sppt::decode(cut(pointer), height), Entry::Table(page));
            }
            assert!(is_cut(cut(pointer)) && !is_cut(pointer));
            assert_eq!(cut(cut(pointer)), cut(pointer));
        }
    }

    #[test]
    fn every_vector_is_a_leaf_or_empty_and_none_looks_frozen() {
        for map in (0..32).map(|bit| 1 << bit).chain([u32::MAX, 0x5a5a_a5a5]) {
            let vector = WriteVector::new(AccessMap(map)).0;
            assert_eq!(Sppt::decode(vector, Height::LEAF), Entry::Leaf);
        }
        assert_eq!(WriteVector::new(AccessMap(0)).0, Sppt::EMPTY);
        assert_eq!(WriteVector(Sppt::FROZEN).access_map(), None);
    }
}
