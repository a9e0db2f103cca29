//! Second-stage faults.

use twofold_arch::{Gpa, Level, Pferr};

/// A second-stage fault as the processor reports it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fault {
    /// The guest-physical address.
    pub gpa: Gpa,
    /// The access and why it failed. An EPT misconfiguration is [`Pferr::RSVD`].
    pub error: Pferr,
}

/// What became of a fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// A mapping at this level allows the access now.
    Fixed {
        /// The level of the leaf.
        level: Level,
    },
    /// The access had been allowed by another processor meanwhile.
    Spurious,
    /// Something is changing; run the guest again.
    Retry,
    /// No slot, or a write to a read-only slot: the access is MMIO.
    Mmio,
    /// The root is no longer valid: load a new one, then run the guest again.
    ObsoleteRoot,
}

/// Why a fault cannot be resolved.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FaultError {
    /// The slot's host memory is not there, or does not allow the access: `-EFAULT`.
    #[error("host memory of the slot is not accessible")]
    BadHostMemory,
    /// The slot's host memory is known to be bad: `-EHWPOISON`.
    #[error("host memory of the slot is poisoned")]
    Poisoned,
    /// A signal came while host memory was being made present: `-EINTR`.
    #[error("interrupted by a signal")]
    Interrupted,
    /// No page for a table could be had: `-ENOMEM`.
    #[error("no memory for a table page")]
    OutOfMemory,
}
