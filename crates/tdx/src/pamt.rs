//! Page metadata: to whom each page of private memory belongs, and as what.

use crate::status::{Operand, Status};
use alloc::collections::BTreeMap;
use spin::Mutex;
use twofold_arch::{Hpa, Level};

/// What a page is used for (SPEC 5.9).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum PageType {
    /// A page of a TD.
    Regular = 3,
    /// A TD's root page.
    Tdr = 4,
    /// A further control page of a TD.
    Tdcx = 5,
    /// The root page of a virtual processor.
    Tdvpr = 6,
    /// A further control page of a virtual processor.
    Tdvpx = 7,
    /// A Secure EPT table.
    Ept = 8,
}

/// The metadata of a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageMetadata {
    /// What it is used for.
    pub kind: PageType,
    /// Its level: 0 for 4 KiB, 1 for 2 MiB, 2 for 1 GiB.
    pub level: u8,
    /// The TD that it belongs to, by its root page. For a TDR, itself.
    pub owner: Hpa,
    /// The TLB epoch in which it was blocked last.
    pub blocked_in: u64,
}

/// Bytes in a page of `level`.
pub(crate) const fn page_bytes(level: u8) -> u64 {
    match Level::from_number(level + 1) {
        Some(level) => level.bytes(),
        None => 0,
    }
}

/// The metadata of every page in use. A page without an entry is free.
#[derive(Debug, Default)]
pub(crate) struct Pamt {
    pages: Mutex<BTreeMap<u64, PageMetadata>>,
}

impl Pamt {
    /// Takes a free page into use.
    ///
    /// # Errors
    /// `PAGE_METADATA_INCORRECT` for `operand` if any part of it is in use.
    pub(crate) fn claim(
        &self,
        page: Hpa,
        metadata: PageMetadata,
        operand: Operand,
    ) -> Result<(), Status> {
        let (start, end) = (page.get(), page.get() + page_bytes(metadata.level));
        let mut pages = self.pages.lock();
        let before = pages.range(..start).next_back();
        let overlaps_before =
            before.is_some_and(|(&other, used)| other + page_bytes(used.level) > start);
        if overlaps_before || pages.range(start..end).next().is_some() {
            return Err(Status::PAGE_METADATA_INCORRECT.with(operand));
        }
        pages.insert(start, metadata);
        Ok(())
    }

    /// The metadata of the page that begins at `page`.
    pub(crate) fn get(&self, page: Hpa) -> Option<PageMetadata> {
        self.pages.lock().get(&page.get()).copied()
    }

    /// Remembers the epoch in which a page was blocked.
    pub(crate) fn block(&self, page: Hpa, epoch: u64) {
        if let Some(metadata) = self.pages.lock().get_mut(&page.get()) {
            metadata.blocked_in = epoch;
        }
    }

    /// Frees a page.
    pub(crate) fn release(&self, page: Hpa) -> Option<PageMetadata> {
        self.pages.lock().remove(&page.get())
    }

    /// Makes the 512 pages from `page` on, one level below `level`, one page.
    pub(crate) fn merge(&self, page: Hpa, level: u8) {
        let mut pages = self.pages.lock();
        let Some(&first) = pages.get(&page.get()) else {
            return;
        };
        for index in 0..512 {
            pages.remove(&(page.get() + index * page_bytes(level - 1)));
        }
        pages.insert(page.get(), PageMetadata { level, ..first });
    }

    /// Makes a page 512 pages of the level below.
    pub(crate) fn split(&self, page: Hpa) {
        let mut pages = self.pages.lock();
        let Some(whole) = pages.remove(&page.get()) else {
            return;
        };
        let level = whole.level.saturating_sub(1);
        for index in 0..512 {
            let part = PageMetadata { level, ..whole };
            pages.insert(page.get() + index * page_bytes(level), part);
        }
    }

    /// How many pages, of any size, are in use.
    pub(crate) fn len(&self) -> usize {
        self.pages.lock().len()
    }

    /// How many pages, of any size, belong to `owner`.
    #[cfg(test)]
    pub(crate) fn owned_by(&self, owner: Hpa) -> usize {
        let pages = self.pages.lock();
        pages.values().filter(|page| page.owner == owner).count()
    }
}

#[cfg(all(test, not(loom), not(shuttle)))]
mod tests {
    use super::*;

    fn page(level: u8) -> PageMetadata {
        PageMetadata {
            kind: PageType::Regular,
            level,
            owner: Hpa::new(0x1000),
            blocked_in: 0,
        }
    }

    #[test]
    fn a_page_in_use_is_refused_whatever_part_of_it_is_asked_for() {
        let pamt = Pamt::default();
        let claim = |address, level| pamt.claim(Hpa::new(address), page(level), Operand::R8);
        claim(0x20_0000, 1).unwrap();
        for (address, level) in [(0x20_0000, 0), (0x3f_f000, 0), (0x20_0000, 1), (0, 2)] {
            assert!(
                claim(address, level)
                    .unwrap_err()
                    .is(Status::PAGE_METADATA_INCORRECT)
            );
        }
        claim(0x40_0000, 0).unwrap();
        claim(0x1f_f000, 0).unwrap();
    }

    #[test]
    fn splitting_and_merging_keep_owner_and_extent() {
        let pamt = Pamt::default();
        pamt.claim(Hpa::new(0x20_0000), page(1), Operand::R8)
            .unwrap();
        pamt.split(Hpa::new(0x20_0000));
        assert_eq!(pamt.owned_by(Hpa::new(0x1000)), 512);
        assert_eq!(pamt.get(Hpa::new(0x3f_f000)), Some(page(0)));
        pamt.merge(Hpa::new(0x20_0000), 1);
        assert_eq!(pamt.owned_by(Hpa::new(0x1000)), 1);
        assert_eq!(pamt.get(Hpa::new(0x20_0000)), Some(page(1)));
    }
}
