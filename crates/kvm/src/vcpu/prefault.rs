//! `KVM_PRE_FAULT_MEMORY` (SPEC 3.2).

use super::signal::Running;
use super::{Vcpu, VcpuState};
use crate::td::Stage;
use kvm_bindings::kvm_pre_fault_memory;
use rustix::io::Errno;
use std::sync::atomic::Ordering;
use twofold_arch::{Gfn, PAGE_SHIFT, PAGE_SIZE};
use twofold_mmu::{FaultError, PrefaultError};

impl Vcpu {
    /// `KVM_PRE_FAULT_MEMORY`: maps memory before the guest uses it, and moves `gpa` and `size` of
    /// the request to what is left. It ends well if anything was mapped.
    ///
    /// # Errors
    /// `EINVAL` for flags and for a range that is empty, wraps or is not page aligned. If not even
    /// the first page could be mapped: `EINTR` when a signal is pending, `ENOENT` without a slot,
    /// `EAGAIN` while the slot is deleted or moved, `EFAULT` where a guest's access would fail too,
    /// `EHWPOISON`, `ENOMEM`. For a trust domain `EOPNOTSUPP` before `FINALIZE_VM`, and `EINVAL` for
    /// an address with the shared bit.
    pub fn pre_fault_memory(&self, request: &mut kvm_pre_fault_memory) -> Result<(), Errno> {
        let (gpa, size) = (request.gpa, request.size);
        if request.flags != 0
            || !gpa.is_multiple_of(PAGE_SIZE)
            || !size.is_multiple_of(PAGE_SIZE)
            || gpa.wrapping_add(size) <= gpa
        {
            return Err(Errno::INVAL);
        }
        let mut state = self.core.state.lock();
        let running = Running::start(&self.core, state.signal_mask);
        let mut left = (gpa, size);
        let result = self.pre_fault(&mut state, &mut left);
        drop(running);
        (request.gpa, request.size) = left;
        if left.1 == size { result } else { Ok(()) }
    }

    fn pre_fault(&self, state: &mut VcpuState, left: &mut (u64, u64)) -> Result<(), Errno> {
        while left.1 != 0 {
            if self.core.signalled.load(Ordering::Relaxed) {
                return Err(Errno::INTR);
            }
            if let Some(td) = self.vm.td() {
                if td.stage() != Stage::Runnable {
                    return Err(Errno::OPNOTSUPP);
                }
                if left.0 & td.shared_bit().unwrap_or(0) != 0 {
                    return Err(Errno::INVAL);
                }
            }
            self.load_root(state)?;
            let VcpuState {
                reader,
                root,
                td_roots,
                ..
            } = state;
            let end = (left.0 + left.1) >> PAGE_SHIFT;
            let gfns = Gfn::new(left.0 >> PAGE_SHIFT)..Gfn::new(end);
            let tables = self.vm.tables();
            let result = match (root, td_roots) {
                (Some(root), _) => tables.prefault(reader, root, gfns),
                (None, Some(roots)) => tables.td_prefault(reader, roots, gfns),
                (None, None) => return Err(Errno::IO),
            };
            let pages = match result {
                Ok(pages) => pages,
                Err(PrefaultError::Retry) => {
                    rustix::thread::sched_yield();
                    continue;
                }
                Err(PrefaultError::ObsoleteRoot) => {
                    (state.root, state.td_roots) = (None, None);
                    continue;
                }
                Err(PrefaultError::NoSlot) => return Err(Errno::NOENT),
                Err(PrefaultError::SlotChanges) => return Err(Errno::AGAIN),
                Err(PrefaultError::Fault(error)) => return Err(errno(error)),
            };
            let bytes = (pages << PAGE_SHIFT).min(left.1);
            left.0 += bytes;
            left.1 -= bytes;
        }
        Ok(())
    }
}

fn errno(error: FaultError) -> Errno {
    match error {
        FaultError::BadHostMemory | FaultError::BadPrivateMemory | FaultError::WrongKind { .. } => {
            Errno::FAULT
        }
        FaultError::Poisoned | FaultError::PoisonedPrivate => Errno::HWPOISON,
        FaultError::Interrupted => Errno::INTR,
        FaultError::OutOfMemory => Errno::NOMEM,
        FaultError::Bugged => Errno::IO,
    }
}
