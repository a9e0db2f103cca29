//! Vector registers and memory operands, in the legacy and in the VEX encoding.
//!
//! What an instruction computes is written once, as a function over 128 bits. The VEX encoding of
//! the same instruction has its first source apart from its destination, clears the register above
//! what it writes, asks for no alignment, and may work on two lanes of 128 bits at once: that is in
//! the [`Shape`] here, which macros choose by the form of an instruction.

use crate::core_state::Core;
use crate::int::Int;
use crate::op::{Address, Mem, Op, Read, Segmented};
use crate::trap::Trap;
use std::array::from_fn;
use std::marker::PhantomData;

/// 128 bits: an XMM register.
pub(super) type One = [u128; 1];
/// 256 bits: a YMM register, its lower lane first.
pub(super) type Two = [u128; 2];

/// Lanes of 128 bits.
pub(super) trait Lanes: Copy {
    /// Bytes.
    const BYTES: u64;

    /// The lowest lane.
    fn low(self) -> u128;
    /// What `f` makes of each lane.
    fn map(self, f: impl Fn(u128) -> u128) -> Self;
    /// What `f` makes of each lane of both.
    fn zip(self, other: Self, f: impl Fn(u128, u128) -> u128) -> Self;
    /// As [`Lanes::zip`], with the number of the lane.
    fn zip_numbered(self, other: Self, f: impl Fn(u32, u128, u128) -> u128) -> Self;
    /// What `f` makes of each lane of all three.
    fn zip3(self, b: Self, c: Self, f: impl Fn(u128, u128, u128) -> u128) -> Self;
    /// Folds what `f` makes of each lane of both.
    #[inline(always)]
    fn fold<R>(self, other: Self, first: R, f: impl Fn(R, u128, u128) -> R) -> R {
        self.fold3(other, other, first, |all, a, b, _| f(all, a, b))
    }
    /// As [`Lanes::fold`], of all three.
    fn fold3<R>(self, b: Self, c: Self, first: R, f: impl Fn(R, u128, u128, u128) -> R) -> R;
    /// The lanes of a register.
    fn get(core: &Core, register: u8) -> Self;
    /// Replaces the lanes of a register; those above keep their value.
    fn put(self, core: &mut Core, register: u8);
    /// Reads memory anywhere.
    fn load(core: &mut Core, linear: u64) -> Result<Self, Trap>;
    /// Writes memory anywhere: all of it or nothing.
    fn store(self, core: &mut Core, linear: u64) -> Result<(), Trap>;

    /// Replaces the lanes of a register and clears those above.
    #[inline(always)]
    fn put_cleared(self, core: &mut Core, register: u8) {
        core.vectors.ymm_high[usize::from(register & 15)] = 0;
        self.put(core, register);
    }
}

impl<const N: usize> Lanes for [u128; N] {
    const BYTES: u64 = 16 * N as u64;

    #[inline(always)]
    fn low(self) -> u128 {
        self[0]
    }

    #[inline(always)]
    fn map(self, f: impl Fn(u128) -> u128) -> Self {
        from_fn(|i| f(self[i]))
    }

    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(u128, u128) -> u128) -> Self {
        from_fn(|i| f(self[i], other[i]))
    }

    #[inline(always)]
    fn zip_numbered(self, other: Self, f: impl Fn(u32, u128, u128) -> u128) -> Self {
        from_fn(|i| f(i as u32, self[i], other[i]))
    }

    #[inline(always)]
    fn zip3(self, b: Self, c: Self, f: impl Fn(u128, u128, u128) -> u128) -> Self {
        from_fn(|i| f(self[i], b[i], c[i]))
    }

    #[inline(always)]
    fn fold3<R>(self, b: Self, c: Self, first: R, f: impl Fn(R, u128, u128, u128) -> R) -> R {
        (0..N).fold(first, |all, i| f(all, self[i], b[i], c[i]))
    }

    #[inline(always)]
    fn get(core: &Core, register: u8) -> Self {
        let register = usize::from(register & 15);
        from_fn(|i| match i {
            0 => core.vectors.xmm[register],
            _ => core.vectors.ymm_high[register],
        })
    }

    #[inline(always)]
    fn put(self, core: &mut Core, register: u8) {
        let register = usize::from(register & 15);
        for (i, lane) in self.into_iter().enumerate() {
            match i {
                0 => core.vectors.xmm[register] = lane,
                _ => core.vectors.ymm_high[register] = lane,
            }
        }
    }

    #[inline(always)]
    fn load(core: &mut Core, linear: u64) -> Result<Self, Trap> {
        let mut lanes = [0; N];
        for (at, lane) in (0u64..).step_by(16).zip(&mut lanes) {
            *lane = core.load(linear.wrapping_add(at))?;
        }
        Ok(lanes)
    }

    #[inline(always)]
    fn store(self, core: &mut Core, linear: u64) -> Result<(), Trap> {
        if N > 1 && linear & (Self::BYTES - 1) != 0 {
            // The lanes may lie in different pages or sub-pages.
            core.touch_write(linear, Self::BYTES)?;
        }
        for (at, lane) in (0u64..).step_by(16).zip(self) {
            core.store(linear.wrapping_add(at), lane)?;
        }
        Ok(())
    }
}

