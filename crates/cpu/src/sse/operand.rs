//! Vector registers and 16-byte memory operands.

use crate::core_state::Core;
use crate::int::Int;
use crate::op::{Address, Mem, Op, Read, Segmented};
use crate::trap::Trap;
use std::marker::PhantomData;

impl Core {
    /// Reads a vector register.
    #[inline(always)]
    pub(super) fn xmm(&self, register: u8) -> u128 {
        self.vectors.xmm[usize::from(register & 15)]
    }

    /// Writes a vector register.
    #[inline(always)]
    pub(super) fn set_xmm(&mut self, register: u8, value: u128) {
        self.vectors.xmm[usize::from(register & 15)] = value;
    }

    /// #GP(0) unless a 16-byte operand lies on a 16-byte boundary (SDM Vol. 1, "Memory Alignment
    /// Requirement" of SSE: everything but the moves that are called unaligned, and the string
    /// comparisons).
    #[inline(always)]
    fn require_alignment(&mut self, linear: u64) -> Result<(), Trap> {
        if linear & 15 == 0 {
            Ok(())
        } else {
            Err(self.general_protection(0))
        }
    }
}

/// A source operand. Narrow ones are zero-extended.
pub(super) trait Source {
    /// Whether the operand is a register, of which the upper lanes are there too.
    const IS_REGISTER: bool = false;

    /// The same operand by the way that serves every address, for code that is seldom executed.
    type General: Source;

    /// Its value.
    fn read(core: &mut Core, op: &Op) -> Result<u128, Trap>;
}

/// The vector register that is the second operand.
pub(super) struct XmmSrc;
/// 16 bytes of memory that must be aligned.
pub(super) struct Aligned<A>(PhantomData<A>);
/// 16 bytes of memory anywhere.
pub(super) struct Unaligned<A>(PhantomData<A>);
/// 8 bytes of memory.
pub(super) struct Low64<A>(PhantomData<A>);
/// 4 bytes of memory.
pub(super) struct Low32<A>(PhantomData<A>);
/// 2 bytes of memory.
pub(super) struct Low16<A>(PhantomData<A>);

impl Source for XmmSrc {
    const IS_REGISTER: bool = true;
    type General = Self;

    #[inline(always)]
    fn read(core: &mut Core, op: &Op) -> Result<u128, Trap> {
        Ok(core.xmm(op.src))
    }
}

impl<A: Address> Source for Aligned<A> {
    type General = Aligned<Segmented>;

    #[inline(always)]
    fn read(core: &mut Core, op: &Op) -> Result<u128, Trap> {
        let linear = A::for_read(core, op, 16)?;
        core.require_alignment(linear)?;
        core.load(linear)
    }
}

impl<A: Address> Source for Unaligned<A> {
    type General = Unaligned<Segmented>;

    #[inline(always)]
    fn read(core: &mut Core, op: &Op) -> Result<u128, Trap> {
        let linear = A::for_read(core, op, 16)?;
        core.load(linear)
    }
}

macro_rules! low {
    ($($name:ident $type:ty),*) => { $(
        impl<A: Address> Source for $name<A> {
            type General = $name<Segmented>;

            #[inline(always)]
            fn read(core: &mut Core, op: &Op) -> Result<u128, Trap> {
                Mem::<A>::read::<$type>(core, op).map(u128::from)
            }
        }
    )* };
}
low!(Low64 u64, Low32 u32, Low16 u16);

impl<A: Address> Aligned<A> {
    /// Writes 16 bytes to an aligned memory operand.
    #[inline(always)]
    pub(super) fn write(core: &mut Core, op: &Op, value: u128) -> Result<(), Trap> {
        let linear = A::for_write(core, op, 16)?;
        core.require_alignment(linear)?;
        core.store(linear, value)
    }
}

impl<A: Address> Unaligned<A> {
    /// Writes 16 bytes to a memory operand.
    #[inline(always)]
    pub(super) fn write(core: &mut Core, op: &Op, value: u128) -> Result<(), Trap> {
        let linear = A::for_write(core, op, 16)?;
        core.store(linear, value)
    }
}

/// The general register that is the second operand.
pub(super) struct General<T>(PhantomData<T>);

impl<T: Int> Source for General<T> {
    type General = Self;

    #[inline(always)]
    fn read(core: &mut Core, op: &Op) -> Result<u128, Trap> {
        Ok(u128::from(core.reg::<T>(op.src).zero_extend()))
    }
}

/// Turns the second operand, a vector register or memory of the kind named, into a type and the
/// expression into a handler.
macro_rules! by_source {
    ($form:expr, $memory:ident, $s:ident => $handler:expr) => {
        match $form.kinds[1] {
            $crate::form::Kind::Xmm => {
                type $s = $crate::sse::operand::XmmSrc;
                $handler as $crate::op::Handler
            }
            $crate::form::Kind::Mem => $crate::form::by_address!($form, A => ({
                type $s = $crate::sse::operand::$memory<A>;
                $handler
            })),
            _ => return None,
        }
    };
}
pub(super) use by_source;

/// A handler that replaces the first operand, a vector register, by a function of it and the
/// second operand.
macro_rules! binary {
    ($form:expr, $memory:ident, $value:expr) => {
        $crate::sse::operand::by_source!($form, $memory, S => |core, op| {
            let b = <S as $crate::sse::operand::Source>::read(core, op)?;
            let result = $value(core.xmm(op.dst), b);
            core.set_xmm(op.dst, result);
            Ok(())
        })
    };
}
pub(super) use binary;

/// A handler that replaces the first operand, a vector register, by a function of the second.
macro_rules! unary {
    ($form:expr, $memory:ident, $value:expr) => {
        $crate::sse::operand::by_source!($form, $memory, S => |core, op| {
            let b = <S as $crate::sse::operand::Source>::read(core, op)?;
            core.set_xmm(op.dst, $value(b));
            Ok(())
        })
    };
}
pub(super) use unary;

/// As [`binary`], with the low byte of the immediate as the function's third argument.
macro_rules! binary_immediate {
    ($form:expr, $memory:ident, $value:expr) => {
        $crate::sse::operand::by_source!($form, $memory, S => |core, op| {
            let b = <S as $crate::sse::operand::Source>::read(core, op)?;
            let result = $value(core.xmm(op.dst), b, op.imm as u8);
            core.set_xmm(op.dst, result);
            Ok(())
        })
    };
}
pub(super) use binary_immediate;

/// As [`unary`], with the low byte of the immediate as the function's second argument.
macro_rules! unary_immediate {
    ($form:expr, $memory:ident, $value:expr) => {
        $crate::sse::operand::by_source!($form, $memory, S => |core, op| {
            let b = <S as $crate::sse::operand::Source>::read(core, op)?;
            core.set_xmm(op.dst, $value(b, op.imm as u8));
            Ok(())
        })
    };
}
pub(super) use unary_immediate;
