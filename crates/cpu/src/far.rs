//! Transfers of control to another code segment: far jumps, calls and returns, and IRET.

use crate::core_state::{Core, seg};
use crate::form::{Form, Kind};
use crate::gates::Gate;
use crate::int::Int;
use crate::mode::Mode;
use crate::op::{Handler, Op};
use crate::segments::{Descriptor, far_pointer, null_segment};
use crate::state::{Segment, gpr, rflags};
use crate::trap::{Trap, vector};
use iced_x86::{Code as C, Mnemonic as M};

/// The handler for an instruction of this subject.
pub(crate) fn select(form: &Form) -> Option<Handler> {
    Some(match (form.mnemonic, form.kinds[0], form.kinds[1]) {
        (M::Jmp, Kind::Far, _) => |core, op| {
            let (offset, selector) = (op.imm & 0xffff_ffff, (op.imm >> 32) as u16);
            far_jump(core, op, selector, offset)
        },
        (M::Call, Kind::Far, _) => match form.instruction.code() {
            C::Call_ptr1616 => call_far_immediate::<u16>,
            _ => call_far_immediate::<u32>,
        },
        (M::Jmp, Kind::Mem, _) => match form.instruction.code() {
            C::Jmp_m1616 => jump_far_memory::<u16>,
            C::Jmp_m1632 => jump_far_memory::<u32>,
            _ => jump_far_memory::<u64>,
        },
        (M::Call, Kind::Mem, _) => match form.instruction.code() {
            C::Call_m1616 => call_far_memory::<u16>,
            C::Call_m1632 => call_far_memory::<u32>,
            _ => call_far_memory::<u64>,
        },
        (M::Retf, ..) => match form.instruction.code() {
            C::Retfw | C::Retfw_imm16 => far_return::<u16>,
            C::Retfd | C::Retfd_imm16 => far_return::<u32>,
            _ => far_return::<u64>,
        },
        (M::Iret, ..) => interrupt_return::<u16>,
        (M::Iretd, ..) => interrupt_return::<u32>,
        (M::Iretq, ..) => interrupt_return::<u64>,
        _ => return None,
    })
}

impl Core {
    /// The code segment that a far transfer may go to at the current privilege level, and the
    /// level it runs at, which a return may lower.
    fn code_descriptor(
        &mut self,
        selector: u16,
        returning: bool,
    ) -> Result<(Descriptor, u8), Trap> {
        if selector & !3 == 0 {
            return Err(self.general_protection(0));
        }
        let descriptor = self.descriptor(selector, vector::GP)?;
        let rpl = (selector & 3) as u8;
        if !descriptor.is_code_or_data() {
            if returning {
                return Err(self.selector_fault(vector::GP, selector));
            }
            // Only by `far_target`.
            return Err(self.selector_fault(vector::GP, selector));
        }
        let dpl = descriptor.dpl();
        let allowed = descriptor.is_code()
            && if returning {
                rpl >= self.cpl
                    && if descriptor.is_conforming() {
                        dpl <= rpl
                    } else {
                        dpl == rpl
                    }
            } else if descriptor.is_conforming() {
                dpl <= self.cpl
            } else {
                rpl <= self.cpl && dpl == self.cpl
            };
        let long = descriptor.low >> 53 & 1 != 0;
        let big = descriptor.low >> 54 & 1 != 0;
        if !allowed || (self.long_mode() && long && big) {
            return Err(self.selector_fault(vector::GP, selector));
        }
        if !descriptor.present() {
            return Err(self.selector_fault(vector::NP, selector));
        }
        Ok((descriptor, if returning { rpl } else { self.cpl }))
    }

    /// Where a far jump or call leads.
    fn far_target(&mut self, selector: u16) -> Result<Target, Trap> {
        if selector & !3 == 0 {
            return Err(self.general_protection(0));
        }
        let descriptor = self.descriptor(selector, vector::GP)?;
        if descriptor.is_code_or_data() {
            let (descriptor, cpl) = self.code_descriptor(selector, false)?;
            return Ok(Target::Code(descriptor, cpl));
        }
        self.call_gate(descriptor, selector).map(Target::Gate)
    }

    /// Makes a code segment current and goes on at `offset` in it. Nothing has changed if this
    /// fails.
    pub(crate) fn enter_code(
        &mut self,
        mut descriptor: Descriptor,
        selector: u16,
        cpl: u8,
        offset: u64,
    ) -> Result<(), Trap> {
        let segment = descriptor.segment(selector & !3 | u16::from(cpl));
        let valid = if self.long_mode() && segment.long {
            self.is_canonical(offset)
        } else {
            offset <= u64::from(segment.limit)
        };
        if !valid {
            return Err(self.general_protection(0));
        }
        self.mark_accessed(&mut descriptor)?;
        self.segment[usize::from(seg::CS)] = Segment {
            kind: segment.kind | 1,
            ..segment
        };
        self.cpl = cpl;
        self.rip = offset;
        self.update_mode();
        Ok(())
    }

