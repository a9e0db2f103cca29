//! That every form of the levels that are offered is executed, and no other.

use super::{Host, select};
use crate::form::Form;
use crate::mode::Mode;
use iced_x86::{
    CpuidFeature as F, Decoder, DecoderOptions, EncodingKind, Instruction, OpCodeOperandKind,
    OpKind, Register,
};
use std::collections::BTreeSet;

/// Every 64-bit instruction of the two- and three-byte maps with one mandatory prefix, on registers
/// and on memory.
fn legacy_instructions() -> impl Iterator<Item = Instruction> {
    let prefixes: [&[u8]; 4] = [&[], &[0x66], &[0xf2], &[0xf3]];
    let maps: [&[u8]; 3] = [&[0x0f], &[0x0f, 0x38], &[0x0f, 0x3a]];
    prefixes.into_iter().flat_map(move |prefix| {
        maps.into_iter().flat_map(move |map| {
            (0..=255u8).flat_map(move |opcode| {
                (0..32u8).filter_map(move |variant| {
                    // Eight groups, register or memory, with and without REX.W.
                    let modrm = (variant & 7) << 3 | if variant & 8 != 0 { 0xc1 } else { 0x01 };
                    let mut bytes = prefix.to_vec();
                    if variant & 16 != 0 {
                        bytes.push(0x48);
                    }
                    bytes.extend(map);
                    bytes.extend([opcode, modrm, 0x11]);
                    let instruction = Decoder::new(64, &bytes, DecoderOptions::NONE).decode();
                    (!instruction.is_invalid()).then_some(instruction)
                })
            })
        })
    })
}

/// Every 64-bit instruction in the VEX encoding, on registers, on memory, and on memory with an index
/// register.
fn vex_instructions() -> impl Iterator<Item = Instruction> {
    (0..=255u8).flat_map(|opcode| {
        (0..4 * 2 * 2 * 3 * 2 * 8 * 3u32).filter_map(move |variant| {
            let mut rest = variant;
            let mut choose = |count: u32| {
                let chosen = rest % count;
                rest /= count;
                chosen as u8
            };
            let (prefix, long, wide, map) = (choose(4), choose(2), choose(2), choose(3) + 1);
            // No second source, or register 6, inverted.
            let source = [0xf, 0x9][usize::from(choose(2))];
            let group = choose(8) << 3;
            let mut bytes = vec![0xc4, 0xe0 | map];
            bytes.push(wide << 7 | source << 3 | long << 2 | prefix);
            bytes.push(opcode);
            match choose(3) {
                0 => bytes.extend([group | 0xc1, 0x11]),
                1 => bytes.extend([group | 0x01, 0x11]),
                // Base RCX, index 2.
                _ => bytes.extend([group | 0x04, 0x11, 0x11]),
            }
            let instruction = Decoder::new(64, &bytes, DecoderOptions::NONE).decode();
            (!instruction.is_invalid()).then_some(instruction)
        })
    })
}

fn registers(instruction: &Instruction) -> impl Iterator<Item = Register> {
    (0..instruction.op_count())
        .filter(|&i| instruction.op_kind(i) == OpKind::Register)
        .map(|i| instruction.op_register(i))
}

/// Whether the form is one of the MMX unit, even if this instance of it has a memory operand.
fn is_mmx(instruction: &Instruction) -> bool {
    use OpCodeOperandKind as K;
    instruction
        .op_code()
        .op_kinds()
        .iter()
        .any(|kind| matches!(kind, K::mm_or_mem | K::mm_reg | K::mm_rm))
}

fn form(instruction: Instruction, mode: Mode) -> Form {
    Form::new(instruction, mode)
}

#[test]
fn every_vector_form_of_the_levels_offered_is_executed() {
    let host_has = Host::detected();
    let offered = |feature: F| match feature {
        F::MMX | F::SSE | F::SSE2 => true,
        F::SSE3 => host_has.sse3,
        F::SSSE3 => host_has.ssse3,
        F::SSE4_1 => host_has.sse41,
        F::SSE4_2 => host_has.sse42,
        F::AES => host_has.aes,
        F::PCLMULQDQ => host_has.pclmulqdq,
        F::AVX => host_has.avx,
        F::AVX2 => host_has.avx2,
        F::F16C => host_has.f16c,
        F::FMA => host_has.fma,
        F::VAES => host_has.vaes,
        F::VPCLMULQDQ => host_has.vpclmulqdq,
        _ => false,
    };
    let mode = Mode::CODE64.with(Mode::SSE, true).with(Mode::AVX, true);
    let mut judged = BTreeSet::new();
    let mut vex = BTreeSet::new();
    for instruction in legacy_instructions().chain(vex_instructions()) {
        let vector = is_mmx(&instruction)
            || registers(&instruction).any(|register| register.is_vector_register());
        let executed = select(&form(instruction, mode)).is_some();
        let name = format!("{:?}", instruction.code());
        if vector && instruction.cpuid_features().iter().all(|&f| offered(f)) {
            assert!(executed, "{name} is not executed");
            if instruction.encoding() == EncodingKind::VEX {
                vex.insert(name);
            } else {
                judged.insert(name);
            }
        } else if vector {
            assert!(!executed, "{name} is not offered");
        }
    }
    // 285 with every level. A decoder that stopped seeing them would be noticed.
    assert!(
        judged.len() >= 190,
        "only {} forms were found",
        judged.len()
    );
    // 678 with every level.
    assert!(
        !host_has.avx || vex.len() >= 385,
        "only {} forms of VEX were found",
        vex.len()
    );
}

#[test]
fn the_string_moves_and_compares_of_the_same_name_are_left_alone() {
    for bytes in [[0xa5], [0xa7]] {
        let instruction = Decoder::new(64, &bytes, DecoderOptions::NONE).decode();
        assert!(select(&form(instruction, Mode::CODE64.with(Mode::SSE, true))).is_none());
    }
}
