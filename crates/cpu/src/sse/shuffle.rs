//! Lanes rearranged: shuffles, packing and unpacking, blends, insertion and extraction, widening.

use super::operand::{Source, binary, binary_immediate, by_source, unary, unary_immediate};
use super::{Host, host};
use crate::core_state::Core;
use crate::form::{Form, Kind, by_address};
use crate::int::Int;
use crate::op::{Address, Handler, Mem, Op, Place as _, Read, Src};
use crate::trap::Trap;
use bytemuck::must_cast;
use iced_x86::Mnemonic as M;
use std::array::from_fn;

/// The handler for an instruction of this subject.
pub(super) fn select(form: &Form, host_has: Host) -> Option<Handler> {
    Some(match form.mnemonic {
        M::Packssdw => binary!(form, Aligned, host::packssdw),
        M::Packsswb => binary!(form, Aligned, host::packsswb),
        M::Packuswb => binary!(form, Aligned, host::packuswb),
        M::Punpcklbw => binary!(form, Aligned, host::punpcklbw),
        M::Punpcklwd => binary!(form, Aligned, host::punpcklwd),
        M::Punpckldq => binary!(form, Aligned, host::punpckldq),
        M::Punpcklqdq => binary!(form, Aligned, host::punpcklqdq),
        M::Punpckhbw => binary!(form, Aligned, host::punpckhbw),
        M::Punpckhwd => binary!(form, Aligned, host::punpckhwd),
        M::Punpckhdq => binary!(form, Aligned, host::punpckhdq),
        M::Punpckhqdq => binary!(form, Aligned, host::punpckhqdq),
        M::Unpcklps => binary!(form, Aligned, host::unpcklps),
        M::Unpckhps => binary!(form, Aligned, host::unpckhps),
        M::Unpcklpd => binary!(form, Aligned, host::unpcklpd),
        M::Unpckhpd => binary!(form, Aligned, host::unpckhpd),
        M::Pshufd => unary_immediate!(form, Aligned, shuffle_32),
        M::Pshuflw => unary_immediate!(form, Aligned, shuffle_low_16),
        M::Pshufhw => unary_immediate!(form, Aligned, shuffle_high_16),
        M::Shufps => binary_immediate!(form, Aligned, shuffle_two_32),
        M::Shufpd => binary_immediate!(form, Aligned, shuffle_two_64),
        M::Pinsrw if form.kinds[0] == Kind::Xmm => select_insert::<u16>(form)?,
        M::Pextrw if form.kinds[1] == Kind::Xmm => select_extract::<u16>(form),
        _ => return select_ssse3(form, host_has).or_else(|| select_sse41(form, host_has)),
    })
}

fn select_ssse3(form: &Form, host_has: Host) -> Option<Handler> {
    if !host_has.ssse3 {
        return None;
    }
    Some(match form.mnemonic {
        M::Pshufb => binary!(form, Aligned, host::pshufb),
        M::Palignr => binary_immediate!(form, Aligned, align_right),
        _ => return None,
    })
}

