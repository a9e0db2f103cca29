//! SSE to SSE4.2, AES and PCLMULQDQ on vector registers, in their legacy encodings.
//!
//! One file a subject; each has a `select` that gives the handler for a decoded instruction. What
//! an instruction computes is a function over values, most of them the host's own instruction
//! (`host`); handlers fetch operands (`operand`), compute and store.
//!
//! The forms on MMX registers are not executed.

mod compare;
mod convert;
#[cfg(test)]
mod coverage;
mod crypto;
mod float;
mod host;
mod image;
mod integer;
mod moves;
mod mxcsr;
mod operand;
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
use crate::trap::{Exception, Trap, vector};
use iced_x86::Mnemonic;

/// The handler for an instruction of this subject. Where SSE is switched off it is one that raises
/// the exception due.
pub(crate) fn select(form: &Form) -> Option<Handler> {
    if let Some(handler) = moves::select_ungated(form).or_else(|| image::select(form)) {
        return Some(handler);
    }
    // MMX registers, and the string instructions that share the names MOVSD and CMPSD.
    if form.kinds.contains(&Kind::Other) && form.mnemonic != Mnemonic::Maskmovdqu {
        return None;
    }
    let host_has = Host::detected();
    let handler = moves::select(form)
        .or_else(|| integer::select(form, host_has))
        .or_else(|| float::select(form, host_has))
        .or_else(|| convert::select(form))
        .or_else(|| compare::select(form))
        .or_else(|| shuffle::select(form, host_has))
        .or_else(|| shifts::select(form))
        .or_else(|| strings::select(form, host_has))
        .or_else(|| crypto::select(form, host_has))?;
    Some(if form.mode.has(Mode::SSE) {
        handler
    } else {
        switched_off
    })
}

/// SSE is switched off: #UD by CR0.EM or CR4.OSFXSR, else #NM by CR0.TS (SDM Vol. 2, exception
/// classes).
fn switched_off(core: &mut Core, _op: &Op) -> Result<(), Trap> {
    if core.cr0 & cr0::EM != 0 || core.cr4 & cr4::OSFXSR == 0 {
        return Err(core.invalid_opcode());
    }
    Err(core.raise(Exception {
        vector: vector::NM,
        error_code: None,
        payload: None,
    }))
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
}

impl Host {
    /// Asks the host's CPUID (once; the answer is kept). Each level implies the one before, as in
    /// every processor there is.
    ///
    /// Every instruction on vector registers of the levels given here, and of SSE and SSE2, is
    /// executed, so this is also what a guest's CPUID may offer.
    pub(crate) fn detected() -> Self {
        let sse3 = is_x86_feature_detected!("sse3");
        let ssse3 = sse3 && is_x86_feature_detected!("ssse3");
        let sse41 = ssse3 && is_x86_feature_detected!("sse4.1");
        let sse42 = sse41 && is_x86_feature_detected!("sse4.2");
        Self {
            sse3,
            ssse3,
            sse41,
            sse42,
            aes: is_x86_feature_detected!("aes"),
            pclmulqdq: is_x86_feature_detected!("pclmulqdq"),
        }
    }
}
