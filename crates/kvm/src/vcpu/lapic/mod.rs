//! A vCPU's local APIC: registers, priorities, end of interrupt, and what its commands ask for (SDM
//! Vol. 3, "Advanced Programmable Interrupt Controller").
//!
//! It belongs to the vCPU's thread. What others have for it waits in the vCPU's [`Inbox`], where it
//! also says how it is addressed.

mod register;
mod timer;

use super::inbox::Inbox;
use crate::irqchip::{Address, AddressMode, Delivery, Destination, Message};
use kvm_bindings::kvm_lapic_state;
use register::command;
use std::sync::Arc;
use timer::Timer;
use twofold_cpu::Cpu;

/// The first MSR of x2APIC; the others follow in the order of the page, one for 16 bytes.
const X2APIC_FIRST: u32 = 0x800;
/// MSRs of x2APIC.
pub(super) const X2APIC: std::ops::Range<u32> = X2APIC_FIRST..0x840;

/// Bits of IA32_APIC_BASE.
pub(super) mod base {
    pub(in crate::vcpu) const X2APIC: u64 = 1 << 10;
    pub(in crate::vcpu) const ENABLED: u64 = 1 << 11;
}

/// A register is not there, or does not take the value: #GP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refused;

/// What the write of a register asks of others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    None,
    /// A message is to be delivered.
    Send(Message),
    /// An interrupt has ended.
    Ended(Ended),
    /// The vCPU's alarm may have to be set anew.
    Timer,
}

/// An interrupt that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ended {
    pub(super) vector: u8,
    /// It was level-triggered.
    pub(super) level: bool,
}

/// A local APIC.
pub(super) struct Lapic {
    /// The vCPU's number, which is the id in x2APIC mode.
    id: u32,
    /// IA32_APIC_BASE.
    base: u64,
    /// MCG_CAP has CMCI_P: there is a local vector for it.
    machine_checks: bool,
    state: Box<kvm_lapic_state>,
    /// Whether any interrupt is requested: most often there is none to look for.
    is_requested: bool,
    timer: Timer,
    inbox: Arc<Inbox>,
}

impl Lapic {
    /// An APIC after reset: its id, version, and everything masked but, for the bootstrap
    /// processor, the line from the PICs. `cycle` is that of the bus clock, in nanoseconds.
    pub(super) fn new(id: u32, base: u64, cycle: u64, inbox: Arc<Inbox>) -> Self {
        let mut lapic = Self {
            id,
            base,
            machine_checks: false,
            state: Box::new(kvm_lapic_state::default()),
            is_requested: false,
            timer: Timer::new(cycle),
            inbox,
        };
        lapic.reset();
        lapic.set(register::ID, id << 24);
        if base & super::APIC_BASE_BSP != 0 {
            lapic.set(register::LOCAL_LINE_0, register::MODE_EXTERNAL);
        }
        lapic.publish();
        lapic
    }

    /// What INIT leaves: the id and IA32_APIC_BASE, and the logical id of x2APIC mode.
    pub(super) fn reset(&mut self) {
        let (id, logical) = (
            self.get(register::ID),
            self.get(register::LOGICAL_DESTINATION),
        );
        *self.state = kvm_lapic_state::default();
        self.is_requested = false;
        self.stop_timer();
        self.set(register::ID, id);
        if self.is_x2apic() {
            self.set(register::LOGICAL_DESTINATION, logical);
        }
        self.set_version();
        self.set(register::DESTINATION_FORMAT, u32::MAX);
        self.set(register::SPURIOUS_VECTOR, 0xff);
        self.mask_local_vectors();
        self.publish();
    }

    fn set_version(&mut self) {
        let last_vector = if self.machine_checks { 6 } else { 5 };
        self.set(
            register::VERSION,
            last_vector << 16 | register::VERSION_NUMBER,
        );
    }

    /// Whether there is a local vector for corrected machine checks.
    pub(super) fn set_machine_checks(&mut self, on: bool) {
        self.machine_checks = on;
        self.set_version();
        let vector = if on { register::MASKED } else { 0 };
        self.set(register::LOCAL_MACHINE_CHECK, vector);
    }

