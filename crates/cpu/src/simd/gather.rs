//! Gathers of AVX2: elements loaded from addresses that a vector holds.
//!
//! Elements are loaded from the lowest on, each only if its mask is set. When one faults, those
//! before it are in the destination and their masks are clear, nothing else is changed, and the instruction goes on where
//! it stopped (SDM Vol. 2, VPGATHERDD).

use super::masked::{element, is_set};
use super::operand::{Lanes as _, Two};
use crate::core_state::{Core, slot};
use crate::form::{Form, Kind};
use crate::int::Int;
use crate::op::{Handler, Op};
use crate::trap::Trap;
use iced_x86::Mnemonic as M;

/// A handler of a gather of elements of one type by indices of another.
macro_rules! gather {
    ($form:expr, $element:ty, $index:ty) => {
        if $form.instruction.memory_index().is_ymm() || $form.kinds[0] == Kind::Ymm {
            gather::<$element, $index, 32>
        } else {
            gather::<$element, $index, 16>
        }
    };
}

/// The handler for an instruction of this subject.
pub(super) fn select(form: &Form) -> Option<Handler> {
    Some(match form.mnemonic {
        M::Vpgatherdd | M::Vgatherdps => gather!(form, u32, u32),
        M::Vpgatherdq | M::Vgatherdpd => gather!(form, u64, u32),
        M::Vpgatherqd | M::Vgatherqps => gather!(form, u32, u64),
        M::Vpgatherqq | M::Vgatherqpd => gather!(form, u64, u64),
        _ => return None,
    })
}

/// `BYTES` are those of the wider of both vectors, which says how many elements there are.
fn gather<T: Int, I: Int, const BYTES: u64>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let count = BYTES / T::BYTES.max(I::BYTES);
    let mut result = Two::get(core, op.dst);
    let mut mask = Two::get(core, op.aux);
    let ones = u128::from(u64::MAX >> (64 - T::BITS));
    for i in 0..count {
        if !is_set::<T>(core, op.aux, i) {
            continue;
        }
        match load::<T, I>(core, op, i) {
            Ok(value) => {
                let at = i as u32 * T::BITS;
                let (lane, at) = (at as usize / 128, at & 127);
                result[lane] = result[lane] & !(ones << at) | u128::from(value.zero_extend()) << at;
                mask[lane] &= !(ones << at);
            }
            Err(Trap::Exception) => {
                result.put(core, op.dst);
                mask.put(core, op.aux);
                return Err(Trap::Exception);
            }
            // The hypervisor will have the instruction executed once more, from its beginning.
            Err(trap) => return Err(trap),
        }
    }
    match count * T::BYTES {
        8 => result = [result[0] & u128::from(u64::MAX), 0],
        16 => result[1] = 0,
        _ => {}
    }
    result.put_cleared(core, op.dst);
    [0u128; 2].put_cleared(core, op.aux);
    Ok(())
}

fn load<T: Int, I: Int>(core: &mut Core, op: &Op, number: u64) -> Result<T, Trap> {
    let index: I = element(core, op.index, number);
    let base = core.regs[usize::from(op.base) & (slot::COUNT - 1)];
    let offset = base
        .wrapping_add(index.sign_extend() << (op.scale & 3))
        .wrapping_add(op.disp)
        & op.address_mask();
    let linear = core.linear(op.seg, offset, T::BYTES, false)?;
    core.load(linear)
}
