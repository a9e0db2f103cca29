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
            Some(KVM_EPERM.wrapping_neg())
        } else {
            self.emulate_hypercall(number, arguments, long_mode)
        };
        match result {
            Some(result) => {
                state.cpu.complete_hypercall(narrow(result));
                Next::Enter
            }
            None => {
                state.answer = Answer::Hypercall;
                Next::Return(kvm_bindings::KVM_EXIT_HYPERCALL)
            }
        }
    }

    /// The result of a hypercall. `None`: the program has to say, and the run page says what.
    pub(super) fn emulate_hypercall(
        &self,
        number: u64,
        arguments: [u64; 3],
        long_mode: bool,
    ) -> Option<u64> {
        match number {
            KVM_HC_VAPIC_POLL_IRQ => Some(0),
            KVM_HC_MAP_GPA_RANGE if self.exits_for_map_gpa() => {
                let [gpa, pages, _] = arguments;
                let gfn = gpa / PAGE_SIZE;
                if gpa.is_multiple_of(PAGE_SIZE) && gfn.wrapping_add(pages) > gfn {
                    self.exit_for_map_gpa(arguments, long_mode);
                    None
                } else {
                    Some(KVM_EINVAL.wrapping_neg())
                }
            }
            _ => Some(KVM_ENOSYS.wrapping_neg()),
        }
    }

    /// Whether the program wants to hear of guests that convert memory.
    pub(super) fn exits_for_map_gpa(&self) -> bool {
        let exits = self.vm.hypercall_exits();
        exits.contains(HypercallExits::MAP_GPA_RANGE)
    }

    /// Puts a conversion into the run page: address, pages, attributes.
    pub(super) fn exit_for_map_gpa(&self, arguments: [u64; 3], long_mode: bool) {
        let flags = if long_mode { HYPERCALL_LONG_MODE } else { 0 };
        self.core
            .run
            .set_hypercall(KVM_HC_MAP_GPA_RANGE, arguments, flags);
    }
}
