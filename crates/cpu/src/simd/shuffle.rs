//! Lanes rearranged: shuffles, packing and unpacking, blends, insertion and extraction, widening.

use super::host;
use super::mmx::joined;
use super::operand::{
    Lanes as _, Legacy, Low16, Low32, Low64, Memory, One, Shape, Source, Two, VectorSrc, Vex,
    binary, binary_immediate, by_shape, packed, packed_in_order, unary, unary_immediate,
};
use crate::core_state::Core;
use crate::form::{Form, Kind, by_address};
use crate::int::Int;
use crate::op::{Address, Aux, Handler, Mem, Op, Place as _, Read, Segmented, Src};
use crate::trap::Trap;
use bytemuck::must_cast;
use iced_x86::Mnemonic as M;
use std::array::from_fn;

/// A handler that widens the lowest part of the source to a lane, or two such parts to two lanes.
macro_rules! widen {
    ($form:expr, $memory:ident, $value:expr) => {
        match ($form.is_wide(), $form.kinds[1]) {
            (true, Kind::Xmm) => |core, op| {
                widen::<VectorSrc<One>>(core, op, <$memory<Segmented> as Memory>::BITS, $value)
            },
            (true, Kind::Mem) => |core, op| {
                widen::<<$memory<Segmented> as Memory>::Twice>(
                    core,
                    op,
                    <$memory<Segmented> as Memory>::BITS,
                    $value,
                )
            },
            _ => unary!($form, $memory, $value),
        }
    };
}

/// A handler that blends lanes of so many bits by a mask in a register.
macro_rules! blend_by_mask {
    ($form:expr, $mask:ident, $bits:literal) => {
        by_shape!(binary, $form, Aligned, X => blend_by_register::<X, $mask, $bits>)
    };
}

