//! Arithmetic, logic and comparison of packed integers, and logic of packed floating point, which
//! is the same.

use super::host;
use super::operand::{
    binary, binary_immediate, by_shape, packed, packed_in_order, packed_unary, unary,
};
use crate::form::Form;
use crate::op::Handler;
use iced_x86::Mnemonic as M;

/// The handler for an instruction of this subject.
pub(super) fn select(form: &Form) -> Option<Handler> {
    Some(match form.mnemonic {
        M::Pand | M::Vpand | M::Andps | M::Vandps | M::Andpd | M::Vandpd => {
            packed!(form, |a: u128, b: u128| a & b)
        }
        M::Pandn | M::Vpandn | M::Andnps | M::Vandnps | M::Andnpd | M::Vandnpd => {
            packed!(form, |a: u128, b: u128| !a & b)
        }
        M::Por | M::Vpor | M::Orps | M::Vorps | M::Orpd | M::Vorpd => {
            packed!(form, |a: u128, b: u128| a | b)
        }
        M::Pxor | M::Vpxor | M::Xorps | M::Vxorps | M::Xorpd | M::Vxorpd => {
            packed!(form, |a: u128, b: u128| a ^ b)
        }
        M::Paddb | M::Vpaddb => packed!(form, host::paddb),
        M::Paddw | M::Vpaddw => packed!(form, host::paddw),
        M::Paddd | M::Vpaddd => packed!(form, host::paddd),
        M::Paddq | M::Vpaddq => packed!(form, host::paddq),
        M::Paddsb | M::Vpaddsb => packed!(form, host::paddsb),
        M::Paddsw | M::Vpaddsw => packed!(form, host::paddsw),
        M::Paddusb | M::Vpaddusb => packed!(form, host::paddusb),
        M::Paddusw | M::Vpaddusw => packed!(form, host::paddusw),
        M::Psubb | M::Vpsubb => packed!(form, host::psubb),
        M::Psubw | M::Vpsubw => packed!(form, host::psubw),
        M::Psubd | M::Vpsubd => packed!(form, host::psubd),
        M::Psubq | M::Vpsubq => packed!(form, host::psubq),
        M::Psubsb | M::Vpsubsb => packed!(form, host::psubsb),
        M::Psubsw | M::Vpsubsw => packed!(form, host::psubsw),
        M::Psubusb | M::Vpsubusb => packed!(form, host::psubusb),
        M::Psubusw | M::Vpsubusw => packed!(form, host::psubusw),
        M::Pmulhuw | M::Vpmulhuw => packed!(form, host::pmulhuw),
        M::Pmulhw | M::Vpmulhw => packed!(form, host::pmulhw),
        M::Pmullw | M::Vpmullw => packed!(form, host::pmullw),
        M::Pmuludq | M::Vpmuludq => packed!(form, host::pmuludq),
        M::Pmaddwd | M::Vpmaddwd => packed!(form, host::pmaddwd),
        M::Psadbw | M::Vpsadbw => packed!(form, host::psadbw),
        M::Pavgb | M::Vpavgb => packed!(form, host::pavgb),
        M::Pavgw | M::Vpavgw => packed!(form, host::pavgw),
        M::Pmaxsw | M::Vpmaxsw => packed!(form, host::pmaxsw),
        M::Pmaxub | M::Vpmaxub => packed!(form, host::pmaxub),
        M::Pminsw | M::Vpminsw => packed!(form, host::pminsw),
        M::Pminub | M::Vpminub => packed!(form, host::pminub),
        M::Pcmpeqb | M::Vpcmpeqb => packed!(form, host::pcmpeqb),
        M::Pcmpeqw | M::Vpcmpeqw => packed!(form, host::pcmpeqw),
        M::Pcmpeqd | M::Vpcmpeqd => packed!(form, host::pcmpeqd),
        M::Pcmpgtb | M::Vpcmpgtb => packed!(form, host::pcmpgtb),
        M::Pcmpgtw | M::Vpcmpgtw => packed!(form, host::pcmpgtw),
        M::Pcmpgtd | M::Vpcmpgtd => packed!(form, host::pcmpgtd),
        M::Phaddw | M::Vphaddw => packed_in_order!(form, host::phaddw),
        M::Phaddd | M::Vphaddd => packed_in_order!(form, host::phaddd),
        M::Phaddsw | M::Vphaddsw => packed_in_order!(form, host::phaddsw),
        M::Phsubw | M::Vphsubw => packed_in_order!(form, host::phsubw),
        M::Phsubd | M::Vphsubd => packed_in_order!(form, host::phsubd),
        M::Phsubsw | M::Vphsubsw => packed_in_order!(form, host::phsubsw),
        M::Pmaddubsw | M::Vpmaddubsw => packed!(form, host::pmaddubsw),
        M::Pmulhrsw | M::Vpmulhrsw => packed!(form, host::pmulhrsw),
        M::Psignb | M::Vpsignb => packed!(form, host::psignb),
        M::Psignw | M::Vpsignw => packed!(form, host::psignw),
        M::Psignd | M::Vpsignd => packed!(form, host::psignd),
        M::Pabsb | M::Vpabsb => packed_unary!(form, host::pabsb),
        M::Pabsw | M::Vpabsw => packed_unary!(form, host::pabsw),
        M::Pabsd | M::Vpabsd => packed_unary!(form, host::pabsd),
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
