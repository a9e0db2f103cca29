//! The mode that a processor is in, and what of it decoding depends on, packed into the key of a
//! block.

use crate::core_state::{Core, seg};
use crate::state::{cr0, cr4, efer, rflags};

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

impl Core {
    /// IA32_EFER.LMA: long mode, 64-bit or compatibility.
    pub(crate) fn long_mode(&self) -> bool {
        self.efer & efer::LMA != 0
    }

    /// Running 64-bit code.
    pub(crate) fn code64(&self) -> bool {
        self.long_mode() && self.segment[usize::from(seg::CS)].long
    }

    /// CR0.PE is clear.
    pub(crate) fn real_mode(&self) -> bool {
        self.cr0 & cr0::PE == 0
    }

    /// RFLAGS.VM is set in protected mode.
    pub(crate) fn virtual_8086(&self) -> bool {
        self.flags.system() & rflags::VM != 0
    }

    /// Works out everything that is derived from control registers, CS, SS and the privilege
    /// level. To be called whenever one of them changed.
    pub(crate) fn update_mode(&mut self) {
        self.user = self.cpl == 3;
        let cs = &self.segment[usize::from(seg::CS)];
        let code64 = self.long_mode() && cs.long;
        let sse = self.cr0 & (cr0::EM | cr0::TS) == 0 && self.cr4 & cr4::OSFXSR != 0;
        let protected = !self.real_mode() && !self.virtual_8086();
        let single = self.wants_single();
        self.mode = Mode::default()
            .with(Mode::CODE64, code64)
            .with(Mode::CODE32, !code64 && cs.big)
            .with(
                Mode::STACK32,
                !code64 && self.segment[usize::from(seg::SS)].big,
            )
            .with(Mode::USER, self.user)
            .with(Mode::SSE, sse)
            .with(
                Mode::AVX,
                protected && self.avx_is_enabled() && self.cr0 & cr0::TS == 0,
            )
            .with(Mode::TASK_SWITCHED, self.cr0 & cr0::TS != 0)
            .with(Mode::PROTECTED, protected)
            .with(Mode::SINGLE, single);
        for i in 0..self.segment.len() {
            self.update_segment(i);
        }
        self.update_context();
        self.update_rights();
        // What follows in the block may mean something else now.
        self.stop = true;
    }
}
