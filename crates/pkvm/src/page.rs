//! What is known of every page of memory: eight bytes each.
//!
//! The record holds the state that the host and the hypervisor have of the page; a guest's state
//! of it stands in the guest's own stage-2 entry. All zero means: the host's, unknown to the
//! hypervisor (SPEC 2.2).

use crate::error::Error;
use core::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, Ordering::Relaxed};
use twofold_arch::Hfn;

/// What a party knows of a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum State {
    /// Its own, and nobody else's.
    Owned = 0,
    /// Its own, lent to someone.
    SharedOwned = 1,
    /// Someone else's, borrowed.
    SharedBorrowed = 2,
    /// Not its page.
    NoPage = 3,
}

impl State {
    /// Every state.
    pub const ALL: [Self; 4] = [
        Self::Owned,
        Self::SharedOwned,
        Self::SharedBorrowed,
        Self::NoPage,
    ];

    /// The state with this number, of which the two lowest bits count.
    pub const fn from_bits(bits: u8) -> Self {
        match bits & 3 {
            0 => Self::Owned,
            1 => Self::SharedOwned,
            2 => Self::SharedBorrowed,
            _ => Self::NoPage,
        }
    }
}

/// The record of one page. The fields are atomics so that records can be shared; what orders their
/// changes are the locks: the host's state and share count belong to the host's lock, the
/// hypervisor's state and the pins to the hypervisor's, order and count of a pool's page to the
/// pool's.
#[derive(Debug, Default)]
#[repr(C)]
pub struct PageRecord {
    /// Pins of a shared page, or users of a page of a pool.
    count: AtomicU16,
    /// log2 of the pages in the free block that starts here.
    order: AtomicU8,
    /// Bits 3:0 the host's state, bits 7:4 the complement of the hypervisor's.
    states: AtomicU8,
    /// How many guest pages borrow this one.
    shares: AtomicU32,
}

const _: () = assert!(size_of::<PageRecord>() == 8);

impl PageRecord {
    /// The host's page.
    pub const fn new() -> Self {
        Self {
            count: AtomicU16::new(0),
            order: AtomicU8::new(0),
            states: AtomicU8::new(0),
            shares: AtomicU32::new(0),
        }
    }

    /// The host's state.
    pub fn host(&self) -> State {
        State::from_bits(self.states.load(Relaxed))
    }

    /// The hypervisor's state.
    pub fn hyp(&self) -> State {
        State::from_bits(!self.states.load(Relaxed) >> 4)
    }

    /// How many guest pages borrow it.
    pub fn shares(&self) -> u32 {
        self.shares.load(Relaxed)
    }

    /// Pins, or users.
    pub fn count(&self) -> u16 {
        self.count.load(Relaxed)
    }

    /// log2 of the pages in the free block that starts here.
    pub fn order(&self) -> u8 {
        self.order.load(Relaxed)
    }

    /// Whether the record is what it is for a page that was never touched.
    pub fn is_untouched(&self) -> bool {
        self.states.load(Relaxed) == 0
            && self.shares() == 0
            && self.count() == 0
            && self.order() == 0
    }

    pub(crate) fn set_host(&self, state: State) {
        let states = self.states.load(Relaxed);
        self.states.store(states & 0xf0 | state as u8, Relaxed);
    }

    pub(crate) fn set_hyp(&self, state: State) {
        let states = self.states.load(Relaxed);
        let complement = (!(state as u8) & 3) << 4;
        self.states.store(states & 0x0f | complement, Relaxed);
    }

    pub(crate) fn set_shares(&self, shares: u32) {
        self.shares.store(shares, Relaxed);
    }

    pub(crate) fn set_count(&self, count: u16) {
        self.count.store(count, Relaxed);
    }

    pub(crate) fn set_order(&self, order: u8) {
        self.order.store(order, Relaxed);
    }
}

/// A stretch of memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Region {
    /// The first page.
    pub start: Hfn,
    /// The number of pages.
    pub pages: u64,
    /// Memory that the firmware keeps for itself: nobody may map it.
    pub no_map: bool,
}

impl Region {
    fn end(&self) -> u64 {
        self.start.get().saturating_add(self.pages)
    }
}

/// The most regions.
pub const MAX_REGIONS: usize = 128;

/// Consecutive pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pages {
    /// The first page.
    pub start: Hfn,
    /// How many, at least one.
    pub count: u64,
}

impl Pages {
    /// One page.
    pub const fn one(page: Hfn) -> Self {
        Self {
            start: page,
            count: 1,
        }
    }

    /// Each page.
    pub fn iter(self) -> impl Iterator<Item = Hfn> {
        let start = self.start.get();
        (start..start.saturating_add(self.count)).map(Hfn::new)
    }
}

/// The records of all memory.
#[derive(Clone, Copy, Debug)]
pub struct PageMap<'m> {
    regions: &'m [Region],
    records: &'m [PageRecord],
    pa_bits: u32,
}

impl<'m> PageMap<'m> {
    /// The records of `regions`, which are in order and do not overlap: one record a page, all
    /// untouched.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the regions are too many, unordered or beyond `pa_bits` of address, or
    /// the records are not as many as the pages.
    pub fn new(
        regions: &'m [Region],
        records: &'m [PageRecord],
        pa_bits: u32,
    ) -> Result<Self, Error> {
        let mut pages = 0u64;
        let mut end = 0;
        for region in regions {
            let next = region.start.get().checked_add(region.pages);
            let next = next.filter(|&next| next <= 1 << (pa_bits - 12));
            if region.start.get() < end || region.pages == 0 {
                return Err(Error::Invalid);
            }
            end = next.ok_or(Error::Invalid)?;
            pages += region.pages;
        }
        if regions.len() > MAX_REGIONS || pages != records.len() as u64 {
            return Err(Error::Invalid);
        }
        Ok(Self {
            regions,
            records,
            pa_bits,
        })
    }

