//! What `fork` does to a process that has virtual machines.
//!
//! A VM belongs to the address space that created it: in a forked child its ioctls answer `EIO`,
//! as KVM's do. The child may open `/dev/kvm` and create VMs of its own.

use crate::{fd_table, pagemap, summary, td, vm};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

static GENERATION: AtomicU32 = AtomicU32::new(0);
/// The process that the current generation belongs to.
static PROCESS: AtomicU32 = AtomicU32::new(0);

/// Which process this is, counted in forks from the first: a VM remembers the value that was
/// current when it was created.
#[inline]
pub(crate) fn generation() -> u32 {
    GENERATION.load(Ordering::Relaxed)
}

/// Registers the handlers that keep the process-wide locks usable in a forked child. Called
/// before the first descriptor is handed out.
pub(crate) fn prepare_process() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        PROCESS.store(std::process::id(), Ordering::Relaxed);
        // UNSAFETY: pthread_atfork takes C callbacks.
        #[expect(unsafe_code)]
        // SAFETY: the three callbacks have the C ABI, do not unwind and live as long as the
        // program.
        let result = unsafe { libc::pthread_atfork(Some(before), Some(in_parent), Some(in_child)) };
        if result != 0 {
            tracing::warn!(
                result,
                "pthread_atfork failed: a child of this process may hang"
            );
        }
    });
}

/// In a child that may or may not have run the handlers.
pub(crate) fn adopt_child() {
    if PROCESS.load(Ordering::Relaxed) != std::process::id() {
        in_child();
    }
}

extern "C" fn before() {
    vm::lock_registry_for_fork();
    td::lock_for_fork();
    summary::lock_for_fork();
    fd_table::lock_for_fork();
}

extern "C" fn in_parent() {
    fd_table::unlock_after_fork();
    summary::unlock_after_fork();
    td::unlock_after_fork();
    vm::unlock_registry_after_fork();
}

extern "C" fn in_child() {
    PROCESS.store(std::process::id(), Ordering::Relaxed);
    GENERATION.fetch_add(1, Ordering::Relaxed);
    in_parent();
    vm::forget_inherited();
    summary::forget_parent();
    pagemap::forget_parent();
}
