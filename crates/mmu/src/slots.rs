//! Memory slots.

use crate::region::RegionFlags;
use twofold_arch::Gfn;

/// What a slot is, at the moment it was asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SlotInfo {
    /// The slot's id within its address space.
    pub id: u16,
    /// The address space.
    pub as_id: u16,
    /// The first guest frame.
    pub base: Gfn,
    /// Size in pages.
    pub pages: u64,
    /// The host-virtual address of the first byte.
    pub hva: u64,
    /// Flags.
    pub flags: RegionFlags,
}

impl SlotInfo {
    /// The host-virtual address of the page `gfn`, which must be in the slot.
    pub const fn hva_of(&self, gfn: Gfn) -> u64 {
        self.hva
            .wrapping_add(gfn.get().wrapping_sub(self.base.get()) << 12)
    }
}
