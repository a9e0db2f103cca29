//! Values for registers, branch targets and displacements that lead where something is to see.

use crate::case::{Case, seg};
use crate::encoding::decode;
use crate::forms::Mode;
use crate::layout::selector;
use crate::rng::Rng;
use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register, UsedMemory};

/// An offset to go to: mostly within 64 KiB, where breakpoints are, and never where the instruction
/// itself may lie.
pub fn near_target(rng: &mut Rng, wide: bool) -> u64 {
    match rng.below(20) {
        0 if wide => rng.next() & 0xffff_ffff,
        1 => 0xffff,
        _ => 0x9000 + rng.below(0x6000),
    }
}

/// A selector for a data or code segment: where it is loaded something is known to lie.
pub fn pick_selector(mode: Mode, code: bool, rng: &mut Rng) -> u16 {
    let level = match mode {
        Mode::Real | Mode::Virtual => {
            return if code {
                0x1000 + rng.below(0x100) as u16
            } else {
                rng.pick(&[0x2000, 0x3000, 0x4000, 0x5000, 0x6000]) + rng.below(4) as u16
            };
        }
        Mode::Protected(_, level) => u16::from(level),
    };
    let slot = |register: usize| selector::SLOTS + 8 * register as u16;
    match rng.below(10) {
        0 => rng.below(4) as u16,
        1 => rng.below(0x100) as u16,
        2 if !code => slot(seg::CS) | level,
        3 => rng.below(0x1_0000) as u16,
        4..=6 if !code => slot(seg::SS) | level,
        _ if code => slot(seg::CS) | level,
        _ => slot(rng.pick(&[seg::ES, seg::DS, seg::FS, seg::GS])) | level,
    }
}

pub fn read(case: &Case, register: Register) -> u64 {
    let value = case.gpr[register.full_register32().number()];
    if register.size() == 2 {
        value & 0xffff
    } else {
        value & 0xffff_ffff
    }
}

pub fn set(case: &mut Case, register: Register, value: u64) {
    if register.is_gpr() && register.size() >= 2 {
        let place = &mut case.gpr[register.full_register32().number()];
        *place = if register.size() == 2 {
            *place & 0xffff_0000 | value & 0xffff
        } else {
            value & 0xffff_ffff
        };
    }
}

/// What a bit string instruction adds to its operand's address.
pub fn bit_offset(case: &Case, instruction: &Instruction) -> u64 {
    use Mnemonic as M;
    if !matches!(instruction.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc)
        || instruction.op1_kind() != OpKind::Register
    {
        return 0;
    }
    let value = read(case, instruction.op1_register());
    if instruction.op1_register().size() == 2 {
        ((i64::from(value as i16) >> 4) * 2) as u64
    } else {
        ((i64::from(value as i32) >> 5) * 4) as u64
    }
}

/// Values that make more of an instruction's cases likely than chance would.
pub fn narrow(case: &mut Case, instruction: &Instruction, rng: &mut Rng) {
    use Mnemonic as M;
    let gpr = &mut case.gpr;
    if instruction.has_rep_prefix() || instruction.has_repne_prefix() {
        // Only a 16-bit count ignores the rest.
        gpr[1] = rng.below(40);
    }
    match instruction.mnemonic() {
        M::Loop | M::Loope | M::Loopne | M::Jcxz | M::Jecxz if rng.chance(60) => {
            gpr[1] = gpr[1] & 0xffff_0000 | rng.below(3);
        }
        M::Div | M::Idiv if rng.chance(70) => {
            gpr[2] = rng.below(3);
            if instruction.op0_kind() != OpKind::Memory && instruction.op0_register().size() == 1 {
                gpr[0] &= 0x7ff;
            }
        }
        M::Bt | M::Bts | M::Btr | M::Btc
            if instruction.op0_kind() == OpKind::Memory
                && instruction.op1_kind() == OpKind::Register =>
        {
            let full = instruction.op1_register().full_register32().number();
            gpr[full] = rng.below(0x400).wrapping_sub(0x200) & 0xffff_ffff;
        }
        M::Enter => gpr[5] = 0x8100 + rng.below(0x40) * 2,
        M::Leave if rng.chance(90) => gpr[5] = 0x8100 - rng.below(0x40) * 2,
        M::Cmpxchg if instruction.op0_kind() == OpKind::Register && rng.chance(50) => {
            gpr[instruction.op0_register().full_register32().number()] = gpr[0];
        }
        _ => {}
    }
}

/// Changes the displacement of an operand without base so that it leads to `offset`.
pub fn aim_displacement(
    case: &mut Case,
    bytes: &mut [u8],
    instruction: &mut Instruction,
    memory: &UsedMemory,
    offset: u64,
    mode: Mode,
) {
    let bitness = mode.bitness();
    let scaled = if memory.index() == Register::None {
        0
    } else {
        read(case, memory.index()).wrapping_mul(u64::from(memory.scale()))
    };
    let displacement = offset
        .wrapping_sub(scaled)
        .wrapping_sub(bit_offset(case, instruction));
    let mut decoder = Decoder::with_ip(bitness, bytes, instruction.ip(), DecoderOptions::NONE);
    let decoded = decoder.decode();
    let offsets = decoder.get_constant_offsets(&decoded);
    if offsets.has_displacement() {
        let (at, size) = (offsets.displacement_offset(), offsets.displacement_size());
        bytes[at..at + size].copy_from_slice(&displacement.to_le_bytes()[..size]);
        *instruction = decode(bytes, bitness, instruction.ip());
    }
}
