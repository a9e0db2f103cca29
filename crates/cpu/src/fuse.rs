//! A comparison and the conditional branch behind it as one operation.
//!
//! Loops and `if`s end in such pairs. Together they cost one dispatch, and the condition is
//! computed from the comparison's operands while they are at hand. Only comparisons of registers
//! and immediates are fused: they cannot trap, so that the pair is always completed.

use crate::alu::{self, Binary, Condition, Unary};
use crate::core_state::Core;
use crate::form::{Form, Kind, by_condition};
use crate::int::Int;
use crate::mode::Mode;
use crate::op::{Dst, Handler, Imm, Op, Place, Read, Src};
use crate::trap::Trap;
use iced_x86::Mnemonic as M;

/// The fused operation for two neighbours, the second a conditional branch.
pub(crate) fn fuse(first: &Form, first_op: &Op, branch: &Form, branch_op: &Op) -> Option<Op> {
    if !branch.mode.has(Mode::CODE64) || !branch.instruction.is_jcc_short_or_near() {
        return None;
    }
    let run = select(first, branch)?;
    // There is no memory operand, so its displacement can hold the branch's target.
    Some(Op {
        run,
        disp: branch_op.imm,
        len: first_op.len + branch_op.len,
        ..*first_op
    })
}

fn select(first: &Form, branch: &Form) -> Option<Handler> {
    match (first.mnemonic, first.kinds[0], first.kinds[1]) {
        (M::Cmp, Kind::Reg, Kind::Imm) => select_width::<alu::Cmp, Imm>(first, branch),
        (M::Cmp, Kind::Reg, Kind::Reg) => select_width::<alu::Cmp, Src>(first, branch),
        (M::Test, Kind::Reg, Kind::Imm) => select_width::<alu::Test, Imm>(first, branch),
        (M::Test, Kind::Reg, Kind::Reg) => select_width::<alu::Test, Src>(first, branch),
        (M::Sub, Kind::Reg, Kind::Imm) => select_width::<alu::Sub, Imm>(first, branch),
        (M::Add, Kind::Reg, Kind::Imm) => select_width::<alu::Add, Imm>(first, branch),
        (M::Dec, Kind::Reg, _) => select_unary::<alu::Dec>(first, branch),
        (M::Inc, Kind::Reg, _) => select_unary::<alu::Inc>(first, branch),
        _ => None,
    }
}

fn select_width<O: Binary, S: Read>(first: &Form, branch: &Form) -> Option<Handler> {
    let condition = branch.condition?;
    Some(match first.width {
        1 => by_condition!(condition, C => binary::<O, u8, S, C>),
        4 => by_condition!(condition, C => binary::<O, u32, S, C>),
        8 => by_condition!(condition, C => binary::<O, u64, S, C>),
        _ => return None,
    })
}

fn select_unary<O: Unary>(first: &Form, branch: &Form) -> Option<Handler> {
    let condition = branch.condition?;
    Some(match first.width {
        4 => by_condition!(condition, C => unary::<O, u32, C>),
        8 => by_condition!(condition, C => unary::<O, u64, C>),
        _ => return None,
    })
}

fn binary<O: Binary, T: Int, S: Read, C: Condition>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let b: T = S::read(core, op)?;
    let a: T = Dst::read(core, op)?;
    let result = O::value(a, b, false);
    if O::STORES {
        Dst::write(core, op, result)?;
    }
    O::flags(&mut core.flags, a, b, result);
    if C::holds(&core.flags) {
        core.rip = op.disp;
    }
    Ok(())
}

fn unary<O: Unary, T: Int, C: Condition>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let (a, result) = Dst::modify::<T>(core, op, O::value)?;
    O::flags(&mut core.flags, a, result);
    if C::holds(&core.flags) {
        core.rip = op.disp;
    }
    Ok(())
}
