//! What the models of interleavings have in common: an arena with a root, a reader, and threads
//! beside each other.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

use crate::build::BuildError;
use crate::change::{Debt, Settled};
use crate::format::{Entry, Format, Height};
use crate::retire::Leaves;
use crate::section::{Quiesced, ReaderWord, Section, wait_for_readers};
use crate::sync::atomic::{AtomicBool, Ordering, fence};
use crate::testing::{Arena, Source};
use crate::toy::SHIFT;
use crate::walk::{RootTable, Table};
use loom::sync::Arc;
use loom::thread;
use twofold_arch::Gpa;

/// Runs `work` in a thread of its own.
pub(crate) fn beside<R: 'static>(
    world: &Arc<World>,
    work: impl FnOnce(Arc<World>) -> R + 'static,
) -> thread::JoinHandle<R> {
    let world = Arc::clone(world);
    thread::spawn(move || work(world))
}

pub(crate) fn gpa(page: u64) -> Gpa {
    Gpa::new(page << SHIFT)
}

pub(crate) fn source(arena: &Arena) -> Source<'_> {
    Source { arena, limit: 100 }
}

pub(crate) fn map<F: Format>(table: &Table<'_, F, Arena>, page: u64, value: u64) -> bool {
    loop {
        let seen = table.lookup(gpa(page), Height::LEAF);
        match seen.entry::<F>() {
            Entry::Empty => {}
            Entry::Frozen => {
                thread::yield_now();
                continue;
            }
            _ => return false,
        }
        let mut source = source(table.storage);
        match table.link_leaf(seen, gpa(page), Height::LEAF, value, &mut source) {
            Ok(_) => return true,
            Err(BuildError::Raced) => {}
            Err(BuildError::OutOfPages) => panic!("the arena is too small"),
        }
    }
}

/// Frees everything and makes sure that nothing is left.
pub(crate) fn finish<F: Format>(arena: &Arena, root: RootTable) {
    let mut debt = Debt::none();
    arena.table::<F>(root).retire_root(&mut debt);
    let readers = wait_for_readers([].into_iter(), || {});
    debt.settle(|_| {})
        .reclaim(&readers, arena, |page| arena.free(page));
    assert_eq!(arena.allocated(), 0, "pages leaked");
}

pub(crate) struct World {
    pub(crate) arena: Arena,
    pub(crate) root: RootTable,
    pub(crate) reader: ReaderWord,
    pub(crate) zapping: AtomicBool,
}

impl World {
    pub(crate) fn new<F: Format>(pages: usize) -> Arc<Self> {
        let arena = Arena::new(pages);
        let root = arena.root::<F>(1);
        let reader = ReaderWord::new();
        Arc::new(Self {
            arena,
            root,
            reader,
            zapping: AtomicBool::new(false),
        })
    }

    pub(crate) fn table<F: Format>(&self) -> Table<'_, F, Arena> {
        self.arena.table::<F>(self.root)
    }

    /// The heavy barrier, and the wait for the reader.
    pub(crate) fn synchronize(&self) -> Quiesced {
        fence(Ordering::SeqCst);
        wait_for_readers([&self.reader].into_iter(), thread::yield_now)
    }

    /// Opens the read section of the one thread that has the reader.
    pub(crate) fn section(&self) -> Section<'_> {
        // UNSAFETY: each model gives the word to one thread.
        #[expect(unsafe_code)]
        // SAFETY: the only user of the word.
        unsafe {
            self.reader.enter()
        }
    }

    /// Flushes, waits for the reader, and gives every table back.
    pub(crate) fn pay<F: Format>(&self, debt: Debt<F>) -> Leaves {
        let settled: Settled<F> = debt.settle(|_| {});
        let readers = self.synchronize();
        settled.reclaim(&readers, &self.arena, |page| self.arena.free(page))
    }
}
