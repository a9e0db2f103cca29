//! Conversions between floating-point formats and integers.

use super::float::{float, float_handler, float_unary};
use super::host;
use super::operand::{General, Low32, Low64, by_source, unary};
use super::precision::{Step, doubles, none};
use crate::core_state::Core;
use crate::form::{Form, Kind, by_address};
use crate::op::{Handler, Op};
use iced_x86::Mnemonic as M;

/// A handler for a scalar conversion to a general register of 32 or 64 bits.
macro_rules! to_integer {
    ($form:expr, $memory:ident, $narrow:expr, $wide:expr) => {
        match $form.width {
            8 => by_source!($form, $memory, S => (float_handler!(
                S,
                |_, b, _| $wide(b),
                none,
                |core: &mut Core, op: &Op, value: u64| core.set_reg(op.dst, value)
            ))),
            _ => by_source!($form, $memory, S => (float_handler!(
                S,
                |_, b, _| $narrow(b),
                none,
                |core: &mut Core, op: &Op, value: u32| core.set_reg(op.dst, value)
            ))),
        }
    };
}

/// A handler for a conversion from a general register or memory of 32 or 64 bits to the low lane
/// of the first operand.
macro_rules! from_integer {
    ($form:expr, $narrow:expr, $wide:expr) => {
        match ($form.source_width(), $form.kinds[1]) {
            (8, Kind::Mem) => by_address!($form, A => (from_integer!(@ Low64<A>, u64, $wide))),
            (8, _) => from_integer!(@ General<u64>, u64, $wide),
            (_, Kind::Mem) => by_address!($form, A => (from_integer!(@ Low32<A>, u32, $narrow))),
            (_, _) => from_integer!(@ General<u32>, u32, $narrow),
        }
    };
    (@ $s:ty, $t:ty, $value:expr) => {
        float_handler!(
            $s,
            |a, b, _| $value(a, b as $t),
            none,
            |core: &mut Core, op: &Op, result: u128| core.set_xmm(op.dst, result)
        )
    };
}

/// The handler for an instruction of this subject.
pub(super) fn select(form: &Form) -> Option<Handler> {
    Some(match form.mnemonic {
        M::Cvtps2pd => float_unary!(form, Low64, host::cvtps2pd),
        M::Cvtpd2ps => float_unary!(form, Aligned, host::cvtpd2ps, |_, b| doubles(
            [Step::Narrow; 2],
            b,
            b
        )),
        M::Cvtdq2ps => float_unary!(form, Aligned, host::cvtdq2ps),
        // Every 32-bit integer is a double: nothing to round, nothing to report.
        M::Cvtdq2pd => unary!(form, Low64, host::cvtdq2pd),
        M::Cvtps2dq => float_unary!(form, Aligned, host::cvtps2dq),
        M::Cvttps2dq => float_unary!(form, Aligned, host::cvttps2dq),
        M::Cvtpd2dq => float_unary!(form, Aligned, host::cvtpd2dq),
        M::Cvttpd2dq => float_unary!(form, Aligned, host::cvttpd2dq),
        M::Cvtss2sd => float!(form, Low32, host::cvtss2sd),
        M::Cvtsd2ss => float!(form, Low64, host::cvtsd2ss, |_, b| doubles(
            [Step::Narrow],
            b,
            b
        )),
        M::Cvtss2si => to_integer!(form, Low32, host::cvtss2si_32, host::cvtss2si_64),
        M::Cvttss2si => to_integer!(form, Low32, host::cvttss2si_32, host::cvttss2si_64),
        M::Cvtsd2si => to_integer!(form, Low64, host::cvtsd2si_32, host::cvtsd2si_64),
        M::Cvttsd2si => to_integer!(form, Low64, host::cvttsd2si_32, host::cvttsd2si_64),
        M::Cvtsi2ss => from_integer!(form, host::cvtsi2ss_32, host::cvtsi2ss_64),
        M::Cvtsi2sd => from_integer!(form, host::cvtsi2sd_32, host::cvtsi2sd_64),
        _ => return None,
    })
}
