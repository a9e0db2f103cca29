//! Multiplication and division.

use crate::core_state::Core;
use crate::form::{Form, Kind, by_address, by_width};
use crate::int::Int;
use crate::op::{Dst, HIGH_BYTE, Handler, Mem, Op, Read, Segmented, Src};
use crate::state::gpr;
use crate::trap::{Exception, Trap, vector};
use iced_x86::Mnemonic as M;

const RAX: u8 = gpr::RAX as u8;
const RDX: u8 = gpr::RDX as u8;

/// The handler for an instruction of this subject.
pub(crate) fn select(form: &Form) -> Option<Handler> {
    let memory = form.has_memory();
    match (form.mnemonic, form.kinds) {
        (M::Mul, _) if memory => by_width!(form, T => Some(multiply::<T, Mem<Segmented>, false>)),
        (M::Mul, _) => by_width!(form, T => Some(multiply::<T, Dst, false>)),
        (M::Imul, [_, Kind::None, ..]) if memory => {
            by_width!(form, T => Some(multiply::<T, Mem<Segmented>, true>))
        }
        (M::Imul, [_, Kind::None, ..]) => by_width!(form, T => Some(multiply::<T, Dst, true>)),
        (M::Imul, [_, _, Kind::None, _]) if memory => {
            by_width!(form, T => Some(by_address!(form, A => multiply_two::<T, Mem<A>>)))
        }
        (M::Imul, [_, _, Kind::None, _]) => by_width!(form, T => Some(multiply_two::<T, Src>)),
        (M::Imul, _) if memory => {
            by_width!(form, T => Some(multiply_three::<T, Mem<Segmented>>))
        }
        (M::Imul, _) => by_width!(form, T => Some(multiply_three::<T, Src>)),
        (M::Mulx, _) => Some(match (form.width, form.kinds[2]) {
            (4, Kind::Mem) => multiply_without_flags::<u32, Mem<Segmented>>,
            (4, _) => multiply_without_flags::<u32, crate::op::Aux>,
            (_, Kind::Mem) => multiply_without_flags::<u64, Mem<Segmented>>,
            (_, _) => multiply_without_flags::<u64, crate::op::Aux>,
        }),
        (M::Div, _) if memory => by_width!(form, T => Some(divide::<T, Mem<Segmented>, false>)),
        (M::Div, _) => by_width!(form, T => Some(divide::<T, Dst, false>)),
        (M::Idiv, _) if memory => by_width!(form, T => Some(divide::<T, Mem<Segmented>, true>)),
        (M::Idiv, _) => by_width!(form, T => Some(divide::<T, Dst, true>)),
        _ => None,
    }
}

/// The low and the high half of a product.
#[inline(always)]
pub(crate) fn product<T: Int>(a: T, b: T, signed: bool) -> (T, T) {
    if T::BITS == 64 {
        let wide = if signed {
            (i128::from(a.sign_extend() as i64) * i128::from(b.sign_extend() as i64)) as u128
        } else {
            u128::from(a.zero_extend()) * u128::from(b.zero_extend())
        };
        (T::truncate(wide as u64), T::truncate((wide >> 64) as u64))
    } else {
        let wide = if signed {
            a.sign_extend().wrapping_mul(b.sign_extend())
        } else {
            a.zero_extend() * b.zero_extend()
        };
        (T::truncate(wide), T::truncate(wide >> T::BITS))
    }
}

/// Whether the high half says more than the low half and its sign.
#[inline(always)]
fn overflows<T: Int>(low: T, high: T, signed: bool) -> bool {
    let expected = if signed && low.sign() {
        !T::ZERO
    } else {
        T::ZERO
    };
    high != expected
}

/// The quotient and remainder of a double-width dividend, or `None` for #DE.
pub(crate) fn quotient<T: Int>(high: T, low: T, divisor: T, signed: bool) -> Option<(T, T)> {
    if divisor == T::ZERO {
        return None;
    }
    if signed {
        let dividend =
            (i128::from(high.sign_extend() as i64) << T::BITS) | i128::from(low.zero_extend());
        let divisor = i128::from(divisor.sign_extend() as i64);
        let quotient = dividend.checked_div(divisor)?;
        let result = T::truncate(quotient as u64);
        if i128::from(result.sign_extend() as i64) != quotient {
            return None;
        }
        Some((result, T::truncate(dividend.wrapping_rem(divisor) as u64)))
    } else if T::BITS == 64 {
        if high >= divisor {
            return None;
        }
        if high == T::ZERO {
            let (low, divisor) = (low.zero_extend(), divisor.zero_extend());
            return Some((T::truncate(low / divisor), T::truncate(low % divisor)));
        }
        let dividend = u128::from(high.zero_extend()) << 64 | u128::from(low.zero_extend());
        let divisor = u128::from(divisor.zero_extend());
        Some((
            T::truncate((dividend / divisor) as u64),
            T::truncate((dividend % divisor) as u64),
        ))
    } else {
        if high >= divisor {
            return None;
        }
        let dividend = high.zero_extend() << T::BITS | low.zero_extend();
        let divisor = divisor.zero_extend();
        Some((
            T::truncate(dividend / divisor),
            T::truncate(dividend % divisor),
        ))
    }
}

