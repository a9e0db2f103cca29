//! Signals that arrive while a vCPU runs.
//!
//! Whoever handles signals for the program asks [`interrupt_current_run`] first. While this thread
//! is inside `KVM_RUN` the answer is yes: the call will return `EINTR`, and only then may the
//! program's own handler run, as with the kernel's.

use super::VcpuCore;
use super::cancellation::CancellableRun;
use std::cell::Cell;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{Ordering, compiler_fence};

thread_local! {
    /// The vCPU that this thread runs, or null.
    static CURRENT: Cell<*const VcpuCore> = const { Cell::new(ptr::null()) };
}

/// What handles signals for the program: needed for `KVM_SET_SIGNAL_MASK` only.
///
/// While a vCPU with a signal mask runs, the thread's mask is that one, and a signal that the
/// thread itself blocks must end the run and stay pending.
pub trait RunSignals: Sync {
    /// Before the vCPU runs: blocks exactly `mask` (bit n is signal n + 1).
    fn enter(&self, mask: u64);
    /// After the vCPU ran: restores the thread's own mask.
    fn leave(&self);
    /// Whether a signal that `mask` does not block waits for this thread.
    fn pending(&self, mask: u64) -> bool;
}

static RUN_SIGNALS: OnceLock<&'static dyn RunSignals> = OnceLock::new();

/// Registers the handler of signals. The first one stays.
pub fn register_run_signals(signals: &'static dyn RunSignals) {
    let _ = RUN_SIGNALS.set(signals);
}

/// Makes the `KVM_RUN` that this thread is in, if any, return `EINTR` soon. Whether it is in one.
///
/// Async-signal-safe: two atomic stores to the vCPU that the thread itself keeps alive.
pub(crate) fn interrupt_current_run() -> bool {
    let current = CURRENT.get();
    // UNSAFETY: dereferences what `Running` stored.
    #[expect(unsafe_code)]
    // SAFETY: not null only between `Running::start` and its drop on this very thread, which
    // borrows the vCPU.
    match unsafe { current.as_ref() } {
        Some(core) => {
            core.signalled.store(true, Ordering::Relaxed);
            core.line.kick();
            core.inbox.ring_own();
            true
        }
        None => false,
    }
}

/// This thread is inside `KVM_RUN` of a vCPU.
pub(super) struct Running<'a> {
    core: &'a VcpuCore,
    masked: Option<&'static dyn RunSignals>,
    /// Ends the run when the thread is cancelled.
    _cancellable: Option<CancellableRun>,
}

impl<'a> Running<'a> {
    #[inline]
    pub(super) fn start(core: &'a VcpuCore, mask: Option<u64>) -> Self {
        CURRENT.set(core);
        compiler_fence(Ordering::SeqCst);
        let cancellable = CancellableRun::begin(core);
        let masked = mask.and_then(|mask| {
            let signals = *RUN_SIGNALS.get()?;
            signals.enter(mask);
            if signals.pending(mask) {
                core.signalled.store(true, Ordering::Relaxed);
                core.line.kick();
            }
            Some(signals)
        });
        Self {
            core,
            masked,
            _cancellable: cancellable,
        }
    }
}

impl Drop for Running<'_> {
    #[inline]
    fn drop(&mut self) {
        if let Some(signals) = self.masked {
            signals.leave();
        }
        compiler_fence(Ordering::SeqCst);
        CURRENT.set(ptr::null());
        compiler_fence(Ordering::SeqCst);
        if self.core.signalled.load(Ordering::Relaxed) {
            self.core.signalled.store(false, Ordering::Relaxed);
            self.core.line.cancel_kick();
        }
    }
}
