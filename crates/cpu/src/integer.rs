//! Moves, arithmetic and logic on general registers and memory: operands fetched, results stored.

use crate::alu::{self, Binary, Condition, Unary};
use crate::core_state::Core;
use crate::form::{Form, Kind, by_address, by_condition, by_width};
use crate::int::Int;
use crate::op::{Address, Dst, Handler, Imm, Mem, Op, Place, Read, Segmented, Src, offset};
use crate::state::{gpr, rflags};
use crate::trap::Trap;
use iced_x86::Mnemonic as M;

/// The handler for an instruction of this subject.
pub(crate) fn select(form: &Form) -> Option<Handler> {
    Some(match form.mnemonic {
        M::Add => return by_width!(form, T => select_binary::<alu::Add, T>(form)),
        M::Adc => return by_width!(form, T => select_binary::<alu::Adc, T>(form)),
        M::Sub => return by_width!(form, T => select_binary::<alu::Sub, T>(form)),
        M::Sbb => return by_width!(form, T => select_binary::<alu::Sbb, T>(form)),
        M::And => return by_width!(form, T => select_binary::<alu::And, T>(form)),
        M::Or => return by_width!(form, T => select_binary::<alu::Or, T>(form)),
        M::Xor => return by_width!(form, T => select_binary::<alu::Xor, T>(form)),
        M::Cmp => return by_width!(form, T => select_binary::<alu::Cmp, T>(form)),
        M::Test => return by_width!(form, T => select_binary::<alu::Test, T>(form)),
        M::Inc => return by_width!(form, T => select_unary::<alu::Inc, T>(form)),
        M::Dec => return by_width!(form, T => select_unary::<alu::Dec, T>(form)),
        M::Neg => return by_width!(form, T => select_unary::<alu::Neg, T>(form)),
        M::Not => return by_width!(form, T => select_unary::<alu::Not, T>(form)),
        M::Mov => return by_width!(form, T => select_move::<T>(form)),
        M::Movzx => return select_extend(form, false),
        M::Movsx | M::Movsxd => return select_extend(form, true),
        M::Lea => match form.width {
            2 => lea::<u16>,
            4 => lea::<u32>,
            _ => lea::<u64>,
        },
        M::Xchg => return by_width!(form, T => select_exchange::<T>(form)),
        M::Xadd => by_width!(form, T => Some(match form.kinds[0] {
            Kind::Mem => exchange_add_memory::<T>,
            _ => exchange_add_register::<T>,
        }))?,
        M::Cmpxchg => by_width!(form, T => Some(match form.kinds[0] {
            Kind::Mem => compare_exchange_memory::<T>,
            _ => compare_exchange_register::<T>,
        }))?,
        M::Cmpxchg8b => compare_exchange_8,
        M::Cmpxchg16b => compare_exchange_16,
        M::Cbw => |core, _| {
            let value: u8 = core.reg(RAX);
            core.set_reg(RAX, value.sign_extend() as u16);
            Ok(())
        },
        M::Cwde => |core, _| {
            let value: u16 = core.reg(RAX);
            core.set_reg(RAX, value.sign_extend() as u32);
            Ok(())
        },
        M::Cdqe => |core, _| {
            let value: u32 = core.reg(RAX);
            core.set_reg(RAX, value.sign_extend());
            Ok(())
        },
        M::Cwd => spread_sign::<u16>,
        M::Cdq => spread_sign::<u32>,
        M::Cqo => spread_sign::<u64>,
        M::Bswap => match form.width {
            // Undefined for 16 bits; every processor clears the register.
            2 => |core, op| {
                core.set_reg(op.dst, 0u16);
                Ok(())
            },
            4 => |core, op| {
                let value: u32 = core.reg(op.dst);
                core.set_reg(op.dst, value.swap_bytes());
                Ok(())
            },
            _ => |core, op| {
                let value: u64 = core.reg(op.dst);
                core.set_reg(op.dst, value.swap_bytes());
                Ok(())
            },
        },
        M::Movbe => match (form.width, form.kinds[0]) {
            (2, Kind::Mem) => |core, op| {
                let value: u16 = core.reg(op.src);
                Mem::<Segmented>::write(core, op, value.swap_bytes())
            },
            (4, Kind::Mem) => |core, op| {
                let value: u32 = core.reg(op.src);
                Mem::<Segmented>::write(core, op, value.swap_bytes())
            },
            (_, Kind::Mem) => |core, op| {
                let value: u64 = core.reg(op.src);
                Mem::<Segmented>::write(core, op, value.swap_bytes())
            },
            (2, _) => |core, op| {
                let value = Mem::<Segmented>::read::<u16>(core, op)?;
                core.set_reg(op.dst, value.swap_bytes());
                Ok(())
            },
            (4, _) => |core, op| {
                let value = Mem::<Segmented>::read::<u32>(core, op)?;
                core.set_reg(op.dst, value.swap_bytes());
                Ok(())
            },
            _ => |core, op| {
                let value = Mem::<Segmented>::read::<u64>(core, op)?;
                core.set_reg(op.dst, value.swap_bytes());
                Ok(())
            },
        },
        M::Lahf => |core, _| {
            let value = core.flags.arithmetic() as u8 | 2;
            core.set_reg(AH, value);
            Ok(())
        },
        M::Sahf => |core, _| {
            let ah: u8 = core.reg(AH);
            let image = core.flags.arithmetic() & rflags::OF | u64::from(ah);
            core.flags.set_arithmetic(image);
            Ok(())
        },
        M::Cmc => |core, _| {
            let cf = core.flags.cf();
            core.flags.set_cf(!cf);
            Ok(())
        },
        M::Clc => |core, _| {
            core.flags.set_cf(false);
            Ok(())
        },
        M::Stc => |core, _| {
            core.flags.set_cf(true);
            Ok(())
        },
        M::Cld => |core, _| {
            let system = core.flags.system() & !rflags::DF;
            core.flags.set_system(system);
            Ok(())
        },
        M::Std => |core, _| {
            let system = core.flags.system() | rflags::DF;
            core.flags.set_system(system);
            Ok(())
        },
        M::Xlatb => |core, op| {
            let al: u8 = core.reg(RAX);
            let rbx = core.regs[gpr::RBX];
            let offset = rbx.wrapping_add(u64::from(al)) & op.address_mask();
            let linear = core.linear(op.seg, offset, 1, false)?;
            if !core.is_canonical(linear) {
                return Err(core.segment_fault(op.seg));
            }
            let value: u8 = core.load(linear)?;
            core.set_reg(RAX, value);
            Ok(())
        },
        M::Nop | M::Pause => nop,
        // Encodings that do nothing until a feature gives them a meaning.
        M::Reservednop
        | M::Endbr64
        | M::Endbr32
        | M::Rdsspd
        | M::Rdsspq
        | M::Cldemote
        | M::Prefetchit0
        | M::Prefetchit1 => nop,
        M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetchw
        | M::Prefetchwt1
        | M::Prefetch => nop,
        _ if form.condition.is_some() => return select_conditional(form),
        _ => return None,
    })
}

