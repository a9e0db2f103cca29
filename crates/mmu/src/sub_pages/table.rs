//! The sub-page permission table of an address space: made of what the access maps say.

use super::SubPageError;
use crate::fault::{FaultError, Outcome};
use crate::format::MmuFormat;
use crate::host::Host;
use crate::mmu::{Mmu, Writer};
use crate::reader::Reader;
use crate::region::ADDRESS_SPACES;
use crate::root::{Root, RootRole};
use crate::tables::Pages;
use core::ops::Range;
use twofold_arch::sppt::{self, AccessMap, WriteVector};
use twofold_arch::{Gfn, Gpa, Hpa, Level};
use twofold_table::sppt::{Sppt, cut, is_cut};
use twofold_table::{BuildError, Cursor, Debt, Entry, Format, Height, RootTable, Storage, Table};

/// Entries that point to tables of vectors, 2M each.
const REGIONS: Height = Height::new(2);
/// The vector of a frame that is not protected, as most are.
const FULL: u64 = WriteVector::new(AccessMap::FULL).0;
/// What a region needs at most that is missed for the first time: a table on each level below the
/// root.
const TABLES: usize = Sppt::MAX_HEIGHT.get() as usize - 1;

impl<F: MmuFormat, H: Host> Mmu<F, H> {
    /// An empty table for each address space.
    pub(super) fn new_sppt_roots(&self) -> Result<[RootTable; ADDRESS_SPACES], SubPageError> {
        let mut pages = [Hpa::new(0); ADDRESS_SPACES];
        for number in 0..ADDRESS_SPACES {
            let Some(page) = self.host().alloc_table() else {
                for page in &pages[..number] {
                    self.host().free_table(*page);
                }
                return Err(SubPageError::OutOfMemory);
            };
            pages[number] = page;
        }
        Ok(pages.map(|page| {
            let root = self.root_table(page, Sppt::MAX_HEIGHT);
            self.pages.fill(root.page, Sppt::ENTRIES, Sppt::EMPTY);
            root
        }))
    }

    /// Where the sub-page permission table for this role is: what goes into SPPTP. `None` until
    /// [`enable_sub_pages`](Self::enable_sub_pages); the same from then on.
    pub fn sppt_root(&self, role: RootRole) -> Option<Hpa> {
        let roots = self.sub_pages.roots.get()?;
        Some(roots.get(usize::from(role.as_id()))?.page.hpa())
    }

    /// Resolves an SPPT miss (exit reason 66): fills the 2M region of the table around `gpa` from
    /// the access maps. [`Outcome::Fixed`], or [`Outcome::Spurious`] if somebody was faster. Takes
    /// the writers' lock, so that no change of the maps can come between reading and publishing
    /// them.
    ///
    /// # Errors
    /// [`FaultError::OutOfMemory`]; nothing has changed then.
    ///
    /// # Panics
    /// If `reader` belongs to another MMU.
    pub fn sppt_miss(
        &self,
        reader: &mut Reader,
        root: &Root,
        gpa: Gpa,
    ) -> Result<Outcome, FaultError> {
        let (_, _, memory) = reader.parts(self.id);
        if !memory.pool.fill(self.host(), TABLES) {
            return Err(FaultError::OutOfMemory);
        }
        let as_id = root.role().as_id();
        let writer = self.lock();
        let (Some(table), Some(maps)) = (
            self.sppt_locked(as_id, &writer),
            self.sub_pages.maps.get(usize::from(as_id)),
        ) else {
            return Ok(Outcome::Spurious);
        };
        if gpa.get() >= sppt::END {
            return Ok(Outcome::Spurious);
        }
        let start = gpa.get() & !(Level::L2M.bytes() - 1);
        let seen = table.lookup(gpa, REGIONS);
        if matches!(seen.entry::<Sppt>(), Entry::Table(_)) {
            return Ok(Outcome::Spurious);
        }
        let region = maps.region(gpa.frame());
        let vector = |gpa: Gpa| match region.get(gpa.frame()) {
            AccessMap::FULL => FULL,
            map => WriteVector::new(map).0,
        };
        let range = Gpa::new(start)..Gpa::new(start + Level::L2M.bytes());
        match table.link_range(seen, range, Height::LEAF, vector, &mut memory.pool) {
            Ok(()) => Ok(Outcome::Fixed { level: Level::L2M }),
            Err(BuildError::OutOfPages) => Err(FaultError::OutOfMemory),
            Err(BuildError::Raced) => Ok(Outcome::Retry),
        }
    }

    /// Cuts the processors off from the vectors of every region that `gfns` touch. Returns whether
    /// there were any; then a flush is owed, and after it
    /// [`remove_cut_vectors`](Self::remove_cut_vectors).
    pub(super) fn cut_vectors(&self, writer: &Writer<F>, as_id: u16, gfns: &Range<Gfn>) -> bool {
        let mut any = false;
        self.for_each_region(writer, as_id, gfns, |table, seen| {
            any = true;
            table.exchange(seen, cut(seen.value()))
        });
        any
    }

    /// Gives back the vectors that were cut off and flushed.
    pub(super) fn remove_cut_vectors(&self, writer: &Writer<F>, as_id: u16, gfns: &Range<Gfn>) {
        let mut debt = Debt::none();
        self.for_each_region(writer, as_id, gfns, |table, seen| {
            match is_cut(seen.value()) {
                true => table.remove(seen, &mut debt),
                false => Ok(()),
            }
        });
        self.give_back_vectors(writer, debt);
    }

    /// Gives back tables that no processor walks any more.
    fn give_back_vectors(&self, writer: &Writer<F>, debt: Debt<Sppt>) {
        let tables = debt.settle(|_| {});
        let readers = self.wait_for_readers(writer);
        let _vectors = tables.reclaim(&readers, &self.pages, |page| {
            self.host().free_table(page.hpa());
        });
    }

    /// Gives whole tables back. No processor uses them any more.
    pub(crate) fn give_back_sppts(
        &self,
        writer: &Writer<F>,
        roots: Option<[RootTable; ADDRESS_SPACES]>,
    ) {
        let mut debt = Debt::none();
        for root in roots.into_iter().flatten() {
            self.sppt_below(root, writer).retire_root(&mut debt);
        }
        self.give_back_vectors(writer, debt);
    }

    /// Calls `visit` for each entry that points to vectors of `gfns`, again if it had changed.
    fn for_each_region(
        &self,
        writer: &Writer<F>,
        as_id: u16,
        gfns: &Range<Gfn>,
        mut visit: impl FnMut(
            &Table<'_, Sppt, Pages<H>>,
            twofold_table::Seen,
        ) -> Result<(), twofold_table::Raced>,
    ) {
        let Some(table) = self.sppt_locked(as_id, writer) else {
            return;
        };
        let mut cursor = Cursor::new(table, gfns.start.address()..gfns.end.address());
        while let Some(seen) = cursor.next() {
            if seen.place().height() != REGIONS || !matches!(seen.entry::<Sppt>(), Entry::Table(_))
            {
                continue;
            }
            cursor.skip();
            if visit(&cursor.table(), seen).is_err() {
                cursor.again();
            }
        }
    }
}
