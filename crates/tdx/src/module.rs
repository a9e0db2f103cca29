//! The module: its TDs, and what every function on a Secure EPT entry has in common.

// UNSAFETY: walks Secure EPTs under the lock of the tree.
#![expect(unsafe_code)]

use crate::legality::{Function, entry_allows};
use crate::pamt::{PageMetadata, PageType, Pamt, page_bytes};
use crate::platform::{Platform, Point};
use crate::sept::{Locked, SeptEntry, SeptPages, Side, Walked};
use crate::status::{Operand, Status};
use crate::td::Td;
use crate::vcpu::Vcpu;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::sync::Arc;
use core::ops::RangeInclusive;
use spin::{Mutex, RwLock};
use twofold_arch::{Gpa, Hpa, PAGE_SIZE};

/// Why a function failed. Nothing has changed then.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Failure {
    /// What RAX says.
    pub status: Status,
    /// The Secure EPT entry that was in the way, and its level, where there was one.
    pub entry: Option<(SeptEntry, u8)>,
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        Self {
            status,
            entry: None,
        }
    }
}

/// The TDX module of a machine.
pub struct Module<P> {
    pub(crate) pages: SeptPages<P>,
    pub(crate) pamt: Pamt,
    pub(crate) tds: RwLock<BTreeMap<u64, Arc<Td>>>,
    pub(crate) vcpus: RwLock<BTreeMap<u64, Arc<Vcpu>>>,
    /// Key numbers in use.
    pub(crate) keys: Mutex<BTreeSet<u16>>,
    pub(crate) private_keys: RangeInclusive<u16>,
}

/// A guest-physical page: RCX of the functions on Secure EPT entries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct PageInfo {
    pub(crate) gpa: Gpa,
    pub(crate) level: u8,
}

impl PageInfo {
    /// Level in bits 2:0, address in bits 51:12, nothing else.
    pub(crate) fn parse(rcx: u64, levels: &RangeInclusive<u8>) -> Result<Self, Status> {
        let level = (rcx & 7) as u8;
        let gpa = rcx & !7;
        if levels.contains(&level) && gpa & (page_bytes(level) - 1) == 0 && gpa >> 52 == 0 {
            Ok(Self {
                gpa: Gpa::new(gpa),
                level,
            })
        } else {
            Err(Status::OPERAND_INVALID.with(Operand::Rcx))
        }
    }
}

/// How a function on a Secure EPT entry locks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Locking {
    /// Nobody else may use the TD meanwhile.
    pub(crate) td_alone: bool,
    /// Nobody else may use the Secure EPT meanwhile.
    pub(crate) tree_alone: bool,
}

impl Locking {
    pub(crate) const SHARED: Self = Self {
        td_alone: false,
        tree_alone: false,
    };
    pub(crate) const TREE_ALONE: Self = Self {
        td_alone: false,
        tree_alone: true,
    };
    pub(crate) const TD_ALONE: Self = Self {
        td_alone: true,
        tree_alone: false,
    };
}

/// A TD and its locked entry.
pub(crate) struct At<'a, P: Platform> {
    pub(crate) td: &'a Td,
    pub(crate) info: PageInfo,
    pub(crate) locked: Locked<'a, P>,
}

impl<P: Platform> At<'_, P> {
    /// A failure that shows the entry.
    pub(crate) fn fails(&self, status: Status) -> Failure {
        Failure {
            status,
            entry: Some((self.locked.entry(), self.info.level)),
        }
    }

    /// The page or table that the entry has.
    pub(crate) fn page(&self) -> Hpa {
        self.locked.entry().page(self.info.level)
    }
}

impl<P: Platform> Module<P> {
    /// A module on a machine whose private keys have these numbers.
    pub fn new(platform: P, private_keys: RangeInclusive<u16>) -> Self {
        Self {
            pages: SeptPages::new(platform),
            pamt: Pamt::default(),
            tds: RwLock::new(BTreeMap::new()),
            vcpus: RwLock::new(BTreeMap::new()),
            keys: Mutex::new(BTreeSet::new()),
            private_keys,
        }
    }

    /// The machine.
    pub fn platform(&self) -> &P {
        self.pages.platform()
    }

    /// The metadata of the page that begins at `page`, or `None` if it is free.
    pub fn metadata(&self, page: Hpa) -> Option<PageMetadata> {
        self.pamt.get(page)
    }

    /// How many pages, of any size, TDs have.
    pub fn pages_in_use(&self) -> usize {
        self.pamt.len()
    }

    /// The TD whose root page this is.
    pub(crate) fn td(&self, tdr: Hpa, operand: Operand) -> Result<Arc<Td>, Status> {
        if !tdr.is_aligned(PAGE_SIZE) {
            return Err(Status::OPERAND_INVALID.with(operand));
        }
        let found = self.tds.read().get(&tdr.get()).map(Arc::clone);
        found.ok_or(Status::PAGE_METADATA_INCORRECT.with(operand))
    }

