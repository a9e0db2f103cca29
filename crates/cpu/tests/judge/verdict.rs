//! Comparing the two sides.

use crate::forms;
use crate::state::{self, Case, DATA, Outcome, RSP, Registers, flag};
use crate::undefined;
use iced_x86::{
    Code, CpuidFeature, FlowControl, Formatter, Instruction, Mnemonic, NasmFormatter, OpKind,
    Register,
};
use std::fmt::Write as _;
use std::ops::Range;

/// Whether this host's processor has the form.
pub fn host_has(code: Code) -> bool {
    use CpuidFeature as F;
    code.cpuid_features().iter().all(|feature| match feature {
        F::SSE3 => is_x86_feature_detected!("sse3"),
        F::SSSE3 => is_x86_feature_detected!("ssse3"),
        F::SSE4_1 => is_x86_feature_detected!("sse4.1"),
        F::SSE4_2 => is_x86_feature_detected!("sse4.2"),
        F::SSE4A => is_x86_feature_detected!("sse4a"),
        F::POPCNT => is_x86_feature_detected!("popcnt"),
        F::LZCNT => is_x86_feature_detected!("lzcnt"),
        F::BMI1 => is_x86_feature_detected!("bmi1"),
        F::BMI2 => is_x86_feature_detected!("bmi2"),
        F::ADX => is_x86_feature_detected!("adx"),
        F::MOVBE => is_x86_feature_detected!("movbe"),
        F::AES => is_x86_feature_detected!("aes"),
        F::PCLMULQDQ => is_x86_feature_detected!("pclmulqdq"),
        F::SHA => is_x86_feature_detected!("sha"),
        F::AVX => is_x86_feature_detected!("avx"),
        F::AVX2 => is_x86_feature_detected!("avx2"),
        F::FMA => is_x86_feature_detected!("fma"),
        F::F16C => is_x86_feature_detected!("f16c"),
        F::VAES => is_x86_feature_detected!("vaes"),
        F::VPCLMULQDQ => is_x86_feature_detected!("vpclmulqdq"),
        F::GFNI => is_x86_feature_detected!("gfni"),
        F::CMPXCHG16B => is_x86_feature_detected!("cmpxchg16b"),
        F::MOVDIRI
        | F::MOVDIR64B
        | F::ENQCMD
        | F::WAITPKG
        | F::CLDEMOTE
        | F::PTWRITE
        | F::CET_SS
        | F::CET_IBT
        | F::HRESET
        | F::UINTR
        | F::SERIALIZE
        | F::PADLOCK_ACE
        | F::CYRIX_D3NOW
        | F::MPX
        | F::TSXLDTRK => false,
        _ => true,
    })
}

/// Whether the architecture says what the case does.
pub fn is_defined(case: &Case, instruction: &Instruction) -> bool {
    undefined::is_defined(
        instruction,
        &case.bytes,
        case.bitness,
        case.registers.gpr[1],
    )
}

/// Flags that are not compared after the instruction has completed.
pub fn undefined_flags(case: &Case, instruction: &Instruction) -> u64 {
    undefined::undefined_flags(instruction, case.registers.gpr[1])
}

/// Whether the instruction leaves its destination undefined, so that only flags can be compared.
fn undefined_destination(instruction: &Instruction, expected: &Outcome) -> bool {
    undefined::may_leave_destination(instruction) && expected.registers.rflags & flag::ZF != 0
}

/// Bits of a vector register that are compared after a fault: all but for a gather, which may have
/// done some of its elements. Intel clears what is above the vectors, and spreads the top bits of the
/// mask, before it begins, AMD at the end.
fn compared_after_fault(instruction: &Instruction, register: usize) -> [u128; 2] {
    let is = |operand: Register| operand.number() == register;
    let (destination, mask) = (instruction.op0_register(), instruction.op2_register());
    if !instruction.is_vsib() || !is(destination) && !is(mask) {
        return [u128::MAX; 2];
    }
    let element = instruction.memory_size().size() * 8;
    let index = if instruction.is_vsib32() { 32 } else { 64 };
    let wide = destination.is_ymm() || instruction.memory_index().is_ymm();
    let count = if wide { 256 } else { 128 } / element.max(index);
    let bits = if is(mask) {
        1 << (element - 1)
    } else {
        u128::from(u64::MAX >> (64 - element))
    };
    (0..count).fold([0; 2], |mut compared, i| {
        compared[i * element / 128] |= bits << (i * element % 128);
        compared
    })
}

/// Whether an instruction ended in a fault before which AMD's processors make MMX registers of the
/// x87 registers, and nobody says that others do.
fn may_have_become_mmx(instruction: &Instruction, expected: &Outcome) -> bool {
    use Mnemonic as M;
    const XM: u8 = 19;
    match instruction.mnemonic() {
        M::Cvtps2pi | M::Cvttps2pi | M::Cvtpd2pi | M::Cvttpd2pi | M::Cvtpi2ps => {
            expected.vector == XM
        }
        M::Maskmovq => matches!(expected.vector, 12..=14),
        _ => false,
    }
}

