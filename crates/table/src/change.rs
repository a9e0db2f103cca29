//! Changing entries, and what is owed afterwards.
//!
//! Every change is a compare-exchange from the value that was read. A change that takes something
//! away hands its duty to a [`Debt`]: translations that processors may hold must be flushed, and
//! tables that were taken out may be freed only after that and after every reader has passed. The
//! types make the order: `Debt::settle` wants the flush and gives [`Settled`], whose pages come out
//! against a [`Quiesced`].

use crate::format::{Entry, Format, Height, Replacement};
use crate::retire::{Leaves, RetiredList};
use crate::section::Quiesced;
use crate::storage::{Storage, TablePage};
use crate::trace::tell;
use crate::walk::{Seen, Table};
use core::ops::Range;
use twofold_arch::{Gpa, Hpa};

/// The entry was changed by someone else; this is its value now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Raced(pub u64);

/// What changes have left to do: a flush of the addresses that lost something, and tables that
/// wait to be freed.
#[must_use = "translations must be flushed and tables given back"]
#[derive(Debug)]
pub struct Debt<F> {
    /// The addresses from the first to before the second; none if the second is 0.
    flush: (u64, u64),
    retired: RetiredList<F>,
    leaves: Leaves,
}

impl<F: Format> Default for Debt<F> {
    fn default() -> Self {
        Self::none()
    }
}

impl<F: Format> Debt<F> {
    /// Nothing owed.
    pub const fn none() -> Self {
        Self {
            flush: (u64::MAX, 0),
            retired: RetiredList::new(),
            leaves: Leaves::new(),
        }
    }

    /// Whether nothing is owed.
    pub fn is_none(&self) -> bool {
        self.flush.1 == 0
    }

    /// Owes a flush of what `seen` covers.
    pub(crate) fn add_flush(&mut self, seen: &Seen) {
        let start = seen.place.gpa.get();
        let end = start.saturating_add(F::bytes(seen.place.height));
        self.flush = (self.flush.0.min(start), self.flush.1.max(end));
    }

    /// Pays: `flush` is called with the addresses concerned unless nothing is owed. It returns
    /// when no processor uses a translation older than the call.
    pub fn settle(self, flush: impl FnOnce(Range<Gpa>)) -> Settled<F> {
        if !self.is_none() {
            flush(Gpa::new(self.flush.0)..Gpa::new(self.flush.1));
        }
        Settled {
            retired: self.retired,
            leaves: self.leaves,
        }
    }

    pub(crate) fn add_table<S: Storage>(&mut self, storage: &S, page: TablePage, height: Height) {
        self.retired.push(storage, page, height, &mut self.leaves);
    }
}

/// A [`Debt`] whose flush is done.
#[must_use = "tables must be given back"]
#[derive(Debug)]
pub struct Settled<F> {
    retired: RetiredList<F>,
    leaves: Leaves,
}

impl<F: Format> Settled<F> {
    /// Whether there is no table to give back, so that nothing has to be waited for.
    pub fn is_empty(&self) -> bool {
        self.retired.is_empty()
    }

    /// Gives every table back through `free` and says how many leaves were taken out altogether,
    /// one by one and with their tables.
    pub fn reclaim<S: Storage>(
        self,
        _readers: &Quiesced,
        storage: &S,
        free: impl FnMut(TablePage),
    ) -> Leaves {
        let mut leaves = self.leaves;
        self.retired.reclaim(storage, &mut leaves, free);
        leaves
    }

    /// [`reclaim`](Self::reclaim) where there is no table to give back.
    ///
    /// # Errors
    /// `self`, if there is a table.
    pub fn leaves(self) -> Result<Leaves, Self> {
        if self.is_empty() {
            Ok(self.leaves)
        } else {
            Err(self)
        }
    }
}

/// An entry that only the holder may change: everybody else who meets it retries. Dropped without
/// [`publish`](Self::publish), it gets its old value back.
#[must_use = "the entry is locked until this is dropped"]
pub struct Frozen<'s, S: Storage> {
    storage: &'s S,
    seen: Seen,
}

impl<'s, S: Storage> Frozen<'s, S> {
    /// The entry and the value it had.
    pub const fn seen(&self) -> &Seen {
        &self.seen
    }

    /// Unlocks the entry with a new value.
    pub fn publish(self, value: u64) {
        self.storage.store(self.seen.place.at, value);
        tell(self.storage, &self.seen.place, self.seen.value, value);
        core::mem::forget(self);
    }

    pub(crate) const fn storage(&self) -> &'s S {
        self.storage
    }

    /// Leaves the entry locked; the caller has taken over to unlock it.
    pub(crate) fn leave_locked(self) -> Seen {
        let seen = self.seen;
        core::mem::forget(self);
        seen
    }
}

impl<S: Storage> Drop for Frozen<'_, S> {
    fn drop(&mut self) {
        self.storage.store(self.seen.place.at, self.seen.value);
    }
}

impl<'s, F: Format, S: Storage> Table<'s, F, S> {
    /// Puts `new` into an entry that maps nothing. No processor can hold a translation of it, so
    /// nothing is owed.
    ///
    /// # Errors
    /// [`Raced`] if the entry is no longer what was seen, or is frozen.
    #[inline(always)]
    pub fn install(&self, seen: Seen, new: u64) -> Result<(), Raced> {
        let entry = seen.entry::<F>();
        debug_assert!(
            !matches!(entry, Entry::Leaf | Entry::Table(_)),
            "not an empty entry"
        );
        if entry == Entry::Frozen {
            return Err(Raced(seen.value));
        }
        self.exchange(seen, new)
    }

