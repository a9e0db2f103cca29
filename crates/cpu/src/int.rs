//! Operand widths: the integers that instructions work on.

use std::fmt::Debug;
use std::ops::{BitAnd, BitOr, BitXor, Not, Shl, Shr};

/// An operand of 8, 16, 32 or 64 bits.
pub(crate) trait Int:
    Copy
    + Eq
    + Ord
    + Debug
    + Default
    + BitAnd<Output = Self>
    + BitOr<Output = Self>
    + BitXor<Output = Self>
    + Not<Output = Self>
    + Shl<u32, Output = Self>
    + Shr<u32, Output = Self>
    + crate::memory::Datum
{
    /// Width in bits.
    const BITS: u32;
    /// Width in bytes.
    const BYTES: u64 = Self::BITS as u64 / 8;
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;

    /// The low bits of `value`.
    fn truncate(value: u64) -> Self;
    /// Zero-extended to 64 bits.
    fn zero_extend(self) -> u64;
    /// Sign-extended to 64 bits.
    fn sign_extend(self) -> u64;
    /// The top bit.
    fn sign(self) -> bool;
    /// Sum without carry.
    fn add(self, other: Self) -> Self;
    /// Difference without borrow.
    fn sub(self, other: Self) -> Self;
    /// Number of ones.
    fn ones(self) -> u32;
    /// Number of zeros above the highest one.
    fn leading(self) -> u32;
    /// Number of zeros below the lowest one.
    fn trailing(self) -> u32;
    /// Rotated left by less than the width.
    fn rotate(self, by: u32) -> Self;
}

macro_rules! int {
    ($type:ty, $signed:ty) => {
        impl Int for $type {
            const BITS: u32 = <$type>::BITS;
            const ZERO: Self = 0;
            const ONE: Self = 1;

            #[inline(always)]
            fn truncate(value: u64) -> Self {
                value as $type
            }
            #[inline(always)]
            fn zero_extend(self) -> u64 {
                self as u64
            }
            #[inline(always)]
            fn sign_extend(self) -> u64 {
                self as $signed as i64 as u64
            }
            #[inline(always)]
            fn sign(self) -> bool {
                (self as $signed) < 0
            }
            #[inline(always)]
            fn add(self, other: Self) -> Self {
                self.wrapping_add(other)
            }
            #[inline(always)]
            fn sub(self, other: Self) -> Self {
                self.wrapping_sub(other)
            }
            #[inline(always)]
            fn ones(self) -> u32 {
                self.count_ones()
            }
            #[inline(always)]
            fn leading(self) -> u32 {
                self.leading_zeros()
            }
            #[inline(always)]
            fn trailing(self) -> u32 {
                self.trailing_zeros()
            }
            #[inline(always)]
            fn rotate(self, by: u32) -> Self {
                self.rotate_left(by)
            }
        }
    };
}

int!(u8, i8);
int!(u16, i16);
int!(u32, i32);
int!(u64, i64);
