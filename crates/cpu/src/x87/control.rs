//! The control instructions.

use super::{initialise, ready, report_exception, require_unit, set_words, status};
use crate::form::{Form, Kind};
use crate::op::{Handler, Mem, Place as _, Read as _, Segmented};
use crate::state::{cr0, gpr};
use iced_x86::Mnemonic as M;

/// The handler for an instruction of this subject.
pub(super) fn select(form: &Form) -> Option<Handler> {
    Some(match (form.mnemonic, form.kinds[0]) {
        (M::Fninit, _) => |core, _| {
            require_unit(core)?;
            initialise(&mut core.vectors);
            Ok(())
        },
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
            let state = &mut core.vectors;
            set_words(state, value, state.fsw);
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
