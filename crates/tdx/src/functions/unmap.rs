//! Taking pages and tables from a TD: BLOCK, TRACK, REMOVE, and reclaiming after its end.

// UNSAFETY: reads a table that is about to be removed, alone in the tree.
#![expect(unsafe_code)]

use crate::legality::Function;
use crate::module::{Failure, Locking, Module};
use crate::pamt::{PageType, page_bytes};
use crate::platform::{Platform, Point};
use crate::sept::{Sept, SeptEntry};
use crate::status::{Operand, Status};
use crate::td::Lifecycle;
use twofold_arch::{Gpa, Hpa, PAGE_SHIFT};

/// A page that came back from a TD that was torn down.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Reclaimed {
    /// What it was used for.
    pub kind: PageType,
    /// The TD that it belonged to.
    pub owner: Hpa,
    /// Its level.
    pub level: u8,
}

impl<P: Platform> Module<P> {
    /// TDH.MEM.RANGE.BLOCK: no new translation will be made through the entry.
    ///
    /// # Errors
    /// See [`Failure`].
    pub fn range_block(&self, rcx: u64, tdr: Hpa) -> Result<(), Failure> {
        self.with_entry(
            Function::RangeBlock,
            (rcx, tdr),
            0..=4,
            Locking::TREE_ALONE,
            |at| {
                let entry = at.locked.entry().cleaned(at.info.level);
                let Some(blocked) = at.locked.state().blocked() else {
                    return Err(at.fails(Status::EPT_ENTRY_STATE_INCORRECT.with(Operand::Rcx)));
                };
                let (page, td) = (at.page(), at.td);
                at.locked.publish(entry.with_state(blocked));
                // Sampled after the entry has changed: who enters later cannot have seen it.
                self.pamt.block(page, td.epochs.now());
                Ok(())
            },
        )
    }

    /// TDH.MEM.RANGE.UNBLOCK: takes BLOCK back.
    ///
    /// # Errors
    /// See [`Failure`].
    pub fn range_unblock(&self, rcx: u64, tdr: Hpa) -> Result<(), Failure> {
        self.with_entry(
            Function::RangeUnblock,
            (rcx, tdr),
            0..=4,
            Locking::TREE_ALONE,
            |at| {
                self.require_tracked(&at)?;
                let entry = at.locked.entry();
                let Some(state) = at.locked.state().unblocked() else {
                    return Err(at.fails(Status::EPT_ENTRY_STATE_INCORRECT.with(Operand::Rcx)));
                };
                at.locked.publish(entry.with_state(state));
                Ok(())
            },
        )
    }

    /// TDH.MEM.TRACK: begins a new TLB epoch.
    ///
    /// # Errors
    /// See [`Failure`].
    pub fn track(&self, tdr: Hpa) -> Result<(), Failure> {
        let td = self.td(tdr, Operand::Rcx)?;
        let _td = td.lock(self.platform(), false)?;
        td.allows(Function::Track)?;
        if self.platform().injects_busy(Point::TdEpoch) {
            return Err(Status::OPERAND_BUSY.with(Operand::TdEpoch).into());
        }
        Ok(td.epochs.track()?)
    }

    /// TDH.MEM.PAGE.REMOVE: takes a page from the TD and returns it.
    ///
    /// # Errors
    /// See [`Failure`].
    pub fn page_remove(&self, rcx: u64, tdr: Hpa) -> Result<Hpa, Failure> {
        self.with_entry(
            Function::PageRemove,
            (rcx, tdr),
            0..=2,
            Locking::SHARED,
            |at| {
                self.require_tracked(&at)?;
                let page = at.page();
                at.td
                    .remove_children(page_bytes(at.info.level) >> PAGE_SHIFT);
                at.locked.publish(SeptEntry::FREE);
                self.pamt.release(page);
                Ok(page)
            },
        )
    }

    /// TDH.MEM.SEPT.REMOVE: takes a table that maps nothing and returns its page.
    ///
    /// # Errors
    /// See [`Failure`].
    pub fn sept_remove(&self, rcx: u64, tdr: Hpa) -> Result<Hpa, Failure> {
        self.with_entry(
            Function::SeptRemove,
            (rcx, tdr),
            1..=4,
            Locking::TREE_ALONE,
            |at| {
                self.require_tracked(&at)?;
                let page = at.page();
                let level = at.info.level - 1;
                // SAFETY: the table is there, and only we are in the tree.
                let table = unsafe { Sept::table_at(page, level) };
                for index in 0..512 {
                    let gpa = Gpa::new(index * page_bytes(level));
                    // SAFETY: as above.
                    let walked = unsafe { table.walk(&self.pages, gpa, level) };
                    if walked.entry() != SeptEntry::FREE {
                        return Err(at.fails(Status::EPT_PAGE_NOT_FREE.with(Operand::Rcx)));
                    }
                }
                at.td.remove_children(1);
                at.locked.publish(SeptEntry::FREE);
                self.pamt.release(page);
                Ok(page)
            },
        )
    }

    /// TDH.PHYMEM.PAGE.RECLAIM: takes any page of a TD whose key is gone. The TD's root page comes
    /// last.
    ///
    /// # Errors
    /// See [`Failure`].
    pub fn page_reclaim(&self, page: Hpa) -> Result<Reclaimed, Failure> {
        let metadata = self
            .pamt
            .get(page)
            .ok_or(Status::PAGE_METADATA_INCORRECT.with(Operand::Rcx))?;
        let td = self.td(metadata.owner, Operand::Rcx)?;
        let _td = td.lock(self.platform(), metadata.kind == PageType::Tdr)?;
        td.requires(Lifecycle::Teardown)?;
        if metadata.kind == PageType::Tdr {
            if td.children() != 0 {
                return Err(Status::TD_ASSOCIATED_PAGES_EXIST.with(Operand::Rcx).into());
            }
            self.tds.write().remove(&page.get());
        }
        // Two callers may have come here with the same page.
        if self.pamt.release(page).is_none() {
            return Err(Status::PAGE_METADATA_INCORRECT.with(Operand::Rcx).into());
        }
        match metadata.kind {
            PageType::Tdr => {}
            PageType::Tdvpr => {
                self.vcpus.write().remove(&page.get());
                td.remove_children(1);
            }
            _ => td.remove_children(page_bytes(metadata.level) >> PAGE_SHIFT),
        }
        Ok(Reclaimed {
            kind: metadata.kind,
            owner: metadata.owner,
            level: metadata.level,
        })
    }
}
