//! Twofold's tables as a [`Mapper`]: the table engine with the MMU's leaves, used by one thread.
//!
//! UNSAFETY: table pages are raw memory, and nobody else uses these tables.
#![expect(unsafe_code)]

use crate::mapper::{Found, HOST_BASE, Mapper, Work};
use crate::pool;
use anyhow::{Context, Result, bail};
use std::ptr::NonNull;
use twofold_arch::{Gpa, Hpa, Level, PAGE_SIZE};
use twofold_mmu::Ept;
use twofold_mmu::spte::{AdBits, Leaf, Writable, without_write, writable};
use twofold_table::{
    BuildError, Cursor, Entry, Exclusive, Format, Height, PageAccess, PageSource, RawPages,
    RootTable, Storage, Table, TablePage,
};

/// Pages are reached at their own address.
struct Here;

// SAFETY: pages of the pool are as large as a table, aligned, never freed, and their address is
// exposed.
unsafe impl PageAccess for Here {
    #[inline(always)]
    fn table_ptr(&self, page: Hpa) -> NonNull<u64> {
        let pointer = std::ptr::with_exposed_provenance_mut(page.get() as usize);
        // SAFETY: no page of the pool is at zero.
        unsafe { NonNull::new_unchecked(pointer) }
    }
}

struct Pool;

impl PageSource for Pool {
    fn take(&mut self) -> Option<TablePage> {
        // SAFETY: a page of the pool is allocated for as long as the program runs.
        pool::take().map(|page| unsafe { TablePage::assume(Hpa::new(page)) })
    }

    fn give_back(&mut self, page: TablePage) {
        pool::give_back(page.hpa().get());
    }
}

/// The table engine as a [`Mapper`].
pub(crate) struct Tables {
    pages: RawPages<Here>,
    root: RootTable,
}

/// The leaf of this level for the page at guest-physical address 0; those of other pages differ in
/// the address only.
fn first_leaf(level: Level) -> u64 {
    let leaf = Leaf {
        hpa: Hpa::new(HOST_BASE),
        level,
        writable: Writable::Yes,
        executable: true,
        accessed: true,
        private: false,
        ad: AdBits::Hardware,
    };
    leaf.encode::<Ept>()
}

fn range(bytes: u64) -> std::ops::Range<Gpa> {
    Gpa::new(0)..Gpa::new(bytes)
}

impl Tables {
    pub(crate) fn new() -> Result<Self> {
        let pages = RawPages(Here);
        let page = Pool.take().context("a page for the root")?;
        pages.fill(page, Ept::ENTRIES, Ept::EMPTY);
        let root = RootTable {
            page,
            height: Height::from(Level::L512G),
            pages: 1,
        };
        Ok(Self { pages, root })
    }

    #[inline(always)]
    fn table(&self) -> Table<'_, Ept, RawPages<Here>> {
        // SAFETY: pages of the pool stay allocated, and tables are given back to it only with
        // `&mut self`.
        unsafe { Table::new(&self.pages, self.root) }
    }

    fn exclusive(&mut self) -> Exclusive<'_, Ept, RawPages<Here>> {
        // SAFETY: nobody else knows the root.
        unsafe { Exclusive::new(self.table()) }
    }

    fn free_tables(&mut self) {
        let end = self.table().end();
        self.exclusive()
            .zap(range(end), |page| Pool.give_back(page));
    }
}

impl Drop for Tables {
    fn drop(&mut self) {
        self.free_tables();
        Pool.give_back(self.root.page);
    }
}

impl Mapper for Tables {
    fn name(&self) -> &'static str {
        "twofold-table"
    }

    fn can(&self, _work: Work) -> bool {
        true
    }

    fn clear(&mut self) -> Result<()> {
        self.free_tables();
        Ok(())
    }

    fn map(&mut self, bytes: u64, level: Level) -> Result<()> {
        let first = first_leaf(level);
        let made = self.exclusive().map_range(
            range(bytes),
            level.into(),
            move |gpa: Gpa| first + gpa.get(),
            &mut Pool,
        );
        match made {
            Ok(count) if count == bytes / level.bytes() => Ok(()),
            other => bail!("{other:?}"),
        }
    }

    fn split(&mut self, bytes: u64) -> Result<()> {
        let first = first_leaf(Level::L4K);
        // As in the MMU: other threads may use the table meanwhile.
        let mut cursor = Cursor::new(self.table(), range(bytes));
        while let Some(seen) = cursor.next() {
            if seen.entry::<Ept>() != Entry::Leaf {
                continue;
            }
            let split = cursor.table().split(
                seen,
                move |gpa: Gpa| first + gpa.get(),
                0,
                &mut Pool,
                |_| {},
            );
            match split {
                Ok(()) => {}
                Err(BuildError::Raced) => cursor.again(),
                Err(BuildError::OutOfPages) => bail!("the pool is empty"),
            }
        }
        Ok(())
    }

    fn write_protect(&mut self, bytes: u64) -> Result<()> {
        self.exclusive()
            .update_leaves(range(bytes), |_, value| without_write::<Ept>(value));
        Ok(())
    }

    fn unmap(&mut self, bytes: u64) -> Result<()> {
        self.exclusive()
            .zap(range(bytes), |page| Pool.give_back(page));
        Ok(())
    }

    #[inline(always)]
    fn find(&self, gpa: u64) -> Option<Found> {
        let (entry, height) = self.table().find_leaf(Gpa::new(gpa))?;
        let page = Ept::leaf_address(entry, height).get();
        let offset = gpa & (Ept::bytes(height) - 1) & !(PAGE_SIZE - 1);
        Some(Found {
            hpa: page + offset,
            writable: writable::<Ept>(entry) == Some(Writable::Yes),
        })
    }
}
