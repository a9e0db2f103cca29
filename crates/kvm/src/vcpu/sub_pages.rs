//! Exits about sub-page permissions.

use super::run::Next;
use super::{Vcpu, VcpuState};
use kvm_bindings::{KVM_EXIT_INTERNAL_ERROR, KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON};
use rustix::io::Errno;
use twofold_abi::spp::KVM_EXIT_SPP;
use twofold_arch::{Gpa, Pferr};
use twofold_mmu::{FaultError, Outcome};

/// The basic exit reason of an SPP-related event (SDM Vol. 3, "VMX Basic Exit Reasons").
const SPP_EVENT: u64 = 66;

impl Vcpu {
    /// The processor found no table for a write: the MMU fills in the 2M around it.
    pub(super) fn sub_page_miss(&self, state: &mut VcpuState, gpa: Gpa) -> Result<Next, Errno> {
        let VcpuState {
            reader,
            root: Some(root),
            ..
        } = state
        else {
            return Ok(Next::Enter);
        };
        match self.vm.tables().sppt_miss(reader, root, gpa) {
            Ok(Outcome::ObsoleteRoot) => state.root = None,
            Ok(_) => {}
            Err(FaultError::Interrupted) => return Err(self.interrupted()),
            // Filling a table touches no memory of the program: what is left is to have none.
            Err(_) => return Err(Errno::NOMEM),
        }
        Ok(Next::Enter)
    }

    /// The table holds what no processor accepts: only a defect of ours puts it there.
    pub(super) fn sub_page_misconfiguration(&self, gpa: Gpa, gla: u64) -> Next {
        tracing::error!(
            vcpu = self.core.id,
            %gpa,
            gla = format_args!("{gla:#x}"),
            "the sub-page permission table has reserved bits set"
        );
        self.core.run.set_internal_error(
            KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON,
            &[SPP_EVENT, gpa.get(), gla],
        );
        Next::Return(KVM_EXIT_INTERNAL_ERROR)
    }

    /// The guest wanted to write the byte at `gpa`, which it must not: the program is asked.
    pub(super) fn sub_page_denied(&self, state: &VcpuState, gpa: Gpa, error: Pferr) -> Next {
        // The walk of the guest's tables is not the instruction's write: without it, it would have
        // been another one.
        let length = match error.contains(Pferr::GUEST_PAGE) {
            true => 0,
            false => state.cpu.exit_instruction_length(),
        };
        self.core.run.set_spp(gpa.get(), length);
        Next::Return(KVM_EXIT_SPP)
    }
}
