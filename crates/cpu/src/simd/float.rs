//! Floating-point arithmetic, packed and scalar.

use super::host;
use super::operand::{Lanes, Shape, binary, by_shape, unary};
use super::precision::{Roundings, Step, doubles, none, singles};
use crate::core_state::Core;
use crate::form::Form;
use crate::op::{Handler, Op};
use crate::trap::Trap;
use bytemuck::must_cast;
use iced_x86::Mnemonic as M;
use std::array::from_fn;

/// A handler that computes from both sources and the low byte of the immediate under the guest's
/// MXCSR, and then stores what it computed. Nothing changes if an unmasked exception is found. What
/// is rounded is said by a function of both sources.
macro_rules! float_handler {
    ($x:ty, $compute:expr, $roundings:expr, $finish:expr) => {{
        /// For the first of a run, and with control bits that need care.
        #[cold]
        #[inline(never)]
        fn exact<X: $crate::simd::operand::Shape>(
            core: &mut $crate::core_state::Core,
            op: &$crate::op::Op,
        ) -> Result<(), $crate::trap::Trap> {
            let b = X::second(core, op)?;
            let (a, immediate) = (X::first(core, op), op.imm as u8);
            let result = core.float_exact(&|| $compute(a, b, immediate), &|| $roundings(a, b))?;
            $finish(core, op, result);
            Ok(())
        }

        |core, op| {
            use $crate::simd::operand::Shape;
            if !core.float_is_live() {
                return exact::<<$x as Shape>::General>(core, op);
            }
            let b = <$x as Shape>::second(core, op)?;
            let result = $compute(<$x as Shape>::first(core, op), b, op.imm as u8);
            $finish(core, op, result);
            Ok(())
        }
    }};
}
pub(super) use float_handler;

/// A [`float_handler`] that gives to the destination what a function makes of each lane of both
/// sources and the immediate. `$sources` is one of those that `by_shape` knows.
macro_rules! float_lanes {
    ($sources:ident, $form:expr, $memory:ident, $compute:expr, $roundings:expr) => {
        $crate::simd::operand::by_shape!($sources, $form, $memory, X => (
            $crate::simd::float::float_handler!(
                X,
                |a: <X as Shape>::Value, b: <X as Shape>::Value, immediate: u8| {
                    $crate::simd::operand::Lanes::zip(a, b, |a, b| $compute(a, b, immediate))
                },
                |a: <X as Shape>::Value, b: <X as Shape>::Value| {
                    let none = $crate::simd::precision::Roundings::default();
                    $crate::simd::operand::Lanes::fold(a, b, none, |all, a, b| {
                        all.and($roundings(a, b))
                    })
                },
                <X as Shape>::store
            )
        ))
    };
}
pub(super) use float_lanes;

/// A handler that gives to the destination a function of both sources.
macro_rules! float {
    ($form:expr, $memory:ident, $value:expr) => {
        $crate::simd::float::float!($form, $memory, $value, $crate::simd::precision::none)
    };
    ($form:expr, $memory:ident, $value:expr, $roundings:expr) => {
        $crate::simd::float::float_lanes!(
            binary,
            $form,
            $memory,
            |a, b, _| $value(a, b),
            $roundings
        )
    };
}
pub(super) use float;

/// As [`float`], for a function of the only source.
macro_rules! float_unary {
    ($form:expr, $memory:ident, $value:expr) => {
        $crate::simd::float::float_lanes!(
            unary,
            $form,
            $memory,
            |_, b, _| $value(b),
            $crate::simd::precision::none
        )
    };
}
pub(super) use float_unary;

