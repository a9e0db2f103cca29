//! A TD: its life cycle, parameters and counts.

use crate::epoch::Epochs;
use crate::legality::{Function, OpState, op_state_allows};
use crate::lock::{Sharex, SharexGuard};
use crate::measurement::{DIGEST, Measurement};
use crate::platform::{Platform, Point};
use crate::sept::Sept;
use crate::status::{Operand, Status};
use alloc::vec::Vec;
use spin::{Mutex, Once};
use twofold_arch::{Gpa, Hpa};
use twofold_table::sync::atomic::{AtomicU8, AtomicU64, Ordering};

/// The stages in the life of a TD's key (TDR.LIFECYCLE_STATE).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Lifecycle {
    /// It has a key number.
    HkidAssigned = 0,
    /// The key is set up: control pages can be added, and the TD can run.
    KeysConfigured = 1,
    /// No virtual processor may enter any more.
    Blocked = 2,
    /// The key is gone; pages can be reclaimed.
    Teardown = 3,
}

impl Lifecycle {
    const fn from_number(number: u8) -> Self {
        match number {
            0 => Self::HkidAssigned,
            1 => Self::KeysConfigured,
            2 => Self::Blocked,
            _ => Self::Teardown,
        }
    }
}

/// Bytes of the structure that TDH.MNG.INIT reads (TD_PARAMS).
pub const TD_PARAMS_BYTES: usize = 1024;

/// ATTRIBUTES bit 28: an access to a page that waits for ACCEPT exits to the host instead of raising
/// #VE in the guest.
pub const SEPT_VE_DISABLE: u64 = 1 << 28;

/// The parameters of a TD that matter here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TdParams {
    /// ATTRIBUTES.
    pub attributes: u64,
    /// XFAM: the extended state that the guest may use.
    pub xfam: u64,
    /// The most virtual processors.
    pub max_vcpus: u16,
    /// Levels of the Secure EPT: 4 or 5.
    pub levels: u8,
    /// Whether the shared bit is bit 51 (GPAW 52) rather than 47 (GPAW 48).
    pub wide: bool,
}

impl TdParams {
    /// Reads TD_PARAMS.
    ///
    /// # Errors
    /// `OPERAND_INVALID` for what is reserved or does not fit together.
    pub fn parse(bytes: &[u8; TD_PARAMS_BYTES]) -> Result<Self, Status> {
        let invalid = Status::OPERAND_INVALID.with(Operand::Rdx);
        let word = |at: usize| -> u64 {
            bytes[at..at + 8]
                .iter()
                .rev()
                .fold(0, |word, &byte| word << 8 | u64::from(byte))
        };
        let eptp = word(24);
        let config = word(32);
        let params = Self {
            attributes: word(0),
            xfam: word(8),
            max_vcpus: u16::from_le_bytes([bytes[16], bytes[17]]),
            // Bits 5:3 are the levels less one, bits 2:0 the memory type.
            levels: (eptp >> 3 & 7) as u8 + 1,
            wide: config & 1 != 0,
        };
        let fits = eptp & !0x38 == 6 && config >> 1 == 0 && params.max_vcpus != 0;
        match (params.levels, params.wide) {
            (4, false) | (5, _) if fits => Ok(params),
            _ => Err(invalid),
        }
    }

    /// The number of the shared bit.
    pub const fn shared_bit(&self) -> u32 {
        if self.wide { 51 } else { 47 }
    }

    /// Whether `gpa` is in the private half.
    pub const fn is_private(&self, gpa: Gpa) -> bool {
        gpa.get() >> self.shared_bit() == 0
    }
}

