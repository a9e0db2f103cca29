//! Atomics: the processor's, or `shuttle`'s when the interleavings of the whole MMU are explored
//! (`tests/interleavings.rs`).

#[cfg(not(shuttle))]
pub(crate) use core::sync::atomic;
#[cfg(shuttle)]
pub(crate) use shuttle::sync::atomic;

/// Where `shuttle` may go on with another thread, as it may at each of its atomics.
#[inline(always)]
pub(crate) fn switch_point() {
    #[cfg(shuttle)]
    atomic::AtomicBool::new(false).load(atomic::Ordering::SeqCst);
}