impl Core {
    /// Reads an XMM register.
    #[inline(always)]
    pub(super) fn xmm(&self, register: u8) -> u128 {
        One::get(self, register).low()
    }

    /// Writes an XMM register; the rest of the YMM register keeps its value.
    #[inline(always)]
    pub(super) fn set_xmm(&mut self, register: u8, value: u128) {
        [value].put(self, register);
    }

    /// #GP(0) unless an operand lies on a boundary of its size (SDM Vol. 1, "Memory Alignment
    /// Requirement" of SSE: everything but the moves that are called unaligned, and the string
    /// comparisons).
    #[inline(always)]
    pub(super) fn require_alignment(&mut self, linear: u64, bytes: u64) -> Result<(), Trap> {
        if linear & (bytes - 1) == 0 {
            Ok(())
        } else {
            Err(self.general_protection(0))
        }
    }
}

/// A source operand. Narrow ones are zero-extended.
pub(super) trait Source {
    /// Its lanes.
    type Value: Lanes;
    /// Whether the operand is a register, of which the upper lanes are there too.
    const IS_REGISTER: bool = false;
    /// The same operand by the way that serves every address, for code that is seldom executed.
    type General: Source<Value = Self::Value>;

    /// Its value.
    fn read(core: &mut Core, op: &Op) -> Result<Self::Value, Trap>;
}

/// A kind of memory operand that the VEX encoding has in another way.
pub(super) trait Memory {
    /// The same operand in the VEX encoding.
    type Vex: Source<Value = One>;
    /// Twice as many bytes of memory.
    type Twice: Source<Value = One>;
    /// Bits of it.
    const BITS: u32;
}

/// The vector register that is the second operand.
pub(super) struct VectorSrc<V>(PhantomData<V>);
/// The vector register that is the third operand.
pub(super) struct VectorAux<V>(PhantomData<V>);
/// 16 or 32 bytes of memory that must be aligned.
pub(super) struct Aligned<A, V = One>(PhantomData<(A, V)>);
/// 16 or 32 bytes of memory anywhere.
pub(super) struct Unaligned<A, V = One>(PhantomData<(A, V)>);
/// 8 bytes of memory.
pub(super) struct Low64<A>(PhantomData<A>);
/// 4 bytes of memory.
pub(super) struct Low32<A>(PhantomData<A>);
/// 2 bytes of memory.
pub(super) struct Low16<A>(PhantomData<A>);
/// 1 byte of memory.
pub(super) struct Low8<A>(PhantomData<A>);

macro_rules! vector_register {
    ($name:ident $field:ident) => {
        impl<V: Lanes> Source for $name<V> {
            type Value = V;
            type General = Self;
            const IS_REGISTER: bool = true;

            #[inline(always)]
            fn read(core: &mut Core, op: &Op) -> Result<V, Trap> {
                Ok(V::get(core, op.$field))
            }
        }
    };
}
vector_register!(VectorSrc src);
vector_register!(VectorAux aux);

impl<A: Address, V: Lanes> Source for Aligned<A, V> {
    type Value = V;
    type General = Aligned<Segmented, V>;

    #[inline(always)]
    fn read(core: &mut Core, op: &Op) -> Result<V, Trap> {
        let linear = A::for_read(core, op, V::BYTES)?;
        core.require_alignment(linear, V::BYTES)?;
        V::load(core, linear)
    }
}

impl<A: Address, V: Lanes> Source for Unaligned<A, V> {
    type Value = V;
    type General = Unaligned<Segmented, V>;

    #[inline(always)]
    fn read(core: &mut Core, op: &Op) -> Result<V, Trap> {
        let linear = A::for_read(core, op, V::BYTES)?;
        V::load(core, linear)
    }
}