/// The x87 registers become MMX registers: the top of the stack is 0, and every register full.
fn become_mmx(registers: &mut Registers) {
    const TOP: u16 = 7 << 11;
    registers
        .st
        .rotate_right(((registers.fsw & TOP) >> 11).into());
    registers.fsw &= !TOP;
    registers.ftw = 0xff;
}

/// Whether the operand is an image of the x87 unit's state.
fn is_image(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        instruction.mnemonic(),
        M::Fnstenv
            | M::Fldenv
            | M::Fnsave
            | M::Frstor
            | M::Fxsave
            | M::Fxsave64
            | M::Fxrstor
            | M::Fxrstor64
    )
}

/// Parts of the data that are not compared: in FXSAVE's image MXCSR's mask (AMD has a bit more),
/// and in all images where the last x87 instruction was while no exception waits (AMD's processors
/// leave zeros, or lose it when the host's kernel switches tasks).
fn uncompared_memory(case: &Case, instruction: &Instruction) -> Vec<Range<usize>> {
    use Mnemonic as M;
    let (pointers, mask) = match (instruction.mnemonic(), instruction.memory_size().size()) {
        (M::Fxsave | M::Fxsave64, _) => (6..24, 28..32),
        (M::Fnstenv | M::Fnsave, 14 | 94) => (6..14, 0..0),
        (M::Fnstenv | M::Fnsave, _) => (12..28, 0..0),
        _ => return Vec::new(),
    };
    let Some(address) = forms::operand_address(case, instruction) else {
        return Vec::new();
    };
    let start = address.wrapping_sub(DATA) as usize;
    let mut parts = vec![mask];
    if case.registers.fsw & state::SUMMARY == 0 {
        parts.push(pointers);
    }
    for part in &mut parts {
        *part = start.wrapping_add(part.start)..start.wrapping_add(part.end);
    }
    parts
}

