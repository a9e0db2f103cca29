//! The access maps of an address space: which 128-byte pieces of each frame may be written.
//!
//! A frame without a map of its own may be written as a whole, which is what almost all are; so
//! memory is needed only for 2M regions in which a page was ever protected, and slots come and go
//! without any. Counts say of each gigabyte and each region how many of its frames are protected:
//! whether a huge page may be there is one look at a count. A filter of one bit for each class of
//! regions spares the way to the counts wherever no region of the class has a protected frame.
//!
//! Reading takes no lock and may go on while one writer changes things: it sees each map as it was
//! before the change or as it is after. Nothing is freed before the whole is dropped.

use crate::gigabytes::{self, Gigabytes, REGION, allocate};
use crate::mmu::OutOfMemory;
use crate::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use alloc::boxed::Box;
// A map is looked at after a count, where another thread may go on in the tests of interleavings;
// at each of 512 maps in a row none needs to.
use core::ops::Range;
use core::sync::atomic::AtomicU32 as Map;
use spin::Once;
use twofold_arch::sppt::AccessMap;
use twofold_arch::{Gfn, Level};

/// Regions of a gigabyte.
const REGIONS: usize = (gigabytes::FRAMES / REGION) as usize;

#[derive(Debug)]
struct Region {
    /// Frames whose map is not full.
    protected: AtomicU32,
    maps: Once<Box<[Map]>>,
}

#[derive(Debug)]
struct Gigabyte {
    /// Frames whose map is not full.
    protected: AtomicU32,
    regions: Once<Box<[Region]>>,
}

/// Classes of regions: those of one gigabyte are all different.
const CLASSES: usize = REGIONS;

/// The access maps of one address space. All are full at first.
#[derive(Debug)]
pub(crate) struct AccessMaps {
    gigabytes: Gigabytes<Gigabyte>,
    /// Frames whose map is not full.
    protected: AtomicU64,
    /// The bit of each class in which some frame is protected.
    filter: [AtomicU64; CLASSES / 64],
    /// Protected frames of each class, once there was any.
    classes: Once<Box<[AtomicU32]>>,
}

/// The number of the class of the region that holds `gfn`.
#[inline(always)]
const fn class(gfn: Gfn) -> usize {
    (gfn.get() / REGION) as usize % CLASSES
}

/// The access maps of one 2M region.
#[derive(Clone, Copy)]
pub(crate) struct RegionMaps<'a>(Option<&'a Region>);

impl RegionMaps<'_> {
    /// The map of `gfn`, which is in the region.
    #[inline]
    pub(crate) fn get(self, gfn: Gfn) -> AccessMap {
        let map = self.0.and_then(|region| region.map(gfn));
        map.map_or(AccessMap::FULL, |map| {
            AccessMap(map.load(Ordering::Acquire))
        })
    }
}

impl Gigabyte {
    fn new() -> Self {
        Self {
            protected: AtomicU32::new(0),
            regions: Once::new(),
        }
    }

    #[inline(always)]
    fn region(&self, gfn: Gfn) -> Option<&Region> {
        self.regions
            .get()?
            .get((gfn.get() / REGION) as usize % REGIONS)
    }
}

impl Region {
    #[inline(always)]
    fn map(&self, gfn: Gfn) -> Option<&Map> {
        self.maps.get()?.get((gfn.get() % REGION) as usize)
    }
}

#[inline(always)]
fn is_not_zero(count: &AtomicU32) -> bool {
    count.load(Ordering::Acquire) != 0
}

impl AccessMaps {
    /// For guest-physical addresses of so many bits.
    pub(crate) fn new(address_bits: u8) -> Self {
        Self {
            gigabytes: Gigabytes::new(address_bits),
            protected: AtomicU64::new(0),
            filter: [const { AtomicU64::new(0) }; CLASSES / 64],
            classes: Once::new(),
        }
    }

    /// Whether all of `gfns` can have maps.
    pub(crate) fn covers(&self, gfns: &Range<Gfn>) -> bool {
        self.gigabytes.covers(gfns)
    }

