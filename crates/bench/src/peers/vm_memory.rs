//! `vm-memory`: guest memory regions in a sorted list, and a dirty bitmap.

use anyhow::Result;
use std::num::NonZeroUsize;
use std::sync::Arc;
use vm_memory::bitmap::{AtomicBitmap, BS};
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionCollection, GuestUsize,
    MemoryRegionAddress,
};

/// A region without memory: only its place is used.
#[derive(Debug)]
pub(crate) struct Place {
    start: u64,
    bytes: u64,
}

impl vm_memory::region::GuestMemoryRegionBytes for Place {}

impl GuestMemoryRegion for Place {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.bytes
    }

    fn start_addr(&self) -> GuestAddress {
        GuestAddress(self.start)
    }

    fn bitmap(&self) -> BS<'_, Self::B> {}
}

/// A collection of regions.
pub(crate) struct Regions(GuestRegionCollection<Place>);

impl Regions {
    /// Regions at `(start, bytes)`, in order.
    pub(crate) fn new(places: impl Iterator<Item = (u64, u64)>) -> Result<Self> {
        let regions = places
            .map(|(start, bytes)| Place { start, bytes })
            .collect();
        Ok(Self(GuestRegionCollection::from_regions(regions)?))
    }

    /// The start of the region that holds `gpa`, and the offset in it.
    pub(crate) fn find(&self, gpa: u64) -> Option<(GuestAddress, MemoryRegionAddress)> {
        self.0
            .to_region_addr(GuestAddress(gpa))
            .map(|(region, offset)| (region.start_addr(), offset))
    }

    /// Makes a collection with one more region, then one without it.
    pub(crate) fn add_and_remove(&self, start: u64, bytes: u64) -> Option<usize> {
        let added = self
            .0
            .insert_region(Arc::new(Place { start, bytes }))
            .ok()?;
        let (removed, _) = added.remove_region(GuestAddress(start), bytes).ok()?;
        Some(removed.num_regions())
    }
}

/// A dirty bitmap.
pub(crate) struct Bitmap {
    inner: AtomicBitmap,
    bytes: usize,
}

impl Bitmap {
    /// A clean bitmap for `bytes` in pages of 4 KiB.
    pub(crate) fn new(bytes: u64) -> Self {
        let page = const { NonZeroUsize::new(4096).unwrap() };
        let bytes = bytes as usize;
        Self {
            inner: AtomicBitmap::new(bytes, page),
            bytes,
        }
    }

    /// Marks every page.
    pub(crate) fn fill(&self) {
        self.inner.set_addr_range(0, self.bytes);
    }

    /// Takes every bit.
    pub(crate) fn harvest(&self) -> Vec<u64> {
        self.inner.get_and_reset()
    }
}
