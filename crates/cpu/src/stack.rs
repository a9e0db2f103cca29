//! PUSH, POP and their kin.

use crate::core_state::{Core, seg};
use crate::form::{Form, Kind, by_address};
use crate::int::Int;
use crate::mode::Mode;
use crate::op::{Address, Dst, Handler, Imm, Mem, Op, Place, Read};
use crate::state::gpr;
use crate::trap::Trap;
use iced_x86::Mnemonic as M;

const RSP: u8 = gpr::RSP as u8;
const RBP: u8 = gpr::RBP as u8;

/// Turns the bytes that the stack pointer moves by into an integer type.
macro_rules! by_stack_width {
    ($form:expr, $t:ident => $handler:expr) => {
        match $form.instruction.stack_pointer_increment().unsigned_abs() {
            2 => {
                type $t = u16;
                $handler as Handler
            }
            4 => {
                type $t = u32;
                $handler as Handler
            }
            _ => {
                type $t = u64;
                $handler as Handler
            }
        }
    };
}

/// The handler for an instruction of this subject.
pub(crate) fn select(form: &Form) -> Option<Handler> {
    Some(match (form.mnemonic, form.kinds[0]) {
        (M::Push, Kind::Reg) => by_stack_width!(form, T => push::<T, Dst>),
        (M::Push, Kind::Imm) => by_stack_width!(form, T => push::<T, Imm>),
        (M::Push, Kind::Mem) => {
            by_stack_width!(form, T => by_address!(form, A => push::<T, Mem<A>>))
        }
        (M::Pop, Kind::Reg) => by_stack_width!(form, T => pop::<T>),
        (M::Pop, Kind::Mem) => {
            by_stack_width!(form, T => by_address!(form, A => pop_memory::<T, A>))
        }
        (M::Pusha, _) => push_all::<u16>,
        (M::Pushad, _) => push_all::<u32>,
        (M::Popa, _) => pop_all::<u16>,
        (M::Popad, _) => pop_all::<u32>,
        (M::Leave, _) => match form.instruction.code() {
            iced_x86::Code::Leavew => leave::<u16>,
            iced_x86::Code::Leaved => leave::<u32>,
            _ => leave::<u64>,
        },
        (M::Enter, _) => match form.instruction.code() {
            iced_x86::Code::Enterw_imm16_imm8 => enter::<u16>,
            iced_x86::Code::Enterd_imm16_imm8 => enter::<u32>,
            _ => enter::<u64>,
        },
        _ => return None,
    })
}

impl Core {
    /// Bits of the stack pointer that count.
    #[inline(always)]
    pub(crate) fn stack_mask(&self) -> u64 {
        if self.mode.has(Mode::CODE64) {
            u64::MAX
        } else if self.mode.has(Mode::STACK32) {
            0xffff_ffff
        } else {
            0xffff
        }
    }

    /// Sets the stack pointer, as wide as the stack is.
    #[inline(always)]
    pub(crate) fn set_stack_pointer(&mut self, value: u64) {
        if self.mode.has(Mode::CODE64) {
            self.regs[gpr::RSP] = value;
        } else if self.mode.has(Mode::STACK32) {
            self.set_reg(RSP, value as u32);
        } else {
            self.set_reg(RSP, value as u16);
        }
    }

    /// The linear address of `size` bytes on the stack, `distance` above the stack pointer.
    #[inline(always)]
    pub(crate) fn stack_place(
        &mut self,
        distance: u64,
        size: u64,
        write: bool,
    ) -> Result<u64, Trap> {
        let offset = self.regs[gpr::RSP].wrapping_add(distance);
        if self.mode.has(Mode::CODE64) {
            return Ok(offset);
        }
        let offset = offset & self.stack_mask();
        self.linear(seg::SS, offset, size, write)
    }

    /// Pushes a value.
    #[inline(always)]
    pub(crate) fn push<T: Int>(&mut self, value: T) -> Result<(), Trap> {
        let place = self.stack_place(T::BYTES.wrapping_neg(), T::BYTES, true)?;
        self.store(place, value)?;
        self.drop_stack(T::BYTES.wrapping_neg());
        Ok(())
    }

