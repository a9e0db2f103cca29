//! Coalesced writes: a ring of writes that need no exit (`KVM_REGISTER_COALESCED_MMIO`).
//!
//! The ring is one page that every vCPU's mapping shows. The hypervisor advances `last`, the
//! program `first`; one entry stays free so that a full ring differs from an empty one.

use super::Space;
use crate::shared::SharedMemory;
use kvm_bindings::kvm_coalesced_mmio_zone;
use rustix::io::Errno;
use std::sync::atomic::{Ordering, fence};

const PAGE: usize = 4096;
/// Offsets in `struct kvm_coalesced_mmio_ring`.
const FIRST: usize = 0;
const LAST: usize = 4;
const ENTRIES: usize = 8;
/// Bytes in `struct kvm_coalesced_mmio`.
const ENTRY: usize = 24;
/// Entries that fit the page (`KVM_COALESCED_MMIO_MAX`): 170.
const MAX: u32 = ((PAGE - ENTRIES) / ENTRY) as u32;

/// A range of addresses whose writes go to the ring.
#[derive(Debug)]
pub(super) struct Zone {
    address: u64,
    size: u32,
}

impl Zone {
    /// What a program registers. `EINVAL` unless its `pio` is 0 or 1.
    pub(super) fn from_user(zone: &kvm_coalesced_mmio_zone) -> Result<(Space, Self), Errno> {
        // UNSAFETY: reads a union.
        #[expect(unsafe_code)]
        // SAFETY: both members are the same integer.
        let space = match unsafe { zone.__bindgen_anon_1.pio } {
            0 => Space::Memory,
            1 => Space::Port,
            _ => return Err(Errno::INVAL),
        };
        Ok((
            space,
            Self {
                address: zone.addr,
                size: zone.size,
            },
        ))
    }

    /// Whether the whole access lies in the zone.
    pub(super) fn holds(&self, address: u64, length: usize) -> bool {
        let end = self.address.wrapping_add(self.size.into());
        address >= self.address
            && address
                .checked_add(length as u64)
                .is_some_and(|access_end| access_end <= end)
    }

    pub(super) fn holds_zone(&self, other: &Self) -> bool {
        self.holds(other.address, other.size as usize)
    }
}

/// The ring of one VM.
#[derive(Debug)]
pub(super) struct Ring(SharedMemory);

impl Ring {
    pub(super) fn new() -> Result<Self, Errno> {
        Ok(Self(SharedMemory::anonymous(PAGE)?))
    }

    pub(super) fn memory(&self) -> &SharedMemory {
        &self.0
    }

    /// Appends a write. Whether there was room; the program's own writes to the ring can make it
    /// refuse, never overrun.
    pub(super) fn push(&mut self, space: Space, address: u64, data: &[u8]) -> bool {
        let insert: u32 = self.0.read(LAST);
        if insert >= MAX || data.len() > 8 {
            return false;
        }
        let next = (insert + 1) % MAX;
        if next == self.0.read::<u32>(FIRST) {
            return false;
        }
        let entry = ENTRIES + insert as usize * ENTRY;
        self.0.write(entry, address);
        self.0.write(entry + 8, data.len() as u32);
        self.0.write(entry + 12, u32::from(space == Space::Port));
        self.0.write_bytes(entry + 16, data);
        fence(Ordering::Release);
        self.0.write(LAST, next);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ring_keeps_one_entry_free_and_wraps() {
        let mut ring = Ring::new().unwrap();
        for start in [0, 1, 169] {
            ring.0.write(FIRST, start);
            ring.0.write(LAST, start);
            for index in 0..MAX - 1 {
                assert!(
                    ring.push(Space::Memory, u64::from(index), &[1]),
                    "entry {index}"
                );
            }
            assert!(!ring.push(Space::Memory, 0, &[1]));
            assert_eq!(ring.0.read::<u32>(LAST), (start + MAX - 1) % MAX);
        }
    }

    #[test]
    fn an_entry_holds_address_length_space_and_data() {
        let mut ring = Ring::new().unwrap();
        assert!(ring.push(Space::Port, 0x2c, &[0x39, 1]));
        assert_eq!(ring.0.read::<u64>(ENTRIES), 0x2c);
        assert_eq!(ring.0.read::<u32>(ENTRIES + 8), 2);
        assert_eq!(ring.0.read::<u32>(ENTRIES + 12), 1);
        assert_eq!(ring.0.read::<u8>(ENTRIES + 16), 0x39);
    }

    #[test]
    fn a_program_that_breaks_the_ring_gets_no_more_entries() {
        let mut ring = Ring::new().unwrap();
        ring.0.write(LAST, u32::MAX);
        assert!(!ring.push(Space::Memory, 0, &[1]));
    }

    #[test]
    fn only_accesses_inside_the_zone_are_coalesced() {
        let zone = Zone {
            address: 0x1000,
            size: 8,
        };
        assert!(zone.holds(0x1000, 8));
        assert!(zone.holds(0x1004, 4));
        assert!(!zone.holds(0x1004, 8));
        assert!(!zone.holds(0xfff, 1));
        assert!(!zone.holds(u64::MAX, 2));
    }
}
