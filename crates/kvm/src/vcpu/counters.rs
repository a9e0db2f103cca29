//! What one vCPU counts. Written by the thread that runs it, read by anybody.

use std::sync::atomic::{AtomicU64, Ordering};
use twofold_abi::spp::KVM_EXIT_SPP;

/// A count with one writer: adding to it is a plain load and store.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    #[inline]
    pub(crate) fn increment(&self) {
        self.0.store(
            self.0.load(Ordering::Relaxed).wrapping_add(1),
            Ordering::Relaxed,
        );
    }

    #[inline]
    pub(crate) fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Exit reasons that are counted one by one; `KVM_EXIT_*` are below.
const EXIT_REASONS: usize = 48;
/// Counters of returns: one more for the reason that is Twofold's own.
const RETURNS: usize = EXIT_REASONS + 1;

/// The counters of a vCPU, most of them named as KVM names them.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    /// Times the processor stopped for the hypervisor.
    pub(crate) exits: Counter,
    pub(crate) io_exits: Counter,
    pub(crate) mmio_exits: Counter,
    pub(crate) signal_exits: Counter,
    pub(crate) halt_exits: Counter,
    pub(crate) irq_window_exits: Counter,
    pub(crate) request_irq_exits: Counter,
    pub(crate) insn_emulation_fail: Counter,
    pub(crate) hypercalls: Counter,
    pub(crate) irq_injections: Counter,
    pub(crate) nmi_injections: Counter,
    pub(crate) pf_taken: Counter,
    pub(crate) pf_fixed: Counter,
    pub(crate) pf_emulate: Counter,
    pub(crate) pf_spurious: Counter,
    pub(crate) pf_fast: Counter,
    pub(crate) pf_mmio_spte_created: Counter,
    /// Second-stage faults by access.
    pub(crate) read_faults: Counter,
    pub(crate) write_faults: Counter,
    pub(crate) fetch_faults: Counter,
    /// Leaves that faults mapped: 4K, 2M, 1G.
    pub(crate) mapped: [Counter; 3],
    /// From the processor, copied at each return to the program.
    pub(crate) instructions: Counter,
    pub(crate) tlb_flush: Counter,
    /// Returns to the program, by `KVM_EXIT_*`.
    pub(crate) returns: Returns,
}

/// Returns to the program, by `KVM_EXIT_*`.
#[derive(Debug)]
pub(crate) struct Returns([Counter; RETURNS]);

impl Default for Returns {
    fn default() -> Self {
        Self([const { Counter(AtomicU64::new(0)) }; RETURNS])
    }
}

impl Returns {
    #[inline]
    pub(crate) fn increment(&self, reason: u32) {
        if let Some(counter) = self.counter(reason) {
            counter.increment();
        }
    }

    pub(crate) fn get(&self, reason: u32) -> u64 {
        self.counter(reason).map_or(0, Counter::get)
    }

    #[inline]
    fn counter(&self, reason: u32) -> Option<&Counter> {
        match reason {
            KVM_EXIT_SPP => self.0.last(),
            _ => self.0[..EXIT_REASONS].get(reason as usize),
        }
    }
}