    fn mask_local_vectors(&mut self) {
        for at in self.local_vectors() {
            self.set(at, self.get(at) | register::MASKED);
        }
    }

    fn local_vectors(&self) -> impl Iterator<Item = usize> + use<> {
        let first = (register::LOCAL_TIMER..=register::LOCAL_ERROR).step_by(16);
        first.chain(self.machine_checks.then_some(register::LOCAL_MACHINE_CHECK))
    }

    fn has_local_vector(&self, at: usize) -> bool {
        self.local_vectors().any(|vector| vector == at)
    }

    /// What `KVM_GET_LAPIC` shows. Without `wide_ids` the id of x2APIC mode is shown in the high
    /// byte, as that of xAPIC mode.
    pub(super) fn state(&mut self, cr8: u64, wide_ids: bool) -> kvm_lapic_state {
        self.collect();
        self.set(register::TASK_PRIORITY, self.task_priority(cr8));
        self.set(register::PROCESSOR_PRIORITY, self.priority(cr8));
        self.set(register::CURRENT_COUNT, self.current_count());
        let mut shown = *self.state;
        if self.is_x2apic() && !wide_ids {
            put(&mut shown, register::ID, self.id << 24);
        }
        shown
    }

    /// `KVM_SET_LAPIC`: what CR8 is then. The id of x2APIC mode is not the program's to choose;
    /// with `wide_ids` another one is refused.
    pub(super) fn set_state(
        &mut self,
        state: &kvm_lapic_state,
        wide_ids: bool,
    ) -> Result<u64, Refused> {
        if self.is_x2apic() && wide_ids && word(state, register::ID) != self.id {
            return Err(Refused);
        }
        self.collect();
        *self.state = *state;
        self.is_requested = true;
        self.set_version();
        if self.is_x2apic() {
            self.set_x2apic_id();
        }
        self.restart_timer();
        self.publish();
        Ok(u64::from(self.get(register::TASK_PRIORITY) >> 4 & 0xf))
    }

    fn get(&self, at: usize) -> u32 {
        word(&self.state, at)
    }

    fn set(&mut self, at: usize, value: u32) {
        put(&mut self.state, at, value);
    }

    pub(super) fn is_x2apic(&self) -> bool {
        self.base & base::X2APIC != 0
    }

    fn is_present(&self) -> bool {
        self.base & base::ENABLED != 0
    }

    fn is_enabled(&self) -> bool {
        self.get(register::SPURIOUS_VECTOR) & register::SOFTWARE_ENABLED != 0
    }

    /// Says to the others how this APIC is addressed now.
    fn publish(&self) {
        let mut mode = AddressMode::empty();
        mode.set(AddressMode::PRESENT, self.is_present());
        mode.set(AddressMode::X2APIC, self.is_x2apic());
        mode.set(AddressMode::ENABLED, self.is_enabled());
        let clusters = self.get(register::DESTINATION_FORMAT) >> 28 == 0;
        mode.set(AddressMode::CLUSTER, clusters);
        mode.set(AddressMode::EXTERNAL, self.takes_external());
        let (id, logical) = (
            self.get(register::ID),
            self.get(register::LOGICAL_DESTINATION),
        );
        let shift = if self.is_x2apic() { 0 } else { 24 };
        self.inbox.set_address(&Address {
            id: id >> shift,
            logical: logical >> shift,
            mode,
        });
    }

    /// Whether the PICs' interrupts come through here: by the first line, or past an APIC that is
    /// off.
    pub(super) fn takes_external(&self) -> bool {
        let line = self.get(register::LOCAL_LINE_0);
        !self.is_present()
            || line & register::MASKED == 0 && line & register::MODE == register::MODE_EXTERNAL
    }

    fn set_x2apic_id(&mut self) {
        self.set(register::ID, self.id);
        let logical = (self.id >> 4) << 16 | 1 << (self.id & 15);
        self.set(register::LOGICAL_DESTINATION, logical);
    }

