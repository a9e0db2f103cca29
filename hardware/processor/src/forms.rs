//! Cases for every instruction form of 16-bit code (and of 32-bit code in small segments): random
//! encodings, registers, flags and operands, at the edges of segments among other places.
//!
//! Which forms there are, how bytes are put together and what is undefined is what the host's judge
//! of `crates/cpu` uses too.

use crate::case::{Case, IP, cr0, flag, seg};
use crate::encoding::{decode, edit_immediates, encode};
use crate::layout::{SEGMENTS, access};
use crate::rng::Rng;
use crate::values::{aim_displacement, bit_offset, narrow, near_target, pick_selector, read, set};
use crate::{state, undefined};
use iced_x86::{
    Code, CodeSize, Decoder, DecoderOptions, EncodingKind, FlowControl, Instruction,
    InstructionInfoFactory, Mnemonic, OpCodeInfo, OpCodeOperandKind, OpKind, Register, UsedMemory,
};

/// The modes that forms are tried in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    Real,
    Virtual,
    /// Bits of the code, and the privilege level.
    Protected(u32, u8),
}

impl Mode {
    pub const ALL: [Self; 5] = [
        Self::Real,
        Self::Virtual,
        Self::Protected(16, 0),
        Self::Protected(16, 3),
        Self::Protected(32, 3),
    ];

    pub fn bitness(self) -> u32 {
        match self {
            Self::Protected(bitness, _) => bitness,
            _ => 16,
        }
    }

    fn name(self) -> String {
        match self {
            Self::Real => "real".into(),
            Self::Virtual => "v86".into(),
            Self::Protected(bitness, level) => format!("prot{bitness}/{level}"),
        }
    }

    fn has(self, op: &OpCodeInfo) -> bool {
        op.is_available_in_mode(self.bitness())
            && match self {
                Self::Real => op.real_mode(),
                Self::Virtual => op.virtual8086_mode(),
                Self::Protected(..) => op.protected_mode(),
            }
    }
}

/// Why a form is not tried, if it is not.
pub fn excluded(code: Code) -> Option<&'static str> {
    use Mnemonic as M;
    let op = code.op_code();
    match code.mnemonic() {
        M::Rdtsc | M::Rdtscp | M::Rdrand | M::Rdseed | M::Rdpid | M::Cpuid | M::Xgetbv => {
            return Some("its result is the processor's own");
        }
        M::Lmsw
        | M::Hlt
        | M::Lgdt
        | M::Lidt
        | M::Lldt
        | M::Ltr
        | M::Clts
        | M::Sysenter
        | M::Sysexit
        | M::Syscall
        | M::Sysret
        | M::In
        | M::Out => return Some("tried by the families about privilege"),
        M::Serialize => return Some("Bochs's models do not have it"),
        M::Monitor | M::Mwait | M::Rdpmc | M::Rdmsr | M::Wrmsr | M::Vmcall | M::Vmmcall => {
            return Some("depends on what the machine has");
        }
        M::Invd
        | M::Wbinvd
        | M::Wbnoinvd
        | M::Xsetbv
        | M::Invlpg
        | M::Invpcid
        | M::Xsaves
        | M::Xrstors => return Some("has no effect that could be compared"),
        _ if op.is_input_output() => return Some("tried by the families about privilege"),
        _ => {}
    }
    use OpCodeOperandKind as K;
    let kinds = op.op_kinds();
    if kinds
        .iter()
        .any(|kind| matches!(kind, K::cr_reg | K::dr_reg | K::tr_reg))
    {
        return Some("tried by the families about privilege");
    }
    let text = op.instruction_string().to_lowercase();
    let vector = ["mm", "st(", "m32fp", "m64fp", "m80", "m2byte"]
        .iter()
        .any(|part| text.contains(part) && !text.contains("imm"))
        || text.contains("xmm")
        || text.contains("mm1");
    let floating = op.cpuid_is_floating();
    if vector || floating {
        return Some("x87 and vectors compute the same in every mode: judged by the host");
    }
    None
}

trait Floating {
    fn cpuid_is_floating(&self) -> bool;
}

impl Floating for OpCodeInfo {
    fn cpuid_is_floating(&self) -> bool {
        use iced_x86::CpuidFeature as F;
        self.code().cpuid_features().iter().any(|feature| {
            let name = format!("{feature:?}");
            name.starts_with("FPU")
                || name.starts_with("SSE")
                || name.starts_with("AVX")
                || name.starts_with("MMX")
                || matches!(
                    feature,
                    F::FXSR | F::XSAVE | F::XSAVEOPT | F::XSAVEC | F::XSAVES | F::D3NOW
                )
        })
    }
}

