//! Changing valid entries of formats that demand break-before-make.
//!
//! Two processors, or two parts of one, must never hold different translations of an address. So
//! where a valid entry is to say something else, it is first made invalid, every TLB forgets it,
//! and only then the new value is written:
//!
//! ```text
//!   valid ──break_entry──> locked ──invalidate──> locked, in no TLB ──make──> new value
//!     ^                      │ Broken                 │ Gap
//!     └──────── drop ────────┘                        └── drop: empty
//! ```
//!
//! The steps are types, so that none can be left out. [`Table::set`] takes them as the format's
//! rule ([`BreakRule`]) wants; whoever meets the locked value tries again.

use crate::build::{BuildError, PageSource};
use crate::change::{Debt, Frozen, Raced};
use crate::format::{Entry, Format, Height};
use crate::storage::{Storage, TablePage};
use crate::trace::tell;
use crate::walk::{Seen, Table};
use core::marker::PhantomData;
use core::ops::Range;
use twofold_arch::Gpa;

/// A format that says which changes need break-before-make.
pub trait BreakRule: Format {
    /// Whether `old`, an entry at `height`, must be broken before `new` may stand in its place. An
    /// `old` that is not valid for the processor never must; a `new` that is not valid always
    /// needs the invalidation.
    fn needs_break(old: u64, new: u64, height: Height) -> bool;
}

/// An entry that was valid and is locked now; TLBs may still hold it. Dropped, it is what it was.
#[must_use = "the entry is locked, and TLBs may hold what it was"]
pub struct Broken<'s, F, S: Storage> {
    frozen: Frozen<'s, S>,
    format: PhantomData<fn() -> F>,
}

impl<'s, F: BreakRule, S: Storage> Broken<'s, F, S> {
    /// Makes every TLB forget the entry: `tlbi` gets the addresses that it covers and returns when
    /// no processor uses a translation from before the call.
    pub fn invalidate(self, tlbi: impl FnOnce(Range<Gpa>)) -> Gap<'s, F, S> {
        tlbi(covered::<F>(self.frozen.seen()));
        Gap {
            storage: self.frozen.storage(),
            seen: self.frozen.leave_locked(),
            format: PhantomData,
        }
    }
}

/// A locked entry that no TLB holds. Dropped, it becomes empty, which leaks the table that it may
/// have pointed to.
#[must_use = "the entry is locked"]
pub struct Gap<'s, F: Format, S: Storage> {
    storage: &'s S,
    seen: Seen,
    format: PhantomData<fn() -> F>,
}

impl<F: BreakRule, S: Storage> Gap<'_, F, S> {
    /// Unlocks the entry with a new value. A table that it pointed to goes to the debt's list.
    pub fn make(self, new: u64, debt: &mut Debt<F>) {
        self.storage.store(self.seen.place.at, new);
        tell(self.storage, &self.seen.place, self.seen.value, new);
        if let (Entry::Table(child), Some(below)) =
            (self.seen.entry::<F>(), self.seen.place.height.below())
        {
            debt.add_table(self.storage, TablePage::found(child), below);
        }
        core::mem::forget(self);
    }
}

impl<F: Format, S: Storage> Drop for Gap<'_, F, S> {
    fn drop(&mut self) {
        self.storage.store(self.seen.place.at, F::EMPTY);
        tell(self.storage, &self.seen.place, self.seen.value, F::EMPTY);
    }
}

fn covered<F: Format>(seen: &Seen) -> Range<Gpa> {
    let start = seen.place.gpa;
    let end = start.get().saturating_add(F::bytes(seen.place.height));
    start..Gpa::new(end)
}

/// What stands beside a mapping in tables that are made for it.
pub trait Neighbours<F> {
    /// The entry at `height` that covers `gpa`.
    fn entry(&self, gpa: Gpa, height: Height) -> u64;
}

impl<F, N: Fn(Gpa, Height) -> u64> Neighbours<F> for N {
    fn entry(&self, gpa: Gpa, height: Height) -> u64 {
        self(gpa, height)
    }
}

impl<'s, F: BreakRule, S: Storage> Table<'s, F, S> {
    /// Locks a valid entry.
    ///
    /// # Errors
    /// [`Raced`] if the entry is not valid, or no longer what was seen.
    pub fn break_entry(&self, seen: Seen) -> Result<Broken<'s, F, S>, Raced> {
        match seen.entry::<F>() {
            Entry::Leaf | Entry::Table(_) => {}
            Entry::Empty | Entry::Frozen | Entry::Special => return Err(Raced(seen.value)),
        }
        Ok(Broken {
            frozen: self.freeze(seen)?,
            format: PhantomData,
        })
    }

    /// Writes `new` the way the format's rule wants: directly into an entry that is not valid;
    /// with an invalidation afterwards where a valid entry changes in place; by break-before-make
    /// otherwise. A table that was replaced goes to the debt's list.
    ///
    /// # Errors
    /// [`Raced`] if the entry is no longer what was seen, or is locked; then nothing has changed.
    pub fn set(
        &self,
        seen: Seen,
        new: u64,
        tlbi: impl FnOnce(Range<Gpa>),
        debt: &mut Debt<F>,
    ) -> Result<(), Raced> {
        match seen.entry::<F>() {
            Entry::Frozen => Err(Raced(seen.value)),
            Entry::Empty | Entry::Special => self.install(seen, new),
            Entry::Leaf | Entry::Table(_) if F::needs_break(seen.value, new, seen.place.height) => {
                self.break_entry(seen)?.invalidate(tlbi).make(new, debt);
                Ok(())
            }
            Entry::Leaf | Entry::Table(_) => {
                self.widen(seen, new)?;
                tlbi(covered::<F>(&seen));
                Ok(())
            }
        }
    }

    /// [`set`](Self::set) of the entry for `gpa` at `target`, where the walk ended at `seen`, an
    /// entry at `target` or above it that is not a table. Tables in between are made in private,
    /// their other entries by `neighbours`, and published at once; so a block is split without a
    /// moment in which only a part of it is mapped.
    ///
    /// # Errors
    /// See [`BuildError`].
    #[expect(
        clippy::too_many_arguments,
        reason = "each is a different party's part"
    )]
    pub fn set_below(
        &self,
        seen: Seen,
        gpa: Gpa,
        target: Height,
        new: u64,
        neighbours: impl Neighbours<F>,
        pages: &mut impl PageSource,
        tlbi: impl FnOnce(Range<Gpa>),
        debt: &mut Debt<F>,
    ) -> Result<(), BuildError> {
        if matches!(seen.entry::<F>(), Entry::Frozen | Entry::Table(_)) {
            return Err(BuildError::Raced);
        }
        let mut value = new;
        let mut height = target;
        while height < seen.place.height {
            let Some(page) = pages.take() else {
                self.give_back_path(value, height, target, gpa, pages);
                return Err(BuildError::OutOfPages);
            };
            let here = self.place(page, height, gpa);
            let first = here.gpa.get() - ((here.at.index() as u64) << F::shift(height));
            self.storage.fill_with(page, 0..F::ENTRIES, |index| {
                if index == here.at.index() {
                    return value;
                }
                let address = first + ((index as u64) << F::shift(height));
                neighbours.entry(Gpa::new(address), height)
            });
            value = F::table_entry(page.hpa());
            height = height.above();
        }
        self.set(seen, value, tlbi, debt).map_err(|_| {
            self.give_back_path(value, height, target, gpa, pages);
            BuildError::Raced
        })
    }
}
