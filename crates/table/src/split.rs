//! Changing the size of mappings: a leaf becomes a table of smaller leaves, or a table one leaf,
//! and no access meets a hole in between where the format allows it.

use crate::build::{BuildError, PageSource};
use crate::change::{Debt, Raced};
use crate::format::{Entry, Format, Replacement};
use crate::storage::{Storage, TablePage};
use crate::walk::{Seen, Table};
use core::ops::Range;
use twofold_arch::Gpa;

impl<F: Format, S: Storage> Table<'_, F, S> {
    /// Replaces the leaf `seen` by a table of leaves one step smaller: `child` makes the entry for
    /// each address, and `mark` are bits of the software's own in the entry that points to the
    /// table. The table is complete before one exchange makes it visible.
    ///
    /// Each child maps its part of the leaf's page and allows whatever the leaf allowed, so that
    /// nothing is owed: a translation of the old leaf is as good as the new ones. A caller that
    /// wants to take permissions away does so afterwards.
    ///
    /// Where the format demands break-before-make, the entry is locked meanwhile and `flush` is
    /// called in between; elsewhere it is not called.
    ///
    /// # Errors
    /// See [`BuildError`]; [`BuildError::Raced`] also if `seen` is no leaf that can be split.
    #[inline]
    pub fn split(
        &self,
        seen: Seen,
        mut child: impl FnMut(Gpa) -> u64,
        mark: u64,
        pages: &mut impl PageSource,
        flush: impl FnOnce(Range<Gpa>),
    ) -> Result<(), BuildError> {
        let Some(below) = seen.place.height.below() else {
            return Err(BuildError::Raced);
        };
        if seen.entry::<F>() != Entry::Leaf {
            return Err(BuildError::Raced);
        }
        let page = pages.take().ok_or(BuildError::OutOfPages)?;
        let (first, shift) = (seen.place.gpa.get(), F::shift(below));
        self.storage.fill_with(page, 0..F::ENTRIES, |index| {
            child(Gpa::new(first + ((index as u64) << shift)))
        });
        self.debug_assert_children(seen, page);
        let table = F::table_entry(page.hpa()) | mark;
        let result = match F::REPLACEMENT {
            Replacement::Direct => self.exchange(seen, table),
            Replacement::BreakBeforeMake => self.freeze(seen).map(|frozen| {
                flush(seen.place.gpa..Gpa::new(first.saturating_add(F::bytes(seen.place.height))));
                frozen.publish(table);
            }),
        };
        result.map_err(|_| {
            pages.give_back(page);
            BuildError::Raced
        })
    }

    /// Replaces the table `seen` by one leaf of the size of everything below it. The table goes to
    /// the debt's list, and a flush is added to the debt: translations through the table may
    /// allow what the leaf does not, and processors may be about to walk it.
    ///
    /// Where the format demands break-before-make, the entry is locked meanwhile and `flush` is
    /// called in between.
    ///
    /// # Errors
    /// [`Raced`] if the entry is no longer what was seen; then nothing is owed.
    pub fn collapse(
        &self,
        seen: Seen,
        leaf: u64,
        debt: &mut Debt<F>,
        flush: impl FnOnce(Range<Gpa>),
    ) -> Result<(), Raced> {
        if !matches!(seen.entry::<F>(), Entry::Table(_)) || !F::may_map(seen.place.height) {
            return Err(Raced(seen.value));
        }
        debug_assert!(
            F::decode(leaf, seen.place.height) == Entry::Leaf,
            "a table collapses into a leaf"
        );
        self.replace(seen, leaf, debt, flush)
    }

    fn debug_assert_children(&self, seen: Seen, page: TablePage) {
        let Some(below) = seen.place.height.below() else {
            return;
        };
        let whole = F::leaf_address(seen.value, seen.place.height).get();
        for index in [0, F::ENTRIES - 1] {
            let value = self.storage.load(crate::storage::At::new(page, index));
            debug_assert!(
                F::decode(value, below) == Entry::Leaf
                    && F::leaf_address(value, below).get()
                        == whole + index as u64 * F::bytes(below),
                "a child maps another page than its part of the leaf"
            );
        }
    }
}
