//! Shifts and rotates.

use crate::core_state::Core;
use crate::flags::Flags;
use crate::form::{Form, Kind, by_address, by_width};
use crate::int::Int;
use crate::op::{Dst, Handler, Imm, Mem, Op, Place, Read, Segmented, Src};
use crate::state::gpr;
use crate::trap::Trap;
use iced_x86::Mnemonic as M;

/// The handler for an instruction of this subject.
pub(crate) fn select(form: &Form) -> Option<Handler> {
    match form.mnemonic {
        M::Shl | M::Sal => by_width!(form, T => select_shift::<Shl, T>(form)),
        M::Shr => by_width!(form, T => select_shift::<Shr, T>(form)),
        M::Sar => by_width!(form, T => select_shift::<Sar, T>(form)),
        M::Rol => by_width!(form, T => select_shift::<Rol, T>(form)),
        M::Ror => by_width!(form, T => select_shift::<Ror, T>(form)),
        M::Rcl => by_width!(form, T => select_shift::<Rcl, T>(form)),
        M::Rcr => by_width!(form, T => select_shift::<Rcr, T>(form)),
        M::Shld => by_width!(form, T => select_double::<Shld, T>(form)),
        M::Shrd => by_width!(form, T => select_double::<Shrd, T>(form)),
        M::Shlx => Some(select_without_flags::<Shl>(form)),
        M::Shrx => Some(select_without_flags::<Shr>(form)),
        M::Sarx => Some(select_without_flags::<Sar>(form)),
        M::Rorx => Some(match (form.width, form.kinds[1]) {
            (4, Kind::Mem) => rotate_without_flags::<u32, Mem<Segmented>>,
            (4, _) => rotate_without_flags::<u32, Src>,
            (_, Kind::Mem) => rotate_without_flags::<u64, Mem<Segmented>>,
            (_, _) => rotate_without_flags::<u64, Src>,
        }),
        _ => None,
    }
}

/// A shift by a count that is not zero and below 64 (for 64 bits) or 32.
pub(crate) trait Shift {
    /// The result.
    fn value<T: Int>(a: T, count: u32, carry: bool) -> T;
    /// The flags, given operand, count, the carry before and the result.
    fn flags<T: Int>(flags: &mut Flags, a: T, count: u32, result: T);
}

fn bit<T: Int>(value: T, position: u32) -> bool {
    position < T::BITS && value >> position & T::ONE != T::ZERO
}

fn top<T: Int>(value: T) -> bool {
    value.sign()
}

fn below_top<T: Int>(value: T) -> bool {
    bit(value, T::BITS - 2)
}

/// `a << count`, zero if the count reaches the width.
#[inline(always)]
fn left<T: Int>(a: T, count: u32) -> T {
    if count < T::BITS { a << count } else { T::ZERO }
}

#[inline(always)]
fn right<T: Int>(a: T, count: u32) -> T {
    if count < T::BITS { a >> count } else { T::ZERO }
}

/// SHL.
pub(crate) struct Shl;
/// SHR.
pub(crate) struct Shr;
/// SAR.
pub(crate) struct Sar;
/// ROL.
pub(crate) struct Rol;
/// ROR.
pub(crate) struct Ror;
/// RCL.
pub(crate) struct Rcl;
/// RCR.
pub(crate) struct Rcr;

impl Shift for Shl {
    #[inline(always)]
    fn value<T: Int>(a: T, count: u32, _carry: bool) -> T {
        left(a, count)
    }
    #[inline(always)]
    fn flags<T: Int>(flags: &mut Flags, a: T, count: u32, result: T) {
        let cf = count <= T::BITS && bit(a, T::BITS - count);
        flags.set_result(result, cf, top(result) != cf, false);
    }
}

impl Shift for Shr {
    #[inline(always)]
    fn value<T: Int>(a: T, count: u32, _carry: bool) -> T {
        right(a, count)
    }
    #[inline(always)]
    fn flags<T: Int>(flags: &mut Flags, a: T, count: u32, result: T) {
        flags.set_result(
            result,
            bit(a, count - 1),
            top(result) != below_top(result),
            false,
        );
    }
}

impl Shift for Sar {
    #[inline(always)]
    fn value<T: Int>(a: T, count: u32, _carry: bool) -> T {
        T::truncate((a.sign_extend() as i64 >> count.min(63)) as u64)
    }
    #[inline(always)]
    fn flags<T: Int>(flags: &mut Flags, a: T, count: u32, result: T) {
        let cf = (a.sign_extend() as i64) >> (count - 1) & 1 != 0;
        flags.set_result(result, cf, false, false);
    }
}

