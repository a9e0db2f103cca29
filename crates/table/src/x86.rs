//! EPT and NPT: the two formats differ in the processor's bits, not in what the engine has to know.

use crate::format::{Entry, Format, Height, Replacement};
use twofold_arch::ept::EptFlags;
use twofold_arch::npt::NptFlags;
use twofold_arch::{Hpa, Level};

/// Bits 51:12, the address in every kind of entry.
pub const ADDRESS_MASK: u64 = 0x000f_ffff_ffff_f000;

/// Bit 11, ignored by the processor: the entry is a table or a leaf (SPEC 4.3). Empty, frozen and
/// MMIO entries lack it. Neither R, W, X (all clear in an access-tracked leaf) nor P (set in an MMIO
/// entry of NPT) could tell.
pub const MMU_PRESENT: u64 = 1 << 11;

/// Empty is never zero: bit 63 suppresses #VE in EPT, and is ignored in an NPT entry that is not
/// present (SPEC 4.2).
pub const EMPTY: u64 = 1 << 63;

/// Empty with bits that no other value without [`MMU_PRESENT`] has.
pub const FROZEN: u64 = EMPTY | 0x5a0;

/// The height of the table that holds a link, in bits 54:52.
const LINK_HEIGHT_SHIFT: u32 = 52;
const LINK_HEIGHT_MASK: u64 = 7 << LINK_HEIGHT_SHIFT;

/// Bit 7 in both formats: a mapping above the last level.
const LARGE: u64 = EptFlags::LARGE.bits();
const _: () = assert!(LARGE == NptFlags::LARGE.bits());

#[inline(always)]
fn decode(entry: u64, height: Height) -> Entry {
    if entry & MMU_PRESENT != 0 {
        if height == Height::LEAF || entry & LARGE != 0 {
            Entry::Leaf
        } else {
            Entry::Table(Hpa::new(entry & ADDRESS_MASK))
        }
    } else if entry == EMPTY {
        Entry::Empty
    } else if entry & !(ADDRESS_MASK | LINK_HEIGHT_MASK) == FROZEN {
        Entry::Frozen
    } else {
        Entry::Special
    }
}

/// The address is stored inverted: a processor that speculates through entries that are not
/// present then forms an address beyond its physical memory (L1TF). A missing address is 0.
fn link(next: Option<Hpa>, height: Height) -> u64 {
    let address = next.map_or(0, Hpa::get);
    FROZEN | (!address & ADDRESS_MASK) | u64::from(height.get()) << LINK_HEIGHT_SHIFT
}

fn link_target(entry: u64) -> (Option<Hpa>, Height) {
    let address = !entry & ADDRESS_MASK;
    let height = Height::new(((entry & LINK_HEIGHT_MASK) >> LINK_HEIGHT_SHIFT) as u8);
    ((address != 0).then(|| Hpa::new(address)), height)
}

fn leaf_address(entry: u64, height: Height) -> Hpa {
    let offset = (1u64 << (12 + 9 * (u32::from(height.get()) - 1))) - 1;
    Hpa::new(entry & ADDRESS_MASK & !offset)
}

