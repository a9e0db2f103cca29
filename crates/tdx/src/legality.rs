//! What is allowed when: two tables (SPEC 5.6, 5.7).
//!
//! A function first asks [`op_state_allows`], then, with the entry locked, [`entry_allows`]. Neither
//! function nor state appears in a condition anywhere else.

use crate::sept::State;
use crate::status::{Operand, Status};

macro_rules! functions {
    ($($(#[$doc:meta])* $name:ident = $number:literal;)*) => {
        /// A leaf function of SEAMCALL, by its number.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[repr(u16)]
        pub enum Function {
            $($(#[$doc])* $name = $number,)*
        }

        impl Function {
            /// Every function that there is.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// The function with this number.
            pub const fn from_number(number: u16) -> Option<Self> {
                match number {
                    $($number => Some(Self::$name),)*
                    _ => None,
                }
            }
        }
    };
}

functions! {
    /// TDH.VP.ENTER: lets a virtual processor run.
    VpEnter = 0;
    /// TDH.MNG.ADDCX: gives a TD a control page.
    MngAddCx = 1;
    /// TDH.MEM.PAGE.ADD: copies and measures a page before the TD runs.
    PageAdd = 2;
    /// TDH.MEM.SEPT.ADD: gives the Secure EPT a table.
    SeptAdd = 3;
    /// TDH.VP.ADDCX: gives a virtual processor a control page.
    VpAddCx = 4;
    /// TDH.MEM.PAGE.RELOCATE: moves a page to other memory.
    PageRelocate = 5;
    /// TDH.MEM.PAGE.AUG: gives the TD a page that it has to accept.
    PageAug = 6;
    /// TDH.MEM.RANGE.BLOCK: stops new translations.
    RangeBlock = 7;
    /// TDH.MNG.KEY.CONFIG: sets the TD's key up.
    MngKeyConfig = 8;
    /// TDH.MNG.CREATE: creates a TD.
    MngCreate = 9;
    /// TDH.VP.CREATE: creates a virtual processor.
    VpCreate = 10;
    /// TDH.MEM.PAGE.DEMOTE: splits a page.
    PageDemote = 15;
    /// TDH.MR.EXTEND: measures 256 bytes.
    MrExtend = 16;
    /// TDH.MR.FINALIZE: ends measuring; the TD may run.
    MrFinalize = 17;
    /// TDH.VP.FLUSH: takes a virtual processor from its logical processor.
    VpFlush = 18;
    /// TDH.MNG.VPFLUSHDONE: all virtual processors were flushed; teardown begins.
    MngVpFlushDone = 19;
    /// TDH.MNG.KEY.FREEID: the TD's key goes.
    MngKeyFreeId = 20;
    /// TDH.MNG.INIT: sets the TD's parameters.
    MngInit = 21;
    /// TDH.VP.INIT: initialises a virtual processor.
    VpInit = 22;
    /// TDH.MEM.PAGE.PROMOTE: merges 512 pages.
    PagePromote = 23;
    /// TDH.MEM.SEPT.RD: reads an entry.
    SeptRead = 25;
    /// TDH.PHYMEM.PAGE.RECLAIM: takes a page of a TD that is torn down.
    PageReclaim = 28;
    /// TDH.MEM.PAGE.REMOVE: takes a page.
    PageRemove = 29;
    /// TDH.MEM.SEPT.REMOVE: takes an empty table.
    SeptRemove = 30;
    /// TDH.MEM.TRACK: begins a new TLB epoch.
    Track = 38;
    /// TDH.MEM.RANGE.UNBLOCK: allows translations again.
    RangeUnblock = 39;
    /// TDH.PHYMEM.CACHE.WB: writes caches back.
    CacheWriteBack = 40;
    /// TDH.PHYMEM.PAGE.WBINVD: writes a page's cache lines back.
    PageWriteBack = 41;
}

/// How far a TD has come. Migration's states are not modelled.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum OpState {
    /// It has control pages, perhaps, but no parameters.
    Uninitialized = 0,
    /// Its initial memory is being added.
    Initialized = 1,
    /// It is measured and may run.
    Runnable = 2,
}

impl OpState {
    /// Every state.
    pub const ALL: [Self; 3] = [Self::Uninitialized, Self::Initialized, Self::Runnable];

    /// The state with this number; an unknown one is uninitialised.
    pub(crate) const fn from_number(number: u8) -> Self {
        match number {
            1 => Self::Initialized,
            2 => Self::Runnable,
            _ => Self::Uninitialized,
        }
    }

    /// Whether guests may run, so that what is taken away must be blocked and tracked first.
    pub const fn needs_tracking(self) -> bool {
        matches!(self, Self::Runnable)
    }
}

use Function as F;
use OpState::{Initialized, Runnable, Uninitialized};
use State as S;

/// In which states of the TD a function is allowed. Functions that are not listed do not ask.
pub const OP_STATES: &[(Function, &[OpState])] = &[
    (F::MngInit, &[Uninitialized]),
    (F::VpCreate, &[Initialized]),
    (F::VpAddCx, &[Initialized]),
    (F::VpInit, &[Initialized]),
    (F::VpEnter, &[Runnable]),
    (F::PageAdd, &[Initialized]),
    (F::MrExtend, &[Initialized]),
    (F::MrFinalize, &[Initialized]),
    (F::SeptAdd, &[Initialized, Runnable]),
    (F::PageAug, &[Initialized, Runnable]),
    (F::PageRelocate, &[Initialized, Runnable]),
    (F::RangeBlock, &[Initialized, Runnable]),
    (F::RangeUnblock, &[Initialized, Runnable]),
    (F::PageDemote, &[Initialized, Runnable]),
    (F::PagePromote, &[Initialized, Runnable]),
    (F::PageRemove, &[Initialized, Runnable]),
    (F::SeptRemove, &[Initialized, Runnable]),
    (F::SeptRead, &[Initialized, Runnable]),
    (F::Track, &[Initialized, Runnable]),
];

/// In which states of the entry a function on Secure EPT entries is allowed.
pub const ENTRY_STATES: &[(Function, &[State])] = &[
    (F::PageAdd, &[S::Free]),
    (F::SeptAdd, &[S::Free]),
    (F::PageAug, &[S::Free, S::Removed]),
    (
        F::PageRelocate,
        &[
            S::Mapped,
            S::Blocked,
            S::BlockedWrite,
            S::ExportedBlockedWrite,
            S::ExportedDirty,
            S::ExportedDirtyBlockedWrite,
            S::Pending,
            S::PendingBlocked,
            S::PendingBlockedWrite,
            S::PendingExportedBlockedWrite,
            S::PendingExportedDirty,
            S::PendingExportedDirtyBlockedWrite,
        ],
    ),
    (
        F::RangeBlock,
        &[
            S::NonLeafMapped,
            S::Mapped,
            S::BlockedWrite,
            S::Pending,
            S::PendingBlockedWrite,
        ],
    ),
    (
        F::RangeUnblock,
        &[S::NonLeafBlocked, S::Blocked, S::PendingBlocked],
    ),
    (
        F::PageDemote,
        &[S::Mapped, S::Blocked, S::Pending, S::PendingBlocked],
    ),
    (F::PagePromote, &[S::NonLeafMapped, S::NonLeafBlocked]),
    (F::MrExtend, &[S::Mapped]),
    (
        F::PageRemove,
        &[
            S::Mapped,
            S::Blocked,
            S::BlockedWrite,
            S::Pending,
            S::PendingBlocked,
            S::PendingBlockedWrite,
        ],
    ),
    (F::SeptRemove, &[S::NonLeafMapped, S::NonLeafBlocked]),
    (F::SeptRead, S::ALL),
];

/// The states of an entry in which the guest may accept it.
pub const ACCEPTABLE: &[State] = &[S::Pending, S::PendingExportedDirty];

fn row<T: Copy + PartialEq>(table: &[(Function, &[T])], function: Function, state: T) -> bool {
    table
        .iter()
        .any(|&(listed, states)| listed == function && states.contains(&state))
}

/// Whether `function` is allowed while the TD is in `state`.
///
/// # Errors
/// `OP_STATE_INCORRECT`.
pub fn op_state_allows(function: Function, state: OpState) -> Result<(), Status> {
    let asks = OP_STATES.iter().any(|&(listed, _)| listed == function);
    if !asks || row(OP_STATES, function, state) {
        Ok(())
    } else {
        Err(Status::OP_STATE_INCORRECT)
    }
}

/// Whether `function` is allowed on an entry in `state`.
///
/// # Errors
/// `EPT_ENTRY_STATE_INCORRECT`, or for BLOCK of what is blocked `GPA_RANGE_ALREADY_BLOCKED`.
pub fn entry_allows(function: Function, state: State) -> Result<(), Status> {
    if row(ENTRY_STATES, function, state) {
        Ok(())
    } else if function == Function::RangeBlock && state.is_blocked() {
        Err(Status::GPA_RANGE_ALREADY_BLOCKED.with(Operand::Rcx))
    } else {
        Err(Status::EPT_ENTRY_STATE_INCORRECT.with(Operand::Rcx))
    }
}
