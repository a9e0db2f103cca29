//! A TD's initial memory: adding and measuring pages before it runs.

// UNSAFETY: walks a Secure EPT under the lock of the tree.
#![expect(unsafe_code)]

use crate::legality::{Function, OpState, entry_allows};
use crate::measurement::{DIGEST, EXTENSION};
use crate::module::{Failure, Locking, Module, PageInfo};
use crate::pamt::PageType;
use crate::platform::Platform;
use crate::sept::{SeptEntry, State};
use crate::status::{Operand, Status};
use twofold_arch::{Hpa, PAGE_SIZE};

impl<P: Platform> Module<P> {
    /// TDH.MEM.PAGE.ADD: copies the page at `source` into the free page `page`, maps it at the
    /// address in `rcx`, and measures the address.
    ///
    /// # Errors
    /// See [`Failure`].
    pub fn page_add(&self, rcx: u64, tdr: Hpa, page: Hpa, source: Hpa) -> Result<(), Failure> {
        self.with_entry(
            Function::PageAdd,
            (rcx, tdr),
            0..=0,
            Locking::TD_ALONE,
            |at| {
                if !source.is_aligned(PAGE_SIZE) {
                    return Err(Status::OPERAND_INVALID.with(Operand::R9).into());
                }
                self.claim(page, 0, PageType::Regular, tdr, Operand::R8)?;
                if !self.platform().copy_page(source, page) {
                    self.pamt.release(page);
                    return Err(Status::OPERAND_INVALID.with(Operand::R9).into());
                }
                at.td.measurement.lock().add_page(at.info.gpa.get());
                at.td.add_children(1);
                at.locked.publish(SeptEntry::leaf(State::Mapped, page));
                Ok(())
            },
        )
    }

    /// TDH.MR.EXTEND: measures the 256 bytes at the guest-physical address `gpa`.
    ///
    /// # Errors
    /// See [`Failure`].
    pub fn mr_extend(&self, gpa: u64, tdr: Hpa) -> Result<(), Failure> {
        let td = self.td(tdr, Operand::Rdx)?;
        let _td = td.lock(self.platform(), true)?;
        let running = td.allows(Function::MrExtend)?;
        let offset = gpa & (PAGE_SIZE - 1);
        let page = PageInfo::parse(gpa - offset, &(0..=0))?;
        if !offset.is_multiple_of(EXTENSION as u64) || !running.params.is_private(page.gpa) {
            return Err(Status::OPERAND_INVALID.with(Operand::Rcx).into());
        }
        let _tree = self.lock_tree(&td, false)?;
        // SAFETY: tables are taken away only by who holds the tree alone.
        let walked = unsafe { running.sept.walk(&self.pages, page.gpa, 0) };
        let (entry, level) = (walked.entry(), walked.level());
        let fails = |status| Failure {
            status,
            entry: Some((entry, level)),
        };
        if level != 0 {
            return Err(fails(Status::EPT_WALK_FAILED.with(Operand::Rcx)));
        }
        let state = entry.state().unwrap_or(State::Free);
        entry_allows(Function::MrExtend, state).map_err(fails)?;
        let mut content = [0; EXTENSION];
        self.platform()
            .read_page(entry.page(0), offset as usize, &mut content);
        td.measurement.lock().extend(gpa, &content);
        Ok(())
    }

    /// TDH.MR.FINALIZE: ends measuring. From now on the TD can run, and what is taken from it must
    /// be blocked and tracked first.
    ///
    /// # Errors
    /// See [`Failure`].
    pub fn mr_finalize(&self, tdr: Hpa) -> Result<(), Failure> {
        let td = self.td(tdr, Operand::Rcx)?;
        let _td = td.lock(self.platform(), true)?;
        td.allows(Function::MrFinalize)?;
        let measurement = td.measurement.lock().clone();
        td.digest.call_once(|| measurement.finish());
        td.set_op_state(OpState::Runnable);
        Ok(())
    }

    /// The measurement of a TD's initial memory (MRTD), once it is finalised.
    pub fn measurement(&self, tdr: Hpa) -> Option<[u8; DIGEST]> {
        self.td(tdr, Operand::Rcx).ok()?.digest.get().copied()
    }
}
