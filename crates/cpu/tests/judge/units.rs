//! Which unit an instruction needs, and the state that it finds there.

use crate::rng::Rng;
use crate::state::{Registers, SUMMARY};
use iced_x86::{Instruction, Mnemonic, OpCodeOperandKind, OpCodeTableKind};

/// Whether an instruction depends on the x87 unit.
pub fn is_x87(instruction: &Instruction) -> bool {
    let op = instruction.op_code();
    let opcode = if op.op_code_len() == 2 {
        op.op_code() >> 8
    } else {
        op.op_code()
    };
    op.table() == OpCodeTableKind::Normal && matches!(opcode, 0xd8..=0xdf)
        || matches!(
            instruction.mnemonic(),
            Mnemonic::Wait
                | Mnemonic::Fxsave
                | Mnemonic::Fxsave64
                | Mnemonic::Fxrstor
                | Mnemonic::Fxrstor64
        )
}

/// Whether an instruction uses MMX registers.
pub fn is_mmx(instruction: &Instruction) -> bool {
    use OpCodeOperandKind as K;
    let kinds = instruction.op_code().op_kinds();
    instruction.mnemonic() == Mnemonic::Emms
        || kinds
            .iter()
            .any(|kind| matches!(kind, K::mm_or_mem | K::mm_reg | K::mm_rm))
}

/// The x87 unit in any state that it can be in.
pub fn prepare_x87(registers: &mut Registers, rng: &mut Rng) {
    const MASKS: u16 = 0x3f;
    registers.st = std::array::from_fn(|_| rng.extended());
    if rng.chance(40) {
        // What arithmetic mostly sees: no register empty.
        registers.ftw = 0xff;
    }
    // Rounding, precision and infinity control; all exceptions masked, or some.
    registers.fcw = 0x40 | rng.next() as u16 & 0x1f00 | MASKS;
    if rng.chance(40) {
        registers.fcw &= rng.next() as u16 | !MASKS;
    }
    // The top of the stack, condition codes, and sticky flags; those of unmasked exceptions are set
    // now and then, so that one waits.
    registers.fsw = rng.next() as u16 & 0x7f00;
    if rng.chance(30) {
        let flags = rng.next() as u16 & (MASKS | 1 << 6);
        let waits = flags & !registers.fcw & MASKS;
        registers.fsw |= if rng.chance(30) {
            flags
        } else {
            flags & !waits
        };
    }
    if registers.fsw & !registers.fcw & MASKS != 0 {
        registers.fsw |= SUMMARY;
    }
    registers.fop = rng.next() as u16 & 0x7ff;
    registers.fip = rng.next() >> 17;
    registers.fdp = rng.next() >> 17;
}

/// Whether an instruction's vector operands are floating-point numbers.
pub fn is_floating(instruction: &Instruction) -> bool {
    let text = format!("{:?}", instruction.mnemonic()).to_lowercase();
    let text = text.strip_prefix('v').unwrap_or(&text);
    let integer = text.starts_with('p') || text.starts_with("mov");
    let ends = ["ss", "sd", "ps", "pd"]
        .iter()
        .any(|end| text.ends_with(end));
    !integer && (ends || text.starts_with("cvt"))
        || matches!(
            text,
            "movss" | "movsd" | "movddup" | "movshdup" | "movsldup"
        )
}