    /// IA32_APIC_BASE has changed: the id has 8 bits in the high byte, or 32 in x2APIC mode, and
    /// then its logical form follows from it.
    pub(super) fn set_base(&mut self, now: u64) {
        let changed = (self.base ^ now) & (base::X2APIC | base::ENABLED) != 0;
        self.base = now;
        if !changed {
            return;
        }
        if self.is_x2apic() {
            self.set_x2apic_id();
        } else if self.is_present() {
            self.set(register::ID, self.id << 24);
        }
        self.publish();
    }

    /// Whether memory at this address is the APIC's page.
    pub(super) fn owns(&self, address: u64) -> bool {
        self.is_present() && address & !0xfff == self.base & !0xfff
    }

    /// Takes the interrupts that others have left.
    pub(super) fn collect(&mut self) {
        for (i, (edge, level)) in self.inbox.take_interrupts().into_iter().enumerate() {
            if edge | level == 0 {
                continue;
            }
            self.is_requested = true;
            for half in 0..2 {
                let offset = 16 * (2 * i + half);
                let (edge, level) = ((edge >> (32 * half)) as u32, (level >> (32 * half)) as u32);
                let requested = register::REQUESTED + offset;
                let trigger = register::TRIGGER_MODE + offset;
                self.set(requested, self.get(requested) | edge | level);
                self.set(trigger, self.get(trigger) & !edge | level);
            }
        }
    }

    /// The highest vector in one of the 256-bit registers.
    fn highest(&self, registers: usize) -> Option<u8> {
        (0..8).rev().find_map(|i| {
            let word = self.get(registers + 16 * i);
            (word != 0).then(|| (32 * i as u32 + 31 - word.leading_zeros()) as u8)
        })
    }

    fn has(&self, registers: usize, vector: u8) -> bool {
        self.get(registers + 16 * usize::from(vector / 32)) >> (vector % 32) & 1 != 0
    }

    fn mark(&mut self, registers: usize, vector: u8, on: bool) {
        let at = registers + 16 * usize::from(vector / 32);
        let bit = 1 << (vector % 32);
        let word = self.get(at);
        self.set(at, if on { word | bit } else { word & !bit });
    }

    /// The processor's priority: that of the task, which CR8 holds, or of the interrupt in service.
    fn priority(&self, cr8: u64) -> u32 {
        let task = self.task_priority(cr8);
        let service = self.service_priority();
        if task & 0xf0 >= service {
            task
        } else {
            service
        }
    }

    fn service_priority(&self) -> u32 {
        self.highest(register::IN_SERVICE)
            .map_or(0, |vector| u32::from(vector) & 0xf0)
    }

    fn task_priority(&self, cr8: u64) -> u32 {
        (cr8 as u32 & 0xf) << 4 | self.get(register::TASK_PRIORITY) & 0xf
    }

    /// The interrupt that the processor should take next.
    pub(super) fn pending(&self, cr8: u64) -> Option<u8> {
        self.requested()
            .filter(|vector| u32::from(*vector) & 0xf0 > self.priority(cr8) & 0xf0)
    }

    /// The value below which CR8 has to fall for the next interrupt to be taken, if that is all it
    /// waits for.
    pub(super) fn wants_cr8_below(&self, cr8: u64) -> Option<u64> {
        let class = u32::from(self.requested()?) & 0xf0;
        let by_task = class > self.service_priority() && class <= self.priority(cr8) & 0xf0;
        by_task.then_some(u64::from(class >> 4))
    }

    fn requested(&self) -> Option<u8> {
        if !self.is_requested || !self.is_present() || !self.is_enabled() {
            return None;
        }
        self.highest(register::REQUESTED)
    }

    /// The processor has taken an interrupt.
    pub(super) fn accept(&mut self, vector: u8) {
        self.mark(register::REQUESTED, vector, false);
        self.mark(register::IN_SERVICE, vector, true);
        self.is_requested = self.highest(register::REQUESTED).is_some();
    }

