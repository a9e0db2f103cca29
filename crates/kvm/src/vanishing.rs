//! Whether faults of the hypervisor's own accesses to the program's memory are survived.
//!
//! With a handler of SIGSEGV and SIGBUS in place, memory that may not be there is simply accessed,
//! and an access that fails answers so. Without one (the Rust API in a program of its own) the
//! kernel is asked instead, which takes a system call each time.

use std::sync::atomic::{AtomicBool, Ordering};

static SURVIVED: AtomicBool = AtomicBool::new(false);

/// A handler is in place that asks [`abi::in_guest_access_fixup`](crate::abi::in_guest_access_fixup)
/// first, for as long as the process lives.
pub(crate) fn set_survived() {
    SURVIVED.store(true, Ordering::Release);
}

/// Whether [`set_survived`] was called.
#[inline]
pub(crate) fn is_survived() -> bool {
    SURVIVED.load(Ordering::Acquire)
}
