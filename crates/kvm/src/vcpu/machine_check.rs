//! Machine-check registers: what is counted and reported where hardware fails (SDM Vol. 3,
//! "Machine-Check Architecture"). Nothing fails here by itself; a program reports an error by
//! `KVM_X86_SET_MCE`.

use super::exit::Answer;
use super::{Vcpu, VcpuState};
use kvm_bindings::kvm_x86_mce;
use rustix::io::Errno;
use std::ops::RangeInclusive;
use twofold_cpu::state::cr4;
use twofold_cpu::{Exception, vector};

const IA32_MCG_CAP: u32 = 0x179;
pub(super) const IA32_MCG_STATUS: u32 = 0x17a;
pub(super) const IA32_MCG_CTL: u32 = 0x17b;
const IA32_MC0_CTL: u32 = 0x400;
/// One for each bank: when corrected errors interrupt.
const IA32_MC0_CTL2: u32 = 0x280;
/// Banks that a processor has at most (`KVM_MAX_MCE_BANKS`).
pub(crate) const MAX_BANKS: u32 = 32;
const REGISTERS: u32 = 4;
const LAST: u32 = IA32_MC0_CTL + REGISTERS * MAX_BANKS - 1;
const GLOBAL: RangeInclusive<u32> = IA32_MCG_CAP..=IA32_MCG_CTL;
const BANKS: RangeInclusive<u32> = IA32_MC0_CTL..=LAST;
const SIGNALS: RangeInclusive<u32> = IA32_MC0_CTL2..=IA32_MC0_CTL2 + MAX_BANKS - 1;

/// Registers of a bank, by their order.
const CTL: usize = 0;
const STATUS: usize = 1;
const ADDR: usize = 2;
const MISC: usize = 3;

/// Fields of IA32_MCG_CAP.
mod capability {
    pub(super) const COUNT: u64 = 0xff;
    /// There is IA32_MCG_CTL.
    pub(super) const CONTROL: u64 = 1 << 8;
    /// Corrected errors interrupt through the local APIC.
    pub(super) const SIGNAL: u64 = 1 << 10;
    /// How many extended registers there are.
    pub(super) const EXTENDED_COUNT: u64 = 0xff << 16;
    /// Software can recover from some errors.
    pub(super) const RECOVERY: u64 = 1 << 24;
}

/// Bits of a bank's status.
mod status {
    pub(super) const VALID: u64 = 1 << 63;
    pub(super) const OVERFLOW: u64 = 1 << 62;
    pub(super) const UNCORRECTED: u64 = 1 << 61;
    /// The context is corrupt, the error was signalled by #MC, software has to act: none of it for an
    /// error that may wait.
    pub(super) const URGENT: u64 = 1 << 57 | 1 << 56 | 1 << 55;
}

/// Fields of a bank's control of interrupts: whether it interrupts, and after how many errors.
mod signal {
    pub(super) const ENABLED: u64 = 1 << 30;
    pub(super) const THRESHOLD: u64 = 0x7fff;
}

/// A machine check is being handled.
const IN_PROGRESS: u64 = 1 << 2;

/// What `KVM_X86_GET_MCE_CAP_SUPPORTED` answers: the bits of IA32_MCG_CAP that a program may ask
/// for besides counts.
pub(crate) const SUPPORTED: u64 = capability::CONTROL | capability::RECOVERY | capability::SIGNAL;

/// The machine-check registers of a vCPU.
#[derive(Clone, Debug)]
pub(super) struct MachineCheck {
    capability: u64,
    status: u64,
    control: u64,
    banks: [[u64; REGISTERS as usize]; MAX_BANKS as usize],
    signals: [u64; MAX_BANKS as usize],
}

impl Default for MachineCheck {
    fn default() -> Self {
        Self {
            capability: MAX_BANKS.into(),
            status: 0,
            control: 0,
            banks: [[0; REGISTERS as usize]; MAX_BANKS as usize],
            signals: [0; MAX_BANKS as usize],
        }
    }
}

impl MachineCheck {
    /// Whether a register is one of these.
    pub(super) fn owns(index: u32) -> bool {
        GLOBAL.contains(&index) || BANKS.contains(&index) || SIGNALS.contains(&index)
    }

    fn has_control(&self) -> bool {
        self.capability & capability::CONTROL != 0
    }