/// As [`float`], with the low byte of the immediate as the function's third argument.
macro_rules! float_immediate {
    ($form:expr, $memory:ident, $value:expr) => {
        $crate::simd::float::float_lanes!(
            binary,
            $form,
            $memory,
            $value,
            $crate::simd::precision::none
        )
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

/// Rounding of every lane of the only source.
macro_rules! round {
    ($form:expr, $memory:ident, $value:expr) => {
        float_lanes!(
            unary,
            $form,
            $memory,
            |_, b, immediate| $value(b, immediate),
            none
        )
    };
}

/// The handler for an instruction of this subject.
pub(super) fn select(form: &Form) -> Option<Handler> {
    Some(match form.mnemonic {
        M::Addps | M::Vaddps => arithmetic!(form, Aligned, host::addps, singles[Add; 4]),
        M::Addpd | M::Vaddpd => arithmetic!(form, Aligned, host::addpd, doubles[Add; 2]),
        M::Addss | M::Vaddss => arithmetic!(form, Low32, host::addss, singles[Add; 1]),
        M::Addsd | M::Vaddsd => arithmetic!(form, Low64, host::addsd, doubles[Add; 1]),
        M::Subps | M::Vsubps => arithmetic!(form, Aligned, host::subps, singles[Subtract; 4]),
        M::Subpd | M::Vsubpd => arithmetic!(form, Aligned, host::subpd, doubles[Subtract; 2]),
        M::Subss | M::Vsubss => arithmetic!(form, Low32, host::subss, singles[Subtract; 1]),
        M::Subsd | M::Vsubsd => arithmetic!(form, Low64, host::subsd, doubles[Subtract; 1]),
        M::Mulps | M::Vmulps => arithmetic!(form, Aligned, host::mulps, singles[Multiply; 4]),
        M::Mulpd | M::Vmulpd => arithmetic!(form, Aligned, host::mulpd, doubles[Multiply; 2]),
        M::Mulss | M::Vmulss => arithmetic!(form, Low32, host::mulss, singles[Multiply; 1]),
        M::Mulsd | M::Vmulsd => arithmetic!(form, Low64, host::mulsd, doubles[Multiply; 1]),
        M::Divps | M::Vdivps => arithmetic!(form, Aligned, host::divps, singles[Divide; 4]),
        M::Divpd | M::Vdivpd => arithmetic!(form, Aligned, host::divpd, doubles[Divide; 2]),
        M::Divss | M::Vdivss => arithmetic!(form, Low32, host::divss, singles[Divide; 1]),
        M::Divsd | M::Vdivsd => arithmetic!(form, Low64, host::divsd, doubles[Divide; 1]),
        M::Minps | M::Vminps => float!(form, Aligned, host::minps),
        M::Minpd | M::Vminpd => float!(form, Aligned, host::minpd),
        M::Minss | M::Vminss => float!(form, Low32, host::minss),
        M::Minsd | M::Vminsd => float!(form, Low64, host::minsd),
        M::Maxps | M::Vmaxps => float!(form, Aligned, host::maxps),
        M::Maxpd | M::Vmaxpd => float!(form, Aligned, host::maxpd),
        M::Maxss | M::Vmaxss => float!(form, Low32, host::maxss),
        M::Maxsd | M::Vmaxsd => float!(form, Low64, host::maxsd),
        M::Sqrtps | M::Vsqrtps => float_unary!(form, Aligned, host::sqrtps),
        M::Sqrtpd | M::Vsqrtpd => float_unary!(form, Aligned, host::sqrtpd),
        M::Sqrtss | M::Vsqrtss => float!(form, Low32, host::sqrtss),
        M::Sqrtsd | M::Vsqrtsd => float!(form, Low64, host::sqrtsd),
        M::Rcpps | M::Vrcpps => unary!(form, Aligned, host::rcpps),
        M::Rcpss | M::Vrcpss => binary!(form, Low32, host::rcpss),
        M::Rsqrtps | M::Vrsqrtps => unary!(form, Aligned, host::rsqrtps),
        M::Rsqrtss | M::Vrsqrtss => binary!(form, Low32, host::rsqrtss),
        M::Addsubps | M::Vaddsubps => float!(form, Aligned, host::addsubps, |a, b| singles(
            [Step::Subtract, Step::Add, Step::Subtract, Step::Add],
            a,
            b
        )),
        M::Addsubpd | M::Vaddsubpd => float!(form, Aligned, host::addsubpd, |a, b| doubles(
            [Step::Subtract, Step::Add],
            a,
            b
        )),
        M::Haddps | M::Vhaddps => float!(form, Aligned, host::haddps, |a, b| neighbours_32(
            Step::Add,
            a,
            b
        )),
        M::Haddpd | M::Vhaddpd => float!(form, Aligned, host::haddpd, |a, b| neighbours_64(
            Step::Add,
            a,
            b
        )),
        M::Hsubps | M::Vhsubps => float!(form, Aligned, host::hsubps, |a, b| neighbours_32(
            Step::Subtract,
            a,
            b
        )),
        M::Hsubpd | M::Vhsubpd => float!(form, Aligned, host::hsubpd, |a, b| neighbours_64(
            Step::Subtract,
            a,
            b
        )),
        M::Roundps | M::Vroundps => round!(form, Aligned, host::roundps),
        M::Roundpd | M::Vroundpd => round!(form, Aligned, host::roundpd),
        M::Roundss | M::Vroundss => float_immediate!(form, Low32, host::roundss),
        M::Roundsd | M::Vroundsd => float_immediate!(form, Low64, host::roundsd),
        M::Dpps | M::Vdpps => by_shape!(binary, form, Aligned, X => dot_product_32::<X>),
        M::Dppd | M::Vdppd => by_shape!(binary, form, Aligned, X => dot_product_64::<X>),
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
fn dot_product_32<X: Shape>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let b = X::second(core, op)?;
    let control = op.imm as u8;
    let multiplied = spread_32(control >> 4);
    let a = X::first(core, op).map(|a| a & multiplied);
    let b = b.map(|b| b & multiplied);
    let zero = b.map(|_| 0);
    if core.has_unmasked() {
        let products = stage(core, a, b, host::mulps, |a, b| {
            singles([Step::Multiply; 4], a, b)
        })?;
        let add = |a, b| neighbours_32(Step::Add, a, b);
        let sums = stage(core, products, zero, host::haddps, add)?;
        stage(core, sums, zero, host::haddps, add)?;
    }
    let sum = stage(core, a, b, host::dpps_all, none)?;
    X::store(core, op, sum.map(|sum| sum & spread_32(control & 15)));
    Ok(())
}

/// DPPD, in two stages.
fn dot_product_64<X: Shape>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let b = X::second(core, op)?;
    let control = op.imm as u8;
    let multiplied = spread_64(control >> 4);
    let a = X::first(core, op).map(|a| a & multiplied);
    let b = b.map(|b| b & multiplied);
    let zero = b.map(|_| 0);
    if core.has_unmasked() {
        let products = stage(core, a, b, host::mulpd, |a, b| {
            doubles([Step::Multiply; 2], a, b)
        })?;
        stage(core, products, zero, host::haddpd, |a, b| {
            neighbours_64(Step::Add, a, b)
        })?;
    }
    let sum = stage(core, a, b, host::dppd_all, none)?;
    X::store(core, op, sum.map(|sum| sum & spread_64(control & 3)));
    Ok(())
}

/// One step on every lane, with the exceptions of all of them.
pub(super) fn stage<V: Lanes>(
    core: &mut Core,
    a: V,
    b: V,
    compute: impl Fn(u128, u128) -> u128,
    roundings: impl Fn(u128, u128) -> Roundings,
) -> Result<V, Trap> {
    core.float_exact(&|| a.zip(b, &compute), &|| {
        a.fold(b, Roundings::default(), |all, a, b| {
            all.and(roundings(a, b))
        })
    })
}