    /// After a return to an outer level: data segments that the outer level may not use become
    /// null.
    fn drop_inner_segments(&mut self) {
        for register in [seg::ES, seg::DS, seg::FS, seg::GS] {
            let i = usize::from(register);
            let segment = &self.segment[i];
            let conforming_code = segment.kind & 0xc == 0xc;
            // A null selector loses its requested level too.
            if segment.unusable || segment.dpl < self.cpl && !conforming_code {
                let selector = 0;
                self.segment[i] = Segment {
                    base: segment.base,
                    ..null_segment(selector, self.cpl)
                };
                self.update_segment(i);
            }
        }
    }
}

/// Where a far jump or call leads: a code segment, with the level to run at, or a call gate.
enum Target {
    Code(Descriptor, u8),
    Gate(Gate),
}

fn far_jump(core: &mut Core, _op: &Op, selector: u16, offset: u64) -> Result<(), Trap> {
    if !core.mode.has(Mode::PROTECTED) {
        if offset > u64::from(core.segment[usize::from(seg::CS)].limit) {
            return Err(core.general_protection(0));
        }
        core.load_real_segment(usize::from(seg::CS), selector);
        core.rip = offset;
        return Ok(());
    }
    match core.far_target(selector)? {
        Target::Code(descriptor, cpl) => core.enter_code(descriptor, selector, cpl, offset),
        Target::Gate(gate) => core.jump_through(gate),
    }
}

fn jump_far_memory<T: Int>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let (offset, selector) = far_pointer::<T>(core, op)?;
    far_jump(core, op, selector, offset)
}

fn call_far_immediate<T: Int>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let (offset, selector) = (op.imm & 0xffff_ffff, (op.imm >> 32) as u16);
    far_call::<T>(core, op, selector, offset)
}

fn call_far_memory<T: Int>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let (offset, selector) = far_pointer::<T>(core, op)?;
    far_call::<T>(core, op, selector, offset)
}

fn far_call<T: Int>(core: &mut Core, op: &Op, selector: u16, offset: u64) -> Result<(), Trap> {
    let before = core.regs[gpr::RSP];
    let after = core.rip;
    let from = core.segment[usize::from(seg::CS)].selector;
    let target = if core.mode.has(Mode::PROTECTED) {
        match core.far_target(selector)? {
            Target::Code(descriptor, cpl) => Some((descriptor, cpl)),
            Target::Gate(gate) => return core.call_through(gate, op.next_ip()),
        }
    } else {
        if offset > u64::from(core.segment[usize::from(seg::CS)].limit) {
            return Err(core.general_protection(0));
        }
        None
    };
    let result = core
        .push(T::truncate(u64::from(from)))
        .and_then(|()| core.push(T::truncate(op.next_ip())))
        .and_then(|()| match target {
            Some((descriptor, cpl)) => core.enter_code(descriptor, selector, cpl, offset),
            None => {
                core.load_real_segment(usize::from(seg::CS), selector);
                core.rip = offset;
                Ok(())
            }
        });
    if result.is_err() {
        core.regs[gpr::RSP] = before;
        core.rip = after;
    }
    result
}

fn far_return<T: Int>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let offset = core.peek::<T>(0)?.zero_extend();
    let selector = core.peek::<T>(T::BYTES)?.zero_extend() as u16;
    let release = op.imm & 0xffff;
    if !core.mode.has(Mode::PROTECTED) {
        if offset > u64::from(core.segment[usize::from(seg::CS)].limit) {
            return Err(core.general_protection(0));
        }
        core.drop_stack(2 * T::BYTES + release);
        core.load_real_segment(usize::from(seg::CS), selector);
        core.rip = offset;
        return Ok(());
    }
    let (descriptor, cpl) = core.code_descriptor(selector, true)?;
    if cpl == core.cpl {
        core.enter_code(descriptor, selector, cpl, offset)?;
        core.drop_stack(2 * T::BYTES + release);
        return Ok(());
    }
    let stack = core.peek::<T>(2 * T::BYTES + release)?.zero_extend();
    let stack_selector = core.peek::<T>(3 * T::BYTES + release)?.zero_extend() as u16;
    let stack_segment = outer_stack(core, stack_selector, cpl, &descriptor)?;
    core.enter_code(descriptor, selector, cpl, offset)?;
    core.segment[usize::from(seg::SS)] = stack_segment;
    core.update_mode();
    core.set_stack_pointer(stack.wrapping_add(release));
    core.drop_inner_segments();
    Ok(())
}

