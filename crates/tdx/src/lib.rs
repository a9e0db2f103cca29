//! The memory side of the TDX module, as a model.
//!
//! On hardware the module is signed firmware between a hypervisor and the TDs (confidential virtual
//! machines) it runs. Only the module writes the tables that map a TD's private memory (the Secure
//! EPT); the hypervisor asks it to by SEAMCALL, the guest by TDCALL. [`Module`] is that module's
//! memory side, in the language of its own interface: functions by number with registers
//! ([`Module::seamcall`]), or the same as methods.
//!
//! | what | where |
//! |---|---|
//! | the life of a TD and its virtual processors | [`Module::mng_create`], [`Module::vp_create`] and their neighbours |
//! | initial memory, and its measurement | [`Module::page_add`], [`Module::mr_extend`], [`measurement`] |
//! | tables and pages that the guest accepts | [`Module::sept_add`], [`Module::page_aug`], [`Entered::accept`] |
//! | taking memory away: BLOCK, TRACK, REMOVE | [`Module::range_block`], [`Module::track`], [`Module::page_remove`] |
//! | larger and smaller pages | [`Module::page_promote`], [`Module::page_demote`] |
//! | what is allowed when | [`legality`]: two tables |
//!
//! Nothing here waits: a lock that is taken is an answer (`OPERAND_BUSY`), as with the module itself.
//!
//! What is not modelled: keys and encryption (a private page's content is what its memory holds),
//! CPU state, attestation quotes, migration streams, nested (partitioned) TDs.
#![cfg_attr(not(any(test, loom, shuttle)), no_std)]

extern crate alloc;

mod epoch;
mod functions;
mod guest;
pub mod legality;
mod lock;
pub mod measurement;
mod module;
mod pamt;
mod platform;
mod seamcall;
mod sept;
mod status;
mod td;
mod vcpu;

pub use functions::Reclaimed;
pub use guest::{Accept, Entered, Violation, VpInfo};
pub use module::{Failure, Module};
pub use pamt::{PageMetadata, PageType};
pub use platform::{Platform, Point};
pub use seamcall::Registers;
pub use sept::{SeptEntry, State};
pub use status::{Operand, Status};
pub use td::{Lifecycle, SEPT_VE_DISABLE, TD_PARAMS_BYTES, TdParams};
pub use vcpu::TDVPX_PAGES;

/// Control pages that a TD needs besides its root page.
pub const TDCX_PAGES: usize = 6;

/// Which of them becomes the root of the Secure EPT.
pub(crate) const TDCX_SEPT_ROOT: usize = TDCX_PAGES - 1;
