//! Shifts of packed integers, by a count in a register, in memory or in the instruction.

use super::host;
use super::operand::binary;
use crate::form::{Form, Kind};
use crate::op::Handler;
use iced_x86::Mnemonic as M;

/// A shift whose count is an immediate or the low 64 bits of a vector.
macro_rules! shift {
    ($form:expr, $value:expr) => {
        match ($form.kinds[0], $form.kinds[1]) {
            (Kind::Xmm, Kind::Imm) => |core, op| {
                let result = $value(core.xmm(op.dst), u128::from(op.imm as u8));
                core.set_xmm(op.dst, result);
                Ok(())
            },
            _ => binary!($form, Aligned, $value),
        }
    };
}

/// The handler for an instruction of this subject.
pub(super) fn select(form: &Form) -> Option<Handler> {
    Some(match form.mnemonic {
        _ if form.kinds[0] != Kind::Xmm => return None,
        M::Psllw => shift!(form, host::psllw),
        M::Pslld => shift!(form, host::pslld),
        M::Psllq => shift!(form, host::psllq),
        M::Psraw => shift!(form, host::psraw),
        M::Psrad => shift!(form, host::psrad),
        M::Psrlw => shift!(form, host::psrlw),
        M::Psrld => shift!(form, host::psrld),
        M::Psrlq => shift!(form, host::psrlq),
        M::Pslldq => |core, op| {
            core.set_xmm(op.dst, shift_bytes_left(core.xmm(op.dst), op.imm as u8));
            Ok(())
        },
        M::Psrldq => |core, op| {
            core.set_xmm(op.dst, shift_bytes_right(core.xmm(op.dst), op.imm as u8));
            Ok(())
        },
        _ => return None,
    })
}

/// PSLLDQ: towards higher bytes; 16 and more leave nothing.
fn shift_bytes_left(value: u128, bytes: u8) -> u128 {
    value.checked_shl(u32::from(bytes) * 8).unwrap_or(0)
}

/// PSRLDQ: towards lower bytes; 16 and more leave nothing.
fn shift_bytes_right(value: u128, bytes: u8) -> u128 {
    value.checked_shr(u32::from(bytes) * 8).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_shifts_of_sixteen_or_more_leave_nothing() {
        let value = 0x0f0e_0d0c_0b0a_0908_0706_0504_0302_01ff;
        assert_eq!(shift_bytes_left(value, 0), value);
        assert_eq!(shift_bytes_left(value, 15), 0xff << 120);
        assert_eq!(shift_bytes_left(value, 16), 0);
        assert_eq!(shift_bytes_right(value, 15), 0x0f);
        assert_eq!(shift_bytes_right(value, 16), 0);
        assert_eq!(shift_bytes_right(value, 255), 0);
    }
}
