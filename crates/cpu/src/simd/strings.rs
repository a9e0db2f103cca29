//! The string comparisons of SSE4.2: PCMPISTRI, PCMPISTRM, PCMPESTRI, PCMPESTRM.
//!
//! What is compared with what, and how the outcome is presented, is said by the immediate (SDM
//! Vol. 1, "SSE4.2 Text and String Processing Instructions").

use super::operand::{Lanes as _, Shape, by_shape};
use crate::core_state::Core;
use crate::form::Form;
use crate::op::{Handler, Op};
use crate::state::{gpr, rflags};
use crate::trap::Trap;
use bytemuck::must_cast;
use iced_x86::Mnemonic as M;
use std::array::from_fn;

/// The handler for an instruction of this subject.
pub(super) fn select(form: &Form) -> Option<Handler> {
    Some(match form.mnemonic {
        M::Pcmpistri | M::Vpcmpistri => by_shape!(pair, form, Unaligned, X => index::<X, Implicit>),
        M::Pcmpistrm => by_shape!(pair, form, Unaligned, X => mask::<X, Implicit, false>),
        M::Vpcmpistrm => by_shape!(pair, form, Unaligned, X => mask::<X, Implicit, true>),
        M::Pcmpestri | M::Vpcmpestri => {
            by_shape!(pair, form, Unaligned, X => index::<X, Explicit32>)
        }
        M::Pcmpestrm => by_shape!(pair, form, Unaligned, X => mask::<X, Explicit32, false>),
        M::Vpcmpestrm => by_shape!(pair, form, Unaligned, X => mask::<X, Explicit32, true>),
        M::Pcmpestri64 | M::Vpcmpestri64 => {
            by_shape!(pair, form, Unaligned, X => index::<X, Explicit64>)
        }
        M::Pcmpestrm64 => by_shape!(pair, form, Unaligned, X => mask::<X, Explicit64, false>),
        M::Vpcmpestrm64 => by_shape!(pair, form, Unaligned, X => mask::<X, Explicit64, true>),
        _ => return None,
    })
}

/// The immediate.
#[derive(Clone, Copy)]
struct Control(u8);

impl Control {
    /// Elements are words, not bytes.
    fn words(self) -> bool {
        self.0 & 1 != 0
    }

    /// Elements are signed.
    fn signed(self) -> bool {
        self.0 & 2 != 0
    }

    /// Elements in a vector.
    fn count(self) -> usize {
        if self.words() { 8 } else { 16 }
    }

    /// The vector's elements. Those beyond [`Control::count`] are zero.
    fn elements(self, vector: u128) -> [i32; 16] {
        let bytes: [u8; 16] = must_cast(vector);
        let words: [u16; 8] = must_cast(vector);
        from_fn(|i| match (self.words(), self.signed()) {
            (false, false) => i32::from(bytes[i]),
            (false, true) => i32::from(bytes[i] as i8),
            (true, false) => words.get(i).map_or(0, |&word| i32::from(word)),
            (true, true) => words.get(i).map_or(0, |&word| i32::from(word as i16)),
        })
    }
}

/// How the lengths of both strings are known.
trait Lengths {
    /// Number of valid elements of the first and of the second string.
    fn lengths(core: &Core, control: Control, a: u128, b: u128) -> (usize, usize);
}

/// Up to the first element that is zero.
struct Implicit;
/// EAX and EDX, their absolute values saturated.
struct Explicit32;
/// RAX and RDX, their absolute values saturated.
struct Explicit64;

impl Lengths for Implicit {
    fn lengths(_core: &Core, control: Control, a: u128, b: u128) -> (usize, usize) {
        let length = |vector| {
            let elements = control.elements(vector);
            let valid = &elements[..control.count()];
            valid
                .iter()
                .position(|&element| element == 0)
                .unwrap_or(valid.len())
        };
        (length(a), length(b))
    }
}

impl Lengths for Explicit32 {
    fn lengths(core: &Core, control: Control, _a: u128, _b: u128) -> (usize, usize) {
        let length = |register: usize| {
            let value = core.regs[register] as i32;
            value.unsigned_abs().min(control.count() as u32) as usize
        };
        (length(gpr::RAX), length(gpr::RDX))
    }
}

