//! RDMSR and WRMSR of the guest that the processor does not carry out by itself.

use super::exit::Answer;
use super::lapic::{self, Lapic, Refused};
use super::msr::{IA32_TSC_DEADLINE, MSR_PLATFORM_INFO};
use super::run::Next;
use super::{Vcpu, VcpuState};
use crate::msr_filter::MsrAccess;
use kvm_bindings::{
    KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR, KVM_MSR_EXIT_REASON_FILTER, KVM_MSR_EXIT_REASON_INVAL,
    KVM_MSR_EXIT_REASON_UNKNOWN,
};

impl Vcpu {
    pub(super) fn read_msr(&self, state: &mut VcpuState, index: u32) -> Next {
        let value = if !self.vm.allows_msr(index, MsrAccess::READ) {
            Err(KVM_MSR_EXIT_REASON_FILTER)
        } else if index == MSR_PLATFORM_INFO && self.vm.hides_platform_info() {
            Err(KVM_MSR_EXIT_REASON_INVAL)
        } else {
            state.msr(index, true).ok_or(KVM_MSR_EXIT_REASON_UNKNOWN)
        };
        if let Err(reason) = value {
            if self.vm.exits_for_msr(reason) {
                state.answer = Answer::Rdmsr;
                let page = &self.core.run;
                page.set_msr(KVM_EXIT_X86_RDMSR, reason, index, 0);
                return Next::Return(KVM_EXIT_X86_RDMSR);
            }
            tracing::debug!(index = format_args!("{index:#x}"), "RDMSR refused");
        }
        state.cpu.complete_rdmsr(value.ok());
        Next::Enter
    }

    pub(super) fn write_msr(&self, state: &mut VcpuState, index: u32, value: u64) -> Next {
        let to_lapic = match index {
            IA32_TSC_DEADLINE => state.lapic.as_ref().map_or(Ok(()), Lapic::write_deadline),
            _ if lapic::X2APIC.contains(&index) => {
                let result = state.write_x2apic(index, value);
                state.cpu.complete_wrmsr(result.is_ok());
                if result.is_ok() {
                    return Next::Enter;
                }
                result
            }
            _ => Ok(()),
        };
        if let Err(Refused::Unsupported(what)) = to_lapic {
            return self.irqchip_used(what, index.into());
        }
        let allowed = self.vm.allows_msr(index, MsrAccess::WRITE);
        let accepted = allowed && state.set_msr(index, value, true);
        if !accepted {
            let reason = if !allowed {
                KVM_MSR_EXIT_REASON_FILTER
            } else if state.msr(index, true).is_none() {
                KVM_MSR_EXIT_REASON_UNKNOWN
            } else {
                KVM_MSR_EXIT_REASON_INVAL
            };
            if self.vm.exits_for_msr(reason) {
                state.answer = Answer::Wrmsr;
                self.core
                    .run
                    .set_msr(KVM_EXIT_X86_WRMSR, reason, index, value);
                return Next::Return(KVM_EXIT_X86_WRMSR);
            }
            tracing::debug!(
                index = format_args!("{index:#x}"),
                value = format_args!("{value:#x}"),
                "WRMSR refused"
            );
        }
        state.cpu.complete_wrmsr(accepted);
        Next::Enter
    }
}
