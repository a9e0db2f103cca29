//! The x87 unit's control instructions: those that compute nothing (SDM Vol. 1, "Programming with
//! the x87 FPU").
//!
//! The registers are kept as an image has them, from the top of the stack on: when the top moves,
//! they do. Arithmetic is not executed.

use crate::core_state::Core;
use crate::form::{Form, Kind};
use crate::op::{Handler, Mem, Op, Place as _, Read as _, Segmented};
use crate::state::{FpuState, cr0, gpr};
use crate::trap::{Exception, Trap, vector};
use iced_x86::Mnemonic as M;

/// The handler for an instruction of this subject.
pub(crate) fn select(form: &Form) -> Option<Handler> {
    Some(match (form.mnemonic, form.kinds[0]) {
        (M::Fninit, _) => initialise,
        (M::Fnclex, _) => |core, _| {
            require_unit(core)?;
            core.vectors.fsw &= !(EXCEPTIONS | status::STACK_FAULT | SUMMARY);
            Ok(())
        },
        (M::Fincstp, _) => |core, _| move_top(core, 1),
        (M::Fdecstp, _) => |core, _| move_top(core, STACK - 1),
        (M::Fnop, _) => |core, _| require_no_exception(core),
        (M::Wait, _) => |core, _| {
            const BOTH: u64 = cr0::MP | cr0::TS;
            if core.cr0 & BOTH == BOTH {
                return Err(core.device_not_available());
            }
            report_exception(core)
        },
        (M::Fldcw, _) => |core, op| {
            require_no_exception(core)?;
            let value: u16 = Mem::<Segmented>::read(core, op)?;
            core.vectors.fcw = value & CONTROL | CONTROL_ONES;
            summarise(&mut core.vectors);
            Ok(())
        },
        (M::Fnstcw, _) => |core, op| {
            require_unit(core)?;
            Mem::<Segmented>::write(core, op, core.vectors.fcw)
        },
        (M::Fnstsw, Kind::Mem) => |core, op| {
            require_unit(core)?;
            Mem::<Segmented>::write(core, op, core.vectors.fsw)
        },
        (M::Fnstsw, _) => |core, _| {
            require_unit(core)?;
            core.set_reg(gpr::RAX as u8, core.vectors.fsw);
            Ok(())
        },
        _ => return None,
    })
}

/// Registers of the stack.
const STACK: u16 = 8;
/// The exceptions' flags, and in the control word their masks.
const EXCEPTIONS: u16 = 0x3f;
/// Some unmasked exception's flag is set: ES, and B, which is the same.
const SUMMARY: u16 = 1 << 7 | 1 << 15;
/// Bits of the control word that can be written, and one that is always set.
const CONTROL: u16 = 0x1f3f;
const CONTROL_ONES: u16 = 0x40;

/// Fields of the status word.
mod status {
    pub(super) const STACK_FAULT: u16 = 1 << 6;
    pub(super) const C1: u16 = 1 << 9;
    /// The top of the stack, three bits.
    pub(super) const TOP_SHIFT: u32 = 11;
    pub(super) const TOP: u16 = 7 << TOP_SHIFT;
}

/// #NM if the unit is switched off.
fn require_unit(core: &mut Core) -> Result<(), Trap> {
    if core.cr0 & (cr0::EM | cr0::TS) != 0 {
        return Err(core.device_not_available());
    }
    Ok(())
}

/// #MF if an unmasked exception waits.
fn report_exception(core: &mut Core) -> Result<(), Trap> {
    if core.vectors.fsw & SUMMARY == 0 {
        return Ok(());
    }
    Err(core.raise(Exception {
        vector: vector::MF,
        error_code: None,
        payload: None,
    }))
}

fn require_no_exception(core: &mut Core) -> Result<(), Trap> {
    require_unit(core)?;
    report_exception(core)
}

fn summarise(state: &mut FpuState) {
    let waits = state.fsw & !state.fcw & EXCEPTIONS != 0;
    state.fsw = state.fsw & !SUMMARY | if waits { SUMMARY } else { 0 };
}

/// FINCSTP and FDECSTP. No register becomes empty or full.
fn move_top(core: &mut Core, by: u16) -> Result<(), Trap> {
    require_no_exception(core)?;
    let state = &mut core.vectors;
    let top = (state.fsw >> status::TOP_SHIFT).wrapping_add(by) << status::TOP_SHIFT & status::TOP;
    state.fsw = state.fsw & !(status::TOP | status::C1) | top;
    state.st.rotate_left(by.into());
    Ok(())
}

/// FNINIT. The registers are empty, but keep what they hold.
fn initialise(core: &mut Core, _op: &Op) -> Result<(), Trap> {
    require_unit(core)?;
    let state = &mut core.vectors;
    let top = (state.fsw & status::TOP) >> status::TOP_SHIFT;
    state.st.rotate_right(top.into());
    let initial = FpuState::default();
    state.fcw = initial.fcw;
    state.fsw = initial.fsw;
    state.ftw = initial.ftw;
    state.fop = initial.fop;
    state.fip = initial.fip;
    state.fdp = initial.fdp;
    Ok(())
}
