//! Extended page tables: what an Intel processor reads from an entry (SDM volume 3C, chapter
//! "VMX Support for Address Translation").
//!
//! The pointer to a table is in [`eptp`](crate::eptp), what the processor reports when a walk
//! fails in [`qualification`](crate::qualification).

use crate::addr::Hpa;
use crate::level::Level;
use bitflags::bitflags;

pub use crate::eptp::{EptVpidCap, Eptp, EptpError};
pub use crate::qualification::Qualification;

bitflags! {
    /// The architectural bits of an EPT entry, without address and memory type.
    ///
    /// Most bits mean something only in a leaf, or only while a VM-execution control is 1; what
    /// the processor does not interpret it ignores.
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
    pub struct EptFlags: u64 {
        /// R: reads are allowed.
        const READ = 1 << 0;
        /// W: writes are allowed.
        const WRITE = 1 << 1;
        /// X: instruction fetches are allowed; with mode-based execute control, those from
        /// supervisor-mode linear addresses.
        const EXECUTE = 1 << 2;
        /// The memory type of a leaf overrides the guest's PAT.
        const IGNORE_PAT = 1 << 6;
        /// The entry maps a 1G or 2M page. Ignored in a 4K entry.
        const LARGE = 1 << 7;
        /// A: the entry was used. Only written when EPTP enables accessed and dirty flags.
        const ACCESSED = 1 << 8;
        /// D: the page was written. Only in a leaf.
        const DIRTY = 1 << 9;
        /// XU: with mode-based execute control, fetches from user-mode linear addresses are allowed.
        const USER_EXECUTE = 1 << 10;
        /// With guest-paging verification: the page may only be reached through such a translation.
        const VERIFY_GUEST_PAGING = 1 << 57;
        /// With paging-write control: the processor may set A and D of guest page tables here.
        const PAGING_WRITE = 1 << 58;
        /// With supervisor shadow-stack control: the page may hold a supervisor shadow stack.
        const SUPERVISOR_SHADOW_STACK = 1 << 60;
        /// With sub-page write permissions: a write that W forbids is checked against the SPPT.
        /// Only in a 4K leaf.
        const SUB_PAGE_WRITE = 1 << 61;
        /// A violation decided by this entry exits instead of becoming a #VE. In a leaf and in an
        /// entry that is not present; ignored in a present entry that points to a table.
        const SUPPRESS_VE = 1 << 63;
    }
}

impl EptFlags {
    /// R, W and X.
    pub const RWX: Self = Self::READ.union(Self::WRITE).union(Self::EXECUTE);
}

/// Bits 5:3 of a leaf, in their place.
pub const MEMORY_TYPE_MASK: u64 = 7 << 3;
/// The address field at its widest, bits 51:12.
pub const ADDRESS_MASK: u64 = 0x000f_ffff_ffff_f000;

/// A memory type as it stands in an EPT leaf or an EPTP. 2, 3 and 7 are reserved.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum MemoryType {
    /// UC.
    Uncacheable = 0,
    /// WC.
    WriteCombining = 1,
    /// WT.
    WriteThrough = 4,
    /// WP.
    WriteProtected = 5,
    /// WB.
    WriteBack = 6,
}

impl MemoryType {
    /// The type with this number, or `None` if it is reserved.
    pub const fn from_bits(bits: u8) -> Option<Self> {
        match bits {
            0 => Some(Self::Uncacheable),
            1 => Some(Self::WriteCombining),
            4 => Some(Self::WriteThrough),
            5 => Some(Self::WriteProtected),
            6 => Some(Self::WriteBack),
            _ => None,
        }
    }

    /// The type in bits 5:3, where a leaf holds it.
    pub const fn entry_bits(self) -> u64 {
        (self as u64) << 3
    }
}

/// What a processor is able to do, as far as the meaning of an entry depends on it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EptCaps {
    /// Physical address width in bits, 32 to 52; address bits at or above it are reserved.
    pub maxphyaddr: u8,
    /// Whether X without R is allowed (`IA32_VMX_EPT_VPID_CAP` bit 0).
    pub execute_only: bool,
    /// Whether 2M leaves exist (bit 16).
    pub page_2m: bool,
    /// Whether 1G leaves exist (bit 17).
    pub page_1g: bool,
    /// Whether the "mode-based execute control for EPT" control is 1, so that XU alone makes an entry present.
    pub mode_based_execute: bool,
}

impl EptCaps {
    /// Everything but mode-based execute control, with the given physical address width.
    pub const fn full(maxphyaddr: u8) -> Self {
        Self {
            maxphyaddr,
            execute_only: true,
            page_2m: true,
            page_1g: true,
            mode_based_execute: false,
        }
    }

    const fn page_size_exists(self, level: Level) -> bool {
        match level {
            Level::L4K => true,
            Level::L2M => self.page_2m,
            Level::L1G => self.page_1g,
            Level::L512G | Level::L256T => false,
        }
    }
}

