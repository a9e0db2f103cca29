//! FXSAVE and FXRSTOR: x87 and SSE state as one image in memory (SDM Vol. 1, "FXSAVE Area").

use super::mxcsr;
use crate::core_state::Core;
use crate::form::Form;
use crate::op::{Address, Handler, Op, Segmented};
use crate::state::{FpuState, cr0};
use crate::trap::Trap;
use crate::x87;
use iced_x86::Mnemonic as M;

/// Bytes of the image.
const BYTES: u64 = 512;
/// Paragraphs of 16 bytes before the vector registers: two of control words, eight x87 registers.
pub(crate) const BEFORE_VECTORS: usize = 10;
/// Paragraphs that are used in 64-bit mode.
const PARAGRAPHS: usize = BEFORE_VECTORS + 16;
/// The last opcode has 11 bits.
const OPCODE: u16 = 0x7ff;
/// An x87 register has 80 bits; the rest of its paragraph is reserved.
const X87_REGISTER: u128 = u128::MAX >> 48;

/// The handler for an instruction of this subject.
pub(super) fn select(form: &Form) -> Option<Handler> {
    Some(match form.mnemonic {
        M::Fxsave => save::<false>,
        M::Fxsave64 => save::<true>,
        M::Fxrstor => restore::<false>,
        M::Fxrstor64 => restore::<true>,
        _ => return None,
    })
}

/// Vector registers that the current mode has.
pub(crate) fn vector_count(core: &Core) -> usize {
    if core.code64() { 16 } else { 8 }
}

/// The address of the image, after the checks that both instructions make.
fn place(core: &mut Core, op: &Op, write: bool) -> Result<u64, Trap> {
    if core.cr0 & (cr0::EM | cr0::TS) != 0 {
        return Err(core.device_not_available());
    }
    let linear = if write {
        Segmented::for_write(core, op, BYTES)?
    } else {
        Segmented::for_read(core, op, BYTES)?
    };
    if linear & 15 == 0 {
        Ok(linear)
    } else {
        Err(core.general_protection(0))
    }
}

/// The x87 part of an image: control words and registers. `WIDE` images have 64-bit instruction and
/// data pointers, others 32-bit ones and selectors (which are not kept and read as zero). MXCSR's
/// place is zero.
pub(crate) fn encode_x87<const WIDE: bool>(state: &FpuState) -> [u128; BEFORE_VECTORS] {
    let mut image = [0; BEFORE_VECTORS];
    image[0] = u128::from(state.fcw)
        | u128::from(state.fsw) << 16
        | u128::from(state.ftw) << 32
        | u128::from(state.fop) << 48
        | u128::from(state.fip & pointer_mask::<WIDE>()) << 64;
    image[1] = u128::from(state.fdp & pointer_mask::<WIDE>());
    for (paragraph, register) in image[2..].iter_mut().zip(state.st) {
        *paragraph = register & X87_REGISTER;
    }
    image
}

/// What the x87 part of an image says.
pub(crate) fn decode_x87<const WIDE: bool>(image: &[u128; BEFORE_VECTORS], state: &mut FpuState) {
    x87::set_words(state, image[0] as u16, (image[0] >> 16) as u16);
    state.ftw = (image[0] >> 32) as u8;
    state.fop = (image[0] >> 48) as u16 & OPCODE;
    state.fip = (image[0] >> 64) as u64 & pointer_mask::<WIDE>();
    state.fdp = image[1] as u64 & pointer_mask::<WIDE>();
    for (register, paragraph) in state.st.iter_mut().zip(&image[2..]) {
        *register = paragraph & X87_REGISTER;
    }
}

/// MXCSR and its mask as they lie in an image, from byte 24.
pub(crate) fn encode_mxcsr(mxcsr: u32) -> u64 {
    u64::from(mxcsr) | u64::from(mxcsr::EXISTING) << 32
}

/// The image, of which the first 10 + 8 or 10 + 16 paragraphs are used.
fn encode<const WIDE: bool>(state: &FpuState, mxcsr: u32) -> [u128; PARAGRAPHS] {
    let mut image = [0; PARAGRAPHS];
    image[..BEFORE_VECTORS].copy_from_slice(&encode_x87::<WIDE>(state));
    image[1] |= u128::from(encode_mxcsr(mxcsr)) << 64;
    image[BEFORE_VECTORS..].copy_from_slice(&state.xmm);
    image
}