/// Compares; `None` if both sides agree.
pub fn compare(
    case: &Case,
    instruction: &Instruction,
    expected: &Outcome,
    found: &Outcome,
    (expected_memory, found_memory): (&[u8], &[u8]),
) -> Option<String> {
    let mut text = String::new();
    let names = [
        "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12",
        "r13", "r14", "r15",
    ];
    let mut differ = |name: &str, host: u128, ours: u128, before: Option<u128>| {
        if host != ours {
            let _ = write!(text, "      {name}: host {host:#x}, ours {ours:#x}");
            if let Some(before) = before {
                let _ = write!(text, ", before {before:#x}");
            }
            text.push('\n');
        }
    };
    let before = &case.registers;
    let [mut host, mut ours] = [expected, found].map(|outcome| outcome.registers.clone());
    if may_have_become_mmx(instruction, expected) {
        become_mmx(&mut host);
        become_mmx(&mut ours);
    }
    let may_fault_first_or_second = matches!(
        instruction.mnemonic(),
        Mnemonic::Cmpsb | Mnemonic::Cmpsw | Mnemonic::Cmpsd | Mnemonic::Cmpsq
    );
    let memory_fault = |vector| matches!(vector, 12..=14);
    // Intel looks at the target of an indirect CALL before it pushes, AMD afterwards.
    let pushes_first_or_last = instruction.flow_control() == FlowControl::IndirectCall;
    if (may_fault_first_or_second || pushes_first_or_last)
        && memory_fault(expected.vector)
        && memory_fault(found.vector)
    {
        // Both accesses fault; which of them is reported is the processor's choice.
        return None;
    }
    let aligned_on_stack = case.bitness == 32
        && instruction.memory_segment() == Register::SS
        && instruction.memory_size().size() >= 16;
    let of_image = is_image(instruction);
    let image = forms::operand_address(case, instruction).filter(|_| of_image);
    let bytes = instruction.memory_size().size() as u64;
    if aligned_on_stack && expected.vector == 13 && found.vector == 12
        || of_image && matches!((expected.vector, found.vector), (12, 13) | (13, 12))
    {
        // Neither aligned nor within the segment: which is looked at first is the processor's
        // choice.
        return None;
    }
    let restores = matches!(
        instruction.mnemonic(),
        Mnemonic::Xrstor | Mnemonic::Xrstor64
    );
    let wraps =
        image.is_some_and(|image| image >> 32 == 0 && image.wrapping_add(bytes - 1) >> 32 != 0);
    if wraps && memory_fault(expected.vector) && memory_fault(found.vector)
        || restores
            && expected.vector == 14
            && found.vector == 13
            && expected.address >> 12 == 0xf_ffff
    {
        // The area begins in the last page of the segment, or of what the address reaches, and ends
        // behind it.
        return None;
    }
    differ("vector", expected.vector.into(), found.vector.into(), None);
    differ(
        "error code",
        expected.error.into(),
        found.error.into(),
        None,
    );
    // Of an image processors look at the first or the last byte first.
    let within = |address: u64| image.is_some_and(|image| address.wrapping_sub(image) < bytes);
    if !within(expected.address) || !within(found.address) {
        differ("cr2", expected.address.into(), found.address.into(), None);
    }
    differ(
        "rip",
        host.rip.into(),
        ours.rip.into(),
        Some(before.rip.into()),
    );
    let count = if case.bitness == 64 { 16 } else { 8 };
    // Some processors change registers as POPA goes and leave them changed when it faults.
    let popa_fault =
        expected.vector == 14 && matches!(instruction.mnemonic(), Mnemonic::Popa | Mnemonic::Popad);
    let skip = undefined_destination(instruction, expected)
        .then(|| instruction.op0_register().full_register());
    for (i, name) in names.into_iter().enumerate().take(count) {
        if popa_fault && i != RSP || skip.is_some_and(|register: Register| register.number() == i) {
            continue;
        }
        differ(
            name,
            host.gpr[i].into(),
            ours.gpr[i].into(),
            Some(before.gpr[i].into()),
        );
    }
    let completed = expected.vector == 3;
    let partial = !completed
        && (instruction.has_rep_prefix() || instruction.has_repne_prefix())
        && instruction.rflags_modified() != 0;
    let mut mask = flag::COMPARED & !case.undefined;
    if completed {
        mask &= !undefined_flags(case, instruction);
    } else if partial {
        mask &= !flag::ARITHMETIC;
    }
    differ(
        "flags",
        (host.rflags & mask).into(),
        (ours.rflags & mask).into(),
        Some(before.rflags.into()),
    );
    for i in 0..16 {
        let [low, high] = if completed {
            [u128::MAX; 2]
        } else {
            compared_after_fault(instruction, i)
        };
        differ(
            &format!("xmm{i}"),
            host.xmm[i] & low,
            ours.xmm[i] & low,
            Some(before.xmm[i]),
        );
        differ(
            &format!("ymm{i}, upper half,"),
            host.ymm_high[i] & high,
            ours.ymm_high[i] & high,
            Some(before.ymm_high[i]),
        );
    }
    differ(
        "mxcsr",
        host.mxcsr.into(),
        ours.mxcsr.into(),
        Some(before.mxcsr.into()),
    );
    for i in 0..8 {
        let low = u128::MAX >> 48;
        differ(
            &format!("st{i}"),
            host.st[i] & low,
            ours.st[i] & low,
            Some(before.st[i]),
        );
    }
    differ("fcw", host.fcw.into(), ours.fcw.into(), None);
    differ("fsw", host.fsw.into(), ours.fsw.into(), None);
    differ("ftw", host.ftw.into(), ours.ftw.into(), None);
    // AMD's processors tell only while an exception waits what the last instruction was, and Intel's
    // keep only of such instructions what they were. What was before the instruction is lost when
    // the host's kernel switches tasks, unless an exception waited then.
    let [waited, waits] = [before, &host].map(|registers| registers.fsw & state::SUMMARY != 0);
    if waits && (waited || instruction.mnemonic() != Mnemonic::Fldcw) {
        differ("fop", host.fop.into(), ours.fop.into(), None);
        differ("fip", host.fip.into(), ours.fip.into(), None);
        if waited || instruction.op0_kind() == OpKind::Memory {
            differ("fdp", host.fdp.into(), ours.fdp.into(), None);
        }
    }
    // Some processors fault in the middle of PUSHA.
    let pusha_fault = expected.vector == 14
        && matches!(instruction.mnemonic(), Mnemonic::Pusha | Mnemonic::Pushad);
    if expected_memory != found_memory && !pusha_fault {
        let uncompared = uncompared_memory(case, instruction);
        let different = (0..expected_memory.len())
            .filter(|&i| expected_memory[i] != found_memory[i])
            .filter(|i| !uncompared.iter().any(|bytes| bytes.contains(i)))
            .collect::<Vec<_>>();
        for &i in different.iter().take(8) {
            differ(
                &format!("[{:#x}]", DATA + i as u64),
                expected_memory[i].into(),
                found_memory[i].into(),
                None,
            );
        }
    }
    (!text.is_empty()).then_some(text)
}

/// A case in words.
pub fn describe(
    case: &Case,
    instruction: &Instruction,
    expected: &Outcome,
    difference: &str,
) -> String {
    let mut disassembly = String::new();
    NasmFormatter::new().format(instruction, &mut disassembly);
    let mut text = format!("   {:#x}: {disassembly}  [", case.registers.rip);
    for (i, byte) in case.bytes.iter().enumerate() {
        let _ = write!(text, "{}{byte:02x}", if i == 0 { "" } else { " " });
    }
    let _ = write!(text, "] host ended with vector {}", expected.vector);
    let Registers {
        gpr, rflags, mxcsr, ..
    } = &case.registers;
    let _ = write!(text, "; flags {rflags:#x} mxcsr {mxcsr:#x}\n     ");
    for value in gpr {
        let _ = write!(text, " {value:#x}");
    }
    text.push('\n');
    text.push_str(difference.trim_end());
    text
}