const RAX: u8 = gpr::RAX as u8;
const RDX: u8 = gpr::RDX as u8;
const AH: u8 = crate::op::HIGH_BYTE;

pub(crate) fn nop(_core: &mut Core, _op: &Op) -> Result<(), Trap> {
    Ok(())
}

fn select_binary<O: Binary, T: Int>(form: &Form) -> Option<Handler> {
    Some(match (form.kinds[0], form.kinds[1]) {
        (Kind::Reg, Kind::Reg) => binary::<O, T, Dst, Src>,
        (Kind::Reg, Kind::Imm) => binary::<O, T, Dst, Imm>,
        (Kind::Reg, Kind::Mem) => by_address!(form, A => binary::<O, T, Dst, Mem<A>>),
        (Kind::Mem, Kind::Reg) => by_address!(form, A => binary::<O, T, Mem<A>, Src>),
        (Kind::Mem, Kind::Imm) => by_address!(form, A => binary::<O, T, Mem<A>, Imm>),
        _ => return None,
    })
}

fn binary<O: Binary, T: Int, D: Place, S: Read>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let b: T = S::read(core, op)?;
    let carry = O::TAKES_CARRY && core.flags.cf();
    let (a, result) = if O::STORES {
        D::modify(core, op, |a| O::value(a, b, carry))?
    } else {
        let a = D::read(core, op)?;
        (a, O::value(a, b, carry))
    };
    O::flags(&mut core.flags, a, b, result);
    Ok(())
}

