//! Building tables in private and publishing them with one exchange.

use crate::cursor::Cursor;
use crate::format::{Entry, Format, Height};
use crate::storage::{At, Storage, TablePage};
use crate::trace::tell_linked;
use crate::walk::{Place, Seen, Table};
use core::ops::Range;
use twofold_arch::Gpa;

/// Where new tables come from. Pages may have any content.
pub trait PageSource {
    /// A page for a table, or `None` when there is none at hand.
    fn take(&mut self) -> Option<TablePage>;

    /// Takes back a page that was not published.
    fn give_back(&mut self, page: TablePage);
}

/// Why tables could not be linked in. Nothing has changed and every page was given back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BuildError {
    /// The entry is no longer what was seen.
    Raced,
    /// The source ran out of pages.
    OutOfPages,
}

impl<F: Format, S: Storage> Table<'_, F, S> {
    /// Fills the gap between `seen`, an entry above `target` that maps nothing, and a mapping of
    /// `gpa` at `target`: the tables and the `leaf` are built in private and published with one
    /// exchange.
    /// Returns where the leaf is.
    ///
    /// # Errors
    /// See [`BuildError`].
    pub fn link_leaf(
        &self,
        seen: Seen,
        gpa: Gpa,
        target: Height,
        leaf: u64,
        pages: &mut impl PageSource,
    ) -> Result<Place, BuildError> {
        self.link_marked_leaf(seen, gpa, target, leaf, |_| 0, pages)
    }

    /// [`link_leaf`](Self::link_leaf) with bits of the software's own in the entries that point to
    /// the new tables: `mark` is given the height of each such entry. The format must not give
    /// the bits a meaning.
    ///
    /// # Errors
    /// See [`BuildError`].
    pub fn link_marked_leaf(
        &self,
        seen: Seen,
        gpa: Gpa,
        target: Height,
        leaf: u64,
        mark: impl Fn(Height) -> u64,
        pages: &mut impl PageSource,
    ) -> Result<Place, BuildError> {
        if seen.entry::<F>() == Entry::Frozen {
            return Err(BuildError::Raced);
        }
        let mut value = leaf;
        let mut height = target;
        let mut place = None;
        while height < seen.place.height {
            let Some(page) = pages.take() else {
                self.give_back_path(value, height, target, gpa, pages);
                return Err(BuildError::OutOfPages);
            };
            self.storage.fill(page, F::ENTRIES, F::EMPTY);
            let here = self.place(page, height, gpa);
            self.storage.store(here.at, value);
            place.get_or_insert(here);
            height = height.above();
            value = F::table_entry(page.hpa()) | mark(height);
        }
        match self
            .storage
            .compare_exchange(seen.place.at, seen.value, value)
        {
            Ok(()) => {
                tell_linked(self, &seen, value);
                Ok(place.unwrap_or(seen.place))
            }
            Err(_) => {
                self.give_back_path(value, height, target, gpa, pages);
                Err(BuildError::Raced)
            }
        }
    }

    /// Gives back the private tables below `value`, which would have stood at `height`.
    pub(crate) fn give_back_path(
        &self,
        mut value: u64,
        mut height: Height,
        target: Height,
        gpa: Gpa,
        pages: &mut impl PageSource,
    ) {
        while height > target {
            let (Entry::Table(child), Some(below)) = (F::decode(value, height), height.below())
            else {
                return;
            };
            let page = TablePage::found(child);
            value = self.storage.load(At::new(page, F::index(gpa, below)));
            height = below;
            pages.give_back(page);
        }
    }

    /// Maps the part of `range` that `seen` covers, an entry above `target` that maps nothing,
    /// with pages of the size of `target`: `leaf` makes the entry for each address. The range is
    /// aligned to that size. All tables are built in private and published with one exchange.
    ///
    /// # Errors
    /// See [`BuildError`].
    pub fn link_range(
        &self,
        seen: Seen,
        range: Range<Gpa>,
        target: Height,
        leaf: impl Fn(Gpa) -> u64 + Copy,
        pages: &mut impl PageSource,
    ) -> Result<(), BuildError> {
        let below = match seen.place.height.below() {
            Some(below) if below >= target => below,
            _ => return Err(BuildError::Raced),
        };
        if seen.entry::<F>() == Entry::Frozen {
            return Err(BuildError::Raced);
        }
        debug_assert!(
            (range.start.get() | range.end.get()) & (F::bytes(target) - 1) == 0,
            "the range has an end in the middle of a page"
        );
        let start = range.start.get().max(seen.place.gpa.get());
        let last = seen.place.gpa.get() + (F::bytes(seen.place.height) - 1);
        let end = (range.end.get() - 1).min(last);
        let page = self
            .build(below, target, start, end, leaf, pages)
            .ok_or(BuildError::OutOfPages)?;
        let value = F::table_entry(page.hpa());
        self.storage
            .compare_exchange(seen.place.at, seen.value, value)
            .map_err(|_| {
                self.give_back_tree(page, below, pages);
                BuildError::Raced
            })?;
        tell_linked(self, &seen, value);
        Ok(())
    }

    /// Maps what is not mapped yet in `range`, which is aligned to the pages of `target`, with
    /// such pages. Entries that are there already stay as they are. Returns how many
    /// leaves were made; others may come and go meanwhile.
    ///
    /// # Errors
    /// [`BuildError::OutOfPages`]: what was built so far stays.
    pub fn map_range(
        &self,
        range: Range<Gpa>,
        target: Height,
        leaf: impl Fn(Gpa) -> u64 + Copy,
        pages: &mut impl PageSource,
    ) -> Result<u64, BuildError> {
        let mut made = 0;
        let mut cursor = Cursor::new(*self, range.clone());
        while let Some(seen) = cursor.next() {
            let place = *seen.place();
            if seen.entry::<F>() != Entry::Empty {
                if place.height <= target {
                    cursor.skip();
                }
                continue;
            }
            let result = if place.height > target {
                self.link_range(seen, range.clone(), target, leaf, pages)
            } else {
                self.install(seen, leaf(place.gpa))
                    .map_err(|_| BuildError::Raced)
            };
            match result {
                Ok(()) => {
                    let end =
                        (place.gpa.get() + (F::bytes(place.height) - 1)).min(range.end.get() - 1);
                    let start = place.gpa.get().max(range.start.get());
                    made += (end - start + 1) >> F::shift(target);
                }
                Err(BuildError::Raced) => cursor.again(),
                Err(BuildError::OutOfPages) => return Err(BuildError::OutOfPages),
            }
        }
        Ok(made)
    }

    /// A private table at `height` with leaves at `target` for `start..=last`, all of which it
    /// covers.
    fn build(
        &self,
        height: Height,
        target: Height,
        start: u64,
        last: u64,
        leaf: impl Fn(Gpa) -> u64 + Copy,
        pages: &mut impl PageSource,
    ) -> Option<TablePage> {
        let page = pages.take()?;
        let size = F::bytes(height);
        let (from, to) = (
            F::index(Gpa::new(start), height),
            F::index(Gpa::new(last), height),
        );
        let leaves = height == target;
        // A table that will be full need not be emptied first.
        if from != 0 || to != F::ENTRIES - 1 || !leaves {
            self.storage.fill(page, F::ENTRIES, F::EMPTY);
        }
        if leaves {
            let first = start & !(size - 1);
            self.storage.fill_with(page, from..to + 1, |index| {
                leaf(Gpa::new(first + ((index as u64) << F::shift(height))))
            });
            return Some(page);
        }
        let below = height.below()?;
        let mut position = start;
        for index in from..=to {
            let end = (position | (size - 1)).min(last);
            let Some(child) = self.build(below, target, position, end, leaf, pages) else {
                self.give_back_tree(page, height, pages);
                return None;
            };
            self.storage
                .store(At::new(page, index), F::table_entry(child.hpa()));
            position = end.wrapping_add(1);
        }
        Some(page)
    }

    /// Gives back a private table and everything below it.
    fn give_back_tree(&self, page: TablePage, height: Height, pages: &mut impl PageSource) {
        if let Some(below) = height.below() {
            for index in 0..F::ENTRIES {
                let value = self.storage.load(At::new(page, index));
                if let Entry::Table(child) = F::decode(value, height) {
                    self.give_back_tree(TablePage::found(child), below, pages);
                }
            }
        }
        pages.give_back(page);
    }
}