/// The handler for an instruction of this subject.
pub(super) fn select(form: &Form) -> Option<Handler> {
    Some(match form.mnemonic {
        M::Packssdw | M::Vpackssdw => packed_in_order!(form, host::packssdw),
        M::Packsswb | M::Vpacksswb => packed_in_order!(form, host::packsswb),
        M::Packuswb | M::Vpackuswb => packed_in_order!(form, host::packuswb),
        M::Punpcklbw | M::Vpunpcklbw => packed!(form, host::punpcklbw, Low32, host::punpcklbw),
        M::Punpcklwd | M::Vpunpcklwd => packed!(form, host::punpcklwd, Low32, host::punpcklwd),
        M::Punpckldq | M::Vpunpckldq => packed!(form, host::punpckldq, Low32, host::punpckldq),
        M::Punpcklqdq | M::Vpunpcklqdq => binary!(form, Aligned, host::punpcklqdq),
        M::Punpckhbw | M::Vpunpckhbw => {
            packed!(form, host::punpckhbw, Low64, |a, b| host::punpcklbw(a, b)
                >> 64)
        }
        M::Punpckhwd | M::Vpunpckhwd => {
            packed!(form, host::punpckhwd, Low64, |a, b| host::punpcklwd(a, b)
                >> 64)
        }
        M::Punpckhdq | M::Vpunpckhdq => {
            packed!(form, host::punpckhdq, Low64, |a, b| host::punpckldq(a, b)
                >> 64)
        }
        M::Punpckhqdq | M::Vpunpckhqdq => binary!(form, Aligned, host::punpckhqdq),
        M::Unpcklps | M::Vunpcklps => binary!(form, Aligned, host::unpcklps),
        M::Unpckhps | M::Vunpckhps => binary!(form, Aligned, host::unpckhps),
        M::Unpcklpd | M::Vunpcklpd => binary!(form, Aligned, host::unpcklpd),
        M::Unpckhpd | M::Vunpckhpd => binary!(form, Aligned, host::unpckhpd),
        M::Pshufd | M::Vpshufd => unary_immediate!(form, Aligned, shuffle_32),
        M::Pshufw => unary_immediate!(@ mmx, form, Low64, shuffle_low_16, 0),
        M::Pshuflw | M::Vpshuflw => unary_immediate!(form, Aligned, shuffle_low_16),
        M::Pshufhw | M::Vpshufhw => unary_immediate!(form, Aligned, shuffle_high_16),
        M::Shufps | M::Vshufps => binary_immediate!(form, Aligned, shuffle_two_32),
        M::Shufpd | M::Vshufpd => binary_immediate!(form, Aligned, shuffle_two_64, 2),
        M::Pinsrw | M::Vpinsrw => select_insert::<u16>(form)?,
        M::Pextrw if form.kinds[1] == Kind::Mm => |core, op| {
            core.require_mmx()?;
            let value: u16 = extract(core.mm(op.src).into(), op.imm as u8 & 3);
            core.enter_mmx();
            core.set_reg(op.dst, value.zero_extend());
            Ok(())
        },
        M::Pextrw | M::Vpextrw => select_extract::<u16>(form),
        M::Pshufb | M::Vpshufb => packed!(form, host::pshufb, Low64, |a, b| host::pshufb(
            joined(a, a),
            b
        )),
        M::Palignr if form.kinds[0] == Kind::Mm => {
            binary_immediate!(@ mmx, form, Low64, |a, b, by| align_right(0, joined(b, a), by), 0)
        }
        M::Palignr | M::Vpalignr => binary_immediate!(form, Aligned, align_right),
        M::Packusdw | M::Vpackusdw => binary!(form, Aligned, host::packusdw),
        M::Pmovsxbw | M::Vpmovsxbw => widen!(form, Low64, host::pmovsxbw),
        M::Pmovsxbd | M::Vpmovsxbd => widen!(form, Low32, host::pmovsxbd),
        M::Pmovsxbq | M::Vpmovsxbq => widen!(form, Low16, host::pmovsxbq),
        M::Pmovsxwd | M::Vpmovsxwd => widen!(form, Low64, host::pmovsxwd),
        M::Pmovsxwq | M::Vpmovsxwq => widen!(form, Low32, host::pmovsxwq),
        M::Pmovsxdq | M::Vpmovsxdq => widen!(form, Low64, host::pmovsxdq),
        M::Pmovzxbw | M::Vpmovzxbw => widen!(form, Low64, host::pmovzxbw),
        M::Pmovzxbd | M::Vpmovzxbd => widen!(form, Low32, host::pmovzxbd),
        M::Pmovzxbq | M::Vpmovzxbq => widen!(form, Low16, host::pmovzxbq),
        M::Pmovzxwd | M::Vpmovzxwd => widen!(form, Low64, host::pmovzxwd),
        M::Pmovzxwq | M::Vpmovzxwq => widen!(form, Low32, host::pmovzxwq),
        M::Pmovzxdq | M::Vpmovzxdq => widen!(form, Low64, host::pmovzxdq),
        M::Pblendw | M::Vpblendw => binary_immediate!(form, Aligned, blend_16),
        M::Blendps | M::Vblendps => binary_immediate!(form, Aligned, blend_32, 4),
        M::Blendpd | M::Vblendpd => binary_immediate!(form, Aligned, blend_64, 2),
        M::Pblendvb => blend_by_mask!(form, Implied, 8),
        M::Blendvps => blend_by_mask!(form, Implied, 32),
        M::Blendvpd => blend_by_mask!(form, Implied, 64),
        M::Vpblendvb => blend_by_mask!(form, Named, 8),
        M::Vblendvps => blend_by_mask!(form, Named, 32),
        M::Vblendvpd => blend_by_mask!(form, Named, 64),
        M::Pinsrb | M::Vpinsrb => select_insert::<u8>(form)?,
        M::Pinsrd | M::Vpinsrd => select_insert::<u32>(form)?,
        M::Pinsrq | M::Vpinsrq => select_insert::<u64>(form)?,
        M::Pextrb | M::Vpextrb => select_extract::<u8>(form),
        M::Pextrd | M::Vpextrd | M::Extractps | M::Vextractps => select_extract::<u32>(form),
        M::Pextrq | M::Vpextrq => select_extract::<u64>(form),
        M::Insertps | M::Vinsertps => by_shape!(binary, form, Low32, X => insert_single::<X>),
        _ => return None,
    })
}

