//! Whether a result that overflowed or underflowed was also inexact.
//!
//! Masked overflow and underflow replace the result, and what replaces it is inexact. Unmasked ones
//! are reported with the precision flag of the result as if exponents had no bounds (SDM Vol. 1,
//! "Numeric Overflow Exception", "Numeric Underflow Exception"). Whether that result has more digits
//! than the format is worked out in integers.

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
    /// The first operand, a single, rounded to a half as the immediate, the second, says.
    NarrowHalf,
    /// The product of the first two operands plus the third.
    Fused {
        negate_product: bool,
        negate_addend: bool,
    },
}

/// One lane's operands, as bits of a single or a double.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rounding {
    pub(super) step: Step,
    pub(super) a: u64,
    pub(super) b: u64,
    /// Only of [`Step::Fused`].
    pub(super) c: u64,
    /// Operands are singles.
    pub(super) single: bool,
}

/// What an instruction rounds: at most eight lanes.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Roundings([Option<Rounding>; 8]);

impl Roundings {
    pub(super) fn iter(&self) -> impl Iterator<Item = Rounding> {
        self.0.into_iter().flatten()
    }

    /// Both.
    pub(super) fn and(mut self, others: Self) -> Self {
        let free = self.0.iter_mut().filter(|place| place.is_none());
        for (place, rounding) in free.zip(others.iter()) {
            *place = Some(rounding);
        }
        self
    }
}

/// An instruction whose results neither overflow nor underflow.
pub(super) fn none(_a: u128, _b: u128) -> Roundings {
    Roundings::default()
}

/// Lanes of singles, from the lowest, one for each step.
pub(super) fn singles<const N: usize>(steps: [Step; N], a: u128, b: u128) -> Roundings {
    fused_singles(steps, a, b, 0)
}

/// Lanes of doubles, from the lowest, one for each step.
pub(super) fn doubles<const N: usize>(steps: [Step; N], a: u128, b: u128) -> Roundings {
    fused_doubles(steps, a, b, 0)
}

/// As [`singles`], with a third operand.
pub(super) fn fused_singles<const N: usize>(
    steps: [Step; N],
    a: u128,
    b: u128,
    c: u128,
) -> Roundings {
    let [a, b, c]: [[u32; 4]; 3] = [must_cast(a), must_cast(b), must_cast(c)];
    let mut roundings = Roundings::default();
    for (i, (place, step)) in roundings.0.iter_mut().zip(steps).take(4).enumerate() {
        *place = Some(Rounding {
            step,
            a: a[i].into(),
            b: b[i].into(),
            c: c[i].into(),
            single: true,
        });
    }
    roundings
}

/// As [`doubles`], with a third operand.
pub(super) fn fused_doubles<const N: usize>(
    steps: [Step; N],
    a: u128,
    b: u128,
    c: u128,
) -> Roundings {
    let [a, b, c]: [[u64; 2]; 3] = [must_cast(a), must_cast(b), must_cast(c)];
    let mut roundings = Roundings::default();
    for (i, (place, step)) in roundings.0.iter_mut().zip(steps).take(2).enumerate() {
        *place = Some(Rounding {
            step,
            a: a[i],
            b: b[i],
            c: c[i],
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
            (Step::NarrowHalf, _) => host::vcvtps2ph(a, self.b as u8),
            (
                Step::Fused {
                    negate_product,
                    negate_addend,
                },
                single,
            ) => {
                let sign = u128::from(self.sign_bit());
                let a = if negate_product { a ^ sign } else { a };
                let c = u128::from(self.c);
                let c = if negate_addend { c ^ sign } else { c };
                if single {
                    host::vfmadd213ss(a, b, c)
                } else {
                    host::vfmadd213sd(a, b, c)
                }
            }
        };
    }

    fn sign_bit(self) -> u64 {
        if self.single { 1 << 31 } else { 1 << 63 }
    }

    /// Whether rounding to the result's precision changes the value, whatever its exponent.
    /// `without_denormals`: those among the operands count as zero.
    pub(super) fn is_inexact(self, without_denormals: bool) -> bool {
        let number = |bits| Number::new(bits, self.single, without_denormals);
        let (a, b) = (number(self.a), number(self.b));
        let exact = match self.step {
            Step::Add => a.plus(b),
            Step::Subtract => a.plus(b.negated(true)),
            Step::Multiply => Some(a.times(b)),
            Step::Divide => a.divided_by(b),
            Step::Narrow | Step::NarrowHalf => Some(a),
            Step::Fused {
                negate_product,
                negate_addend,
            } => {
                let product = a.times(b).negated(negate_product);
                product.plus(number(self.c).negated(negate_addend))
            }
        };
        let digits = match self.step {
            Step::NarrowHalf => 11,
            Step::Narrow => 24,
            _ if self.single => 24,
            _ => 53,
        };
        exact.is_none_or(|exact| exact.digits() > digits)
    }
}

/// A number without bounds on its exponent: a significand, odd or zero, times a power of two.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Number {
    negative: bool,
    significand: u128,
    exponent: i32,
}