    /// Every region.
    pub const fn regions(&self) -> &'m [Region] {
        self.regions
    }

    /// Every page with its record.
    pub fn iter(&self) -> impl Iterator<Item = (Hfn, &'m PageRecord)> {
        self.regions
            .iter()
            .flat_map(|region| {
                Pages {
                    start: region.start,
                    count: region.pages,
                }
                .iter()
            })
            .zip(self.records)
    }

    /// The region that holds a page, and the index of its first record.
    fn region(&self, page: Hfn) -> Option<(&'m Region, usize)> {
        let mut first = 0;
        for region in self.regions {
            if page < region.start {
                return None;
            }
            if page.get() < region.end() {
                return Some((region, first));
            }
            first += region.pages as usize;
        }
        None
    }

    /// The record of a page, or `None` if it is not memory.
    pub fn record(&self, page: Hfn) -> Option<&'m PageRecord> {
        let (region, first) = self.region(page)?;
        let index = first + (page.get() - region.start.get()) as usize;
        self.records.get(index)
    }

    /// Whether the page is memory that may be mapped.
    pub fn is_memory(&self, page: Hfn) -> bool {
        self.region(page).is_some_and(|(region, _)| !region.no_map)
    }

    /// The records of some pages, all of them in one region.
    ///
    /// # Errors
    /// [`Error::Invalid`] for no page, pages beyond the machine's addresses and pages that cross
    /// the end of a region; [`Error::NotPermitted`] for what is not memory.
    pub fn range(&self, pages: Pages) -> Result<&'m [PageRecord], Error> {
        let start = pages.start.get();
        let end = start.checked_add(pages.count).ok_or(Error::Invalid)?;
        if pages.count == 0 || end > 1 << (self.pa_bits - 12) {
            return Err(Error::Invalid);
        }
        let (region, first) = self.region(pages.start).ok_or(Error::NotPermitted)?;
        if region.no_map {
            return Err(Error::NotPermitted);
        }
        if end > region.end() {
            return Err(Error::Invalid);
        }
        let first = first + (start - region.start.get()) as usize;
        self.records
            .get(first..first + pages.count as usize)
            .ok_or(Error::Invalid)
    }

    /// Whether pages are all outside of memory.
    ///
    /// # Errors
    /// [`Error::Invalid`] for no page and pages beyond the machine's addresses;
    /// [`Error::NotPermitted`] if one of them is memory, mapped or not.
    pub fn check_device(&self, pages: Pages) -> Result<(), Error> {
        let start = pages.start.get();
        let end = start.checked_add(pages.count).ok_or(Error::Invalid)?;
        if pages.count == 0 || end > 1 << (self.pa_bits - 12) {
            return Err(Error::Invalid);
        }
        if self.overlaps(start, end) {
            return Err(Error::NotPermitted);
        }
        Ok(())
    }

    fn overlaps(&self, start: u64, end: u64) -> bool {
        let mut regions = self.regions.iter();
        regions.any(|region| region.start.get() < end && start < region.end())
    }

    /// Whether a block of `pages` pages (a power of two) around `page` is nothing but one region,
    /// or nothing but outside every region.
    pub fn is_uniform(&self, page: Hfn, pages: u64) -> bool {
        let start = page.align_down(pages).get();
        let end = start.saturating_add(pages);
        match self.region(page) {
            Some((region, _)) => start >= region.start.get() && end <= region.end(),
            None => !self.overlaps(start, end),
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_record_keeps_both_states_apart_and_zero_is_the_hosts_page() {
        let record = PageRecord::new();
        assert_eq!((record.host(), record.hyp()), (State::Owned, State::NoPage));
        for host in State::ALL {
            for hyp in State::ALL {
                record.set_host(host);
                record.set_hyp(hyp);
                assert_eq!((record.host(), record.hyp()), (host, hyp));
            }
        }
        record.set_host(State::Owned);
        record.set_hyp(State::NoPage);
        assert!(record.is_untouched());
    }

    #[test]
    fn ranges_stay_inside_one_region_of_memory() {
        let region = |start, pages, no_map| Region {
            start: Hfn::new(start),
            pages,
            no_map,
        };
        let regions = [
            region(16, 4, false),
            region(20, 4, false),
            region(40, 8, true),
        ];
        let records: Vec<_> = (0..16).map(|_| PageRecord::new()).collect();
        let map = PageMap::new(&regions, &records, 32).unwrap();
        let range = |start, count| {
            map.range(Pages {
                start: Hfn::new(start),
                count,
            })
            .map(<[_]>::len)
        };
        assert_eq!(range(16, 4), Ok(4));
        assert_eq!(range(23, 1), Ok(1));
        assert_eq!(range(18, 4), Err(Error::Invalid));
        assert_eq!(range(16, 0), Err(Error::Invalid));
        assert_eq!(range(u64::MAX, 2), Err(Error::Invalid));
        assert_eq!(range(1 << 20, 1), Err(Error::Invalid));
        assert_eq!(range(30, 1), Err(Error::NotPermitted));
        assert_eq!(range(40, 1), Err(Error::NotPermitted));
        assert!(map.is_uniform(Hfn::new(17), 4));
        assert!(!map.is_uniform(Hfn::new(17), 8));
        assert!(!map.is_uniform(Hfn::new(30), 32));
        assert!(map.is_uniform(Hfn::new(70), 32));
        assert!(PageMap::new(&regions, &records[1..], 32).is_err());
        let unordered = [regions[1], regions[0]];
        assert!(PageMap::new(&unordered, &records[8..], 32).is_err());
    }
}