impl<A: Address> Memory for Aligned<A> {
    type Vex = Unaligned<A>;
    type Twice = Unaligned<A>;
    const BITS: u32 = 128;
}

impl<A: Address> Memory for Unaligned<A> {
    type Vex = Self;
    type Twice = Self;
    const BITS: u32 = 128;
}

macro_rules! low {
    ($($name:ident $type:ident $twice:ident),*) => { $(
        impl<A: Address> Source for $name<A> {
            type Value = One;
            type General = $name<Segmented>;

            #[inline(always)]
            fn read(core: &mut Core, op: &Op) -> Result<One, Trap> {
                Mem::<A>::read::<$type>(core, op).map(|value| [value.into()])
            }
        }

        impl<A: Address> Memory for $name<A> {
            type Vex = Self;
            type Twice = $twice<A>;
            const BITS: u32 = $type::BITS;
        }
    )* };
}
low!(Low64 u64 Unaligned, Low32 u32 Low64, Low16 u16 Low32, Low8 u8 Low16);

impl<A: Address, V: Lanes> Aligned<A, V> {
    /// Writes an aligned memory operand.
    #[inline(always)]
    pub(super) fn write(core: &mut Core, op: &Op, value: V) -> Result<(), Trap> {
        let linear = A::for_write(core, op, V::BYTES)?;
        core.require_alignment(linear, V::BYTES)?;
        value.store(core, linear)
    }
}

impl<A: Address, V: Lanes> Unaligned<A, V> {
    /// Writes a memory operand.
    #[inline(always)]
    pub(super) fn write(core: &mut Core, op: &Op, value: V) -> Result<(), Trap> {
        let linear = A::for_write(core, op, V::BYTES)?;
        value.store(core, linear)
    }
}

/// A general register as a source: the second operand or the third.
pub(super) struct General<R, T>(PhantomData<(R, T)>);

impl<R: Read, T: Int> Source for General<R, T> {
    type Value = One;
    type General = Self;

    #[inline(always)]
    fn read(core: &mut Core, op: &Op) -> Result<One, Trap> {
        Ok([u128::from(R::read::<T>(core, op)?.zero_extend())])
    }
}

/// Where a vector instruction has its operands.
pub(super) trait Shape {
    /// The lanes that it works on.
    type Value: Lanes;
    /// The same by the way that serves every address, for code that is seldom executed.
    type General: Shape<Value = Self::Value>;
    /// Whether the second source is a register, of which the upper lanes are there too.
    const IS_REGISTER: bool;

    /// The first source.
    fn first(core: &Core, op: &Op) -> Self::Value;
    /// The second source, which may be memory.
    fn second(core: &mut Core, op: &Op) -> Result<Self::Value, Trap>;
    /// Replaces the destination.
    fn store(core: &mut Core, op: &Op, value: Self::Value);
}

/// The destination is the first source, and keeps what is above it.
pub(super) struct Legacy<S>(PhantomData<S>);
/// The destination is apart from both sources, and what is above it is cleared.
pub(super) struct Vex<S>(PhantomData<S>);

impl<S: Source> Shape for Legacy<S> {
    type Value = S::Value;
    type General = Legacy<S::General>;
    const IS_REGISTER: bool = S::IS_REGISTER;

    #[inline(always)]
    fn first(core: &Core, op: &Op) -> S::Value {
        S::Value::get(core, op.dst)
    }
    #[inline(always)]
    fn second(core: &mut Core, op: &Op) -> Result<S::Value, Trap> {
        S::read(core, op)
    }
    #[inline(always)]
    fn store(core: &mut Core, op: &Op, value: S::Value) {
        value.put(core, op.dst);
    }
}

impl<S: Source> Shape for Vex<S> {
    type Value = S::Value;
    type General = Vex<S::General>;
    const IS_REGISTER: bool = S::IS_REGISTER;

    #[inline(always)]
    fn first(core: &Core, op: &Op) -> S::Value {
        S::Value::get(core, op.src)
    }
    #[inline(always)]
    fn second(core: &mut Core, op: &Op) -> Result<S::Value, Trap> {
        S::read(core, op)
    }
    #[inline(always)]
    fn store(core: &mut Core, op: &Op, value: S::Value) {
        value.put_cleared(core, op.dst);
    }
}

