//! A table that nobody else uses: plain loads and stores instead of exchanges.

// UNSAFETY: `Exclusive::new` declares what the caller owes; nothing is dereferenced here.
#![expect(unsafe_code)]

use crate::build::{BuildError, PageSource};
use crate::format::{Entry, Format, Height};
use crate::retire::Leaves;
use crate::storage::{At, Storage, TablePage};
use crate::walk::Table;
use core::ops::Range;
use twofold_arch::Gpa;

/// The right to change a table that no other thread reaches and no processor walks or holds
/// translations of: before a virtual processor has loaded it, or after the last is gone. Nothing is
/// ever owed.
pub struct Exclusive<'s, F, S> {
    table: Table<'s, F, S>,
}

/// What is done to the entries of a range.
trait Visit<S> {
    /// A part of a table that holds leaves only: `range` of `page`.
    fn leaves(&mut self, storage: &S, page: TablePage, range: Range<usize>);
    /// An entry above the smallest leaves, with the value that it has. `covered` if the range covers
    /// it. Returns whether to visit the table below it.
    fn entry(&mut self, storage: &S, at: At, height: Height, value: u64, covered: bool) -> bool;
}

impl<'s, F: Format, S: Storage> Exclusive<'s, F, S> {
    /// Exclusive use of `table`.
    ///
    /// # Safety
    /// As long as the value is used, no other thread may use the table in any way, and no
    /// processor may walk it or use a translation that it found there.
    pub const unsafe fn new(table: Table<'s, F, S>) -> Self {
        Self { table }
    }

    /// The table, to look at it.
    pub const fn table(&self) -> &Table<'s, F, S> {
        &self.table
    }

    /// [`Table::map_range`], alone.
    ///
    /// # Errors
    /// [`BuildError::OutOfPages`]: what was built so far stays.
    pub fn map_range(
        &mut self,
        range: Range<Gpa>,
        target: Height,
        leaf: impl Fn(Gpa) -> u64 + Copy,
        pages: &mut impl PageSource,
    ) -> Result<u64, BuildError> {
        self.table.map_range(range, target, leaf, pages)
    }

    /// Changes every leaf that lies in `range`, wholly or in part: `change` is given its height and
    /// value. Where it maps must stay.
    pub fn update_leaves(&mut self, range: Range<Gpa>, change: impl FnMut(Height, u64) -> u64) {
        struct Update<F, C>(C, core::marker::PhantomData<fn() -> F>);

        impl<F: Format, S: Storage, C: FnMut(Height, u64) -> u64> Visit<S> for Update<F, C> {
            #[inline]
            fn leaves(&mut self, storage: &S, page: TablePage, range: Range<usize>) {
                storage.update(page, range, |value| match F::decode(value, Height::LEAF) {
                    Entry::Leaf => (self.0)(Height::LEAF, value),
                    _ => value,
                });
            }

            fn entry(&mut self, storage: &S, at: At, height: Height, value: u64, _: bool) -> bool {
                match F::decode(value, height) {
                    Entry::Leaf => {
                        storage.store(at, (self.0)(height, value));
                        false
                    }
                    _ => true,
                }
            }
        }

        self.visit(
            range,
            &mut Update::<F, _>(change, core::marker::PhantomData),
        );
    }

    /// Empties `range` and gives its tables back at once. A leaf that is only partly in the range
    /// goes as a whole. Returns how many leaves there were.
    pub fn zap(&mut self, range: Range<Gpa>, free: impl FnMut(TablePage)) -> Leaves {
        struct Zap<F, C> {
            free: C,
            leaves: Leaves,
            format: core::marker::PhantomData<fn() -> F>,
        }

        impl<F: Format, C: FnMut(TablePage)> Zap<F, C> {
            /// Gives back a table and everything below it.
            fn give_back<S: Storage>(&mut self, storage: &S, page: TablePage, height: Height) {
                let mut count = 0;
                for index in 0..F::ENTRIES {
                    let value = storage.load(At::new(page, index));
                    match F::decode(value, height) {
                        Entry::Leaf => count += 1,
                        Entry::Table(child) => {
                            if let Some(below) = height.below() {
                                self.give_back(storage, TablePage::found(child), below);
                            }
                        }
                        _ => {}
                    }
                }
                self.leaves.add(height, count);
                (self.free)(page);
            }
        }

        impl<F: Format, S: Storage, C: FnMut(TablePage)> Visit<S> for Zap<F, C> {
            fn leaves(&mut self, storage: &S, page: TablePage, range: Range<usize>) {
                let mut count = 0;
                storage.update(page, range, |value| {
                    count += u64::from(F::decode(value, Height::LEAF) == Entry::Leaf);
                    F::EMPTY
                });
                self.leaves.add(Height::LEAF, count);
            }

            fn entry(
                &mut self,
                storage: &S,
                at: At,
                height: Height,
                value: u64,
                covered: bool,
            ) -> bool {
                match (F::decode(value, height), height.below()) {
                    (Entry::Table(child), Some(below)) if covered => {
                        self.give_back(storage, TablePage::found(child), below);
                    }
                    (Entry::Table(_), _) => return true,
                    (Entry::Leaf, _) => self.leaves.add(height, 1),
                    _ => {}
                }
                storage.store(at, F::EMPTY);
                false
            }
        }

        let mut zap = Zap::<F, _> {
            free,
            leaves: Leaves::new(),
            format: core::marker::PhantomData,
        };
        self.visit(range, &mut zap);
        zap.leaves
    }

    fn visit(&mut self, range: Range<Gpa>, visit: &mut impl Visit<S>) {
        let end = range.end.get().min(self.table.end());
        let height = self.table.root.height;
        let size = F::bytes(height);
        let mut position = range.start.get();
        while position < end {
            let page = self.table.root_at(Gpa::new(position)).page();
            let beyond = (position | (F::bytes(height.above()) - 1))
                .saturating_add(1)
                .min(end);
            self.visit_table(page, height, position..beyond, visit);
            debug_assert!(
                beyond.is_multiple_of(size) || beyond == end,
                "within one root page"
            );
            position = beyond;
        }
    }

    /// Visits the entries of one table for a part of what it covers, which is not empty.
    fn visit_table(
        &self,
        page: TablePage,
        height: Height,
        range: Range<u64>,
        visit: &mut impl Visit<S>,
    ) {
        let storage = self.table.storage;
        let (from, to) = (
            F::index(Gpa::new(range.start), height),
            F::index(Gpa::new(range.end - 1), height),
        );
        let Some(below) = height.below() else {
            return visit.leaves(storage, page, from..to + 1);
        };
        let size = F::bytes(height);
        let mut position = range.start;
        for index in from..=to {
            let end = (position | (size - 1)).saturating_add(1).min(range.end);
            let at = At::new(page, index);
            let value = storage.load(at);
            let covered = end - position == size;
            if visit.entry(storage, at, height, value, covered)
                && let Entry::Table(child) = F::decode(value, height)
            {
                self.visit_table(TablePage::found(child), below, position..end, visit);
            }
            position = end;
        }
    }
}
