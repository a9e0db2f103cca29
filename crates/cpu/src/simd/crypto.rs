//! AES rounds and carry-less multiplication.

use super::host;
use super::operand::{binary, binary_immediate, unary, unary_immediate};
use crate::form::Form;
use crate::op::Handler;
use bytemuck::must_cast;
use iced_x86::Mnemonic as M;

/// The handler for an instruction of this subject.
pub(super) fn select(form: &Form) -> Option<Handler> {
    Some(match form.mnemonic {
        M::Pclmulqdq | M::Vpclmulqdq => binary_immediate!(form, Aligned, carry_less_product),
        M::Aesenc | M::Vaesenc => binary!(form, Aligned, host::aesenc),
        M::Aesenclast | M::Vaesenclast => binary!(form, Aligned, host::aesenclast),
        M::Aesdec | M::Vaesdec => binary!(form, Aligned, host::aesdec),
        M::Aesdeclast | M::Vaesdeclast => binary!(form, Aligned, host::aesdeclast),
        M::Aesimc | M::Vaesimc => unary!(form, Aligned, host::aesimc),
        M::Aeskeygenassist | M::Vaeskeygenassist => {
            unary_immediate!(form, Aligned, key_generation_assist)
        }
        _ => return None,
    })
}

/// PCLMULQDQ: bits 0 and 4 of the immediate choose a half of each operand.
fn carry_less_product(a: u128, b: u128, halves: u8) -> u128 {
    let a = if halves & 1 != 0 { a >> 64 } else { a };
    let b = if halves & 0x10 != 0 { b >> 64 } else { b };
    host::pclmullqlqdq(a, b)
}

/// AESKEYGENASSIST.
fn key_generation_assist(b: u128, round_constant: u8) -> u128 {
    let b: [u32; 4] = must_cast(b);
    let odd = substitute(b[1]);
    let high = substitute(b[3]);
    let constant = u32::from(round_constant);
    let lanes = [
        odd,
        odd.rotate_right(8) ^ constant,
        high,
        high.rotate_right(8) ^ constant,
    ];
    must_cast(lanes)
}

/// The S-box on each byte: a last round with a key of zero, on a state whose columns are equal so
/// that shifting rows changes nothing.
fn substitute(word: u32) -> u32 {
    host::aesenclast(must_cast([word; 4]), 0) as u32
}
