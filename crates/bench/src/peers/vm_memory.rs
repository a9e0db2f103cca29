//! `vm-memory`: guest memory regions in a sorted list.

use anyhow::Result;
use std::sync::Arc;
use vm_memory::bitmap::BS;
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
