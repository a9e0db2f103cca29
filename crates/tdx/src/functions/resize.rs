//! Changing the size of mappings, and moving pages.

// UNSAFETY: reads and fills tables under the tree's lock.
#![expect(unsafe_code)]

use crate::legality::Function;
use crate::module::{At, Failure, Locking, Module};
use crate::pamt::{PageType, page_bytes};
use crate::platform::Platform;
use crate::sept::{Sept, SeptEntry, State};
use crate::status::{Operand, Status};
use twofold_arch::{Gpa, Hpa};

impl<P: Platform> Module<P> {
    /// TDH.MEM.PAGE.DEMOTE: splits a page of 2 MiB or 1 GiB, with the free page `page` as table.
    /// The guest keeps what it has; what waited to be accepted as a whole waits in parts.
    ///
    /// # Errors
    /// See [`Failure`].
    pub fn page_demote(&self, rcx: u64, tdr: Hpa, page: Hpa) -> Result<(), Failure> {
        self.with_entry(
            Function::PageDemote,
            (rcx, tdr),
            1..=2,
            Locking::SHARED,
            |at| {
                self.require_tracked(&at)?;
                let state = at.locked.state();
                let state = state.unblocked().unwrap_or(state);
                let whole = at.page();
                self.claim(page, 0, PageType::Ept, tdr, Operand::R8)?;
                let size = page_bytes(at.info.level - 1);
                // SAFETY: the page has just been claimed.
                unsafe {
                    self.pages.fill(page, |index| {
                        SeptEntry::leaf(state, Hpa::new(whole.get() + index * size))
                    });
                }
                self.pamt.split(whole);
                at.td.add_children(1);
                at.locked.publish(SeptEntry::table(page));
                Ok(())
            },
        )
    }

    /// TDH.MEM.PAGE.PROMOTE: merges the 512 pages of a table into one of 2 MiB or 1 GiB and returns
    /// the table's page.
    ///
    /// # Errors
    /// See [`Failure`].
    pub fn page_promote(&self, rcx: u64, tdr: Hpa) -> Result<Hpa, Failure> {
        self.with_entry(
            Function::PagePromote,
            (rcx, tdr),
            1..=2,
            Locking::SHARED,
            |at| {
                self.require_tracked(&at)?;
                let (state, first) = self.mergeable(&at).ok_or_else(|| {
                    at.fails(Status::EPT_INVALID_PROMOTE_CONDITIONS.with(Operand::Rcx))
                })?;
                let table = at.page();
                self.pamt.merge(first, at.info.level);
                at.td.remove_children(1);
                at.locked.publish(SeptEntry::leaf(state, first));
                self.pamt.release(table);
                Ok(table)
            },
        )
    }

    /// The common state of the 512 pages of a table, and the first page, if they would make one.
    fn mergeable(&self, at: &At<'_, P>) -> Option<(State, Hpa)> {
        let level = at.info.level - 1;
        // SAFETY: the entry is locked, so the table stays.
        let table = unsafe { Sept::table_at(at.page(), level) };
        let entry = |index: u64| {
            let gpa = Gpa::new(index * page_bytes(level));
            // SAFETY: as above.
            let walked = unsafe { table.walk(&self.pages, gpa, level) };
            walked.entry().cleaned(level)
        };
        let first = entry(0);
        let state = first.state()?;
        let base = first.page(level);
        let suits = matches!(state, State::Mapped | State::Pending)
            && base.is_aligned(page_bytes(at.info.level));
        let alike = |index| {
            entry(index) == SeptEntry::leaf(state, Hpa::new(base.get() + index * page_bytes(level)))
        };
        (suits && (0..512).all(alike)).then_some((state, base))
    }

    /// TDH.MEM.PAGE.RELOCATE: moves a page of 4 KiB to the free page `page` and returns the old one.
    ///
    /// # Errors
    /// See [`Failure`].
    pub fn page_relocate(&self, rcx: u64, tdr: Hpa, page: Hpa) -> Result<Hpa, Failure> {
        self.with_entry(
            Function::PageRelocate,
            (rcx, tdr),
            0..=0,
            Locking::SHARED,
            |at| {
                self.require_tracked(&at)?;
                let state = at.locked.state();
                let state = state.unblocked().unwrap_or(state);
                let old = at.page();
                self.claim(page, 0, PageType::Regular, tdr, Operand::R8)?;
                if !state.is_pending() && !self.platform().copy_page(old, page) {
                    self.pamt.release(page);
                    return Err(Status::OPERAND_INVALID.with(Operand::R8).into());
                }
                at.locked.publish(SeptEntry::leaf(state, page));
                self.pamt.release(old);
                Ok(old)
            },
        )
    }
}
