//! Hypercalls of the guest (KVM API, "Linux KVM Hypercall").

use super::exit::Answer;
use super::run::Next;
use super::{Vcpu, VcpuState};
use crate::vm::HypercallExits;
use twofold_arch::PAGE_SIZE;

/// Hypercall numbers and results of the KVM ABI (`linux/kvm_para.h`).
const KVM_HC_VAPIC_POLL_IRQ: u64 = 1;
const KVM_HC_MAP_GPA_RANGE: u64 = 12;
const KVM_ENOSYS: u64 = 1000;
const KVM_EPERM: u64 = 1;
const KVM_EINVAL: u64 = 22;
/// `KVM_EXIT_HYPERCALL_LONG_MODE`
const HYPERCALL_LONG_MODE: u64 = 1;

impl Vcpu {
    pub(super) fn hypercall(&self, state: &mut VcpuState) -> Next {
        self.core.counters.hypercalls.increment();
        let regs = state.regs();
        let long_mode = state.is_long_mode();
        let narrow = |value: u64| {
            if long_mode {
                value
            } else {
                value & 0xffff_ffff
            }
        };
        let number = narrow(regs.rax);
        let arguments = [narrow(regs.rbx), narrow(regs.rcx), narrow(regs.rdx)];
        let result = if state.is_user() {
            KVM_EPERM.wrapping_neg()
        } else {
            match number {
                KVM_HC_VAPIC_POLL_IRQ => 0,
                KVM_HC_MAP_GPA_RANGE
                    if self
                        .vm
                        .hypercall_exits()
                        .contains(HypercallExits::MAP_GPA_RANGE) =>
                {
                    let [gpa, pages, _] = arguments;
                    let gfn = gpa / PAGE_SIZE;
                    if gpa.is_multiple_of(PAGE_SIZE) && gfn.wrapping_add(pages) > gfn {
                        state.answer = Answer::Hypercall;
                        let flags = if long_mode { HYPERCALL_LONG_MODE } else { 0 };
                        self.core.run.set_hypercall(number, arguments, flags);
                        return Next::Return(kvm_bindings::KVM_EXIT_HYPERCALL);
                    }
                    KVM_EINVAL.wrapping_neg()
                }
                _ => KVM_ENOSYS.wrapping_neg(),
            }
        };
        state.cpu.complete_hypercall(narrow(result));
        Next::Enter
    }
}
