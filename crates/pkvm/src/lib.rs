//! A protected hypervisor for arm64: the host that starts guests cannot reach their memory.
//!
//! The hypervisor runs at EL2 and owns two kinds of stage-2 tables: the host's, in which every
//! address is itself and from which pages that were given away are missing, and each guest's.
//! [`ownership`] says who may give what to whom, [`lifecycle`] how VMs come and go,
//! [`hypercall`] how the host asks. [`matrix`] is the rule book: for every state of a page, what
//! each call must answer; it runs natively and in the image of `hardware/arm64` alike. [`audit`]
//! checks the state of every page.
//!
//! Nothing here allocates: all memory comes from pages that the platform or the host gave.
#![cfg_attr(not(any(test, loom)), no_std)]

pub mod audit;
pub mod early;
pub mod error;
pub mod exception;
pub mod flush;
pub mod guest;
pub mod guest_memory;
pub mod host_table;
pub mod hypercall;
pub mod hypervisor;
pub mod interrupts;
pub mod lifecycle;
mod lock;
pub mod matrix;
pub mod ownership;
pub mod page;
mod place;
pub mod platform;
pub mod pool;
pub mod request;
pub mod run;
pub mod shared;
mod stack;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
pub mod trace;
pub mod vm;

pub use error::Error;
pub use guest::{Access, GuestPage};
pub use host_table::{HostFault, Owner};
pub use hypervisor::{Config, Hypervisor};
pub use page::{PageMap, PageRecord, Pages, Region, State};
pub use platform::{Platform, Vmid};
pub use shared::{HostVcpu, HostVm};
pub use vm::{Handle, Registers};
