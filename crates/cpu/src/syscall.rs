//! SYSCALL, SYSENTER and their returns.

use crate::core_state::{Core, seg};
use crate::form::Form;
use crate::mode::Mode;
use crate::op::{Handler, Op};
use crate::state::{Segment, efer, gpr, rflags};
use crate::trap::Trap;
use iced_x86::Mnemonic as M;

/// The handler for an instruction of this subject.
pub(crate) fn select(form: &Form) -> Option<Handler> {
    Some(match (form.mnemonic, form.kinds[0], form.kinds[1]) {
        (M::Syscall, ..) => syscall,
        (M::Sysret, ..) => sysret::<false>,
        (M::Sysretq, ..) => sysret::<true>,
        (M::Sysenter, ..) => sysenter,
        (M::Sysexit, ..) => sysexit::<false>,
        (M::Sysexitq, ..) => sysexit::<true>,
        _ => return None,
    })
}

/// A flat code or data segment as SYSCALL and its kin load it, without looking at a descriptor.
fn flat_segment(selector: u16, code: bool, long: bool, dpl: u8) -> Segment {
    Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        kind: if code { 11 } else { 3 },
        dpl,
        code_or_data: true,
        present: true,
        available: false,
        long,
        big: !long,
        granular: true,
        unusable: false,
    }
}

impl Core {
    fn set_flat(&mut self, code: u16, stack: u16, long: bool, cpl: u8) {
        self.segment[usize::from(seg::CS)] = flat_segment(code, true, long, cpl);
        self.segment[usize::from(seg::SS)] = Segment {
            big: true,
            ..flat_segment(stack, false, false, cpl)
        };
        self.cpl = cpl;
    }
}

fn syscall(core: &mut Core, op: &Op) -> Result<(), Trap> {
    if core.efer & efer::SCE == 0 || !core.mode.has(Mode::CODE64) {
        return Err(core.invalid_opcode());
    }
    let selector = (core.msrs.star >> 32) as u16 & !3;
    core.regs[gpr::RCX] = op.next_ip();
    core.regs[11] = core.flags.image() & !rflags::RF;
    let mask = core.msrs.sfmask | rflags::RF;
    core.flags.set_image(core.flags.image() & !mask);
    core.set_flat(selector, selector.wrapping_add(8), true, 0);
    core.rip = core.msrs.lstar;
    core.update_mode();
    Ok(())
}

fn sysret<const LONG: bool>(core: &mut Core, _op: &Op) -> Result<(), Trap> {
    if core.efer & efer::SCE == 0 || !core.mode.has(Mode::CODE64) {
        return Err(core.invalid_opcode());
    }
    core.require_ring_0()?;
    let target = core.regs[gpr::RCX];
    if LONG && !core.is_canonical(target) {
        return Err(core.general_protection(0));
    }
    let selector = (core.msrs.star >> 48) as u16;
    let stack = selector.wrapping_add(8) | 3;
    let code = if LONG {
        selector.wrapping_add(16) | 3
    } else {
        selector | 3
    };
    let kept = rflags::RF | rflags::VM;
    core.flags.set_image(core.regs[11] & 0x3c_7fd7 & !kept);
    core.set_flat(code, stack, LONG, 3);
    core.rip = if LONG { target } else { target & 0xffff_ffff };
    core.attention = true;
    core.update_mode();
    Ok(())
}

fn sysenter(core: &mut Core, _op: &Op) -> Result<(), Trap> {
    if core.real_mode() || core.msrs.sysenter_cs & 0xfffc == 0 {
        return Err(core.general_protection(0));
    }
    let long = core.long_mode();
    let selector = core.msrs.sysenter_cs as u16 & !3;
    let cleared = rflags::VM | rflags::IF | rflags::RF;
    core.flags.set_system(core.flags.system() & !cleared);
    core.set_flat(selector, selector.wrapping_add(8), long, 0);
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    core.regs[gpr::RSP] = core.msrs.sysenter_esp & mask;
    core.rip = core.msrs.sysenter_eip & mask;
    core.update_mode();
    Ok(())
}

fn sysexit<const LONG: bool>(core: &mut Core, _op: &Op) -> Result<(), Trap> {
    if core.real_mode() || core.msrs.sysenter_cs & 0xfffc == 0 {
        return Err(core.general_protection(0));
    }
    core.require_ring_0()?;
    let (target, stack) = (core.regs[gpr::RDX], core.regs[gpr::RCX]);
    if LONG && !(core.is_canonical(target) && core.is_canonical(stack)) {
        return Err(core.general_protection(0));
    }
    let selector = core.msrs.sysenter_cs as u16;
    let code = selector.wrapping_add(if LONG { 32 } else { 16 }) | 3;
    core.set_flat(code, code.wrapping_add(8), LONG, 3);
    let mask = if LONG { u64::MAX } else { 0xffff_ffff };
    core.regs[gpr::RSP] = stack & mask;
    core.rip = target & mask;
    core.update_mode();
    Ok(())
}