/// PSHUFD.
pub(super) fn shuffle_32(b: u128, order: u8) -> u128 {
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
pub(super) fn shuffle_two_64(a: u128, b: u128, order: u8) -> u128 {
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
pub(super) fn blend_32(a: u128, b: u128, which: u8) -> u128 {
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

/// The top bit of each lane of `BITS` bits, spread over the lane.
pub(super) fn spread<const BITS: u32>(mask: u128) -> u128 {
    match BITS {
        8 => host::pcmpgtb(0, mask),
        32 => host::psrad(mask, 31),
        _ => must_cast(must_cast::<u128, [i64; 2]>(mask).map(|lane| lane >> 63)),
    }
}

/// The register that holds a mask.
trait MaskRegister {
    fn number(op: &Op) -> u8;
}

/// XMM0.
struct Implied;
/// The register that the immediate names.
struct Named;

impl MaskRegister for Implied {
    fn number(_op: &Op) -> u8 {
        0
    }
}

impl MaskRegister for Named {
    fn number(op: &Op) -> u8 {
        op.imm as u8
    }
}

/// PBLENDVB, BLENDVPS and BLENDVPD.
fn blend_by_register<X: Shape, R: MaskRegister, const BITS: u32>(
    core: &mut Core,
    op: &Op,
) -> Result<(), Trap> {
    let b = X::second(core, op)?;
    let mask = X::Value::get(core, R::number(op));
    // Where the mask says so, a lane of the second source takes the place of one of the first.
    let chosen = b.zip(mask, |b, mask| b & spread::<BITS>(mask));
    let kept = X::first(core, op).zip(mask, |a, mask| a & !spread::<BITS>(mask));
    X::store(core, op, kept.zip(chosen, |kept, chosen| kept | chosen));
    Ok(())
}

/// The low half of the source, then the next part, each to a lane.
fn widen<S: Source<Value = One>>(
    core: &mut Core,
    op: &Op,
    bits: u32,
    convert: impl Fn(u128) -> u128,
) -> Result<(), Trap> {
    let [b] = S::read(core, op)?;
    let lanes: Two = [convert(b), convert(b >> bits)];
    lanes.put_cleared(core, op.dst);
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

fn insert_single<X: Shape>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let b: [u32; 4] = must_cast(X::second(core, op)?.low());
    let control = op.imm as u8;
    // A memory operand is the lane itself.
    let lane = if X::IS_REGISTER {
        b[usize::from(control >> 6)]
    } else {
        b[0]
    };
    let result = X::first(core, op).map(|a| insert_lane_32(a, lane, control));
    X::store(core, op, result);
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
    Some(match (form.is_vex, form.has_memory()) {
        _ if form.kinds[0] == Kind::Mm => match form.has_memory() {
            false => insert_half::<T, Src>,
            true => insert_half::<T, Mem<Segmented>>,
        },
        (false, false) => insert_from::<T, Src, Legacy<VectorSrc<One>>>,
        (false, true) => {
            by_address!(form, A => insert_from::<T, Mem<A>, Legacy<VectorSrc<One>>>)
        }
        (true, false) => insert_from::<T, Aux, Vex<VectorSrc<One>>>,
        (true, true) => insert_from::<T, Mem<Segmented>, Vex<VectorSrc<One>>>,
    })
}

fn insert_from<T: Int, S: Read, X: Shape>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let value: T = S::read(core, op)?;
    let result = X::first(core, op).map(|a| insert(a, value, op.imm as u8));
    X::store(core, op, result);
    Ok(())
}

/// As [`insert_from`], into an MMX register.
fn insert_half<T: Int, S: Read>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    core.require_mmx()?;
    let value: T = S::read(core, op)?;
    let lane = op.imm as u8 & (64 / T::BITS - 1) as u8;
    let result = insert(core.mm(op.dst).into(), value, lane);
    core.set_mm(op.dst, result as u64);
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