/// The stack segment that a return to an outer (or, with IRETQ, any) level loads.
fn outer_stack(
    core: &mut Core,
    selector: u16,
    cpl: u8,
    code: &Descriptor,
) -> Result<Segment, Trap> {
    let to_64 = core.long_mode() && code.low >> 53 & 1 != 0;
    if selector & !3 == 0 {
        if to_64 && cpl != 3 && (selector & 3) as u8 == cpl {
            return Ok(null_segment(selector, cpl));
        }
        return Err(core.general_protection(0));
    }
    let mut descriptor = core.descriptor(selector, vector::GP)?;
    let writable =
        descriptor.is_code_or_data() && !descriptor.is_code() && descriptor.kind() & 2 != 0;
    if !writable || (selector & 3) as u8 != cpl || descriptor.dpl() != cpl {
        return Err(core.selector_fault(vector::GP, selector));
    }
    if !descriptor.present() {
        return Err(core.selector_fault(vector::SS, selector));
    }
    core.mark_accessed(&mut descriptor)?;
    Ok(descriptor.segment(selector))
}

/// The flags that IRET and POPF may change with an operand of `T`. IRET also loads RF.
pub(crate) fn changeable_flags<T: Int>(core: &Core) -> u64 {
    let mut mask =
        rflags::ARITHMETIC | rflags::TF | rflags::DF | rflags::NT | rflags::AC | rflags::ID;
    let iopl = ((core.flags.system() & rflags::IOPL) >> 12) as u8;
    if core.cpl == 0 {
        mask |= rflags::IOPL;
    }
    if core.cpl <= iopl {
        mask |= rflags::IF;
    }
    if T::BITS == 16 { mask & 0xffff } else { mask }
}

fn interrupt_return<T: Int>(core: &mut Core, _op: &Op) -> Result<(), Trap> {
    let loads_resume = if T::BITS == 16 { 0 } else { rflags::RF };
    let ip = core.peek::<T>(0)?.zero_extend();
    let selector = core.peek::<T>(T::BYTES)?.zero_extend() as u16;
    let image = core.peek::<T>(2 * T::BYTES)?.zero_extend();
    if core.virtual_8086() {
        core.return_within_v86::<T>(ip, selector, image)?;
        core.after_interrupt_return();
        return Ok(());
    }
    if core.real_mode() {
        if ip > u64::from(core.segment[usize::from(seg::CS)].limit) {
            return Err(core.general_protection(0));
        }
        let mask = changeable_flags::<T>(core) | loads_resume;
        core.drop_stack(3 * T::BYTES);
        core.flags
            .set_image(core.flags.image() & !mask | image & mask);
        core.load_real_segment(usize::from(seg::CS), selector);
        core.rip = ip;
        core.after_interrupt_return();
        return Ok(());
    }
    if core.flags.system() & rflags::NT != 0 {
        // In long mode a nested task cannot be; elsewhere it means a task switch.
        return Err(if core.long_mode() {
            core.general_protection(0)
        } else {
            core.unsupported()
        });
    }
    if !core.long_mode() && image & rflags::VM != 0 && core.cpl == 0 && T::BITS == 32 {
        core.return_to_v86(ip, selector, image)?;
        core.after_interrupt_return();
        return Ok(());
    }
    let mut mask = changeable_flags::<T>(core) | loads_resume;
    if core.cpl == 0 && T::BITS > 16 {
        mask |= rflags::VIF | rflags::VIP;
    }
    let (descriptor, cpl) = core.code_descriptor(selector, true)?;
    if cpl == core.cpl && !core.mode.has(Mode::CODE64) {
        core.enter_code(descriptor, selector, cpl, ip)?;
        core.drop_stack(3 * T::BYTES);
    } else {
        // From 64-bit code, and to an outer level, the stack is restored too.
        let outer = cpl != core.cpl;
        let stack = core.peek::<T>(3 * T::BYTES)?.zero_extend();
        let stack_selector = core.peek::<T>(4 * T::BYTES)?.zero_extend() as u16;
        let stack_segment = outer_stack(core, stack_selector, cpl, &descriptor)?;
        core.enter_code(descriptor, selector, cpl, ip)?;
        core.segment[usize::from(seg::SS)] = stack_segment;
        core.update_mode();
        core.set_stack_pointer(stack);
        if outer {
            core.drop_inner_segments();
        }
    }
    core.flags
        .set_image(core.flags.image() & !mask | image & mask);
    core.after_interrupt_return();
    Ok(())
}

impl Core {
    /// IRET has completed: NMIs are unblocked, and the flags may ask for something.
    fn after_interrupt_return(&mut self) {
        self.events.nmi_masked = false;
        // RF, if it was loaded, is for the next instruction.
        self.resume_running = false;
        self.attention = true;
        self.update_mode();
    }
}