    /// Whether there is a local vector for corrected errors.
    fn has_signal(&self) -> bool {
        self.capability & capability::SIGNAL != 0
    }

    /// The bank whose control of interrupts a register is, if the bank is there.
    fn signal_bank(&self, index: u32) -> Option<usize> {
        let bank = index.checked_sub(IA32_MC0_CTL2)?;
        (u64::from(bank) < self.capability & capability::COUNT).then_some(bank as usize)
    }

    /// Sets a bank's control of interrupts; whether it takes the value.
    fn write_signal(&mut self, index: u32, value: u64, from_guest: bool) -> bool {
        let known = signal::ENABLED | signal::THRESHOLD;
        if !self.has_signal() && (value != 0 || from_guest) || value & !known != 0 {
            return false;
        }
        let bank = self.signal_bank(index);
        let place = bank.and_then(|bank| self.signals.get_mut(bank));
        place.map(|place| *place = value).is_some()
    }

    /// Bank and register, if the bank is there.
    fn place(&self, index: u32) -> Option<(usize, usize)> {
        let at = index.checked_sub(IA32_MC0_CTL)?;
        let (bank, register) = (at / REGISTERS, at % REGISTERS);
        (u64::from(bank) < self.capability & capability::COUNT)
            .then_some((bank as usize, register as usize))
    }

    /// The value of a register. The guest has no IA32_MCG_CTL unless IA32_MCG_CAP says so.
    pub(super) fn read(&self, index: u32, from_guest: bool) -> Option<u64> {
        match index {
            IA32_MCG_CAP => Some(self.capability),
            IA32_MCG_STATUS => Some(self.status),
            IA32_MCG_CTL => (self.has_control() || !from_guest).then_some(self.control),
            _ if SIGNALS.contains(&index) => self.signals.get(self.signal_bank(index)?).copied(),
            _ => {
                let (bank, register) = self.place(index)?;
                Some(self.banks.get(bank)?[register])
            }
        }
    }

    /// Sets a register; whether it takes the value. `status_writable` is AMD's
    /// HWCR.McStatusWrEn, without which the guest can only clear a status.
    pub(super) fn write(
        &mut self,
        index: u32,
        value: u64,
        from_guest: bool,
        status_writable: bool,
    ) -> bool {
        match index {
            IA32_MCG_CAP => return false,
            _ if SIGNALS.contains(&index) => return self.write_signal(index, value, from_guest),
            IA32_MCG_STATUS => self.status = value,
            IA32_MCG_CTL => {
                let hidden = !self.has_control() && (value != 0 || from_guest);
                if hidden || value != 0 && value != u64::MAX {
                    return false;
                }
                self.control = value;
            }
            _ => {
                let Some((bank, register)) = self.place(index) else {
                    return false;
                };
                // Some systems clear bit 10 or bit 0 to silence errors that mean nothing.
                let all = value | 1 << 10 | 1;
                let refused = match register {
                    CTL => value != 0 && all != u64::MAX,
                    STATUS => from_guest && value != 0 && !status_writable,
                    _ => false,
                };
                let Some(place) = self.banks.get_mut(bank) else {
                    return false;
                };
                if refused {
                    return false;
                }
                place[register] = value;
            }
        }
        true
    }

    /// `KVM_X86_SETUP_MCE`: `EINVAL` for no or too many banks, and for what is not supported.
    fn set_up(&mut self, wanted: u64) -> Result<(), Errno> {
        let count = wanted & capability::COUNT;
        let known = SUPPORTED | capability::COUNT | capability::EXTENDED_COUNT;
        if count == 0 || count > u64::from(MAX_BANKS) || wanted & !known != 0 {
            return Err(Errno::INVAL);
        }
        self.capability = wanted;
        if self.has_control() {
            self.control = u64::MAX;
        }
        for bank in self.banks.iter_mut().take(count as usize) {
            bank[CTL] = u64::MAX;
        }
        self.signals = [0; MAX_BANKS as usize];
        Ok(())
    }

