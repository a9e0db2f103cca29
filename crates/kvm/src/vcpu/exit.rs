//! What a return to the program asks of it, and what it answers.

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
}
