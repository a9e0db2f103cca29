//! The Secure EPT, as the MMU has it changed: one function of the module for each change of the
//! mirror (SPEC 5.5).

use super::life::{Stage, Td, insist};
use std::sync::atomic::Ordering;
use twofold_arch::{Gfn, Hpa, Level, PAGE_SHIFT};
use twofold_mmu::{ExternalError, ExternalTables, Unknown};
use twofold_tdx::{Failure, Platform, Status};

/// RCX of the module's functions: address, and level counted from 0.
fn page_info(gfn: Gfn, level: Level) -> u64 {
    gfn.get() << PAGE_SHIFT | u64::from(level.number() - 1)
}

fn external(failure: Failure) -> ExternalError {
    if failure.status.may_be_retried() || failure.status.is(Status::TLB_TRACKING_NOT_DONE) {
        ExternalError::Busy
    } else {
        ExternalError::Refused(failure.status.raw())
    }
}

impl Td {
    /// The TD's root page. Without one there is no mirror, so nobody asks.
    fn root(&self) -> Result<Hpa, ExternalError> {
        let missing = ExternalError::Refused(Status::OP_STATE_INCORRECT.raw());
        self.tdr().map_err(|_| missing)
    }

    /// Gives a page that the module had back to whoever lent it, without what the guest left in it.
    fn reclaim_page(&self, page: Hpa) {
        if !self.is_ours() {
            return;
        }
        match insist(|| self.module().page_reclaim(page)) {
            Ok(_) => self.module().platform().zero_page(page),
            Err(failure) => self.bug("a page cannot be reclaimed", Some(failure.status)),
        }
    }
}

impl ExternalTables for Td {
    fn link_table(&self, gfn: Gfn, level: Level, page: Hpa) -> Result<(), ExternalError> {
        let tdr = self.root()?;
        self.module()
            .sept_add(page_info(gfn, level), tdr, page)
            .map_err(external)
    }

    fn map_leaf(
        &self,
        gfn: Gfn,
        level: Level,
        hpa: Hpa,
        source: Option<u64>,
    ) -> Result<(), ExternalError> {
        let (tdr, rcx) = (self.root()?, page_info(gfn, level));
        match source {
            Some(source) => self.module().page_add(rcx, tdr, hpa, Hpa::new(source)),
            // Before that, no guest runs that could accept a page.
            None if self.stage() == Stage::Runnable => self.module().page_aug(rcx, tdr, hpa),
            None => Err(Status::OP_STATE_INCORRECT.into()),
        }
        .map_err(external)
    }

    fn block_leaf(&self, gfn: Gfn, level: Level) -> Result<(), ExternalError> {
        let tdr = self.root()?;
        self.module()
            .range_block(page_info(gfn, level), tdr)
            .map_err(external)
    }

    fn track(&self) -> Result<(), ExternalError> {
        let result = self.module().track(self.root()?);
        // Also if it failed: somebody of the epoch before is inside.
        if self.inside.load(Ordering::SeqCst) != 0 {
            self.machine().kick_all();
        }
        result.map_err(external)
    }

    fn remove_leaf(&self, gfn: Gfn, level: Level, _hpa: Hpa) -> Result<(), ExternalError> {
        let tdr = self.root()?;
        let page = self
            .module()
            .page_remove(page_info(gfn, level), tdr)
            .map_err(external)?;
        self.module().platform().zero_page(page);
        Ok(())
    }

    fn hold_vcpus(&self) {
        self.held.fetch_add(1, Ordering::SeqCst);
        while self.inside.load(Ordering::SeqCst) != 0 {
            self.machine().kick_all();
            rustix::thread::sched_yield();
        }
    }

    fn release_vcpus(&self) {
        self.held.fetch_sub(1, Ordering::SeqCst);
    }

    fn end(&self) {
        self.release_key();
    }

    fn reclaim_leaf(&self, hpa: Hpa, _level: Level) {
        self.reclaim_page(hpa);
    }

    fn reclaim_table(&self, page: Hpa) {
        self.reclaim_page(page);
    }

    fn leaf(&self, gfn: Gfn, level: Level) -> Result<Option<Hpa>, Unknown> {
        let tdr = self.tdr().map_err(|_| Unknown)?;
        match self.module().sept_read(page_info(gfn, level), tdr) {
            Ok((entry, level)) => {
                let leaf = entry.state().filter(|state| state.is_leaf());
                Ok(leaf.map(|_| entry.page(level)))
            }
            Err(failure) if failure.status.is(Status::EPT_WALK_FAILED) => Ok(None),
            Err(_) => Err(Unknown),
        }
    }
}
