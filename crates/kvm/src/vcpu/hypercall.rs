//! Hypercalls of the guest (KVM API, "Linux KVM Hypercall").

use super::exit::Answer;
use super::run::Next;
use super::{Vcpu, VcpuState};
use crate::cpuid::feature;
use crate::irqchip::Message;
use crate::vm::HypercallExits;
use twofold_arch::PAGE_SIZE;

/// Hypercall numbers and results of the KVM ABI (`linux/kvm_para.h`).
const KVM_HC_VAPIC_POLL_IRQ: u64 = 1;
const KVM_HC_KICK_CPU: u64 = 5;
const KVM_HC_SEND_IPI: u64 = 10;
const KVM_HC_SCHED_YIELD: u64 = 11;
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
        let arguments = [regs.rbx, regs.rcx, regs.rdx, regs.rsi].map(narrow);
        let result = if state.is_user() {
            Some(KVM_EPERM.wrapping_neg())
        } else {
            self.emulate_hypercall(state, number, arguments, long_mode)
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
        state: &VcpuState,
        number: u64,
        arguments: [u64; 4],
        long_mode: bool,
    ) -> Option<u64> {
        match number {
            KVM_HC_VAPIC_POLL_IRQ => Some(0),
            KVM_HC_KICK_CPU if state.may_use(feature::UNHALT) => {
                self.vm.unhalt(arguments[1] as u32);
                Some(0)
            }
            KVM_HC_SEND_IPI if state.may_use(feature::SEND_IPI) => {
                Some(self.send_interrupts(arguments, long_mode))
            }
            KVM_HC_SCHED_YIELD if state.may_use(feature::YIELD) => {
                rustix::thread::sched_yield();
                Some(0)
            }
            KVM_HC_MAP_GPA_RANGE if self.exits_for_map_gpa() => {
                let [gpa, pages, attributes, _] = arguments;
                let gfn = gpa / PAGE_SIZE;
                if gpa.is_multiple_of(PAGE_SIZE) && gfn.wrapping_add(pages) > gfn {
                    self.exit_for_map_gpa([gpa, pages, attributes], long_mode);
                    None
                } else {
                    Some(KVM_EINVAL.wrapping_neg())
                }
            }
            _ => Some(KVM_ENOSYS.wrapping_neg()),
        }
    }

    /// An interrupt for many: the local APICs whose ids are a number and those after it, by two words
    /// of bits; then the command. How many took it.
    fn send_interrupts(&self, arguments: [u64; 4], long_mode: bool) -> u64 {
        /// Destination and shorthand have no meaning here.
        const FORBIDDEN: u64 = 3 << 18 | 0xff << 24;
        let [low, high, first, command] = arguments;
        if command & FORBIDDEN != 0 {
            return KVM_EINVAL.wrapping_neg();
        }
        let width = if long_mode { 64 } else { 32 };
        let named = u128::from(low) | u128::from(high) << width;
        let message = Message::of_command(command as u32, 0);
        let is_named = |id: u32| {
            let bit = u64::from(id).checked_sub(first);
            bit.is_some_and(|bit| bit < 2 * width && named >> bit & 1 != 0)
        };
        self.vm.deliver_to(&message, is_named, &self.core).into()
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
