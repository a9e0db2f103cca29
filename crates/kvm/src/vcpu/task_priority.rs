//! What KVM offers to speed up guests that change the local APIC's task priority often, for
//! processors that leave the guest each time: it tells the program of each access, so that it can
//! patch the guest, and keeps the priority in the guest's memory for the patched code.
//!
//! This processor is one of the others: `KVM_CAP_VAPIC` answers 0. As with KVM on those, both calls
//! succeed, no access is ever told of, and so there is no patched code that would look at the memory.

use super::Vcpu;
use kvm_bindings::kvm_tpr_access_ctl;
use rustix::io::Errno;
use twofold_arch::Gpa;

impl Vcpu {
    /// `KVM_TPR_ACCESS_REPORTING`: there is never anything to report.
    ///
    /// # Errors
    /// `EINVAL` for flags.
    pub fn report_task_priority(&self, control: &kvm_tpr_access_ctl) -> Result<(), Errno> {
        if control.flags == 0 {
            Ok(())
        } else {
            Err(Errno::INVAL)
        }
    }

    /// `KVM_SET_VAPIC_ADDR`: where patched code would find the task priority; 0 for nowhere.
    ///
    /// # Errors
    /// `EINVAL` without an in-kernel local APIC, and for an address without memory.
    pub fn set_vapic_address(&self, address: u64) -> Result<(), Errno> {
        let mut state = self.state();
        if state.lapic.is_none() {
            return Err(Errno::INVAL);
        }
        if address != 0 {
            let memory = self
                .vm
                .tables()
                .lookup(&mut state.reader, Gpa::new(address));
            memory.ok_or(Errno::INVAL)?;
        }
        Ok(())
    }
}
