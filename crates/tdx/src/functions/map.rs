//! Giving a TD tables and pages.

// UNSAFETY: fills pages that were claimed as tables, and walks a Secure EPT under its lock.
#![expect(unsafe_code)]

use crate::legality::Function;
use crate::module::{Failure, Locking, Module, PageInfo};
use crate::pamt::{PageType, page_bytes};
use crate::platform::Platform;
use crate::sept::{SeptEntry, State};
use crate::status::{Operand, Status};
use twofold_arch::{Hpa, PAGE_SHIFT};

impl<P: Platform> Module<P> {
    /// TDH.MEM.SEPT.ADD: makes the free page `page` a table for the entry in `rcx`, whose level
    /// is that of the entry which will point to it.
    ///
    /// # Errors
    /// See [`Failure`].
    pub fn sept_add(&self, rcx: u64, tdr: Hpa, page: Hpa) -> Result<(), Failure> {
        self.with_entry(
            Function::SeptAdd,
            (rcx, tdr),
            1..=4,
            Locking::SHARED,
            |at| {
                self.claim(page, 0, PageType::Ept, tdr, Operand::R8)?;
                // SAFETY: the page has just been claimed.
                unsafe { self.pages.fill(page, |_| SeptEntry::FREE) };
                at.td.add_children(1);
                at.locked.publish(SeptEntry::table(page));
                Ok(())
            },
        )
    }

    /// TDH.MEM.PAGE.AUG: gives the TD the free page `page`, which the guest has to accept.
    ///
    /// # Errors
    /// See [`Failure`].
    pub fn page_aug(&self, rcx: u64, tdr: Hpa, page: Hpa) -> Result<(), Failure> {
        self.with_entry(
            Function::PageAug,
            (rcx, tdr),
            0..=1,
            Locking::SHARED,
            |at| {
                self.claim(page, at.info.level, PageType::Regular, tdr, Operand::R8)?;
                at.td.add_children(page_bytes(at.info.level) >> PAGE_SHIFT);
                at.locked.publish(SeptEntry::leaf(State::Pending, page));
                Ok(())
            },
        )
    }

    /// TDH.MEM.SEPT.RD: the entry for `rcx` and its level, or where the walk ended before.
    ///
    /// # Errors
    /// See [`Failure`].
    pub fn sept_read(&self, rcx: u64, tdr: Hpa) -> Result<(SeptEntry, u8), Failure> {
        let td = self.td(tdr, Operand::Rdx)?;
        let _td = td.lock(self.platform(), false)?;
        let running = td.allows(Function::SeptRead)?;
        let info = PageInfo::parse(rcx, &(0..=running.sept.root_level()))?;
        if !running.params.is_private(info.gpa) {
            return Err(Status::OPERAND_INVALID.with(Operand::Rcx).into());
        }
        let _tree = self.lock_tree(&td, false)?;
        // SAFETY: tables are taken away only by who holds the tree alone.
        let walked = unsafe { running.sept.walk(&self.pages, info.gpa, info.level) };
        if walked.level() == info.level {
            Ok((walked.entry(), walked.level()))
        } else {
            Err(Failure {
                status: Status::EPT_WALK_FAILED.with(Operand::Rcx),
                entry: Some((walked.entry(), walked.level())),
            })
        }
    }
}