/// Turns the last source operand, a vector register or memory of the kind named, into a shape and
/// the expression into a handler. Says first which sources there are:
///
/// - `binary`: two, of which the legacy encoding has the first in the destination;
/// - `unary`: one, beside a destination that is only written;
/// - `pair`: two, and no destination;
/// - `mmx`: one or two, on MMX registers.
macro_rules! by_shape {
    (mmx, $form:expr, $memory:ident, $x:ident => $handler:expr) => {
        match $form.kinds[1] {
            $crate::form::Kind::Mm => {
                type $x = $crate::simd::mmx::Mmx<$crate::simd::mmx::MmxSrc>;
                $handler as $crate::op::Handler
            }
            $crate::form::Kind::Mem => {
                type $x = $crate::simd::mmx::Mmx<
                    $crate::simd::operand::$memory<$crate::op::Segmented>,
                >;
                $handler as $crate::op::Handler
            }
            _ => return None,
        }
    };
    (binary, $form:expr, $memory:ident, $x:ident => $handler:expr) => {
        if $form.is_vex {
            $crate::simd::operand::by_shape!(
                @vex 2, Vex, VectorAux, $form, $memory, $x => $handler
            )
        } else {
            $crate::simd::operand::by_shape!(@legacy $form, $memory, $x => $handler)
        }
    };
    (unary, $form:expr, $memory:ident, $x:ident => $handler:expr) => {
        if $form.is_vex {
            $crate::simd::operand::by_shape!(
                @vex 1, Vex, VectorSrc, $form, $memory, $x => $handler
            )
        } else {
            $crate::simd::operand::by_shape!(@legacy $form, $memory, $x => $handler)
        }
    };
    (pair, $form:expr, $memory:ident, $x:ident => $handler:expr) => {
        if $form.is_vex {
            $crate::simd::operand::by_shape!(
                @vex 1, Legacy, VectorSrc, $form, $memory, $x => $handler
            )
        } else {
            $crate::simd::operand::by_shape!(@legacy $form, $memory, $x => $handler)
        }
    };
    (@legacy $form:expr, $memory:ident, $x:ident => $handler:expr) => {
        match $form.kinds[1] {
            $crate::form::Kind::Xmm => {
                type $x = $crate::simd::operand::Legacy<
                    $crate::simd::operand::VectorSrc<$crate::simd::operand::One>,
                >;
                $handler as $crate::op::Handler
            }
            $crate::form::Kind::Mem => $crate::form::by_address!($form, A => ({
                type $x = $crate::simd::operand::Legacy<$crate::simd::operand::$memory<A>>;
                $handler
            })),
            _ => return None,
        }
    };
    (@vex $at:literal, $shape:ident, $register:ident, $form:expr, $memory:ident, $x:ident
        => $handler:expr) => {
        match ($form.kinds[$at], $form.is_wide()) {
            ($crate::form::Kind::Xmm, false) => {
                type $x = $crate::simd::operand::$shape<
                    $crate::simd::operand::$register<$crate::simd::operand::One>,
                >;
                $handler as $crate::op::Handler
            }
            ($crate::form::Kind::Ymm, true) => {
                type $x = $crate::simd::operand::$shape<
                    $crate::simd::operand::$register<$crate::simd::operand::Two>,
                >;
                $handler as $crate::op::Handler
            }
            ($crate::form::Kind::Mem, false) => {
                type $x = $crate::simd::operand::$shape<
                    <$crate::simd::operand::$memory<$crate::op::Segmented>
                        as $crate::simd::operand::Memory>::Vex,
                >;
                $handler as $crate::op::Handler
            }
            ($crate::form::Kind::Mem, true) => {
                type $x = $crate::simd::operand::$shape<
                    $crate::simd::operand::Unaligned<
                        $crate::op::Segmented,
                        $crate::simd::operand::Two,
                    >,
                >;
                $handler as $crate::op::Handler
            }
            _ => return None,
        }
    };
}
pub(super) use by_shape;

/// A handler that gives to the destination what a function makes of each lane of both sources.
macro_rules! binary {
    ($form:expr, $memory:ident, $value:expr) => {
        $crate::simd::operand::binary!(@ binary, $form, $memory, $value)
    };
    (@ $sources:ident, $form:expr, $memory:ident, $value:expr) => {
        $crate::simd::operand::by_shape!($sources, $form, $memory, X => |core, op| {
            use $crate::simd::operand::{Lanes, Shape};
            let b = <X as Shape>::second(core, op)?;
            let result = Lanes::zip(<X as Shape>::first(core, op), b, $value);
            <X as Shape>::store(core, op, result);
            Ok(())
        })
    };
}
pub(super) use binary;

