//! Lanes of AVX moved across 128 bits: broadcasts, permutations, halves inserted and extracted.

use super::operand::{
    Lanes as _, Low8, Low16, Low32, Low64, One, Shape as _, Source, Two, Unaligned, VectorAux,
    VectorSrc, Vex, binary, binary_immediate, unary_immediate,
};
use super::shuffle::{blend_32, shuffle_32, shuffle_two_64};
use crate::core_state::Core;
use crate::form::{Form, Kind};
use crate::int::Int;
use crate::op::{Handler, Op, Segmented};
use crate::trap::Trap;
use bytemuck::must_cast;
use iced_x86::Mnemonic as M;
use std::array::from_fn;

/// A handler that fills the destination with copies of the lowest bits of the source.
macro_rules! broadcast {
    ($form:expr, $memory:ident, $type:ty) => {
        match ($form.kinds[0], $form.kinds[1]) {
            (Kind::Xmm, Kind::Xmm) => broadcast::<VectorSrc<One>, $type, 1>,
            (Kind::Xmm, _) => broadcast::<$memory<Segmented>, $type, 1>,
            (_, Kind::Xmm) => broadcast::<VectorSrc<One>, $type, 2>,
            _ => broadcast::<$memory<Segmented>, $type, 2>,
        }
    };
}

/// A handler for a function of a source of 256 bits, the only one or the second.
macro_rules! wide {
    ($form:expr, $at:literal, $register:ident, $handler:ident) => {
        match $form.kinds[$at] {
            Kind::Mem => $handler::<Unaligned<Segmented, Two>>,
            _ => $handler::<$register<Two>>,
        }
    };
}

/// The handler for an instruction of this subject.
pub(super) fn select(form: &Form) -> Option<Handler> {
    Some(match form.mnemonic {
        M::Vpbroadcastb => broadcast!(form, Low8, u8),
        M::Vpbroadcastw => broadcast!(form, Low16, u16),
        M::Vpbroadcastd | M::Vbroadcastss => broadcast!(form, Low32, u32),
        M::Vpbroadcastq | M::Vbroadcastsd => broadcast!(form, Low64, u64),
        M::Vbroadcastf128 | M::Vbroadcasti128 => |core, op| {
            let [lane] = Unaligned::<Segmented, One>::read(core, op)?;
            [lane; 2].put_cleared(core, op.dst);
            Ok(())
        },
        M::Vinsertf128 | M::Vinserti128 => match form.kinds[2] {
            Kind::Mem => insert_half::<Unaligned<Segmented>>,
            _ => insert_half::<VectorAux<One>>,
        },
        M::Vextractf128 | M::Vextracti128 => match form.kinds[0] {
            Kind::Mem => |core, op| {
                let half = chosen_half(core, op);
                Unaligned::<Segmented, One>::write(core, op, half)
            },
            _ => |core, op| {
                let half = chosen_half(core, op);
                half.put_cleared(core, op.dst);
                Ok(())
            },
        },
        M::Vperm2f128 | M::Vperm2i128 => wide!(form, 2, VectorAux, choose_halves),
        M::Vpermq | M::Vpermpd => wide!(form, 1, VectorSrc, permute_64),
        M::Vpermd | M::Vpermps => wide!(form, 2, VectorAux, permute_32),
        M::Vpermilps if form.kinds[2] == Kind::Imm => unary_immediate!(form, Aligned, shuffle_32),
        M::Vpermilps => binary!(form, Aligned, permute_within_lane_32),
        M::Vpermilpd if form.kinds[2] == Kind::Imm => {
            unary_immediate!(form, Aligned, |b, order| shuffle_two_64(b, b, order), 2)
        }
        M::Vpermilpd => binary!(form, Aligned, permute_within_lane_64),
        M::Vpblendd => binary_immediate!(form, Aligned, blend_32, 4),
        _ => return None,
    })
}

fn broadcast<S: Source<Value = One>, T: Int, const N: usize>(
    core: &mut Core,
    op: &Op,
) -> Result<(), Trap> {
    let [source] = S::read(core, op)?;
    let element = u128::from(T::truncate(source as u64).zero_extend());
    let lane = (0..128)
        .step_by(T::BITS as usize)
        .fold(0, |lane, at| lane | element << at);
    [lane; N].put_cleared(core, op.dst);
    Ok(())
}

/// VINSERTF128: bit 0 of the immediate chooses the half of the first source that is replaced.
fn insert_half<S: Source<Value = One>>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let [half] = S::read(core, op)?;
    let mut value = Two::get(core, op.src);
    value[usize::from(op.imm as u8 & 1)] = half;
    value.put_cleared(core, op.dst);
    Ok(())
}

/// VEXTRACTF128: the half that bit 0 of the immediate chooses.
fn chosen_half(core: &Core, op: &Op) -> One {
    [Two::get(core, op.src)[usize::from(op.imm as u8 & 1)]]
}

/// VPERM2F128: each half is one of the four of both sources, or zero.
fn choose_halves<S: Source<Value = Two>>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let b = S::read(core, op)?;
    let [[a0, a1], [b0, b1]] = [Two::get(core, op.src), b];
    let halves = [a0, a1, b0, b1];
    let control = op.imm as u8;
    let result: Two = from_fn(|i| {
        let control = control >> (4 * i);
        if control & 8 != 0 {
            0
        } else {
            halves[usize::from(control & 3)]
        }
    });
    result.put_cleared(core, op.dst);
    Ok(())
}

/// VPERMQ and VPERMPD.
fn permute_64<S: Source<Value = Two>>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let b: [u64; 4] = must_cast(S::read(core, op)?);
    let order = op.imm as u8;
    let lanes: [u64; 4] = from_fn(|i| b[usize::from(order >> (2 * i) & 3)]);
    must_cast::<_, Two>(lanes).put_cleared(core, op.dst);
    Ok(())
}

/// VPERMD and VPERMPS: the first source says where each lane is from.
fn permute_32<S: Source<Value = Two>>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let b: [u32; 8] = must_cast(S::read(core, op)?);
    let order: [u32; 8] = must_cast(Vex::<S>::first(core, op));
    let lanes: [u32; 8] = from_fn(|i| b[order[i] as usize & 7]);
    must_cast::<_, Two>(lanes).put_cleared(core, op.dst);
    Ok(())
}

/// VPERMILPS by a vector of lane numbers.
fn permute_within_lane_32(a: u128, order: u128) -> u128 {
    let (a, order): ([u32; 4], [u32; 4]) = (must_cast(a), must_cast(order));
    let lanes: [u32; 4] = from_fn(|i| a[order[i] as usize & 3]);
    must_cast(lanes)
}

/// VPERMILPD by a vector, of whose lanes bit 1 is the lane number.
fn permute_within_lane_64(a: u128, order: u128) -> u128 {
    let (a, order): ([u64; 2], [u64; 2]) = (must_cast(a), must_cast(order));
    let lanes: [u64; 2] = from_fn(|i| a[order[i] as usize >> 1 & 1]);
    must_cast(lanes)
}
