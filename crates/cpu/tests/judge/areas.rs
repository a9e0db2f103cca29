//! The areas that FXRSTOR and XRSTOR read.

use crate::forms::patch;
use crate::rng::Rng;
use crate::state::{Case, DATA, DATA_BYTES};
use iced_x86::{Instruction, Mnemonic};

const MXCSR: u64 = 24;
const HEADER: u64 = 512;
/// With the AVX component.
pub const BYTES: u64 = 832;
/// With all that a host may have.
const ROOM: u64 = 0xb00;
/// x87, SSE and AVX: what both sides have enabled.
pub const COMPONENTS: u64 = 7;
const COMPACTED: u64 = 1 << 63;

/// Of what it restores, processors read more than they use.
pub fn is_legacy_restore(instruction: &Instruction) -> bool {
    matches!(
        instruction.mnemonic(),
        Mnemonic::Fxrstor | Mnemonic::Fxrstor64
    )
}

pub fn is_restore(instruction: &Instruction) -> bool {
    matches!(
        instruction.mnemonic(),
        Mnemonic::Xrstor | Mnemonic::Xrstor64
    )
}

/// Where an area lies if an operand would lie at `target`: on a boundary of 64 bytes, and either in
/// memory or not. In an area that ends outside memory, processors touch what they like first.
pub fn place_area(target: u64, rng: &mut Rng) -> u64 {
    let aligned = if rng.chance(97) { target & !63 } else { target };
    place_whole(aligned, ROOM)
}

/// Where `bytes` lie if they would begin at `target`, and are all in memory or all outside.
pub fn place_whole(target: u64, bytes: u64) -> u64 {
    let last = DATA + DATA_BYTES as u64 - bytes;
    if (DATA..DATA + DATA_BYTES as u64).contains(&target) {
        target.min(last)
    } else if target.wrapping_add(bytes) > DATA && target < DATA {
        DATA
    } else {
        target
    }
}

/// Makes what FXRSTOR reads: any x87 control, status and tag word, pointers that are addresses, and
/// an MXCSR that is nearly always valid.
pub fn fill_legacy_area(case: &mut Case, target: u64, rng: &mut Rng) {
    let x87 = rng.next() & 0x07ff_00ff_ffff_ffff;
    patch(case, target, &x87.to_le_bytes());
    for pointer in [8, 16] {
        let value = rng.next() >> 17;
        patch(case, target.wrapping_add(pointer), &value.to_le_bytes());
    }
    let mut mxcsr = rng.next() as u32 & 0xffff;
    if rng.chance(3) {
        mxcsr |= 1 << 16;
    }
    patch(case, target.wrapping_add(MXCSR), &mxcsr.to_le_bytes());
}

/// Makes an area to restore from, with a header that is nearly always valid.
pub fn fill_area(case: &mut Case, target: u64, rng: &mut Rng) {
    fill_legacy_area(case, target, rng);
    let mut layout = 0;
    let mut present = rng.next() & COMPONENTS;
    if rng.chance(40) {
        layout = COMPACTED | present | rng.next() & COMPONENTS;
    }
    if rng.chance(3) {
        // A bit of no component that a host may have, or the format.
        layout ^= 1 << (20 + rng.below(44));
    }
    if rng.chance(3) {
        present ^= 1 << 62;
    }
    let mut header = [0; 8];
    (header[0], header[1]) = (present, layout);
    if rng.chance(6) {
        header[2 + rng.below(6) as usize] = 1 << rng.below(64);
    }
    for (at, word) in (0..).step_by(8).zip(header) {
        let place = target.wrapping_add(HEADER + at);
        patch(case, place, &word.to_le_bytes());
    }
}