fn select_sse41(form: &Form, host_has: Host) -> Option<Handler> {
    if !host_has.sse41 {
        return None;
    }
    Some(match form.mnemonic {
        M::Packusdw => binary!(form, Aligned, host::packusdw),
        M::Pmovsxbw => unary!(form, Low64, host::pmovsxbw),
        M::Pmovsxbd => unary!(form, Low32, host::pmovsxbd),
        M::Pmovsxbq => unary!(form, Low16, host::pmovsxbq),
        M::Pmovsxwd => unary!(form, Low64, host::pmovsxwd),
        M::Pmovsxwq => unary!(form, Low32, host::pmovsxwq),
        M::Pmovsxdq => unary!(form, Low64, host::pmovsxdq),
        M::Pmovzxbw => unary!(form, Low64, host::pmovzxbw),
        M::Pmovzxbd => unary!(form, Low32, host::pmovzxbd),
        M::Pmovzxbq => unary!(form, Low16, host::pmovzxbq),
        M::Pmovzxwd => unary!(form, Low64, host::pmovzxwd),
        M::Pmovzxwq => unary!(form, Low32, host::pmovzxwq),
        M::Pmovzxdq => unary!(form, Low64, host::pmovzxdq),
        M::Pblendw => binary_immediate!(form, Aligned, blend_16),
        M::Blendps => binary_immediate!(form, Aligned, blend_32),
        M::Blendpd => binary_immediate!(form, Aligned, blend_64),
        M::Pblendvb => by_source!(form, Aligned, S => blend_by_xmm0::<S, 8>),
        M::Blendvps => by_source!(form, Aligned, S => blend_by_xmm0::<S, 32>),
        M::Blendvpd => by_source!(form, Aligned, S => blend_by_xmm0::<S, 64>),
        M::Pinsrb => select_insert::<u8>(form)?,
        M::Pinsrd => select_insert::<u32>(form)?,
        M::Pinsrq => select_insert::<u64>(form)?,
        M::Pextrb => select_extract::<u8>(form),
        M::Pextrd | M::Extractps => select_extract::<u32>(form),
        M::Pextrq => select_extract::<u64>(form),
        M::Insertps => by_source!(form, Low32, S => insert_single::<S>),
        _ => return None,
    })
}

/// PSHUFD.
fn shuffle_32(b: u128, order: u8) -> u128 {
    let b: [u32; 4] = must_cast(b);
    let lanes: [u32; 4] = from_fn(|i| b[usize::from(order >> (2 * i) & 3)]);
    must_cast(lanes)
}

/// PSHUFLW.
fn shuffle_low_16(b: u128, order: u8) -> u128 {
    let b: [u16; 8] = must_cast(b);
    let lanes: [u16; 8] = from_fn(|i| {
        if i < 4 {
            b[usize::from(order >> (2 * i) & 3)]
        } else {
            b[i]
        }
    });
    must_cast(lanes)
}

/// PSHUFHW.
fn shuffle_high_16(b: u128, order: u8) -> u128 {
    let b: [u16; 8] = must_cast(b);
    let lanes: [u16; 8] = from_fn(|i| {
        if i < 4 {
            b[i]
        } else {
            b[4 + usize::from(order >> (2 * (i - 4)) & 3)]
        }
    });
    must_cast(lanes)
}

/// SHUFPS.
fn shuffle_two_32(a: u128, b: u128, order: u8) -> u128 {
    let (a, b): ([u32; 4], [u32; 4]) = (must_cast(a), must_cast(b));
    let lane = |from: [u32; 4], i: u8| from[usize::from(order >> (2 * i) & 3)];
    must_cast([lane(a, 0), lane(a, 1), lane(b, 2), lane(b, 3)])
}

/// SHUFPD.
fn shuffle_two_64(a: u128, b: u128, order: u8) -> u128 {
    let (a, b): ([u64; 2], [u64; 2]) = (must_cast(a), must_cast(b));
    must_cast([a[usize::from(order & 1)], b[usize::from(order >> 1 & 1)]])
}

/// PALIGNR: 16 bytes from byte `by` of the destination above the source.
fn align_right(a: u128, b: u128, by: u8) -> u128 {
    match u32::from(by) * 8 {
        0 => b,
        bits @ 1..128 => a << (128 - bits) | b >> bits,
        bits => a.checked_shr(bits - 128).unwrap_or(0),
    }
}

/// PBLENDW.
fn blend_16(a: u128, b: u128, which: u8) -> u128 {
    let (a, b): ([u16; 8], [u16; 8]) = (must_cast(a), must_cast(b));
    let lanes: [u16; 8] = from_fn(|i| if which >> i & 1 != 0 { b[i] } else { a[i] });
    must_cast(lanes)
}

/// BLENDPS. Bits 7:4 are ignored.
fn blend_32(a: u128, b: u128, which: u8) -> u128 {
    let (a, b): ([u32; 4], [u32; 4]) = (must_cast(a), must_cast(b));
    let lanes: [u32; 4] = from_fn(|i| if which >> i & 1 != 0 { b[i] } else { a[i] });
    must_cast(lanes)
}

