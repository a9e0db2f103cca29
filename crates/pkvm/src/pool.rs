//! A buddy pool of pages, without memory of its own.
//!
//! A free block's first page holds the list's links in its first two words; everything else in a
//! free block is zero. The page's record has the block's order, and a count of 0 while it is free.

use crate::page::{PageMap, PageRecord};
use crate::platform::{Platform, read, write};
use twofold_arch::Hfn;

/// Orders of blocks: 1 to 1024 pages.
const ORDERS: usize = 11;
/// The order of a page that is not the first of its block.
const TAIL: u8 = 0xff;
const NIL: u64 = u64::MAX;

/// A pool of pages that belong to the hypervisor.
#[derive(Debug)]
pub struct Pool {
    first: Hfn,
    end: Hfn,
    heads: [Option<Hfn>; ORDERS],
    free: u64,
}

/// What a pool needs to reach its pages.
#[derive(Debug)]
pub struct Reach<'a, 'm, P> {
    /// The machine.
    pub platform: &'a P,
    /// The records.
    pub pages: &'a PageMap<'m>,
}

impl<P> Clone for Reach<'_, '_, P> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<P> Copy for Reach<'_, '_, P> {}

impl<'m, P: Platform> Reach<'_, 'm, P> {
    /// # Panics
    /// If the page is not memory, which every page of a pool is.
    fn record(&self, page: Hfn) -> &'m PageRecord {
        match self.pages.record(page) {
            Some(record) => record,
            None => panic!("page {page} of a pool is not memory"),
        }
    }
}

impl Pool {
    /// A pool of the pages from `first` up to `end`, all free and zeroed.
    pub fn new<P: Platform>(reach: Reach<'_, '_, P>, first: Hfn, end: Hfn) -> Self {
        let mut pool = Self::empty(first, end);
        for page in first.get()..end.get() {
            reach.record(Hfn::new(page)).set_order(0);
            reach.record(Hfn::new(page)).set_count(1);
        }
        for page in first.get()..end.get() {
            pool.free(reach, Hfn::new(page));
        }
        pool
    }

    const fn empty(first: Hfn, end: Hfn) -> Self {
        Self {
            first,
            end,
            heads: [None; ORDERS],
            free: 0,
        }
    }

    /// The number of free pages.
    pub const fn free_pages(&self) -> u64 {
        self.free
    }

    fn contains(&self, page: Hfn) -> bool {
        page >= self.first && page < self.end
    }

    fn push<P: Platform>(&mut self, reach: Reach<'_, '_, P>, page: Hfn, order: usize) {
        let next = self.heads[order];
        write(reach.platform, page, 0, next.map_or(NIL, Hfn::get));
        write(reach.platform, page, 1, NIL);
        if let Some(next) = next {
            write(reach.platform, next, 1, page.get());
        }
        self.heads[order] = Some(page);
        reach.record(page).set_order(order as u8);
        reach.record(page).set_count(0);
        self.free += 1 << order;
    }

    fn unlink<P: Platform>(&mut self, reach: Reach<'_, '_, P>, page: Hfn, order: usize) {
        let next = read(reach.platform, page, 0);
        let previous = read(reach.platform, page, 1);
        if previous == NIL {
            self.heads[order] = (next != NIL).then(|| Hfn::new(next));
        } else {
            write(reach.platform, Hfn::new(previous), 0, next);
        }
        if next != NIL {
            write(reach.platform, Hfn::new(next), 1, previous);
        }
        write(reach.platform, page, 0, 0);
        write(reach.platform, page, 1, 0);
        self.free -= 1 << order;
    }

    /// A zeroed block of `1 << order` pages, aligned to its size, with a count of 1; or `None`.
    pub fn allocate<P: Platform>(&mut self, reach: Reach<'_, '_, P>, order: usize) -> Option<Hfn> {
        let found = (order..ORDERS).find(|&order| self.heads[order].is_some())?;
        let page = self.heads[found]?;
        self.unlink(reach, page, found);
        for half in (order..found).rev() {
            let upper = Hfn::new(page.get() + (1 << half));
            self.push(reach, upper, half);
        }
        let record = reach.record(page);
        record.set_order(order as u8);
        record.set_count(1);
        for tail in 1..1u64 << order {
            reach.record(Hfn::new(page.get() + tail)).set_order(TAIL);
        }
        Some(page)
    }

    /// Makes each page of an allocated block one of its own, so that they can be freed one by one.
    pub fn split<P: Platform>(&mut self, reach: Reach<'_, '_, P>, page: Hfn) {
        let order = reach.record(page).order();
        for page in page.get()..page.get() + (1 << order) {
            reach.record(Hfn::new(page)).set_order(0);
            reach.record(Hfn::new(page)).set_count(1);
        }
    }

    /// Takes back the block that starts at `page`, zeroes it, and merges it with its free
    /// neighbours. Pages outside the pool's own range may be given too and are never merged.
    ///
    /// # Panics
    /// If the block is not in use: freeing twice is the hypervisor's own mistake.
    pub fn free<P: Platform>(&mut self, reach: Reach<'_, '_, P>, page: Hfn) {
        let record = reach.record(page);
        assert_eq!(record.count(), 1, "page {page} of a pool is not in use");
        let mut order = usize::from(record.order()).min(ORDERS - 1);
        for tail in 0..1u64 << order {
            reach.platform.wipe(Hfn::new(page.get() + tail));
        }
        let mut page = page;
        while order + 1 < ORDERS {
            let buddy = Hfn::new(page.get() ^ 1 << order);
            let last = Hfn::new(buddy.get() + (1 << order) - 1);
            if !self.contains(buddy) || !self.contains(last) || !self.contains(page) {
                break;
            }
            let other = reach.record(buddy);
            if other.count() != 0 || usize::from(other.order()) != order {
                break;
            }
            self.unlink(reach, buddy, order);
            let upper = page.max(buddy);
            reach.record(upper).set_order(TAIL);
            reach.record(upper).set_count(0);
            page = page.min(buddy);
            order += 1;
        }
        self.push(reach, page, order);
    }
}
