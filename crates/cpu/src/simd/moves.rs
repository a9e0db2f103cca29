//! Moves between vector registers, general registers and memory.

use super::image::vector_count;
use super::mmx::{FromMmx, Mmx, MmxSrc};
use super::operand::{
    Aligned, General, Lanes, Legacy, Low32, Low64, One, Shape, Two, Unaligned, VectorSrc, Vex,
    binary, unary,
};
use super::{host, mxcsr};
use crate::core_state::Core;
use crate::form::{Form, Kind, by_address};
use crate::int::Int;
use crate::op::{Address, Dst, Handler, Mem, Op, Place, Read as _, Segmented, Src};
use crate::state::gpr;
use crate::trap::Trap;
use iced_x86::Mnemonic as M;

/// A load of memory that must be aligned, or of a register.
macro_rules! load_aligned {
    ($form:expr) => {
        match ($form.is_vex, $form.kinds[1], $form.is_wide()) {
            (true, Kind::Mem, false) => load::<Vex<Aligned<Segmented, One>>>,
            (true, Kind::Mem, true) => load::<Vex<Aligned<Segmented, Two>>>,
            _ => unary!($form, Aligned, |b| b),
        }
    };
}

/// A store of a whole register to memory of the kind named.
macro_rules! store {
    ($form:expr, $store:ident) => {
        match ($form.is_vex, $form.is_wide()) {
            (false, _) => by_address!($form, A => $store::<A, One>),
            (true, false) => $store::<Segmented, One>,
            (true, true) => $store::<Segmented, Two>,
        }
    };
}

/// A handler for a general register as the source of the lowest lane; the others are cleared.
macro_rules! from_general {
    ($form:expr, $type:ty) => {
        if $form.is_vex {
            load::<Vex<General<Src, $type>>>
        } else {
            load::<Legacy<General<Src, $type>>>
        }
    };
}

/// A handler for bits of each lane gathered in a general register, so many for each lane.
macro_rules! gather_bits {
    ($form:expr, $bits:expr, $count:literal) => {
        match $form.kinds[1] {
            Kind::Mm => |core, op| {
                core.require_mmx()?;
                let bits = $bits(core.mm(op.src).into());
                core.enter_mmx();
                core.set_reg(op.dst, bits);
                Ok(())
            },
            Kind::Xmm => |core, op| {
                core.set_reg(op.dst, $bits(core.xmm(op.src)));
                Ok(())
            },
            Kind::Ymm => |core, op| {
                let [low, high] = Two::get(core, op.src);
                core.set_reg(op.dst, $bits(low) | $bits(high) << $count);
                Ok(())
            },
            _ => return None,
        }
    };
}

