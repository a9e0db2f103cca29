//! The sub-page permission table: which 128-byte pieces of a page may be written although EPT forbids
//! writes to the page (SDM volume 3C, "Sub-Page Write Permissions"; SPEC 1.2).
//!
//! The table always has four levels, whatever the number of EPT levels, and is indexed by bits 47:12
//! of the guest-physical address. The entries of the upper three levels point to tables; those of
//! the last are vectors of permissions.

use crate::addr::Hpa;
use bitflags::bitflags;

/// Bytes in a sub-page.
pub const SUB_PAGE_BYTES: u64 = 128;
/// Sub-pages in a page of 4 KiB.
pub const SUB_PAGES: u32 = 32;
/// First guest-physical address that the table cannot describe.
pub const END: u64 = 1 << 48;

const VALID: u64 = 1;
const ADDRESS_MASK: u64 = 0x000f_ffff_ffff_f000;
/// The bits of a vector that are reserved: every odd one.
const RESERVED_IN_VECTOR: u64 = 0xaaaa_aaaa_aaaa_aaaa;

bitflags! {
    /// The exit qualification of an SPP-related event (exit reason 66).
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
    pub struct SppQualification: u64 {
        /// A table is missing. Clear: an entry has a reserved bit set.
        const MISS = 1 << 11;
        /// An IRET had unblocked NMIs before it ran into this.
        const NMI_UNBLOCKING = 1 << 12;
    }
}

/// What an entry above the last level is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SpptEntry {
    /// No table: a miss.
    NotPresent,
    /// The table of the next level.
    Table(Hpa),
    /// A reserved bit is set in a valid entry: a misconfiguration.
    Reserved,
}

impl SpptEntry {
    /// Reads an entry of one of the upper three levels on a machine whose physical addresses have
    /// `maxphyaddr` bits. What an entry that is not valid holds does not matter.
    pub const fn decode(entry: u64, maxphyaddr: u8) -> Self {
        if entry & VALID == 0 {
            return Self::NotPresent;
        }
        let address = ADDRESS_MASK & ((1 << maxphyaddr) - 1);
        if entry & !(VALID | address) != 0 {
            return Self::Reserved;
        }
        Self::Table(Hpa::new(entry & address))
    }

    /// The entry that points to the table at `page`.
    pub const fn table(page: Hpa) -> u64 {
        page.get() & ADDRESS_MASK | VALID
    }
}

/// Whether `pointer` may be the SPPTP of a machine with `maxphyaddr` bits of physical address.
pub const fn is_valid_pointer(pointer: u64, maxphyaddr: u8) -> bool {
    pointer & !(ADDRESS_MASK & ((1 << maxphyaddr) - 1)) == 0
}

/// One bit for each sub-page of a page, bit *i* for the one at offset `128 * i`: set, it may be
/// written. This is how programs give permissions; [`WriteVector`] is how the processor reads them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(transparent)]
pub struct AccessMap(pub u32);

impl AccessMap {
    /// The whole page may be written: it is not protected.
    pub const FULL: Self = Self(u32::MAX);

    /// Whether every sub-page that a write of `bytes` at `offset` touches may be written. The part
    /// beyond the end of the page is another page's business.
    pub const fn allows(self, offset: u64, bytes: u64) -> bool {
        let touched = touched(offset, bytes);
        self.0 & touched == touched
    }

    /// The offset in the page of the first byte of a write of `bytes` at `offset` that must not be
    /// written, if there is one. As with [`AccessMap::allows`], what lies beyond the page is not
    /// looked at.
    pub const fn first_denied(self, offset: u64, bytes: u64) -> Option<u64> {
        let denied = touched(offset, bytes) & !self.0;
        if denied == 0 {
            return None;
        }
        let sub_page = denied.trailing_zeros() as u64 * SUB_PAGE_BYTES;
        Some(if sub_page > offset { sub_page } else { offset })
    }
}

