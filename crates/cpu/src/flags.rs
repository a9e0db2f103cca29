//! RFLAGS, with the six arithmetic flags kept in a form that costs little to produce.
//!
//! An arithmetic instruction leaves two words behind instead of six flags: its `result`,
//! sign-extended to 64 bits, and its `carries`, the carries out of chosen bit positions. Each flag
//! is then a few bit operations on the two, without asking which operation or width it was:
//!
//! * ZF: `result` is zero,
//! * SF: bit 63 of `result`, inverted if bit 0 of `carries` is set,
//! * PF: parity of the low byte of `result`, exclusive-or bits 8 to 15 of `carries`,
//! * AF: bit 3 of `carries`,
//! * CF: bit 63 of `carries`, the carry out of the operand's top bit,
//! * OF: bit 63 exclusive-or bit 62, the carry out of and the carry into the top bit.
//!
//! Bits 0 and 8 to 15 of `carries` are zero after an addition; they exist so that any combination
//! of flags (POPF, SAHF) has a representation.

use crate::int::Int;
use crate::state::rflags;

/// Bits of `carries` that have a meaning after an arithmetic instruction.
const CARRY: u64 = 1 << 63;
/// The carry into the top bit.
const CARRY_IN: u64 = 1 << 62;
/// The carry out of bit 3.
const ADJUST: u64 = 1 << 3;

/// RFLAGS.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Flags {
    result: u64,
    carries: u64,
    /// The flags that are not arithmetic, in their places.
    system: u64,
}

impl Flags {
    /// From an RFLAGS image. Bit 1 is forced to one.
    pub(crate) fn from_image(image: u64) -> Self {
        let mut flags = Self {
            result: 0,
            carries: 0,
            system: 0,
        };
        flags.set_image(image);
        flags
    }

    /// The RFLAGS image.
    pub(crate) fn image(&self) -> u64 {
        self.arithmetic() | self.system
    }

    /// Replaces everything.
    pub(crate) fn set_image(&mut self, image: u64) {
        self.set_arithmetic(image);
        self.set_system(image);
    }

    /// The flags that are not arithmetic.
    #[inline(always)]
    pub(crate) fn system(&self) -> u64 {
        self.system
    }

    /// Replaces the flags that are not arithmetic.
    #[inline(always)]
    pub(crate) fn set_system(&mut self, image: u64) {
        self.system = image & !rflags::ARITHMETIC | rflags::ONE;
    }

    /// The arithmetic flags in their places.
    pub(crate) fn arithmetic(&self) -> u64 {
        (u64::from(self.cf()) * rflags::CF)
            | (u64::from(self.pf()) * rflags::PF)
            | (u64::from(self.af()) * rflags::AF)
            | (u64::from(self.zf()) * rflags::ZF)
            | (u64::from(self.sf()) * rflags::SF)
            | (u64::from(self.of()) * rflags::OF)
    }

    /// Replaces the arithmetic flags.
    pub(crate) fn set_arithmetic(&mut self, image: u64) {
        // ZF alone chooses the result, 0 or 1; the deltas bring SF and PF to what they should be.
        let zero = image & rflags::ZF != 0;
        self.result = u64::from(!zero);
        let parity_of_result = zero;
        let sf = image & rflags::SF != 0;
        let pf = image & rflags::PF != 0;
        self.carries = u64::from(sf)
            | u64::from(image & rflags::AF != 0) << 3
            | u64::from(pf != parity_of_result) << 8;
        self.put_cf_of(image & rflags::CF != 0, image & rflags::OF != 0);
    }

    /// After an addition or subtraction of width `T`: `carries` has the carry (or borrow) out of
    /// each bit.
    #[inline(always)]
    pub(crate) fn set_add<T: Int>(&mut self, result: T, carries: T) {
        self.result = result.sign_extend();
        let carries = carries.zero_extend();
        self.carries = if T::BITS == 64 {
            carries & (CARRY | CARRY_IN | ADJUST)
        } else {
            carries << (64 - T::BITS) | carries & ADJUST
        };
    }

    /// After a logical operation: CF, OF and AF are clear.
    #[inline(always)]
    pub(crate) fn set_logic<T: Int>(&mut self, result: T) {
        self.result = result.sign_extend();
        self.carries = 0;
    }

    /// ZF, SF and PF from a result, the others as given.
    #[inline(always)]
    pub(crate) fn set_result<T: Int>(&mut self, result: T, cf: bool, of: bool, af: bool) {
        self.result = result.sign_extend();
        self.carries = u64::from(af) << 3;
        self.put_cf_of(cf, of);
    }

    #[inline(always)]
    fn put_cf_of(&mut self, cf: bool, of: bool) {
        self.carries =
            self.carries & !(CARRY | CARRY_IN) | u64::from(cf) << 63 | u64::from(cf != of) << 62;
    }

    /// Replaces CF and keeps all else.
    #[inline(always)]
    pub(crate) fn set_cf(&mut self, cf: bool) {
        let of = self.of();
        self.put_cf_of(cf, of);
    }

    /// Replaces ZF and keeps all else.
    pub(crate) fn set_zf(&mut self, zf: bool) {
        let image = self.arithmetic() & !rflags::ZF | (u64::from(zf) * rflags::ZF);
        self.set_arithmetic(image);
    }

    /// Replaces OF and keeps all else.
    #[inline(always)]
    pub(crate) fn set_of(&mut self, of: bool) {
        let cf = self.cf();
        self.put_cf_of(cf, of);
    }

    #[inline(always)]
    pub(crate) fn cf(&self) -> bool {
        (self.carries as i64) < 0
    }

    #[inline(always)]
    pub(crate) fn of(&self) -> bool {
        ((self.carries ^ self.carries << 1) as i64) < 0
    }

    #[inline(always)]
    pub(crate) fn zf(&self) -> bool {
        self.result == 0
    }

    #[inline(always)]
    pub(crate) fn sf(&self) -> bool {
        ((self.result ^ self.carries << 63) as i64) < 0
    }

    #[inline(always)]
    pub(crate) fn pf(&self) -> bool {
        ((self.result ^ self.carries >> 8) as u8).count_ones() & 1 == 0
    }

    #[inline(always)]
    pub(crate) fn af(&self) -> bool {
        self.carries & ADJUST != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_combination_of_flags_survives() {
        for bits in 0..1u64 << 12 {
            let image = bits & rflags::ARITHMETIC | rflags::ONE | rflags::IF;
            let flags = Flags::from_image(image);
            assert_eq!(flags.image(), image);
        }
    }

    #[test]
    fn changing_one_flag_leaves_the_others() {
        for bits in 0..1u64 << 12 {
            let image = bits & rflags::ARITHMETIC | rflags::ONE;
            for on in [false, true] {
                let bit = |mask: u64| if on { image | mask } else { image & !mask };
                let mut flags = Flags::from_image(image);
                flags.set_cf(on);
                assert_eq!(flags.image(), bit(rflags::CF));
                let mut flags = Flags::from_image(image);
                flags.set_of(on);
                assert_eq!(flags.image(), bit(rflags::OF));
                let mut flags = Flags::from_image(image);
                flags.set_zf(on);
                assert_eq!(flags.image(), bit(rflags::ZF));
            }
        }
    }
}