impl Number {
    /// A finite single or double, or zero for a denormal one if there are to be none.
    fn new(bits: u64, single: bool, without_denormals: bool) -> Self {
        let (fraction_bits, exponent_bits) = if single { (23, 8) } else { (52, 11) };
        let fraction = bits & ((1 << fraction_bits) - 1);
        let field = (bits >> fraction_bits & ((1 << exponent_bits) - 1)) as i32;
        let bias = (1 << (exponent_bits - 1)) - 1;
        let significand = match field {
            0 if without_denormals => 0,
            0 => fraction,
            _ => fraction | 1 << fraction_bits,
        };
        Self {
            negative: bits >> (fraction_bits + exponent_bits) & 1 != 0,
            significand: significand.into(),
            exponent: field.max(1) - bias - fraction_bits,
        }
        .normal()
    }

    /// With an odd significand.
    fn normal(mut self) -> Self {
        if self.significand != 0 {
            let even = self.significand.trailing_zeros();
            self.significand >>= even;
            self.exponent += even as i32;
        }
        self
    }

    /// Binary digits that it takes to write it down.
    fn digits(self) -> u32 {
        u128::BITS - self.significand.leading_zeros()
    }

    fn negated(mut self, on: bool) -> Self {
        self.negative ^= on;
        self
    }

    /// The product; significands have at most 53 digits each.
    fn times(self, other: Self) -> Self {
        Self {
            negative: self.negative ^ other.negative,
            significand: self.significand * other.significand,
            exponent: self.exponent + other.exponent,
        }
    }

    /// The sum, or `None` if it has more digits than any format.
    fn plus(self, other: Self) -> Option<Self> {
        if self.significand == 0 || other.significand == 0 {
            return Some(if self.significand == 0 { other } else { self });
        }
        let (high, low) = if self.exponent >= other.exponent {
            (self, other)
        } else {
            (other, self)
        };
        let distance = (high.exponent - low.exponent) as u32;
        if distance > 0 && distance + high.digits() > 126 {
            // Odd, and far from zero: the lower number has at most 106 digits.
            return None;
        }
        let signed = |number: Self, significand: u128| {
            let value = significand as i128;
            if number.negative { -value } else { value }
        };
        let sum = signed(high, high.significand << distance) + signed(low, low.significand);
        Some(
            Self {
                negative: sum < 0,
                significand: sum.unsigned_abs(),
                exponent: low.exponent,
            }
            .normal(),
        )
    }

    /// The quotient, or `None` if it has no end.
    fn divided_by(self, other: Self) -> Option<Self> {
        let remainder = self.significand.checked_rem(other.significand)?;
        (remainder == 0).then(|| Self {
            negative: self.negative ^ other.negative,
            significand: self.significand / other.significand,
            exponent: self.exponent - other.exponent,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounding(step: Step, a: f64, b: f64, c: f64) -> Rounding {
        let [a, b, c] = [a, b, c].map(f64::to_bits);
        Rounding {
            step,
            a,
            b,
            c,
            single: false,
        }
    }

    fn inexact(step: Step, a: f64, b: f64) -> bool {
        rounding(step, a, b, 0.0).is_inexact(false)
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

    #[test]
    fn a_fused_result_is_rounded_once() {
        let fused = |a, b, c| {
            let step = Step::Fused {
                negate_product: false,
                negate_addend: true,
            };
            rounding(step, a, b, c).is_inexact(false)
        };
        // The square of MAX has twice the digits; without its lower ones it fits.
        let step = f64::EPSILON / 2.0;
        assert!(fused(1.0 - step, 1.0 - step, 0.0));
        assert!(!fused(1.0 - step, 1.0 - step, step * step));
        assert!(fused(f64::MAX, f64::MAX, f64::MIN_POSITIVE));
        assert!(!fused(f64::MAX, 3.0, f64::MAX));
        let step = Step::Fused {
            negate_product: false,
            negate_addend: false,
        };
        let with_denormal = rounding(step, f64::MAX, 2.0, f64::from_bits(1));
        assert!(with_denormal.is_inexact(false));
        assert!(!with_denormal.is_inexact(true));
    }
}
