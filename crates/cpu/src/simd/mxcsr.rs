//! MXCSR, and floating-point instructions executed under the guest's.
//!
//! Nearly all code runs with the control bits that MXCSR has after reset: every exception masked,
//! rounding to nearest, denormals kept. While the guest's are these, its whole MXCSR is left in
//! the host's register from the first floating-point instruction of a run to the end of the run:
//! sticky flags then collect there for nothing, and code of the processor itself that runs in
//! between sees the environment it expects. With other control bits each instruction is
//! surrounded by loading and restoring MXCSR.
//!
//! Exceptions are always masked in the host. Which of them the guest would have taken is worked
//! out from the flags that the instruction leaves (SDM Vol. 1, "SIMD Floating-Point Exceptions").

use super::host;
use super::precision::Roundings;
use crate::core_state::Core;
use crate::state::cr4;
use crate::trap::{Exception, Trap, vector};

/// The sticky flags: invalid, denormal, divide by zero, overflow, underflow, precision.
const FLAGS: u32 = 0x3f;
/// Exceptions that are found in the operands, before anything is computed.
const BEFORE: u32 = INVALID | DENORMAL | DIVIDE;
const INVALID: u32 = 1 << 0;
const DENORMAL: u32 = 1 << 1;
const DIVIDE: u32 = 1 << 2;
const OVERFLOW: u32 = 1 << 3;
const UNDERFLOW: u32 = 1 << 4;
const PRECISION: u32 = 1 << 5;
/// From an exception's flag to its mask.
const MASK_SHIFT: u32 = 7;
/// Denormal operands are zero.
const DENORMALS_ARE_ZERO: u32 = 1 << 6;
/// Flush to zero.
const FLUSH: u32 = 1 << 15;
/// The control bits after reset.
pub(crate) const DEFAULT: u32 = 0x1f80;
/// The bits that exist.
pub(super) const EXISTING: u32 = 0xffff;

/// Whether the guest's MXCSR is in the host's register, and what was there before.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct FloatUnit {
    live: bool,
    host: u32,
}

impl Core {
    /// Whether a floating-point instruction may simply be executed: the guest's MXCSR is in place.
    #[inline(always)]
    pub(super) fn float_is_live(&self) -> bool {
        self.float.live
    }

    /// Puts the guest's MXCSR in place, if its control bits are the default ones.
    fn enter_float(&mut self) -> bool {
        let guest = self.vectors.mxcsr;
        if guest & !FLAGS != DEFAULT {
            return false;
        }
        self.float = FloatUnit {
            live: true,
            host: host::mxcsr(),
        };
        host::set_mxcsr(guest);
        true
    }

    /// Computes under any MXCSR that the guest may have. On an exception that the guest has
    /// unmasked, its flags are set and nothing else has happened.
    ///
    /// `compute` is called once or twice; `roundings` says what it rounds.
    pub(super) fn float_exact<R>(
        &mut self,
        compute: &dyn Fn() -> R,
        roundings: &dyn Fn() -> Roundings,
    ) -> Result<R, Trap> {
        if self.float.live || self.enter_float() {
            return Ok(compute());
        }
        let guest = self.vectors.mxcsr;
        let unmasked = !(guest >> MASK_SHIFT) & FLAGS;
        let mut control = guest & !FLAGS;
        if unmasked & UNDERFLOW != 0 {
            // Flushing to zero is the masked response to underflow.
            control &= !FLUSH;
        }
        let (result, raised) = observe(control, unmasked, compute);
        if raised & unmasked == 0 {
            self.vectors.mxcsr |= raised;
            return Ok(result);
        }
        let reported = if raised & unmasked & BEFORE != 0 {
            // An unmasked exception in an operand keeps everything from being computed.
            raised & BEFORE
        } else if raised & unmasked & (OVERFLOW | UNDERFLOW) != 0 {
            raised & !PRECISION | precision_flag(control, unmasked, &roundings())
        } else {
            raised
        };
        self.vectors.mxcsr |= reported;
        let vector = if self.cr4 & cr4::OSXMMEXCPT != 0 {
            vector::XM
        } else {
            vector::UD
        };
        Err(self.raise(Exception {
            vector,
            error_code: None,
            payload: None,
        }))
    }

