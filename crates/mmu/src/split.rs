//! Splitting huge leaves: one by one when a fault needs smaller ones, or all of a range before they
//! are needed (SPEC 6.7).
//!
//! The table of smaller leaves is complete before it is exchanged for the leaf, so that the guest
//! never meets a hole and loses nothing; and since the small leaves allow what the large one
//! allowed, nothing has to be flushed.

use crate::format::MmuFormat;
use crate::host::Host;
use crate::mmu::Mmu;
use crate::page_size::smaller_leaf;
use crate::root::RootState;
use crate::spte::{self, PRIVATE};
use crate::sync::atomic::Ordering;
use crate::tables::{Pages, Pool};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;
use twofold_arch::{Gfn, Gpa, Level};
use twofold_table::{BuildError, Cursor, Entry, Height, PageSource, Seen, Table};

impl<F: MmuFormat, H: Host> Mmu<F, H> {
    /// Splits the huge leaf `seen` into leaves one level smaller. `mark` goes into the entry of the
    /// new table; `executable` gives 4K leaves the right to be executed. 4K leaves of the address
    /// space `as_id` obey the sub-pages' protection.
    pub(crate) fn split_leaf(
        &self,
        as_id: u16,
        table: &Table<'_, F, Pages<H>>,
        seen: Seen,
        mark: u64,
        executable: bool,
        pages: &mut impl PageSource,
    ) -> Result<(), BuildError> {
        let place = seen.place();
        let (Some(from), Some(to)) = (
            Level::from_number(place.height().get()),
            place
                .height()
                .below()
                .and_then(|below| Level::from_number(below.get())),
        ) else {
            return Err(BuildError::Raced);
        };
        let first = smaller_leaf::<F>(seen.value(), to, executable);
        let start = place.gpa().get();
        let may_guard = to == Level::L4K
            && first & PRIVATE == 0
            && self.guards(as_id, place.gpa().frame(), from);
        let child = |gpa: Gpa| {
            let guarded = may_guard && self.guards(as_id, gpa.frame(), to);
            let leaf = first + (gpa.get() - start);
            if guarded {
                spte::guarded::<F>(leaf, guarded)
            } else {
                leaf
            }
        };
        // Formats of this crate are replaced in one exchange, without a flush in between.
        table.split(seen, child, mark, pages, |_| {})?;
        self.count_resized(to, 1 << F::INDEX_BITS, from);
        Ok(())
    }

    /// Counts `made` leaves at `to` in the place of one at `from`.
    fn count_resized(&self, to: Level, made: u64, from: Level) {
        let at = |level: Level| usize::from(level.number()) - 1;
        if let (Some(mapped), Some(unmapped)) =
            (self.mapped.get(at(to)), self.unmapped.get(at(from)))
        {
            mapped.fetch_add(made, Ordering::Relaxed);
            unmapped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The roots of an address space, to be visited one by one while the lock is given up in
    /// between.
    pub(crate) fn roots_of(&self, as_id: u16) -> Vec<Arc<RootState>> {
        let writer = self.lock();
        let roots = writer.direct_roots(as_id);
        roots
            .filter(|root| !root.is_obsolete())
            .map(Arc::clone)
            .collect()
    }

    /// Splits every huge leaf of `gfns` down to 4K, a few at a time: faults and changes of host
    /// memory have their turn in between. Ends early and quietly without memory for
    /// tables; the leaves that are left are split when they are written.
    ///
    /// The caller holds the slots' lock and not the writers'.
    pub(crate) fn split_range(&self, as_id: u16, gfns: Range<Gfn>) {
        let mut pages = Pool::new();
        for root in self.roots_of(as_id) {
            let mut position = Some(gfns.start.address());
            while let Some(start) = position {
                position = self.split_some(&root, start..gfns.end.address(), &mut pages);
                // Where nothing is to be split no page is asked for.
                if position.is_some() && !pages.fill(self.host(), Pool::CAPACITY) {
                    break;
                }
            }
        }
        pages.drain(self.host());
    }

    /// Splits until the range or the pages at hand end. Returns where to go on.
    fn split_some(&self, root: &RootState, range: Range<Gpa>, pages: &mut Pool) -> Option<Gpa> {
        let writer = self.lock();
        if root.is_obsolete() {
            return None;
        }
        let mut cursor = Cursor::new(self.table_locked(root, &writer), range.clone());
        while let Some(seen) = cursor.next() {
            let height = seen.place().height();
            match seen.entry::<F>() {
                // Only small leaves below.
                Entry::Table(_) if height == Height::from(Level::L2M) => cursor.skip(),
                Entry::Leaf if height > Height::LEAF => {
                    let as_id = root.role.as_id();
                    let executable = self.nx_huge_pages();
                    match self.split_leaf(as_id, &cursor.table(), seen, 0, executable, pages) {
                        // Read it again: a table now, with leaves to split or not.
                        Ok(()) | Err(BuildError::Raced) => cursor.again(),
                        // A leaf may begin before the range.
                        Err(BuildError::OutOfPages) => {
                            return Some(seen.place().gpa().max(range.start));
                        }
                    }
                }
                _ => {}
            }
        }
        None
    }
}