/// BLENDPD. Bits 7:2 are ignored.
fn blend_64(a: u128, b: u128, which: u8) -> u128 {
    let (a, b): ([u64; 2], [u64; 2]) = (must_cast(a), must_cast(b));
    let lanes: [u64; 2] = from_fn(|i| if which >> i & 1 != 0 { b[i] } else { a[i] });
    must_cast(lanes)
}

/// Lanes of `bits` bits from `b` where the mask's lane has its top bit set, else from `a`.
fn blend_by_mask(a: u128, b: u128, mask: u128, bits: u32) -> u128 {
    let spread = match bits {
        8 => host::pcmpgtb(0, mask),
        32 => host::psrad(mask, 31),
        _ => must_cast(must_cast::<u128, [i64; 2]>(mask).map(|lane| lane >> 63)),
    };
    a & !spread | b & spread
}

/// PBLENDVB, BLENDVPS and BLENDVPD: the mask is always XMM0.
fn blend_by_xmm0<S: Source, const BITS: u32>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let b = S::read(core, op)?;
    let result = blend_by_mask(core.xmm(op.dst), b, core.xmm(0), BITS);
    core.set_xmm(op.dst, result);
    Ok(())
}

/// INSERTPS: lane `count_s` of the source goes to lane `count_d`, then lanes are cleared.
fn insert_lane_32(a: u128, value: u32, control: u8) -> u128 {
    let mut lanes: [u32; 4] = must_cast(a);
    lanes[usize::from(control >> 4 & 3)] = value;
    for (i, lane) in lanes.iter_mut().enumerate() {
        if control >> i & 1 != 0 {
            *lane = 0;
        }
    }
    must_cast(lanes)
}

fn insert_single<S: Source>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let b: [u32; 4] = must_cast(S::read(core, op)?);
    let control = op.imm as u8;
    // A memory operand is the lane itself.
    let lane = if S::IS_REGISTER {
        b[usize::from(control >> 6)]
    } else {
        b[0]
    };
    let result = insert_lane_32(core.xmm(op.dst), lane, control);
    core.set_xmm(op.dst, result);
    Ok(())
}

/// `a` with one lane of `T`'s width replaced. The lane's number is taken modulo the number of lanes.
fn insert<T: Int>(a: u128, value: T, lane: u8) -> u128 {
    let shift = (u32::from(lane) * T::BITS) & 127;
    let mask = u128::from(u64::MAX >> (64 - T::BITS));
    a & !(mask << shift) | u128::from(value.zero_extend()) << shift
}

/// One lane of `T`'s width.
fn extract<T: Int>(b: u128, lane: u8) -> T {
    T::truncate((b >> ((u32::from(lane) * T::BITS) & 127)) as u64)
}

fn select_insert<T: Int>(form: &Form) -> Option<Handler> {
    Some(match form.kinds[1] {
        Kind::Reg => insert_from::<T, Src>,
        Kind::Mem => by_address!(form, A => insert_from::<T, Mem<A>>),
        _ => return None,
    })
}

fn insert_from<T: Int, S: Read>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let value: T = S::read(core, op)?;
    let result = insert(core.xmm(op.dst), value, op.imm as u8);
    core.set_xmm(op.dst, result);
    Ok(())
}

fn select_extract<T: Int>(form: &Form) -> Handler {
    match form.kinds[0] {
        Kind::Mem => by_address!(form, A => extract_to_memory::<T, A>),
        _ => extract_to_register::<T>,
    }
}

fn extract_to_memory<T: Int, A: Address>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let value: T = extract(core.xmm(op.src), op.imm as u8);
    Mem::<A>::write(core, op, value)
}

/// Narrow lanes are zero-extended into the whole register.
fn extract_to_register<T: Int>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let value: T = extract(core.xmm(op.src), op.imm as u8);
    core.set_reg(op.dst, value.zero_extend());
    Ok(())
}
