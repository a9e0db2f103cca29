//! TDG.VP.VMCALL: what a TD's guest asks of KVM.
//!
//! RCX is a mask of the registers that KVM may see and change: it reads others as 0, and what it
//! writes to them is dropped. R10 is the kind of call and R11 the subfunction; R10 returns the
//! status, R11 and more the results.

use super::super::exit::Answer;
use super::super::run::Next;
use super::super::{Vcpu, VcpuState};
use super::map_gpa::MapGpa;
use rustix::io::Errno;
use twofold_cpu::state::gpr;

pub(super) const R10: usize = 10;
pub(super) const R11: usize = 11;
pub(super) const R12: usize = 12;
pub(super) const R13: usize = 13;
pub(super) const R14: usize = 14;
pub(super) const R15: usize = 15;

/// What the program is to supply for a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum VmcallAnswer {
    /// Whether a piece of memory was converted.
    MapGpa(MapGpa),
    /// The result of a hypercall of KVM's own.
    Hypercall,
    /// Data for port input.
    PortInput {
        /// Bytes.
        size: usize,
    },
    /// Data for a read of emulated memory.
    Memory {
        /// Bytes.
        size: usize,
    },
    /// The value of a register, or an error.
    Rdmsr,
    /// Whether a register took its value.
    Wrmsr,
}

/// What R10 says when KVM has answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub(super) enum CallStatus {
    Success = 0,
    /// Not all is done: again, from R11 on.
    Retry = 1,
    InvalidOperand = 1 << 63,
    AlignError = 1 << 63 | 2,
    /// There is no such subfunction.
    Unsupported = 1 << 63 | 3,
}

/// Subfunctions.
mod subfunction {
    use twofold_cpu::reason;

    pub(super) const CPUID: u64 = reason::CPUID as u64;
    pub(super) const HLT: u64 = reason::HLT as u64;
    pub(super) const IO: u64 = reason::IO as u64;
    pub(super) const RDMSR: u64 = reason::RDMSR as u64;
    pub(super) const WRMSR: u64 = reason::WRMSR as u64;
    pub(super) const MMIO: u64 = reason::EPT_VIOLATION as u64;
    pub(super) const GET_TD_VM_CALL_INFO: u64 = 0x10000;
    pub(super) const MAP_GPA: u64 = 0x10001;
    pub(super) const GET_QUOTE: u64 = 0x10002;
    pub(super) const REPORT_FATAL_ERROR: u64 = 0x10003;
}

/// The registers of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Call {
    mask: u64,
    gpr: [u64; 16],
}

impl Call {
    /// The call that the guest is at.
    pub(super) fn of(state: &VcpuState) -> Self {
        Self::new(state.cpu.registers().gpr)
    }

    fn new(gpr: [u64; 16]) -> Self {
        Self {
            mask: gpr[gpr::RCX],
            gpr,
        }
    }

    fn exposes(&self, register: usize) -> bool {
        self.mask >> register & 1 != 0
    }

    /// A register as KVM sees it.
    pub(super) fn get(&self, register: usize) -> u64 {
        match self.exposes(register) {
            true => self.gpr[register & 15],
            false => 0,
        }
    }

    /// Changes a register as far as KVM can.
    pub(super) fn set(&mut self, register: usize, value: u64) {
        if self.exposes(register) {
            self.gpr[register & 15] = value;
        }
    }

    /// Ends the call: the module returns success, KVM this.
    pub(super) fn finish(self, state: &mut VcpuState, status: CallStatus) {
        self.finish_with(state, status as u64);
    }

    fn finish_with(mut self, state: &mut VcpuState, result: u64) {
        self.set(R10, result);
        self.gpr[gpr::RAX] = 0;
        state.cpu.complete_tdcall(&self.gpr);
    }
}

impl Vcpu {
    /// Carries out the TDG.VP.VMCALL that the guest is at.
    pub(in super::super) fn td_vmcall(&self, state: &mut VcpuState) -> Result<Next, Errno> {
        self.core.counters.hypercalls.increment();
        let call = Call::of(state);
        if call.get(R10) != 0 {
            return Ok(self.vendor_call(state, call));
        }
        Ok(match call.get(R11) {
            subfunction::CPUID => self.td_cpuid(state, call),
            subfunction::HLT => self.td_halt(state, call)?,
            subfunction::IO => self.td_port(state, call),
            subfunction::RDMSR => self.td_read_msr(state, call),
            subfunction::WRMSR => self.td_write_msr(state, call),
            subfunction::MMIO => self.td_memory(state, call),
            subfunction::MAP_GPA => self.td_map_gpa(state, call),
            subfunction::GET_TD_VM_CALL_INFO => info(state, call),
            subfunction::REPORT_FATAL_ERROR => self.fatal_error(state, call),
            subfunction::GET_QUOTE => {
                tracing::warn!("the guest asks for a quote, which only hardware can sign");
                call.finish(state, CallStatus::Unsupported);
                Next::Enter
            }
            other => {
                tracing::debug!(
                    subfunction = format_args!("{other:#x}"),
                    "a subfunction of TDG.VP.VMCALL that is not there"
                );
                call.finish(state, CallStatus::Unsupported);
                Next::Enter
            }
        })
    }

