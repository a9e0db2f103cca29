//! Building tables in private and publishing them with one exchange.

use crate::format::{Entry, Format, Height};
use crate::storage::{At, Storage, TablePage};
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
            value = F::table_entry(page.hpa());
            height = height.above();
        }
        match self
            .storage
            .compare_exchange(seen.place.at, seen.value, value)
        {
            Ok(()) => Ok(place.unwrap_or(seen.place)),
            Err(_) => {
                self.give_back_path(value, height, target, gpa, pages);
                Err(BuildError::Raced)
            }
        }
    }

    /// Gives back the private tables below `value`, which would have stood at `height`.
    fn give_back_path(
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

    /// Maps the part of `range` that `seen` covers, an entry above the leaves that maps nothing,
    /// with the smallest pages: `leaf` makes the entry for each address. All tables are built in
    /// private and published with one exchange.
    ///
    /// # Errors
    /// See [`BuildError`].
    pub fn link_range(
        &self,
        seen: Seen,
        range: Range<Gpa>,
        mut leaf: impl FnMut(Gpa) -> u64,
        pages: &mut impl PageSource,
    ) -> Result<(), BuildError> {
        let Some(below) = seen.place.height.below() else {
            return Err(BuildError::Raced);
        };
        if seen.entry::<F>() == Entry::Frozen {
            return Err(BuildError::Raced);
        }
        let start = range.start.get().max(seen.place.gpa.get());
        let last = seen.place.gpa.get() + (F::bytes(seen.place.height) - 1);
        let end = (range.end.get() - 1).min(last);
        let page = self
            .build(below, start, end, &mut leaf, pages)
            .ok_or(BuildError::OutOfPages)?;
        let value = F::table_entry(page.hpa());
        self.storage
            .compare_exchange(seen.place.at, seen.value, value)
            .map_err(|_| {
                self.give_back_tree(page, below, pages);
                BuildError::Raced
            })
    }

    /// A private table at `height` with leaves for `start..=last`, all of which it covers.
    fn build(
        &self,
        height: Height,
        start: u64,
        last: u64,
        leaf: &mut impl FnMut(Gpa) -> u64,
        pages: &mut impl PageSource,
    ) -> Option<TablePage> {
        let page = pages.take()?;
        let size = F::bytes(height);
        let (from, to) = (
            F::index(Gpa::new(start), height),
            F::index(Gpa::new(last), height),
        );
        // A table that will be full need not be emptied first.
        if from != 0 || to != F::ENTRIES - 1 || height != Height::LEAF {
            self.storage.fill(page, F::ENTRIES, F::EMPTY);
        }
        let mut position = start;
        for index in from..=to {
            let end = (position | (size - 1)).min(last);
            let value = match height.below() {
                None => leaf(Gpa::new(position)),
                Some(below) => match self.build(below, position, end, leaf, pages) {
                    Some(child) => F::table_entry(child.hpa()),
                    None => {
                        self.give_back_tree(page, height, pages);
                        return None;
                    }
                },
            };
            self.storage.store(At::new(page, index), value);
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
