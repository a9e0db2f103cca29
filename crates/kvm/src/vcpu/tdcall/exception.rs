//! What the TDX module raises in the guest: #VE for instructions that a TD does not execute, and for
//! private pages that the guest has not accepted.

use super::super::{Vcpu, VcpuState};
use crate::td::ProcessPlatform;
use rustix::io::Errno;
use twofold_arch::Gpa;
use twofold_cpu::{Exception, VeInfo, vector};
use twofold_tdx::{Entered, Violation};

/// #VE, or #DF if the guest has not taken the information about the one before.
pub(super) fn inject(state: &mut VcpuState, info: &VeInfo) {
    if state.cpu.inject_ve(info).is_err() {
        state.cpu.queue_exception(Exception {
            vector: vector::DF,
            error_code: Some(0),
            payload: None,
        });
    }
}

/// Whether the module deals by itself with an EPT violation at an address, with a qualification and
/// a linear address: the page has come meanwhile, or it waits to be accepted and the guest is told.
///
/// # Errors
/// `EIO` if the page waits to be accepted and the guest does not want to be told (extended
/// qualification "pending"): it touched memory that it has not accepted, and nobody can help it.
pub(super) fn absorbs(
    vcpu: &Vcpu,
    state: &mut VcpuState,
    inside: &Entered<'_, ProcessPlatform>,
    (gpa, qualification, gla): (Gpa, u64, u64),
) -> Result<bool, Errno> {
    match inside.violation(gpa) {
        Violation::Present => Ok(true),
        Violation::Exit => Ok(false),
        // While an event is being delivered there is no #VE.
        Violation::Ve if delivers_event(state) => Ok(false),
        Violation::Ve => {
            inject(state, &VeInfo::of_violation(gpa, qualification, gla));
            Ok(true)
        }
        Violation::PendingExit => {
            tracing::error!(
                vcpu = vcpu.core.id,
                rip = format_args!("{:#x}", state.rip()),
                %gpa,
                "the guest touched private memory that it has not accepted"
            );
            if let Some(td) = vcpu.vm.td() {
                td.bug("its guest touched memory that it has not accepted", None);
            }
            Err(Errno::IO)
        }
    }
}

/// Whether an event waits that the processor could not deliver.
fn delivers_event(state: &VcpuState) -> bool {
    let events = state.cpu.events();
    events.exception.is_some() || events.interrupt.is_some() || events.nmi_injected
}
