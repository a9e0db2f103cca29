//! Whether a result that overflowed or underflowed was also inexact.
//!
//! Masked overflow and underflow replace the result, and what replaces it is inexact. Unmasked ones
//! are reported with the precision flag of the result as if exponents had no bounds (SDM Vol. 1,
//! "Numeric Overflow Exception", "Numeric Underflow Exception"). The x87 unit shows it: its exponents
//! are wide enough for every result, and it rounds to as many bits as its control word says.

use super::host;
use bytemuck::must_cast;

/// What is computed before a result is rounded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Step {
    Add,
    Subtract,
    Multiply,
    Divide,
    /// The first operand, a double, rounded to a single.
    Narrow,
}

/// One lane's operands, as bits of a single or a double.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rounding {
    pub(super) step: Step,
    pub(super) a: u64,
    pub(super) b: u64,
    /// Operands are singles.
    pub(super) single: bool,
}

/// What an instruction rounds: at most four lanes.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Roundings([Option<Rounding>; 4]);

impl Roundings {
    pub(super) fn iter(&self) -> impl Iterator<Item = Rounding> {
        self.0.into_iter().flatten()
    }
}

/// An instruction whose results neither overflow nor underflow.
pub(super) fn none(_a: u128, _b: u128) -> Roundings {
    Roundings::default()
}

/// Lanes of singles, from the lowest, one for each step.
pub(super) fn singles<const N: usize>(steps: [Step; N], a: u128, b: u128) -> Roundings {
    let (a, b): ([u32; 4], [u32; 4]) = (must_cast(a), must_cast(b));
    let mut roundings = Roundings::default();
    for (i, (place, step)) in roundings.0.iter_mut().zip(steps).enumerate() {
        let (a, b) = (a[i].into(), b[i].into());
        *place = Some(Rounding {
            step,
            a,
            b,
            single: true,
        });
    }
    roundings
}

/// Lanes of doubles, from the lowest, one for each step.
pub(super) fn doubles<const N: usize>(steps: [Step; N], a: u128, b: u128) -> Roundings {
    let (a, b): ([u64; 2], [u64; 2]) = (must_cast(a), must_cast(b));
    let mut roundings = Roundings::default();
    for (i, (place, step)) in roundings.0.iter_mut().zip(steps).take(2).enumerate() {
        *place = Some(Rounding {
            step,
            a: a[i],
            b: b[i],
            single: false,
        });
    }
    roundings
}

impl Rounding {
    /// Executes the lane alone, for the flags that it leaves in MXCSR.
    pub(super) fn execute(self) {
        let (a, b) = (u128::from(self.a), u128::from(self.b));
        match (self.step, self.single) {
            (Step::Add, true) => host::addss(a, b),
            (Step::Add, false) => host::addsd(a, b),
            (Step::Subtract, true) => host::subss(a, b),
            (Step::Subtract, false) => host::subsd(a, b),
            (Step::Multiply, true) => host::mulss(a, b),
            (Step::Multiply, false) => host::mulsd(a, b),
            (Step::Divide, true) => host::divss(a, b),
            (Step::Divide, false) => host::divsd(a, b),
            (Step::Narrow, _) => host::cvtsd2ss(0, a),
        };
    }

    /// Whether rounding to the result's precision changes the value, whatever its exponent.
    /// `rounding` is MXCSR's rounding control.
    pub(super) fn is_inexact(self, rounding: u32) -> bool {
        const ONE: u64 = 0x3ff0_0000_0000_0000;
        let single = self.single || self.step == Step::Narrow;
        let b = if self.step == Step::Narrow {
            ONE
        } else {
            self.b
        };
        host::x87_is_inexact(
            self.step,
            extended(self.a, self.single),
            extended(b, self.single),
            single,
            rounding,
        )
    }
}

/// A finite single or double in the x87 format of 80 bits, where it is always normal.
fn extended(bits: u64, single: bool) -> u128 {
    let (fraction_bits, exponent_bits) = if single { (23, 8) } else { (52, 11) };
    let sign = bits >> (fraction_bits + exponent_bits) & 1;
    let exponent = bits >> fraction_bits & ((1 << exponent_bits) - 1);
    let fraction = bits & ((1 << fraction_bits) - 1);
    let bias = (1i64 << (exponent_bits - 1)) - 1;
    let significand = if exponent == 0 {
        fraction
    } else {
        fraction | 1 << fraction_bits
    };
    if significand == 0 {
        return u128::from(sign) << 79;
    }
    let shift = significand.leading_zeros();
    // The weight of the significand's lowest bit, then of the top bit of 64.
    let lowest = exponent.max(1) as i64 - bias - i64::from(fraction_bits);
    let top = lowest + 63 - i64::from(shift);
    let field = (top + 16383) as u128 | u128::from(sign) << 15;
    field << 64 | u128::from(significand << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inexact(step: Step, a: f64, b: f64) -> bool {
        let (a, b) = (a.to_bits(), b.to_bits());
        Rounding {
            step,
            a,
            b,
            single: false,
        }
        .is_inexact(0)
    }

    #[test]
    fn a_result_beyond_the_exponents_is_exact_if_its_digits_fit() {
        assert!(!inexact(Step::Multiply, f64::MAX, 2.0));
        assert!(inexact(Step::Multiply, f64::MAX, f64::MAX));
        assert!(!inexact(Step::Add, f64::MAX, f64::MAX));
        assert!(inexact(Step::Subtract, -f64::MAX, f64::MAX / 4.0));
        assert!(!inexact(Step::Divide, f64::MIN_POSITIVE, 4.0));
        assert!(inexact(Step::Divide, f64::MIN_POSITIVE, 3.0));
        // The smallest denormal, halved.
        assert!(!inexact(Step::Multiply, f64::from_bits(1), 0.5));
        assert!(!inexact(Step::Narrow, 2f64.powi(200), 0.0));
        assert!(inexact(
            Step::Narrow,
            2f64.powi(200) * (1.0 + 2f64.powi(-30)),
            0.0
        ));
    }
}
