//! Finding entries.
//!
//! ```text
//!  root ──> table (height 4) ──> table (3) ──> table (2) ──> table (1) ──> page
//!             └ index from the address's high bits      └ from its low bits
//! ```

// UNSAFETY: `Table::new` declares what the caller owes; nothing is dereferenced here.
#![expect(unsafe_code)]

use crate::format::{Entry, Format, Height};
use crate::storage::{At, Storage, TablePage};
use core::marker::PhantomData;
use twofold_arch::{Gpa, Hpa};

/// The top of a table: its first page, its height, and how many consecutive pages it has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RootTable {
    /// The first page.
    pub page: TablePage,
    /// The height of the root's entries.
    pub height: Height,
    /// Number of consecutive pages: 1, or more where a format concatenates roots.
    pub pages: usize,
}

/// Which entry this is, and the first address it covers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    pub(crate) at: At,
    pub(crate) height: Height,
    pub(crate) gpa: Gpa,
}

impl Place {
    /// The height of the table that holds the entry.
    pub const fn height(&self) -> Height {
        self.height
    }

    /// The first address that the entry covers.
    pub const fn gpa(&self) -> Gpa {
        self.gpa
    }

    /// The table that holds the entry.
    pub const fn table(&self) -> TablePage {
        self.at.page()
    }
}

/// An entry and the value it had when it was read. Every change starts from one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Seen {
    pub(crate) place: Place,
    pub(crate) value: u64,
}

impl Seen {
    /// Which entry.
    pub const fn place(&self) -> &Place {
        &self.place
    }

    /// The value read.
    pub const fn value(&self) -> u64 {
        self.value
    }

    /// What the value means.
    #[inline(always)]
    pub fn entry<F: Format>(&self) -> Entry {
        F::decode(self.value, self.place.height)
    }
}

/// A table that can be walked and changed.
pub struct Table<'s, F, S> {
    pub(crate) storage: &'s S,
    pub(crate) root: RootTable,
    /// Added to an address to find its root entry.
    base: u64,
    format: PhantomData<fn() -> F>,
}

impl<F, S> Clone for Table<'_, F, S> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<F, S> Copy for Table<'_, F, S> {}

impl<'s, F: Format, S: Storage> Table<'s, F, S> {
    /// The table below `root`.
    ///
    /// # Safety
    /// As long as the value or anything it returned is used, every table page that can be reached
    /// from `root`, or could when the value was made, must stay allocated: the caller is in a read
    /// section that page reclamation waits for, or holds the lock that page reclamation needs.
    #[inline(always)]
    pub const unsafe fn new(storage: &'s S, root: RootTable) -> Self {
        Self {
            storage,
            root,
            base: 0,
            format: PhantomData,
        }
    }

    /// The same table seen from `base` on, in bytes: address 0 is where `base` was, and addresses
    /// below it are out of reach. For a guest whose addresses carry bits that are not part of what
    /// its memory is called by: the shared bit of a TD.
    ///
    /// `base` is a multiple of what an entry of the root covers. Not for [`Exclusive`](crate::Exclusive) use.
    #[inline(always)]
    #[must_use]
    pub fn from(mut self, base: u64) -> Self {
        debug_assert!(
            base & (F::bytes(self.root.height) - 1) == 0,
            "below the root, only addresses decide"
        );
        self.base = base;
        self
    }

    /// The root.
    pub const fn root(&self) -> RootTable {
        self.root
    }

    /// The first address beyond what the root covers.
    #[inline(always)]
    pub fn end(&self) -> u64 {
        let end = F::bytes(self.root.height.above()).saturating_mul(self.root.pages as u64);
        end.wrapping_sub(self.base)
    }

    /// The root entry for `gpa`, which must be below [`end`](Self::end).
    #[inline(always)]
    pub(crate) fn root_at(&self, gpa: Gpa) -> At {
        At::new(
            self.root_page(gpa),
            F::index(self.based(gpa), self.root.height),
        )
    }

    /// The address that finds the entries for `gpa`.
    #[inline(always)]
    fn based(&self, gpa: Gpa) -> Gpa {
        Gpa::new(gpa.get().wrapping_add(self.base))
    }

