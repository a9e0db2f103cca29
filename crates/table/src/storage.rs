//! How entries are reached.
//!
//! The engine never sees a pointer. It names an entry by its page and index ([`At`]) and asks a
//! [`Storage`]. [`RawPages`] reaches real pages; the tests have one made of `loom`'s atomics.

// UNSAFETY: table pages are raw memory that hardware reads; this module is where they are touched.
#![expect(unsafe_code)]

use crate::trace::Tracer;
use core::ops::Range;
use core::ptr::NonNull;
use twofold_arch::Hpa;

/// A page that is, or is about to become, a table.
///
/// Whoever makes one promises that the page is allocated; the engine passes it on under the
/// lifetime rules of [`Table`](crate::Table).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub struct TablePage(Hpa);

impl TablePage {
    /// Promises that `page` is a page of the storage it will be used with.
    ///
    /// # Safety
    /// The page must be allocated, for tables, as long as this value or anything derived from it
    /// is used.
    pub const unsafe fn assume(page: Hpa) -> Self {
        Self(page)
    }

    /// A page found in an entry of a live table, or next to a root page.
    pub(crate) const fn found(page: Hpa) -> Self {
        Self(page)
    }

    /// The page's address.
    pub const fn hpa(self) -> Hpa {
        self.0
    }
}

/// An entry: a page and an index that the engine has checked against the format's geometry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct At {
    page: TablePage,
    index: u32,
}

impl At {
    #[inline(always)]
    pub(crate) const fn new(page: TablePage, index: usize) -> Self {
        Self {
            page,
            index: index as u32,
        }
    }

    /// The table.
    #[inline(always)]
    pub const fn page(self) -> TablePage {
        self.page
    }

    /// The index in the table.
    #[inline(always)]
    pub const fn index(self) -> usize {
        self.index as usize
    }
}

/// Entries that several threads, and processors walking the tables, read and change.
pub trait Storage {
    /// Reads an entry; what was written before it was published is visible.
    fn load(&self, at: At) -> u64;

    /// Writes an entry that nobody else can change now: in a table that is private, or frozen by
    /// the caller. What was written before is visible to whoever reads the new value.
    fn store(&self, at: At, value: u64);

    /// Exchanges an entry.
    fn swap(&self, at: At, value: u64) -> u64;

    /// Exchanges an entry if it still is `old`; otherwise says what it is.
    ///
    /// # Errors
    /// The value found instead of `old`.
    fn compare_exchange(&self, at: At, old: u64, new: u64) -> Result<(), u64>;

    /// Who is told of changes. Asked at each one: nobody, unless it is implemented, and then
    /// nothing is left of the question.
    #[inline(always)]
    fn tracer(&self) -> Option<&dyn Tracer> {
        None
    }

    /// Fills the first `entries` entries of a private table.
    fn fill(&self, page: TablePage, entries: usize, value: u64);

    /// Writes the entries `range` of a private table: `value` is given the number of each, counted
    /// from the start of the range.
    fn fill_with(&self, page: TablePage, range: Range<usize>, value: impl FnMut(usize) -> u64);

    /// Changes the entries `range` of a private table: `change` makes the new value of each from
    /// the old.
    fn update(&self, page: TablePage, range: Range<usize>, change: impl FnMut(u64) -> u64);
}

/// Where the bytes of a table page are.
///
/// # Safety
/// For a page that a [`TablePage`] stands for, the pointer must be valid for atomic reads and
/// writes of a whole table and aligned to it, and the same each time.
pub unsafe trait PageAccess {
    /// The first entry of the page.
    fn table_ptr(&self, page: Hpa) -> NonNull<u64>;

    /// See [`Storage::tracer`].
    #[inline(always)]
    fn tracer(&self) -> Option<&dyn Tracer> {
        None
    }
}

/// Real pages, reached with the processor's atomics.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub struct RawPages<P>(pub P);

impl<P: PageAccess> RawPages<P> {
    #[inline(always)]
    fn entry(&self, at: At) -> &core::sync::atomic::AtomicU64 {
        // SAFETY: `At` holds a page for which `PageAccess` gives a valid pointer and an index that
        // was masked to the table's size; entries are only accessed atomically.
        unsafe {
            core::sync::atomic::AtomicU64::from_ptr(
                self.0.table_ptr(at.page.0).as_ptr().add(at.index()),
            )
        }
    }
}

impl<P: PageAccess> RawPages<P> {
    /// Entries of a private table, as plain memory.
    ///
    /// # Safety
    /// Nobody else may access the page meanwhile, and the range must be within the table.
    #[expect(clippy::mut_from_ref, reason = "the page is not part of self")]
    #[inline(always)]
    unsafe fn private(&self, page: TablePage, range: Range<usize>) -> &mut [u64] {
        // SAFETY: `PageAccess` gives a pointer that is valid for a whole table; the caller
        // promises the rest.
        unsafe {
            core::slice::from_raw_parts_mut(
                self.0.table_ptr(page.0).as_ptr().add(range.start),
                range.end - range.start,
            )
        }
    }
}

impl<P: PageAccess> Storage for RawPages<P> {
    #[inline(always)]
    fn load(&self, at: At) -> u64 {
        self.entry(at).load(core::sync::atomic::Ordering::Acquire)
    }

    #[inline(always)]
    fn store(&self, at: At, value: u64) {
        self.entry(at)
            .store(value, core::sync::atomic::Ordering::Release);
    }

    #[inline(always)]
    fn swap(&self, at: At, value: u64) -> u64 {
        self.entry(at)
            .swap(value, core::sync::atomic::Ordering::AcqRel)
    }

    #[inline(always)]
    fn compare_exchange(&self, at: At, old: u64, new: u64) -> Result<(), u64> {
        use core::sync::atomic::Ordering::{AcqRel, Acquire};
        self.entry(at)
            .compare_exchange(old, new, AcqRel, Acquire)
            .map(|_| ())
    }

    #[inline(always)]
    fn tracer(&self) -> Option<&dyn Tracer> {
        self.0.tracer()
    }

    #[inline]
    fn fill(&self, page: TablePage, entries: usize, value: u64) {
        // SAFETY: the page is valid for a whole table and, being private, not accessed by anyone
        // else; `entries` is the format's number of entries.
        unsafe { core::slice::from_raw_parts_mut(self.0.table_ptr(page.0).as_ptr(), entries) }
            .fill(value);
    }

    #[inline]
    fn fill_with(&self, page: TablePage, range: Range<usize>, mut value: impl FnMut(usize) -> u64) {
        // SAFETY: as in `fill`; the range is within the format's number of entries.
        let entries = unsafe { self.private(page, range) };
        for (index, entry) in entries.iter_mut().enumerate() {
            *entry = value(index);
        }
    }

    #[inline]
    fn update(&self, page: TablePage, range: Range<usize>, mut change: impl FnMut(u64) -> u64) {
        // SAFETY: as in `fill`; the range is within the format's number of entries.
        for entry in unsafe { self.private(page, range) } {
            *entry = change(*entry);
        }
    }
}
