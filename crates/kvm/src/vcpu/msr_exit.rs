//! RDMSR and WRMSR of the guest that the processor does not carry out by itself.

use super::exit::Answer;
use super::lapic::{self, Refused};
use super::msr::MSR_PLATFORM_INFO;
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
        // The registers of x2APIC mode are nobody's to filter.
        let allowed = lapic::X2APIC.contains(&index) || self.vm.allows_msr(index, MsrAccess::WRITE);
        let accepted = allowed && self.accept_msr(state, index, value);
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

    /// Has the guest's value written. Whether the register takes it.
    pub(super) fn accept_msr(&self, state: &mut VcpuState, index: u32, value: u64) -> bool {
        if let Some(taken) = self.write_paravirt_msr(state, index, value) {
            return taken;
        }
        match state.write_apic_msr(index, value) {
            Some(Ok(effect)) => {
                self.carry_out(state, effect);
                true
            }
            Some(Err(Refused)) => false,
            None => state.set_msr(index, value, true),
        }
    }
}
