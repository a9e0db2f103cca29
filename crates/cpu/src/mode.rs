//! What decoding depends on, packed into the key of a block.

/// The part of the processor's state that decides what bytes mean and which handlers may run.
/// Blocks decoded under different modes are different blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Mode(u16);

impl Mode {
    /// 64-bit code. If neither this nor [`Mode::CODE32`] is set, 16-bit code.
    pub(crate) const CODE64: Self = Self(1 << 0);
    /// Code with a default operand and address size of 32 bits.
    pub(crate) const CODE32: Self = Self(1 << 1);
    /// PUSH, POP, CALL and the like use ESP, not SP. (In 64-bit code always RSP.)
    pub(crate) const STACK32: Self = Self(1 << 2);
    /// CPL is 3.
    pub(crate) const USER: Self = Self(1 << 3);
    /// SSE instructions may be executed: CR0.EM and TS clear, CR4.OSFXSR set.
    pub(crate) const SSE: Self = Self(1 << 4);
    /// Protected mode without VM: segment registers are loaded from descriptor tables.
    pub(crate) const PROTECTED: Self = Self(1 << 5);
    /// Blocks have one instruction: single stepping, interrupt shadows and instructions that are
    /// being completed.
    pub(crate) const SINGLE: Self = Self(1 << 6);
    /// CR0.TS is set: SSE and x87 raise #NM, not #UD.
    pub(crate) const TASK_SWITCHED: Self = Self(1 << 7);
    /// AVX instructions may be executed: protected mode without VM, CR0.TS clear, CR4.OSXSAVE set,
    /// and XCR0 enables SSE and AVX state.
    pub(crate) const AVX: Self = Self(1 << 8);

    /// Whether every bit of `other` is set.
    #[inline(always)]
    pub(crate) fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// With the bits of `other`, if `on`.
    #[inline(always)]
    pub(crate) fn with(self, other: Self, on: bool) -> Self {
        if on { Self(self.0 | other.0) } else { self }
    }

    /// As a number, for hashing.
    #[inline(always)]
    pub(crate) fn bits(self) -> u64 {
        u64::from(self.0)
    }

    /// Width of code: 16, 32 or 64.
    pub(crate) fn bitness(self) -> u32 {
        if self.has(Self::CODE64) {
            64
        } else if self.has(Self::CODE32) {
            32
        } else {
            16
        }
    }
}