/// Makes cases.
pub struct Generator {
    info: InstructionInfoFactory,
}

impl Generator {
    pub fn new() -> Self {
        Self {
            info: InstructionInfoFactory::new(),
        }
    }

    /// Whether a form exists in a mode and is one that is encoded.
    pub fn knows(&self, code: Code, mode: Mode) -> bool {
        let op = code.op_code();
        op.is_instruction()
            && matches!(op.encoding(), EncodingKind::Legacy | EncodingKind::VEX)
            && mode.has(op)
            && !code.cpuid_features().contains(&iced_x86::CpuidFeature::KNC)
    }

    /// One case, or `None` if no encoding was found in a number of attempts.
    pub fn case(&mut self, code: Code, mode: Mode, rng: &mut Rng) -> Option<(Case, Instruction)> {
        let bitness = mode.bitness();
        let ip = match rng.below(20) {
            0 if code.mnemonic() != Mnemonic::Ud0 => 0xffff - rng.below(14),
            _ => IP + rng.below(16),
        };
        let (mut bytes, mut instruction) = (0..200).find_map(|_| {
            let mut bytes = encode(code.op_code(), bitness, rng);
            if rng.chance(20) {
                bytes.insert(0, rng.pick(&[0x67, 0x67, 0x64, 0x26, 0x2e, 0x36]));
            }
            let instruction = decode(&bytes, bitness, ip);
            (instruction.code() == code).then(|| (bytes[..instruction.len()].to_vec(), instruction))
        })?;
        edit_immediates(&mut bytes, &mut instruction, bitness, rng);
        let mut case = match mode {
            Mode::Real => Case::real(""),
            Mode::Virtual => Case::virtual_8086("", if rng.chance(70) { 3 } else { rng.below(3) }),
            Mode::Protected(bitness, level) => Case::protected("", bitness, level),
        };
        case.rip = ip;
        case.flags |= rng.next() & state::flag::ARITHMETIC;
        if rng.chance(20) {
            case.flags |= state::flag::DF;
        }
        if rng.chance(20) {
            case.flags |= flag::IF;
        }
        if matches!(mode, Mode::Protected(_, 3) | Mode::Virtual) && rng.chance(20) {
            case.flags |= flag::AC;
            case.cr0 |= cr0::AM;
        }
        for value in &mut case.gpr {
            *value = rng.integer() & 0xffff_ffff;
        }
        if matches!(mode, Mode::Protected(..)) {
            self.vary_segments(&mut case, mode, rng);
        }
        let is_return = matches!(
            instruction.mnemonic(),
            Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Retf
        );
        self.place_stack(&mut case, mode, is_return, rng);
        narrow(&mut case, &instruction, rng);
        self.place_memory(&mut case, &mut bytes, &mut instruction, mode, rng);
        self.aim_branch(&mut case, &mut bytes, &mut instruction, mode, rng);

        if !undefined::is_defined(&instruction, &bytes, bitness, case.gpr[1]) {
            return None;
        }
        case.undefined = undefined::undefined_flags(&instruction, case.gpr[1]);
        if case.undefined != 0 && writes_stack_pointer(&instruction) {
            // The frame with the undefined flags would be anywhere.
            return None;
        }
        if undefined::may_leave_destination(&instruction) {
            case.undefined_register = Some(instruction.op0_register().full_register().number());
        }
        case.name = format!("{} {code:?}", mode.name());
        case.code = bytes.clone();
        for (i, byte) in (0u64..).zip(&bytes) {
            // Wraps only where the instruction pointer does.
            let at = SEGMENTS[seg::CS] + (ip + i) as u32;
            case.patches.push((at, vec![*byte]));
        }
        Some((case, instruction))
    }

    /// Now and then other segments than those of 64 KiB that may be read and written.
    fn vary_segments(&self, case: &mut Case, mode: Mode, rng: &mut Rng) {
        let Mode::Protected(bitness, level) = mode else {
            return;
        };
        let big = if bitness == 32 { access::BIG } else { 0 };
        for register in [seg::ES, seg::DS, seg::FS, seg::GS, seg::SS] {
            // At level 0 the exception that ends the case needs the stack.
            if !rng.chance(15) || register == seg::SS && level == 0 {
                continue;
            }
            let base = SEGMENTS[register];
            let kind = access::PRESENT | access::DATA | level << 5;
            let (limit, kind) = match rng.below(6) {
                0 => (0x8100 + rng.below(16) as u32, kind),
                1 => (0x7fff + rng.below(16) as u32, kind | access::EXPAND_DOWN),
                2 if register != seg::SS => (0xffff, kind & !2),
                3 if register != seg::SS => {
                    case.segments[register] = rng.below(4) as u16;
                    continue;
                }
                4 if register != seg::SS => (0xffff, access::PRESENT | access::CODE | level << 5),
                _ => (0xffff, kind | access::ACCESSED),
            };
            let flags = match kind & (access::EXPAND_DOWN | 8) {
                // With 32 bits it would reach up to 4 GiB, where no memory is.
                access::EXPAND_DOWN => 0,
                _ if rng.chance(20) => big ^ access::BIG,
                _ => big,
            };
            case.set_slot(register, base, limit, kind, flags);
            case.segments[register] |= u16::from(level);
        }
    }

