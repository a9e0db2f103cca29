//! Table pages: where they come from, and the right to walk them.

// UNSAFETY: promises to the table engine that pages are allocated while they are walked.
#![expect(unsafe_code)]

use crate::format::MmuFormat;
use crate::host::Host;
use crate::mmu::{Mmu, Writer};
use crate::root::RootState;
use crate::sync::atomic::Ordering;
use core::ptr::NonNull;
use twofold_arch::{Gfn, Gpa, Hpa};
use twofold_table::sppt::Sppt;
use twofold_table::{
    Height, PageAccess, PageSource, Place, RawPages, RootTable, Section, Seen, Table, TablePage,
    Tracer,
};

/// The hypervisor, as the table engine sees it.
#[repr(transparent)]
pub(crate) struct Access<H>(pub(crate) H);

// SAFETY: `Host` is unsafe to implement and promises the same of `table_ptr`.
unsafe impl<H: Host> PageAccess for Access<H> {
    #[inline(always)]
    fn table_ptr(&self, page: Hpa) -> NonNull<u64> {
        self.0.table_ptr(page)
    }

    #[inline(always)]
    fn tracer(&self) -> Option<&dyn Tracer> {
        self.0.tracer()
    }
}

/// Table pages reached through the host.
pub(crate) type Pages<H> = RawPages<Access<H>>;

/// Pages that wait to become tables: what a fault needs at most, and a few more.
#[derive(Debug)]
pub(crate) struct Pool {
    pages: [Hpa; Self::CAPACITY],
    len: usize,
}

impl Pool {
    pub(crate) const CAPACITY: usize = 8;

    pub(crate) const fn new() -> Self {
        Self {
            pages: [Hpa::new(0); Self::CAPACITY],
            len: 0,
        }
    }

    /// Pages at hand.
    pub(crate) const fn len(&self) -> usize {
        self.len
    }

    /// Takes pages from the host until there are `count`, at most the capacity. Returns whether
    /// there are.
    pub(crate) fn fill(&mut self, host: &impl Host, count: usize) -> bool {
        let count = count.min(Self::CAPACITY);
        while self.len < count {
            let Some(page) = host.alloc_table() else {
                return false;
            };
            self.put(page);
        }
        true
    }

    /// Gives every page back to the host.
    pub(crate) fn drain(&mut self, host: &impl Host) {
        while let Some(page) = self.get() {
            host.free_table(page);
        }
    }

    fn get(&mut self) -> Option<Hpa> {
        self.len = self.len.checked_sub(1)?;
        self.pages.get(self.len).copied()
    }

    fn put(&mut self, page: Hpa) {
        if let Some(free) = self.pages.get_mut(self.len) {
            *free = page;
            self.len += 1;
        }
    }
}

impl PageSource for Pool {
    fn take(&mut self) -> Option<TablePage> {
        // SAFETY: pages in the pool came from the host and have not been given back.
        self.get().map(|page| unsafe { TablePage::assume(page) })
    }

    fn give_back(&mut self, page: TablePage) {
        self.put(page.hpa());
    }
}

/// The last leaf table that a reader found, and how to know that it still is one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LeafTable {
    root: TablePage,
    /// The guest frames it covers, in units of a table's.
    region: u64,
    /// [`Mmu::unlinked`] before it was found.
    epoch: u64,
    page: TablePage,
}

const REGION_SHIFT: u32 = 9;

impl<F: MmuFormat, H: Host> Mmu<F, H> {
    /// A root table on a page of its own.
    pub(crate) fn root_table(&self, page: Hpa, height: Height) -> RootTable {
        // SAFETY: the caller has just taken the page from the host and hands it over.
        let page = unsafe { TablePage::assume(page) };
        RootTable {
            page,
            height,
            pages: 1,
        }
    }

    /// The right to walk below `root` in a read section.
    #[inline(always)]
    pub(crate) fn table_in<'s>(
        &'s self,
        root: &RootState,
        _section: &'s Section<'_>,
    ) -> Table<'s, F, Pages<H>> {
        // SAFETY: tables are given back only after every section that began before they were
        // unlinked has ended (`pay`), root pages only when no `Root` exists; the caller has one.
        unsafe { Table::new(&self.pages, root.table) }.from(root.base)
    }

    /// The right to walk below `root` with the writers' lock.
    pub(crate) fn table_locked<'s>(
        &'s self,
        root: &RootState,
        _writer: &'s Writer<F>,
    ) -> Table<'s, F, Pages<H>> {
        // SAFETY: tables are unlinked under the lock, or by a fault that takes the lock before it
        // gives them back; so whoever holds the lock finds none that is given back meanwhile.
        unsafe { Table::new(&self.pages, root.table) }.from(root.base)
    }

    /// The right to walk the sub-page permission table of an address space with the writers' lock.
    /// `None` until sub-pages are enabled.
    pub(crate) fn sppt_locked<'s>(
        &'s self,
        as_id: u16,
        writer: &'s Writer<F>,
    ) -> Option<Table<'s, Sppt, Pages<H>>> {
        Some(self.sppt_below(self.sub_pages.root(as_id)?, writer))
    }

    /// The same of one that is or was an address space's.
    pub(crate) fn sppt_below<'s>(
        &'s self,
        root: RootTable,
        _writer: &'s Writer<F>,
    ) -> Table<'s, Sppt, Pages<H>> {
        // SAFETY: these tables are linked, unlinked and given back by holders of the lock alone,
        // their roots when the MMU is dropped.
        unsafe { Table::new(&self.pages, root) }
    }

    /// How often tables have been unlinked: a leaf table found under one value is still linked, or
    /// at least not freed, as long as a section reads that value.
    #[inline(always)]
    pub(crate) fn epoch(&self, _section: &Section<'_>) -> u64 {
        self.unlinked.load(Ordering::Acquire)
    }

    /// The entry for `gfn` in a leaf table that was remembered, if it covers it and is still valid.
    /// `epoch` was read in this section.
    #[inline(always)]
    pub(crate) fn look_again(
        table: &Table<'_, F, Pages<H>>,
        leaf_table: Option<LeafTable>,
        gfn: Gfn,
        epoch: u64,
    ) -> Option<Seen> {
        let leaf_table = leaf_table?;
        if leaf_table.region != gfn.get() >> REGION_SHIFT
            || leaf_table.epoch != epoch
            || leaf_table.root != table.root().page
        {
            return None;
        }
        // SAFETY: the table covers the frame. No table has been unlinked since it was found (the
        // epoch is raised after unlinking and before waiting for readers), so it will not be freed
        // while this section lasts.
        Some(unsafe { table.look_in_leaf_table(leaf_table.page, gfn.address()) })
    }

    /// Remembers the leaf table that holds `place`.
    #[inline(always)]
    pub(crate) fn remember(root: RootTable, place: &Place, gpa: Gpa, epoch: u64) -> LeafTable {
        LeafTable {
            root: root.page,
            region: gpa.frame().get() >> REGION_SHIFT,
            epoch,
            page: place.table(),
        }
    }
}