fn select_unary<O: Unary, T: Int>(form: &Form) -> Option<Handler> {
    Some(match form.kinds[0] {
        Kind::Reg => unary::<O, T, Dst>,
        Kind::Mem => by_address!(form, A => unary::<O, T, Mem<A>>),
        _ => return None,
    })
}

fn unary<O: Unary, T: Int, D: Place>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let (a, result) = D::modify::<T>(core, op, O::value)?;
    O::flags(&mut core.flags, a, result);
    Ok(())
}

fn select_move<T: Int>(form: &Form) -> Option<Handler> {
    Some(match (form.kinds[0], form.kinds[1]) {
        (Kind::Reg, Kind::Reg) => copy::<T, Dst, Src>,
        (Kind::Reg, Kind::Imm) => copy::<T, Dst, Imm>,
        (Kind::Reg, Kind::Mem) => by_address!(form, A => copy::<T, Dst, Mem<A>>),
        (Kind::Mem, Kind::Reg) => by_address!(form, A => copy::<T, Mem<A>, Src>),
        (Kind::Mem, Kind::Imm) => by_address!(form, A => copy::<T, Mem<A>, Imm>),
        _ => return None,
    })
}

fn copy<T: Int, D: Place, S: Read>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let value: T = S::read(core, op)?;
    D::write(core, op, value)
}

fn select_extend(form: &Form, signed: bool) -> Option<Handler> {
    macro_rules! extend_from {
        ($from:ty, $to:ty) => {
            match (form.kinds[1], signed) {
                (Kind::Mem, false) => by_address!(form, A => extend::<$from, $to, Mem<A>, false>),
                (Kind::Mem, true) => by_address!(form, A => extend::<$from, $to, Mem<A>, true>),
                (_, false) => extend::<$from, $to, Src, false>,
                (_, true) => extend::<$from, $to, Src, true>,
            }
        };
    }
    Some(match (form.source_width(), form.width) {
        (1, 2) => extend_from!(u8, u16),
        (1, 4) => extend_from!(u8, u32),
        (1, 8) => extend_from!(u8, u64),
        (2, 2) => extend_from!(u16, u16),
        (2, 4) => extend_from!(u16, u32),
        (2, 8) => extend_from!(u16, u64),
        (4, 2) => extend_from!(u32, u16),
        (4, 4) => extend_from!(u32, u32),
        (4, 8) => extend_from!(u32, u64),
        _ => return None,
    })
}

fn extend<F: Int, T: Int, S: Read, const SIGNED: bool>(
    core: &mut Core,
    op: &Op,
) -> Result<(), Trap> {
    let value: F = S::read(core, op)?;
    let wide = if SIGNED {
        value.sign_extend()
    } else {
        value.zero_extend()
    };
    core.set_reg(op.dst, T::truncate(wide));
    Ok(())
}

fn lea<T: Int>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let offset = offset(core, op) & op.address_mask();
    core.set_reg(op.dst, T::truncate(offset));
    Ok(())
}

fn select_exchange<T: Int>(form: &Form) -> Option<Handler> {
    Some(match (form.kinds[0], form.kinds[1]) {
        (Kind::Reg, Kind::Reg) => |core, op| {
            let (a, b): (T, T) = (core.reg(op.dst), core.reg(op.src));
            core.set_reg(op.dst, b);
            core.set_reg(op.src, a);
            Ok(())
        },
        (Kind::Mem, Kind::Reg) => exchange::<T, Src>,
        (Kind::Reg, Kind::Mem) => exchange::<T, Dst>,
        _ => return None,
    })
}

fn exchange<T: Int, R: Place>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let new: T = R::read(core, op)?;
    let linear = Segmented::for_write(core, op, T::BYTES)?;
    // Always locked, prefix or not.
    let (old, _) = core.rmw(linear, true, |_| new)?;
    R::write(core, op, old)
}