impl Shift for Rol {
    #[inline(always)]
    fn value<T: Int>(a: T, count: u32, _carry: bool) -> T {
        a.rotate(count % T::BITS)
    }
    #[inline(always)]
    fn flags<T: Int>(flags: &mut Flags, _a: T, _count: u32, result: T) {
        let cf = bit(result, 0);
        flags.set_cf(cf);
        flags.set_of(top(result) != cf);
    }
}

impl Shift for Ror {
    #[inline(always)]
    fn value<T: Int>(a: T, count: u32, _carry: bool) -> T {
        a.rotate((T::BITS - count % T::BITS) % T::BITS)
    }
    #[inline(always)]
    fn flags<T: Int>(flags: &mut Flags, _a: T, _count: u32, result: T) {
        flags.set_cf(top(result));
        flags.set_of(top(result) != below_top(result));
    }
}

impl Shift for Rcl {
    #[inline(always)]
    fn value<T: Int>(a: T, count: u32, carry: bool) -> T {
        let count = count % (T::BITS + 1);
        if count == 0 {
            return a;
        }
        let carry = left(T::truncate(u64::from(carry)), count - 1);
        left(a, count) | carry | right(a, T::BITS + 1 - count)
    }
    #[inline(always)]
    fn flags<T: Int>(flags: &mut Flags, a: T, count: u32, result: T) {
        let count = count % (T::BITS + 1);
        let cf = if count == 0 {
            flags.cf()
        } else {
            bit(a, T::BITS - count)
        };
        flags.set_cf(cf);
        flags.set_of(top(result) != cf);
    }
}

impl Shift for Rcr {
    #[inline(always)]
    fn value<T: Int>(a: T, count: u32, carry: bool) -> T {
        let count = count % (T::BITS + 1);
        if count == 0 {
            return a;
        }
        let carry = left(T::truncate(u64::from(carry)), T::BITS - count);
        right(a, count) | carry | left(a, T::BITS + 1 - count)
    }
    #[inline(always)]
    fn flags<T: Int>(flags: &mut Flags, a: T, count: u32, result: T) {
        let count = count % (T::BITS + 1);
        let cf = if count == 0 {
            flags.cf()
        } else {
            bit(a, count - 1)
        };
        flags.set_cf(cf);
        flags.set_of(top(result) != below_top(result));
    }
}

/// A count as the processor uses it: five bits, or six for 64-bit operands.
#[inline(always)]
fn mask_count<T: Int>(count: u8) -> u32 {
    u32::from(count) & if T::BITS == 64 { 63 } else { 31 }
}

/// The CL register as an operand.
struct Cl;
impl Read for Cl {
    #[inline(always)]
    fn read<T: Int>(core: &mut Core, _op: &Op) -> Result<T, Trap> {
        Ok(core.reg(gpr::RCX as u8))
    }
}

fn select_shift<S: Shift, T: Int>(form: &Form) -> Option<Handler> {
    Some(match (form.kinds[0], form.kinds[1]) {
        (Kind::Reg, Kind::Imm) => shift::<S, T, Dst, Imm>,
        (Kind::Reg, Kind::Reg) => shift::<S, T, Dst, Cl>,
        (Kind::Mem, Kind::Imm) => by_address!(form, A => shift::<S, T, Mem<A>, Imm>),
        (Kind::Mem, Kind::Reg) => shift::<S, T, Mem<Segmented>, Cl>,
        _ => return None,
    })
}

fn shift<S: Shift, T: Int, D: Place, C: Read>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let count = mask_count::<T>(C::read(core, op)?);
    let carry = core.flags.cf();
    // With a count of zero the operand is still written, but no flag changes.
    let (a, result) = D::modify(core, op, |a: T| {
        if count == 0 {
            a
        } else {
            S::value(a, count, carry)
        }
    })?;
    if count != 0 {
        S::flags(&mut core.flags, a, count, result);
    }
    Ok(())
}

/// A double shift by a count that is not zero.
trait DoubleShift {
    fn value<T: Int>(a: T, b: T, count: u32) -> T;
    fn carry<T: Int>(a: T, b: T, count: u32) -> bool;
}

/// SHLD.
struct Shld;
/// SHRD.
struct Shrd;

/// With 16-bit operands and counts above 16 the result is undefined; what processors do is shift
/// the first operand's bits in again behind the second's.
impl DoubleShift for Shld {
    fn value<T: Int>(a: T, b: T, count: u32) -> T {
        if count > T::BITS {
            left(b, count - T::BITS) | right(a, 2 * T::BITS - count)
        } else {
            left(a, count) | right(b, T::BITS - count)
        }
    }
    fn carry<T: Int>(a: T, b: T, count: u32) -> bool {
        if count > T::BITS {
            bit(b, 2 * T::BITS - count)
        } else {
            bit(a, T::BITS - count)
        }
    }
}