/// Reads the double-width register pair: AX for bytes, else DX:AX and its wider kin.
#[inline(always)]
fn pair<T: Int>(core: &Core) -> (T, T) {
    let high = if T::BITS == 8 {
        core.reg(RAX | HIGH_BYTE)
    } else {
        core.reg(RDX)
    };
    (high, core.reg(RAX))
}

#[inline(always)]
fn set_pair<T: Int>(core: &mut Core, high: T, low: T) {
    core.set_reg(RAX, low);
    if T::BITS == 8 {
        core.set_reg(RAX | HIGH_BYTE, high);
    } else {
        core.set_reg(RDX, high);
    }
}

fn multiply<T: Int, S: Read, const SIGNED: bool>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let b: T = S::read(core, op)?;
    let a: T = core.reg(RAX);
    let (low, high) = product(a, b, SIGNED);
    set_pair(core, high, low);
    let overflow = overflows(low, high, SIGNED);
    // SF, ZF and PF are undefined; they follow the low half.
    core.flags.set_result(low, overflow, overflow, false);
    Ok(())
}

fn multiply_two<T: Int, S: Read>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let b: T = S::read(core, op)?;
    let a: T = core.reg(op.dst);
    finish_signed(core, op, a, b)
}

fn multiply_three<T: Int, S: Read>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let a: T = S::read(core, op)?;
    finish_signed(core, op, a, T::truncate(op.imm))
}

#[inline(always)]
fn finish_signed<T: Int>(core: &mut Core, op: &Op, a: T, b: T) -> Result<(), Trap> {
    let (low, high) = product(a, b, true);
    core.set_reg(op.dst, low);
    let overflow = overflows(low, high, true);
    core.flags.set_result(low, overflow, overflow, false);
    Ok(())
}

fn multiply_without_flags<T: Int, S: Read>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let b: T = S::read(core, op)?;
    let a: T = core.reg(RDX);
    let (low, high) = product(a, b, false);
    // The first operand is the high half; it wins if both are the same register.
    core.set_reg(op.src, low);
    core.set_reg(op.dst, high);
    Ok(())
}

fn divide<T: Int, S: Read, const SIGNED: bool>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let divisor: T = S::read(core, op)?;
    let (high, low) = pair::<T>(core);
    match quotient(high, low, divisor, SIGNED) {
        Some((quotient, remainder)) => {
            set_pair(core, remainder, quotient);
            Ok(())
        }
        None => Err(divide_error(core)),
    }
}

/// #DE.
#[cold]
pub(crate) fn divide_error(core: &mut Core) -> Trap {
    core.raise(Exception {
        vector: vector::DE,
        error_code: None,
        payload: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn division_overflow_and_zero_are_refused() {
        assert_eq!(quotient(0u8, 5, 0, false), None);
        assert_eq!(quotient(5u8, 0, 5, false), None);
        assert_eq!(quotient(4u8, 0xff, 5, false), Some((0xff, 4)));
        assert_eq!(
            quotient(0xffff_ffff_ffff_ffffu64, 1 << 63, u64::MAX, true),
            None
        );
        assert_eq!(quotient(1u64 << 63, 0, u64::MAX, true), None);
        assert_eq!(quotient(0xffu8, 0x80, 1, true), Some((0x80, 0)));
        assert_eq!(quotient(0xffu8, 0x80, 0xff, true), None);
        assert_eq!(
            quotient(u32::MAX, (-7i32) as u32, 2, true),
            Some(((-3i32) as u32, u32::MAX))
        );
    }

    #[test]
    fn products_have_both_halves() {
        assert_eq!(product(u64::MAX, u64::MAX, false), (1, u64::MAX - 1));
        assert_eq!(product(u64::MAX, u64::MAX, true), (1, 0));
        assert_eq!(product(0x80u8, 0x80, true), (0, 0x40));
        assert_eq!(product(0x8000_0000u32, 2, false), (0, 1));
    }
}
