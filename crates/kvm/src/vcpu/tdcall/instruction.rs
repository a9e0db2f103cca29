//! What a TD's guest asks of KVM in place of an instruction: CPUID, HLT, port I/O, RDMSR and WRMSR.

use super::super::exit::Answer;
use super::super::run::Next;
use super::super::{Vcpu, VcpuState};
use super::vmcall::{Call, CallStatus, R11, R12, R13, R14, R15, VmcallAnswer};
use crate::bus::Space;
use crate::cpuid;
use crate::msr_filter::MsrAccess;
use crate::td::{emulates_msr, is_read_only_msr};
use kvm_bindings::{
    KVM_EXIT_IO, KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR, KVM_MSR_EXIT_REASON_FILTER,
    KVM_MSR_EXIT_REASON_INVAL, KVM_MSR_EXIT_REASON_UNKNOWN,
};
use rustix::io::Errno;

impl Vcpu {
    /// CPUID: leaf and subleaf in R12 and R13, the four registers in R12 to R15. The answer is from
    /// the table that the program has set.
    pub(super) fn td_cpuid(&self, state: &mut VcpuState, mut call: Call) -> Next {
        let (leaf, subleaf) = (call.get(R12) as u32, call.get(R13) as u32);
        let words = cpuid::find(&state.cpuid, leaf, subleaf)
            .map_or([0; 4], |entry| [entry.eax, entry.ebx, entry.ecx, entry.edx]);
        for (register, word) in (R12..=R15).zip(words) {
            call.set(register, word.into());
        }
        call.finish(state, CallStatus::Success);
        Next::Enter
    }

    /// HLT: R12 says whether interrupts are blocked.
    pub(super) fn td_halt(&self, state: &mut VcpuState, call: Call) -> Result<Next, Errno> {
        let blocked = call.get(R12) != 0;
        call.finish(state, CallStatus::Success);
        if !blocked && state.has_interrupt(self.vm.has_external()) {
            return Ok(Next::Enter);
        }
        self.halt(state)
    }

    /// Port I/O: bytes in R12, direction in R13 (1 to write), port in R14, data in R15 or R11.
    pub(super) fn td_port(&self, state: &mut VcpuState, call: Call) -> Next {
        self.core.counters.io_exits.increment();
        let (size, direction, port) = (call.get(R12), call.get(R13), call.get(R14));
        let (1 | 2 | 4, 0 | 1, Ok(port)) = (size, direction, u16::try_from(port)) else {
            call.finish(state, CallStatus::InvalidOperand);
            return Next::Enter;
        };
        let page = &self.core.run;
        let size = size as u8;
        if direction == 1 {
            let data = call.get(R15).to_le_bytes();
            let data = &data[..usize::from(size)];
            call.finish(state, CallStatus::Success);
            if self.vm.buses().write(Space::Port, port.into(), data) {
                return Next::Enter;
            }
            page.write_io_data(data);
        } else {
            let size = usize::from(size);
            state.answer = Answer::Vmcall(VmcallAnswer::PortInput { size });
        }
        page.set_io(direction == 1, size, port, 1);
        Next::Return(KVM_EXIT_IO)
    }

    /// RDMSR: the register's number in R12, its value in R11.
    pub(super) fn td_read_msr(&self, state: &mut VcpuState, mut call: Call) -> Next {
        let index = call.get(R12) as u32;
        let value = if !emulates_msr(index) {
            Err(KVM_MSR_EXIT_REASON_UNKNOWN)
        } else if !self.vm.allows_msr(index, MsrAccess::READ) {
            Err(KVM_MSR_EXIT_REASON_FILTER)
        } else {
            state.msr(index, true).ok_or(KVM_MSR_EXIT_REASON_UNKNOWN)
        };
        match value {
            Ok(value) => {
                call.set(R11, value);
                call.finish(state, CallStatus::Success);
            }
            Err(reason) if self.vm.exits_for_msr(reason) => {
                state.answer = Answer::Vmcall(VmcallAnswer::Rdmsr);
                let page = &self.core.run;
                page.set_msr(KVM_EXIT_X86_RDMSR, reason, index, 0);
                return Next::Return(KVM_EXIT_X86_RDMSR);
            }
            Err(_) => call.finish(state, CallStatus::InvalidOperand),
        }
        Next::Enter
    }

    /// WRMSR: the register's number in R12, its new value in R13.
    pub(super) fn td_write_msr(&self, state: &mut VcpuState, call: Call) -> Next {
        let (index, value) = (call.get(R12) as u32, call.get(R13));
        let refused = if !emulates_msr(index) {
            Some(KVM_MSR_EXIT_REASON_UNKNOWN)
        } else if !self.vm.allows_msr(index, MsrAccess::WRITE) {
            Some(KVM_MSR_EXIT_REASON_FILTER)
        } else {
            let accepted = !is_read_only_msr(index) && self.accept_msr(state, index, value);
            (!accepted).then_some(KVM_MSR_EXIT_REASON_INVAL)
        };
        match refused {
            None => call.finish(state, CallStatus::Success),
            Some(reason) if self.vm.exits_for_msr(reason) => {
                state.answer = Answer::Vmcall(VmcallAnswer::Wrmsr);
                let page = &self.core.run;
                page.set_msr(KVM_EXIT_X86_WRMSR, reason, index, value);
                return Next::Return(KVM_EXIT_X86_WRMSR);
            }
            Some(_) => call.finish(state, CallStatus::InvalidOperand),
        }
        Next::Enter
    }
}
