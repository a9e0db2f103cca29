//! Memory slots: which guest frames have host memory, and where.
//!
//! A change is published with one store while faults go on reading; what it replaces is freed
//! once every reader has passed. Each address space has a generation that moves with every change;
//! bit 63 says that one is going on, and nothing that was learnt then may be remembered.

mod bitmap;
mod by_hva;
mod node;
mod tree;

pub(crate) use bitmap::DirtyBitmap;
pub(crate) use by_hva::HvaIndex;
pub(crate) use tree::{SlotHint, SlotTree};

use crate::garbage::Garbage;
use crate::reader::ReaderState;
use crate::region::{ADDRESS_SPACES, RegionFlags};
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use twofold_arch::Gfn;

/// In a generation: the slots are being changed.
pub const UPDATE_IN_PROGRESS: u64 = 1 << 63;

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
    #[inline(always)]
    pub const fn hva_of(&self, gfn: Gfn) -> u64 {
        self.hva
            .wrapping_add(gfn.get().wrapping_sub(self.base.get()) << 12)
    }

    /// Whether `gfn` is in the slot.
    #[inline(always)]
    pub const fn contains(&self, gfn: Gfn) -> bool {
        gfn.get().wrapping_sub(self.base.get()) < self.pages
    }

    /// Slot id in bits 15:0, address space in bits 31:16.
    pub(crate) const fn name(&self) -> u32 {
        (self.as_id as u32) << 16 | self.id as u32
    }

    /// The first frame after the slot.
    pub const fn end(&self) -> Gfn {
        Gfn::new(self.base.get() + self.pages)
    }
}

/// A slot. It never changes, except that it may become invalid: it is being deleted or moved, and
/// faults on it retry.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) info: SlotInfo,
    pub(crate) dirty: Option<alloc::sync::Arc<DirtyBitmap>>,
    /// Where the first byte of the private half is, in the host's addresses for it.
    pub(crate) private: Option<u64>,
    invalid: AtomicBool,
}

impl Slot {
    pub(crate) fn new(info: SlotInfo, dirty: Option<alloc::sync::Arc<DirtyBitmap>>) -> Self {
        Self {
            info,
            dirty,
            private: None,
            invalid: AtomicBool::new(false),
        }
    }

    /// The slot with a private half at `address`.
    pub(crate) fn with_private(mut self, address: Option<u64>) -> Self {
        self.private = address;
        self
    }

    pub(crate) fn invalidate(&self) {
        self.invalid.store(true, Ordering::Release);
    }

    #[inline(always)]
    pub(crate) fn is_invalid(&self) -> bool {
        self.invalid.load(Ordering::Acquire)
    }

    /// Whether `gfn`, which is in the slot, is marked, or the slot does not log.
    pub(crate) fn is_marked(&self, gfn: Gfn) -> bool {
        self.dirty
            .as_ref()
            .is_none_or(|dirty| dirty.is_marked(gfn.get().wrapping_sub(self.info.base.get())))
    }

    /// Marks `gfn`, which is in the slot, dirty if the slot logs: in the ring of `reader` if it has
    /// one, else in the slot's bitmap. Returns false if the ring is full: then the page must not
    /// become writable.
    ///
    /// Whoever makes the page writable calls this before, in the same read section.
    #[inline(always)]
    #[must_use]
    pub(crate) fn mark_dirty(&self, gfn: Gfn, reader: &ReaderState) -> bool {
        if !self.info.flags.contains(RegionFlags::LOG_DIRTY) {
            return true;
        }
        let page = gfn.get().wrapping_sub(self.info.base.get());
        match (reader.ring(), &self.dirty) {
            (Some(ring), _) => ring.push(self.info.name(), page),
            (None, Some(dirty)) => {
                dirty.mark(page);
                true
            }
            (None, None) => true,
        }
    }
}

/// The slots of one address space, as faults see them.
pub(crate) struct AddressSpace {
    generation: AtomicU64,
    pub(crate) tree: SlotTree,
}

impl AddressSpace {
    /// Generations of different address spaces never are equal: each starts at its number and
    /// moves in steps of the number of address spaces.
    pub(crate) fn new(as_id: usize) -> Self {
        Self {
            generation: AtomicU64::new(as_id as u64),
            tree: SlotTree::new(),
        }
    }

    #[inline(always)]
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Announces a change; the caller holds the writers' lock.
    pub(crate) fn begin_update(&self) {
        self.generation
            .fetch_or(UPDATE_IN_PROGRESS, Ordering::SeqCst);
    }

    /// Ends it. Returns whether the part of the generation that MMIO entries hold has wrapped, so
    /// that very old ones would look fresh again.
    pub(crate) fn end_update(&self) -> bool {
        let old = self.generation.load(Ordering::Relaxed) & !UPDATE_IN_PROGRESS;
        let new = old + ADDRESS_SPACES as u64;
        self.generation.store(new, Ordering::SeqCst);
        new & crate::mmio::GENERATION_MASK < ADDRESS_SPACES as u64
    }
}

impl AddressSpace {
    /// Publishes a slot; the caller holds the writers' lock and has announced the update.
    pub(crate) fn insert(&self, slot: Slot, garbage: &mut Garbage) {
        self.tree.insert(slot, garbage);
    }
}