    /// Whether the guest has unmasked any floating-point exception.
    pub(super) fn has_unmasked(&self) -> bool {
        self.vectors.mxcsr & DEFAULT != DEFAULT
    }

    /// Whether the guest has unmasked underflow.
    pub(super) fn has_unmasked_underflow(&self) -> bool {
        self.vectors.mxcsr & UNDERFLOW << MASK_SHIFT == 0
    }

    /// The guest's MXCSR.
    pub(crate) fn mxcsr(&self) -> u32 {
        if self.float.live {
            host::mxcsr() & EXISTING
        } else {
            self.vectors.mxcsr
        }
    }

    /// Replaces the guest's MXCSR. Bits that do not exist are dropped.
    pub(crate) fn set_mxcsr(&mut self, value: u32) {
        self.leave_float();
        self.vectors.mxcsr = value & EXISTING;
    }

    /// Puts the host's MXCSR back and keeps the guest's. To be called at the end of a run.
    #[inline]
    pub(crate) fn leave_float(&mut self) {
        if self.float.live {
            self.vectors.mxcsr = host::mxcsr() & EXISTING;
            host::restore_mxcsr(self.float.host);
            self.float.live = false;
        }
    }
}

/// Computes with the given control bits, and tells which exceptions that finds. MXCSR is as before
/// afterwards.
fn observe<R>(control: u32, unmasked: u32, compute: &dyn Fn() -> R) -> (R, u32) {
    let host = host::mxcsr();
    host::set_mxcsr(control);
    let result = compute();
    let mut raised = host::mxcsr() & FLAGS;
    if unmasked & UNDERFLOW != 0 && raised & UNDERFLOW == 0 {
        // A tiny result that is exact underflows only if the exception is unmasked. Flushing to
        // zero shows whether there is one.
        host::set_mxcsr(control | FLUSH);
        compute();
        raised |= host::mxcsr() & UNDERFLOW;
    }
    host::restore_mxcsr(host);
    (result, raised)
}

/// The precision flag of an instruction in which a result overflows or underflows unmasked.
fn precision_flag(control: u32, unmasked: u32, roundings: &Roundings) -> u32 {
    let inexact = roundings.iter().any(|rounding| {
        let ((), raised) = observe(control, unmasked, &|| rounding.execute());
        if raised & unmasked & (OVERFLOW | UNDERFLOW) != 0 {
            rounding.is_inexact(control & DENORMALS_ARE_ZERO != 0)
        } else {
            raised & PRECISION != 0
        }
    });
    if inexact { PRECISION } else { 0 }
}

