//! A vCPU's local APIC: registers, priorities, end of interrupt, and interrupts that a vCPU sends to
//! itself (SDM Vol. 3, "Advanced Programmable Interrupt Controller").
//!
//! Its timer does not run and it sends nothing to other vCPUs: a guest that asks for either ends in
//! `KVM_EXIT_INTERNAL_ERROR`.

use kvm_bindings::kvm_lapic_state;

/// Offsets of registers in the APIC's page, as `KVM_GET_LAPIC` shows it.
mod register {
    pub(super) const ID: usize = 0x20;
    pub(super) const VERSION: usize = 0x30;
    pub(super) const TASK_PRIORITY: usize = 0x80;
    pub(super) const PROCESSOR_PRIORITY: usize = 0xa0;
    pub(super) const END_OF_INTERRUPT: usize = 0xb0;
    pub(super) const LOGICAL_DESTINATION: usize = 0xd0;
    pub(super) const DESTINATION_FORMAT: usize = 0xe0;
    pub(super) const SPURIOUS_VECTOR: usize = 0xf0;
    /// Eight registers each, 16 bytes apart.
    pub(super) const IN_SERVICE: usize = 0x100;
    pub(super) const REQUESTED: usize = 0x200;
    pub(super) const ERROR_STATUS: usize = 0x280;
    pub(super) const COMMAND: usize = 0x300;
    pub(super) const COMMAND_HIGH: usize = 0x310;
    pub(super) const LOCAL_TIMER: usize = 0x320;
    pub(super) const LOCAL_ERROR: usize = 0x370;
    pub(super) const INITIAL_COUNT: usize = 0x380;
    pub(super) const CURRENT_COUNT: usize = 0x390;
    pub(super) const DIVIDE: usize = 0x3e0;
    /// x2APIC only.
    pub(super) const SELF_INTERRUPT: usize = 0x3f0;
}

/// The first MSR of x2APIC; the others follow in the order of the page, one for 16 bytes.
const X2APIC_FIRST: u32 = 0x800;
/// MSRs of x2APIC.
pub(super) const X2APIC: std::ops::Range<u32> = X2APIC_FIRST..0x840;

/// Bits of IA32_APIC_BASE.
pub(super) mod base {
    pub(in crate::vcpu) const X2APIC: u64 = 1 << 10;
    pub(in crate::vcpu) const ENABLED: u64 = 1 << 11;
}

/// A local vector is masked.
const MASKED: u32 = 1 << 16;
/// The spurious vector register's bit that turns the APIC on.
const SOFTWARE_ENABLED: u32 = 1 << 8;

/// Fields of the interrupt command.
mod command {
    pub(super) const BUSY: u32 = 1 << 12;
    pub(super) const MODE: u32 = 7 << 8;
    pub(super) const LOGICAL: u32 = 1 << 11;
    pub(super) const SHORTHAND: u32 = 3 << 18;
    pub(super) const TO_SELF: u32 = 1 << 18;
    /// Reserved in x2APIC mode: bits 31:20, 17:16 and 13.
    pub(super) const RESERVED: u32 = 0xfff0_0000 | 3 << 16 | 1 << 13;
}

/// Why an access to a register is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// No such register, or not that value: #GP.
    Fault,
    /// Something that this APIC does not do.
    Unsupported(&'static str),
}

/// A local APIC.
pub(super) struct Lapic {
    id: u32,
    state: Box<kvm_lapic_state>,
}

impl Lapic {
    /// An APIC after reset: its id, version, and everything masked.
    pub(super) fn new(id: u32) -> Self {
        let mut lapic = Self {
            id,
            state: Box::new(kvm_lapic_state::default()),
        };
        lapic.set(register::ID, id << 24);
        lapic.set(register::VERSION, 0x5_0014);
        lapic.set(register::DESTINATION_FORMAT, u32::MAX);
        lapic.set(register::SPURIOUS_VECTOR, 0xff);
        for vector in (register::LOCAL_TIMER..=register::LOCAL_ERROR).step_by(16) {
            lapic.set(vector, MASKED);
        }
        lapic
    }

    /// What `KVM_GET_LAPIC` shows.
    pub(super) fn state(&self) -> kvm_lapic_state {
        *self.state
    }

    /// `KVM_SET_LAPIC`
    pub(super) fn set_state(&mut self, state: &kvm_lapic_state) {
        *self.state = *state;
    }

    fn get(&self, at: usize) -> u32 {
        let bytes = self.state.regs.get(at..at + 4).unwrap_or_default();
        bytes
            .iter()
            .rev()
            .fold(0, |value, byte| value << 8 | u32::from(*byte as u8))
    }

    fn set(&mut self, at: usize, value: u32) {
        if let Some(bytes) = self.state.regs.get_mut(at..at + 4) {
            for (byte, new) in bytes.iter_mut().zip(value.to_le_bytes()) {
                *byte = new as _;
            }
        }
    }

