//! MOVS, STOS, LODS, CMPS and SCAS, with and without repetition.
//!
//! A repeated instruction can stop between any two iterations: RSI, RDI and RCX always say how far
//! it came, and RIP stays at it until it is done.

use crate::alu::{Binary, Cmp};
use crate::core_state::{Core, seg};
use crate::form::{Form, by_width};
use crate::int::Int;
use crate::mode::Mode;
use crate::op::{Handler, Op};
use crate::state::{gpr, rflags};
use crate::trap::Trap;
use iced_x86::Mnemonic as M;

/// Iterations between two looks at the processor's line.
const POLL: u32 = 256;

/// Bytes that MOVS has still to copy from which on the caches are left to others, as the host's
/// processor and `memcpy` do: what is copied would not stay in them, and a line that is overwritten
/// whole need not be read before.
const LARGE: u64 = 8 << 20;

/// The handler for an instruction of this subject.
pub(crate) fn select(form: &Form) -> Option<Handler> {
    // CMPSD and MOVSD are also SSE2 mnemonics; those have register operands.
    if !form.instruction.is_string_instruction() {
        return None;
    }
    match form.mnemonic {
        M::Movsb | M::Movsw | M::Movsd | M::Movsq => {
            by_width!(form, T => Some(repeat::<Move, T>))
        }
        M::Stosb | M::Stosw | M::Stosd | M::Stosq => {
            by_width!(form, T => Some(repeat::<Fill, T>))
        }
        M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq => {
            by_width!(form, T => Some(repeat::<Fetch, T>))
        }
        M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq => {
            by_width!(form, T => Some(repeat::<Compare, T>))
        }
        M::Scasb | M::Scasw | M::Scasd | M::Scasq => {
            by_width!(form, T => Some(repeat::<Search, T>))
        }
        _ => None,
    }
}

/// One iteration of a string instruction.
trait Iteration {
    /// Whether the repetition also depends on ZF.
    const COMPARES: bool = false;

    fn once<T: Int>(core: &mut Core, op: &Op) -> Result<(), Trap>;

    /// Does some of `count` iterations at once, if that can be done. Returns how many.
    fn many<T: Int>(_core: &mut Core, _op: &Op, _count: u64) -> Result<u64, Trap> {
        Ok(0)
    }
}

struct Move;
struct Fill;
struct Fetch;
struct Compare;
struct Search;

impl Core {
    /// Linear address of the element at RSI.
    pub(crate) fn string_source(&mut self, op: &Op, size: u64) -> Result<u64, Trap> {
        let offset = self.regs[gpr::RSI] & op.address_mask();
        self.linear(op.seg, offset, size, false)
    }

    /// Linear address of the element at RDI, always in ES.
    pub(crate) fn string_target(&mut self, op: &Op, size: u64, write: bool) -> Result<u64, Trap> {
        let offset = self.regs[gpr::RDI] & op.address_mask();
        self.linear(seg::ES, offset, size, write)
    }

    /// Adds to a register with the width of the address.
    pub(crate) fn advance(&mut self, op: &Op, register: usize, by: u64) {
        let value = self.regs[register].wrapping_add(by);
        match op.address_bits {
            16 => self.set_reg(register as u8, value as u16),
            32 => self.set_reg(register as u8, value as u32),
            _ => self.regs[register] = value,
        }
    }

    /// What a string instruction adds to its pointers for one element.
    pub(crate) fn string_step(&self, size: u64) -> u64 {
        if self.flags.system() & rflags::DF != 0 {
            size.wrapping_neg()
        } else {
            size
        }
    }

    /// Iterations that a repeated instruction still has to do.
    pub(crate) fn repeat_count(&self, op: &Op) -> u64 {
        self.regs[gpr::RCX] & op.address_mask()
    }
}

impl Core {
    /// How many bytes, at most a page, a string instruction may touch at once from `offset` up,
    /// and the linear address of the first. `None` if the segment or the address size cuts them.
    fn string_span(
        &mut self,
        op: &Op,
        segment: u8,
        offset: u64,
        bytes: u64,
        write: bool,
    ) -> Option<u64> {
        let mask = op.address_mask();
        let i = usize::from(segment & 7);
        let window = if write {
            self.writable[i]
        } else {
            self.readable[i]
        };
        let offset = offset & mask;
        let last = offset.checked_add(bytes - 1)?;
        if last > mask || offset < window.low || last > window.high {
            return None;
        }
        let linear = self.seg_base[i].wrapping_add(offset);
        if self.mode.has(Mode::CODE64) {
            Some(linear)
        } else {
            let linear = linear & 0xffff_ffff;
            (linear + bytes <= 1 << 32).then_some(linear)
        }
    }

    /// Bytes that `count` elements of `size` bytes are, if they can be handled upwards in one go.
    fn bytes_at_once(&self, count: u64, size: u64) -> Option<u64> {
        let bytes = count.min(0x1000 / size) * size;
        (self.flags.system() & rflags::DF == 0 && count > 1).then_some(bytes)
    }
}

