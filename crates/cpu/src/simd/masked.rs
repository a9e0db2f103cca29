//! Masked moves of AVX: elements whose mask is clear are neither read nor written, and do not fault.

use super::operand::{Lanes, One, Two};
use crate::core_state::Core;
use crate::form::{Form, Kind};
use crate::int::Int;
use crate::op::{Handler, Op, offset};
use crate::trap::Trap;
use iced_x86::Mnemonic as M;

/// A handler of a masked load or store of elements of a type.
macro_rules! masked {
    ($form:expr, $type:ty) => {
        match ($form.kinds[0], $form.is_wide()) {
            (Kind::Mem, false) => store::<One, $type>,
            (Kind::Mem, true) => store::<Two, $type>,
            (_, false) => load::<One, $type>,
            (_, true) => load::<Two, $type>,
        }
    };
}

/// The handler for an instruction of this subject.
pub(super) fn select(form: &Form) -> Option<Handler> {
    Some(match form.mnemonic {
        M::Vmaskmovps | M::Vpmaskmovd => masked!(form, u32),
        M::Vmaskmovpd | M::Vpmaskmovq => masked!(form, u64),
        _ => return None,
    })
}

/// An element of the lanes of a register, by its number.
pub(super) fn element<T: Int>(core: &Core, register: u8, number: u64) -> T {
    let [low, high] = Two::get(core, register);
    let at = number as u32 * T::BITS;
    let lane = if at < 128 { low } else { high };
    T::truncate((lane >> (at & 127)) as u64)
}

/// Whether an element of a mask has its top bit set.
pub(super) fn is_set<T: Int>(core: &Core, mask: u8, number: u64) -> bool {
    element::<T>(core, mask, number).sign()
}

/// The linear address of an element of the memory operand.
fn address<T: Int>(core: &mut Core, op: &Op, number: u64, write: bool) -> Result<u64, Trap> {
    let at = offset(core, op).wrapping_add(number * T::BYTES) & op.address_mask();
    core.linear(op.seg, at, T::BYTES, write)
}

/// Elements whose mask is clear become zero.
fn load<V: Lanes, T: Int>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let count = V::BYTES / T::BYTES;
    let mask = op.src;
    let mut lanes = [0u128; 2];
    for i in 0..count {
        if is_set::<T>(core, mask, i) {
            let linear = address::<T>(core, op, i, false)?;
            let value: T = core.load(linear)?;
            let at = i as u32 * T::BITS;
            lanes[at as usize / 128] |= u128::from(value.zero_extend()) << (at & 127);
        }
    }
    lanes.put_cleared(core, op.dst);
    Ok(())
}

fn store<V: Lanes, T: Int>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let count = V::BYTES / T::BYTES;
    let (mask, source) = (op.src, op.aux);
    // Nothing is written unless all of it can be.
    for i in 0..count {
        if is_set::<T>(core, mask, i) {
            let linear = address::<T>(core, op, i, true)?;
            core.touch_write(linear, T::BYTES)?;
        }
    }
    for i in 0..count {
        if is_set::<T>(core, mask, i) {
            let linear = address::<T>(core, op, i, true)?;
            let value: T = element(core, source, i);
            core.store(linear, value)?;
        }
    }
    Ok(())
}
