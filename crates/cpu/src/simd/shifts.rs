//! Shifts of packed integers, by a count in a register, in memory or in the instruction,
//! or by a count for each lane.

use super::host;
use super::operand::{Lanes as _, One, Source, Two, Unaligned, VectorAux, binary, packed};
use crate::core_state::Core;
use crate::form::{Form, Kind};
use crate::op::{Handler, Op, Segmented};
use crate::trap::Trap;
use bytemuck::must_cast;
use iced_x86::Mnemonic as M;
use std::array::from_fn;

/// A shift whose count is an immediate or the low 64 bits of a vector, the same for every lane.
macro_rules! shift {
    ($form:expr, $value:expr) => {
        match $form.kinds {
            [Kind::Xmm | Kind::Mm, Kind::Imm, ..] | [_, _, Kind::Imm, _] => {
                by_immediate!($form, |value, count| { $value(value, u128::from(count)) })
            }
            [Kind::Ymm, _, Kind::Xmm, _] => {
                |core, op| shift_wide::<VectorAux<One>>(core, op, $value)
            }
            [Kind::Ymm, ..] => |core, op| shift_wide::<Unaligned<Segmented>>(core, op, $value),
            _ => packed!($form, $value),
        }
    };
}

/// A shift of every lane by the immediate.
macro_rules! by_immediate {
    ($form:expr, $value:expr) => {
        match ($form.is_vex, $form.is_wide()) {
            _ if $form.kinds[0] == Kind::Mm => |core, op| {
                core.require_mmx()?;
                let result = $value(core.mm(op.dst).into(), op.imm as u8);
                core.set_mm(op.dst, result as u64);
                Ok(())
            },
            (false, _) => |core, op| {
                let result = $value(core.xmm(op.dst), op.imm as u8);
                core.set_xmm(op.dst, result);
                Ok(())
            },
            (true, false) => |core, op| {
                let value = One::get(core, op.src);
                value
                    .map(|value| $value(value, op.imm as u8))
                    .put_cleared(core, op.dst);
                Ok(())
            },
            (true, true) => |core, op| {
                let value = Two::get(core, op.src);
                value
                    .map(|value| $value(value, op.imm as u8))
                    .put_cleared(core, op.dst);
                Ok(())
            },
        }
    };
}

/// The handler for an instruction of this subject.
pub(super) fn select(form: &Form) -> Option<Handler> {
    Some(match form.mnemonic {
        M::Psllw | M::Vpsllw => shift!(form, host::psllw),
        M::Pslld | M::Vpslld => shift!(form, host::pslld),
        M::Psllq | M::Vpsllq => shift!(form, host::psllq),
        M::Psraw | M::Vpsraw => shift!(form, host::psraw),
        M::Psrad | M::Vpsrad => shift!(form, host::psrad),
        M::Psrlw | M::Vpsrlw => shift!(form, host::psrlw),
        M::Psrld | M::Vpsrld => shift!(form, host::psrld),
        M::Psrlq | M::Vpsrlq => shift!(form, host::psrlq),
        M::Pslldq | M::Vpslldq => by_immediate!(form, shift_bytes_left),
        M::Psrldq | M::Vpsrldq => by_immediate!(form, shift_bytes_right),
        M::Vpsllvd => binary!(form, Unaligned, |a, b| each_32(a, b, |a, count| {
            a.checked_shl(count).unwrap_or(0)
        })),
        M::Vpsllvq => binary!(form, Unaligned, |a, b| each_64(a, b, |a, count| {
            a.checked_shl(count).unwrap_or(0)
        })),
        M::Vpsrlvd => binary!(form, Unaligned, |a, b| each_32(a, b, |a, count| {
            a.checked_shr(count).unwrap_or(0)
        })),
        M::Vpsrlvq => binary!(form, Unaligned, |a, b| each_64(a, b, |a, count| {
            a.checked_shr(count).unwrap_or(0)
        })),
        M::Vpsravd => binary!(form, Unaligned, |a, b| each_32(a, b, |a, count| {
            (a as i32 >> count.min(31)) as u32
        })),
        _ => return None,
    })
}

/// Both lanes of the second operand by one count.
fn shift_wide<S: Source<Value = One>>(
    core: &mut Core,
    op: &Op,
    shift: impl Fn(u128, u128) -> u128,
) -> Result<(), Trap> {
    let [count] = S::read(core, op)?;
    let value = Two::get(core, op.src);
    value
        .map(|value| shift(value, count))
        .put_cleared(core, op.dst);
    Ok(())
}

/// Shifts each lane of 32 bits by a count of its own.
fn each_32(a: u128, counts: u128, shift: impl Fn(u32, u32) -> u32) -> u128 {
    let (a, counts): ([u32; 4], [u32; 4]) = (must_cast(a), must_cast(counts));
    let lanes: [u32; 4] = from_fn(|i| shift(a[i], counts[i]));
    must_cast(lanes)
}

/// Shifts each lane of 64 bits by a count of its own.
fn each_64(a: u128, counts: u128, shift: impl Fn(u64, u32) -> u64) -> u128 {
    let (a, counts): ([u64; 2], [u64; 2]) = (must_cast(a), must_cast(counts));
    let lanes: [u64; 2] = from_fn(|i| shift(a[i], counts[i].min(u32::MAX.into()) as u32));
    must_cast(lanes)
}

/// PSLLDQ: towards higher bytes; 16 and more leave nothing.
fn shift_bytes_left(value: u128, bytes: u8) -> u128 {
    value.checked_shl(u32::from(bytes) * 8).unwrap_or(0)
}

/// PSRLDQ: towards lower bytes; 16 and more leave nothing.
fn shift_bytes_right(value: u128, bytes: u8) -> u128 {
    value.checked_shr(u32::from(bytes) * 8).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_shifts_of_sixteen_or_more_leave_nothing() {
        let value = 0x0f0e_0d0c_0b0a_0908_0706_0504_0302_01ff;
        assert_eq!(shift_bytes_left(value, 0), value);
        assert_eq!(shift_bytes_left(value, 15), 0xff << 120);
        assert_eq!(shift_bytes_left(value, 16), 0);
        assert_eq!(shift_bytes_right(value, 15), 0x0f);
        assert_eq!(shift_bytes_right(value, 16), 0);
        assert_eq!(shift_bytes_right(value, 255), 0);
    }
}
