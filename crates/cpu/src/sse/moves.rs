//! Moves between vector registers, general registers and memory.

use super::operand::{Aligned, Source, Unaligned, by_source, unary};
use super::{host, mxcsr};
use crate::core_state::Core;
use crate::form::{Form, Kind, by_address};
use crate::int::Int;
use crate::op::{Address, Handler, Mem, Op, Place as _, Read as _, Segmented};
use crate::state::gpr;
use crate::trap::Trap;
use iced_x86::Mnemonic as M;

/// The handler for an instruction of this subject.
pub(super) fn select(form: &Form) -> Option<Handler> {
    Some(match form.mnemonic {
        M::Movaps | M::Movapd | M::Movdqa => match form.kinds[0] {
            Kind::Mem => by_address!(form, A => store_aligned::<A>),
            _ => by_source!(form, Aligned, S => load::<S>),
        },
        M::Movups | M::Movupd | M::Movdqu => match form.kinds[0] {
            Kind::Mem => by_address!(form, A => store_unaligned::<A>),
            _ => by_source!(form, Unaligned, S => load::<S>),
        },
        M::Lddqu => by_source!(form, Unaligned, S => load::<S>),
        M::Movntdqa => by_source!(form, Aligned, S => load::<S>),
        M::Movntps | M::Movntpd | M::Movntdq => by_address!(form, A => store_aligned::<A>),
        M::Movss => match (form.kinds[0], form.kinds[1]) {
            (Kind::Xmm, Kind::Xmm) => |core, op| {
                let low = core.xmm(op.src) & LOW32;
                let high = core.xmm(op.dst) & !LOW32;
                core.set_xmm(op.dst, high | low);
                Ok(())
            },
            (Kind::Xmm, Kind::Mem) => by_source!(form, Low32, S => load::<S>),
            (Kind::Mem, Kind::Xmm) => by_address!(form, A => store_low32::<A>),
            _ => return None,
        },
        M::Movsd => match (form.kinds[0], form.kinds[1]) {
            (Kind::Xmm, Kind::Xmm) => |core, op| {
                let low = core.xmm(op.src) & LOW64;
                let high = core.xmm(op.dst) & !LOW64;
                core.set_xmm(op.dst, high | low);
                Ok(())
            },
            (Kind::Xmm, Kind::Mem) => by_source!(form, Low64, S => load::<S>),
            (Kind::Mem, Kind::Xmm) => by_address!(form, A => store_low64::<A>),
            _ => return None,
        },
        M::Movd => match (form.kinds[0], form.kinds[1]) {
            (Kind::Xmm, Kind::Reg) => |core, op| {
                let value: u32 = core.reg(op.src);
                core.set_xmm(op.dst, u128::from(value));
                Ok(())
            },
            (Kind::Xmm, Kind::Mem) => by_source!(form, Low32, S => load::<S>),
            (Kind::Reg, Kind::Xmm) => |core, op| {
                core.set_reg(op.dst, core.xmm(op.src) as u32);
                Ok(())
            },
            (Kind::Mem, Kind::Xmm) => by_address!(form, A => store_low32::<A>),
            _ => return None,
        },
        M::Movq => match (form.kinds[0], form.kinds[1]) {
            (Kind::Xmm, Kind::Reg) => |core, op| {
                let value: u64 = core.reg(op.src);
                core.set_xmm(op.dst, u128::from(value));
                Ok(())
            },
            (Kind::Xmm, Kind::Xmm) => |core, op| {
                core.set_xmm(op.dst, core.xmm(op.src) & LOW64);
                Ok(())
            },
            (Kind::Xmm, Kind::Mem) => by_source!(form, Low64, S => load::<S>),
            (Kind::Reg, Kind::Xmm) => |core, op| {
                core.set_reg(op.dst, core.xmm(op.src) as u64);
                Ok(())
            },
            (Kind::Mem, Kind::Xmm) => by_address!(form, A => store_low64::<A>),
            _ => return None,
        },
        M::Movlps | M::Movlpd => match form.kinds[0] {
            Kind::Xmm => by_address!(form, A => load_low_half::<A>),
            _ => by_address!(form, A => store_low64::<A>),
        },
        M::Movhps | M::Movhpd => match form.kinds[0] {
            Kind::Xmm => by_address!(form, A => load_high_half::<A>),
            _ => by_address!(form, A => store_high64::<A>),
        },
        M::Movhlps => |core, op| {
            let low = core.xmm(op.src) >> 64;
            let high = core.xmm(op.dst) & !LOW64;
            core.set_xmm(op.dst, high | low);
            Ok(())
        },
        M::Movlhps => |core, op| {
            let high = core.xmm(op.src) << 64;
            let low = core.xmm(op.dst) & LOW64;
            core.set_xmm(op.dst, high | low);
            Ok(())
        },
        M::Movddup => unary!(form, Low64, |b: u128| b & LOW64 | b << 64),
        M::Movsldup => unary!(form, Aligned, |b: u128| b & EVEN32 | (b & EVEN32) << 32),
        M::Movshdup => unary!(form, Aligned, |b: u128| b & !EVEN32 | (b & !EVEN32) >> 32),
        M::Movmskps => match form.kinds[1] {
            Kind::Xmm => |core, op| {
                core.set_reg(op.dst, host::movmskps(core.xmm(op.src)));
                Ok(())
            },
            _ => return None,
        },
        M::Movmskpd => match form.kinds[1] {
            Kind::Xmm => |core, op| {
                core.set_reg(op.dst, host::movmskpd(core.xmm(op.src)));
                Ok(())
            },
            _ => return None,
        },
        M::Pmovmskb => match form.kinds[1] {
            Kind::Xmm => |core, op| {
                core.set_reg(op.dst, host::pmovmskb(core.xmm(op.src)));
                Ok(())
            },
            _ => return None,
        },
        M::Maskmovdqu => masked_store,
        M::Ldmxcsr => |core, op| {
            let value: u32 = Mem::<Segmented>::read(core, op)?;
            if mxcsr::has_reserved_bits(value) {
                return Err(core.general_protection(0));
            }
            core.set_mxcsr(value);
            Ok(())
        },
        M::Stmxcsr => |core, op| {
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
const LOW64: u128 = u64::MAX as u128;
/// The even 32-bit lanes.
const EVEN32: u128 = LOW64 << 64 & LOW32 << 64 | LOW32;

fn load<S: Source>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let value = S::read(core, op)?;
    core.set_xmm(op.dst, value);
    Ok(())
}

fn store_aligned<A: Address>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    Aligned::<A>::write(core, op, core.xmm(op.src))
}

fn store_unaligned<A: Address>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    Unaligned::<A>::write(core, op, core.xmm(op.src))
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

fn load_low_half<A: Address>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let value: u64 = Mem::<A>::read(core, op)?;
    core.set_xmm(op.dst, core.xmm(op.dst) & !LOW64 | u128::from(value));
    Ok(())
}

fn load_high_half<A: Address>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let value: u64 = Mem::<A>::read(core, op)?;
    core.set_xmm(op.dst, core.xmm(op.dst) & LOW64 | u128::from(value) << 64);
    Ok(())
}

fn store_general<T: Int, A: Address>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let value: T = core.reg(op.src);
    Mem::<A>::write(core, op, value)
}

/// MASKMOVDQU: stores the bytes whose mask has its top bit set. Whether pages that no such byte lies
/// in may fault is left to the implementation; here all 16 bytes must be writable.
fn masked_store(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let value = core.xmm(op.src).to_le_bytes();
    let mask = host::pmovmskb(core.xmm(op.aux));
    let offset = core.regs[gpr::RDI] & op.address_mask();
    let linear = core.linear(op.seg, offset, 16, true)?;
    core.touch_write(linear, 16)?;
    for (i, &byte) in (0u64..).zip(&value) {
        if mask >> i & 1 != 0 {
            core.store(linear.wrapping_add(i), byte)?;
        }
    }
    Ok(())
}
