//! FXSAVE and FXRSTOR: x87 and SSE state as one image in memory (SDM Vol. 1, "FXSAVE Area").

use super::mxcsr;
use crate::core_state::Core;
use crate::form::Form;
use crate::op::{Address, Handler, Op, Segmented};
use crate::state::cr0;
use crate::trap::{Exception, Trap, vector};
use iced_x86::Mnemonic as M;

/// Bytes of the image.
const BYTES: u64 = 512;
/// Paragraphs of 16 bytes before the vector registers: two of control words, eight x87 registers.
const BEFORE_VECTORS: usize = 10;
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
fn vector_count(core: &Core) -> usize {
    if core.code64() { 16 } else { 8 }
}

/// The address of the image, after the checks that both instructions make.
fn place(core: &mut Core, op: &Op, write: bool) -> Result<u64, Trap> {
    if core.cr0 & (cr0::EM | cr0::TS) != 0 {
        return Err(core.raise(Exception {
            vector: vector::NM,
            error_code: None,
            payload: None,
        }));
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

/// FXSAVE, with 64-bit instruction and data pointers or with 32-bit ones and selectors (which are
/// not kept and read as zero). What is reserved, and the last 96 bytes, is not written.
fn save<const WIDE: bool>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let linear = place(core, op, true)?;
    core.touch_write(linear, BYTES)?;
    let mxcsr = core.mxcsr();
    let x87 = &core.vectors.x87;
    let pointer_mask = if WIDE { u64::MAX } else { u64::from(u32::MAX) };
    let mut paragraphs = [0u128; BEFORE_VECTORS + 16];
    paragraphs[0] = u128::from(x87.fcw)
        | u128::from(x87.fsw) << 16
        | u128::from(x87.ftw) << 32
        | u128::from(x87.fop) << 48
        | u128::from(x87.fip & pointer_mask) << 64;
    paragraphs[1] = u128::from(x87.fdp & pointer_mask)
        | u128::from(mxcsr) << 64
        | u128::from(mxcsr::EXISTING) << 96;
    for (paragraph, register) in paragraphs[2..BEFORE_VECTORS].iter_mut().zip(x87.st) {
        *paragraph = register & X87_REGISTER;
    }
    paragraphs[BEFORE_VECTORS..].copy_from_slice(&core.vectors.xmm);
    let used = BEFORE_VECTORS + vector_count(core);
    for (i, &paragraph) in paragraphs[..used].iter().enumerate() {
        core.store(linear.wrapping_add(i as u64 * 16), paragraph)?;
    }
    Ok(())
}

/// FXRSTOR. #GP if MXCSR's image has bits that do not exist.
fn restore<const WIDE: bool>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let linear = place(core, op, false)?;
    let mut paragraphs = [0u128; BEFORE_VECTORS + 16];
    let used = BEFORE_VECTORS + vector_count(core);
    for (i, paragraph) in paragraphs[..used].iter_mut().enumerate() {
        *paragraph = core.load(linear.wrapping_add(i as u64 * 16))?;
    }
    let mxcsr = (paragraphs[1] >> 64) as u32;
    if mxcsr::has_reserved_bits(mxcsr) {
        return Err(core.general_protection(0));
    }
    core.set_mxcsr(mxcsr);
    let pointer_mask = if WIDE { u64::MAX } else { u64::from(u32::MAX) };
    let x87 = &mut core.vectors.x87;
    x87.fcw = paragraphs[0] as u16;
    x87.fsw = (paragraphs[0] >> 16) as u16;
    x87.ftw = (paragraphs[0] >> 32) as u8;
    x87.fop = (paragraphs[0] >> 48) as u16 & 0x7ff;
    x87.fip = (paragraphs[0] >> 64) as u64 & pointer_mask;
    x87.fdp = paragraphs[1] as u64 & pointer_mask;
    for (register, paragraph) in x87.st.iter_mut().zip(&paragraphs[2..BEFORE_VECTORS]) {
        *register = paragraph & X87_REGISTER;
    }
    let vectors = used - BEFORE_VECTORS;
    core.vectors.xmm[..vectors].copy_from_slice(&paragraphs[BEFORE_VECTORS..used]);
    Ok(())
}