    fn place_stack(&self, case: &mut Case, mode: Mode, is_return: bool, rng: &mut Rng) {
        let junk = if mode.bitness() == 16 && rng.chance(10) && matches!(mode, Mode::Real) {
            rng.next() & 0xffff_0000
        } else {
            0
        };
        let pointer = match rng.below(20) {
            // Whether a frame may wrap around the segment is not told.
            0 | 1 if is_return => 0x8100,
            0 => rng.below(10),
            1 => 0x1_0000 - rng.below(10),
            2 => 0x8100 | 1,
            _ => 0x8100 - rng.below(0x20) * 2,
        };
        // Delivering the exception that ends a case needs room: at level 0 on this stack.
        let pointer = match mode {
            Mode::Protected(_, 0) | Mode::Real if pointer < 0x40 => 0x8000 + pointer,
            _ => pointer,
        };
        case.gpr[4] = pointer & 0xffff | junk;
    }

    /// Makes each memory operand lie where it should, with something worth reading.
    fn place_memory(
        &mut self,
        case: &mut Case,
        bytes: &mut [u8],
        instruction: &mut Instruction,
        mode: Mode,
        rng: &mut Rng,
    ) {
        let used: Vec<UsedMemory> = self.info.info(instruction).used_memory().to_vec();
        let mut fixed: Vec<Register> = vec![Register::ESP];
        for memory in used {
            let size = (memory.memory_size().size() as u64).max(1);
            let segment = segment_index(memory.segment());
            let narrow = memory.address_size() == CodeSize::Code16;
            let mask = if narrow { 0xffff } else { 0xffff_ffff };
            let mut offset = match rng.below(20) {
                0 => rng.below(16),
                1 => 0x1_0000 - rng.below(16),
                2 if !narrow => 0x1_0000 + rng.below(16),
                3 if !narrow => rng.next() & mask,
                4..=8 => 0x8000 + rng.below(0x100),
                _ => (0x8000 + rng.below(0x100)) & !(size.next_power_of_two() - 1),
            };
            if segment == seg::CS {
                // Not over the instruction itself.
                offset = 0x8080 + rng.below(0x40);
            }
            let repeated = instruction.has_rep_prefix() || instruction.has_repne_prefix();
            if repeated && rng.chance(80) {
                offset = 0x8080 + rng.below(0x40);
            }
            let base = memory.base();
            let index = memory.index();
            let full = base.full_register32();
            if base == Register::None {
                aim_displacement(case, bytes, instruction, &memory, offset, mode);
            } else if !fixed.contains(&full) && index.full_register32() != full {
                let scaled = if index == Register::None {
                    0
                } else {
                    read(case, index).wrapping_mul(u64::from(memory.scale()))
                };
                let value = offset
                    .wrapping_sub(memory.displacement())
                    .wrapping_sub(scaled)
                    .wrapping_sub(bit_offset(case, instruction));
                let place = &mut case.gpr[full.number()];
                *place = *place & !mask & 0xffff_ffff | value & mask;
                fixed.push(full);
                if index != Register::None {
                    fixed.push(index.full_register32());
                }
            }
            let stack = full == Register::ESP;
            let offset = if stack {
                case.gpr[4] & 0xffff
            } else {
                offset & 0xffff
            };
            self.fill(
                case,
                instruction,
                SEGMENTS[segment],
                offset,
                stack,
                mode,
                rng,
            );
        }
    }