impl Lengths for Explicit64 {
    fn lengths(core: &Core, control: Control, _a: u128, _b: u128) -> (usize, usize) {
        let length = |register: usize| {
            let value = core.regs[register] as i64;
            value.unsigned_abs().min(control.count() as u64) as usize
        };
        (length(gpr::RAX), length(gpr::RDX))
    }
}

/// One bit for each element of the second string (IntRes2), given the number of valid elements of
/// both.
fn compare(control: Control, a: u128, b: u128, (a_len, b_len): (usize, usize)) -> u32 {
    let count = control.count();
    let (a, b) = (control.elements(a), control.elements(b));
    let all = (1u32 << count) - 1;
    let holds = |j: usize| match control.0 >> 2 & 3 {
        // Equal any: the element is in the set.
        0 => j < b_len && a[..a_len].contains(&b[j]),
        // Ranges: the element is in one of the ranges, each a pair of bounds.
        1 => {
            j < b_len
                && a[..a_len]
                    .chunks_exact(2)
                    .any(|bounds| (bounds[0]..=bounds[1]).contains(&b[j]))
        }
        // Equal each: both ended, or both the same.
        2 => match (j < a_len, j < b_len) {
            (true, true) => a[j] == b[j],
            (a_valid, b_valid) => a_valid == b_valid,
        },
        // Equal ordered: the first string starts here, as far as the vector goes.
        _ => (j..count)
            .zip(&a[..a_len])
            .all(|(k, &element)| k < b_len && b[k] == element),
    };
    let found = (0..count).fold(0, |bits, j| bits | u32::from(holds(j)) << j);
    match control.0 >> 4 & 3 {
        1 => !found & all,
        3 => found ^ ((1u32 << b_len) - 1),
        _ => found,
    }
}

/// Compares and sets the flags. Returns one bit for each element.
fn compare_with_flags<X: Shape, L: Lengths>(
    core: &mut Core,
    op: &Op,
) -> Result<(Control, u32), Trap> {
    let b = X::second(core, op)?.low();
    let a = X::first(core, op).low();
    let control = Control(op.imm as u8);
    let lengths = L::lengths(core, control, a, b);
    let found = compare(control, a, b, lengths);
    let image = (u64::from(found != 0) * rflags::CF)
        | (u64::from(lengths.1 < control.count()) * rflags::ZF)
        | (u64::from(lengths.0 < control.count()) * rflags::SF)
        | (u64::from(found & 1 != 0) * rflags::OF);
    core.flags.set_arithmetic(image);
    Ok((control, found))
}

/// PCMPxSTRI: the number of the first or last element found goes to ECX, the number of elements if
/// none was.
fn index<X: Shape, L: Lengths>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let (control, found) = compare_with_flags::<X, L>(core, op)?;
    let index = if found == 0 {
        control.count() as u32
    } else if control.0 & 0x40 != 0 {
        31 - found.leading_zeros()
    } else {
        found.trailing_zeros()
    };
    core.regs[gpr::RCX] = u64::from(index);
    Ok(())
}

/// PCMPxSTRM: the bits go to XMM0, or are spread to whole elements. `CLEARS` what is above it, as
/// the VEX encoding does.
fn mask<X: Shape, L: Lengths, const CLEARS: bool>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let (control, found) = compare_with_flags::<X, L>(core, op)?;
    let result = if control.0 & 0x40 == 0 {
        u128::from(found)
    } else if control.words() {
        let lanes: [u16; 8] = from_fn(|i| if found >> i & 1 != 0 { u16::MAX } else { 0 });
        must_cast(lanes)
    } else {
        let lanes: [u8; 16] = from_fn(|i| if found >> i & 1 != 0 { u8::MAX } else { 0 });
        must_cast(lanes)
    };
    if CLEARS {
        [result].put_cleared(core, 0);
    } else {
        core.set_xmm(0, result);
    }
    Ok(())
}