    /// An error has been found: what the processor does about it.
    fn report(&mut self, error: &kvm_x86_mce, enabled: bool) -> Result<Consequence, Errno> {
        let place = u64::from(error.bank);
        if place >= self.capability & capability::COUNT || error.status & status::VALID == 0 {
            return Err(Errno::INVAL);
        }
        let (has_control, control) = (self.has_control(), self.control);
        let bank = self
            .banks
            .get_mut(usize::from(error.bank))
            .ok_or(Errno::INVAL)?;
        if error.mcg_status == 0 && error.status & status::URGENT == 0 {
            // Nobody has consumed what is wrong: it is on record, and may interrupt.
            bank[STATUS] = error.status;
            bank[ADDR] = error.addr;
            bank[MISC] = error.misc;
            self.status = 0;
            let enabled = self.signals.get(usize::from(error.bank));
            let enabled = enabled.is_some_and(|control| control & signal::ENABLED != 0);
            return Ok(if self.has_signal() && enabled {
                Consequence::Interrupt
            } else {
                Consequence::None
            });
        }
        let uncorrected = error.status & status::UNCORRECTED != 0;
        let silenced = has_control && control != u64::MAX || bank[CTL] != u64::MAX;
        if uncorrected && silenced {
            return Ok(Consequence::None);
        }
        if uncorrected && (self.status & IN_PROGRESS != 0 || !enabled) {
            return Ok(Consequence::Shutdown);
        }
        let valid = bank[STATUS] & status::VALID != 0;
        if !uncorrected && valid && bank[STATUS] & status::UNCORRECTED != 0 {
            // What is there is worse.
            bank[STATUS] |= status::OVERFLOW;
            return Ok(Consequence::None);
        }
        bank[STATUS] = error.status | if valid { status::OVERFLOW } else { 0 };
        bank[ADDR] = error.addr;
        bank[MISC] = error.misc;
        if !uncorrected {
            return Ok(Consequence::None);
        }
        self.status = error.mcg_status;
        Ok(Consequence::Exception)
    }
}

/// What follows from a reported error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Consequence {
    /// It is on record.
    None,
    /// The local APIC's vector for corrected errors.
    Interrupt,
    /// #MC
    Exception,
    /// There is no handler that could deal with it.
    Shutdown,
}

impl Vcpu {
    /// `KVM_X86_SETUP_MCE`: how many banks of registers there are, and what they can do.
    ///
    /// # Errors
    /// `EINVAL` for no bank or more than 32, and for what is not supported.
    pub fn set_up_machine_check(&self, capability: u64) -> Result<(), Errno> {
        let mut state = self.state();
        state.machine_check.set_up(capability)?;
        let has_signal = state.machine_check.has_signal();
        if let Some(lapic) = &mut state.lapic {
            lapic.set_machine_checks(has_signal);
        }
        Ok(())
    }

    /// `KVM_X86_SET_MCE`: reports an error to the guest.
    ///
    /// # Errors
    /// `EINVAL` for a bank that is not there, and for a status that is not valid.
    pub fn report_machine_check(&self, error: &kvm_x86_mce) -> Result<(), Errno> {
        self.state().report_machine_check(error)
    }
}

