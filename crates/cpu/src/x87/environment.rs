//! FNSTENV, FLDENV, FNSAVE and FRSTOR: the unit's state in memory, in the four formats that mode and
//! operand size choose from (SDM Vol. 1, "Saving the x87 FPU's State").
//!
//! Selectors of code and data are not kept: they are stored as zero and ignored when loaded, as
//! CPUID says (leaf 7, EBX bit 13). In the formats of real mode, whose pointers are linear
//! addresses, the offsets stand alone for the same reason.

use super::host::{abridged_tags, full_tags};
use super::{initialise, ready, require_unit, set_words, status, top};
use crate::core_state::Core;
use crate::form::Form;
use crate::memory::Datum;
use crate::mode::Mode;
use crate::op::{Address as _, Handler, Op, Segmented};
use crate::state::FpuState;
use crate::trap::Trap;
use iced_x86::Mnemonic as M;

/// The handler for an instruction of this subject.
pub(super) fn select(form: &Form) -> Option<Handler> {
    Some(match (form.mnemonic, form.width) {
        (M::Fnstenv, Narrow::ENVIRONMENT) => store_environment::<Narrow>,
        (M::Fnstenv, _) => store_environment::<Wide>,
        (M::Fldenv, Narrow::ENVIRONMENT) => load_environment::<Narrow>,
        (M::Fldenv, _) => load_environment::<Wide>,
        (M::Fnsave, Narrow::STATE) => save::<Narrow>,
        (M::Fnsave, _) => save::<Wide>,
        (M::Frstor, Narrow::STATE) => restore::<Narrow>,
        (M::Frstor, _) => restore::<Wide>,
        _ => return None,
    })
}

/// Words of an environment.
const WORDS: usize = 7;
/// Bytes of a register.
const REGISTER: usize = 10;
/// Bytes of the registers behind the environment.
const REGISTERS: usize = 8 * REGISTER;
/// Bytes of the largest image.
const LARGEST: usize = Wide::STATE;
/// Bits of the last opcode.
const OPCODE: u32 = 0x7ff;
/// Where real mode's formats have the pointers' upper bits.
const UPPER_SHIFT: u32 = 12;

/// The operand size.
trait Format {
    /// Bytes of a word.
    const WORD: usize;
    /// Bytes of the environment.
    const ENVIRONMENT: usize = WORDS * Self::WORD;
    /// Bytes of the environment and the registers.
    const STATE: usize = Self::ENVIRONMENT + REGISTERS;
    /// Bits of a pointer in real mode's format.
    const LINEAR_BITS: u32;
}

/// 16 bits.
struct Narrow;
/// 32 bits.
struct Wide;

impl Format for Narrow {
    const WORD: usize = 2;
    const LINEAR_BITS: u32 = 20;
}

impl Format for Wide {
    const WORD: usize = 4;
    const LINEAR_BITS: u32 = 32;
}

/// The environment as words of 32 bits, of which the 16-bit formats have the lower halves. What is
/// reserved is all ones.
fn encode<F: Format>(state: &FpuState, protected: bool) -> [u32; WORDS] {
    const RESERVED: u32 = 0xffff_0000;
    let (fip, fdp) = (state.fip as u32, state.fdp as u32);
    let fop = u32::from(state.fop) & OPCODE;
    let pointers = if protected {
        [fip, fop << 16, fdp, RESERVED]
    } else {
        let upper = |pointer: u32| pointer << (32 - F::LINEAR_BITS) >> (32 - F::LINEAR_BITS) >> 16;
        [
            RESERVED | fip,
            upper(fip) << UPPER_SHIFT | fop,
            RESERVED | fdp,
            upper(fdp) << UPPER_SHIFT,
        ]
    };
    [
        RESERVED | u32::from(state.fcw),
        RESERVED | u32::from(state.fsw),
        RESERVED | tags(state),
        pointers[0],
        pointers[1],
        pointers[2],
        pointers[3],
    ]
}

/// What an environment says. The registers stay where they are, so that others are on the stack if
/// its top is another.
fn decode<F: Format>(words: &[u32; WORDS], protected: bool, state: &mut FpuState) {
    let [control, status, tags, instruction, opcode, operand, last] = *words;
    let before = top(state);
    set_words(state, control as u16, status as u16);
    let moved = top(state).wrapping_sub(before) & 7;
    state.st.rotate_left(moved.into());
    state.ftw = abridged_tags(tags);
    let (fip, fdp, fop) = match (protected, F::WORD) {
        // The one format without an opcode.
        (true, 2) => (instruction, operand, 0),
        (true, _) => (instruction, operand, opcode >> 16),
        (false, _) => {
            let whole = |low: u32, high: u32| low & 0xffff | high >> UPPER_SHIFT << 16;
            (whole(instruction, opcode), whole(operand, last), opcode)
        }
    };
    state.fop = (fop & OPCODE) as u16;
    state.fip = fip.into();
    state.fdp = fdp.into();
}

