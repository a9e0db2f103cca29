//! What a trust domain's guest asks for: of the TDX module, and through it of KVM.

use super::{Vcpu, VcpuState};
use crate::td::ProcessPlatform;
use twofold_cpu::Exit;
use twofold_tdx::Entered;

/// What the module does about an exit, with the virtual processor still inside. `None`: the guest
/// goes on. Otherwise it leaves for KVM, with this exit.
pub(super) fn inside(
    _vcpu: &Vcpu,
    _state: &mut VcpuState,
    _inside: &Entered<'_, ProcessPlatform>,
    exit: Exit,
) -> Option<Exit> {
    Some(exit)
}