/// The handler for an instruction of this subject.
pub(super) fn select(form: &Form) -> Option<Handler> {
    Some(match form.mnemonic {
        M::Movaps | M::Movapd | M::Movdqa | M::Vmovaps | M::Vmovapd | M::Vmovdqa => {
            match form.kinds[0] {
                Kind::Mem => store!(form, store_aligned),
                _ => load_aligned!(form),
            }
        }
        M::Movups | M::Movupd | M::Movdqu | M::Vmovups | M::Vmovupd | M::Vmovdqu => {
            match form.kinds[0] {
                Kind::Mem => store!(form, store_unaligned),
                _ => unary!(form, Unaligned, |b| b),
            }
        }
        M::Lddqu | M::Vlddqu => unary!(form, Unaligned, |b| b),
        M::Movntdqa | M::Vmovntdqa => load_aligned!(form),
        M::Movntps | M::Movntpd | M::Movntdq | M::Vmovntps | M::Vmovntpd | M::Vmovntdq => {
            store!(form, store_aligned)
        }
        M::Movss | M::Vmovss => match form.kinds {
            [Kind::Xmm, Kind::Xmm, ..] => {
                binary!(form, Low32, |a: u128, b: u128| a & !LOW32 | b & LOW32)
            }
            [Kind::Xmm, Kind::Mem, ..] => unary!(form, Low32, |b| b),
            [Kind::Mem, Kind::Xmm, ..] => by_address!(form, A => store_low32::<A>),
            _ => return None,
        },
        M::Movsd | M::Vmovsd => match form.kinds {
            [Kind::Xmm, Kind::Xmm, ..] => {
                binary!(form, Low64, |a: u128, b: u128| a & !LOW64 | b & LOW64)
            }
            [Kind::Xmm, Kind::Mem, ..] => unary!(form, Low64, |b| b),
            [Kind::Mem, Kind::Xmm, ..] => by_address!(form, A => store_low64::<A>),
            _ => return None,
        },
        M::Movd | M::Vmovd => match form.kinds {
            [Kind::Mm, Kind::Reg, ..] => load::<Mmx<General<Src, u32>>>,
            [Kind::Mm, ..] => load::<Mmx<Low32<Segmented>>>,
            [Kind::Reg, Kind::Mm, ..] => half_to::<u32, Dst>,
            [Kind::Mem, Kind::Mm, ..] => half_to::<u32, Mem<Segmented>>,
            [Kind::Xmm, Kind::Reg, ..] => from_general!(form, u32),
            [Kind::Xmm, Kind::Mem, ..] => unary!(form, Low32, |b| b),
            [Kind::Reg, Kind::Xmm, ..] => |core, op| {
                core.set_reg(op.dst, core.xmm(op.src) as u32);
                Ok(())
            },
            [Kind::Mem, Kind::Xmm, ..] => by_address!(form, A => store_low32::<A>),
            _ => return None,
        },
        M::Movq | M::Vmovq => match form.kinds {
            [Kind::Mm, Kind::Reg, ..] => load::<Mmx<General<Src, u64>>>,
            [Kind::Mm, Kind::Mm, ..] => load::<Mmx<MmxSrc>>,
            [Kind::Mm, ..] => load::<Mmx<Low64<Segmented>>>,
            [Kind::Reg, Kind::Mm, ..] => half_to::<u64, Dst>,
            [Kind::Mem, Kind::Mm, ..] => half_to::<u64, Mem<Segmented>>,
            [Kind::Xmm, Kind::Reg, ..] => from_general!(form, u64),
            [Kind::Xmm, ..] => unary!(form, Low64, |b: u128| b & LOW64),
            [Kind::Reg, Kind::Xmm, ..] => |core, op| {
                core.set_reg(op.dst, core.xmm(op.src) as u64);
                Ok(())
            },
            [Kind::Mem, Kind::Xmm, ..] => by_address!(form, A => store_low64::<A>),
            _ => return None,
        },
        M::Movntq => half_to::<u64, Mem<Segmented>>,
        M::Movq2dq => load::<FromMmx>,
        M::Movdq2q => load::<Mmx<VectorSrc<One>>>,
        M::Movlps | M::Movlpd | M::Vmovlps | M::Vmovlpd => match form.kinds[0] {
            Kind::Xmm => binary!(form, Low64, |a: u128, b: u128| a & !LOW64 | b),
            _ => by_address!(form, A => store_low64::<A>),
        },
        M::Movhps | M::Movhpd | M::Vmovhps | M::Vmovhpd => match form.kinds[0] {
            Kind::Xmm => binary!(form, Low64, |a: u128, b: u128| a & LOW64 | b << 64),
            _ => by_address!(form, A => store_high64::<A>),
        },
        M::Movhlps | M::Vmovhlps => {
            binary!(form, Aligned, |a: u128, b: u128| a & !LOW64 | b >> 64)
        }
        M::Movlhps | M::Vmovlhps => {
            binary!(form, Aligned, |a: u128, b: u128| a & LOW64 | b << 64)
        }
        M::Movddup | M::Vmovddup => unary!(form, Low64, |b: u128| b & LOW64 | b << 64),
        M::Movsldup | M::Vmovsldup => {
            unary!(form, Aligned, |b: u128| b & EVEN32 | (b & EVEN32) << 32)
        }
        M::Movshdup | M::Vmovshdup => {
            unary!(form, Aligned, |b: u128| b & !EVEN32 | (b & !EVEN32) >> 32)
        }
        M::Movmskps | M::Vmovmskps => gather_bits!(form, host::movmskps, 4),
        M::Movmskpd | M::Vmovmskpd => gather_bits!(form, host::movmskpd, 2),
        M::Pmovmskb | M::Vpmovmskb => gather_bits!(form, host::pmovmskb, 16),
        M::Maskmovdqu | M::Vmaskmovdqu => {
            |core, op| masked_store(core, op, core.xmm(op.src), core.xmm(op.aux), 16)
        }
        M::Maskmovq => |core, op| {
            core.require_mmx()?;
            let (value, mask) = (core.mm(op.src).into(), core.mm(op.aux).into());
            masked_store(core, op, value, mask, 8)?;
            core.enter_mmx();
            Ok(())
        },
        M::Vzeroupper => |core, _| {
            let count = vector_count(core);
            core.vectors.ymm_high[..count].fill(0);
            Ok(())
        },
        M::Vzeroall => |core, _| {
            let count = vector_count(core);
            core.vectors.xmm[..count].fill(0);
            core.vectors.ymm_high[..count].fill(0);
            Ok(())
        },
        M::Ldmxcsr | M::Vldmxcsr => |core, op| {
            let value: u32 = Mem::<Segmented>::read(core, op)?;
            if mxcsr::has_reserved_bits(value) {
                return Err(core.general_protection(0));
            }
            core.set_mxcsr(value);
            Ok(())
        },
        M::Stmxcsr | M::Vstmxcsr => |core, op| {
            let value = core.mxcsr();
            Mem::<Segmented>::write(core, op, value)
        },
        _ => return None,
    })
}

