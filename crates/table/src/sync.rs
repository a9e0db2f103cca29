//! Atomics: the processor's, or `loom`'s when every interleaving is explored.

#[cfg(not(loom))]
pub use core::sync::atomic;
#[cfg(loom)]
pub use loom::sync::atomic;

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