/// What an image says, but for MXCSR. Vector registers beyond the image's keep their values.
fn decode<const WIDE: bool>(image: &[u128], state: &mut FpuState) {
    if let Some((x87, registers)) = image.split_first_chunk() {
        decode_x87::<WIDE>(x87, state);
        state.xmm[..registers.len()].copy_from_slice(registers);
    }
}

/// Bits of a pointer that the image has.
fn pointer_mask<const WIDE: bool>() -> u64 {
    if WIDE { u64::MAX } else { u32::MAX.into() }
}

/// FXSAVE. What is reserved, and the last 96 bytes, is not written.
fn save<const WIDE: bool>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let linear = place(core, op, true)?;
    core.touch_write(linear, BYTES)?;
    let image = encode::<WIDE>(&core.vectors, core.mxcsr());
    let used = BEFORE_VECTORS + vector_count(core);
    for (i, &paragraph) in image[..used].iter().enumerate() {
        core.store(linear.wrapping_add(i as u64 * 16), paragraph)?;
    }
    Ok(())
}

/// FXRSTOR. #GP if MXCSR's image has bits that do not exist.
fn restore<const WIDE: bool>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let linear = place(core, op, false)?;
    let mut image = [0; PARAGRAPHS];
    let used = BEFORE_VECTORS + vector_count(core);
    for (i, paragraph) in image[..used].iter_mut().enumerate() {
        *paragraph = core.load(linear.wrapping_add(i as u64 * 16))?;
    }
    let mxcsr = (image[1] >> 64) as u32;
    if mxcsr::has_reserved_bits(mxcsr) {
        return Err(core.general_protection(0));
    }
    core.set_mxcsr(mxcsr);
    decode::<WIDE>(&image[..used], &mut core.vectors);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> FpuState {
        FpuState {
            fcw: 0x37f,
            fsw: 0x3800,
            ftw: 0x80,
            fop: 0x7ff,
            fip: 0x1234_5678_9abc_def0,
            fdp: 0x0fed_cba9_8765_4321,
            st: std::array::from_fn(|i| u128::MAX << 8 | i as u128),
            xmm: std::array::from_fn(|i| 0x1111_u128 << 96 | i as u128),
            ..FpuState::default()
        }
    }

    fn bytes(image: [u128; PARAGRAPHS]) -> Vec<u8> {
        image
            .iter()
            .flat_map(|paragraph| paragraph.to_le_bytes())
            .collect()
    }

    #[test]
    fn fields_lie_where_the_manual_puts_them() {
        let image = bytes(encode::<true>(&sample(), 0x9fc0));
        assert_eq!(image[0..2], 0x37fu16.to_le_bytes());
        assert_eq!(image[2..4], 0x3800u16.to_le_bytes());
        assert_eq!(image[4..6], [0x80, 0]);
        assert_eq!(image[6..8], 0x7ffu16.to_le_bytes());
        assert_eq!(image[8..16], 0x1234_5678_9abc_def0u64.to_le_bytes());
        assert_eq!(image[16..24], 0x0fed_cba9_8765_4321u64.to_le_bytes());
        assert_eq!(image[24..28], 0x9fc0u32.to_le_bytes());
        assert_eq!(image[28..32], 0xffffu32.to_le_bytes());
        assert_eq!(image[48..50], [1, 0xff]);
        assert_eq!(image[58..64], [0; 6], "an x87 register has ten bytes");
        assert_eq!(image[176], 1, "XMM1");
        assert_eq!(image.len(), 416);
        let narrow = bytes(encode::<false>(&sample(), 0x9fc0));
        assert_eq!(narrow[8..16], 0x9abc_def0u64.to_le_bytes());
        assert_eq!(narrow[16..24], 0x8765_4321u64.to_le_bytes());
    }

    #[test]
    fn what_is_saved_is_restored_and_a_short_image_leaves_the_upper_registers() {
        let image = encode::<true>(&sample(), 0x1f80);
        let mut vectors = sample();
        vectors.xmm = [7; 16];
        vectors.fcw = 0;
        decode::<true>(&image[..BEFORE_VECTORS + 8], &mut vectors);
        assert_eq!(vectors.xmm[..8], sample().xmm[..8]);
        assert_eq!(vectors.xmm[8..], [7; 8]);
        assert_eq!(vectors.fcw, 0x37f);
        assert_eq!(
            encode::<true>(&vectors, 0x1f80)[..BEFORE_VECTORS],
            image[..BEFORE_VECTORS]
        );
    }
}
