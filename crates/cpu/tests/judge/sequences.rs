//! Several instructions in a row: what one leaves must be what the next finds, however the
//! processor joins them.

use crate::exclusions;
use crate::forms::Generator;
use crate::rng::Rng;
use crate::state::{CODE, CODE_BYTES, Case, flag};
use crate::units;
use crate::verdict;
use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic,
    OpKind, RflagsBits,
};

/// Instructions before the last.
const MOST: u64 = 4;

/// Makes sequences of instructions that touch no memory and cannot fault, ending in a conditional
/// branch or in another of them.
pub struct Sequences {
    generator: Generator,
    info: InstructionInfoFactory,
    bitness: u32,
    plain: Vec<Code>,
    branches: Vec<Code>,
    /// Those of `plain` that usually stand before a branch, which processors like to join to it.
    compare: Vec<Code>,
}

impl Sequences {
    /// Of any instructions.
    pub fn new(bitness: u32) -> Self {
        Self::of(
            bitness,
            |_| true,
            |mnemonic| {
                use Mnemonic as M;
                matches!(
                    mnemonic,
                    M::Cmp | M::Test | M::Add | M::Sub | M::Inc | M::Dec
                )
            },
        )
    }

    /// Of instructions of the x87 unit, among which those that set RFLAGS are more frequent. What one
    /// leaves in the unit the next finds there, an exception included.
    pub fn x87(bitness: u32) -> Self {
        Self::of(bitness, units::is_x87, |mnemonic| {
            use Mnemonic as M;
            matches!(mnemonic, M::Fcomi | M::Fcomip | M::Fucomi | M::Fucomip)
        })
    }

    fn of(
        bitness: u32,
        belongs: impl Fn(&Instruction) -> bool,
        compares: impl Fn(Mnemonic) -> bool,
    ) -> Self {
        let mut generator = Generator::new(bitness);
        let (mut plain, mut branches) = (Vec::new(), Vec::new());
        for code in Code::values() {
            if !generator.knows(code.op_code())
                || exclusions::excluded(code).is_some()
                || !verdict::host_has(code)
            {
                continue;
            }
            let sample = generator.case(code, &mut Rng::new(code as u64));
            let Some((_, sample)) = sample else { continue };
            if !crate::executes(&sample, bitness) {
                continue;
            }
            if sample.is_jcc_short_or_near() {
                branches.push(code);
            } else if may_be_plain(code) && belongs(&sample) {
                plain.push(code);
            }
        }
        let compare = plain
            .iter()
            .copied()
            .filter(|code| compares(code.mnemonic()))
            .collect();
        Self {
            compare,
            generator,
            info: InstructionInfoFactory::new(),
            bitness,
            plain,
            branches,
        }
    }

    /// A case whose bytes are a sequence, and the last instruction; `None` if chance did not find
    /// one this time.
    pub fn case(&mut self, rng: &mut Rng) -> Option<(Case, Instruction)> {
        let mut case: Option<Case> = None;
        let mut undefined = 0;
        for _ in 0..=rng.below(MOST) {
            let code = if rng.chance(40) {
                rng.pick(&self.compare)
            } else {
                rng.pick(&self.plain)
            };
            let (part, instruction) = self.part(code, rng)?;
            undefined = self.after(&part, &instruction, undefined)?;
            match &mut case {
                Some(case) => case.bytes.extend(part.bytes),
                None => case = Some(part),
            }
        }
        let mut case = case?;
        let code = if rng.chance(60) {
            rng.pick(&self.branches)
        } else {
            rng.pick(&self.plain)
        };
        let (part, last) = if rng.chance(60) {
            self.generator.case(code, rng)?
        } else {
            self.part(code, rng)?
        };
        if reads(&last) & undefined != 0 || !verdict::is_defined(&part, &last) {
            return None;
        }
        let begin = case.registers.rip;
        let at = begin + case.bytes.len() as u64;
        case.bytes.extend(&part.bytes);
        let end = begin + case.bytes.len() as u64;
        // At its new place a branch leads elsewhere: among breakpoints it must.
        let last = Decoder::with_ip(self.bitness, &part.bytes, at, DecoderOptions::NONE).decode();
        if last.flow_control() != FlowControl::Next {
            let target = last.near_branch_target();
            let inside = (CODE..CODE + CODE_BYTES as u64).contains(&target);
            if !last.is_jcc_short_or_near() || !inside || (begin..end).contains(&target) {
                return None;
            }
        } else if !self.is_plain(&last) {
            return None;
        }
        if end > CODE + CODE_BYTES as u64 {
            return None;
        }
        case.registers.mxcsr = 0x1f80;
        case.undefined = undefined & !writes(&last);
        Some((case, last))
    }

    fn part(&mut self, code: Code, rng: &mut Rng) -> Option<(Case, Instruction)> {
        (0..20).find_map(|_| {
            let (case, instruction) = self.generator.case(code, rng)?;
            let fits = self.is_plain(&instruction)
                && verdict::is_defined(&case, &instruction)
                && crate::executes(&instruction, self.bitness);
            fits.then_some((case, instruction))
        })
    }

    /// Whether an instruction has operands that cannot fault and a result that does not depend on
    /// the processor.
    fn is_plain(&mut self, instruction: &Instruction) -> bool {
        use Mnemonic as M;
        let shifts_by_register = matches!(
            instruction.mnemonic(),
            M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr
        ) && instruction.op1_kind() == OpKind::Register;
        instruction.flow_control() == FlowControl::Next
            && !shifts_by_register
            && self.info.info(instruction).used_memory().is_empty()
    }

    /// Flags that are undefined after an instruction; `None` if it depends on one that is.
    fn after(&self, case: &Case, instruction: &Instruction, before: u64) -> Option<u64> {
        (reads(instruction) & before == 0).then(|| {
            let undefined = verdict::undefined_flags(case, instruction);
            before & !writes(instruction) | undefined
        })
    }
}

fn may_be_plain(code: Code) -> bool {
    use Mnemonic as M;
    let op = code.op_code();
    !op.is_privileged()
        && !op.is_input_output()
        && !op.is_serializing_intel()
        && !matches!(
            code.mnemonic(),
            M::Div
                | M::Idiv
                | M::Aam
                | M::Bsf
                | M::Bsr
                | M::Shld
                | M::Shrd
                | M::Ud0
                | M::Ud1
                | M::Ud2
                | M::Int3
                | M::Hlt
                | M::Cli
                | M::Sti
                | M::Pause
                // The guest's system has no protection keys.
                | M::Rdpkru
                | M::Wrpkru
        )
}

fn reads(instruction: &Instruction) -> u64 {
    ours(instruction.rflags_read())
}

fn writes(instruction: &Instruction) -> u64 {
    // A shift by zero writes nothing.
    use Mnemonic as M;
    match instruction.mnemonic() {
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr => 0,
        _ => ours(
            instruction.rflags_written() | instruction.rflags_cleared() | instruction.rflags_set(),
        ),
    }
}

fn ours(bits: u32) -> u64 {
    use RflagsBits as R;
    [
        (R::OF, flag::OF),
        (R::SF, flag::SF),
        (R::ZF, flag::ZF),
        (R::AF, flag::AF),
        (R::CF, flag::CF),
        (R::PF, flag::PF),
    ]
    .into_iter()
    .filter(|(theirs, _)| bits & theirs != 0)
    .fold(0, |all, (_, ours)| all | ours)
}
