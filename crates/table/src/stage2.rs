//! arm64 stage 2 for the engine: one format for each granule, with and without LPA2.
//!
//! Zero is empty. An invalid entry that is not zero has a type in bits 63:60 (SPEC 2.3): type 1
//! is the engine's own lock, the others belong to whoever uses the table (see [`annotation`]).
//! The processor ignores all of it, since bit 0 is clear.

use crate::break_before_make::BreakRule;
use crate::format::{Entry, Format, Height, Replacement};
use twofold_arch::Hpa;
use twofold_arch::stage2::{Granule, Layout, Stage2Flags};

/// A stage-2 table with pages of `1 << GRANULE_SHIFT` bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stage2<const GRANULE_SHIFT: u32, const LPA2: bool> {}

/// 4 KiB pages, 48-bit addresses.
pub type Stage2K4 = Stage2<12, false>;
/// 16 KiB pages, 48-bit addresses.
pub type Stage2K16 = Stage2<14, false>;
/// 64 KiB pages, 52-bit addresses.
pub type Stage2K64 = Stage2<16, false>;
/// 4 KiB pages, 52-bit addresses.
pub type Stage2K4Lpa2 = Stage2<12, true>;
/// 16 KiB pages, 52-bit addresses.
pub type Stage2K16Lpa2 = Stage2<14, true>;

const TYPE_SHIFT: u32 = 60;
/// Bits 63:60, the type of an invalid entry.
const TYPE_MASK: u64 = 0xf << TYPE_SHIFT;
/// The engine's type: locked for a change, or part of a table that was taken out.
const LOCKED: u64 = 1 << TYPE_SHIFT;
/// In a link: there is a next table. Address 0 may be one.
const LINK_NEXT: u64 = 1 << 4;
/// In a link: the height, bits 3:1.
const LINK_HEIGHT_SHIFT: u32 = 1;
/// In a link: the address, bits 51:12.
const LINK_ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// An invalid entry that says something to the software: a type from 2 to 15 and a payload in
/// bits 59:1. `None` if the type is another or the payload has other bits.
pub const fn annotation(kind: u8, payload: u64) -> Option<u64> {
    if kind < 2 || kind > 15 || payload & (TYPE_MASK | 1) != 0 {
        return None;
    }
    Some((kind as u64) << TYPE_SHIFT | payload)
}

/// The type and payload of an [`annotation`], or `None` for any other entry.
pub const fn annotated(entry: u64) -> Option<(u8, u64)> {
    let kind = (entry >> TYPE_SHIFT) as u8;
    if entry & 1 != 0 || kind < 2 {
        return None;
    }
    Some((kind, entry & !TYPE_MASK))
}

impl<const GRANULE_SHIFT: u32, const LPA2: bool> Stage2<GRANULE_SHIFT, LPA2> {
    /// The layout of the descriptors.
    pub const LAYOUT: Layout = Layout::new(
        match GRANULE_SHIFT {
            12 => Granule::K4,
            14 => Granule::K16,
            16 => Granule::K64,
            _ => panic!("pages of an arm64 table have 4, 16 or 64 KiB"),
        },
        LPA2,
    );

    /// The height of the tables that the manual calls `level`.
    pub const fn height(level: i8) -> Height {
        Height::new((4 - level) as u8)
    }

    /// A leaf at `height`; see [`Layout::leaf`].
    pub fn leaf(hpa: Hpa, height: Height, attributes: u64) -> u64 {
        Self::LAYOUT.leaf(hpa, Self::hardware_level(height), attributes)
    }

    /// The bits of a leaf that neither are the address nor say what kind of entry it is.
    pub const fn attributes(leaf: u64) -> u64 {
        leaf & !(Self::LAYOUT.address_mask()
            | Stage2Flags::VALID.bits()
            | Stage2Flags::TABLE_OR_PAGE.bits())
    }
}

