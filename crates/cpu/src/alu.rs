//! Addition, subtraction, logic and comparison as functions over values.

use crate::flags::Flags;
use crate::int::Int;

/// A binary operation and the flags it leaves.
pub(crate) trait Binary {
    /// Whether the result is stored.
    const STORES: bool = true;
    /// Whether the carry flag is an input.
    const TAKES_CARRY: bool = false;

    /// The result.
    fn value<T: Int>(a: T, b: T, carry: bool) -> T;
    /// The flags, given the operands and the result.
    fn flags<T: Int>(flags: &mut Flags, a: T, b: T, result: T);
}

/// The carry out of each bit of `a + b (+ carry) = sum`.
#[inline(always)]
pub(crate) fn carries<T: Int>(a: T, b: T, sum: T) -> T {
    a & b | (a | b) & !sum
}

/// The borrow out of each bit of `a - b (- carry) = difference`.
#[inline(always)]
pub(crate) fn borrows<T: Int>(a: T, b: T, difference: T) -> T {
    !a & b | (!a | b) & difference
}

macro_rules! binary {
    ($(#[$doc:meta])* $name:ident, stores $stores:literal, carry $carry:literal,
     |$a:ident, $b:ident, $c:ident| $value:expr,
     |$flags:ident, $r:ident| $set:expr) => {
        $(#[$doc])*
        pub(crate) struct $name;
        impl Binary for $name {
            const STORES: bool = $stores;
            const TAKES_CARRY: bool = $carry;
            #[inline(always)]
            fn value<T: Int>($a: T, $b: T, $c: bool) -> T {
                $value
            }
            #[inline(always)]
            fn flags<T: Int>($flags: &mut Flags, $a: T, $b: T, $r: T) {
                $set
            }
        }
    };
}

binary!(
    /// ADD.
    Add, stores true, carry false,
    |a, b, _c| a.add(b),
    |flags, r| flags.set_add(r, carries(a, b, r))
);
binary!(
    /// ADC.
    Adc, stores true, carry true,
    |a, b, c| a.add(b).add(T::truncate(u64::from(c))),
    |flags, r| flags.set_add(r, carries(a, b, r))
);
binary!(
    /// SUB.
    Sub, stores true, carry false,
    |a, b, _c| a.sub(b),
    |flags, r| flags.set_add(r, borrows(a, b, r))
);
binary!(
    /// SBB.
    Sbb, stores true, carry true,
    |a, b, c| a.sub(b).sub(T::truncate(u64::from(c))),
    |flags, r| flags.set_add(r, borrows(a, b, r))
);
binary!(
    /// CMP.
    Cmp, stores false, carry false,
    |a, b, _c| a.sub(b),
    |flags, r| flags.set_add(r, borrows(a, b, r))
);

macro_rules! logic {
    ($(#[$doc:meta])* $name:ident, $stores:literal, |$a:ident, $b:ident| $value:expr) => {
        $(#[$doc])*
        pub(crate) struct $name;
        impl Binary for $name {
            const STORES: bool = $stores;
            #[inline(always)]
            fn value<T: Int>($a: T, $b: T, _carry: bool) -> T {
                $value
            }
            #[inline(always)]
            fn flags<T: Int>(flags: &mut Flags, _a: T, _b: T, result: T) {
                flags.set_logic(result);
            }
        }
    };
}

logic!(
    /// AND.
    And, true, |a, b| a & b
);
logic!(
    /// OR.
    Or, true, |a, b| a | b
);
logic!(
    /// XOR.
    Xor, true, |a, b| a ^ b
);
logic!(
    /// TEST.
    Test, false, |a, b| a & b
);

/// A unary operation and the flags it leaves.
pub(crate) trait Unary {
    /// The result.
    fn value<T: Int>(a: T) -> T;
    /// The flags, given the operand and the result.
    fn flags<T: Int>(flags: &mut Flags, a: T, result: T);
}

/// INC.
pub(crate) struct Inc;
/// DEC.
pub(crate) struct Dec;
/// NEG.
pub(crate) struct Neg;
/// NOT.
pub(crate) struct Not;

impl Unary for Inc {
    #[inline(always)]
    fn value<T: Int>(a: T) -> T {
        a.add(T::ONE)
    }
    #[inline(always)]
    fn flags<T: Int>(flags: &mut Flags, a: T, result: T) {
        let cf = flags.cf();
        flags.set_add(result, carries(a, T::ONE, result));
        flags.set_cf(cf);
    }
}

impl Unary for Dec {
    #[inline(always)]
    fn value<T: Int>(a: T) -> T {
        a.sub(T::ONE)
    }
    #[inline(always)]
    fn flags<T: Int>(flags: &mut Flags, a: T, result: T) {
        let cf = flags.cf();
        flags.set_add(result, borrows(a, T::ONE, result));
        flags.set_cf(cf);
    }
}

impl Unary for Neg {
    #[inline(always)]
    fn value<T: Int>(a: T) -> T {
        T::ZERO.sub(a)
    }
    #[inline(always)]
    fn flags<T: Int>(flags: &mut Flags, a: T, result: T) {
        flags.set_add(result, borrows(T::ZERO, a, result));
    }
}

impl Unary for Not {
    #[inline(always)]
    fn value<T: Int>(a: T) -> T {
        !a
    }
    #[inline(always)]
    fn flags<T: Int>(_flags: &mut Flags, _a: T, _result: T) {}
}

/// A condition of Jcc, SETcc and CMOVcc.
pub(crate) trait Condition {
    /// Whether it holds.
    fn holds(flags: &Flags) -> bool;
}

macro_rules! condition {
    ($($(#[$doc:meta])* $name:ident, $not:ident, |$f:ident| $test:expr;)*) => {$(
        $(#[$doc])*
        pub(crate) struct $name;
        impl Condition for $name {
            #[inline(always)]
            fn holds($f: &Flags) -> bool {
                $test
            }
        }
        #[doc = concat!("Not [`", stringify!($name), "`].")]
        pub(crate) struct $not;
        impl Condition for $not {
            #[inline(always)]
            fn holds($f: &Flags) -> bool {
                !$test
            }
        }
    )*};
}

condition! {
    /// OF.
    Overflow, NoOverflow, |f| f.of();
    /// CF.
    Below, AboveOrEqual, |f| f.cf();
    /// ZF.
    Equal, NotEqual, |f| f.zf();
    /// CF or ZF.
    BelowOrEqual, Above, |f| f.cf() | f.zf();
    /// SF.
    Sign, NoSign, |f| f.sf();
    /// PF.
    Parity, NoParity, |f| f.pf();
    /// SF differs from OF.
    Less, GreaterOrEqual, |f| f.sf() != f.of();
    /// ZF, or SF differs from OF.
    LessOrEqual, Greater, |f| f.zf() | (f.sf() != f.of());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::rflags::{AF, CF, OF, PF, SF, ZF};

    fn flags_of<O: Binary>(a: u8, b: u8, carry: bool) -> u64 {
        let mut flags = Flags::from_image(0);
        let result = O::value(a, b, carry);
        O::flags(&mut flags, a, b, result);
        flags.arithmetic()
    }

    /// The flags of an 8-bit addition, worked out in wider arithmetic.
    fn expected(a: u8, b: u8, carry: bool, subtract: bool) -> u64 {
        let c = i32::from(carry);
        let op = |x: i32, y: i32| if subtract { x - y - c } else { x + y + c };
        let wide = op(i32::from(a), i32::from(b));
        let signed = op(i32::from(a as i8), i32::from(b as i8));
        let low = op(i32::from(a & 15), i32::from(b & 15));
        let r = wide as u8;
        let flag = |on: bool, bit: u64| if on { bit } else { 0 };
        flag(!(0..=255).contains(&wide), CF)
            | flag(r.count_ones().is_multiple_of(2), PF)
            | flag(!(0..=15).contains(&low), AF)
            | flag(r == 0, ZF)
            | flag(r >= 128, SF)
            | flag(!(-128..=127).contains(&signed), OF)
    }

    #[test]
    fn flags_of_every_byte_addition_and_subtraction_are_right() {
        for a in 0..=255 {
            for b in 0..=255 {
                assert_eq!(flags_of::<Add>(a, b, false), expected(a, b, false, false));
                assert_eq!(flags_of::<Adc>(a, b, true), expected(a, b, true, false));
                assert_eq!(flags_of::<Sub>(a, b, false), expected(a, b, false, true));
                assert_eq!(flags_of::<Sbb>(a, b, true), expected(a, b, true, true));
            }
        }
    }

    #[test]
    fn increment_keeps_the_carry() {
        for carry in [0, CF] {
            let mut flags = Flags::from_image(carry);
            Inc::flags(&mut flags, 0x7fff_ffffu32, Inc::value(0x7fff_ffffu32));
            assert_eq!(flags.arithmetic(), carry | PF | AF | SF | OF);
        }
    }
}
