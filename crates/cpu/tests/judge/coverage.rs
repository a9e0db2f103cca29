//! Every form that the decoder knows, what CPUID says of it, and what becomes of it: a form is
//! executed if all features that it came with are announced, and is an invalid opcode otherwise.

use crate::encoding::encode;
use crate::exclusions;
use crate::forms::Generator;
use crate::rng::Rng;
use crate::verdict;
use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderOptions, EncodingKind, Instruction, Mnemonic, OpCodeInfo,
};
use std::collections::BTreeMap;
use twofold_cpu::cpuid::supported;
use twofold_cpu::{CpuidEntry, SecondStageKind, Support};

/// Encodings that are tried for a form.
const ATTEMPTS: usize = 300;

#[derive(Clone, Copy)]
enum Word {
    A,
    B,
    C,
    D,
}

/// How a processor says that it has a feature.
enum Announcement {
    /// Every processor of this architecture has it.
    Always,
    /// A bit of a leaf and subleaf.
    Bit(u32, u32, Word, u32),
    /// Not at all, or by means that a guest of KVM never sees.
    Never,
}

/// SDM Vol. 2, "CPUID", and APM Vol. 3, appendix E.
fn announcement(feature: CpuidFeature) -> Announcement {
    use Announcement::{Always, Bit, Never};
    use CpuidFeature as F;
    let leaf1_c = |bit| Bit(1, 0, Word::C, bit);
    let leaf1_d = |bit| Bit(1, 0, Word::D, bit);
    let leaf7_b = |bit| Bit(7, 0, Word::B, bit);
    let leaf7_c = |bit| Bit(7, 0, Word::C, bit);
    let leaf7_d = |bit| Bit(7, 0, Word::D, bit);
    let state = |bit| Bit(0xd, 1, Word::A, bit);
    let extended_c = |bit| Bit(0x8000_0001, 0, Word::C, bit);
    let extended_d = |bit| Bit(0x8000_0001, 0, Word::D, bit);
    let extended8_b = |bit| Bit(0x8000_0008, 0, Word::B, bit);
    match feature {
        F::INTEL8086 | F::INTEL186 | F::INTEL286 | F::INTEL386 | F::INTEL486 => Always,
        F::CPUID | F::MULTIBYTENOP | F::PAUSE | F::RDPMC => Always,
        F::FPU | F::FPU287 | F::FPU387 => leaf1_d(0),
        F::TSC => leaf1_d(4),
        F::MSR => leaf1_d(5),
        F::CX8 => leaf1_d(8),
        F::SEP => leaf1_d(11),
        F::CMOV => leaf1_d(15),
        F::CLFSH => leaf1_d(19),
        F::MMX => leaf1_d(23),
        F::FXSR => leaf1_d(24),
        F::SSE => leaf1_d(25),
        F::SSE2 => leaf1_d(26),
        F::SSE3 => leaf1_c(0),
        F::PCLMULQDQ => leaf1_c(1),
        F::MONITOR => leaf1_c(3),
        F::VMX => leaf1_c(5),
        F::SMX => leaf1_c(6),
        F::SSSE3 => leaf1_c(9),
        F::FMA => leaf1_c(12),
        F::CMPXCHG16B => leaf1_c(13),
        F::SSE4_1 => leaf1_c(19),
        F::SSE4_2 => leaf1_c(20),
        F::MOVBE => leaf1_c(22),
        F::POPCNT => leaf1_c(23),
        F::AES => leaf1_c(25),
        F::XSAVE => leaf1_c(26),
        F::AVX => leaf1_c(28),
        F::F16C => leaf1_c(29),
        F::RDRAND => leaf1_c(30),
        F::FSGSBASE => leaf7_b(0),
        F::SGX1 => leaf7_b(2),
        F::BMI1 => leaf7_b(3),
        F::HLE => leaf7_b(4),
        F::AVX2 => leaf7_b(5),
        F::BMI2 => leaf7_b(8),
        F::INVPCID => leaf7_b(10),
        F::RTM => leaf7_b(11),
        F::MPX => leaf7_b(14),
        F::AVX512F => leaf7_b(16),
        F::AVX512DQ => leaf7_b(17),
        F::RDSEED => leaf7_b(18),
        F::ADX => leaf7_b(19),
        F::SMAP => leaf7_b(20),
        F::AVX512_IFMA => leaf7_b(21),
        F::CLFLUSHOPT => leaf7_b(23),
        F::CLWB => leaf7_b(24),
        F::AVX512CD => leaf7_b(28),
        F::SHA => leaf7_b(29),
        F::AVX512BW => leaf7_b(30),
        F::AVX512VL => leaf7_b(31),
        F::PREFETCHWT1 => leaf7_c(0),
        F::AVX512_VBMI => leaf7_c(1),
        F::PKU => leaf7_c(3),
        F::WAITPKG => leaf7_c(5),
        F::AVX512_VBMI2 => leaf7_c(6),
        F::CET_SS => leaf7_c(7),
        F::GFNI => leaf7_c(8),
        F::VAES => leaf7_c(9),
        F::VPCLMULQDQ => leaf7_c(10),
        F::AVX512_VNNI => leaf7_c(11),
        F::AVX512_BITALG => leaf7_c(12),
        F::AVX512_VPOPCNTDQ => leaf7_c(14),
        F::RDPID => leaf7_c(22),
        F::KL => leaf7_c(23),
        F::CLDEMOTE => leaf7_c(25),
        F::MOVDIRI => leaf7_c(27),
        F::MOVDIR64B => leaf7_c(28),
        F::ENQCMD => leaf7_c(29),
        F::UINTR => leaf7_d(5),
        F::AVX512_VP2INTERSECT => leaf7_d(8),
        F::SERIALIZE => leaf7_d(14),
        F::TSXLDTRK => leaf7_d(16),
        F::PCONFIG => leaf7_d(18),
        F::CET_IBT => leaf7_d(20),
        F::AMX_BF16 => leaf7_d(22),
        F::AVX512_FP16 => leaf7_d(23),
        F::AMX_TILE => leaf7_d(24),
        F::AMX_INT8 => leaf7_d(25),
        F::XSAVEOPT => state(0),
        F::XSAVEC => state(1),
        F::XSAVES => state(3),
        F::SVM => extended_c(2),
        F::LZCNT => extended_c(5),
        F::SSE4A => extended_c(6),
        F::PREFETCHW => extended_c(8),
        F::XOP => extended_c(11),
        F::SKINIT => extended_c(12),
        F::LWP => extended_c(15),
        F::FMA4 => extended_c(16),
        F::TBM => extended_c(21),
        F::MONITORX => extended_c(29),
        F::SYSCALL => extended_d(11),
        F::RDTSCP => extended_d(27),
        F::X64 => extended_d(29),
        F::D3NOWEXT => extended_d(30),
        F::D3NOW => extended_d(31),
        F::CLZERO => extended8_b(0),
        F::INVLPGB => extended8_b(3),
        F::RDPRU => extended8_b(4),
        F::MCOMMIT => extended8_b(8),
        F::WBNOINVD => extended8_b(9),
        _ => Never,
    }
}

