//! The instructions that compute, move and compare, on the host's unit.

use super::host::{Instruction, Operand, Unit};
use super::{ready, status};
use crate::core_state::Core;
use crate::form::Form;
use crate::int::Int;
use crate::op::{Address as _, Handler, Mem, Op, Read as _, Segmented, offset};
use crate::trap::Trap;
use iced_x86::Mnemonic as M;

/// The handler for an instruction of this subject.
pub(super) fn select(form: &Form) -> Option<Handler> {
    Some(match form.mnemonic {
        M::Fcmovb
        | M::Fcmove
        | M::Fcmovbe
        | M::Fcmovu
        | M::Fcmovnb
        | M::Fcmovne
        | M::Fcmovnbe
        | M::Fcmovnu
        | M::Fcomi
        | M::Fcomip
        | M::Fucomi
        | M::Fucomip => with_flags,
        _ if !form.has_memory() => match form.mnemonic {
            M::F2xm1
            | M::Fabs
            | M::Fadd
            | M::Faddp
            | M::Fchs
            | M::Fcom
            | M::Fcomp
            | M::Fcompp
            | M::Fcos
            | M::Fdecstp
            | M::Fdiv
            | M::Fdivp
            | M::Fdivr
            | M::Fdivrp
            | M::Ffree
            | M::Ffreep
            | M::Fincstp
            | M::Fld
            | M::Fld1
            | M::Fldl2e
            | M::Fldl2t
            | M::Fldlg2
            | M::Fldln2
            | M::Fldpi
            | M::Fldz
            | M::Fmul
            | M::Fmulp
            | M::Fnop
            | M::Fpatan
            | M::Fprem
            | M::Fprem1
            | M::Fptan
            | M::Frndint
            | M::Fscale
            | M::Fsin
            | M::Fsincos
            | M::Fsqrt
            | M::Fst
            | M::Fstp
            | M::Fstpnce
            | M::Fsub
            | M::Fsubp
            | M::Fsubr
            | M::Fsubrp
            | M::Ftst
            | M::Fucom
            | M::Fucomp
            | M::Fucompp
            | M::Fxam
            | M::Fxch
            | M::Fxtract
            | M::Fyl2x
            | M::Fyl2xp1 => on_registers,
            _ => return None,
        },
        M::Fadd
        | M::Fbld
        | M::Fcom
        | M::Fcomp
        | M::Fdiv
        | M::Fdivr
        | M::Fiadd
        | M::Ficom
        | M::Ficomp
        | M::Fidiv
        | M::Fidivr
        | M::Fild
        | M::Fimul
        | M::Fisub
        | M::Fisubr
        | M::Fld
        | M::Fmul
        | M::Fsub
        | M::Fsubr => match form.width {
            2 => load::<u16>,
            4 => load::<u32>,
            8 => load::<u64>,
            10 => load::<Extended>,
            _ => return None,
        },
        M::Fbstp | M::Fist | M::Fistp | M::Fisttp | M::Fst | M::Fstp => match form.width {
            2 => store::<u16>,
            4 => store::<u32>,
            8 => store::<u64>,
            10 => store::<Extended>,
            _ => return None,
        },
        _ => return None,
    })
}

/// Keeps the instruction's opcode in its operation, as the last-opcode register will have it.
/// `bytes` begin with the instruction.
pub(crate) fn note_opcode(form: &Form, bytes: &[u8], op: &mut Op) {
    if select(form).is_none() {
        return;
    }
    // No prefix has a value that an x87 opcode has.
    let found = bytes.windows(2).find(|pair| pair[0] & 0xf8 == 0xd8);
    if let Some(&[opcode, modrm]) = found {
        op.imm = u64::from(opcode & 7) << 8 | u64::from(modrm);
    }
}

fn instruction(op: &Op) -> Instruction {
    Instruction(op.imm as u16)
}

/// The unit of a guest that may use it.
fn unit(core: &mut Core) -> Result<Unit, Trap> {
    ready(core)?;
    Ok(Unit::new(&core.vectors))
}

