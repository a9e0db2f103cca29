//! Conversions between floating-point formats and integers.

use super::float::{float, float_handler, float_lanes, float_unary, stage};
use super::host;
use super::operand::{
    General, Lanes as _, Legacy, Low32, Low64, One, Shape, Source, Two, Unaligned, VectorSrc, Vex,
    by_shape,
};
use super::precision::{Roundings, Step, doubles, none};
use crate::core_state::Core;
use crate::form::{Form, Kind, by_address};
use crate::op::{Aux, Handler, Op, Segmented, Src};
use crate::trap::Trap;
use iced_x86::Mnemonic as M;

/// A handler for a scalar conversion to a general register of 32 or 64 bits.
macro_rules! to_integer {
    ($form:expr, $memory:ident, $narrow:expr, $wide:expr) => {
        match $form.width {
            8 => to_integer!(@ $form, $memory, $wide, u64),
            _ => to_integer!(@ $form, $memory, $narrow, u32),
        }
    };
    (@ $form:expr, $memory:ident, $value:expr, $t:ty) => {
        by_shape!(pair, $form, $memory, X => (float_handler!(
            X,
            |_, b: <X as Shape>::Value, _| $value(b.low()),
            |_, _| Roundings::default(),
            |core: &mut Core, op: &Op, value: $t| core.set_reg(op.dst, value)
        )))
    };
}

/// A handler for a conversion from a general register or memory of 32 or 64 bits to the low lane
/// of the first source.
macro_rules! from_integer {
    ($form:expr, $narrow:expr, $wide:expr) => {
        match ($form.is_vex, $form.rm_width(), $form.has_memory()) {
            (false, 8, true) => {
                by_address!($form, A => (from_integer!(@ Legacy<Low64<A>>, u64, $wide)))
            }
            (false, 8, false) => from_integer!(@ Legacy<General<Src, u64>>, u64, $wide),
            (false, _, true) => {
                by_address!($form, A => (from_integer!(@ Legacy<Low32<A>>, u32, $narrow)))
            }
            (false, _, false) => from_integer!(@ Legacy<General<Src, u32>>, u32, $narrow),
            (true, 8, true) => from_integer!(@ Vex<Low64<Segmented>>, u64, $wide),
            (true, 8, false) => from_integer!(@ Vex<General<Aux, u64>>, u64, $wide),
            (true, _, true) => from_integer!(@ Vex<Low32<Segmented>>, u32, $narrow),
            (true, _, false) => from_integer!(@ Vex<General<Aux, u32>>, u32, $narrow),
        }
    };
    (@ $x:ty, $t:ty, $value:expr) => {
        {
            type X = $x;
            float_handler!(
                X,
                |a: <X as Shape>::Value, b: <X as Shape>::Value, _| {
                    a.zip(b, |a, b| $value(a, b as $t))
                },
                |_, _| Roundings::default(),
                <X as Shape>::store
            )
        }
    };
}

/// A handler for a conversion of the lower half of a lane to a lane, or of a lane to two.
macro_rules! widen {
    ($form:expr, $value:expr) => {
        match ($form.is_wide(), $form.kinds[1]) {
            (true, Kind::Xmm) => |core, op| widen::<VectorSrc<One>>(core, op, $value),
            (true, Kind::Mem) => |core, op| widen::<Unaligned<Segmented>>(core, op, $value),
            _ => float_unary!($form, Low64, $value),
        }
    };
}

/// A handler for a conversion of a lane to the lower half of a lane, or of two lanes to one.
macro_rules! narrow {
    ($form:expr, $value:expr, $roundings:expr) => {
        match ($form.source_width() == 32, $form.kinds[1]) {
            (true, Kind::Ymm) => |core, op| narrow::<VectorSrc<Two>>(core, op, $value, $roundings),
            (true, Kind::Mem) => {
                |core, op| narrow::<Unaligned<Segmented, Two>>(core, op, $value, $roundings)
            }
            _ => float_lanes!(unary, $form, Aligned, |_, b, _| $value(b), $roundings),
        }
    };
}

/// The handler for an instruction of this subject.
pub(super) fn select(form: &Form) -> Option<Handler> {
    Some(match form.mnemonic {
        M::Cvtps2pd | M::Vcvtps2pd => widen!(form, host::cvtps2pd),
        M::Cvtpd2ps | M::Vcvtpd2ps => narrow!(form, host::cvtpd2ps, |_, b| doubles(
            [Step::Narrow; 2],
            b,
            b
        )),
        M::Vcvtph2ps => widen!(form, host::vcvtph2ps),
        M::Cvtdq2ps | M::Vcvtdq2ps => float_unary!(form, Aligned, host::cvtdq2ps),
        M::Cvtdq2pd | M::Vcvtdq2pd => widen!(form, host::cvtdq2pd),
        M::Cvtps2dq | M::Vcvtps2dq => float_unary!(form, Aligned, host::cvtps2dq),
        M::Cvttps2dq | M::Vcvttps2dq => float_unary!(form, Aligned, host::cvttps2dq),
        M::Cvtpd2dq | M::Vcvtpd2dq => narrow!(form, host::cvtpd2dq, none),
        M::Cvttpd2dq | M::Vcvttpd2dq => narrow!(form, host::cvttpd2dq, none),
        M::Cvtss2sd | M::Vcvtss2sd => float!(form, Low32, host::cvtss2sd),
        M::Cvtsd2ss | M::Vcvtsd2ss => float!(form, Low64, host::cvtsd2ss, |_, b| doubles(
            [Step::Narrow],
            b,
            b
        )),
        M::Cvtss2si | M::Vcvtss2si => {
            to_integer!(form, Low32, host::cvtss2si_32, host::cvtss2si_64)
        }
        M::Cvttss2si | M::Vcvttss2si => {
            to_integer!(form, Low32, host::cvttss2si_32, host::cvttss2si_64)
        }
        M::Cvtsd2si | M::Vcvtsd2si => {
            to_integer!(form, Low64, host::cvtsd2si_32, host::cvtsd2si_64)
        }
        M::Cvttsd2si | M::Vcvttsd2si => {
            to_integer!(form, Low64, host::cvttsd2si_32, host::cvttsd2si_64)
        }
        M::Cvtsi2ss | M::Vcvtsi2ss => {
            from_integer!(form, host::cvtsi2ss_32, host::cvtsi2ss_64)
        }
        M::Cvtsi2sd | M::Vcvtsi2sd => {
            from_integer!(form, host::cvtsi2sd_32, host::cvtsi2sd_64)
        }
        _ => return None,
    })
}

/// Each half of a lane to a lane.
fn widen<S: Source<Value = One>>(
    core: &mut Core,
    op: &Op,
    convert: impl Fn(u128) -> u128,
) -> Result<(), Trap> {
    let [b] = S::read(core, op)?;
    let halves: Two = [b, b >> 64];
    let result = stage(core, halves, halves, |_, b| convert(b), none)?;
    result.put_cleared(core, op.dst);
    Ok(())
}

/// Each lane to half of a lane.
fn narrow<S: Source<Value = Two>>(
    core: &mut Core,
    op: &Op,
    convert: impl Fn(u128) -> u128,
    roundings: impl Fn(u128, u128) -> Roundings,
) -> Result<(), Trap> {
    let b = S::read(core, op)?;
    let [low, high] = stage(core, b, b, |_, b| convert(b), roundings)?;
    [low | high << 64].put_cleared(core, op.dst);
    Ok(())
}