    /// The value of a register; `cr8` is the processor's.
    fn read(&self, at: usize, cr8: u64) -> u32 {
        match at {
            register::TASK_PRIORITY => self.task_priority(cr8),
            register::PROCESSOR_PRIORITY => self.priority(cr8),
            register::CURRENT_COUNT => self.current_count(),
            register::END_OF_INTERRUPT => 0,
            _ => self.get(at),
        }
    }

    /// Sets a register.
    fn write(&mut self, at: usize, value: u32, cpu: &mut Cpu) -> Effect {
        match at {
            register::TASK_PRIORITY => {
                cpu.set_cr8(u64::from(value >> 4 & 0xf));
                self.set(at, value & 0xff);
            }
            register::END_OF_INTERRUPT => return self.end_interrupt(),
            register::ERROR_STATUS => self.set(at, 0),
            register::SPURIOUS_VECTOR => {
                self.set(at, value & 0x3ff);
                if !self.is_enabled() {
                    self.mask_local_vectors();
                }
                self.publish();
            }
            register::INITIAL_COUNT => {
                self.set_initial_count(value);
                return Effect::Timer;
            }
            register::DIVIDE => {
                self.set_divisor(value);
                return Effect::Timer;
            }
            _ => {
                let bits = register::local_vector_bits(at).filter(|_| self.has_local_vector(at));
                let Some(bits) = bits else {
                    // The others are read-only, or not there.
                    return Effect::None;
                };
                let masked = if self.is_enabled() {
                    0
                } else {
                    register::MASKED
                };
                let value = value & bits | masked;
                if at == register::LOCAL_TIMER {
                    self.set_timer_vector(value, cpu);
                    return Effect::Timer;
                }
                self.set(at, value);
                self.publish();
            }
        }
        Effect::None
    }

    fn end_interrupt(&mut self) -> Effect {
        let Some(vector) = self.highest(register::IN_SERVICE) else {
            return Effect::None;
        };
        self.mark(register::IN_SERVICE, vector, false);
        let level = self.has(register::TRIGGER_MODE, vector);
        Effect::Ended(Ended { vector, level })
    }

    /// What a command sends. The message of one that only names its sender arrives at once.
    fn send(&mut self, command: u32, destination: u32) -> Effect {
        let message = Message::of_command(command, destination);
        if message.destination == Destination::Myself && message.delivery == Delivery::Fixed {
            self.request(message.vector, message.level);
            return Effect::None;
        }
        Effect::Send(message)
    }

    /// An interrupt arrives.
    fn request(&mut self, vector: u8, level: bool) {
        if self.is_enabled() {
            self.is_requested = true;
            self.mark(register::REQUESTED, vector, true);
            self.mark(register::TRIGGER_MODE, vector, level);
        }
    }

    /// Something of the APIC's own, or one of its lines, interrupts.
    fn local_interrupt(&mut self, at: usize) {
        let entry = self.get(at);
        if entry & register::MASKED == 0 {
            let mode = entry & register::MODE;
            if at == register::LOCAL_TIMER || Delivery::from_bits(mode >> 8) == Delivery::Fixed {
                self.request(entry as u8, false);
            }
        }
    }

    /// A corrected machine check interrupts, if there is a local vector for it.
    pub(super) fn signal_machine_check(&mut self) {
        if self.machine_checks {
            self.local_interrupt(register::LOCAL_MACHINE_CHECK);
        }
    }

    /// A read in the APIC's page, of up to 4 bytes: what is read, or nothing where there is no
    /// register.
    pub(super) fn read_memory(&self, offset: usize, length: usize, cr8: u64) -> [u8; 4] {
        if self.is_x2apic() {
            return [0xff; 4];
        }
        let within = offset & 0xf;
        if within + length > 4 || offset >= 0x400 {
            return [0; 4];
        }
        let value = self.read(offset & !0xf, cr8) >> (8 * within);
        value.to_le_bytes()
    }

