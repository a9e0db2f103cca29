//! The control instructions.

use super::{ready, report_exception, require_unit, status, summarise};
use crate::core_state::Core;
use crate::form::{Form, Kind};
use crate::op::{Handler, Mem, Op, Place as _, Read as _, Segmented};
use crate::state::{FpuState, cr0, gpr};
use crate::trap::Trap;
use iced_x86::Mnemonic as M;

/// The handler for an instruction of this subject.
pub(super) fn select(form: &Form) -> Option<Handler> {
    Some(match (form.mnemonic, form.kinds[0]) {
        (M::Fninit, _) => initialise,
        (M::Fnclex, _) => |core, _| {
            require_unit(core)?;
            core.vectors.fsw &= !(status::EXCEPTIONS | status::STACK_FAULT | status::SUMMARY);
            Ok(())
        },
        // What these did once is not done any more, nor is anything waited for.
        (M::Fneni | M::Fndisi | M::Fnsetpm, _) => |core, _| require_unit(core),
        (M::Wait, _) => |core, _| {
            const BOTH: u64 = cr0::MP | cr0::TS;
            if core.cr0 & BOTH == BOTH {
                return Err(core.device_not_available());
            }
            report_exception(core)
        },
        (M::Fldcw, _) => |core, op| {
            ready(core)?;
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

/// Bits of the control word that can be written, and one that is always set.
const CONTROL: u16 = 0x1f3f;
const CONTROL_ONES: u16 = 0x40;

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
