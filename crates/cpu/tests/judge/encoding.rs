//! Bytes that may encode a form.

use crate::rng::Rng;
use iced_x86::{
    Decoder, DecoderOptions, EncodingKind, FlowControl, Instruction, MandatoryPrefix, Mnemonic,
    OpCodeInfo, OpCodeTableKind,
};

/// Bytes that may encode a form: an opcode with random company.
pub fn encode(op: &OpCodeInfo, bitness: u32, rng: &mut Rng) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(24);
    if op.encoding() == EncodingKind::VEX {
        encode_vex(op, bitness, rng, &mut bytes);
        finish(op, rng, &mut bytes);
        return bytes;
    }
    // In 16-bit code the prefix means 32 bits, elsewhere 16.
    let other_size = op.operand_size() == if bitness == 16 { 32 } else { 16 };
    if op.mandatory_prefix() == MandatoryPrefix::P66 || other_size || rng.chance(3) {
        bytes.push(0x66);
    }
    if rng.chance(if op.address_size() == 32 && bitness != 32 {
        100
    } else {
        8
    }) {
        // A 16-bit address in 32-bit code can hardly be aimed.
        if bitness != 32 {
            bytes.push(0x67);
        }
    }
    if rng.chance(10) {
        bytes.push(rng.pick(&[0x65, 0x65, 0x2e, 0x36, 0x3e, 0x26]));
    }
    match op.mandatory_prefix() {
        MandatoryPrefix::PF3 => bytes.push(0xf3),
        MandatoryPrefix::PF2 => bytes.push(0xf2),
        _ => {
            if op.can_use_lock_prefix() && rng.chance(30) {
                bytes.push(0xf0);
            } else if op.can_use_rep_prefix() && rng.chance(40) {
                bytes.push(0xf3);
            } else if op.can_use_repne_prefix() && rng.chance(40) {
                bytes.push(0xf2);
            }
        }
    }
    if bitness == 64 {
        let wide = op.operand_size() == 64 && !op.default_op_size64();
        if wide || rng.chance(60) {
            let w = if rng.chance(5) { !wide } else { wide };
            bytes.push(0x40 | u8::from(w) << 3 | rng.below(8) as u8);
        }
    }
    match op.table() {
        OpCodeTableKind::T0F => bytes.push(0x0f),
        OpCodeTableKind::T0F38 => bytes.extend([0x0f, 0x38]),
        OpCodeTableKind::T0F3A => bytes.extend([0x0f, 0x3a]),
        _ => {}
    }
    let opcode = op.op_code();
    if op.op_code_len() == 2 {
        bytes.push((opcode >> 8) as u8);
    }
    use iced_x86::OpCodeOperandKind as K;
    let in_opcode = op.op_kinds().iter().any(|kind| {
        matches!(
            kind,
            K::r8_opcode | K::r16_opcode | K::r32_opcode | K::r64_opcode | K::sti_opcode
        )
    });
    bytes.push(opcode as u8 | if in_opcode { rng.below(8) as u8 } else { 0 });
    finish(op, rng, &mut bytes);
    bytes
}

/// Prefixes that may stand before VEX, VEX itself and the opcode.
fn encode_vex(op: &OpCodeInfo, bitness: u32, rng: &mut Rng, bytes: &mut Vec<u8>) {
    if bitness == 64 && rng.chance(8) {
        bytes.push(0x67);
    }
    if rng.chance(10) {
        bytes.push(rng.pick(&[0x65, 0x65, 0x2e, 0x36, 0x3e, 0x26]));
    }
    let prefix = match op.mandatory_prefix() {
        MandatoryPrefix::P66 => 1,
        MandatoryPrefix::PF3 => 2,
        MandatoryPrefix::PF2 => 3,
        _ => 0,
    };
    let map = match op.table() {
        OpCodeTableKind::T0F => 1,
        OpCodeTableKind::T0F38 => 2,
        _ => 3,
    };
    let wide = match op.is_wig() {
        true => rng.next() as u8 & 1,
        false => op.w() as u8,
    };
    let long = match op.is_lig() {
        true => rng.next() as u8 & 1,
        false => op.l() as u8,
    };
    // Without a second source the field must be all ones; that there is one shows in the decoder's
    // answer.
    let source = if rng.chance(50) {
        15
    } else {
        rng.next() as u8 & 15
    };
    // The registers' upper bits, inverted. In 32-bit code these are the mode bits of LES and LDS.
    let extend = if bitness == 64 {
        rng.next() as u8 & 7
    } else {
        7
    };
    let source = if bitness == 64 { source } else { source | 8 };
    let last = source << 3 | long << 2 | prefix;
    if map == 1 && wide == 0 && rng.chance(50) {
        bytes.extend([0xc5, extend << 5 & 0x80 | last]);
    } else {
        bytes.extend([0xc4, extend << 5 | map, wide << 7 | last]);
    }
    bytes.push(op.op_code() as u8);
}

/// ModRM and what follows.
fn finish(op: &OpCodeInfo, rng: &mut Rng, bytes: &mut Vec<u8>) {
    let mut modrm = rng.next() as u8;
    if rng.chance(35) {
        modrm |= 0xc0;
    }
    if op.is_group() {
        modrm = modrm & !0x38 | (op.group_index() as u8) << 3;
    }
    if op.is_rm_group() {
        modrm = modrm & !7 | op.rm_group_index() as u8;
    }
    bytes.push(modrm);
    while bytes.len() < 24 {
        bytes.extend((rng.integer() as u32).to_le_bytes());
    }
    bytes.truncate(15);
}

/// The instruction that bytes at `ip` begin with.
pub fn decode(bytes: &[u8], bitness: u32, ip: u64) -> Instruction {
    Decoder::with_ip(bitness, bytes, ip, DecoderOptions::NONE).decode()
}

/// Puts edge values into immediates.
pub fn edit_immediates(
    bytes: &mut [u8],
    instruction: &mut Instruction,
    bitness: u32,
    rng: &mut Rng,
) {
    let mut decoder = Decoder::with_ip(bitness, bytes, instruction.ip(), DecoderOptions::NONE);
    let decoded = decoder.decode();
    let offsets = decoder.get_constant_offsets(&decoded);
    if !offsets.has_immediate() || decoded.flow_control() != FlowControl::Next {
        return;
    }
    let (at, size) = (offsets.immediate_offset(), offsets.immediate_size());
    let before = bytes.to_vec();
    if decoded.mnemonic() == Mnemonic::Enter {
        let frame = (rng.below(64) as u16).to_le_bytes();
        bytes[at..at + 2].copy_from_slice(&frame);
        bytes[at + 2] = rng.below(4) as u8 | if rng.chance(10) { 0x20 } else { 0 };
    } else if rng.chance(40) {
        let value = rng.integer().to_le_bytes();
        bytes[at..at + size.min(8)].copy_from_slice(&value[..size.min(8)]);
    }
    let again = decode(bytes, bitness, instruction.ip());
    // An immediate never decides the form, but for a few that are part of the opcode.
    if again.code() == instruction.code() && again.len() == instruction.len() {
        *instruction = again;
    } else {
        bytes.copy_from_slice(&before);
    }
}