/// The handler for an instruction that came with SSE or SSE2 but touches no vector register, and
/// is therefore not subject to CR4.OSFXSR.
pub(super) fn select_ungated(form: &Form) -> Option<Handler> {
    Some(match (form.mnemonic, form.width) {
        (M::Movnti, 4) => by_address!(form, A => store_general::<u32, A>),
        (M::Movnti, 8) => by_address!(form, A => store_general::<u64, A>),
        // Guest loads and stores are host loads and stores in program order, so that only what
        // x86 lets pass, a store by a later load, is left to forbid.
        (M::Mfence, _) => |_, _| {
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
            Ok(())
        },
        (M::Lfence | M::Sfence, _) => crate::integer::nop,
        _ => return None,
    })
}

const LOW32: u128 = u32::MAX as u128;
/// The lower half of a lane.
pub(super) const LOW64: u128 = u64::MAX as u128;
/// The even 32-bit lanes.
const EVEN32: u128 = LOW64 << 64 & LOW32 << 64 | LOW32;

fn load<X: Shape>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let value = X::second(core, op)?;
    X::store(core, op, value);
    Ok(())
}

fn store_aligned<A: Address, V: Lanes>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    Aligned::<A, V>::write(core, op, V::get(core, op.src))
}

fn store_unaligned<A: Address, V: Lanes>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    Unaligned::<A, V>::write(core, op, V::get(core, op.src))
}

fn store_low32<A: Address>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    Mem::<A>::write(core, op, core.xmm(op.src) as u32)
}

fn store_low64<A: Address>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    Mem::<A>::write(core, op, core.xmm(op.src) as u64)
}

fn store_high64<A: Address>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    Mem::<A>::write(core, op, (core.xmm(op.src) >> 64) as u64)
}

fn store_general<T: Int, A: Address>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let value: T = core.reg(op.src);
    Mem::<A>::write(core, op, value)
}

/// An MMX register's lowest bits to a general register or memory.
fn half_to<T: Int, D: Place>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    core.require_mmx()?;
    D::write(core, op, T::truncate(core.mm(op.src)))?;
    core.enter_mmx();
    Ok(())
}

/// MASKMOVDQU and MASKMOVQ: stores those of the lowest bytes whose mask has its top bit set. Whether
/// pages that no such byte lies in may fault is left to the implementation; here all must be
/// writable.
fn masked_store(core: &mut Core, op: &Op, value: u128, mask: u128, bytes: u64) -> Result<(), Trap> {
    let mask = host::pmovmskb(mask);
    let offset = core.regs[gpr::RDI] & op.address_mask();
    let linear = core.linear(op.seg, offset, bytes, true)?;
    core.touch_write(linear, bytes)?;
    for (i, byte) in (0..bytes).zip(value.to_le_bytes()) {
        if mask >> i & 1 != 0 {
            core.store(linear.wrapping_add(i), byte)?;
        }
    }
    Ok(())
}