impl VcpuState {
    fn report_machine_check(&mut self, error: &kvm_x86_mce) -> Result<(), Errno> {
        let enabled = self.cpu.system_registers().cr4 & cr4::MCE != 0;
        match self.machine_check.report(error, enabled)? {
            Consequence::None => {}
            Consequence::Interrupt => {
                if let Some(lapic) = &mut self.lapic {
                    lapic.signal_machine_check();
                }
            }
            Consequence::Exception => {
                self.cpu.queue_exception(Exception {
                    vector: vector::MC,
                    error_code: None,
                    payload: None,
                });
                self.exception_injected = false;
            }
            Consequence::Shutdown => self.answer = Answer::Shutdown,
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNCORRECTED: u64 = status::VALID | status::UNCORRECTED;

    /// Ten banks, as QEMU asks for.
    fn registers() -> MachineCheck {
        let mut registers = MachineCheck::default();
        registers.set_up(capability::CONTROL | 10).unwrap();
        registers
    }

    fn error(bank: u8, status: u64) -> kvm_x86_mce {
        kvm_x86_mce {
            status,
            addr: 0x1000,
            mcg_status: IN_PROGRESS,
            bank,
            ..Default::default()
        }
    }

    #[test]
    fn a_program_says_how_many_banks_there_are() {
        let mut registers = registers();
        assert_eq!(registers.read(IA32_MCG_CAP, true), Some(0x10a));
        assert_eq!(registers.read(IA32_MCG_CTL, true), Some(u64::MAX));
        assert_eq!(registers.read(IA32_MC0_CTL + 39, true), Some(0));
        assert_eq!(registers.read(IA32_MC0_CTL + 40, true), None);
        assert!(!registers.write(IA32_MC0_CTL + 40, 0, false, false));
        assert_eq!(registers.set_up(0), Err(Errno::INVAL));
        assert_eq!(registers.set_up(33), Err(Errno::INVAL));
        assert_eq!(registers.set_up(1 << 27 | 1), Err(Errno::INVAL));
    }

    #[test]
    fn without_a_control_register_the_guest_finds_none() {
        let mut registers = MachineCheck::default();
        assert_eq!(registers.read(IA32_MCG_CTL, true), None);
        assert_eq!(registers.read(IA32_MCG_CTL, false), Some(0));
        assert!(!registers.write(IA32_MCG_CTL, 0, true, false));
        assert!(registers.write(IA32_MCG_CTL, 0, false, false));
    }

    #[test]
    fn registers_take_only_what_they_can_hold() {
        let mut registers = registers();
        assert!(!registers.write(IA32_MCG_CTL, 5, false, false));
        assert!(registers.write(IA32_MC0_CTL, !(1 << 10), true, false));
        assert!(!registers.write(IA32_MC0_CTL, 5, true, false));
        let place = IA32_MC0_CTL + STATUS as u32;
        assert!(!registers.write(place, 5, true, false));
        assert!(registers.write(place, 5, true, true));
        assert!(registers.write(place, 0, true, false));
        assert!(registers.write(place, 5, false, false));
    }

    #[test]
    fn an_uncorrected_error_interrupts_once_and_then_ends_the_machine() {
        let mut registers = registers();
        let first = registers.report(&error(1, UNCORRECTED), true);
        assert_eq!(first, Ok(Consequence::Exception));
        assert_eq!(registers.read(IA32_MC0_CTL + 6, true), Some(0x1000));
        let second = registers.report(&error(1, UNCORRECTED), true);
        assert_eq!(second, Ok(Consequence::Shutdown));
        registers.write(IA32_MCG_STATUS, 0, true, false);
        let unhandled = registers.report(&error(1, UNCORRECTED), false);
        assert_eq!(unhandled, Ok(Consequence::Shutdown));
        let missing = registers.report(&error(10, UNCORRECTED), true);
        assert_eq!(missing, Err(Errno::INVAL));
        assert_eq!(registers.report(&error(1, 0), true), Err(Errno::INVAL));
    }

    #[test]
    fn an_error_that_may_wait_interrupts_if_its_bank_is_told_to() {
        let mut registers = MachineCheck::default();
        assert!(!registers.write(IA32_MC0_CTL2, 0, true, false), "not there");
        registers.set_up(capability::SIGNAL | 10).unwrap();
        let waits = kvm_x86_mce {
            mcg_status: 0,
            ..error(7, UNCORRECTED)
        };
        assert_eq!(registers.report(&waits, true), Ok(Consequence::None));
        let control = IA32_MC0_CTL2 + 7;
        assert!(!registers.write(control, 1 << 29, true, false));
        assert!(registers.write(control, signal::ENABLED | 1, true, false));
        assert_eq!(registers.read(control, true), Some(signal::ENABLED | 1));
        assert_eq!(registers.read(IA32_MC0_CTL2 + 10, true), None);
        assert_eq!(registers.report(&waits, true), Ok(Consequence::Interrupt));
    }

    #[test]
    fn a_corrected_error_is_recorded_but_not_over_a_worse_one() {
        let mut registers = registers();
        let place = IA32_MC0_CTL + 4 + STATUS as u32;
        let corrected = error(1, status::VALID);
        assert_eq!(registers.report(&corrected, true), Ok(Consequence::None));
        assert_eq!(registers.read(place, true), Some(status::VALID));
        let worse = registers.report(&error(1, UNCORRECTED), true);
        assert_eq!(worse, Ok(Consequence::Exception));
        assert_eq!(registers.report(&corrected, true), Ok(Consequence::None));
        assert_eq!(
            registers.read(place, true),
            Some(UNCORRECTED | status::OVERFLOW)
        );
    }
}
