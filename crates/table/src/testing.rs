//! Tables in an arena of atomics: what the tests run the engine over, with the processor's
//! atomics or with `loom`'s.

// UNSAFETY: the tests promise that arena pages are allocated.
#![expect(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test may fail")]

use crate::build::PageSource;
use crate::format::Format;
use crate::storage::{At, Storage, TablePage};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::toy::SHIFT;
use crate::trace::{Change, Tracer};
use crate::walk::{RootTable, Table};
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::vec::Vec;
use twofold_arch::Hpa;

/// Pages of four entries, numbered from 1 (page 0 stands for "none" in lists). A page that is not
/// allocated answers every access with a panic, so that a use after free is a failed test.
pub(crate) struct Arena {
    pages: Vec<Page>,
    /// Changes, if they are wanted.
    changes: Option<Mutex<Vec<Change>>>,
}

struct Page {
    entries: [AtomicU64; 4],
    /// Not `loom`'s: the truth, whatever a thread may be allowed to see.
    allocated: AtomicBool,
}

impl Arena {
    pub(crate) fn new(pages: usize) -> Self {
        let page = |_| Page {
            entries: std::array::from_fn(|_| AtomicU64::new(0xdead)),
            allocated: AtomicBool::new(false),
        };
        Self {
            pages: (0..pages).map(page).collect(),
            changes: None,
        }
    }

    /// An arena that writes down what changes.
    #[cfg(not(loom))]
    pub(crate) fn traced(pages: usize) -> Self {
        Self {
            changes: Some(Mutex::default()),
            ..Self::new(pages)
        }
    }

    /// What has changed since the last call: page number, height, old and new value.
    #[cfg(not(loom))]
    pub(crate) fn changes(&self) -> Vec<(u64, u8, u64, u64)> {
        let changes = core::mem::take(&mut *self.changes.as_ref().unwrap().lock().unwrap());
        let numbers = |change: Change| {
            let page = change.gpa.get() >> SHIFT;
            (page, change.height.get(), change.old, change.new)
        };
        changes.into_iter().map(numbers).collect()
    }

    fn page(&self, page: TablePage) -> &Page {
        &self.pages[(page.hpa().get() >> SHIFT) as usize - 1]
    }

    fn entry(&self, at: At) -> &AtomicU64 {
        let page = self.page(at.page());
        assert!(
            page.allocated.load(Ordering::SeqCst),
            "{at:?} used after free"
        );
        &page.entries[at.index()]
    }

    pub(crate) fn allocate(&self) -> Option<TablePage> {
        self.pages.iter().enumerate().find_map(|(number, page)| {
            page.allocated
                .compare_exchange(false, true, Ordering::SeqCst, Ordering::SeqCst)
                .ok()
                // SAFETY: the arena lives as long as any table of a test, and checks each access.
                .map(|_| unsafe { TablePage::assume(Hpa::new((number as u64 + 1) << SHIFT)) })
        })
    }

    pub(crate) fn free(&self, page: TablePage) {
        assert!(
            self.page(page).allocated.swap(false, Ordering::SeqCst),
            "freed twice"
        );
    }

    pub(crate) fn allocated(&self) -> usize {
        self.pages
            .iter()
            .filter(|page| page.allocated.load(Ordering::SeqCst))
            .count()
    }

    /// A root of `pages` consecutive pages, the first that are taken from the arena.
    pub(crate) fn root<F: Format>(&self, pages: usize) -> RootTable {
        let allocated: Vec<_> = (0..pages).map(|_| self.allocate().unwrap()).collect();
        for &page in &allocated {
            self.fill(page, F::ENTRIES, F::EMPTY);
        }
        RootTable {
            page: allocated[0],
            height: F::MAX_HEIGHT,
            pages,
        }
    }

    pub(crate) fn table<F: Format>(&self, root: RootTable) -> Table<'_, F, Self> {
        // SAFETY: the arena checks each access.
        unsafe { Table::new(self, root) }
    }
}

impl Storage for Arena {
    fn load(&self, at: At) -> u64 {
        self.entry(at).load(Ordering::Acquire)
    }

    fn store(&self, at: At, value: u64) {
        self.entry(at).store(value, Ordering::Release);
    }

    fn swap(&self, at: At, value: u64) -> u64 {
        self.entry(at).swap(value, Ordering::AcqRel)
    }

    fn compare_exchange(&self, at: At, old: u64, new: u64) -> Result<(), u64> {
        let entry = self.entry(at);
        entry
            .compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire)
            .map(|_| ())
    }

    fn tracer(&self) -> Option<&dyn Tracer> {
        self.changes.is_some().then_some(self)
    }

    fn fill(&self, page: TablePage, entries: usize, value: u64) {
        for index in 0..entries {
            self.store(At::new(page, index), value);
        }
    }

    fn fill_with(&self, page: TablePage, range: Range<usize>, mut value: impl FnMut(usize) -> u64) {
        for (number, index) in range.enumerate() {
            self.store(At::new(page, index), value(number));
        }
    }

    fn update(&self, page: TablePage, range: Range<usize>, mut change: impl FnMut(u64) -> u64) {
        for at in range.map(|index| At::new(page, index)) {
            self.store(at, change(self.load(at)));
        }
    }
}

impl Tracer for Arena {
    fn changed(&self, change: Change) {
        if let Some(changes) = &self.changes {
            changes.lock().unwrap().push(change);
        }
    }
}

/// Takes pages straight from an arena, at most `limit`.
pub(crate) struct Source<'a> {
    pub(crate) arena: &'a Arena,
    pub(crate) limit: usize,
}

impl PageSource for Source<'_> {
    fn take(&mut self) -> Option<TablePage> {
        self.limit = self.limit.checked_sub(1)?;
        self.arena.allocate()
    }

    fn give_back(&mut self, page: TablePage) {
        self.limit += 1;
        self.arena.free(page);
    }
}