    /// Gives a leaf more permission, or changes bits that no processor reads. Nothing is owed: a
    /// processor with the old translation faults and finds the new one.
    ///
    /// # Errors
    /// [`Raced`] if the entry is no longer what was seen.
    #[inline]
    pub fn widen(&self, seen: Seen, new: u64) -> Result<(), Raced> {
        debug_assert!(
            self.same_page(seen, new),
            "a leaf never changes its page in place"
        );
        self.exchange(seen, new)
    }

    /// Takes permission from a leaf.
    ///
    /// # Errors
    /// [`Raced`] if the entry is no longer what was seen; then nothing is owed.
    #[inline]
    pub fn shrink(&self, seen: Seen, new: u64, debt: &mut Debt<F>) -> Result<(), Raced> {
        debug_assert!(
            self.same_page(seen, new),
            "a leaf never changes its page in place"
        );
        self.exchange(seen, new)?;
        debt.add_flush(&seen);
        Ok(())
    }

    /// Empties an entry that is a leaf, a table or special. A table goes to the debt's list with
    /// everything below it.
    ///
    /// # Errors
    /// [`Raced`] if the entry is no longer what was seen, or is frozen; then nothing is owed.
    pub fn remove(&self, seen: Seen, debt: &mut Debt<F>) -> Result<(), Raced> {
        let entry = seen.entry::<F>();
        if entry == Entry::Frozen {
            return Err(Raced(seen.value));
        }
        self.exchange(seen, F::EMPTY)?;
        match (entry, seen.place.height.below()) {
            (Entry::Table(child), Some(below)) => {
                debt.add_flush(&seen);
                debt.add_table(self.storage, TablePage::found(child), below);
            }
            (Entry::Leaf, _) => {
                debt.add_flush(&seen);
                debt.leaves.add(seen.place.height, 1);
            }
            _ => {}
        }
        Ok(())
    }

    /// Replaces a leaf or a table by another one without a moment in which the entry is empty.
    /// Where the format demands break-before-make, the entry is locked meanwhile and `flush` is
    /// called in between; elsewhere a flush is added to the debt. A table that was replaced goes to
    /// the debt's list.
    ///
    /// # Errors
    /// [`Raced`] if the entry is no longer what was seen, or is frozen; then nothing is owed.
    pub fn replace(
        &self,
        seen: Seen,
        new: u64,
        debt: &mut Debt<F>,
        flush: impl FnOnce(Range<Gpa>),
    ) -> Result<(), Raced> {
        let entry = seen.entry::<F>();
        match F::REPLACEMENT {
            Replacement::Direct => {
                if entry == Entry::Frozen {
                    return Err(Raced(seen.value));
                }
                self.exchange(seen, new)?;
                debt.add_flush(&seen);
            }
            Replacement::BreakBeforeMake => {
                let frozen = self.freeze(seen)?;
                let start = seen.place.gpa;
                let end = start.get().saturating_add(F::bytes(seen.place.height));
                flush(start..Gpa::new(end));
                frozen.publish(new);
            }
        }
        if let (Entry::Table(child), Some(below)) = (entry, seen.place.height.below()) {
            debt.add_table(self.storage, TablePage::found(child), below);
        }
        Ok(())
    }

    /// Takes the root itself out, with everything below it: for a root that no processor has
    /// loaded, or will not after the flush that this owes.
    pub fn retire_root(self, debt: &mut Debt<F>) {
        for number in 0..self.root.pages as u64 {
            let page = Hpa::new(self.root.page.hpa().get() + (number << F::GRANULE_SHIFT));
            debt.add_table(self.storage, TablePage::found(page), self.root.height);
        }
        debt.flush = (0, self.end());
    }

    /// Locks an entry.
    ///
    /// # Errors
    /// [`Raced`] if the entry is no longer what was seen, or is frozen already.
    pub fn freeze(&self, seen: Seen) -> Result<Frozen<'s, S>, Raced> {
        if seen.entry::<F>() == Entry::Frozen {
            return Err(Raced(seen.value));
        }
        self.storage
            .compare_exchange(seen.place.at, seen.value, F::FROZEN)
            .map_err(Raced)?;
        Ok(Frozen {
            storage: self.storage,
            seen,
        })
    }

    /// Exchanges an entry for anything, without an account of what that owes: for an owner that
    /// keeps its own, as the TDX module does by TLB epochs.
    ///
    /// # Errors
    /// [`Raced`] if the entry is no longer what was seen.
    #[inline(always)]
    pub fn exchange(&self, seen: Seen, new: u64) -> Result<(), Raced> {
        self.storage
            .compare_exchange(seen.place.at, seen.value, new)
            .map_err(Raced)?;
        tell(self.storage, &seen.place, seen.value, new);
        Ok(())
    }

    fn same_page(&self, seen: Seen, new: u64) -> bool {
        let height = seen.place.height;
        seen.entry::<F>() == Entry::Leaf
            && F::decode(new, height) == Entry::Leaf
            && F::leaf_address(seen.value, height) == F::leaf_address(new, height)
    }
}
