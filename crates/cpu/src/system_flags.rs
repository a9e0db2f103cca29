//! Instructions that read and write the flags that are not arithmetic: CLI, STI, PUSHF, POPF, CLAC
//! and STAC.

use crate::core_state::Core;
use crate::far::changeable_flags;
use crate::form::Form;
use crate::int::Int;
use crate::op::{Handler, Op};
use crate::state::rflags;
use crate::trap::Trap;
use iced_x86::Mnemonic as M;

/// The handler for an instruction of this subject.
pub(crate) fn select(form: &Form) -> Option<Handler> {
    Some(match (form.mnemonic, form.kinds[0], form.kinds[1]) {
        (M::Cli, ..) => cli,
        (M::Sti, ..) => sti,
        (M::Pushf, ..) => push_flags::<u16>,
        (M::Pushfd, ..) => push_flags::<u32>,
        (M::Pushfq, ..) => push_flags::<u64>,
        (M::Popf, ..) => pop_flags::<u16>,
        (M::Popfd, ..) => pop_flags::<u32>,
        (M::Popfq, ..) => pop_flags::<u64>,
        (M::Clac, ..) => |core, _| set_access_control(core, false),
        (M::Stac, ..) => |core, _| set_access_control(core, true),
        _ => return None,
    })
}

/// Whether CPL may change RFLAGS.IF.
fn may_change_interrupts(core: &Core) -> bool {
    let iopl = ((core.flags.system() & rflags::IOPL) >> 12) as u8;
    core.real_mode() || core.cpl <= iopl
}

fn cli(core: &mut Core, _op: &Op) -> Result<(), Trap> {
    if !may_change_interrupts(core) {
        return Err(core.general_protection(0));
    }
    core.flags.set_system(core.flags.system() & !rflags::IF);
    Ok(())
}

fn sti(core: &mut Core, _op: &Op) -> Result<(), Trap> {
    if !may_change_interrupts(core) {
        return Err(core.general_protection(0));
    }
    if core.flags.system() & rflags::IF == 0 {
        core.flags.set_system(core.flags.system() | rflags::IF);
        core.events.sti_shadow = true;
        core.attention = true;
        core.stop = true;
    }
    Ok(())
}

fn push_flags<T: Int>(core: &mut Core, _op: &Op) -> Result<(), Trap> {
    if core.virtual_8086() && core.flags.system() & rflags::IOPL != rflags::IOPL {
        return Err(core.general_protection(0));
    }
    let image = core.flags.image() & !(rflags::VM | rflags::RF);
    core.push(T::truncate(image))
}

fn pop_flags<T: Int>(core: &mut Core, _op: &Op) -> Result<(), Trap> {
    if core.virtual_8086() && core.flags.system() & rflags::IOPL != rflags::IOPL {
        return Err(core.general_protection(0));
    }
    let image = core.peek::<T>(0)?.zero_extend();
    core.drop_stack(T::BYTES);
    let mask = changeable_flags::<T>(core);
    let before = core.flags.image();
    core.flags.set_image(before & !mask | image & mask);
    let changed = before ^ core.flags.image();
    if changed & (rflags::TF | rflags::AC) != 0 {
        core.update_mode();
    }
    if changed & (rflags::TF | rflags::IF) != 0 {
        core.attention = true;
        core.stop = true;
    }
    Ok(())
}

fn set_access_control(core: &mut Core, on: bool) -> Result<(), Trap> {
    if core.cpl > 0 {
        return Err(core.invalid_opcode());
    }
    let system = core.flags.system() & !rflags::AC;
    core.flags
        .set_system(if on { system | rflags::AC } else { system });
    core.update_rights();
    Ok(())
}
