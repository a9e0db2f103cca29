//! What a return to the program asks of it, and what it answers.

use super::tdcall::VmcallAnswer;

/// What the program has to supply, or has been told, before the guest goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(super) enum Answer {
    /// Nothing.
    #[default]
    None,
    /// Data for port input, in the data page.
    PortInput {
        /// Bytes in all.
        bytes: usize,
    },
    /// Data for a read of emulated memory.
    Memory {
        /// Bytes.
        length: usize,
    },
    /// The value of a register, or an error.
    Rdmsr,
    /// Whether a register took its value.
    Wrmsr,
    /// The result of a hypercall.
    Hypercall,
    /// Nothing: the machine has stopped.
    Shutdown,
    /// What a trust domain's guest asked of KVM by TDG.VP.VMCALL.
    Vmcall(VmcallAnswer),
}
