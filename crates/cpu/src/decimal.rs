//! Decimal arithmetic's adjustments, and SALC: what 64-bit code does not have (SDM Vol. 1, "Decimal
//! Arithmetic Instructions").
//!
//! Flags that the manual leaves undefined are as they come.

use crate::core_state::Core;
use crate::form::Form;
use crate::muldiv::divide_error;
use crate::op::{HIGH_BYTE, Handler, Op};
use crate::state::gpr;
use crate::trap::Trap;
use iced_x86::Mnemonic as M;

const AL: u8 = gpr::RAX as u8;
const AH: u8 = AL | HIGH_BYTE;
const AX: u8 = gpr::RAX as u8;

/// The handler for an instruction of this subject.
pub(crate) fn select(form: &Form) -> Option<Handler> {
    Some(match form.mnemonic {
        M::Daa => |core, _| {
            adjust_packed(core, false);
            Ok(())
        },
        M::Das => |core, _| {
            adjust_packed(core, true);
            Ok(())
        },
        M::Aaa => |core, _| {
            adjust_unpacked(core, |ax| ax.wrapping_add(0x106));
            Ok(())
        },
        M::Aas => |core, _| {
            adjust_unpacked(core, |ax| ax.wrapping_sub(0x106));
            Ok(())
        },
        M::Aam => |core, op| {
            let (al, base): (u8, u8) = (core.reg(AL), op.imm as u8);
            let (Some(high), Some(low)) = (al.checked_div(base), al.checked_rem(base)) else {
                return Err(divide_error(core));
            };
            core.set_reg(AH, high);
            core.set_reg(AL, low);
            core.flags.set_logic(low);
            Ok(())
        },
        M::Aad => |core, op| {
            let (al, ah): (u8, u8) = (core.reg(AL), core.reg(AH));
            let value = al.wrapping_add(ah.wrapping_mul(op.imm as u8));
            core.set_reg(AX, u16::from(value));
            core.flags.set_logic(value);
            Ok(())
        },
        M::Salc => |core, _: &Op| -> Result<(), Trap> {
            let value = if core.flags.cf() { u8::MAX } else { 0 };
            core.set_reg(AL, value);
            Ok(())
        },
        _ => return None,
    })
}

/// DAA and DAS: six more, or less, in each digit that is not a decimal one or had a carry.
fn adjust_packed(core: &mut Core, subtracts: bool) {
    let step = match subtracts {
        false => u8::wrapping_add,
        true => u8::wrapping_sub,
    };
    let before: u8 = core.reg(AL);
    let low = before & 0xf > 9 || core.flags.af();
    let high = before > 0x99 || core.flags.cf();
    let mut value = before;
    if low {
        value = step(value, 6);
    }
    if high {
        value = step(value, 0x60);
    }
    // The lower digit may borrow although the upper one needs nothing.
    let carry = high || low && subtracts && before < 6;
    core.set_reg(AL, value);
    core.flags.set_result(value, carry, false, low);
}

/// AAA and AAS: a digit in AL, and what it carried in AH.
fn adjust_unpacked(core: &mut Core, step: impl Fn(u16) -> u16) {
    let before: u16 = core.reg(AX);
    let adjusts = before & 0xf > 9 || core.flags.af();
    let value = if adjusts { step(before) } else { before };
    core.set_reg(AX, value & 0xff0f);
    core.flags
        .set_result(value as u8 & 0xf, adjusts, false, adjusts);
}