    /// A hypercall of KVM's own: the number in R10, arguments in R11 to R14, the result in R10.
    fn vendor_call(&self, state: &mut VcpuState, call: Call) -> Next {
        let arguments = [R11, R12, R13, R14].map(|register| call.get(register));
        match self.emulate_hypercall(state, call.get(R10), arguments, true) {
            Some(result) => {
                call.finish_with(state, result);
                Next::Enter
            }
            None => {
                state.answer = Answer::Vmcall(VmcallAnswer::Hypercall);
                Next::Return(kvm_bindings::KVM_EXIT_HYPERCALL)
            }
        }
    }

    /// Carries on with a call that the program has answered. The reason, if it has to do more.
    pub(in super::super) fn continue_vmcall(
        &self,
        state: &mut VcpuState,
        answered: VmcallAnswer,
    ) -> Option<u32> {
        let page = &self.core.run;
        let mut call = Call::of(state);
        match answered {
            VmcallAnswer::MapGpa(progress) => return self.continue_map_gpa(state, call, progress),
            VmcallAnswer::Hypercall => call.finish_with(state, page.hypercall_result()),
            VmcallAnswer::PortInput { size } => {
                let mut data = [0; 8];
                page.read_io_data(&mut data[..size.min(8)]);
                call.set(R11, u64::from_le_bytes(data));
                call.finish(state, CallStatus::Success);
            }
            VmcallAnswer::Memory { size } => {
                let mut data = page.mmio_data();
                data[size.min(8)..].fill(0);
                call.set(R11, u64::from_le_bytes(data));
                call.finish(state, CallStatus::Success);
            }
            VmcallAnswer::Rdmsr => match page.msr_answer() {
                Some(value) => {
                    call.set(R11, value);
                    call.finish(state, CallStatus::Success);
                }
                None => call.finish(state, CallStatus::InvalidOperand),
            },
            VmcallAnswer::Wrmsr => match page.msr_answer() {
                Some(_) => call.finish(state, CallStatus::Success),
                None => call.finish(state, CallStatus::InvalidOperand),
            },
        }
        None
    }

    /// `KVM_EXIT_SYSTEM_EVENT`: the guest cannot go on and says why, in the registers that it shows.
    fn fatal_error(&self, state: &mut VcpuState, call: Call) -> Next {
        /// What the module tells KVM about a VMCALL: exit reason "TDCALL".
        const TDCALL_REASON: u64 = 77;
        /// `KVM_SYSTEM_EVENT_TDX_FATAL`
        const TDX_FATAL: u32 = 7;
        let mut data: [u64; 16] = std::array::from_fn(|register| call.get(register));
        data[gpr::RAX] = TDCALL_REASON;
        data[gpr::RCX] = call.mask;
        call.finish(state, CallStatus::Success);
        self.core.run.set_system_event(TDX_FATAL, &data);
        Next::Return(kvm_bindings::KVM_EXIT_SYSTEM_EVENT)
    }
}

/// GetTdVmCallInfo: that the subfunctions which every hypervisor has are there (R12 is 0), and which
/// of the others are: none (R12 is 1).
fn info(state: &mut VcpuState, mut call: Call) -> Next {
    let status = match call.get(R12) {
        0 | 1 => {
            for register in R11..=R14 {
                call.set(register, 0);
            }
            CallStatus::Success
        }
        _ => CallStatus::InvalidOperand,
    };
    call.finish(state, status);
    Next::Enter
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_registers_in_the_mask_are_seen_and_changed() {
        for mask in [0, 1 << R10 | 1 << R11, 0xfc00, 0xffec] {
            let mut gpr: [u64; 16] = std::array::from_fn(|register| 100 + register as u64);
            gpr[gpr::RCX] = mask;
            let mut call = Call::new(gpr);
            for (register, &value) in gpr.iter().enumerate() {
                let exposed = mask >> register & 1 != 0;
                let expected = if exposed { value } else { 0 };
                assert_eq!(call.get(register), expected, "{mask:#x} {register}");
                call.set(register, 7);
                let expected = if exposed { 7 } else { value };
                assert_eq!(call.gpr[register], expected, "{mask:#x} {register}");
            }
        }
    }

    #[test]
    fn statuses_have_the_documented_values() {
        assert_eq!(CallStatus::InvalidOperand as u64, 0x8000_0000_0000_0000);
        assert_eq!(CallStatus::AlignError as u64, 0x8000_0000_0000_0002);
        assert_eq!(CallStatus::Unsupported as u64, 0x8000_0000_0000_0003);
    }
}