impl DoubleShift for Shrd {
    fn value<T: Int>(a: T, b: T, count: u32) -> T {
        if count > T::BITS {
            right(b, count - T::BITS) | left(a, 2 * T::BITS - count)
        } else {
            right(a, count) | left(b, T::BITS - count)
        }
    }
    fn carry<T: Int>(a: T, b: T, count: u32) -> bool {
        if count > T::BITS {
            bit(b, count - T::BITS - 1)
        } else {
            bit(a, count - 1)
        }
    }
}

fn select_double<S: DoubleShift, T: Int>(form: &Form) -> Option<Handler> {
    Some(match (form.kinds[0], form.kinds[2]) {
        (Kind::Reg, Kind::Imm) => double::<S, T, Dst, Imm>,
        (Kind::Reg, _) => double::<S, T, Dst, Cl>,
        (Kind::Mem, Kind::Imm) => double::<S, T, Mem<Segmented>, Imm>,
        (Kind::Mem, _) => double::<S, T, Mem<Segmented>, Cl>,
        _ => return None,
    })
}

fn double<S: DoubleShift, T: Int, D: Place, C: Read>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let count = mask_count::<T>(C::read(core, op)?);
    let b: T = core.reg(op.src);
    let (a, result) = D::modify(
        core,
        op,
        |a: T| if count == 0 { a } else { S::value(a, b, count) },
    )?;
    if count != 0 {
        let cf = S::carry(a, b, count);
        core.flags
            .set_result(result, cf, top(a) != top(result), false);
    }
    Ok(())
}

/// SHLX, SHRX, SARX: the first operand is the second shifted by the third.
fn select_without_flags<S: Shift>(form: &Form) -> Handler {
    match (form.width, form.kinds[1]) {
        (4, Kind::Mem) => shift_without_flags::<S, u32, Mem<Segmented>>,
        (4, _) => shift_without_flags::<S, u32, Src>,
        (_, Kind::Mem) => shift_without_flags::<S, u64, Mem<Segmented>>,
        (_, _) => shift_without_flags::<S, u64, Src>,
    }
}

fn shift_without_flags<S: Shift, T: Int, R: Read>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let a: T = R::read(core, op)?;
    let count = mask_count::<T>(core.reg(op.aux));
    core.set_reg(
        op.dst,
        if count == 0 {
            a
        } else {
            S::value(a, count, false)
        },
    );
    Ok(())
}

fn rotate_without_flags<T: Int, R: Read>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let a: T = R::read(core, op)?;
    let count = mask_count::<T>(op.imm as u8);
    core.set_reg(op.dst, Ror::value(a, count, false));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::rflags::CF;

    /// Rotating through carry one bit at a time.
    fn rcl_slowly(mut a: u8, count: u32, mut carry: bool) -> (u8, bool) {
        for _ in 0..count {
            let out = a & 0x80 != 0;
            a = a << 1 | u8::from(carry);
            carry = out;
        }
        (a, carry)
    }

    #[test]
    fn rotating_through_carry_is_rotating_nine_bits() {
        for a in 0..=255u8 {
            for count in 1..32 {
                for carry in [false, true] {
                    let (expected, expected_carry) = rcl_slowly(a, count, carry);
                    let result = Rcl::value(a, count, carry);
                    assert_eq!(result, expected);
                    let mut flags = Flags::from_image(u64::from(carry) * CF);
                    Rcl::flags(&mut flags, a, count, result);
                    assert_eq!(flags.cf(), expected_carry);
                    // And back.
                    let back = Rcr::value(result, count, expected_carry);
                    assert_eq!(back, a);
                    Rcr::flags(&mut flags, result, count, back);
                    assert_eq!(flags.cf(), carry);
                }
            }
        }
    }

    #[test]
    fn bytes_shifted_by_more_than_their_width_are_gone() {
        assert_eq!(Shl::value(0xffu8, 8, false), 0);
        assert_eq!(Shr::value(0xffu8, 31, false), 0);
        assert_eq!(Sar::value(0x80u8, 31, false), 0xff);
        let mut flags = Flags::from_image(0);
        Shl::flags(&mut flags, 0x01u8, 8, 0);
        assert!(flags.cf());
        Shl::flags(&mut flags, 0xffu8, 9, 0);
        assert!(!flags.cf());
    }
}