/// Whether LDMXCSR raises #GP for a value.
pub(crate) fn has_reserved_bits(value: u32) -> bool {
    value & !EXISTING != 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::form::Form;
    use crate::machine::{Machine, MachineConfig, SecondStageKind};
    use crate::mode::Mode;
    use crate::state::cr0;
    use crate::{Cpu, simd};
    use iced_x86::{Decoder, DecoderOptions};

    const ADDSD_XMM0_XMM1: [u8; 4] = [0xf2, 0x0f, 0x58, 0xc1];
    const DIVSD_XMM0_XMM1: [u8; 4] = [0xf2, 0x0f, 0x5e, 0xc1];
    const INEXACT: u32 = 1 << 5;
    /// Rounding control, two bits.
    const ROUNDING_SHIFT: u32 = 13;

    fn cpu() -> Cpu {
        let machine = Machine::new(MachineConfig {
            second_stage: SecondStageKind::Ept,
            maxphyaddr: 46,
            hpa_offset: 0,
        });
        let mut cpu = Cpu::new(machine, 0);
        cpu.core.cr0 = cr0::PE | cr0::ET;
        cpu.core.cr4 = cr4::OSFXSR | cr4::OSXMMEXCPT;
        cpu.core.vectors.xmm[0] = 1f64.to_bits().into();
        cpu.core.vectors.xmm[1] = 1e-300f64.to_bits().into();
        cpu
    }

    /// Executes a 64-bit instruction without operands in memory.
    fn execute(core: &mut Core, bytes: &[u8], sse: bool) -> Result<(), Trap> {
        let instruction = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
        let form = Form::new(instruction, Mode::CODE64.with(Mode::SSE, sse));
        let handler = simd::select(&form).expect("the instruction is executed");
        let op = form.operands(0, handler);
        (op.run)(core, &op)
    }

    #[test]
    fn sticky_flags_collect_and_the_thread_gets_its_own_back() {
        let before = host::mxcsr();
        let mut cpu = cpu();
        let core = &mut cpu.core;
        assert_eq!(execute(core, &ADDSD_XMM0_XMM1, true), Ok(()));
        assert_eq!(core.mxcsr(), DEFAULT | INEXACT);
        core.leave_float();
        assert_eq!(core.vectors.mxcsr, DEFAULT | INEXACT);
        assert_eq!(host::mxcsr(), before);
        // Again: flags that were there stay, and writing MXCSR drops them.
        core.vectors.xmm[1] = 0;
        assert_eq!(execute(core, &ADDSD_XMM0_XMM1, true), Ok(()));
        assert_eq!(core.mxcsr(), DEFAULT | INEXACT);
        core.set_mxcsr(DEFAULT);
        assert_eq!(core.mxcsr(), DEFAULT);
        assert_eq!(host::mxcsr(), before);
    }

    #[test]
    fn rounding_is_the_guests_and_never_outlives_the_instruction() {
        let before = host::mxcsr();
        let mut cpu = cpu();
        let core = &mut cpu.core;
        // Towards plus infinity.
        core.set_mxcsr(DEFAULT | 2 << ROUNDING_SHIFT);
        assert_eq!(execute(core, &ADDSD_XMM0_XMM1, true), Ok(()));
        assert_eq!(core.vectors.xmm[0], (1f64.to_bits() + 1).into());
        assert_eq!(host::mxcsr(), before);
        assert_eq!(core.mxcsr(), DEFAULT | 2 << ROUNDING_SHIFT | INEXACT);
    }

    #[test]
    fn an_unmasked_exception_changes_nothing_but_its_flag() {
        let mut cpu = cpu();
        let core = &mut cpu.core;
        core.vectors.xmm[1] = 0;
        let unmasked = DEFAULT & !(DIVIDE << MASK_SHIFT);
        core.set_mxcsr(unmasked);
        let operand = core.vectors.xmm[0];
        assert_eq!(execute(core, &DIVSD_XMM0_XMM1, true), Err(Trap::Exception));
        assert_eq!(core.fault.vector, vector::XM);
        assert_eq!(core.vectors.xmm[0], operand);
        assert_eq!(core.mxcsr(), unmasked | DIVIDE);
        core.cr4 &= !cr4::OSXMMEXCPT;
        assert_eq!(execute(core, &DIVSD_XMM0_XMM1, true), Err(Trap::Exception));
        assert_eq!(core.fault.vector, vector::UD);
    }

    #[test]
    fn vector_instructions_need_an_operating_system_that_saves_their_registers() {
        let mut cpu = cpu();
        let core = &mut cpu.core;
        core.cr0 |= cr0::TS;
        assert_eq!(execute(core, &ADDSD_XMM0_XMM1, false), Err(Trap::Exception));
        assert_eq!(core.fault.vector, vector::NM);
        core.cr0 |= cr0::EM;
        assert_eq!(execute(core, &ADDSD_XMM0_XMM1, false), Err(Trap::Exception));
        assert_eq!(core.fault.vector, vector::UD);
        core.cr0 &= !(cr0::EM | cr0::TS);
        core.cr4 &= !cr4::OSFXSR;
        assert_eq!(execute(core, &ADDSD_XMM0_XMM1, false), Err(Trap::Exception));
        assert_eq!(core.fault.vector, vector::UD);
        // Fences touch no vector register.
        assert_eq!(execute(core, &[0x0f, 0xae, 0xf0], false), Ok(()));
    }
}