/// What an entry says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EptEntry {
    /// None of the permission bits is set: a violation, decided by `SUPPRESS_VE` in `flags`.
    NotPresent {
        /// The entry's architectural bits.
        flags: EptFlags,
    },
    /// A pointer to the table of the level below.
    Table {
        /// The table's address.
        hpa: Hpa,
        /// Permissions (the AND over all levels counts) and A.
        flags: EptFlags,
    },
    /// A page.
    Leaf {
        /// The page's address, aligned to the page size of the level.
        hpa: Hpa,
        /// The memory type.
        memory_type: MemoryType,
        /// The entry's architectural bits.
        flags: EptFlags,
    },
    /// An entry the processor refuses: EPT misconfiguration, exit reason 49.
    Misconfig(EptMisconfig),
}

/// Why an entry is a misconfiguration.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EptMisconfig {
    /// W without R.
    WriteWithoutRead,
    /// X (or XU) without R on a processor without execute-only translations.
    ExecuteOnlyUnsupported,
    /// A reserved bit is set. The mask holds every reserved bit that is.
    ReservedBits(u64),
    /// The memory type of a leaf is 2, 3 or 7.
    MemoryType(u8),
}

/// The reserved bits of a present entry at `level`, for a leaf or for a pointer to a table.
///
/// Bit 7 of an entry that points to a table is what says so, and is counted as reserved only where
/// no leaf can exist.
pub const fn reserved_bits(level: Level, leaf: bool, caps: EptCaps) -> u64 {
    let beyond_width = ADDRESS_MASK & !low_mask(caps.maxphyaddr as u32);
    let inner = if leaf {
        // The offset within a large page.
        (level.bytes() - 1) & ADDRESS_MASK
    } else if caps.page_size_exists(level) {
        0b1111 << 3
    } else {
        0b1_1111 << 3
    };
    beyond_width | inner
}

const fn low_mask(bits: u32) -> u64 {
    if bits >= 64 {
        u64::MAX
    } else {
        (1 << bits) - 1
    }
}

