//! Floating-point arithmetic, packed and scalar.

use super::operand::{Source, binary, by_source, unary};
use super::precision::{Roundings, Step, doubles, singles};
use super::{Host, host};
use crate::core_state::Core;
use crate::form::Form;
use crate::op::{Handler, Op};
use crate::trap::Trap;
use bytemuck::must_cast;
use iced_x86::Mnemonic as M;
use std::array::from_fn;

/// A handler that computes from the first operand, the second (of the type named) and the low
/// byte of the immediate, under the guest's MXCSR, and then stores what it computed. Nothing changes
/// if an unmasked exception is found. What is rounded is said by a function of both operands.
macro_rules! float_handler {
    ($s:ty, $compute:expr, $roundings:expr, $finish:expr) => {{
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
            let result = core.float_exact(&|| $compute(a, b, immediate), &|| $roundings(a, b))?;
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
    ($form:expr, $memory:ident, $compute:expr, $roundings:expr) => {
        $crate::sse::operand::by_source!($form, $memory, S => (
            $crate::sse::float::float_handler!(
                S,
                $compute,
                $roundings,
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
        $crate::sse::float::float!($form, $memory, $value, $crate::sse::precision::none)
    };
    ($form:expr, $memory:ident, $value:expr, $roundings:expr) => {
        $crate::sse::float::float_to_vector!($form, $memory, |a, b, _| $value(a, b), $roundings)
    };
}
pub(super) use float;

/// As [`float`], for a function of the second operand alone.
macro_rules! float_unary {
    ($form:expr, $memory:ident, $value:expr) => {
        $crate::sse::float::float_unary!($form, $memory, $value, $crate::sse::precision::none)
    };
    ($form:expr, $memory:ident, $value:expr, $roundings:expr) => {
        $crate::sse::float::float_to_vector!($form, $memory, |_, b, _| $value(b), $roundings)
    };
}
pub(super) use float_unary;

/// As [`float`], with the low byte of the immediate as the function's third argument.
macro_rules! float_immediate {
    ($form:expr, $memory:ident, $value:expr) => {
        $crate::sse::float::float_to_vector!($form, $memory, $value, $crate::sse::precision::none)
    };
}
pub(super) use float_immediate;

/// A handler of [`float`] for arithmetic that rounds each of the lanes `$lanes` once.
macro_rules! arithmetic {
    ($form:expr, $memory:ident, $value:expr, $lanes:ident[$step:ident; $count:literal]) => {
        float!($form, $memory, $value, |a, b| $lanes(
            [Step::$step; $count],
            a,
            b
        ))
    };
}

/// The handler for an instruction of this subject.
pub(super) fn select(form: &Form, host_has: Host) -> Option<Handler> {
    Some(match form.mnemonic {
        M::Addps => arithmetic!(form, Aligned, host::addps, singles[Add; 4]),
        M::Addpd => arithmetic!(form, Aligned, host::addpd, doubles[Add; 2]),
        M::Addss => arithmetic!(form, Low32, host::addss, singles[Add; 1]),
        M::Addsd => arithmetic!(form, Low64, host::addsd, doubles[Add; 1]),
        M::Subps => arithmetic!(form, Aligned, host::subps, singles[Subtract; 4]),
        M::Subpd => arithmetic!(form, Aligned, host::subpd, doubles[Subtract; 2]),
        M::Subss => arithmetic!(form, Low32, host::subss, singles[Subtract; 1]),
        M::Subsd => arithmetic!(form, Low64, host::subsd, doubles[Subtract; 1]),
        M::Mulps => arithmetic!(form, Aligned, host::mulps, singles[Multiply; 4]),
        M::Mulpd => arithmetic!(form, Aligned, host::mulpd, doubles[Multiply; 2]),
        M::Mulss => arithmetic!(form, Low32, host::mulss, singles[Multiply; 1]),
        M::Mulsd => arithmetic!(form, Low64, host::mulsd, doubles[Multiply; 1]),
        M::Divps => arithmetic!(form, Aligned, host::divps, singles[Divide; 4]),
        M::Divpd => arithmetic!(form, Aligned, host::divpd, doubles[Divide; 2]),
        M::Divss => arithmetic!(form, Low32, host::divss, singles[Divide; 1]),
        M::Divsd => arithmetic!(form, Low64, host::divsd, doubles[Divide; 1]),
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
        M::Addsubps => float!(form, Aligned, host::addsubps, |a, b| singles(
            [Step::Subtract, Step::Add, Step::Subtract, Step::Add],
            a,
            b
        )),
        M::Addsubpd => float!(form, Aligned, host::addsubpd, |a, b| doubles(
            [Step::Subtract, Step::Add],
            a,
            b
        )),
        M::Haddps => float!(form, Aligned, host::haddps, |a, b| neighbours_32(
            Step::Add,
            a,
            b
        )),
        M::Haddpd => float!(form, Aligned, host::haddpd, |a, b| neighbours_64(
            Step::Add,
            a,
            b
        )),
        M::Hsubps => float!(form, Aligned, host::hsubps, |a, b| neighbours_32(
            Step::Subtract,
            a,
            b
        )),
        M::Hsubpd => float!(form, Aligned, host::hsubpd, |a, b| neighbours_64(
            Step::Subtract,
            a,
            b
        )),
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
        M::Dpps => by_source!(form, Aligned, S => dot_product_32::<S>),
        M::Dppd => by_source!(form, Aligned, S => dot_product_64::<S>),
        _ => return None,
    })
}

/// What HADDPS and HSUBPS round.
fn neighbours_32(step: Step, a: u128, b: u128) -> Roundings {
    let (a, b): ([u32; 4], [u32; 4]) = (must_cast(a), must_cast(b));
    let (even, odd) = ([a[0], a[2], b[0], b[2]], [a[1], a[3], b[1], b[3]]);
    singles([step; 4], must_cast(even), must_cast(odd))
}

/// What HADDPD and HSUBPD round.
fn neighbours_64(step: Step, a: u128, b: u128) -> Roundings {
    let (a, b): ([u64; 2], [u64; 2]) = (must_cast(a), must_cast(b));
    doubles([step; 2], must_cast([a[0], b[0]]), must_cast([a[1], b[1]]))
}

/// All bits of each lane of 32 whose bit is set.
fn spread_32(bits: u8) -> u128 {
    let lanes: [u32; 4] = from_fn(|i| if bits >> i & 1 != 0 { u32::MAX } else { 0 });
    must_cast(lanes)
}

/// All bits of each lane of 64 whose bit is set.
fn spread_64(bits: u8) -> u128 {
    let lanes: [u64; 2] = from_fn(|i| if bits >> i & 1 != 0 { u64::MAX } else { 0 });
    must_cast(lanes)
}

/// DPPS. A lane that is not multiplied counts as +0, which is what 0 times 0 gives without any
/// flag; a lane that does not receive the sum becomes +0. Each of the three stages raises its
/// exceptions before the next begins.
fn dot_product_32<S: Source>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let b = S::read(core, op)?;
    let control = op.imm as u8;
    let multiplied = spread_32(control >> 4);
    let (a, b) = (core.xmm(op.dst) & multiplied, b & multiplied);
    if core.has_unmasked() {
        let products = core.float_exact(&|| host::mulps(a, b), &|| {
            singles([Step::Multiply; 4], a, b)
        })?;
        let sums = core.float_exact(&|| host::haddps(products, 0), &|| {
            neighbours_32(Step::Add, products, 0)
        })?;
        core.float_exact(&|| host::haddps(sums, 0), &|| {
            neighbours_32(Step::Add, sums, 0)
        })?;
    }
    let sum = core.float_exact(&|| host::dpps_all(a, b), &Roundings::default)?;
    core.set_xmm(op.dst, sum & spread_32(control & 15));
    Ok(())
}

/// DPPD, in two stages.
fn dot_product_64<S: Source>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let b = S::read(core, op)?;
    let control = op.imm as u8;
    let multiplied = spread_64(control >> 4);
    let (a, b) = (core.xmm(op.dst) & multiplied, b & multiplied);
    if core.has_unmasked() {
        let products = core.float_exact(&|| host::mulpd(a, b), &|| {
            doubles([Step::Multiply; 2], a, b)
        })?;
        core.float_exact(&|| host::haddpd(products, 0), &|| {
            neighbours_64(Step::Add, products, 0)
        })?;
    }
    let sum = core.float_exact(&|| host::dppd_all(a, b), &Roundings::default)?;
    core.set_xmm(op.dst, sum & spread_64(control & 3));
    Ok(())
}