    /// The virtual processor whose root page this is.
    pub(crate) fn vcpu(&self, tdvpr: Hpa) -> Result<Arc<Vcpu>, Status> {
        if !tdvpr.is_aligned(PAGE_SIZE) {
            return Err(Status::OPERAND_INVALID.with(Operand::Rcx));
        }
        let found = self.vcpus.read().get(&tdvpr.get()).map(Arc::clone);
        found.ok_or(Status::PAGE_METADATA_INCORRECT.with(Operand::Rcx))
    }

    /// Takes a page of the host for a TD.
    pub(crate) fn claim(
        &self,
        page: Hpa,
        level: u8,
        kind: PageType,
        owner: Hpa,
        operand: Operand,
    ) -> Result<(), Status> {
        let bytes = page_bytes(level);
        if !page.is_aligned(bytes) || page.checked_add(bytes).is_none() {
            return Err(Status::OPERAND_INVALID.with(operand));
        }
        if !self.platform().has_memory(page, bytes) {
            return Err(Status::OPERAND_ADDR_RANGE_ERROR.with(operand));
        }
        let metadata = PageMetadata {
            kind,
            level,
            owner,
            blocked_in: 0,
        };
        self.pamt.claim(page, metadata, operand)
    }

    /// Finds, checks and locks the entry that a function is about, and runs it.
    pub(crate) fn with_entry<R>(
        &self,
        function: Function,
        (rcx, tdr): (u64, Hpa),
        levels: RangeInclusive<u8>,
        locking: Locking,
        body: impl FnOnce(At<'_, P>) -> Result<R, Failure>,
    ) -> Result<R, Failure> {
        let td = self.td(tdr, Operand::Rdx)?;
        let _td = td.lock(self.platform(), locking.td_alone)?;
        let running = td.allows(function)?;
        let top = (*levels.end()).min(running.sept.root_level());
        let info = PageInfo::parse(rcx, &(*levels.start()..=top))?;
        if !running.params.is_private(info.gpa) {
            return Err(Status::OPERAND_INVALID.with(Operand::Rcx).into());
        }
        let _tree = self.lock_tree(&td, locking.tree_alone)?;
        // SAFETY: tables are taken away only by who holds the tree alone.
        let walked = unsafe { running.sept.walk(&self.pages, info.gpa, info.level) };
        let locked = self.lock_entry(walked, info)?;
        let at = At {
            td: &td,
            info,
            locked,
        };
        entry_allows(function, at.locked.state()).map_err(|status| at.fails(status))?;
        body(at)
    }

    pub(crate) fn lock_tree<'t>(
        &self,
        td: &'t Td,
        alone: bool,
    ) -> Result<crate::lock::SharexGuard<'t>, Status> {
        let guard = if self.platform().injects_busy(Point::SeptTree) {
            None
        } else if alone {
            td.tree.try_exclusive()
        } else {
            td.tree.try_shared()
        };
        guard.ok_or(Status::OPERAND_BUSY.with(Operand::SeptTree))
    }

    fn lock_entry<'s>(
        &self,
        walked: Walked<'s, P>,
        info: PageInfo,
    ) -> Result<Locked<'s, P>, Failure> {
        let found = Some((walked.entry(), walked.level()));
        let fails = |status| Failure {
            status,
            entry: found,
        };
        if walked.level() != info.level {
            return Err(fails(Status::EPT_WALK_FAILED.with(Operand::Rcx)));
        }
        if self.platform().injects_busy(Point::SeptEntry) {
            return Err(fails(Status::OPERAND_BUSY.with(Operand::SeptEntry)));
        }
        walked.lock(Side::Host).map_err(fails)
    }

    /// Whether what an entry has may be taken away: if the TD may be running, it must be blocked,
    /// and every virtual processor that could use it must have left.
    pub(crate) fn require_tracked(&self, at: &At<'_, P>) -> Result<(), Failure> {
        let state = at.locked.state();
        if !state.needs_tracking() || !at.td.op_state().needs_tracking() {
            return Ok(());
        }
        if !state.is_blocked() {
            return Err(at.fails(Status::GPA_RANGE_NOT_BLOCKED.with(Operand::Rcx)));
        }
        let blocked_in = self.pamt.get(at.page()).map(|page| page.blocked_in);
        if blocked_in.is_some_and(|epoch| at.td.epochs.is_tracked(epoch)) {
            Ok(())
        } else {
            Err(Status::TLB_TRACKING_NOT_DONE.with(Operand::Rcx).into())
        }
    }
}