    /// Puts values where a memory operand lies: a far pointer or a frame if it is one.
    #[expect(clippy::too_many_arguments, reason = "one operand in all its parts")]
    fn fill(
        &self,
        case: &mut Case,
        instruction: &Instruction,
        base: u32,
        offset: u64,
        stack: bool,
        mode: Mode,
        rng: &mut Rng,
    ) {
        use Mnemonic as M;
        let wide = instruction.code().op_code().operand_size() == 32;
        let word = if wide { 4 } else { 2 };
        let far = matches!(
            instruction.mnemonic(),
            M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss
        ) || instruction
            .code()
            .op_code()
            .instruction_string()
            .contains("m16:");
        let code = !matches!(
            instruction.mnemonic(),
            M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss | M::Mov | M::Pop
        );
        let target = near_target(rng, wide);
        let selector = pick_selector(mode, code, rng);
        let mut put = |at: u64, value: u64, bytes: usize| {
            for (i, byte) in (0u64..).zip(&value.to_le_bytes()[..bytes]) {
                let at = base + ((offset + at + i) & 0xffff) as u32;
                case.patches.push((at, vec![*byte]));
            }
        };
        put(0, rng.integer(), 8);
        match instruction.mnemonic() {
            M::Retf | M::Iret | M::Iretd if stack => {
                put(0, target, word);
                put(word as u64, selector.into(), word);
                // Neither virtual-8086 mode nor a nested task.
                let flags = rng.next() & 0x0004_bfd7 | 2;
                put(2 * word as u64, flags, word);
                let outer = rng.below(0x1_0000);
                put(3 * word as u64, outer, word);
                put(
                    4 * word as u64,
                    pick_selector(mode, false, rng).into(),
                    word,
                );
            }
            M::Popf | M::Popfd if stack => put(0, rng.next() & 0x0024_7fd7, word),
            M::Pop | M::Mov if has_segment_destination(instruction) => {
                put(0, selector.into(), word);
            }
            _ if far && !stack => {
                put(0, target, word);
                put(word as u64, selector.into(), 2);
            }
            M::Jmp | M::Call | M::Ret => put(0, target, word),
            _ => {}
        }
        if let (true, Some(register)) = (
            has_segment_destination(instruction) && instruction.op1_kind() == OpKind::Register,
            Some(instruction.op1_register()),
        ) {
            set(case, register, selector.into());
        }
    }

    /// Makes a branch lead somewhere else than into itself.
    fn aim_branch(
        &self,
        case: &mut Case,
        bytes: &mut [u8],
        instruction: &mut Instruction,
        mode: Mode,
        rng: &mut Rng,
    ) {
        if has_segment_destination(instruction) && instruction.op1_kind() == OpKind::Register {
            let selector = pick_selector(mode, false, rng);
            set(case, instruction.op1_register(), selector.into());
        }
        let bitness = mode.bitness();
        let mut decoder = Decoder::with_ip(bitness, bytes, instruction.ip(), DecoderOptions::NONE);
        let decoded = decoder.decode();
        let offsets = decoder.get_constant_offsets(&decoded);
        let own = decoded.ip()..decoded.ip() + decoded.len() as u64;
        match (decoded.flow_control(), decoded.op0_kind()) {
            (_, OpKind::NearBranch16 | OpKind::NearBranch32) => {
                let (at, size) = (offsets.immediate_offset(), offsets.immediate_size());
                for _ in 0..100 {
                    let relative = rng.integer().to_le_bytes();
                    bytes[at..at + size].copy_from_slice(&relative[..size]);
                    *instruction = decode(bytes, bitness, decoded.ip());
                    let target = instruction.near_branch_target();
                    if !own.contains(&target) && !own.contains(&(target | 0x1_0000)) {
                        break;
                    }
                }
            }
            (_, OpKind::FarBranch16 | OpKind::FarBranch32) => {
                let wide = decoded.op0_kind() == OpKind::FarBranch32;
                let at = offsets.immediate_offset();
                let size = if wide { 4 } else { 2 };
                let target = near_target(rng, wide).to_le_bytes();
                bytes[at..at + size].copy_from_slice(&target[..size]);
                let selector = pick_selector(mode, true, rng);
                bytes[at + size..at + size + 2].copy_from_slice(&selector.to_le_bytes());
                *instruction = decode(bytes, bitness, decoded.ip());
            }
            (FlowControl::IndirectBranch | FlowControl::IndirectCall, OpKind::Register) => {
                let wide = decoded.op0_register().size() == 4;
                let target = near_target(rng, wide);
                set(case, decoded.op0_register(), target);
            }
            _ => {}
        }
    }
}

fn has_segment_destination(instruction: &Instruction) -> bool {
    matches!(instruction.mnemonic(), Mnemonic::Mov | Mnemonic::Pop)
        && instruction.op0_kind() == OpKind::Register
        && instruction.op0_register().is_segment_register()
}

fn writes_stack_pointer(instruction: &Instruction) -> bool {
    instruction.op0_kind() == OpKind::Register
        && matches!(instruction.op0_register(), Register::SP | Register::ESP)
}

fn segment_index(register: Register) -> usize {
    match register {
        Register::ES => seg::ES,
        Register::CS => seg::CS,
        Register::SS => seg::SS,
        Register::FS => seg::FS,
        Register::GS => seg::GS,
        _ => seg::DS,
    }
}
