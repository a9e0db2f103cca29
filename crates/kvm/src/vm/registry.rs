//! The VMs of this process.

use super::Vm;
use crate::sync::ProcessMutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

/// VMs of this process that exist. While it is 0, nothing that the program does to its memory is
/// any of our business.
static VM_COUNT: AtomicUsize = AtomicUsize::new(0);
static VMS: ProcessMutex<Vec<Weak<Vm>>> = ProcessMutex::new(Vec::new());

/// A VM has come.
pub(super) fn register(vm: &Arc<Vm>) {
    VM_COUNT.fetch_add(1, Ordering::Relaxed);
    VMS.with(|vms| {
        vms.retain(|vm| vm.strong_count() != 0);
        vms.push(Arc::downgrade(vm));
    });
}

/// A VM is going.
pub(super) fn unregister() {
    VM_COUNT.fetch_sub(1, Ordering::Relaxed);
}

/// Whether the process has any VM: one load.
#[inline]
pub(crate) fn any() -> bool {
    VM_COUNT.load(Ordering::Relaxed) != 0
}

/// The VMs of this process.
pub(crate) fn all() -> Vec<Arc<Vm>> {
    VMS.with(|vms| vms.iter().filter_map(Weak::upgrade).collect())
}

/// Before `fork`.
pub(crate) fn lock_registry_for_fork() {
    VMS.close_gate();
}

/// After `fork`.
pub(crate) fn unlock_registry_after_fork() {
    VMS.open_gate();
}

/// In a forked child: the parent's VMs are not ours.
pub(crate) fn forget_inherited() {
    VM_COUNT.store(0, Ordering::Relaxed);
    VMS.with(Vec::clear);
}