/// The sub-pages that a write of `bytes` at `offset` in a page touches.
const fn touched(offset: u64, bytes: u64) -> u32 {
    if bytes == 0 || offset >= 4096 {
        return 0;
    }
    let last = match offset.checked_add(bytes - 1) {
        Some(last) if last < 4096 => last,
        _ => 4095,
    };
    let (first, last) = (
        (offset / SUB_PAGE_BYTES) as u32,
        (last / SUB_PAGE_BYTES) as u32,
    );
    (u32::MAX << first) & (u32::MAX >> (SUB_PAGES - 1 - last))
}

/// An entry of the last level: the permission of sub-page *i* in bit 2*i*, the odd bits reserved. It
/// has no present bit: 0 forbids every write.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(transparent)]
pub struct WriteVector(pub u64);

impl WriteVector {
    /// The vector that gives the permissions of `map`.
    pub const fn new(map: AccessMap) -> Self {
        let mut vector = 0;
        let mut index = 0;
        while index < SUB_PAGES {
            vector |= ((map.0 >> index & 1) as u64) << (2 * index);
            index += 1;
        }
        Self(vector)
    }

    /// The permissions, or `None` if a reserved bit is set: a misconfiguration.
    pub const fn access_map(self) -> Option<AccessMap> {
        if self.0 & RESERVED_IN_VECTOR != 0 {
            return None;
        }
        let mut map = 0;
        let mut index = 0;
        while index < SUB_PAGES {
            map |= ((self.0 >> (2 * index) & 1) as u32) << index;
            index += 1;
        }
        Some(AccessMap(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vector_keeps_every_single_permission_and_all_of_them() {
        for map in (0..SUB_PAGES)
            .map(|bit| 1 << bit)
            .chain([0, u32::MAX, 0x5a5a_1234])
        {
            let vector = WriteVector::new(AccessMap(map));
            assert_eq!(vector.access_map(), Some(AccessMap(map)));
            assert_eq!(vector.0.count_ones(), map.count_ones());
        }
    }

    #[test]
    fn each_odd_bit_of_a_vector_is_reserved() {
        for bit in 0..64 {
            assert_eq!(WriteVector(1 << bit).access_map().is_none(), bit % 2 == 1);
        }
    }

    #[test]
    fn every_bit_of_a_valid_entry_is_valid_address_or_reserved() {
        for maxphyaddr in [36, 46, 51, 52] {
            for bit in 1..64 {
                let reserved = bit < 12 || bit >= u32::from(maxphyaddr);
                let entry = SpptEntry::decode(VALID | 1 << bit, maxphyaddr);
                assert_eq!(entry == SpptEntry::Reserved, reserved, "bit {bit}");
                assert_eq!(is_valid_pointer(1 << bit, maxphyaddr), !reserved);
                assert_eq!(
                    SpptEntry::decode(1 << bit, maxphyaddr),
                    SpptEntry::NotPresent
                );
            }
        }
        let page = Hpa::new(0x1234_5000);
        assert_eq!(
            SpptEntry::decode(SpptEntry::table(page), 52),
            SpptEntry::Table(page)
        );
    }

    #[test]
    fn a_write_is_judged_on_every_sub_page_that_it_touches() {
        for offset in 0..4096 {
            for bytes in [1, 2, 8, 16, 64, 127, 128, 129, 4096] {
                let mut expected = 0;
                for byte in offset..(offset + bytes).min(4096) {
                    expected |= 1u32 << (byte / SUB_PAGE_BYTES);
                }
                assert_eq!(touched(offset, bytes), expected, "{bytes} at {offset}");
                assert!(AccessMap(expected).allows(offset, bytes));
                let lacking = expected & expected.wrapping_sub(1);
                assert!(!AccessMap(lacking).allows(offset, bytes));
                for map in [expected, lacking, 0, 0x5555_5555, 0xffff_0000] {
                    let map = AccessMap(map);
                    let denied = (offset..(offset + bytes).min(4096))
                        .find(|byte| map.0 >> (byte / SUB_PAGE_BYTES) & 1 == 0);
                    assert_eq!(map.first_denied(offset, bytes), denied);
                    assert_eq!(map.allows(offset, bytes), denied.is_none());
                }
            }
        }
        assert!(AccessMap(0).allows(0, 0));
        assert!(AccessMap(0).allows(4096, 1));
        assert!(!AccessMap(0).allows(4095, u64::MAX));
    }
}