    /// IA32_APIC_BASE has changed: the id has 8 bits in the high byte, or 32 in x2APIC mode, and
    /// then its logical form follows from it.
    pub(super) fn set_base(&mut self, before: u64, now: u64) {
        if (before ^ now) & (base::X2APIC | base::ENABLED) == 0 {
            return;
        }
        if now & base::X2APIC != 0 {
            self.set(register::ID, self.id);
            let logical = (self.id >> 4) << 16 | 1 << (self.id & 15);
            self.set(register::LOGICAL_DESTINATION, logical);
        } else if now & base::ENABLED != 0 {
            self.set(register::ID, self.id << 24);
        }
    }

    /// The highest vector in one of the 256-bit registers.
    fn highest(&self, registers: usize) -> Option<u8> {
        (0..8).rev().find_map(|i| {
            let word = self.get(registers + 16 * i);
            (word != 0).then(|| (32 * i as u32 + 31 - word.leading_zeros()) as u8)
        })
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
        let service = self
            .highest(register::IN_SERVICE)
            .map_or(0, |vector| u32::from(vector) & 0xf0);
        if task & 0xf0 >= service {
            task
        } else {
            service
        }
    }

    fn task_priority(&self, cr8: u64) -> u32 {
        (cr8 as u32 & 0xf) << 4 | self.get(register::TASK_PRIORITY) & 0xf
    }

    /// The interrupt that the processor should take next.
    pub(super) fn pending(&self, cr8: u64) -> Option<u8> {
        if self.get(register::SPURIOUS_VECTOR) & SOFTWARE_ENABLED == 0 {
            return None;
        }
        self.highest(register::REQUESTED)
            .filter(|vector| u32::from(*vector) & 0xf0 > self.priority(cr8) & 0xf0)
    }

    /// The processor has taken an interrupt.
    pub(super) fn accept(&mut self, vector: u8) {
        self.mark(register::REQUESTED, vector, false);
        self.mark(register::IN_SERVICE, vector, true);
    }

    /// The value of a register; `cr8` is the processor's.
    fn read(&self, at: usize, cr8: u64) -> u32 {
        match at {
            register::TASK_PRIORITY => self.task_priority(cr8),
            register::PROCESSOR_PRIORITY => self.priority(cr8),
            register::CURRENT_COUNT | register::END_OF_INTERRUPT => 0,
            _ => self.get(at),
        }
    }

    /// Sets a register; `cr8` is the processor's.
    fn write(&mut self, at: usize, value: u32, cr8: &mut u64) -> Result<(), Refused> {
        match at {
            register::TASK_PRIORITY => {
                *cr8 = u64::from(value >> 4 & 0xf);
                self.set(at, value & 0xff);
            }
            register::END_OF_INTERRUPT => {
                if let Some(vector) = self.highest(register::IN_SERVICE) {
                    self.mark(register::IN_SERVICE, vector, false);
                }
            }
            register::ERROR_STATUS => self.set(at, 0),
            register::SPURIOUS_VECTOR => self.set(at, value & 0x3ff),
            register::LOGICAL_DESTINATION => self.set(at, value & 0xff00_0000),
            register::DESTINATION_FORMAT => self.set(at, value | 0x0fff_ffff),
            register::COMMAND_HIGH => self.set(at, value & 0xff00_0000),
            register::COMMAND => {
                self.set(at, value & !command::BUSY);
                let destination = self.get(register::COMMAND_HIGH) >> 24;
                let to_self = destination == self.get(register::ID) >> 24;
                self.send(value, to_self)?;
            }
            register::LOCAL_TIMER..=register::LOCAL_ERROR => self.set(at, value & 0x7_f7ff),
            register::DIVIDE => self.set(at, value & 0xb),
            register::INITIAL_COUNT => {
                self.set(at, value);
                if value != 0 && self.get(register::LOCAL_TIMER) & MASKED == 0 {
                    return Err(Refused::Unsupported("its timer"));
                }
            }
            // The others are read-only, or not there.
            _ => {}
        }
        Ok(())
    }

    /// Sends an interrupt.
    fn send(&mut self, value: u32, names_self: bool) -> Result<(), Refused> {
        let shorthand = value & command::SHORTHAND;
        let to_self = shorthand == command::TO_SELF
            || shorthand == 0 && value & command::LOGICAL == 0 && names_self;
        if !to_self {
            return Err(Refused::Unsupported("interrupts to other vCPUs"));
        }
        if value & command::MODE != 0 {
            return Err(Refused::Unsupported("another delivery than a fixed one"));
        }
        self.request(value as u8);
        Ok(())
    }