fn is_announced(feature: CpuidFeature, table: &[CpuidEntry]) -> bool {
    match announcement(feature) {
        Announcement::Always => true,
        Announcement::Never => false,
        Announcement::Bit(leaf, subleaf, word, bit) => table
            .iter()
            .find(|entry| (entry.leaf, entry.subleaf) == (leaf, subleaf))
            .is_some_and(|entry| {
                let value = match word {
                    Word::A => entry.eax,
                    Word::B => entry.ebx,
                    Word::C => entry.ecx,
                    Word::D => entry.edx,
                };
                value >> bit & 1 != 0
            }),
    }
}

/// Why a form is executed although nothing announces it.
fn executed_all_the_same(code: Code) -> Option<&'static str> {
    use Mnemonic as M;
    Some(match code.mnemonic() {
        M::Endbr32 | M::Endbr64 | M::Rdsspd | M::Rdsspq => "does nothing without its feature",
        M::Cldemote | M::Prefetchwt1 | M::Prefetchit0 | M::Prefetchit1 => {
            "does nothing without its feature"
        }
        M::Wbnoinvd => "is WBINVD without its feature",
        M::Vmcall | M::Vmmcall => "a hypercall, for which KVM has leaves of its own",
        M::Tdcall => "is executed in a TD, and an invalid opcode elsewhere",
        M::Monitor | M::Mwait => "KVM executes it whatever CPUID says, unless asked not to",
        _ => return None,
    })
}

/// An instruction of a form, if bytes are found that the decoder takes for it.
fn sample(code: Code, bitness: u32) -> Option<Instruction> {
    let op = code.op_code();
    if !matches!(op.encoding(), EncodingKind::Legacy | EncodingKind::VEX) {
        // Their operands do not matter: no encoding of these kinds is executed.
        let mut instruction = Instruction::default();
        instruction.set_code(code);
        return Some(instruction);
    }
    let mut rng = Rng::new(code as u64);
    (0..ATTEMPTS).find_map(|_| {
        // The encoder does not think of every size prefix in every mode.
        let bytes = encode(op, bitness, &mut rng);
        let bare = bytes.strip_prefix(&[0x66]).unwrap_or(&bytes);
        let prefixes: [&[u8]; 4] = [&[], &[0x66], &[0x67], &[0x66, 0x67]];
        prefixes.into_iter().find_map(|prefixes| {
            let bytes = [prefixes, bare].concat();
            let instruction = Decoder::new(bitness, &bytes, DecoderOptions::NONE).decode();
            (instruction.code() == code).then_some(instruction)
        })
    })
}

fn exists(op: &OpCodeInfo, bitness: u32) -> bool {
    op.is_instruction()
        && op.is_available_in_mode(bitness)
        && match bitness {
            64 => op.long_mode(),
            _ => op.compatibility_mode(),
        }
}