impl Iteration for Move {
    fn many<T: Int>(core: &mut Core, op: &Op, count: u64) -> Result<u64, Trap> {
        let Some(bytes) = core.bytes_at_once(count, T::BYTES) else {
            return Ok(0);
        };
        let (rsi, rdi) = (core.regs[gpr::RSI], core.regs[gpr::RDI]);
        let Some(from) = core.string_span(op, op.seg, rsi, bytes, false) else {
            return Ok(0);
        };
        let Some(to) = core.string_span(op, seg::ES, rdi, bytes, true) else {
            return Ok(0);
        };
        let large = count.saturating_mul(T::BYTES) >= LARGE;
        let done = core.copy_span(to, from, bytes, T::BYTES, large)?;
        if done == 0 {
            // Not even the upper halves of the registers change.
            return Ok(0);
        }
        core.advance(op, gpr::RSI, done);
        core.advance(op, gpr::RDI, done);
        Ok(done / T::BYTES)
    }

    fn once<T: Int>(core: &mut Core, op: &Op) -> Result<(), Trap> {
        let from = core.string_source(op, T::BYTES)?;
        let to = core.string_target(op, T::BYTES, true)?;
        let value: T = core.load(from)?;
        core.store(to, value)?;
        let step = core.string_step(T::BYTES);
        core.advance(op, gpr::RSI, step);
        core.advance(op, gpr::RDI, step);
        Ok(())
    }
}

impl Iteration for Fill {
    fn many<T: Int>(core: &mut Core, op: &Op, count: u64) -> Result<u64, Trap> {
        let Some(bytes) = core.bytes_at_once(count, T::BYTES) else {
            return Ok(0);
        };
        let rdi = core.regs[gpr::RDI];
        let Some(to) = core.string_span(op, seg::ES, rdi, bytes, true) else {
            return Ok(0);
        };
        let done = core.fill_span(to, core.regs[gpr::RAX], T::BYTES, bytes)?;
        if done == 0 {
            return Ok(0);
        }
        core.advance(op, gpr::RDI, done);
        Ok(done / T::BYTES)
    }

    fn once<T: Int>(core: &mut Core, op: &Op) -> Result<(), Trap> {
        let to = core.string_target(op, T::BYTES, true)?;
        let value: T = core.reg(gpr::RAX as u8);
        core.store(to, value)?;
        let step = core.string_step(T::BYTES);
        core.advance(op, gpr::RDI, step);
        Ok(())
    }
}

impl Iteration for Fetch {
    fn once<T: Int>(core: &mut Core, op: &Op) -> Result<(), Trap> {
        let from = core.string_source(op, T::BYTES)?;
        let value: T = core.load(from)?;
        core.set_reg(gpr::RAX as u8, value);
        let step = core.string_step(T::BYTES);
        core.advance(op, gpr::RSI, step);
        Ok(())
    }
}

impl Iteration for Compare {
    const COMPARES: bool = true;

    fn once<T: Int>(core: &mut Core, op: &Op) -> Result<(), Trap> {
        let first = core.string_source(op, T::BYTES)?;
        let second = core.string_target(op, T::BYTES, false)?;
        let a: T = core.load(first)?;
        let b: T = core.load(second)?;
        Cmp::flags(&mut core.flags, a, b, a.sub(b));
        let step = core.string_step(T::BYTES);
        core.advance(op, gpr::RSI, step);
        core.advance(op, gpr::RDI, step);
        Ok(())
    }
}

impl Iteration for Search {
    const COMPARES: bool = true;

    fn once<T: Int>(core: &mut Core, op: &Op) -> Result<(), Trap> {
        let place = core.string_target(op, T::BYTES, false)?;
        let b: T = core.load(place)?;
        let a: T = core.reg(gpr::RAX as u8);
        Cmp::flags(&mut core.flags, a, b, a.sub(b));
        let step = core.string_step(T::BYTES);
        core.advance(op, gpr::RDI, step);
        Ok(())
    }
}

fn repeat<I: Iteration, T: Int>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    if op.repeat == 0 {
        return I::once::<T>(core, op);
    }
    let mut left = POLL;
    loop {
        let count = core.repeat_count(op);
        if count == 0 {
            return Ok(());
        }
        let together = if core.single() {
            0
        } else {
            I::many::<T>(core, op, count)?
        };
        if together == 0 {
            I::once::<T>(core, op)?;
            core.advance(op, gpr::RCX, u64::MAX);
        } else {
            core.advance(op, gpr::RCX, together.wrapping_neg());
        }
        if core.repeat_count(op) == 0 {
            return Ok(());
        }
        if I::COMPARES && core.flags.zf() != (op.repeat == 1) {
            return Ok(());
        }
        left -= 1;
        let poll = left == 0 || together != 0;
        if left == 0 {
            left = POLL;
        }
        if core.stop || core.single() || (poll && core.line.asked()) {
            return Err(Trap::Again);
        }
    }
}