/// As [`binary`], of aligned memory or MMX registers and memory of 64 bits. An instruction that
/// works across lanes has a function of its own for halves of a lane; one that reads less memory
/// then says how much.
macro_rules! packed {
    ($form:expr, $value:expr) => {
        $crate::simd::operand::packed!($form, $value, Low64, $value)
    };
    ($form:expr, $value:expr, $memory:ident, $half:expr) => {
        if $form.kinds[0] == $crate::form::Kind::Mm {
            $crate::simd::operand::binary!(@ mmx, $form, $memory, $half)
        } else {
            $crate::simd::operand::binary!($form, Aligned, $value)
        }
    };
}
pub(super) use packed;

/// As [`packed`], for a function that makes one result of all lanes of the first source and then of
/// all lanes of the second.
macro_rules! packed_in_order {
    ($form:expr, $value:expr) => {
        $crate::simd::operand::packed!($form, $value, Low64, |a, b| {
            $value($crate::simd::mmx::joined(a, b), 0)
        })
    };
}
pub(super) use packed_in_order;

/// A handler that gives to the destination what a function makes of each lane of the only source.
macro_rules! unary {
    ($form:expr, $memory:ident, $value:expr) => {
        $crate::simd::operand::unary!(@ unary, $form, $memory, $value)
    };
    (@ $sources:ident, $form:expr, $memory:ident, $value:expr) => {
        $crate::simd::operand::by_shape!($sources, $form, $memory, X => |core, op| {
            use $crate::simd::operand::{Lanes, Shape};
            let b = <X as Shape>::second(core, op)?;
            <X as Shape>::store(core, op, Lanes::map(b, $value));
            Ok(())
        })
    };
}
pub(super) use unary;

/// As [`unary`], of aligned memory or MMX registers and memory of 64 bits.
macro_rules! packed_unary {
    ($form:expr, $value:expr) => {
        if $form.kinds[0] == $crate::form::Kind::Mm {
            $crate::simd::operand::unary!(@ mmx, $form, Low64, $value)
        } else {
            $crate::simd::operand::unary!($form, Aligned, $value)
        }
    };
}
pub(super) use packed_unary;

/// As [`binary`], with the low byte of the immediate as the function's third argument. If an upper
/// lane has bits of the immediate of its own, how many there are for each is said last.
macro_rules! binary_immediate {
    ($form:expr, $memory:ident, $value:expr) => {
        $crate::simd::operand::binary_immediate!($form, $memory, $value, 0)
    };
    ($form:expr, $memory:ident, $value:expr, $bits:literal) => {
        $crate::simd::operand::binary_immediate!(@ binary, $form, $memory, $value, $bits)
    };
    (@ $sources:ident, $form:expr, $memory:ident, $value:expr, $bits:literal) => {
        $crate::simd::operand::by_shape!($sources, $form, $memory, X => |core, op| {
            use $crate::simd::operand::{Lanes, Shape};
            let b = <X as Shape>::second(core, op)?;
            let a = <X as Shape>::first(core, op);
            let result = Lanes::zip_numbered(a, b, |i, a, b| {
                $value(a, b, (op.imm as u8) >> ($bits * i))
            });
            <X as Shape>::store(core, op, result);
            Ok(())
        })
    };
}
pub(super) use binary_immediate;

/// As [`unary`], with the low byte of the immediate as the function's second argument; of the upper
/// lane's own bits as for [`binary_immediate`].
macro_rules! unary_immediate {
    ($form:expr, $memory:ident, $value:expr) => {
        $crate::simd::operand::unary_immediate!($form, $memory, $value, 0)
    };
    ($form:expr, $memory:ident, $value:expr, $bits:literal) => {
        $crate::simd::operand::unary_immediate!(@ unary, $form, $memory, $value, $bits)
    };
    (@ $sources:ident, $form:expr, $memory:ident, $value:expr, $bits:literal) => {
        $crate::simd::operand::by_shape!($sources, $form, $memory, X => |core, op| {
            use $crate::simd::operand::{Lanes, Shape};
            let b = <X as Shape>::second(core, op)?;
            let result = Lanes::zip_numbered(b, b, |i, b, _| {
                $value(b, (op.imm as u8) >> ($bits * i))
            });
            <X as Shape>::store(core, op, result);
            Ok(())
        })
    };
}
pub(super) use unary_immediate;
