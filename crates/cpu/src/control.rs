//! Near branches, calls, returns and loops.

use crate::alu::Condition;
use crate::core_state::Core;
use crate::form::{Form, Kind, by_address, by_condition};
use crate::int::Int;
use crate::mode::Mode;
use crate::op::{Dst, Handler, Mem, Op, Read, Segmented};
use crate::state::{cr4, gpr};
use crate::trap::Trap;
use iced_x86::Mnemonic as M;

const RCX: u8 = gpr::RCX as u8;

/// The handler for an instruction of this subject.
pub(crate) fn select(form: &Form) -> Option<Handler> {
    let bytes = form.instruction.stack_pointer_increment().unsigned_abs();
    match (form.mnemonic, form.kinds[0]) {
        (M::Jmp, Kind::Near) => Some(jump),
        (M::Jmp, Kind::Reg) => Some(match form.width {
            2 => jump_indirect::<u16, Dst>,
            4 => jump_indirect::<u32, Dst>,
            _ => jump_indirect::<u64, Dst>,
        }),
        (M::Jmp, Kind::Mem) if form.instruction.is_jmp_near_indirect() => Some(match form.width {
            2 => jump_indirect::<u16, Mem<Segmented>>,
            4 => jump_indirect::<u32, Mem<Segmented>>,
            _ => by_address!(form, A => jump_indirect::<u64, Mem<A>>),
        }),
        (M::Call, Kind::Near) => Some(match bytes {
            2 => call::<u16>,
            4 => call::<u32>,
            _ => call::<u64>,
        }),
        (M::Call, Kind::Reg) => Some(match form.width {
            2 => call_indirect::<u16, Dst>,
            4 => call_indirect::<u32, Dst>,
            _ => call_indirect::<u64, Dst>,
        }),
        (M::Call, Kind::Mem) if form.instruction.is_call_near_indirect() => {
            Some(match form.width {
                2 => call_indirect::<u16, Mem<Segmented>>,
                4 => call_indirect::<u32, Mem<Segmented>>,
                _ => by_address!(form, A => call_indirect::<u64, Mem<A>>),
            })
        }
        (M::Ret, _) => {
            // `ret imm` counts its immediate in the increment.
            use iced_x86::Code as C;
            Some(match form.instruction.code() {
                C::Retnw | C::Retnw_imm16 => ret::<u16>,
                C::Retnd | C::Retnd_imm16 => ret::<u32>,
                _ => ret::<u64>,
            })
        }
        (M::Loop, _) => Some(loop_while::<Always>),
        (M::Loope, _) => Some(loop_while::<crate::alu::Equal>),
        (M::Loopne, _) => Some(loop_while::<crate::alu::NotEqual>),
        (M::Jcxz | M::Jecxz | M::Jrcxz, _) => Some(jump_if_zero),
        (_, Kind::Near) if form.instruction.is_jcc_short_or_near() => {
            let condition = form.condition?;
            if form.mode.has(Mode::CODE64) {
                Some(by_condition!(condition, C => jump_if::<C, true>))
            } else {
                Some(by_condition!(condition, C => jump_if::<C, false>))
            }
        }
        _ => None,
    }
}

impl Core {
    /// Goes on at `target`, or raises #GP(0) if nothing can be executed there.
    #[inline(always)]
    pub(crate) fn branch(&mut self, target: u64) -> Result<(), Trap> {
        // The top 17 bits of a canonical address are all equal.
        let plain = ((target >> 47) + 1) & 0x1_ffff <= 1;
        if !plain || !self.mode.has(Mode::CODE64) {
            self.check_target(target)?;
        }
        self.rip = target;
        Ok(())
    }

    /// Checks that `target` lies in the code segment, or in 64-bit code that it is canonical.
    pub(crate) fn check_target(&mut self, target: u64) -> Result<(), Trap> {
        let valid = if self.mode.has(Mode::CODE64) {
            self.is_canonical(target)
        } else {
            target <= u64::from(self.segment[usize::from(crate::core_state::seg::CS)].limit)
        };
        if valid {
            Ok(())
        } else {
            Err(self.general_protection(0))
        }
    }

    /// Whether an address is canonical for the current paging mode.
    pub(crate) fn is_canonical(&self, address: u64) -> bool {
        let unused = if self.cr4 & cr4::LA57 != 0 { 7 } else { 16 };
        ((address << unused) as i64 >> unused) as u64 == address
    }
}

/// The condition of LOOP, which has none.
struct Always;
impl Condition for Always {
    #[inline(always)]
    fn holds(_flags: &crate::flags::Flags) -> bool {
        true
    }
}

fn jump(core: &mut Core, op: &Op) -> Result<(), Trap> {
    core.branch(op.imm)
}

fn jump_if<C: Condition, const LONG: bool>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    if C::holds(&core.flags) {
        if LONG {
            // A displacement cannot lead across the gap between the canonical halves other than
            // to an address whose fetch raises #GP.
            core.rip = op.imm;
        } else {
            core.branch(op.imm)?;
        }
    }
    Ok(())
}

fn jump_indirect<T: Int, S: Read>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let target: T = S::read(core, op)?;
    core.branch(target.zero_extend())
}

fn call<T: Int>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    call_to::<T>(core, op, op.imm)
}

fn call_indirect<T: Int, S: Read>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let target: T = S::read(core, op)?;
    call_to::<T>(core, op, target.zero_extend())
}

#[inline(always)]
fn call_to<T: Int>(core: &mut Core, op: &Op, target: u64) -> Result<(), Trap> {
    let after = core.rip;
    core.branch(target)?;
    if let Err(trap) = core.push(T::truncate(op.next_ip())) {
        core.rip = after;
        return Err(trap);
    }
    Ok(())
}

fn ret<T: Int>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let target: T = core.peek(0)?;
    core.branch(target.zero_extend())?;
    core.drop_stack(T::BYTES + (op.imm & 0xffff));
    Ok(())
}

fn loop_while<C: Condition>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let count = core.regs[gpr::RCX].wrapping_sub(1) & op.address_mask();
    if count != 0 && C::holds(&core.flags) {
        core.branch(op.imm)?;
    }
    set_count(core, op, count);
    Ok(())
}

fn set_count(core: &mut Core, op: &Op, count: u64) {
    match op.address_bits {
        16 => core.set_reg(RCX, count as u16),
        32 => core.set_reg(RCX, count as u32),
        _ => core.set_reg(RCX, count),
    }
}

fn jump_if_zero(core: &mut Core, op: &Op) -> Result<(), Trap> {
    if core.regs[gpr::RCX] & op.address_mask() == 0 {
        core.branch(op.imm)?;
    }
    Ok(())
}