/// Takes the result over. The operand pointer is that of the last instruction that had one.
fn commit(core: &mut Core, op: &Op, unit: &Unit) {
    unit.store(&mut core.vectors);
    core.vectors.fop = op.imm as u16;
    core.vectors.fip = op.ip;
}

fn commit_with_operand(core: &mut Core, op: &Op, unit: &Unit) {
    commit(core, op, unit);
    core.vectors.fdp = offset(core, op) & op.address_mask();
}

fn on_registers(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let mut unit = unit(core)?;
    unit.execute(instruction(op), &mut Operand::default());
    commit(core, op, &unit);
    Ok(())
}

fn with_flags(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let mut unit = unit(core)?;
    let before = core.flags.arithmetic();
    let after = unit.execute_with_flags(instruction(op), before);
    core.flags.set_arithmetic(after);
    commit(core, op, &unit);
    Ok(())
}

/// A memory operand as it is accessed.
trait Value {
    /// Where its parts are.
    type Place: Copy;
    /// Reads it.
    fn fetch(core: &mut Core, op: &Op) -> Result<Operand, Trap>;
    /// Makes sure that it can be written.
    fn reserve(core: &mut Core, op: &Op) -> Result<Self::Place, Trap>;
    /// Writes it.
    fn put(core: &mut Core, place: Self::Place, operand: Operand) -> Result<(), Trap>;
}

impl<T: Int> Value for T {
    type Place = u64;

    fn fetch(core: &mut Core, op: &Op) -> Result<Operand, Trap> {
        let value: T = Mem::<Segmented>::read(core, op)?;
        Ok(Operand(value.zero_extend().into()))
    }

    fn reserve(core: &mut Core, op: &Op) -> Result<u64, Trap> {
        let linear = Segmented::for_write(core, op, T::BYTES)?;
        core.touch_write(linear, T::BYTES)?;
        Ok(linear)
    }

    fn put(core: &mut Core, place: u64, operand: Operand) -> Result<(), Trap> {
        core.store(place, T::truncate(operand.0 as u64))
    }
}

/// Ten bytes: a number in double extended precision, or 18 decimal digits. The two parts are checked
/// against the segment on their own.
struct Extended;

impl Extended {
    /// The operand that is the part behind the significand.
    fn upper(op: &Op) -> Op {
        Op {
            disp: op.disp.wrapping_add(8),
            ..*op
        }
    }
}

impl Value for Extended {
    type Place = [u64; 2];

    fn fetch(core: &mut Core, op: &Op) -> Result<Operand, Trap> {
        let low: u64 = Mem::<Segmented>::read(core, op)?;
        let high: u16 = Mem::<Segmented>::read(core, &Self::upper(op))?;
        Ok(Operand(u128::from(high) << 64 | u128::from(low)))
    }

    fn reserve(core: &mut Core, op: &Op) -> Result<[u64; 2], Trap> {
        Ok([
            u64::reserve(core, op)?,
            u16::reserve(core, &Self::upper(op))?,
        ])
    }

    fn put(core: &mut Core, [low, high]: [u64; 2], operand: Operand) -> Result<(), Trap> {
        core.store(low, operand.0 as u64)?;
        core.store(high, (operand.0 >> 64) as u16)
    }
}

/// An instruction that reads memory.
fn load<V: Value>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    ready(core)?;
    let mut operand = V::fetch(core, op)?;
    let mut unit = Unit::new(&core.vectors);
    unit.execute(instruction(op), &mut operand);
    commit_with_operand(core, op, &unit);
    Ok(())
}

/// An instruction that writes memory. That it may is found out before it computes.
fn store<V: Value>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    ready(core)?;
    let place = V::reserve(core, op)?;
    let mut operand = Operand::default();
    let mut unit = Unit::new(&core.vectors);
    unit.execute(instruction(op), &mut operand);
    if writes(&unit) {
        V::put(core, place, operand)?;
    }
    commit_with_operand(core, op, &unit);
    Ok(())
}

/// Whether the instruction has written its operand: only the precision exception lets it if it is
/// unmasked. What waits now has come from this instruction.
fn writes(unit: &Unit) -> bool {
    let waits = unit.status() & !unit.control() & status::EXCEPTIONS;
    waits & !status::PRECISION == 0
}
