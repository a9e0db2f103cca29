//! Tables that have been taken out wait in a list that lives in the tables themselves.
//!
//! Entry 0 of a waiting table holds a frozen value with the next table's address and its own
//! height ([`Format::link`]). What entry 0 held before must not be lost: if it was a table, that
//! table joins the list too. So a subtree is unlinked in a few exchanges, however large it is, and
//! taken apart later, when nobody can reach it any more, without memory and without recursion.

use crate::format::{Entry, Format, Height};
use crate::storage::{At, Storage, TablePage};
use core::marker::PhantomData;
use twofold_arch::Hpa;

/// How many leaves there were, by height.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Leaves([u64; 8]);

impl Leaves {
    pub(crate) const fn new() -> Self {
        Self([0; 8])
    }

    #[inline(always)]
    pub(crate) fn add(&mut self, height: Height, count: u64) {
        self.0[usize::from(height.get()) & 7] += count;
    }

    /// The number of leaves in tables at `height`.
    pub fn at(&self, height: Height) -> u64 {
        self.0.get(usize::from(height.get())).copied().unwrap_or(0)
    }
}

/// A list of tables with everything below them.
#[must_use = "tables must be given back"]
#[derive(Debug)]
pub(crate) struct RetiredList<F> {
    head: Option<Hpa>,
    format: PhantomData<fn() -> F>,
}

impl<F: Format> RetiredList<F> {
    pub(crate) const fn new() -> Self {
        Self {
            head: None,
            format: PhantomData,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.head.is_none()
    }

    /// Adds the table at `page`, which has been unlinked from its parent but may still be read, and
    /// written by a fault that came before. `height` is that of its entries. The leaf that entry 0
    /// held is counted now, since it is overwritten.
    ///
    /// No entry 0 on the way may be frozen by someone else.
    pub(crate) fn push<S: Storage>(
        &mut self,
        storage: &S,
        page: TablePage,
        height: Height,
        leaves: &mut Leaves,
    ) {
        self.link_in(page, height, leaves, |at, link| storage.swap(at, link));
    }

    fn link_in(
        &mut self,
        mut page: TablePage,
        mut height: Height,
        leaves: &mut Leaves,
        exchange: impl Fn(At, u64) -> u64,
    ) {
        loop {
            let old = exchange(At::new(page, 0), F::link(self.head, height));
            self.head = Some(page.hpa());
            match (F::decode(old, height), height.below()) {
                (Entry::Table(child), Some(below)) => {
                    page = TablePage::found(child);
                    height = below;
                }
                (Entry::Leaf, _) => return leaves.add(height, 1),
                _ => return,
            }
        }
    }

    /// Takes everything apart. Nobody else can reach it.
    pub(crate) fn reclaim<S: Storage>(
        mut self,
        storage: &S,
        leaves: &mut Leaves,
        mut free: impl FnMut(TablePage),
    ) {
        while let Some(head) = self.head {
            let page = TablePage::found(head);
            let (next, height) = F::link_target(storage.load(At::new(page, 0)));
            self.head = next;
            let mut count = 0;
            for index in 1..F::ENTRIES {
                let value = storage.load(At::new(page, index));
                match F::decode(value, height) {
                    Entry::Leaf => count += 1,
                    Entry::Table(child) => {
                        let Some(below) = height.below() else {
                            continue;
                        };
                        self.link_in(TablePage::found(child), below, leaves, |at, link| {
                            let old = storage.load(at);
                            storage.store(at, link);
                            old
                        });
                    }
                    _ => {}
                }
            }
            leaves.add(height, count);
            free(page);
        }
    }
}