    /// Whether any frame is protected.
    #[inline(always)]
    pub(crate) fn protect_any(&self) -> bool {
        self.protected.load(Ordering::Acquire) != 0
    }

    /// Whether any frame of the page of this level around `gfn` may be protected. To be asked
    /// first, since it is a glance.
    #[inline(always)]
    pub(crate) fn may_protect(&self, gfn: Gfn, level: Level) -> bool {
        if level > Level::L2M {
            return true;
        }
        let class = class(gfn);
        self.filter[class / 64].load(Ordering::Acquire) >> (class % 64) & 1 != 0
    }

    /// One frame of the class is protected that was not, or the other way round.
    fn count_in_class(&self, gfn: Gfn, protected: bool) {
        let class = class(gfn);
        let (Some(word), Some(count)) = (
            self.filter.get(class / 64),
            self.classes.get().and_then(|counts| counts.get(class)),
        ) else {
            return;
        };
        let bit = 1 << (class % 64);
        if protected {
            count.fetch_add(1, Ordering::Relaxed);
            word.fetch_or(bit, Ordering::AcqRel);
        } else if count.fetch_sub(1, Ordering::Relaxed) == 1 {
            word.fetch_and(!bit, Ordering::AcqRel);
        }
    }

    /// The maps of the 2M region that holds `gfn`.
    #[inline]
    pub(crate) fn region(&self, gfn: Gfn) -> RegionMaps<'_> {
        let region = self.gigabytes.at(gfn).and_then(|all| all.region(gfn));
        RegionMaps(region.filter(|region| is_not_zero(&region.protected)))
    }

    /// The map of `gfn`.
    #[inline]
    pub(crate) fn get(&self, gfn: Gfn) -> AccessMap {
        self.region(gfn).get(gfn)
    }

    /// Whether any frame of the page of this level around `gfn` is protected.
    #[inline]
    pub(crate) fn protect(&self, gfn: Gfn, level: Level) -> bool {
        let Some(gigabyte) = self.gigabytes.at(gfn) else {
            return false;
        };
        if !is_not_zero(&gigabyte.protected) {
            return false;
        }
        match level {
            Level::L4K => self.get(gfn) != AccessMap::FULL,
            Level::L2M => gigabyte
                .region(gfn)
                .is_some_and(|region| is_not_zero(&region.protected)),
            _ => true,
        }
    }

    /// Makes sure that [`set`](Self::set) of any frame of the 2M region around this one needs no
    /// memory.
    pub(crate) fn reserve(&self, gfn: Gfn) -> Result<(), OutOfMemory> {
        let number = gfn.get() / gigabytes::FRAMES;
        let gigabyte = self.gigabytes.need(number, Gigabyte::new)?;
        gigabyte.regions.try_call_once(|| {
            allocate(REGIONS, || Region {
                protected: AtomicU32::new(0),
                maps: Once::new(),
            })
        })?;
        self.classes
            .try_call_once(|| allocate(CLASSES, || AtomicU32::new(0)))?;
        let region = gigabyte.region(gfn).ok_or(OutOfMemory)?;
        region
            .maps
            .try_call_once(|| allocate(REGION as usize, || Map::new(AccessMap::FULL.0)))?;
        Ok(())
    }

    /// Gives `gfn` a map, for which memory has been reserved unless it is full. One writer at a
    /// time. Returns the map that it had.
    pub(crate) fn set(&self, gfn: Gfn, map: AccessMap) -> AccessMap {
        let Some((gigabyte, region, place)) = self.gigabytes.at(gfn).and_then(|gigabyte| {
            let region = gigabyte.region(gfn)?;
            Some((gigabyte, region, region.map(gfn)?))
        }) else {
            return AccessMap::FULL;
        };
        let old = AccessMap(place.load(Ordering::Relaxed));
        // While the counts are zero nobody looks at the map, and nobody has to find it at once:
        // who changes maps waits for those who may have missed the change.
        place.store(map.0, Ordering::Release);
        match (old == AccessMap::FULL, map == AccessMap::FULL) {
            (true, false) => {
                self.protected.fetch_add(1, Ordering::AcqRel);
                gigabyte.protected.fetch_add(1, Ordering::AcqRel);
                region.protected.fetch_add(1, Ordering::AcqRel);
                self.count_in_class(gfn, true);
            }
            (false, true) => {
                self.count_in_class(gfn, false);
                region.protected.fetch_sub(1, Ordering::AcqRel);
                gigabyte.protected.fetch_sub(1, Ordering::AcqRel);
                self.protected.fetch_sub(1, Ordering::AcqRel);
            }
            _ => {}
        }
        old
    }

    /// Makes every map of `gfns` full. Returns whether any was not.
    pub(crate) fn clear(&self, gfns: &Range<Gfn>) -> bool {
        let mut any = false;
        let mut gfn = gfns.start.get();
        while gfn < gfns.end.get() && self.protect_any() {
            let at = Gfn::new(gfn);
            let step = if !self.protect(at, Level::L1G) {
                gigabytes::FRAMES
            } else if !self.protect(at, Level::L2M) {
                REGION
            } else {
                any |= self.set(at, AccessMap::FULL) != AccessMap::FULL;
                1
            };
            gfn = gfn / step * step + step;
        }
        any
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use alloc::collections::BTreeMap;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

        /// Frames near the edges of regions and gigabytes, so that they meet.
        #[test]
        fn every_frame_has_the_map_that_was_set_last_and_the_counts_know_who_is_protected(
            ops in prop::collection::vec(
                (0u64..3, 0u64..3, 0u64..6, prop::option::of(any::<u32>()), any::<bool>()), 1..48),
        ) {
            let maps = AccessMaps::new(40);
            let mut model = BTreeMap::new();
            for (gigabyte, region, offset, map, clear) in ops {
                let first = gigabyte * gigabytes::FRAMES + region * REGION;
                let gfn = (first + offset).saturating_sub(3);
                if clear {
                    let end = gfn + offset * 200;
                    let any = model.range(gfn..end).next().is_some();
                    prop_assert_eq!(maps.clear(&(Gfn::new(gfn)..Gfn::new(end))), any);
                    model.retain(|other, _| !(gfn..end).contains(other));
                    continue;
                }
                let map = AccessMap(map.unwrap_or(u32::MAX));
                maps.reserve(Gfn::new(gfn)).unwrap();
                let old = maps.set(Gfn::new(gfn), map);
                prop_assert_eq!(old, model.remove(&gfn).unwrap_or(AccessMap::FULL));
                if map != AccessMap::FULL {
                    model.insert(gfn, map);
                }
            }
            prop_assert_eq!(maps.protect_any(), !model.is_empty());
            for region in 0..512 {
                let of_class = model.keys().any(|gfn| gfn / REGION % 512 == region);
                let gfn = Gfn::new(region * REGION);
                prop_assert_eq!(maps.may_protect(gfn, Level::L4K), of_class);
            }
            for gfn in (0..9).flat_map(|region| region * REGION..region * REGION + 8).chain(
                [0, 1, 2].map(|n| n * gigabytes::FRAMES)) {
                let map = model.get(&gfn).copied().unwrap_or(AccessMap::FULL);
                prop_assert_eq!(maps.get(Gfn::new(gfn)), map);
                for level in [Level::L4K, Level::L2M, Level::L1G] {
                    let first = gfn / level.frames() * level.frames();
                    let any = model.range(first..first + level.frames()).next().is_some();
                    prop_assert_eq!(maps.protect(Gfn::new(gfn), level), any);
                    prop_assert!(maps.may_protect(Gfn::new(gfn), level) || !any);
                }
            }
        }
    }

    #[test]
    fn a_full_map_needs_no_memory_and_leaves_no_trace() {
        let maps = AccessMaps::new(48);
        let gfn = Gfn::new(0x1234_5678);
        assert_eq!(maps.set(gfn, AccessMap::FULL), AccessMap::FULL);
        assert_eq!(maps.get(gfn), AccessMap::FULL);
        assert!(!maps.protect_any() && !maps.protect(gfn, Level::L1G));
    }
}
