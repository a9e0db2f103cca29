//! Finding entries of a TD's Secure EPT, and locking them.

// UNSAFETY: walks table pages; who may when is said at each function.
#![expect(unsafe_code)]

use super::entry::{HOST_PRIORITY, LOCKED, SeptEntry, State};
use super::format::SecureEpt;
use crate::platform::Platform;
use crate::status::{Operand, Status};
use core::ptr::NonNull;
use twofold_arch::{Gpa, Hpa};
use twofold_table::{
    Format, Height, PageAccess, RawPages, RootTable, Seen, Storage, Table, TablePage,
};

/// The platform's pages, as the table engine sees them.
#[repr(transparent)]
pub(crate) struct Pages<P>(P);

// SAFETY: `Platform` is unsafe to implement and promises the same of `table_ptr`.
unsafe impl<P: Platform> PageAccess for Pages<P> {
    fn table_ptr(&self, page: Hpa) -> NonNull<u64> {
        self.0.table_ptr(page)
    }
}

/// Where Secure EPT pages are.
#[repr(transparent)]
pub(crate) struct SeptPages<P>(RawPages<Pages<P>>);

impl<P: Platform> SeptPages<P> {
    pub(crate) const fn new(platform: P) -> Self {
        Self(RawPages(Pages(platform)))
    }

    pub(crate) fn platform(&self) -> &P {
        &self.0.0.0
    }

    /// Fills a page that is about to become a table.
    ///
    /// # Safety
    /// The page is private memory of the module that nobody else uses.
    pub(crate) unsafe fn fill(&self, page: Hpa, mut entry: impl FnMut(u64) -> SeptEntry) {
        // SAFETY: the caller's promise.
        let page = unsafe { TablePage::assume(page) };
        self.0.fill(page, SecureEpt::ENTRIES, SeptEntry::FREE.raw());
        let root = RootTable {
            page,
            height: Height::LEAF,
            pages: 1,
        };
        // SAFETY: the page alone is the table, and it is ours.
        let table = unsafe { Table::<SecureEpt, _>::new(&self.0, root) };
        for index in 0..SecureEpt::ENTRIES as u64 {
            let value = entry(index);
            if value != SeptEntry::FREE {
                let seen = table.lookup(Gpa::new(index << 12), Height::LEAF);
                let _ = table.exchange(seen, value.raw());
            }
        }
    }
}

/// A TD's Secure EPT: its root.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sept {
    root: RootTable,
}

/// Where a walk ended.
pub(crate) struct Walked<'s, P> {
    table: Table<'s, SecureEpt, RawPages<Pages<P>>>,
    seen: Seen,
}

impl Sept {
    /// A Secure EPT on an empty root page.
    ///
    /// # Safety
    /// The page was filled as a table and stays one as long as this is used.
    pub(crate) const unsafe fn new(root: Hpa, levels: u8) -> Self {
        Self {
            root: RootTable {
                // SAFETY: the caller's promise.
                page: unsafe { TablePage::assume(root) },
                height: Height::new(levels),
                pages: 1,
            },
        }
    }

    /// The root page.
    pub(crate) const fn page(&self) -> Hpa {
        self.root.page.hpa()
    }

    /// The level of the root's entries: 3 or 4.
    pub(crate) const fn root_level(&self) -> u8 {
        self.root.height.get() - 1
    }

    /// The table at `page` alone, whose entries are at `level`.
    ///
    /// # Safety
    /// The page is a table of this Secure EPT and is not taken away while the result is used.
    pub(crate) unsafe fn table_at(page: Hpa, level: u8) -> Self {
        Self {
            root: RootTable {
                // SAFETY: the caller's promise.
                page: unsafe { TablePage::assume(page) },
                height: Height::new(level + 1),
                pages: 1,
            },
        }
    }

    /// Walks towards the entry for `gpa` at `level` until it is reached or something that is not a
    /// table in use stands before it.
    ///
    /// # Safety
    /// No table may be taken away meanwhile: the caller holds the lock of the tree, or is the
    /// guest, inside, whose epoch has to pass before a table may go.
    pub(crate) unsafe fn walk<'s, P: Platform>(
        &self,
        pages: &'s SeptPages<P>,
        gpa: Gpa,
        level: u8,
    ) -> Walked<'s, P> {
        // SAFETY: the caller's promise.
        let table = unsafe { Table::new(&pages.0, self.root) };
        let seen = table.lookup(gpa, Height::new(level + 1));
        Walked { table, seen }
    }
}

/// Who asks for an entry's lock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Side {
    Host,
    Guest,
}

impl<'s, P: Platform> Walked<'s, P> {
    /// The level that was reached.
    pub(crate) const fn level(&self) -> u8 {
        self.seen.place().height().get() - 1
    }

    /// The entry as it was.
    pub(crate) const fn entry(&self) -> SeptEntry {
        SeptEntry::from_raw(self.seen.value())
    }

    /// Locks the entry. Nobody waits: a host that finds it locked claims it, and a guest that finds
    /// it claimed stands back (SPEC 5.7).
    ///
    /// # Errors
    /// `OPERAND_BUSY`, or for a guest `OPERAND_BUSY_HOST_PRIORITY`.
    pub(crate) fn lock(self, side: Side) -> Result<Locked<'s, P>, Status> {
        let busy = Status::OPERAND_BUSY.with(Operand::SeptEntry);
        let mut seen = self.seen;
        loop {
            let entry = SeptEntry::from_raw(seen.value());
            let claimed = entry.raw() & HOST_PRIORITY != 0;
            let (new, result) = match side {
                Side::Guest if claimed => {
                    return Err(Status::OPERAND_BUSY_HOST_PRIORITY.with(Operand::SeptEntry));
                }
                Side::Guest if entry.is_locked() => return Err(busy),
                Side::Host if entry.is_locked() && claimed => return Err(busy),
                Side::Host if entry.is_locked() => (entry.raw() | HOST_PRIORITY, Err(busy)),
                Side::Host => (entry.raw() & !HOST_PRIORITY | LOCKED, Ok(())),
                Side::Guest => (entry.raw() | LOCKED, Ok(())),
            };
            if self.table.exchange(seen, new).is_ok() {
                result?;
                return Ok(Locked {
                    table: self.table,
                    seen: self.table.look(*seen.place()),
                    old: entry.unlocked(),
                });
            }
            seen = self.table.look(*seen.place());
        }
    }
}

/// A locked entry. Dropped, it gets its old value back.
#[must_use = "the entry is locked until this is dropped"]
pub(crate) struct Locked<'s, P: Platform> {
    table: Table<'s, SecureEpt, RawPages<Pages<P>>>,
    seen: Seen,
    old: SeptEntry,
}

impl<P: Platform> Locked<'_, P> {
    /// The entry, without its lock.
    pub(crate) const fn entry(&self) -> SeptEntry {
        self.old
    }

    /// Its state. A value that the module never writes counts as free of nothing: as removed.
    pub(crate) fn state(&self) -> State {
        self.old.state().unwrap_or(State::Removed)
    }

    /// Unlocks with a new value. A claim that the host made meanwhile survives.
    pub(crate) fn publish(mut self, new: SeptEntry) {
        self.old = new;
    }
}

impl<P: Platform> Drop for Locked<'_, P> {
    fn drop(&mut self) {
        // Only the host's claim can change under the lock.
        loop {
            let claim = self.seen.value() & HOST_PRIORITY;
            let new = self.old.raw() | claim;
            if self.table.exchange(self.seen, new).is_ok() {
                return;
            }
            self.seen = self.table.look(*self.seen.place());
        }
    }
}
