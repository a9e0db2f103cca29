//! What a trust domain's guest asks for: of the TDX module, and through it of KVM.
//!
//! Everything here but [`vmcall`] is the module's, and happens while the virtual processor is
//! inside: [`function`] answers TDCALL, [`exception`] gives instructions that a TD does not execute
//! back to it as #VE, and says what a violation at a private address is. [`vmcall`] is KVM's side of
//! TDG.VP.VMCALL, after the virtual processor has left (Guest-Hypervisor Communication Interface):
//! [`instruction`] is for what a guest asks in place of an instruction, [`memory`] for emulated
//! memory, [`map_gpa`] for conversion.

mod exception;
mod function;
mod instruction;
mod map_gpa;
mod memory;
mod vmcall;

pub(super) use vmcall::VmcallAnswer;

use super::{Vcpu, VcpuState};
use crate::td::ProcessPlatform;
use rustix::io::Errno;
use twofold_cpu::{Exit, SecondStageFault, VeInfo};
use twofold_tdx::Entered;

/// What the module does about an exit, with the virtual processor still inside. `None`: the guest
/// goes on. Otherwise it leaves for KVM, with this exit; [`Exit::Tdcall`] is then TDG.VP.VMCALL.
///
/// # Errors
/// `EIO` if the TD cannot go on.
pub(super) fn inside(
    vcpu: &Vcpu,
    state: &mut VcpuState,
    inside: &Entered<'_, ProcessPlatform>,
    exit: Exit,
) -> Result<Option<Exit>, Errno> {
    Ok(match exit {
        Exit::Tdcall => function::answer(state, inside),
        Exit::Intercepted {
            reason,
            qualification,
            length,
        } => {
            let info = VeInfo::of_instruction(reason, qualification, length);
            exception::inject(state, &info);
            None
        }
        Exit::SecondStage(SecondStageFault::EptViolation {
            gpa,
            qualification,
            gla,
        }) => {
            if exception::absorbs(vcpu, state, inside, (gpa, qualification, gla))? {
                None
            } else {
                Some(exit)
            }
        }
        other => Some(other),
    })
}
