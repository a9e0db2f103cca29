//! What the architecture leaves open, and so cannot be compared: whoever the judge is.

use crate::state::flag;
use iced_x86::{Code, Instruction, Mnemonic, OpKind};

/// How many places a shift or rotation moves, if the instruction is one.
fn shift_count(instruction: &Instruction, rcx: u64) -> Option<(u64, u64)> {
    use Mnemonic as M;
    let last = instruction.op_count().checked_sub(1)?;
    match instruction.mnemonic() {
        M::Shl
        | M::Sal
        | M::Shr
        | M::Sar
        | M::Rol
        | M::Ror
        | M::Rcl
        | M::Rcr
        | M::Shld
        | M::Shrd => {}
        _ => return None,
    }
    let raw = match instruction.op_kind(last) {
        OpKind::Register => rcx,
        _ => instruction.immediate(last),
    };
    let width = match instruction.op0_kind() {
        OpKind::Register => instruction.op0_register().size() as u64 * 8,
        _ => instruction.memory_size().size() as u64 * 8,
    };
    let masked = if width == 64 { raw & 63 } else { raw & 31 };
    Some((masked, width))
}

/// Whether the architecture says what an instruction does that `bytes` encode, when RCX has this
/// value.
pub fn is_defined(instruction: &Instruction, bytes: &[u8], bitness: u32, rcx: u64) -> bool {
    use Mnemonic as M;
    match instruction.mnemonic() {
        // A count above the operand's width.
        M::Shld | M::Shrd => {
            shift_count(instruction, rcx).is_none_or(|(count, width)| count <= width)
        }
        M::Bswap => instruction.op0_register().size() > 2,
        // Intel reads two bytes, AMD four.
        M::Movsxd => {
            instruction.code() != Code::Movsxd_r16_rm16
                || instruction.op1_kind() == OpKind::Register
        }
        // Intel ignores REX.B, which makes AMD's an exchange of RAX and R8.
        M::Pause => bytes[bytes.len() - 2] & 0xf1 != 0x41,
        // Intel ignores the operand size prefix in 64-bit code, AMD truncates RIP.
        _ if bitness == 64 && is_near_branch(instruction) => !has_operand_size_prefix(bytes),
        _ => true,
    }
}

/// Whether the instruction may set RIP and stays in its segment.
fn is_near_branch(instruction: &Instruction) -> bool {
    use iced_x86::FlowControl as F;
    matches!(
        instruction.flow_control(),
        F::UnconditionalBranch
            | F::ConditionalBranch
            | F::Call
            | F::IndirectBranch
            | F::IndirectCall
            | F::Return
    )
}

fn has_operand_size_prefix(bytes: &[u8]) -> bool {
    bytes
        .iter()
        .take_while(|byte| {
            matches!(
                byte,
                0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3
            )
        })
        .any(|&byte| byte == 0x66)
}

/// Flags that an instruction leaves undefined when it completes, and RCX had this value before.
pub fn undefined_flags(instruction: &Instruction, rcx: u64) -> u64 {
    use Mnemonic as M;
    use iced_x86::RflagsBits as R;
    let bits = instruction.rflags_undefined();
    let mut undefined = 0;
    for (theirs, ours) in [
        (R::OF, flag::OF),
        (R::SF, flag::SF),
        (R::ZF, flag::ZF),
        (R::AF, flag::AF),
        (R::CF, flag::CF),
        (R::PF, flag::PF),
    ] {
        if bits & theirs != 0 {
            undefined |= ours;
        }
    }
    if let Some((count, width)) = shift_count(instruction, rcx) {
        let rotates = matches!(instruction.mnemonic(), M::Rol | M::Ror | M::Rcl | M::Rcr);
        match count {
            0 => undefined = 0,
            1 => {
                undefined &= !flag::OF;
            }
            _ => {
                undefined |= flag::OF;
                // CF holds no bit of the operand when the count exceeds its width.
                if !rotates
                    && count > width
                    && matches!(instruction.mnemonic(), M::Shl | M::Shr | M::Sal)
                {
                    undefined |= flag::CF;
                }
            }
        }
    }
    undefined
}

/// Whether the instruction leaves its destination undefined when it sets ZF.
pub fn may_leave_destination(instruction: &Instruction) -> bool {
    matches!(instruction.mnemonic(), Mnemonic::Bsf | Mnemonic::Bsr)
}