    /// A write in the APIC's page. Only aligned words reach a register.
    pub(super) fn write_memory(&mut self, offset: usize, data: &[u8], cpu: &mut Cpu) -> Effect {
        let (true, 0, Ok(bytes)) = (!self.is_x2apic(), offset & 0xf, <[u8; 4]>::try_from(data))
        else {
            return Effect::None;
        };
        let value = u32::from_le_bytes(bytes);
        match offset {
            register::ID => {
                self.set(offset, value & 0xff00_0000);
                self.publish();
            }
            register::LOGICAL_DESTINATION => {
                self.set(offset, value & 0xff00_0000);
                self.publish();
            }
            register::DESTINATION_FORMAT => {
                self.set(offset, value | 0x0fff_ffff);
                self.publish();
            }
            register::COMMAND_HIGH => self.set(offset, value & 0xff00_0000),
            register::COMMAND => {
                let command = value & !command::BUSY;
                self.set(offset, command);
                return self.send(command, self.get(register::COMMAND_HIGH) >> 24);
            }
            _ => return self.write(offset, value, cpu),
        }
        Effect::None
    }

    /// RDMSR in x2APIC mode.
    pub(super) fn read_msr(&self, index: u32, cr8: u64) -> Option<u64> {
        let at = index.checked_sub(X2APIC_FIRST)? as usize * 16;
        match at {
            register::COMMAND => {
                Some(u64::from(self.get(register::COMMAND_HIGH)) << 32 | u64::from(self.get(at)))
            }
            register::ID
            | register::VERSION
            | register::TASK_PRIORITY
            | register::PROCESSOR_PRIORITY
            | register::LOGICAL_DESTINATION
            | register::SPURIOUS_VECTOR..=register::ERROR_STATUS
            | register::INITIAL_COUNT..=register::CURRENT_COUNT
            | register::DIVIDE => Some(self.read(at, cr8).into()),
            _ if self.has_local_vector(at) => Some(self.get(at).into()),
            _ => None,
        }
    }

    /// WRMSR in x2APIC mode.
    pub(super) fn write_msr(
        &mut self,
        index: u32,
        value: u64,
        cpu: &mut Cpu,
    ) -> Result<Effect, Refused> {
        let at = index.wrapping_sub(X2APIC_FIRST) as usize * 16;
        let low = value as u32;
        match at {
            register::COMMAND => {
                if low & command::RESERVED != 0 {
                    return Err(Refused);
                }
                let command = low & !command::BUSY;
                self.set(register::COMMAND, command);
                self.set(register::COMMAND_HIGH, (value >> 32) as u32);
                Ok(self.send(command, (value >> 32) as u32))
            }
            _ if value >> 32 != 0 => Err(Refused),
            register::SELF_INTERRUPT if low >> 8 == 0 => {
                self.request(low as u8, false);
                Ok(Effect::None)
            }
            register::END_OF_INTERRUPT | register::ERROR_STATUS if low != 0 => Err(Refused),
            register::TASK_PRIORITY if low >> 8 != 0 => Err(Refused),
            register::TASK_PRIORITY
            | register::END_OF_INTERRUPT
            | register::ERROR_STATUS
            | register::SPURIOUS_VECTOR
            | register::INITIAL_COUNT
            | register::DIVIDE => Ok(self.write(at, low, cpu)),
            _ if self.has_local_vector(at) => Ok(self.write(at, low, cpu)),
            _ => Err(Refused),
        }
    }
}

fn word(state: &kvm_lapic_state, at: usize) -> u32 {
    let bytes = state.regs.get(at..at + 4).unwrap_or_default();
    bytes
        .iter()
        .rev()
        .fold(0, |value, byte| value << 8 | u32::from(*byte as u8))
}

fn put(state: &mut kvm_lapic_state, at: usize, value: u32) {
    if let Some(bytes) = state.regs.get_mut(at..at + 4) {
        for (byte, new) in bytes.iter_mut().zip(value.to_le_bytes()) {
            *byte = new as _;
        }
    }
}

#[cfg(test)]
mod tests;