fn exchange_add_register<T: Int>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let (a, b): (T, T) = (core.reg(op.dst), core.reg(op.src));
    let sum = a.add(b);
    // In this order: with the same register twice the sum stays.
    core.set_reg(op.src, a);
    core.set_reg(op.dst, sum);
    alu::Add::flags(&mut core.flags, a, b, sum);
    Ok(())
}

fn exchange_add_memory<T: Int>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let b: T = core.reg(op.src);
    let (a, sum) = Mem::<Segmented>::modify(core, op, |a: T| a.add(b))?;
    core.set_reg(op.src, a);
    alu::Add::flags(&mut core.flags, a, b, sum);
    Ok(())
}

fn compare_exchange_register<T: Int>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let (accumulator, old, new): (T, T, T) = (core.reg(RAX), core.reg(op.dst), core.reg(op.src));
    if accumulator == old {
        core.set_reg(op.dst, new);
    } else {
        core.set_reg(RAX, old);
    }
    alu::Cmp::flags(&mut core.flags, accumulator, old, accumulator.sub(old));
    Ok(())
}

fn compare_exchange_memory<T: Int>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let (accumulator, new): (T, T) = (core.reg(RAX), core.reg(op.src));
    let linear = Segmented::for_write(core, op, T::BYTES)?;
    let (old, _) = core.rmw(
        linear,
        op.lock,
        |old| if old == accumulator { new } else { old },
    )?;
    if accumulator != old {
        core.set_reg(RAX, old);
    }
    alu::Cmp::flags(&mut core.flags, accumulator, old, accumulator.sub(old));
    Ok(())
}

fn compare_exchange_8(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let pair = |high: usize, low: usize| core.regs[high] << 32 | core.regs[low] & 0xffff_ffff;
    let expected = pair(gpr::RDX, gpr::RAX);
    let new = pair(gpr::RCX, gpr::RBX);
    let linear = Segmented::for_write(core, op, 8)?;
    let (old, _) = core.rmw::<u64>(
        linear,
        op.lock,
        |old| if old == expected { new } else { old },
    )?;
    if old != expected {
        core.set_reg(RAX, old as u32);
        core.set_reg(RDX, (old >> 32) as u32);
    }
    core.flags.set_zf(old == expected);
    Ok(())
}

fn compare_exchange_16(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let pair =
        |high: usize, low: usize| u128::from(core.regs[high]) << 64 | u128::from(core.regs[low]);
    let expected = pair(gpr::RDX, gpr::RAX);
    let new = pair(gpr::RCX, gpr::RBX);
    let linear = Segmented::for_write(core, op, 16)?;
    if linear & 15 != 0 {
        return Err(core.general_protection(0));
    }
    let old = core.cmpxchg16(linear, expected, new)?;
    if old != expected {
        core.regs[gpr::RAX] = old as u64;
        core.regs[gpr::RDX] = (old >> 64) as u64;
    }
    core.flags.set_zf(old == expected);
    Ok(())
}

fn spread_sign<T: Int>(core: &mut Core, _op: &Op) -> Result<(), Trap> {
    let value: T = core.reg(RAX);
    core.set_reg(RDX, if value.sign() { !T::ZERO } else { T::ZERO });
    Ok(())
}

fn select_conditional(form: &Form) -> Option<Handler> {
    let condition = form.condition?;
    if form.is_set {
        return Some(match form.kinds[0] {
            Kind::Mem => by_condition!(condition, C => set::<C, Mem<Segmented>>),
            _ => by_condition!(condition, C => set::<C, Dst>),
        });
    }
    if form.is_cmov {
        return by_width!(form, T => Some(match form.kinds[1] {
            Kind::Mem => by_condition!(condition, C => conditional_move::<C, T, Mem<Segmented>>),
            _ => by_condition!(condition, C => conditional_move::<C, T, Src>),
        }));
    }
    None
}

fn set<C: Condition, D: Place>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let value = u8::from(C::holds(&core.flags));
    D::write(core, op, value)
}

fn conditional_move<C: Condition, T: Int, S: Read>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    // The source is read, and a 32-bit destination extended, whether the condition holds or not.
    let value: T = S::read(core, op)?;
    let old: T = core.reg(op.dst);
    core.set_reg(op.dst, if C::holds(&core.flags) { value } else { old });
    Ok(())
}