/// What becomes of every form.
#[derive(Default)]
struct Tally {
    judged: usize,
    /// By reason.
    not_judged: BTreeMap<&'static str, Vec<String>>,
    unannounced: BTreeMap<&'static str, Vec<String>>,
    undefined: usize,
    without_encoding: usize,
    problems: Vec<String>,
}

fn tally(table: &[CpuidEntry], bitness: u32) -> Tally {
    let mut tally = Tally::default();
    let mut generator = Generator::new(bitness);
    for code in Code::values().filter(|code| exists(code.op_code(), bitness)) {
        let Some(instruction) = sample(code, bitness) else {
            tally.without_encoding += 1;
            continue;
        };
        let features = code.cpuid_features();
        let announced = features.iter().all(|&f| is_announced(f, table));
        let support = twofold_cpu::support(&instruction, bitness);
        let name = format!("{code:?}");
        match (announced, support) {
            (true, Support::Executed) => match why_not_judged(code, &mut generator, bitness) {
                None => tally.judged += 1,
                Some(reason) => tally.not_judged.entry(reason).or_default().push(name),
            },
            (false, Support::Undefined) => tally.undefined += 1,
            (false, Support::Executed) if executed_all_the_same(code).is_some() => {
                let reason = executed_all_the_same(code).unwrap_or_default();
                tally.unannounced.entry(reason).or_default().push(name);
            }
            (false, Support::Executed) => {
                let problem = format!("{name} is executed, but {features:?} is not announced");
                tally.problems.push(problem);
            }
            (_, Support::Missing) => tally.problems.push(format!("{name} is not executed")),
            (true, Support::Undefined) => {
                let problem = format!("{name} is undefined, but {features:?} is announced");
                tally.problems.push(problem);
            }
        }
    }
    tally
}

fn why_not_judged(code: Code, generator: &mut Generator, bitness: u32) -> Option<&'static str> {
    if bitness == 16 {
        return Some("the host runs no 16-bit code: see `make hardware` for Bochs's judgement");
    }
    exclusions::excluded(code)
        .or_else(|| (!verdict::host_has(code)).then_some("this host lacks it"))
        .or_else(|| {
            let case = generator.case(code, &mut Rng::new(code as u64));
            case.is_none()
                .then_some("its 16-bit address, count or operand reaches no page of the test's")
        })
}

fn print(tally: &Tally, bitness: u32) {
    let count = |lists: &BTreeMap<_, Vec<String>>| lists.values().map(Vec::len).sum::<usize>();
    println!(
        "{bitness}-bit code: {} forms are announced and executed: {} judged, {} not; {} came with \
         features that are not announced, and are invalid; {} belong to other processors or are \
         spelled in two instructions",
        tally.judged + count(&tally.not_judged),
        tally.judged,
        count(&tally.not_judged),
        tally.undefined,
        tally.without_encoding,
    );
    for (reason, forms) in &tally.not_judged {
        if bitness == 16 {
            println!("  not judged, {reason}: {} forms", forms.len());
        } else {
            println!("  not judged, {reason}: {}", forms.join(" "));
        }
    }
    for (reason, forms) in &tally.unannounced {
        println!("  executed unannounced, {reason}: {}", forms.join(" "));
    }
    for problem in &tally.problems {
        println!("  PROBLEM {problem}");
    }
}

#[test]
fn cpuid_announces_exactly_what_is_executed() {
    let mut problems = 0;
    for bitness in [16, 32, 64] {
        let tally = tally(&supported(SecondStageKind::Ept, 46), bitness);
        print(&tally, bitness);
        problems += tally.problems.len();
        // The decoder's tables hold more than a thousand forms of each.
        assert!(tally.judged + tally.not_judged.values().map(Vec::len).sum::<usize>() > 1500);
        assert!(tally.undefined > 1000);
    }
    assert_eq!(problems, 0, "see the list");
    let tally = tally(&supported(SecondStageKind::Npt, 46), 64);
    assert_eq!(tally.problems, Vec::<String>::new(), "with NPT");
}

/// The test above must be able to fail in both directions.
#[test]
fn a_bit_too_many_or_too_few_in_cpuid_is_seen() {
    let problems = |leaf: u32, change: fn(&mut CpuidEntry)| {
        let mut table = supported(SecondStageKind::Ept, 46);
        let found = |entry: &&mut CpuidEntry| entry.leaf == leaf && entry.subleaf == 0;
        change(table.iter_mut().find(found).unwrap());
        tally(&table, 64).problems
    };
    let without_mmx = problems(1, |entry| entry.edx &= !(1 << 23));
    let paddb = "Paddb_mm_mmm64 is executed, but [MMX] is not announced";
    assert!(without_mmx.iter().any(|problem| problem == paddb));
    let with_sha = problems(7, |entry| entry.ebx |= 1 << 29);
    let sha = "Sha1msg1_xmm_xmmm128 is undefined, but [SHA] is announced";
    assert!(with_sha.iter().any(|problem| problem == sha));
}
