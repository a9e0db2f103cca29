//! Floating-point arithmetic, packed and scalar.

use super::operand::{binary, unary};
use super::{Host, host};
use crate::form::Form;
use crate::op::Handler;
use bytemuck::must_cast;
use iced_x86::Mnemonic as M;
use std::array::from_fn;

/// A handler that computes from the first operand, the second (of the type named) and the low
/// byte of the immediate, under the guest's MXCSR, and then stores what it computed. Nothing changes
/// if an unmasked exception is found.
macro_rules! float_handler {
    ($s:ty, $compute:expr, $finish:expr) => {{
        use $crate::sse::operand::Source;

        /// For the first of a run, and with control bits that need care.
        #[cold]
        #[inline(never)]
        fn exact<S: Source>(
            core: &mut $crate::core_state::Core,
            op: &$crate::op::Op,
        ) -> Result<(), $crate::trap::Trap> {
            let b = S::read(core, op)?;
            let (a, immediate) = (core.xmm(op.dst), op.imm as u8);
            let result = core.float_exact(&|| $compute(a, b, immediate))?;
            $finish(core, op, result);
            Ok(())
        }

        |core, op| {
            if !core.float_is_live() {
                return exact::<<$s as Source>::General>(core, op);
            }
            let b = <$s as Source>::read(core, op)?;
            let result = $compute(core.xmm(op.dst), b, op.imm as u8);
            $finish(core, op, result);
            Ok(())
        }
    }};
}
pub(super) use float_handler;

/// A [`float_handler`] that replaces the first operand.
macro_rules! float_to_vector {
    ($form:expr, $memory:ident, $compute:expr) => {
        $crate::sse::operand::by_source!($form, $memory, S => (
            $crate::sse::float::float_handler!(
                S,
                $compute,
                |core: &mut $crate::core_state::Core, op: &$crate::op::Op, result: u128| {
                    core.set_xmm(op.dst, result);
                }
            )
        ))
    };
}
pub(super) use float_to_vector;

/// A handler that replaces the first operand by a function of it and the second operand.
macro_rules! float {
    ($form:expr, $memory:ident, $value:expr) => {
        $crate::sse::float::float_to_vector!($form, $memory, |a, b, _| $value(a, b))
    };
}
pub(super) use float;

/// As [`float`], for a function of the second operand alone.
macro_rules! float_unary {
    ($form:expr, $memory:ident, $value:expr) => {
        $crate::sse::float::float_to_vector!($form, $memory, |_, b, _| $value(b))
    };
}
pub(super) use float_unary;

/// As [`float`], with the low byte of the immediate as the function's third argument.
macro_rules! float_immediate {
    ($form:expr, $memory:ident, $value:expr) => {
        $crate::sse::float::float_to_vector!($form, $memory, $value)
    };
}
pub(super) use float_immediate;

/// The handler for an instruction of this subject.
pub(super) fn select(form: &Form, host_has: Host) -> Option<Handler> {
    Some(match form.mnemonic {
        M::Addps => float!(form, Aligned, host::addps),
        M::Addpd => float!(form, Aligned, host::addpd),
        M::Addss => float!(form, Low32, host::addss),
        M::Addsd => float!(form, Low64, host::addsd),
        M::Subps => float!(form, Aligned, host::subps),
        M::Subpd => float!(form, Aligned, host::subpd),
        M::Subss => float!(form, Low32, host::subss),
        M::Subsd => float!(form, Low64, host::subsd),
        M::Mulps => float!(form, Aligned, host::mulps),
        M::Mulpd => float!(form, Aligned, host::mulpd),
        M::Mulss => float!(form, Low32, host::mulss),
        M::Mulsd => float!(form, Low64, host::mulsd),
        M::Divps => float!(form, Aligned, host::divps),
        M::Divpd => float!(form, Aligned, host::divpd),
        M::Divss => float!(form, Low32, host::divss),
        M::Divsd => float!(form, Low64, host::divsd),
        M::Minps => float!(form, Aligned, host::minps),
        M::Minpd => float!(form, Aligned, host::minpd),
        M::Minss => float!(form, Low32, host::minss),
        M::Minsd => float!(form, Low64, host::minsd),
        M::Maxps => float!(form, Aligned, host::maxps),
        M::Maxpd => float!(form, Aligned, host::maxpd),
        M::Maxss => float!(form, Low32, host::maxss),
        M::Maxsd => float!(form, Low64, host::maxsd),
        M::Sqrtps => float_unary!(form, Aligned, host::sqrtps),
        M::Sqrtpd => float_unary!(form, Aligned, host::sqrtpd),
        M::Sqrtss => float!(form, Low32, host::sqrtss),
        M::Sqrtsd => float!(form, Low64, host::sqrtsd),
        M::Rcpps => unary!(form, Aligned, host::rcpps),
        M::Rcpss => binary!(form, Low32, host::rcpss),
        M::Rsqrtps => unary!(form, Aligned, host::rsqrtps),
        M::Rsqrtss => binary!(form, Low32, host::rsqrtss),
        _ if host_has.sse3 => return select_sse3(form).or_else(|| select_sse41(form, host_has)),
        _ => return None,
    })
}

fn select_sse3(form: &Form) -> Option<Handler> {
    Some(match form.mnemonic {
        M::Addsubps => float!(form, Aligned, host::addsubps),
        M::Addsubpd => float!(form, Aligned, host::addsubpd),
        M::Haddps => float!(form, Aligned, host::haddps),
        M::Haddpd => float!(form, Aligned, host::haddpd),
        M::Hsubps => float!(form, Aligned, host::hsubps),
        M::Hsubpd => float!(form, Aligned, host::hsubpd),
        _ => return None,
    })
}

fn select_sse41(form: &Form, host_has: Host) -> Option<Handler> {
    if !host_has.sse41 {
        return None;
    }
    Some(match form.mnemonic {
        M::Roundps => float_immediate!(form, Aligned, host::roundps),
        M::Roundpd => float_immediate!(form, Aligned, host::roundpd),
        M::Roundss => float_immediate!(form, Low32, host::roundss),
        M::Roundsd => float_immediate!(form, Low64, host::roundsd),
        M::Dpps => float_immediate!(form, Aligned, dot_product_32),
        M::Dppd => float_immediate!(form, Aligned, dot_product_64),
        _ => return None,
    })
}

/// DPPS. A lane that is not multiplied counts as +0, which is what 0 times 0 gives without any
/// flag; a lane that does not receive the sum becomes +0.
fn dot_product_32(a: u128, b: u128, control: u8) -> u128 {
    let spread = |bits: u8| -> u128 {
        let lanes: [u32; 4] = from_fn(|i| if bits >> i & 1 != 0 { u32::MAX } else { 0 });
        must_cast(lanes)
    };
    let multiplied = spread(control >> 4);
    host::dpps_all(a & multiplied, b & multiplied) & spread(control & 15)
}

/// DPPD.
fn dot_product_64(a: u128, b: u128, control: u8) -> u128 {
    let spread = |bits: u8| -> u128 {
        let lanes: [u64; 2] = from_fn(|i| if bits >> i & 1 != 0 { u64::MAX } else { 0 });
        must_cast(lanes)
    };
    let multiplied = spread(control >> 4);
    host::dppd_all(a & multiplied, b & multiplied) & spread(control & 3)
}