    /// The root entry for `gpa`, as a place.
    #[inline(always)]
    pub(crate) fn root_place(&self, gpa: Gpa) -> Place {
        let height = self.root.height;
        Place {
            at: self.root_at(gpa),
            height,
            gpa: Gpa::new(gpa.get() & !(F::bytes(height) - 1)),
        }
    }

    /// The page of the root that covers `gpa`.
    #[inline(always)]
    fn root_page(&self, gpa: Gpa) -> TablePage {
        if F::MAX_ROOT_PAGES == 1 {
            return self.root.page;
        }
        let number = (gpa.get() >> F::shift(self.root.height.above())) as usize;
        debug_assert!(number < self.root.pages);
        let number = number.min(self.root.pages - 1) as u64;
        TablePage::found(Hpa::new(
            self.root.page.hpa().get() + (number << F::GRANULE_SHIFT),
        ))
    }

    #[inline(always)]
    pub(crate) fn place(&self, page: TablePage, height: Height, gpa: Gpa) -> Place {
        Place {
            at: At::new(page, F::index(gpa, height)),
            height,
            gpa: Gpa::new(gpa.get() & !(F::bytes(height) - 1)),
        }
    }

    /// Reads an entry.
    #[inline(always)]
    pub fn look(&self, place: Place) -> Seen {
        Seen {
            place,
            value: self.storage.load(place.at),
        }
    }

    /// The entry for `gpa` in `page`, a table of the smallest pages that an earlier walk found.
    ///
    /// # Safety
    /// `page` must be a table at [`Height::LEAF`] that covers `gpa`, and must not have been freed.
    #[inline(always)]
    pub unsafe fn look_in_leaf_table(&self, page: TablePage, gpa: Gpa) -> Seen {
        self.look(self.place(page, Height::LEAF, gpa))
    }

    /// Walks towards `gpa` until an entry that is not a table, or until `stop`.
    ///
    /// Addresses at or above [`end`](Self::end) are the caller's mistake and are treated modulo it.
    #[inline]
    pub fn lookup(&self, gpa: Gpa, stop: Height) -> Seen {
        // With a height that the compiler knows, the walk has no loop.
        const USUAL: Height = Height::new(4);
        match self.root.height {
            USUAL => self.descend(USUAL, gpa, stop),
            height => self.descend(height, gpa, stop),
        }
    }

    #[inline(always)]
    fn descend(&self, mut height: Height, gpa: Gpa, stop: Height) -> Seen {
        let mut at = At::new(self.root_page(gpa), F::index(self.based(gpa), height));
        // The place is put together once, at the end: on the way down only the entry matters.
        let value = loop {
            let value = self.storage.load(at);
            if height <= stop {
                break value;
            }
            let (Entry::Table(child), Some(below)) = (F::decode(value, height), height.below())
            else {
                break value;
            };
            height = below;
            at = At::new(TablePage::found(child), F::index(gpa, height));
        };
        Seen {
            place: Place {
                at,
                height,
                gpa: Gpa::new(gpa.get() & !(F::bytes(height) - 1)),
            },
            value,
        }
    }

    /// The leaf that maps `gpa`: its value and its height. What a query wants that does not change
    /// anything, with nothing beyond the loads.
    ///
    /// Addresses at or above [`end`](Self::end) are the caller's mistake and are treated modulo it.
    #[inline(always)]
    pub fn find_leaf(&self, gpa: Gpa) -> Option<(u64, Height)> {
        const { assert!(F::MAX_HEIGHT.get() <= 5) };
        let root = self.root.height;
        let gpa = self.based(gpa);
        let mut page = self.root_page(gpa);
        // Spelled out, so that each step shifts by a constant.
        macro_rules! step {
            ($height:expr) => {
                if F::MAX_HEIGHT >= $height && root >= $height {
                    let value = self.storage.load(At::new(page, F::index(gpa, $height)));
                    match F::child(value, $height) {
                        Some(child) => page = TablePage::found(child),
                        None if F::decode(value, $height) == Entry::Leaf => {
                            return Some((value, $height));
                        }
                        None => return None,
                    }
                }
            };
        }
        step!(Height::new(5));
        step!(Height::new(4));
        step!(Height::new(3));
        step!(Height::new(2));
        let value = self
            .storage
            .load(At::new(page, F::index(gpa, Height::LEAF)));
        (F::decode(value, Height::LEAF) == Entry::Leaf).then_some((value, Height::LEAF))
    }
}
