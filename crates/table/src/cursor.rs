//! Visiting the entries of a range.

use crate::format::{Entry, Format, Height};
use crate::storage::{Storage, TablePage};
use crate::walk::{Seen, Table};
use core::ops::Range;
use twofold_arch::Gpa;

/// Greatest root height of any format.
const MAX_HEIGHTS: usize = 8;

/// Visits the entries that cover a range of addresses, in order, each table before its entries.
///
/// After an entry that is a table, [`next`](Self::next) goes into it, unless
/// [`skip`](Self::skip) was called; so a caller that takes the table out skips it.
pub struct Cursor<'s, F, S> {
    table: Table<'s, F, S>,
    /// The page being visited at each height; entry 0 is not used.
    pages: [TablePage; MAX_HEIGHTS],
    height: Height,
    position: u64,
    end: u64,
    step: Step,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Read the entry at the position.
    Look,
    /// Go on after the entry at the position.
    Advance,
    /// Go into the table found at the position.
    Enter(TablePage),
}

impl<'s, F: Format, S: Storage> Cursor<'s, F, S> {
    const FITS: () = assert!((F::MAX_HEIGHT.get() as usize) < MAX_HEIGHTS);

    /// A cursor over the part of `range` that the table covers.
    pub fn new(table: Table<'s, F, S>, range: Range<Gpa>) -> Self {
        let () = Self::FITS;
        let granule = F::bytes(Height::LEAF);
        Self {
            table,
            pages: [table.root().page; MAX_HEIGHTS],
            height: table.root().height,
            position: range.start.get() & !(granule - 1),
            end: range.end.get().min(table.end()),
            step: Step::Look,
        }
    }

    /// The table that is being visited.
    pub const fn table(&self) -> Table<'s, F, S> {
        self.table
    }

    /// The next entry, with the value it has now.
    #[expect(
        clippy::should_implement_trait,
        reason = "lends; the caller may skip in between"
    )]
    #[inline(always)]
    pub fn next(&mut self) -> Option<Seen> {
        let beside = self.position.wrapping_add(F::bytes(Height::LEAF));
        let in_same_table = beside & (F::bytes(Height::LEAF.above()) - 1) != 0;
        if self.step == Step::Advance && self.height == Height::LEAF && in_same_table {
            // From one of the smallest pages to the next in its table: most steps of a long range.
            self.position = beside;
            if beside >= self.end {
                return None;
            }
            let page = self.pages[usize::from(Height::LEAF.get())];
            let place = self.table.place(page, Height::LEAF, Gpa::new(beside));
            return Some(self.table.look(place));
        }
        self.next_elsewhere()
    }

    #[inline(never)]
    fn next_elsewhere(&mut self) -> Option<Seen> {
        match self.step {
            Step::Look => {}
            Step::Advance => self.advance(),
            Step::Enter(page) => {
                if let Some(below) = self.height.below() {
                    self.height = below;
                    self.pages[usize::from(below.get())] = page;
                }
            }
        }
        if self.position >= self.end {
            return None;
        }
        let gpa = Gpa::new(self.position);
        let height = usize::from(self.height.get());
        let place = if self.height == self.table.root().height {
            let place = self.table.root_place(gpa);
            self.pages[height] = place.table();
            place
        } else {
            self.table.place(self.pages[height], self.height, gpa)
        };
        let seen = self.table.look(place);
        self.step = match seen.entry::<F>() {
            Entry::Table(child) if self.height != Height::LEAF => {
                Step::Enter(TablePage::found(child))
            }
            _ => Step::Advance,
        };
        Some(seen)
    }

    /// Does not go into the table that [`next`](Self::next) returned last.
    pub fn skip(&mut self) {
        self.step = Step::Advance;
    }

    /// Reads the last entry again in the following [`next`](Self::next): it had changed.
    pub fn again(&mut self) {
        self.step = Step::Look;
    }

    fn advance(&mut self) {
        let size = F::bytes(self.height);
        self.position = (self.position & !(size - 1)).saturating_add(size);
        while self.height < self.table.root().height
            && self.position & (F::bytes(self.height.above()) - 1) == 0
        {
            self.height = self.height.above();
        }
    }
}
