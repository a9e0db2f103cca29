//! RDPKRU and WRPKRU: protection keys for user pages (SDM Vol. 3, "Protection Keys").

use crate::core_state::Core;
use crate::form::Form;
use crate::op::{Handler, Op};
use crate::state::{cr4, gpr};
use crate::system::set_pair;
use crate::trap::Trap;
use iced_x86::Mnemonic as M;

/// The handler for an instruction of this subject.
pub(crate) fn select(form: &Form) -> Option<Handler> {
    Some(match form.mnemonic {
        M::Rdpkru => read_rights,
        M::Wrpkru => write_rights,
        _ => return None,
    })
}

/// Bytes of PKRU's state component, of which the first four are the register.
pub(crate) const PKRU_BYTES: u32 = 8;

fn check(core: &mut Core) -> Result<(), Trap> {
    if core.cr4 & cr4::PKE == 0 {
        return Err(core.invalid_opcode());
    }
    if core.reg::<u32>(gpr::RCX as u8) != 0 {
        return Err(core.general_protection(0));
    }
    Ok(())
}

fn read_rights(core: &mut Core, _op: &Op) -> Result<(), Trap> {
    check(core)?;
    set_pair(core, core.msrs.pkru.into());
    Ok(())
}

fn write_rights(core: &mut Core, _op: &Op) -> Result<(), Trap> {
    check(core)?;
    if core.reg::<u32>(gpr::RDX as u8) != 0 {
        return Err(core.general_protection(0));
    }
    core.set_pkru(core.reg(gpr::RAX as u8));
    Ok(())
}

impl Core {
    /// Replaces PKRU. Cached translations say what the keys allowed before.
    pub(crate) fn set_pkru(&mut self, rights: u32) {
        if core::mem::replace(&mut self.msrs.pkru, rights) != rights && self.cr4 & cr4::PKE != 0 {
            self.flush_tlb();
            self.stop = true;
        }
    }
}