macro_rules! x86_format {
    ($(#[$doc:meta])* $name:ident, $table:expr) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum $name {}

        impl Format for $name {
            const EMPTY: u64 = EMPTY;
            const FROZEN: u64 = FROZEN;
            const GRANULE_SHIFT: u32 = 12;
            const INDEX_BITS: u32 = 9;
            const MAX_HEIGHT: Height = Height::new(5);
            const MAX_ROOT_PAGES: usize = 1;
            const REPLACEMENT: Replacement = Replacement::Direct;

            fn hardware_level(height: Height) -> i8 {
                height.get() as i8
            }

            fn may_map(height: Height) -> bool {
                Level::from_number(height.get()).is_some_and(Level::may_map)
            }

            #[inline(always)]
            fn decode(entry: u64, height: Height) -> Entry {
                decode(entry, height)
            }

            #[inline(always)]
            fn child(entry: u64, _height: Height) -> Option<Hpa> {
                let is_table = entry & (MMU_PRESENT | LARGE) == MMU_PRESENT;
                is_table.then(|| Hpa::new(entry & ADDRESS_MASK))
            }

            #[inline(always)]
            fn table_entry(child: Hpa) -> u64 {
                child.get() & ADDRESS_MASK | MMU_PRESENT | $table
            }

            #[inline(always)]
            fn leaf_address(entry: u64, height: Height) -> Hpa {
                leaf_address(entry, height)
            }

            fn link(next: Option<Hpa>, height: Height) -> u64 {
                link(next, height)
            }

            fn link_target(entry: u64) -> (Option<Hpa>, Height) {
                link_target(entry)
            }
        }
    };
}

x86_format!(
    /// Intel's extended page tables. Tables allow everything and are marked accessed, so that the
    /// processor has nothing to write in them.
    Ept,
    EptFlags::RWX.bits() | EptFlags::ACCESSED.bits()
);

x86_format!(
    /// AMD's nested page tables.
    Npt,
    NptFlags::PRESENT.bits()
        | NptFlags::WRITE.bits()
        | NptFlags::USER.bits()
        | NptFlags::ACCESSED.bits()
);

#[cfg(test)]
mod tests {
    use super::*;
    use twofold_arch::ept::{EptCaps, EptEntry};
    use twofold_arch::npt::{NptCaps, NptEntry};
    use twofold_arch::{ept, npt};

    #[test]
    fn the_processor_sees_nothing_in_empty_frozen_and_link_entries() {
        for level in Level::ALL {
            let height = Height::from(level);
            for value in [
                EMPTY,
                FROZEN,
                link(None, height),
                link(Some(Hpa::new(0x1234_5000)), height),
                link(Some(Hpa::new(ADDRESS_MASK)), height),
            ] {
                assert!(
                    matches!(
                        ept::decode(value, level, EptCaps::full(51)),
                        EptEntry::NotPresent { flags } if flags.contains(EptFlags::SUPPRESS_VE)
                    ),
                    "{value:#x}"
                );
                assert_eq!(
                    npt::decode(value, level, NptCaps::full(51)),
                    NptEntry::NotPresent
                );
                assert_eq!(value & MMU_PRESENT, 0);
            }
        }
    }

    #[test]
    fn empty_and_frozen_have_the_documented_values() {
        assert_eq!(EMPTY, 0x8000_0000_0000_0000);
        assert_eq!(FROZEN, 0x8000_0000_0000_05a0);
        // No page frame, no permission: SPEC 4.2.
        assert_eq!(FROZEN & (ADDRESS_MASK | MMU_PRESENT | 7), 0);
    }

    #[test]
    fn a_processor_follows_table_entries_of_both_formats() {
        let child = Hpa::new(0x0006_1234_5678_9000);
        for level in [Level::L2M, Level::L1G, Level::L512G, Level::L256T] {
            match ept::decode(Ept::table_entry(child), level, EptCaps::full(51)) {
                EptEntry::Table { hpa, flags } => {
                    assert_eq!(hpa, child);
                    assert!(flags.contains(EptFlags::RWX | EptFlags::ACCESSED));
                }
                other => panic!("{other:?}"),
            }
            match npt::decode(Npt::table_entry(child), level, NptCaps::full(51)) {
                NptEntry::Table { hpa, flags } => {
                    assert_eq!(hpa, child);
                    assert!(flags.contains(NptFlags::WRITE | NptFlags::USER | NptFlags::ACCESSED));
                    assert!(!flags.contains(NptFlags::NO_EXECUTE));
                }
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn every_low_bit_pattern_is_exactly_one_kind() {
        for low in 0..1u64 << 12 {
            for high in [0, EMPTY, 0x1000, EMPTY | 0x1000, 1 << 52, EMPTY | 1 << 55] {
                let entry = low | high;
                for height in (1..=5).map(Height::new) {
                    let expected = if low & 0x800 != 0 {
                        if height == Height::LEAF || low & 0x80 != 0 {
                            Entry::Leaf
                        } else {
                            Entry::Table(Hpa::new(entry & ADDRESS_MASK))
                        }
                    } else if entry == 1 << 63 {
                        Entry::Empty
                    } else if low == 0x5a0 && (high == EMPTY || high == EMPTY | 0x1000) {
                        Entry::Frozen
                    } else {
                        Entry::Special
                    };
                    assert_eq!(decode(entry, height), expected, "{entry:#x}");
                    if height != Height::LEAF {
                        let child = match expected {
                            Entry::Table(child) => Some(child),
                            _ => None,
                        };
                        assert_eq!(Ept::child(entry, height), child, "{entry:#x}");
                        assert_eq!(Npt::child(entry, height), child, "{entry:#x}");
                    }
                }
            }
        }
    }
}