/// The tag word: 0 for a number in normal form, 1 for zero, 2 for anything else, 3 for an empty
/// register.
fn tags(state: &FpuState) -> u32 {
    let top = usize::from(top(state));
    (0..8usize).fold(full_tags(state.ftw), |tags, register| {
        if tags >> (2 * register) & 3 != 0 {
            return tags;
        }
        let value = state.st[register.wrapping_sub(top) & 7];
        let exponent = (value >> 64) as u16 & 0x7fff;
        let significand = value as u64;
        let tag = match exponent {
            0 if significand == 0 => 1,
            1..0x7fff if significand >> 63 != 0 => 0,
            _ => 2,
        };
        tags | tag << (2 * register)
    })
}

fn is_protected(core: &Core) -> bool {
    core.mode.has(Mode::PROTECTED)
}

/// Writes what the mode and the operand size make of the state: the environment, and the registers
/// if `bytes` are more.
fn write<F: Format>(core: &mut Core, op: &Op, bytes: usize) -> Result<(), Trap> {
    let mut image = [0; LARGEST];
    let words = encode::<F>(&core.vectors, is_protected(core));
    for (place, word) in image.chunks_exact_mut(F::WORD).zip(words) {
        place.copy_from_slice(&word.to_le_bytes()[..F::WORD]);
    }
    let registers = image[F::ENVIRONMENT..].chunks_exact_mut(REGISTER);
    for (place, register) in registers.zip(core.vectors.st) {
        place.copy_from_slice(&register.to_le_bytes()[..REGISTER]);
    }
    let linear = Segmented::for_write(core, op, bytes as u64)?;
    core.touch_write(linear, bytes as u64)?;
    each_part(bytes, largest_part::<F>(core), |part| {
        let place = linear.wrapping_add(part.at as u64);
        let value = part.of(&image);
        match part.size {
            8 => core.store(place, value),
            4 => core.store(place, value as u32),
            _ => core.store(place, value as u16),
        }
    })
}

/// Reads an image of so many bytes.
fn read<F: Format>(core: &mut Core, op: &Op, bytes: usize) -> Result<[u8; LARGEST], Trap> {
    fn load<T: Datum + Into<u64>>(core: &mut Core, linear: u64) -> Result<u64, Trap> {
        core.load::<T>(linear).map(Into::into)
    }
    let linear = Segmented::for_read(core, op, bytes as u64)?;
    let mut image = [0; LARGEST];
    each_part(bytes, largest_part::<F>(core), |part| {
        let place = linear.wrapping_add(part.at as u64);
        let value = match part.size {
            8 => load::<u64>(core, place)?,
            4 => load::<u32>(core, place)?,
            _ => load::<u16>(core, place)?,
        };
        image[part.at..part.at + part.size].copy_from_slice(&value.to_le_bytes()[..part.size]);
        Ok(())
    })?;
    Ok(image)
}

/// A part of an image that is accessed at once.
struct Part {
    at: usize,
    size: usize,
}

impl Part {
    /// Its value in an image.
    fn of(&self, image: &[u8; LARGEST]) -> u64 {
        let mut bytes = [0; 8];
        bytes[..self.size].copy_from_slice(&image[self.at..self.at + self.size]);
        u64::from_le_bytes(bytes)
    }
}

/// Bytes that are accessed at once at most: those of one word where alignment is checked, which is
/// that of the words.
fn largest_part<F: Format>(core: &Core) -> usize {
    if core.checks_alignment() { F::WORD } else { 8 }
}

/// The parts of an image of so many bytes, an even number, none larger than `largest`.
fn each_part(
    bytes: usize,
    largest: usize,
    mut access: impl FnMut(Part) -> Result<(), Trap>,
) -> Result<(), Trap> {
    let mut at = 0;
    for size in [8, 4, 2] {
        while size <= largest && bytes - at >= size {
            access(Part { at, size })?;
            at += size;
        }
    }
    Ok(())
}

fn words<F: Format>(image: &[u8; LARGEST]) -> [u32; WORDS] {
    let mut words = [0; WORDS];
    for (word, bytes) in words.iter_mut().zip(image.chunks_exact(F::WORD)) {
        let mut wide = [0; 4];
        wide[..F::WORD].copy_from_slice(bytes);
        *word = u32::from_le_bytes(wide);
    }
    words
}

/// FNSTENV. All exceptions are masked afterwards.
fn store_environment<F: Format>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    require_unit(core)?;
    write::<F>(core, op, F::ENVIRONMENT)?;
    let state = &mut core.vectors;
    set_words(state, state.fcw | status::EXCEPTIONS, state.fsw);
    Ok(())
}

fn load_environment<F: Format>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    ready(core)?;
    let image = read::<F>(core, op, F::ENVIRONMENT)?;
    let protected = is_protected(core);
    decode::<F>(&words::<F>(&image), protected, &mut core.vectors);
    Ok(())
}

/// FNSAVE.
fn save<F: Format>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    require_unit(core)?;
    write::<F>(core, op, F::STATE)?;
    initialise(&mut core.vectors);
    Ok(())
}

fn restore<F: Format>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    ready(core)?;
    let image = read::<F>(core, op, F::STATE)?;
    let protected = is_protected(core);
    decode::<F>(&words::<F>(&image), protected, &mut core.vectors);
    let registers = image[F::ENVIRONMENT..].chunks_exact(REGISTER);
    for (register, bytes) in core.vectors.st.iter_mut().zip(registers) {
        let mut wide = [0; 16];
        wide[..REGISTER].copy_from_slice(bytes);
        *register = u128::from_le_bytes(wide);
    }
    Ok(())
}