impl<const GRANULE_SHIFT: u32, const LPA2: bool> Format for Stage2<GRANULE_SHIFT, LPA2> {
    const EMPTY: u64 = 0;
    const FROZEN: u64 = LOCKED;
    const GRANULE_SHIFT: u32 = Self::LAYOUT.granule.shift();
    const INDEX_BITS: u32 = Self::LAYOUT.granule.index_bits();
    // Sixteen roots side by side spare a level: 4K tables of 52 bits begin at level 0.
    const MAX_HEIGHT: Height = match Self::LAYOUT.granule {
        Granule::K64 => Height::new(3),
        Granule::K4 | Granule::K16 => Height::new(4),
    };
    const MAX_ROOT_PAGES: usize = 16;
    const REPLACEMENT: Replacement = Replacement::BreakBeforeMake;

    fn hardware_level(height: Height) -> i8 {
        4 - height.get() as i8
    }

    fn may_map(height: Height) -> bool {
        Self::LAYOUT.may_map(Self::hardware_level(height))
    }

    #[inline(always)]
    fn decode(entry: u64, height: Height) -> Entry {
        let flags = Stage2Flags::from_bits_truncate(entry);
        if !flags.contains(Stage2Flags::VALID) {
            return match entry & TYPE_MASK {
                LOCKED => Entry::Frozen,
                _ if entry == 0 => Entry::Empty,
                _ => Entry::Special,
            };
        }
        match (flags.contains(Stage2Flags::TABLE_OR_PAGE), height) {
            (true, Height::LEAF) => Entry::Leaf,
            (true, _) => Entry::Table(Self::LAYOUT.decode_address(entry)),
            (false, _) if height != Height::LEAF && Self::may_map(height) => Entry::Leaf,
            // Reserved: a fault for the processor.
            (false, _) => Entry::Special,
        }
    }

    #[inline(always)]
    fn table_entry(child: Hpa) -> u64 {
        Self::LAYOUT.table(child)
    }

    #[inline(always)]
    fn leaf_address(entry: u64, height: Height) -> Hpa {
        Hpa::new(Self::LAYOUT.decode_address(entry).get() & !(Self::bytes(height) - 1))
    }

    fn link(next: Option<Hpa>, height: Height) -> u64 {
        let next = next.map_or(0, |next| next.get() & LINK_ADDRESS | LINK_NEXT);
        LOCKED | next | u64::from(height.get()) << LINK_HEIGHT_SHIFT
    }

    fn link_target(entry: u64) -> (Option<Hpa>, Height) {
        (
            (entry & LINK_NEXT != 0).then(|| Hpa::new(entry & LINK_ADDRESS)),
            Height::new((entry >> LINK_HEIGHT_SHIFT & 7) as u8),
        )
    }
}

/// Bits that may change while the entry stays valid: permissions, flags, and what software keeps.
const IN_PLACE: u64 = Stage2Flags::READ
    .union(Stage2Flags::WRITE)
    .union(Stage2Flags::EXECUTE_NEVER)
    .union(Stage2Flags::ACCESSED)
    .union(Stage2Flags::DIRTY_MODIFIER)
    .union(Stage2Flags::SOFTWARE)
    .bits();

