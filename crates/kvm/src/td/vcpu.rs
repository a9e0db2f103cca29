//! `KVM_MEMORY_ENCRYPT_OP` on the descriptor of a TD's vCPU.

use super::abi::{TdxCommand, command};
use super::life::{ControlError, Stage, Td};
use super::start;
use crate::cpuid;
use crate::usercopy;
use crate::vcpu::{Vcpu, VcpuState};
use rustix::io::Errno;

/// Leaf 1, ECX: x2APIC.
const X2APIC: u32 = 1 << 21;

impl Vcpu {
    /// `KVM_MEMORY_ENCRYPT_OP` on a vCPU: the command at `argument`.
    ///
    /// # Errors
    /// `EINVAL` for the vCPU of a VM that is no TD; `EFAULT`; `EINVAL` if `hw_error` is not 0, if the TD
    /// is finalised, or if there is no such command; then those of the command.
    pub(crate) fn memory_encrypt_op(&self, argument: usize) -> Result<(), Errno> {
        let td = self.vm().td().ok_or(Errno::INVAL)?;
        let request: TdxCommand = usercopy::read(argument)?;
        if request.hw_error != 0 {
            return Err(Errno::INVAL);
        }
        let mut state = self.state();
        if !td.has_key() || td.stage() == Stage::Runnable {
            return Err(Errno::INVAL);
        }
        match request.id {
            command::INIT_VCPU => self.td_init_vcpu(td, &mut state, &request),
            command::INIT_MEM_REGION => self.td_init_mem_region(td, &mut state, &request),
            command::GET_CPUID => get_cpuid(td, &request),
            _ => Err(Errno::INVAL),
        }
    }

    /// `KVM_TDX_INIT_VCPU`: `data` is what the guest finds in RCX.
    fn td_init_vcpu(
        &self,
        td: &Td,
        state: &mut VcpuState,
        request: &TdxCommand,
    ) -> Result<(), Errno> {
        if request.flags != 0 || state.td().is_some() {
            return Err(Errno::INVAL);
        }
        // The local APIC of a TD is in x2APIC mode, so its CPUID has to have that.
        if cpuid::find(state.cpuid(), 1, 0).is_none_or(|leaf| leaf.ecx & X2APIC == 0) {
            return Err(Errno::INVAL);
        }
        let vcpu = match td.create_vcpu(request.data) {
            Ok(vcpu) => vcpu,
            Err(ControlError::Host(error)) => return Err(error),
            Err(ControlError::Module(status)) => {
                td.bug("a virtual processor cannot be created", Some(status));
                return Err(Errno::IO);
            }
        };
        let params = td.params().ok_or(Errno::IO)?;
        state.start_td(
            vcpu,
            &start::registers(&params, td.cpuid(), request.data, vcpu.index),
            &start::system_registers(),
            td.cpuid(),
        );
        Ok(())
    }
}

/// `KVM_TDX_GET_CPUID`: what CPUID says in the TD. `E2BIG`, and how many entries there are, if the
/// program has no room for them.
fn get_cpuid(td: &Td, request: &TdxCommand) -> Result<(), Errno> {
    let address = usize::try_from(request.data).map_err(|_| Errno::FAULT)?;
    let [room, padding]: [u32; 2] = usercopy::read(address)?;
    let table = td.cpuid();
    usercopy::write(address, &[table.len() as u32, padding])?;
    if (room as usize) < table.len() {
        return Err(Errno::TOOBIG);
    }
    usercopy::write_slice(address.checked_add(8).ok_or(Errno::FAULT)?, table)
}