/// Decodes one entry of a table at `level`.
///
/// The order of the misconfiguration reasons is this crate's; the processor reports no reason.
// Where the level is known, most of this goes away.
#[inline(always)]
pub const fn decode(entry: u64, level: Level, caps: EptCaps) -> EptEntry {
    let flags = EptFlags::from_bits_truncate(entry);
    let execute = if caps.mode_based_execute {
        EptFlags::EXECUTE.union(EptFlags::USER_EXECUTE)
    } else {
        EptFlags::EXECUTE
    };
    if !flags.intersects(EptFlags::READ.union(EptFlags::WRITE).union(execute)) {
        return EptEntry::NotPresent { flags };
    }
    if !flags.contains(EptFlags::READ) {
        if flags.contains(EptFlags::WRITE) {
            return EptEntry::Misconfig(EptMisconfig::WriteWithoutRead);
        }
        if !caps.execute_only {
            return EptEntry::Misconfig(EptMisconfig::ExecuteOnlyUnsupported);
        }
    }
    let leaf = match level {
        Level::L4K => true,
        _ => flags.contains(EptFlags::LARGE) && caps.page_size_exists(level),
    };
    let reserved = entry & reserved_bits(level, leaf, caps);
    if reserved != 0 {
        return EptEntry::Misconfig(EptMisconfig::ReservedBits(reserved));
    }
    let hpa = Hpa::new(entry & ADDRESS_MASK);
    if !leaf {
        return EptEntry::Table { hpa, flags };
    }
    let memory_type = ((entry & MEMORY_TYPE_MASK) >> 3) as u8;
    match MemoryType::from_bits(memory_type) {
        Some(memory_type) => EptEntry::Leaf {
            hpa,
            memory_type,
            flags,
        },
        None => EptEntry::Misconfig(EptMisconfig::MemoryType(memory_type)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;
    extern crate alloc;

    fn all_caps() -> Vec<EptCaps> {
        let mut all = Vec::new();
        for bits in 0..16u8 {
            for maxphyaddr in [36, 39, 46, 51, 52] {
                all.push(EptCaps {
                    maxphyaddr,
                    execute_only: bits & 1 != 0,
                    page_2m: bits & 2 != 0,
                    page_1g: bits & 4 != 0,
                    mode_based_execute: bits & 8 != 0,
                });
            }
        }
        all
    }

    #[derive(PartialEq, Eq, Debug, Clone, Copy)]
    enum Kind {
        NotPresent,
        Table,
        Leaf,
        Misconfig,
    }

    /// The manual's formats written out bit by bit, without the constants above.
    fn by_the_manual(entry: u64, level: u8, caps: EptCaps) -> Kind {
        let bit = |n: u32| entry >> n & 1 == 1;
        let xu = caps.mode_based_execute && bit(10);
        if !bit(0) && !bit(1) && !bit(2) && !xu {
            return Kind::NotPresent;
        }
        if bit(1) && !bit(0) {
            return Kind::Misconfig;
        }
        if !bit(0) && (bit(2) || xu) && !caps.execute_only {
            return Kind::Misconfig;
        }
        for n in u32::from(caps.maxphyaddr)..52 {
            if bit(n) {
                return Kind::Misconfig;
            }
        }
        let reserved = |range: core::ops::RangeInclusive<u32>| range.into_iter().any(bit);
        let leaf = match (level, bit(7)) {
            (1, _) => true,
            (2, true) if caps.page_2m => true,
            (3, true) if caps.page_1g => true,
            _ => false,
        };
        let bad = match (level, leaf) {
            (1, _) => false,
            (2, true) => reserved(12..=20),
            (3, true) => reserved(12..=29),
            (2, false) | (3, false) => reserved(3..=6) || bit(7),
            _ => reserved(3..=7),
        };
        if bad {
            return Kind::Misconfig;
        }
        if leaf {
            let memory_type = entry >> 3 & 7;
            if memory_type == 2 || memory_type == 3 || memory_type == 7 {
                return Kind::Misconfig;
            }
            Kind::Leaf
        } else {
            Kind::Table
        }
    }

    fn kind(entry: EptEntry) -> Kind {
        match entry {
            EptEntry::NotPresent { .. } => Kind::NotPresent,
            EptEntry::Table { .. } => Kind::Table,
            EptEntry::Leaf { .. } => Kind::Leaf,
            EptEntry::Misconfig(_) => Kind::Misconfig,
        }
    }

    #[test]
    fn every_combination_of_low_bits_decodes_as_the_manual_says_at_every_level() {
        for caps in all_caps() {
            for level in Level::ALL {
                for low in 0..1u64 << 12 {
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
                for low in [
                    0b000,
                    0b001,
                    0b011,
                    0b111,
                    0b100,
                    0x87,
                    0x87 | 6 << 3,
                    7 | 6 << 3,
                ] {
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
    fn a_leaf_hands_back_address_type_and_flags() {
        let caps = EptCaps::full(51);
        let entry = 0x0007_1234_5678_9000 | 0x77 | 1 << 61 | 1 << 63 | 1 << 9;
        assert_eq!(
            decode(entry, Level::L4K, caps),
            EptEntry::Leaf {
                hpa: Hpa::new(0x0007_1234_5678_9000),
                memory_type: MemoryType::WriteBack,
                flags: EptFlags::RWX
                    | EptFlags::IGNORE_PAT
                    | EptFlags::SUB_PAGE_WRITE
                    | EptFlags::SUPPRESS_VE
                    | EptFlags::DIRTY,
            }
        );
    }

    #[test]
    fn misconfigurations_name_their_reason() {
        let mut caps = EptCaps::full(40);
        assert_eq!(
            decode(0b110, Level::L4K, caps),
            EptEntry::Misconfig(EptMisconfig::WriteWithoutRead)
        );
        assert_eq!(
            decode(7 | 3 << 3, Level::L4K, caps),
            EptEntry::Misconfig(EptMisconfig::MemoryType(3))
        );
        assert_eq!(
            decode(7 | 1 << 40 | 1 << 51, Level::L512G, caps),
            EptEntry::Misconfig(EptMisconfig::ReservedBits(1 << 40 | 1 << 51))
        );
        caps.execute_only = false;
        assert_eq!(
            decode(0b100, Level::L4K, caps),
            EptEntry::Misconfig(EptMisconfig::ExecuteOnlyUnsupported)
        );
    }

    #[test]
    fn the_flags_have_the_documented_bit_numbers() {
        for (flag, bit) in [
            (EptFlags::READ, 0),
            (EptFlags::WRITE, 1),
            (EptFlags::EXECUTE, 2),
            (EptFlags::IGNORE_PAT, 6),
            (EptFlags::LARGE, 7),
            (EptFlags::ACCESSED, 8),
            (EptFlags::DIRTY, 9),
            (EptFlags::USER_EXECUTE, 10),
            (EptFlags::VERIFY_GUEST_PAGING, 57),
            (EptFlags::PAGING_WRITE, 58),
            (EptFlags::SUPERVISOR_SHADOW_STACK, 60),
            (EptFlags::SUB_PAGE_WRITE, 61),
            (EptFlags::SUPPRESS_VE, 63),
        ] {
            assert_eq!(flag.bits(), 1 << bit);
        }
    }

    #[test]
    fn memory_types_survive_the_round_trip_and_reserved_ones_are_refused() {
        for bits in 0..=255u8 {
            match MemoryType::from_bits(bits) {
                Some(memory_type) => {
                    assert_eq!(memory_type as u8, bits);
                    assert_eq!(memory_type.entry_bits(), u64::from(bits) << 3);
                }
                None => assert!(matches!(bits, 2 | 3 | 7..)),
            }
        }
    }
}
