//! A TD's virtual processor: its pages, and whether it is inside.

use crate::td::Td;
use alloc::sync::Arc;
use spin::Mutex;
use twofold_arch::Hpa;
use twofold_table::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Control pages that a virtual processor needs besides its root page.
pub const TDVPX_PAGES: usize = 5;

/// A virtual processor.
#[derive(Debug)]
pub(crate) struct Vcpu {
    /// Its root page, by which callers name it.
    pub(crate) tdvpr: Hpa,
    pub(crate) td: Arc<Td>,
    /// Its number in the TD.
    pub(crate) index: u32,
    pub(crate) control: Mutex<usize>,
    initialized: AtomicBool,
    /// Whether its state may be on a logical processor.
    associated: AtomicBool,
    inside: AtomicBool,
    /// The epoch in which it entered last.
    last_epoch: AtomicU64,
    /// What the guest finds in RCX or R8 when it starts.
    pub(crate) initial: AtomicU64,
}

impl Vcpu {
    pub(crate) fn new(tdvpr: Hpa, td: Arc<Td>, index: u32) -> Self {
        Self {
            tdvpr,
            td,
            index,
            control: Mutex::new(0),
            initialized: AtomicBool::new(false),
            associated: AtomicBool::new(false),
            inside: AtomicBool::new(false),
            last_epoch: AtomicU64::new(0),
            initial: AtomicU64::new(0),
        }
    }

    pub(crate) fn is_initialized(&self) -> bool {
        self.initialized.load(Ordering::SeqCst)
    }

    pub(crate) fn set_initialized(&self) {
        self.initialized.store(true, Ordering::SeqCst);
    }

    /// Goes inside. Returns whether it was outside.
    pub(crate) fn try_enter(&self) -> bool {
        !self.inside.swap(true, Ordering::SeqCst)
    }

    pub(crate) fn leave(&self) {
        self.inside.store(false, Ordering::SeqCst);
    }

    pub(crate) fn is_inside(&self) -> bool {
        self.inside.load(Ordering::SeqCst)
    }

    /// Notes the epoch in which it enters. Returns whether that is another one than before.
    pub(crate) fn enter_epoch(&self, epoch: u64) -> bool {
        self.last_epoch.swap(epoch, Ordering::SeqCst) != epoch
    }

    pub(crate) fn associate(&self) {
        if !self.associated.swap(true, Ordering::SeqCst) {
            self.td.associated.fetch_add(1, Ordering::SeqCst);
        }
    }

    pub(crate) fn disassociate(&self) {
        if self.associated.swap(false, Ordering::SeqCst) {
            self.td.associated.fetch_sub(1, Ordering::SeqCst);
        }
    }
}
