//! A format small enough to try everything: three levels of four entries, so 64 pages.

use crate::break_before_make::BreakRule;
use crate::format::{Entry, Format, Height, Replacement};
use twofold_arch::Hpa;

/// Three levels of four entries. `BBM` chooses break-before-make. Pages are numbered below 1024
/// and hold 16 bytes of guest memory, so that no shift of a real format works by accident.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Toy<const BBM: bool> {}

/// A toy that is replaced in one exchange.
pub(crate) type ToyDirect = Toy<false>;
/// A toy that is replaced by break-before-make.
pub(crate) type ToyBreak = Toy<true>;

/// log2 of the bytes in a page.
pub(crate) const SHIFT: u32 = 4;
const VALID: u64 = 1;
const LEAF: u64 = 2;
const SPECIAL: u64 = 4;
const LOCKED: u64 = 8;
const EMPTY: u64 = 0x80;
const ADDRESS: u64 = 0xffff_0000;

/// A leaf with the given page and three permission bits.
pub(crate) const fn leaf(page: u64, permissions: u64) -> u64 {
    VALID | LEAF | (page << 16) & ADDRESS | (permissions & 7) << 8
}

/// An entry that is special and carries a number.
#[cfg(not(loom))]
pub(crate) const fn special(number: u64) -> u64 {
    SPECIAL | number << 32
}

impl<const BBM: bool> Format for Toy<BBM> {
    const EMPTY: u64 = EMPTY;
    const FROZEN: u64 = LOCKED;
    const GRANULE_SHIFT: u32 = SHIFT;
    const INDEX_BITS: u32 = 2;
    const MAX_HEIGHT: Height = Height::new(3);
    const MAX_ROOT_PAGES: usize = 2;
    const REPLACEMENT: Replacement = if BBM {
        Replacement::BreakBeforeMake
    } else {
        Replacement::Direct
    };

    fn hardware_level(height: Height) -> i8 {
        3 - height.get() as i8
    }

    fn may_map(height: Height) -> bool {
        height.get() <= 2
    }

    fn decode(entry: u64, _height: Height) -> Entry {
        match entry {
            EMPTY => Entry::Empty,
            _ if entry & LOCKED != 0 => Entry::Frozen,
            _ if entry & SPECIAL != 0 => Entry::Special,
            _ if entry & LEAF != 0 => Entry::Leaf,
            _ => Entry::Table(Hpa::new((entry & ADDRESS) >> 16 << SHIFT)),
        }
    }

    fn table_entry(child: Hpa) -> u64 {
        VALID | child.get() >> SHIFT << 16
    }

    fn leaf_address(entry: u64, _height: Height) -> Hpa {
        Hpa::new((entry & ADDRESS) >> 16 << SHIFT)
    }

    fn link(next: Option<Hpa>, height: Height) -> u64 {
        let address = next.map_or(0, |next| next.get() >> SHIFT);
        LOCKED | address << 16 | u64::from(height.get()) << 48
    }

    fn link_target(entry: u64) -> (Option<Hpa>, Height) {
        let address = (entry & ADDRESS) >> 16 << SHIFT;
        (
            (address != 0).then(|| Hpa::new(address)),
            Height::new((entry >> 48) as u8),
        )
    }
}

impl BreakRule for ToyBreak {
    /// Only the permissions change in place.
    fn needs_break(old: u64, new: u64, _height: Height) -> bool {
        old & VALID != 0 && (old ^ new) & !(7 << 8) != 0
    }
}