    /// Reads a value on the stack, `distance` bytes above its top.
    #[inline(always)]
    pub(crate) fn peek<T: Int>(&mut self, distance: u64) -> Result<T, Trap> {
        let place = self.stack_place(distance, T::BYTES, false)?;
        self.load(place)
    }

    /// Takes bytes off the stack.
    #[inline(always)]
    pub(crate) fn drop_stack(&mut self, bytes: u64) {
        self.set_stack_pointer(self.regs[gpr::RSP].wrapping_add(bytes));
    }
}

fn push<T: Int, S: Read>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let value: T = S::read(core, op)?;
    core.push(value)
}

fn pop<T: Int>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let value: T = core.peek(0)?;
    core.drop_stack(T::BYTES);
    core.set_reg(op.dst, value);
    Ok(())
}

fn pop_memory<T: Int, A: Address>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let value: T = core.peek(0)?;
    // An address that uses the stack pointer sees it already incremented.
    let before = core.regs[gpr::RSP];
    core.drop_stack(T::BYTES);
    if let Err(trap) = Mem::<A>::write(core, op, value) {
        core.regs[gpr::RSP] = before;
        return Err(trap);
    }
    Ok(())
}

fn push_all<T: Int>(core: &mut Core, _op: &Op) -> Result<(), Trap> {
    let before = core.regs[gpr::RSP];
    // The whole frame is probed first, so that a fault changes nothing; what would be pushed first
    // is the first to fault.
    for depth in 1..=8 {
        let place = core.stack_place((depth * T::BYTES).wrapping_neg(), T::BYTES, true)?;
        core.touch_write(place, T::BYTES)?;
    }
    for register in 0..8 {
        let value = if register == RSP {
            T::truncate(before)
        } else {
            core.reg(register)
        };
        if let Err(trap) = core.push(value) {
            core.regs[gpr::RSP] = before;
            return Err(trap);
        }
    }
    Ok(())
}

fn pop_all<T: Int>(core: &mut Core, _op: &Op) -> Result<(), Trap> {
    let mut values = [T::ZERO; 8];
    for (distance, value) in (0u64..).zip(&mut values) {
        *value = core.peek(distance * T::BYTES)?;
    }
    core.drop_stack(8 * T::BYTES);
    for (register, value) in (0u8..8).rev().zip(values) {
        if register != RSP {
            core.set_reg(register, value);
        }
    }
    Ok(())
}

fn leave<T: Int>(core: &mut Core, _op: &Op) -> Result<(), Trap> {
    let before = core.regs[gpr::RSP];
    let frame = core.regs[gpr::RBP];
    core.set_stack_pointer(frame);
    match core.peek::<T>(0) {
        Ok(value) => {
            core.drop_stack(T::BYTES);
            core.set_reg(RBP, value);
            Ok(())
        }
        Err(trap) => {
            core.regs[gpr::RSP] = before;
            Err(trap)
        }
    }
}

fn enter<T: Int>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let size = op.imm & 0xffff;
    let level = op.imm >> 32 & 31;
    let (before_sp, before_bp) = (core.regs[gpr::RSP], core.regs[gpr::RBP]);
    let result = enter_frame::<T>(core, op, size, level);
    if result.is_err() {
        core.regs[gpr::RSP] = before_sp;
        core.regs[gpr::RBP] = before_bp;
    }
    result
}

fn enter_frame<T: Int>(core: &mut Core, _op: &Op, size: u64, level: u64) -> Result<(), Trap> {
    let mut frame = core.regs[gpr::RBP];
    core.push(T::truncate(frame))?;
    let top = core.regs[gpr::RSP];
    if level > 0 {
        for _ in 1..level {
            frame = frame.wrapping_sub(T::BYTES);
            let offset = frame & core.stack_mask();
            let linear = core.linear(seg::SS, offset, T::BYTES, false)?;
            let value: T = core.load(linear)?;
            core.push(value)?;
        }
        core.push(T::truncate(top))?;
    }
    core.set_reg(RBP, T::truncate(top));
    core.drop_stack(size.wrapping_neg());
    // The new top of the stack is probed for writing.
    let place = core.stack_place(0, T::BYTES, true)?;
    core.touch_write(place, T::BYTES)
}
