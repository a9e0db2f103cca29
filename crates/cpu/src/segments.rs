//! Segment registers, descriptors, and far transfers of control.

use crate::core_state::{Core, seg};
use crate::form::{Form, Kind};
use crate::int::Int;
use crate::mode::Mode;
use crate::op::{Address, Handler, Op, Segmented};
use crate::state::{Segment, gpr, rflags};
use crate::trap::{Exception, Exit, Trap, UnknownInstruction, vector};
use iced_x86::{Code as C, Mnemonic as M};

/// The handler for an instruction of this subject.
pub(crate) fn select(form: &Form) -> Option<Handler> {
    let bytes = form.instruction.stack_pointer_increment().unsigned_abs();
    Some(match (form.mnemonic, form.kinds[0], form.kinds[1]) {
        (M::Mov, Kind::Reg, Kind::Seg) => match form.width {
            2 => |core, op| {
                let selector = core.segment[usize::from(op.src)].selector;
                core.set_reg(op.dst, selector);
                Ok(())
            },
            _ => |core, op| {
                let selector = core.segment[usize::from(op.src)].selector;
                core.set_reg(op.dst, u64::from(selector));
                Ok(())
            },
        },
        (M::Mov, Kind::Mem, Kind::Seg) => |core, op| {
            let selector = core.segment[usize::from(op.src)].selector;
            let linear = Segmented::for_write(core, op, 2)?;
            core.store(linear, selector)
        },
        (M::Mov, Kind::Seg, Kind::Reg) => |core, op| {
            let selector = core.reg(op.src);
            move_to_segment(core, op.dst, selector)
        },
        (M::Mov, Kind::Seg, Kind::Mem) => |core, op| {
            let linear = Segmented::for_read(core, op, 2)?;
            let selector = core.load(linear)?;
            move_to_segment(core, op.dst, selector)
        },
        (M::Push, Kind::Seg, _) => match bytes {
            2 => push_segment::<u16>,
            4 => push_segment::<u32>,
            _ => push_segment::<u64>,
        },
        (M::Pop, Kind::Seg, _) => match bytes {
            2 => pop_segment::<u16>,
            4 => pop_segment::<u32>,
            _ => pop_segment::<u64>,
        },
        (M::Lds, ..) => select_far_pointer::<{ seg::DS }>(form),
        (M::Les, ..) => select_far_pointer::<{ seg::ES }>(form),
        (M::Lfs, ..) => select_far_pointer::<{ seg::FS }>(form),
        (M::Lgs, ..) => select_far_pointer::<{ seg::GS }>(form),
        (M::Lss, ..) => select_far_pointer::<{ seg::SS }>(form),
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

/// A descriptor as it lies in a table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Descriptor {
    pub(crate) low: u64,
    /// Linear address of its first byte.
    pub(crate) place: u64,
}

impl Descriptor {
    pub(crate) fn kind(self) -> u8 {
        (self.low >> 40 & 15) as u8
    }
    pub(crate) fn is_code_or_data(self) -> bool {
        self.low >> 44 & 1 != 0
    }
    pub(crate) fn is_code(self) -> bool {
        self.is_code_or_data() && self.kind() & 8 != 0
    }
    pub(crate) fn dpl(self) -> u8 {
        (self.low >> 45 & 3) as u8
    }
    pub(crate) fn present(self) -> bool {
        self.low >> 47 & 1 != 0
    }
    /// Code that may be entered from lower privilege without changing the level.
    pub(crate) fn is_conforming(self) -> bool {
        self.is_code() && self.kind() & 4 != 0
    }

    /// The segment register that holds this descriptor.
    pub(crate) fn segment(self, selector: u16) -> Segment {
        let low = self.low;
        let limit = (low & 0xffff | low >> 32 & 0xf_0000) as u32;
        let granular = low >> 55 & 1 != 0;
        Segment {
            selector,
            base: low >> 16 & 0xff_ffff | low >> 32 & 0xff00_0000,
            limit: if granular { limit << 12 | 0xfff } else { limit },
            kind: self.kind(),
            dpl: self.dpl(),
            code_or_data: self.is_code_or_data(),
            present: self.present(),
            available: low >> 52 & 1 != 0,
            long: low >> 53 & 1 != 0,
            big: low >> 54 & 1 != 0,
            granular,
            unusable: false,
        }
    }
}

impl Core {
    /// An exception whose error code names a selector.
    #[cold]
    pub(crate) fn selector_fault(&mut self, vector: u8, selector: u16) -> Trap {
        let error_code = Some(u32::from(selector & 0xfffc));
        self.raise(Exception {
            vector,
            error_code,
            payload: None,
        })
    }

    /// Leaves because the instruction needs something that this processor does not do, such as a
    /// task switch.
    #[cold]
    pub(crate) fn unsupported(&mut self) -> Trap {
        self.leave(Exit::Unknown(UnknownInstruction {
            bytes: [0; 15],
            len: 0,
            mnemonic: M::INVALID,
        }))
    }

    /// Reads the descriptor that a selector names; `vector` with the selector if it is outside its
    /// table.
    pub(crate) fn descriptor(&mut self, selector: u16, vector: u8) -> Result<Descriptor, Trap> {
        let (base, limit) = if selector & 4 != 0 {
            if self.ldt.unusable || !self.ldt.present {
                return Err(self.selector_fault(vector, selector));
            }
            (self.ldt.base, self.ldt.limit)
        } else {
            (self.gdt.base, u32::from(self.gdt.limit))
        };
        let offset = u32::from(selector & !7);
        if offset + 7 > limit {
            return Err(self.selector_fault(vector, selector));
        }
        let place = base.wrapping_add(u64::from(offset));
        let place = if self.long_mode() {
            place
        } else {
            place & 0xffff_ffff
        };
        let low = self.load_sys(place)?;
        Ok(Descriptor { low, place })
    }

    /// Sets the accessed bit of a code or data descriptor in its table.
    pub(crate) fn mark_accessed(&mut self, descriptor: &mut Descriptor) -> Result<(), Trap> {
        if descriptor.kind() & 1 == 0 {
            let place = descriptor.place.wrapping_add(5);
            let access: u8 = self.load_sys(place)?;
            self.store_sys(place, access | 1)?;
            descriptor.low |= 1 << 40;
        }
        Ok(())
    }

    /// Loads a segment register other than CS.
    pub(crate) fn load_segment(&mut self, register: u8, selector: u16) -> Result<(), Trap> {
        let i = usize::from(register & 7);
        if !self.mode.has(Mode::PROTECTED) {
            self.load_real_segment(i, selector);
            return Ok(());
        }
        let rpl = (selector & 3) as u8;
        if selector & !3 == 0 {
            if register == seg::SS
                && !(self.mode.has(Mode::CODE64) && self.cpl < 3 && rpl == self.cpl)
            {
                return Err(self.general_protection(0));
            }
            self.segment[i] = null_segment(selector, self.cpl);
            self.update_segment(i);
            return Ok(());
        }
        let mut descriptor = self.descriptor(selector, vector::GP)?;
        let kind = descriptor.kind();
        let allowed = if register == seg::SS {
            let writable = !descriptor.is_code() && kind & 2 != 0;
            descriptor.is_code_or_data()
                && writable
                && rpl == self.cpl
                && descriptor.dpl() == self.cpl
        } else {
            let readable = !descriptor.is_code() || kind & 2 != 0;
            let privileged = descriptor.is_conforming() || descriptor.dpl() >= rpl.max(self.cpl);
            descriptor.is_code_or_data() && readable && privileged
        };
        if !allowed {
            return Err(self.selector_fault(vector::GP, selector));
        }
        if !descriptor.present() {
            let vector = if register == seg::SS {
                vector::SS
            } else {
                vector::NP
            };
            return Err(self.selector_fault(vector, selector));
        }
        self.mark_accessed(&mut descriptor)?;
        self.segment[i] = descriptor.segment(selector);
        if register == seg::SS {
            self.update_mode();
        } else {
            self.update_segment(i);
        }
        Ok(())
    }

    /// Real and virtual-8086 mode: the base follows from the selector, the limit stays.
    pub(crate) fn load_real_segment(&mut self, i: usize, selector: u16) {
        let limit = if self.virtual_8086() {
            0xffff
        } else {
            self.segment[i].limit
        };
        let big = !self.virtual_8086() && self.segment[i].big;
        self.segment[i] = Segment {
            selector,
            base: u64::from(selector) << 4,
            limit,
            big,
            kind: if i == usize::from(seg::CS) { 11 } else { 3 },
            code_or_data: true,
            present: true,
            dpl: self.cpl,
            ..Segment::default()
        };
        if i == usize::from(seg::CS) {
            self.update_mode();
        } else {
            self.update_segment(i);
        }
    }

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
            // Call gates, task gates and task segments.
            return Err(self.unsupported());
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

    /// Makes a code segment current and goes on at `offset` in it. Nothing has changed if this
    /// fails.
    fn enter_code(
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
            if !segment.unusable && segment.dpl < self.cpl && !conforming_code {
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

/// A segment register with a null selector.
pub(crate) fn null_segment(selector: u16, dpl: u8) -> Segment {
    Segment {
        selector,
        dpl,
        unusable: true,
        ..Segment::default()
    }
}

fn move_to_segment(core: &mut Core, register: u8, selector: u16) -> Result<(), Trap> {
    if register == seg::CS {
        return Err(core.invalid_opcode());
    }
    core.load_segment(register, selector)?;
    if register == seg::SS {
        core.events.mov_ss_shadow = true;
        core.attention = true;
        core.stop = true;
    }
    Ok(())
}

fn push_segment<T: Int>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let selector = core.segment[usize::from(op.dst)].selector;
    core.push(T::truncate(u64::from(selector)))
}

fn pop_segment<T: Int>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let selector: T = core.peek(0)?;
    // Popping SS may change how wide the stack pointer is; the old width counts.
    let before = core.regs[gpr::RSP];
    core.drop_stack(T::BYTES);
    if let Err(trap) = move_to_segment(core, op.dst, selector.zero_extend() as u16) {
        core.regs[gpr::RSP] = before;
        return Err(trap);
    }
    Ok(())
}

fn select_far_pointer<const SEGMENT: u8>(form: &Form) -> Handler {
    match form.width {
        2 => load_far_pointer::<u16, SEGMENT>,
        4 => load_far_pointer::<u32, SEGMENT>,
        _ => load_far_pointer::<u64, SEGMENT>,
    }
}

/// Reads an offset and the selector behind it.
fn far_pointer<T: Int>(core: &mut Core, op: &Op) -> Result<(u64, u16), Trap> {
    let linear = Segmented::for_read(core, op, T::BYTES + 2)?;
    let offset: T = core.load(linear)?;
    let selector = core.load(linear.wrapping_add(T::BYTES))?;
    Ok((offset.zero_extend(), selector))
}

fn load_far_pointer<T: Int, const SEGMENT: u8>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let (offset, selector) = far_pointer::<T>(core, op)?;
    core.load_segment(SEGMENT, selector)?;
    core.set_reg(op.dst, T::truncate(offset));
    if SEGMENT == seg::SS {
        core.stop = true;
    }
    Ok(())
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
    let (descriptor, cpl) = core.code_descriptor(selector, false)?;
    core.enter_code(descriptor, selector, cpl, offset)
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
        Some(core.code_descriptor(selector, false)?)
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

/// The flags that IRET and POPF may change with an operand of `T`. RF, which only suppresses
/// instruction breakpoints, is not kept.
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
    let ip = core.peek::<T>(0)?.zero_extend();
    let selector = core.peek::<T>(T::BYTES)?.zero_extend() as u16;
    let image = core.peek::<T>(2 * T::BYTES)?.zero_extend();
    if core.virtual_8086() {
        return Err(core.unsupported());
    }
    if core.real_mode() {
        if ip > u64::from(core.segment[usize::from(seg::CS)].limit) {
            return Err(core.general_protection(0));
        }
        let mask = changeable_flags::<T>(core);
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
        return Err(core.unsupported());
    }
    let mask = changeable_flags::<T>(core);
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
        self.attention = true;
        self.update_mode();
    }
}