impl<const GRANULE_SHIFT: u32, const LPA2: bool> BreakRule for Stage2<GRANULE_SHIFT, LPA2> {
    /// A change of the output address, of the block size, of the memory type or shareability, and
    /// of the contiguous bit (Arm ARM, "Using break-before-make when updating translation table
    /// entries").
    #[inline]
    fn needs_break(old: u64, new: u64, height: Height) -> bool {
        let valid = |entry| matches!(Self::decode(entry, height), Entry::Leaf | Entry::Table(_));
        valid(old) && (old ^ new) & !IN_PLACE != 0
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use twofold_arch::stage2::{Execute, MemoryType, Shareability, Stage2Entry, decode};

    fn check_against_the_processor<const G: u32, const L: bool>() {
        let layout = Stage2::<G, L>::LAYOUT;
        for height in (1..=Stage2::<G, L>::MAX_HEIGHT.get()).map(Height::new) {
            let level = Stage2::<G, L>::hardware_level(height);
            for low in 0..1u64 << 12 {
                for high in [0, 0x1234_0000, 1 << 60, 2 << 60 | 0x1000, 0xf << 60] {
                    let entry = low | high;
                    let ours = Stage2::<G, L>::decode(entry, height);
                    match decode(entry, level, layout, 52) {
                        Stage2Entry::Invalid => {
                            assert!(matches!(
                                ours,
                                Entry::Empty | Entry::Frozen | Entry::Special
                            ));
                            assert_eq!(ours == Entry::Empty, entry == 0);
                            assert_eq!(ours == Entry::Frozen, entry >> 60 == 1);
                        }
                        Stage2Entry::Table { hpa } => assert_eq!(ours, Entry::Table(hpa)),
                        Stage2Entry::Leaf { hpa, .. } => {
                            assert_eq!(ours, Entry::Leaf);
                            assert_eq!(Stage2::<G, L>::leaf_address(entry, height), hpa);
                        }
                        Stage2Entry::Reserved => assert_eq!(ours, Entry::Special),
                        Stage2Entry::AddressSize { hpa } => panic!("{hpa}"),
                    }
                }
            }
        }
    }

    #[test]
    fn the_engine_and_the_processor_see_the_same_in_every_entry() {
        check_against_the_processor::<12, false>();
        check_against_the_processor::<14, false>();
        check_against_the_processor::<16, false>();
        check_against_the_processor::<12, true>();
        check_against_the_processor::<14, true>();
    }

    #[test]
    fn annotations_hold_what_they_were_given_and_nothing_else_is_one() {
        for kind in 2..=15 {
            for payload in [0, 2, 0x0fff_ffff_ffff_fffe] {
                let entry = annotation(kind, payload).unwrap();
                assert_eq!(annotated(entry), Some((kind, payload)));
                assert_eq!(Stage2K4::decode(entry, Height::LEAF), Entry::Special);
            }
        }
        for (kind, payload) in [(0, 2), (1, 2), (16, 2), (2, 1), (2, 1 << 60), (2, 1 << 63)] {
            assert_eq!(annotation(kind, payload), None, "{kind} {payload:#x}");
        }
        for entry in [
            0,
            LOCKED,
            3,
            2 << 60 | 1,
            Stage2K4::table_entry(Hpa::new(0x1000)),
        ] {
            assert_eq!(annotated(entry), None);
        }
    }

    #[test]
    fn only_permissions_flags_and_software_bits_change_in_place() {
        let attributes = MemoryType::Normal.bits()
            | Shareability::Inner.bits()
            | (Stage2Flags::READ | Stage2Flags::WRITE | Stage2Flags::ACCESSED).bits();
        let height = Height::new(2);
        let block = Stage2K4::leaf(Hpa::new(0x4020_0000), height, attributes);
        let breaks = |new| Stage2K4::needs_break(block, new, height);
        for bit in [6, 7, 10, 51, 53, 54, 55, 56, 57, 58] {
            assert!(!breaks(block ^ 1 << bit), "bit {bit}");
        }
        for bit in [2, 3, 4, 5, 8, 9, 21, 30, 47, 52] {
            assert!(breaks(block ^ 1 << bit), "bit {bit}");
        }
        assert!(breaks(Stage2K4::table_entry(Hpa::new(0x4020_0000))));
        assert!(breaks(0));
        assert!(breaks(annotation(2, 0).unwrap()));
        let without = block | Execute::None.bits();
        assert!(!Stage2K4::needs_break(without, block, height));
        // What is invalid has nothing to break.
        for old in [0, LOCKED, annotation(2, 6).unwrap()] {
            assert!(!Stage2K4::needs_break(old, block, height));
        }
    }
}