/// A TD.
#[derive(Debug)]
pub(crate) struct Td {
    /// Its root page, by which callers name it.
    pub(crate) tdr: Hpa,
    /// Its key.
    pub(crate) hkid: u16,
    lock: Sharex,
    lifecycle: AtomicU8,
    op_state: AtomicU8,
    /// Pages of 4 KiB that belong to it.
    children: AtomicU64,
    /// Its control pages.
    pub(crate) control: Mutex<Vec<Hpa>>,
    /// Set by TDH.MNG.INIT.
    pub(crate) running: Once<Running>,
    pub(crate) tree: Sharex,
    pub(crate) epochs: Epochs,
    pub(crate) measurement: Mutex<Measurement>,
    pub(crate) digest: Once<[u8; DIGEST]>,
    /// Virtual processors that were created.
    pub(crate) vcpus: AtomicU64,
    /// Virtual processors that are associated with a logical one.
    pub(crate) associated: AtomicU64,
}

/// What a TD has once it is initialised.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) params: TdParams,
    pub(crate) sept: Sept,
}

impl Td {
    pub(crate) fn new(tdr: Hpa, hkid: u16) -> Self {
        Self {
            tdr,
            hkid,
            lock: Sharex::new(),
            lifecycle: AtomicU8::new(Lifecycle::HkidAssigned as u8),
            op_state: AtomicU8::new(OpState::Uninitialized as u8),
            children: AtomicU64::new(0),
            control: Mutex::new(Vec::new()),
            running: Once::new(),
            tree: Sharex::new(),
            epochs: Epochs::new(),
            measurement: Mutex::new(Measurement::new()),
            digest: Once::new(),
            vcpus: AtomicU64::new(0),
            associated: AtomicU64::new(0),
        }
    }

    pub(crate) fn lifecycle(&self) -> Lifecycle {
        Lifecycle::from_number(self.lifecycle.load(Ordering::SeqCst))
    }

    pub(crate) fn set_lifecycle(&self, stage: Lifecycle) {
        self.lifecycle.store(stage as u8, Ordering::SeqCst);
    }

    pub(crate) fn op_state(&self) -> OpState {
        OpState::from_number(self.op_state.load(Ordering::SeqCst))
    }

    pub(crate) fn set_op_state(&self, state: OpState) {
        self.op_state.store(state as u8, Ordering::SeqCst);
    }

    /// Locks the TD as other functions may too, or alone.
    ///
    /// # Errors
    /// `OPERAND_BUSY`.
    pub(crate) fn lock(
        &self,
        platform: &impl Platform,
        alone: bool,
    ) -> Result<SharexGuard<'_>, Status> {
        let guard = if platform.injects_busy(Point::Td) {
            None
        } else if alone {
            self.lock.try_exclusive()
        } else {
            self.lock.try_shared()
        };
        guard.ok_or(Status::OPERAND_BUSY.with(Operand::Tdr))
    }

    /// Whether the TD is at `stage` of its life.
    ///
    /// # Errors
    /// `LIFECYCLE_STATE_INCORRECT`.
    pub(crate) fn requires(&self, stage: Lifecycle) -> Result<(), Status> {
        if self.lifecycle() == stage {
            Ok(())
        } else {
            Err(Status::LIFECYCLE_STATE_INCORRECT.with(Operand::Tdr))
        }
    }

    /// What an initialised TD has, if `function` is allowed in its present state.
    ///
    /// # Errors
    /// `LIFECYCLE_STATE_INCORRECT` or `OP_STATE_INCORRECT`.
    pub(crate) fn allows(&self, function: Function) -> Result<&Running, Status> {
        self.requires(Lifecycle::KeysConfigured)?;
        op_state_allows(function, self.op_state())?;
        self.running.get().ok_or(Status::OP_STATE_INCORRECT)
    }

    /// Counts pages of 4 KiB that were given to the TD.
    pub(crate) fn add_children(&self, pages: u64) {
        self.children.fetch_add(pages, Ordering::SeqCst);
    }

    /// Counts pages of 4 KiB that were taken from the TD.
    pub(crate) fn remove_children(&self, pages: u64) {
        self.children.fetch_sub(pages, Ordering::SeqCst);
    }

    pub(crate) fn children(&self) -> u64 {
        self.children.load(Ordering::SeqCst)
    }
}
