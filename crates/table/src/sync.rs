//! Atomics: the processor's, or those of `loom` or `shuttle` when interleavings are explored.
//! `loom` tries every one of a small protocol, weak memory included; `shuttle` runs the whole MMU,
//! one thread at a time, and switches threads at atomic operations.

#[cfg(not(any(loom, shuttle)))]
pub use core::sync::atomic;
#[cfg(loom)]
pub use loom::sync::atomic;
#[cfg(all(shuttle, not(loom)))]
pub use shuttle::sync::atomic;

/// The cheap half of an asymmetric barrier: keeps the compiler from moving memory accesses across
/// it. The other half is the host's heavy barrier, which makes every reader's processor execute a
/// real one. `loom` has no such thing, so there both halves are real fences.
#[inline(always)]
pub fn light_barrier() {
    #[cfg(not(loom))]
    atomic::compiler_fence(atomic::Ordering::SeqCst);
    #[cfg(loom)]
    atomic::fence(atomic::Ordering::SeqCst);
}
