//! The thread that lets pages become huge again which were split because they were executed: KVM's
//! `kvm-nx-lpage-recovery`.

use crate::parameter;
use crate::service_thread;
use crate::vm::Vm;
use rustix::io::Errno;
use std::sync::{Arc, Weak};
use std::thread::Thread;
use std::time::Duration;

/// Milliseconds of the hour in which everything is recovered if no period is set.
const HOUR: u64 = 60 * 60 * 1000;

/// The worker of one VM. It ends with the VM.
#[derive(Debug)]
pub(crate) struct Worker(Thread);

impl Worker {
    /// Starts the worker of a VM if the mitigation is on and anything is to be recovered at all.
    ///
    /// # Errors
    /// `EAGAIN` or `ENOMEM` if there is no thread to be had.
    pub(crate) fn start(vm: &Arc<Vm>) -> Result<Option<Self>, Errno> {
        let ratio = parameter::NX_RECOVERY_RATIO.get();
        if !vm.tables().nx_huge_pages() || ratio == 0 {
            return Ok(None);
        }
        let period = match parameter::NX_RECOVERY_PERIOD.get() {
            0 => HOUR / u64::from(ratio),
            period => u64::from(period),
        };
        let period = Duration::from_millis(period.max(1));
        let vm = Arc::downgrade(vm);
        let thread = service_thread::start("kvm-nx-lpage-recovery", move || {
            recover(&vm, period, ratio);
        });
        match thread {
            Ok(handle) => Ok(Some(Self(handle.thread().clone()))),
            Err(error) => Err(Errno::from_io_error(&error).unwrap_or(Errno::AGAIN)),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.0.unpark();
    }
}

fn recover(vm: &Weak<Vm>, period: Duration, ratio: u32) {
    loop {
        std::thread::park_timeout(period);
        // The last reference may be dropped here: the worker is then unparked by itself.
        let Some(vm) = vm.upgrade() else {
            return;
        };
        if !vm.tables().nx_huge_pages() {
            return;
        }
        let recovered = vm.tables().recover_nx_huge_pages(ratio);
        if recovered > 0 {
            tracing::debug!(recovered, "tables of executed pages taken out");
        }
    }
}
