//! MMX, SSE to SSE4.2, AES and PCLMULQDQ, AVX, AVX2, FMA and F16C.
//!
//! One file a subject; each has a `select` that gives the handler for a decoded instruction. What
//! an instruction computes is a function over values of 128 bits, most of them the host's own
//! instruction (`host`); handlers fetch operands (`operand`, and `mmx` for its registers), compute on
//! each lane, and store.

mod compare;
mod convert;
#[cfg(test)]
mod coverage;
mod crypto;
mod float;
mod fma;
mod gather;
mod half;
mod host;
pub(crate) mod image;
mod integer;
mod masked;
mod mmx;
mod moves;
pub(crate) mod mxcsr;
mod operand;
mod permute;
mod precision;
mod shifts;
mod shuffle;
mod strings;

pub(crate) use mxcsr::FloatUnit;

use crate::core_state::Core;
use crate::form::{Form, Kind};
use crate::mode::Mode;
use crate::op::{Handler, Op};
use crate::state::{cr0, cr4};
use crate::trap::Trap;
use iced_x86::{CpuidFeature, Mnemonic};

/// The handler for an instruction of this subject. Where SSE is switched off it is one that raises
/// the exception due.
pub(crate) fn select(form: &Form) -> Option<Handler> {
    if let Some(handler) = moves::select_ungated(form).or_else(|| image::select(form)) {
        return Some(handler);
    }
    // The string instructions that share the names MOVSD and CMPSD.
    let masked_store = matches!(
        form.mnemonic,
        Mnemonic::Maskmovq | Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu
    );
    if form.kinds.contains(&Kind::Other) && !masked_store {
        return None;
    }
    let host_has = Host::detected();
    let features = form.instruction.cpuid_features();
    if !features.iter().all(|&feature| host_has.offers(feature)) {
        return None;
    }
    let handler = moves::select(form)
        .or_else(|| mmx::select(form))
        .or_else(|| integer::select(form))
        .or_else(|| float::select(form))
        .or_else(|| convert::select(form))
        .or_else(|| compare::select(form))
        .or_else(|| shuffle::select(form))
        .or_else(|| permute::select(form))
        .or_else(|| shifts::select(form))
        .or_else(|| strings::select(form))
        .or_else(|| crypto::select(form))
        .or_else(|| fma::select(form))
        .or_else(|| half::select(form))
        .or_else(|| masked::select(form))
        .or_else(|| gather::select(form))?;
    if mmx::is_mmx_only(form) {
        return Some(handler);
    }
    let (enabled, otherwise): (_, Handler) = if form.is_vex {
        (Mode::AVX, avx_switched_off)
    } else {
        (Mode::SSE, switched_off)
    };
    Some(if form.mode.has(enabled) {
        handler
    } else {
        otherwise
    })
}

/// AVX is switched off: #UD by the mode, CR4.OSXSAVE or XCR0, else #NM by CR0.TS (SDM Vol. 2,
/// exception classes).
fn avx_switched_off(core: &mut Core, _op: &Op) -> Result<(), Trap> {
    if !core.mode.has(Mode::PROTECTED) || !core.avx_is_enabled() {
        return Err(core.invalid_opcode());
    }
    Err(core.device_not_available())
}

/// SSE is switched off: #UD by CR0.EM or CR4.OSFXSR, else #NM by CR0.TS (SDM Vol. 2, exception
/// classes).
fn switched_off(core: &mut Core, _op: &Op) -> Result<(), Trap> {
    if core.cr0 & cr0::EM != 0 || core.cr4 & cr4::OSFXSR == 0 {
        return Err(core.invalid_opcode());
    }
    Err(core.device_not_available())
}

/// Which vector extensions the host has beyond SSE2. What it lacks is not executed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Host {
    pub(crate) sse3: bool,
    pub(crate) ssse3: bool,
    pub(crate) sse41: bool,
    pub(crate) sse42: bool,
    pub(crate) aes: bool,
    pub(crate) pclmulqdq: bool,
    pub(crate) avx: bool,
    pub(crate) avx2: bool,
    pub(crate) f16c: bool,
    pub(crate) fma: bool,
    pub(crate) vaes: bool,
    pub(crate) vpclmulqdq: bool,
}

impl Host {
    /// Whether an instruction that came with a feature may be executed.
    pub(crate) fn offers(self, feature: CpuidFeature) -> bool {
        use CpuidFeature as F;
        match feature {
            F::MMX | F::SSE | F::SSE2 => true,
            F::SSE3 => self.sse3,
            F::SSSE3 => self.ssse3,
            F::SSE4_1 => self.sse41,
            F::SSE4_2 => self.sse42,
            F::AES => self.aes,
            F::PCLMULQDQ => self.pclmulqdq,
            F::AVX => self.avx,
            F::AVX2 => self.avx2,
            F::F16C => self.f16c,
            F::FMA => self.fma,
            F::VAES => self.vaes,
            F::VPCLMULQDQ => self.vpclmulqdq,
            _ => false,
        }
    }

    /// Asks the host's CPUID (once; the answer is kept). Each level implies the one before, as in
    /// every processor there is.
    ///
    /// Every instruction of the levels given here, and of MMX, SSE and SSE2, is executed, so this is also what a guest's CPUID may offer.
    pub(crate) fn detected() -> Self {
        let sse3 = is_x86_feature_detected!("sse3");
        let ssse3 = sse3 && is_x86_feature_detected!("ssse3");
        let sse41 = ssse3 && is_x86_feature_detected!("sse4.1");
        let sse42 = sse41 && is_x86_feature_detected!("sse4.2");
        let aes = is_x86_feature_detected!("aes");
        let pclmulqdq = is_x86_feature_detected!("pclmulqdq");
        let avx = sse42 && is_x86_feature_detected!("avx");
        let avx2 = avx && is_x86_feature_detected!("avx2");
        Self {
            sse3,
            ssse3,
            sse41,
            sse42,
            aes,
            pclmulqdq,
            avx,
            avx2,
            f16c: avx && is_x86_feature_detected!("f16c"),
            fma: avx2 && is_x86_feature_detected!("fma"),
            vaes: avx2 && aes && is_x86_feature_detected!("vaes"),
            vpclmulqdq: avx2 && pclmulqdq && is_x86_feature_detected!("vpclmulqdq"),
        }
    }
}
