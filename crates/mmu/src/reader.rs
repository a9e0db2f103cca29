//! The state of one thread that resolves faults.

/// One thread's registration with an MMU: its read section, what it remembers from the last fault,
/// and its counters. One per virtual processor; deregisters itself when dropped.
pub struct Reader {
    _private: (),
}

/// Counters of one reader, as KVM publishes them for each virtual processor.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ReaderStats {
    /// Faults taken.
    pub pf_taken: u64,
    /// Faults resolved by a new or wider mapping.
    pub pf_fixed: u64,
    /// Faults that ended as MMIO.
    pub pf_emulate: u64,
    /// Faults that another processor had resolved.
    pub pf_spurious: u64,
    /// Faults resolved by restoring write permission without a lock or the host's help.
    pub pf_fast: u64,
    /// MMIO entries written.
    pub pf_mmio_spte_created: u64,
    /// Faults to be tried again.
    pub pf_retry: u64,
}

impl Reader {
    /// This reader's counters.
    pub fn stats(&self) -> ReaderStats {
        unimplemented!()
    }
}
