//! Arithmetic, logic and comparison of packed integers, and logic of packed floating point, which
//! is the same.

use super::host;
use super::operand::{binary, binary_immediate, by_shape, unary};
use crate::form::Form;
use crate::op::Handler;
use iced_x86::Mnemonic as M;

/// The handler for an instruction of this subject.
pub(super) fn select(form: &Form) -> Option<Handler> {
    Some(match form.mnemonic {
        M::Pand | M::Vpand | M::Andps | M::Vandps | M::Andpd | M::Vandpd => {
            binary!(form, Aligned, |a: u128, b: u128| a & b)
        }
        M::Pandn | M::Vpandn | M::Andnps | M::Vandnps | M::Andnpd | M::Vandnpd => {
            binary!(form, Aligned, |a: u128, b: u128| !a & b)
        }
        M::Por | M::Vpor | M::Orps | M::Vorps | M::Orpd | M::Vorpd => {
            binary!(form, Aligned, |a: u128, b: u128| a | b)
        }
        M::Pxor | M::Vpxor | M::Xorps | M::Vxorps | M::Xorpd | M::Vxorpd => {
            binary!(form, Aligned, |a: u128, b: u128| a ^ b)
        }
        M::Paddb | M::Vpaddb => binary!(form, Aligned, host::paddb),
        M::Paddw | M::Vpaddw => binary!(form, Aligned, host::paddw),
        M::Paddd | M::Vpaddd => binary!(form, Aligned, host::paddd),
        M::Paddq | M::Vpaddq => binary!(form, Aligned, host::paddq),
        M::Paddsb | M::Vpaddsb => binary!(form, Aligned, host::paddsb),
        M::Paddsw | M::Vpaddsw => binary!(form, Aligned, host::paddsw),
        M::Paddusb | M::Vpaddusb => binary!(form, Aligned, host::paddusb),
        M::Paddusw | M::Vpaddusw => binary!(form, Aligned, host::paddusw),
        M::Psubb | M::Vpsubb => binary!(form, Aligned, host::psubb),
        M::Psubw | M::Vpsubw => binary!(form, Aligned, host::psubw),
        M::Psubd | M::Vpsubd => binary!(form, Aligned, host::psubd),
        M::Psubq | M::Vpsubq => binary!(form, Aligned, host::psubq),
        M::Psubsb | M::Vpsubsb => binary!(form, Aligned, host::psubsb),
        M::Psubsw | M::Vpsubsw => binary!(form, Aligned, host::psubsw),
        M::Psubusb | M::Vpsubusb => binary!(form, Aligned, host::psubusb),
        M::Psubusw | M::Vpsubusw => binary!(form, Aligned, host::psubusw),
        M::Pmulhuw | M::Vpmulhuw => binary!(form, Aligned, host::pmulhuw),
        M::Pmulhw | M::Vpmulhw => binary!(form, Aligned, host::pmulhw),
        M::Pmullw | M::Vpmullw => binary!(form, Aligned, host::pmullw),
        M::Pmuludq | M::Vpmuludq => binary!(form, Aligned, host::pmuludq),
        M::Pmaddwd | M::Vpmaddwd => binary!(form, Aligned, host::pmaddwd),
        M::Psadbw | M::Vpsadbw => binary!(form, Aligned, host::psadbw),
        M::Pavgb | M::Vpavgb => binary!(form, Aligned, host::pavgb),
        M::Pavgw | M::Vpavgw => binary!(form, Aligned, host::pavgw),
        M::Pmaxsw | M::Vpmaxsw => binary!(form, Aligned, host::pmaxsw),
        M::Pmaxub | M::Vpmaxub => binary!(form, Aligned, host::pmaxub),
        M::Pminsw | M::Vpminsw => binary!(form, Aligned, host::pminsw),
        M::Pminub | M::Vpminub => binary!(form, Aligned, host::pminub),
        M::Pcmpeqb | M::Vpcmpeqb => binary!(form, Aligned, host::pcmpeqb),
        M::Pcmpeqw | M::Vpcmpeqw => binary!(form, Aligned, host::pcmpeqw),
        M::Pcmpeqd | M::Vpcmpeqd => binary!(form, Aligned, host::pcmpeqd),
        M::Pcmpgtb | M::Vpcmpgtb => binary!(form, Aligned, host::pcmpgtb),
        M::Pcmpgtw | M::Vpcmpgtw => binary!(form, Aligned, host::pcmpgtw),
        M::Pcmpgtd | M::Vpcmpgtd => binary!(form, Aligned, host::pcmpgtd),
        M::Phaddw | M::Vphaddw => binary!(form, Aligned, host::phaddw),
        M::Phaddd | M::Vphaddd => binary!(form, Aligned, host::phaddd),
        M::Phaddsw | M::Vphaddsw => binary!(form, Aligned, host::phaddsw),
        M::Phsubw | M::Vphsubw => binary!(form, Aligned, host::phsubw),
        M::Phsubd | M::Vphsubd => binary!(form, Aligned, host::phsubd),
        M::Phsubsw | M::Vphsubsw => binary!(form, Aligned, host::phsubsw),
        M::Pmaddubsw | M::Vpmaddubsw => binary!(form, Aligned, host::pmaddubsw),
        M::Pmulhrsw | M::Vpmulhrsw => binary!(form, Aligned, host::pmulhrsw),
        M::Psignb | M::Vpsignb => binary!(form, Aligned, host::psignb),
        M::Psignw | M::Vpsignw => binary!(form, Aligned, host::psignw),
        M::Psignd | M::Vpsignd => binary!(form, Aligned, host::psignd),
        M::Pabsb | M::Vpabsb => unary!(form, Aligned, host::pabsb),
        M::Pabsw | M::Vpabsw => unary!(form, Aligned, host::pabsw),
        M::Pabsd | M::Vpabsd => unary!(form, Aligned, host::pabsd),
        M::Pmuldq | M::Vpmuldq => binary!(form, Aligned, host::pmuldq),
        M::Pmulld | M::Vpmulld => binary!(form, Aligned, host::pmulld),
        M::Pcmpeqq | M::Vpcmpeqq => binary!(form, Aligned, host::pcmpeqq),
        M::Pmaxsb | M::Vpmaxsb => binary!(form, Aligned, host::pmaxsb),
        M::Pmaxsd | M::Vpmaxsd => binary!(form, Aligned, host::pmaxsd),
        M::Pmaxud | M::Vpmaxud => binary!(form, Aligned, host::pmaxud),
        M::Pmaxuw | M::Vpmaxuw => binary!(form, Aligned, host::pmaxuw),
        M::Pminsb | M::Vpminsb => binary!(form, Aligned, host::pminsb),
        M::Pminsd | M::Vpminsd => binary!(form, Aligned, host::pminsd),
        M::Pminud | M::Vpminud => binary!(form, Aligned, host::pminud),
        M::Pminuw | M::Vpminuw => binary!(form, Aligned, host::pminuw),
        M::Phminposuw | M::Vphminposuw => unary!(form, Aligned, host::phminposuw),
        M::Mpsadbw | M::Vmpsadbw => binary_immediate!(form, Aligned, host::mpsadbw, 3),
        M::Ptest | M::Vptest => by_shape!(pair, form, Aligned, X => super::compare::test::<X>),
        M::Pcmpgtq | M::Vpcmpgtq => binary!(form, Aligned, host::pcmpgtq),
        _ => return None,
    })
}