    /// An interrupt arrives. Vectors below 16 do not exist.
    fn request(&mut self, vector: u8) {
        if vector >= 16 {
            self.mark(register::REQUESTED, vector, true);
        }
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
            | register::LOCAL_TIMER..=register::CURRENT_COUNT
            | register::DIVIDE => Some(self.read(at, cr8).into()),
            _ => None,
        }
    }

    /// WRMSR in x2APIC mode.
    pub(super) fn write_msr(
        &mut self,
        index: u32,
        value: u64,
        cr8: &mut u64,
    ) -> Result<(), Refused> {
        let at = index.wrapping_sub(X2APIC_FIRST) as usize * 16;
        let low = value as u32;
        match at {
            register::COMMAND => {
                if low & command::RESERVED != 0 {
                    return Err(Refused::Fault);
                }
                self.set(register::COMMAND, low);
                self.set(register::COMMAND_HIGH, (value >> 32) as u32);
                return self.send(low, value >> 32 == u64::from(self.id));
            }
            _ if value >> 32 != 0 => return Err(Refused::Fault),
            register::SELF_INTERRUPT if low >> 8 == 0 => self.request(low as u8),
            register::END_OF_INTERRUPT | register::ERROR_STATUS if low != 0 => {
                return Err(Refused::Fault);
            }
            register::TASK_PRIORITY if low >> 8 != 0 => return Err(Refused::Fault),
            register::TASK_PRIORITY
            | register::END_OF_INTERRUPT
            | register::ERROR_STATUS
            | register::SPURIOUS_VECTOR
            | register::LOCAL_TIMER..=register::INITIAL_COUNT
            | register::DIVIDE => return self.write(at, low, cr8),
            _ => return Err(Refused::Fault),
        }
        Ok(())
    }

    /// WRMSR of IA32_TSC_DEADLINE: without effect unless the timer counts to a deadline.
    pub(super) fn write_deadline(&self) -> Result<(), Refused> {
        const DEADLINE_MODE: u32 = 2 << 17;
        let timer = self.get(register::LOCAL_TIMER);
        if timer & 3 << 17 == DEADLINE_MODE && timer & MASKED == 0 {
            return Err(Refused::Unsupported("its timer"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Enabled, in x2APIC mode, of vCPU 5.
    fn lapic() -> Lapic {
        let mut lapic = Lapic::new(5);
        lapic.set_base(base::ENABLED, base::ENABLED | base::X2APIC);
        lapic.write_msr(0x80f, 0x1ff, &mut 0).unwrap();
        lapic
    }

    #[test]
    fn interrupts_to_oneself_are_taken_by_priority_until_their_end() {
        let mut lapic = lapic();
        for vector in [0x41, 0x62, 0x43] {
            lapic.write_msr(0x83f, vector, &mut 0).unwrap();
        }
        assert_eq!(lapic.pending(0), Some(0x62));
        assert_eq!(lapic.pending(6), None, "CR8 holds it back");
        lapic.accept(0x62);
        assert_eq!(lapic.pending(0), None, "lower classes wait");
        assert_eq!(lapic.read_msr(0x80a, 0), Some(0x60));
        lapic.write_msr(0x80b, 0, &mut 0).unwrap();
        assert_eq!(lapic.pending(0), Some(0x43));
        lapic.accept(0x43);
        lapic.write_msr(0x80b, 0, &mut 0).unwrap();
        assert_eq!(lapic.pending(0), Some(0x41));
    }

    #[test]
    fn commands_reach_oneself_by_shorthand_and_by_name_and_nobody_else() {
        let mut lapic = lapic();
        lapic.write_msr(0x830, 0x4_40aa, &mut 0).unwrap();
        assert_eq!(lapic.pending(0), Some(0xaa));
        assert_eq!(lapic.read_msr(0x830, 0), Some(0x4_40aa));
        lapic.write_msr(0x830, 5 << 32 | 0x40bb, &mut 0).unwrap();
        assert_eq!(lapic.pending(0), Some(0xbb));
        let other = lapic.write_msr(0x830, 6 << 32 | 0x40bb, &mut 0);
        assert!(matches!(other, Err(Refused::Unsupported(_))));
        assert_eq!(lapic.write_msr(0x830, 1 << 20, &mut 0), Err(Refused::Fault));
    }

    #[test]
    fn the_task_priority_is_cr8() {
        let mut lapic = lapic();
        let mut cr8 = 0;
        lapic.write_msr(0x808, 0x35, &mut cr8).unwrap();
        assert_eq!(cr8, 3);
        assert_eq!(lapic.read_msr(0x808, cr8), Some(0x35));
        assert_eq!(lapic.read_msr(0x808, 4), Some(0x45));
    }

    #[test]
    fn the_id_is_shown_in_the_format_of_the_mode() {
        let mut lapic = lapic();
        assert_eq!(lapic.read_msr(0x802, 0), Some(5));
        lapic.set_base(base::ENABLED | base::X2APIC, base::ENABLED);
        assert_eq!(lapic.get(register::ID), 5 << 24);
    }

    #[test]
    fn registers_that_are_not_there_fault() {
        let mut lapic = lapic();
        assert_eq!(lapic.read_msr(0x80e, 0), None, "no destination format");
        assert_eq!(lapic.read_msr(0x831, 0), None);
        assert_eq!(lapic.write_msr(0x802, 0, &mut 0), Err(Refused::Fault));
        assert_eq!(lapic.write_msr(0x80b, 1, &mut 0), Err(Refused::Fault));
        assert_eq!(lapic.write_msr(0x83f, 0x100, &mut 0), Err(Refused::Fault));
    }
}
