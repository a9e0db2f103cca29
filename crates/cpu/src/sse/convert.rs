//! Conversions between floating-point formats and integers.

use super::float::{float, float_unary};
use super::host;
use super::operand::{Source, by_source, unary};
use crate::core_state::Core;
use crate::form::{Form, Kind, by_address};
use crate::op::{Handler, Mem, Op, Read, Src};
use crate::trap::Trap;
use iced_x86::Mnemonic as M;

/// A handler for a scalar conversion to a general register of 32 or 64 bits.
macro_rules! to_integer {
    ($form:expr, $memory:ident, $narrow:expr, $wide:expr) => {
        match $form.width {
            8 => by_source!($form, $memory, S => |core, op| {
                let b = <S as Source>::read(core, op)?;
                let value: u64 = core.float(|| $wide(b))?;
                core.set_reg(op.dst, value);
                Ok(())
            }),
            _ => by_source!($form, $memory, S => |core, op| {
                let b = <S as Source>::read(core, op)?;
                let value: u32 = core.float(|| $narrow(b))?;
                core.set_reg(op.dst, value);
                Ok(())
            }),
        }
    };
}

/// A handler for a conversion from a general register or memory of 32 or 64 bits.
macro_rules! from_integer {
    ($form:expr, $narrow:expr, $wide:expr) => {
        match ($form.source_width(), $form.kinds[1]) {
            (8, Kind::Mem) => by_address!($form, A => |core, op| {
                from_integer::<u64, Mem<A>>(core, op, $wide)
            }),
            (8, _) => |core, op| from_integer::<u64, Src>(core, op, $wide),
            (_, Kind::Mem) => by_address!($form, A => |core, op| {
                from_integer::<u32, Mem<A>>(core, op, $narrow)
            }),
            (_, _) => |core, op| from_integer::<u32, Src>(core, op, $narrow),
        }
    };
}

/// The handler for an instruction of this subject.
pub(super) fn select(form: &Form) -> Option<Handler> {
    Some(match form.mnemonic {
        M::Cvtps2pd => float_unary!(form, Low64, host::cvtps2pd),
        M::Cvtpd2ps => float_unary!(form, Aligned, host::cvtpd2ps),
        M::Cvtdq2ps => float_unary!(form, Aligned, host::cvtdq2ps),
        // Every 32-bit integer is a double: nothing to round, nothing to report.
        M::Cvtdq2pd => unary!(form, Low64, host::cvtdq2pd),
        M::Cvtps2dq => float_unary!(form, Aligned, host::cvtps2dq),
        M::Cvttps2dq => float_unary!(form, Aligned, host::cvttps2dq),
        M::Cvtpd2dq => float_unary!(form, Aligned, host::cvtpd2dq),
        M::Cvttpd2dq => float_unary!(form, Aligned, host::cvttpd2dq),
        M::Cvtss2sd => float!(form, Low32, host::cvtss2sd),
        M::Cvtsd2ss => float!(form, Low64, host::cvtsd2ss),
        M::Cvtss2si => to_integer!(form, Low32, host::cvtss2si_32, host::cvtss2si_64),
        M::Cvttss2si => to_integer!(form, Low32, host::cvttss2si_32, host::cvttss2si_64),
        M::Cvtsd2si => to_integer!(form, Low64, host::cvtsd2si_32, host::cvtsd2si_64),
        M::Cvttsd2si => to_integer!(form, Low64, host::cvttsd2si_32, host::cvttsd2si_64),
        M::Cvtsi2ss => from_integer!(form, host::cvtsi2ss_32, host::cvtsi2ss_64),
        M::Cvtsi2sd => from_integer!(form, host::cvtsi2sd_32, host::cvtsi2sd_64),
        _ => return None,
    })
}

/// Replaces the low lane of the first operand by the integer.
#[inline(always)]
fn from_integer<T: crate::int::Int, S: Read>(
    core: &mut Core,
    op: &Op,
    convert: impl Fn(u128, T) -> u128,
) -> Result<(), Trap> {
    let value: T = S::read(core, op)?;
    let a = core.xmm(op.dst);
    let result = core.float(|| convert(a, value))?;
    core.set_xmm(op.dst, result);
    Ok(())
}
