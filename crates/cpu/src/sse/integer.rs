//! Arithmetic, logic and comparison of packed integers, and logic of packed floating point, which
//! is the same.

use super::operand::{binary, by_source, unary};
use super::{Host, host};
use crate::form::Form;
use crate::op::Handler;
use iced_x86::Mnemonic as M;

/// The handler for an instruction of this subject.
pub(super) fn select(form: &Form, host_has: Host) -> Option<Handler> {
    Some(match form.mnemonic {
        M::Pand | M::Andps | M::Andpd => binary!(form, Aligned, |a: u128, b: u128| a & b),
        M::Pandn | M::Andnps | M::Andnpd => binary!(form, Aligned, |a: u128, b: u128| !a & b),
        M::Por | M::Orps | M::Orpd => binary!(form, Aligned, |a: u128, b: u128| a | b),
        M::Pxor | M::Xorps | M::Xorpd => binary!(form, Aligned, |a: u128, b: u128| a ^ b),
        M::Paddb => binary!(form, Aligned, host::paddb),
        M::Paddw => binary!(form, Aligned, host::paddw),
        M::Paddd => binary!(form, Aligned, host::paddd),
        M::Paddq => binary!(form, Aligned, host::paddq),
        M::Paddsb => binary!(form, Aligned, host::paddsb),
        M::Paddsw => binary!(form, Aligned, host::paddsw),
        M::Paddusb => binary!(form, Aligned, host::paddusb),
        M::Paddusw => binary!(form, Aligned, host::paddusw),
        M::Psubb => binary!(form, Aligned, host::psubb),
        M::Psubw => binary!(form, Aligned, host::psubw),
        M::Psubd => binary!(form, Aligned, host::psubd),
        M::Psubq => binary!(form, Aligned, host::psubq),
        M::Psubsb => binary!(form, Aligned, host::psubsb),
        M::Psubsw => binary!(form, Aligned, host::psubsw),
        M::Psubusb => binary!(form, Aligned, host::psubusb),
        M::Psubusw => binary!(form, Aligned, host::psubusw),
        M::Pmulhuw => binary!(form, Aligned, host::pmulhuw),
        M::Pmulhw => binary!(form, Aligned, host::pmulhw),
        M::Pmullw => binary!(form, Aligned, host::pmullw),
        M::Pmuludq => binary!(form, Aligned, host::pmuludq),
        M::Pmaddwd => binary!(form, Aligned, host::pmaddwd),
        M::Psadbw => binary!(form, Aligned, host::psadbw),
        M::Pavgb => binary!(form, Aligned, host::pavgb),
        M::Pavgw => binary!(form, Aligned, host::pavgw),
        M::Pmaxsw => binary!(form, Aligned, host::pmaxsw),
        M::Pmaxub => binary!(form, Aligned, host::pmaxub),
        M::Pminsw => binary!(form, Aligned, host::pminsw),
        M::Pminub => binary!(form, Aligned, host::pminub),
        M::Pcmpeqb => binary!(form, Aligned, host::pcmpeqb),
        M::Pcmpeqw => binary!(form, Aligned, host::pcmpeqw),
        M::Pcmpeqd => binary!(form, Aligned, host::pcmpeqd),
        M::Pcmpgtb => binary!(form, Aligned, host::pcmpgtb),
        M::Pcmpgtw => binary!(form, Aligned, host::pcmpgtw),
        M::Pcmpgtd => binary!(form, Aligned, host::pcmpgtd),
        _ if host_has.ssse3 => return select_ssse3(form).or_else(|| select_sse4(form, host_has)),
        _ => return None,
    })
}

fn select_ssse3(form: &Form) -> Option<Handler> {
    Some(match form.mnemonic {
        M::Phaddw => binary!(form, Aligned, host::phaddw),
        M::Phaddd => binary!(form, Aligned, host::phaddd),
        M::Phaddsw => binary!(form, Aligned, host::phaddsw),
        M::Phsubw => binary!(form, Aligned, host::phsubw),
        M::Phsubd => binary!(form, Aligned, host::phsubd),
        M::Phsubsw => binary!(form, Aligned, host::phsubsw),
        M::Pmaddubsw => binary!(form, Aligned, host::pmaddubsw),
        M::Pmulhrsw => binary!(form, Aligned, host::pmulhrsw),
        M::Psignb => binary!(form, Aligned, host::psignb),
        M::Psignw => binary!(form, Aligned, host::psignw),
        M::Psignd => binary!(form, Aligned, host::psignd),
        M::Pabsb => unary!(form, Aligned, host::pabsb),
        M::Pabsw => unary!(form, Aligned, host::pabsw),
        M::Pabsd => unary!(form, Aligned, host::pabsd),
        _ => return None,
    })
}

fn select_sse4(form: &Form, host_has: Host) -> Option<Handler> {
    if !host_has.sse41 {
        return None;
    }
    Some(match form.mnemonic {
        M::Pmuldq => binary!(form, Aligned, host::pmuldq),
        M::Pmulld => binary!(form, Aligned, host::pmulld),
        M::Pcmpeqq => binary!(form, Aligned, host::pcmpeqq),
        M::Pmaxsb => binary!(form, Aligned, host::pmaxsb),
        M::Pmaxsd => binary!(form, Aligned, host::pmaxsd),
        M::Pmaxud => binary!(form, Aligned, host::pmaxud),
        M::Pmaxuw => binary!(form, Aligned, host::pmaxuw),
        M::Pminsb => binary!(form, Aligned, host::pminsb),
        M::Pminsd => binary!(form, Aligned, host::pminsd),
        M::Pminud => binary!(form, Aligned, host::pminud),
        M::Pminuw => binary!(form, Aligned, host::pminuw),
        M::Phminposuw => unary!(form, Aligned, host::phminposuw),
        M::Mpsadbw => super::operand::binary_immediate!(form, Aligned, host::mpsadbw),
        M::Ptest => by_source!(form, Aligned, S => super::compare::test::<S>),
        M::Pcmpgtq if host_has.sse42 => binary!(form, Aligned, host::pcmpgtq),
        _ => return None,
    })
}
