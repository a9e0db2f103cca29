//! Cases for one instruction form: encodings, operands and what they point to.
//!
//! Bytes are put together from the form's opcode with random prefixes, ModRM and the rest, and
//! taken if the decoder finds that form in them: so every way to encode a form turns up. Registers
//! are then chosen so that each memory operand, explicit or implied, lies where the case wants it.

use crate::areas::{
    self, fill_area, fill_legacy_area, is_legacy_restore, is_restore, place_area, place_whole,
};
use crate::encoding::{decode, edit_immediates, encode};
use crate::native::plain_registers;
use crate::rng::Rng;
use crate::state::{CODE, CODE_BYTES, Case, DATA, DATA_BYTES, GS_BASE, NOWHERE, RSP, flag};
use crate::units::{is_floating, is_mmx, is_x87, prepare_x87};
use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderOptions, EncodingKind, FlowControl, Instruction,
    InstructionInfoFactory, MemorySize, Mnemonic, OpCodeInfo, OpKind, Register, UsedMemory,
};

/// Makes cases.
pub struct Generator {
    info: InstructionInfoFactory,
    bitness: u32,
}

impl Generator {
    pub fn new(bitness: u32) -> Self {
        Self {
            info: InstructionInfoFactory::new(),
            bitness,
        }
    }

    /// Whether a form exists in this mode and has an encoding that is generated.
    pub fn knows(&self, op: &OpCodeInfo) -> bool {
        op.is_instruction()
            && matches!(op.encoding(), EncodingKind::Legacy | EncodingKind::VEX)
            // A processor that never was one's main processor, with encodings of its own.
            && !op.code().cpuid_features().contains(&CpuidFeature::KNC)
            && op.is_available_in_mode(self.bitness)
            && if self.bitness == 64 {
                op.long_mode()
            } else {
                op.compatibility_mode()
            }
    }

    /// One case, or `None` if no encoding was found in a number of attempts.
    pub fn case(&mut self, code: Code, rng: &mut Rng) -> Option<(Case, Instruction)> {
        let offset = if rng.chance(4) {
            0x1000 - rng.below(15)
        } else {
            0x800 + rng.below(16)
        };
        let rip = CODE + offset;
        let (mut bytes, mut instruction) = (0..200).find_map(|_| {
            let bytes = encode(code.op_code(), self.bitness, rng);
            let instruction = self.decode(&bytes, rip);
            (instruction.code() == code).then(|| (bytes[..instruction.len()].to_vec(), instruction))
        })?;
        edit_immediates(&mut bytes, &mut instruction, self.bitness, rng);

        let mut registers = plain_registers();
        registers.rip = rip;
        registers.rflags = 2 | rng.next() & flag::ARITHMETIC;
        if rng.chance(20) {
            registers.rflags |= flag::DF;
        }
        registers.gpr = std::array::from_fn(|_| rng.integer());
        let floating = is_floating(&instruction);
        registers.xmm = std::array::from_fn(|_| {
            if floating {
                rng.floats()
            } else {
                rng.integers()
            }
        });
        registers.ymm_high = std::array::from_fn(|_| match rng.below(4) {
            0 => 0,
            _ if floating => rng.floats(),
            _ => rng.integers(),
        });
        // The top of the stack, and which registers are full.
        registers.st = std::array::from_fn(|_| rng.integers() >> 48);
        registers.fsw = rng.next() as u16 & 0x3800;
        registers.ftw = rng.next() as u8;
        if is_x87(&instruction) || is_mmx(&instruction) && rng.chance(30) {
            prepare_x87(&mut registers, rng);
        }
        if floating && rng.chance(30) {
            // Rounding, DAZ and FTZ; the sticky flags; now and then an unmasked exception.
            registers.mxcsr ^= (rng.next() as u32) & 0xe07f;
            if rng.chance(20) {
                registers.mxcsr ^= (rng.next() as u32) & 0x1f80;
            }
        }
        let mut case = Case {
            bytes,
            bitness: self.bitness,
            registers,
            patches: Vec::new(),
            undefined: 0,
        };
        self.narrow_registers(&mut case, &instruction, rng);
        self.place_memory(&mut case, &mut instruction, floating, rng);
        self.aim_branches(&mut case, &mut instruction, rng);
        if self.bitness == 32 {
            for value in &mut case.registers.gpr {
                *value &= 0xffff_ffff;
            }
            for value in &mut case.registers.gpr[8..] {
                *value = 0;
            }
        }
        Some((case, instruction))
    }

    fn decode(&self, bytes: &[u8], rip: u64) -> Instruction {
        decode(bytes, self.bitness, rip)
    }

    /// Chooses values that make more of an instruction's cases likely than chance would.
    fn narrow_registers(&self, case: &mut Case, instruction: &Instruction, rng: &mut Rng) {
        use Mnemonic as M;
        let gpr = &mut case.registers.gpr;
        if instruction.has_rep_prefix() || instruction.has_repne_prefix() || is_loop(instruction) {
            let junk = if rng.chance(30) { rng.next() << 32 } else { 0 };
            gpr[1] = rng.below(40) | if is_32bit_count(instruction) { junk } else { 0 };
        }
        match instruction.mnemonic() {
            M::Div | M::Idiv if rng.chance(70) => {
                // A quotient that fits.
                let signed = instruction.mnemonic() == M::Idiv && rng.chance(50);
                if signed {
                    gpr[0] = (gpr[0] as i64 >> rng.below(64)) as u64;
                }
                gpr[2] = if signed {
                    (gpr[0] as i64 >> 63) as u64
                } else {
                    rng.below(3)
                };
                if instruction.code() == Code::Div_rm8 || instruction.code() == Code::Idiv_rm8 {
                    gpr[0] = if signed {
                        gpr[0] as i8 as u64
                    } else {
                        gpr[0] & 0xff | rng.below(8) << 8
                    };
                }
            }
            M::Bt | M::Bts | M::Btr | M::Btc
                if instruction.op0_kind() == OpKind::Memory
                    && instruction.op1_kind() == OpKind::Register =>
            {
                let register = instruction.op1_register().full_register();
                gpr[register.number()] = match rng.below(10) {
                    0 => rng.integer(),
                    _ => rng.below(0x7000).wrapping_sub(0x3800),
                };
            }
            // Others the host may have and Twofold not.
            M::Xrstor | M::Xrstor64 => {
                gpr[0] &= areas::COMPONENTS;
                gpr[2] = 0;
            }
            M::Cmpxchg if instruction.op0_kind() == OpKind::Register && rng.chance(50) => {
                gpr[instruction.op0_register().full_register().number()] = gpr[0];
            }
            _ => {}
        }
    }

    /// Makes each memory operand point where it should.
    fn place_memory(
        &mut self,
        case: &mut Case,
        instruction: &mut Instruction,
        floating: bool,
        rng: &mut Rng,
    ) {
        if instruction.is_vsib() {
            self.place_elements(case, instruction, rng);
            return;
        }
        let restores = is_restore(instruction);
        let used: Vec<UsedMemory> = self.info.info(instruction).used_memory().to_vec();
        let mut fixed: Vec<Register> = Vec::new();
        for memory in used {
            let size = match memory.memory_size().size() as u64 {
                _ if restores => areas::BYTES,
                0 => 16,
                size => size,
            };
            let mut target = self.target(instruction, size, rng);
            if restores {
                target = place_area(target, rng);
            } else if is_legacy_restore(instruction) {
                target = place_whole(target, size);
            }
            let wide = memory.address_size() == iced_x86::CodeSize::Code64;
            let mask = if wide { u64::MAX } else { 0xffff_ffff };
            let segment = match memory.segment() {
                Register::GS => GS_BASE,
                _ => 0,
            };
            let base = memory.base();
            let index = memory.index();
            let aligned = |address: u64| address.wrapping_sub(segment);
            if base == Register::None || base.is_ip() {
                self.aim_displacement(case, instruction, &memory, aligned(target), rng);
            } else {
                let full = base.full_register();
                if !fixed.contains(&full) {
                    let scaled = if index == Register::None {
                        0
                    } else {
                        if index.full_register() == full {
                            // Both at once: whatever the address is, both sides compute it.
                            continue;
                        }
                        read_register(case, index).wrapping_mul(u64::from(memory.scale()))
                    };
                    let bit = bit_offset(case, instruction);
                    let value = aligned(target)
                        .wrapping_sub(memory.displacement())
                        .wrapping_sub(scaled)
                        .wrapping_sub(bit)
                        & mask;
                    let place = &mut case.registers.gpr[full.number()];
                    // The rest of the register does not matter to a 32-bit address.
                    *place = if wide || self.bitness == 32 {
                        value
                    } else {
                        *place & !mask | value
                    };
                    fixed.push(full);
                    if index != Register::None {
                        fixed.push(index.full_register());
                    }
                }
            }
            if restores {
                fill_area(case, target, rng);
            } else {
                self.fill_memory(case, instruction, target, size, floating, rng);
            }
        }
        // Registers that are operands and addresses at once were chosen above.
        if instruction.mnemonic() == Mnemonic::Enter {
            case.registers.gpr[5] = DATA + 0x1000 + rng.below(0x80) * 8;
            case.registers.gpr[RSP] = DATA + 0x1000 + rng.below(0x80) * 8;
        }
    }

    /// Makes each element of a gather point where it should, and some of them be wanted.
    fn place_elements(&mut self, case: &mut Case, instruction: &mut Instruction, rng: &mut Rng) {
        let memory = self.info.info(instruction).used_memory().to_vec();
        let Some(memory) = memory.first() else { return };
        let scale = u64::from(memory.scale());
        let segment = if memory.segment() == Register::GS {
            GS_BASE
        } else {
            0
        };
        let middle = (DATA + 0x1000).wrapping_sub(segment);
        let base = memory.base();
        if base == Register::None {
            self.aim_displacement(case, instruction, memory, middle, rng);
        } else {
            let value = middle.wrapping_sub(memory.displacement());
            case.registers.gpr[base.full_register().number()] = value;
        }
        let index = instruction.memory_index().number();
        let narrow = instruction.is_vsib32();
        let mut lanes = [case.registers.xmm[index], case.registers.ymm_high[index]];
        let (bits, count) = if narrow { (32, 8) } else { (64, 4) };
        for i in 0..count {
            let offset = match rng.below(100) {
                0..=3 => 0x1000 - rng.below(8),
                4 | 5 => NOWHERE - DATA,
                _ => rng.below(0xff0),
            };
            let away = if rng.chance(50) {
                offset
            } else {
                offset.wrapping_neg()
            };
            let element = (away as i64 / scale as i64) as u64 & (u64::MAX >> (64 - bits));
            let value = u128::from(element);
            let at = i * bits;
            let lane = &mut lanes[at as usize / 128];
            *lane =
                *lane & !(u128::from(u64::MAX >> (64 - bits)) << (at & 127)) | value << (at & 127);
        }
        (case.registers.xmm[index], case.registers.ymm_high[index]) = (lanes[0], lanes[1]);
    }

    /// Where a memory operand of `size` bytes should lie.
    fn target(&self, instruction: &Instruction, size: u64, rng: &mut Rng) -> u64 {
        let end = DATA + DATA_BYTES as u64;
        let repeated = instruction.has_rep_prefix() || instruction.has_repne_prefix();
        let slack = if repeated { 320 } else { 0 };
        let inside = DATA + slack + rng.below(DATA_BYTES as u64 - size - 2 * slack);
        match rng.below(100) {
            0..=9 => DATA + 0x1000 - rng.below(size.max(1) + 1),
            10 | 11 => end - rng.below(size.max(1) + 1),
            12 => DATA - rng.below(size.max(1) + 1),
            13 => NOWHERE + rng.below(0x1000),
            14 if self.bitness == 64 => 0x8000_0000_0000 + rng.next() % (1 << 50),
            15..=59 if size >= 16 => inside & !15,
            15..=39 => inside & !(size.next_power_of_two().max(1) - 1).min(7),
            _ => inside,
        }
    }

    /// Changes the displacement of an operand without base so that it leads to `target`.
    fn aim_displacement(
        &self,
        case: &mut Case,
        instruction: &mut Instruction,
        memory: &UsedMemory,
        target: u64,
        rng: &mut Rng,
    ) {
        let index = memory.index();
        let scaled = if index == Register::None || index.is_vector_register() {
            0
        } else {
            let value = rng.below(0x1000);
            let full = index.full_register().number();
            case.registers.gpr[full] = value;
            value.wrapping_mul(u64::from(memory.scale()))
        };
        let mut decoder = Decoder::with_ip(
            self.bitness,
            &case.bytes,
            instruction.ip(),
            DecoderOptions::NONE,
        );
        let decoded = decoder.decode();
        let offsets = decoder.get_constant_offsets(&decoded);
        let mut displacement = target.wrapping_sub(scaled);
        if decoded.is_ip_rel_memory_operand() {
            displacement = displacement.wrapping_sub(decoded.next_ip());
        }
        if offsets.has_displacement() {
            let (at, size) = (offsets.displacement_offset(), offsets.displacement_size());
            case.bytes[at..at + size].copy_from_slice(&displacement.to_le_bytes()[..size]);
            *instruction = self.decode(&case.bytes, instruction.ip());
        }
    }

    /// Puts a value worth reading where a memory operand lies.
    fn fill_memory(
        &self,
        case: &mut Case,
        instruction: &Instruction,
        target: u64,
        size: u64,
        floating: bool,
        rng: &mut Rng,
    ) {
        use Mnemonic as M;
        let gpr = &case.registers.gpr;
        if is_legacy_restore(instruction) {
            fill_legacy_area(case, target, rng);
            return;
        }
        let mut value = match instruction.memory_size() {
            _ if floating => rng.floats(),
            MemorySize::Float32 | MemorySize::Float64 => rng.floats(),
            MemorySize::Float80 => rng.extended(),
            MemorySize::Bcd => rng.decimal(),
            _ => rng.integers(),
        };
        if rng.chance(50) {
            match instruction.mnemonic() {
                M::Cmpxchg => value = u128::from(gpr[0]),
                M::Cmpxchg8b => {
                    value = u128::from(gpr[0] & 0xffff_ffff) | u128::from(gpr[2] as u32) << 32;
                }
                M::Cmpxchg16b => value = u128::from(gpr[0]) | u128::from(gpr[2]) << 64,
                _ => {}
            }
        }
        if matches!(instruction.mnemonic(), M::Popf | M::Popfd | M::Popfq) {
            // TF, NT, AC and ID would outlive the case in the host's process.
            value &= u128::from(flag::ARITHMETIC | flag::DF | 0x7202 & !0x4000);
        }
        if matches!(instruction.mnemonic(), M::Ldmxcsr | M::Vldmxcsr) {
            // AMD has one more bit than Intel, bit 17.
            value &= if rng.chance(80) { 0xffff } else { !(1 << 17) };
        }
        let upper = if floating {
            rng.floats()
        } else {
            rng.integers()
        };
        patch(case, target, &value.to_le_bytes()[..size.min(16) as usize]);
        if size == 32 {
            patch(case, target.wrapping_add(16), &upper.to_le_bytes());
        }
    }

    /// Makes branches lead to code, but never into the instruction's own bytes.
    fn aim_branches(&self, case: &mut Case, instruction: &mut Instruction, rng: &mut Rng) {
        let rip = instruction.ip();
        let own = rip..rip + instruction.len() as u64;
        let target = loop {
            let target = match rng.below(100) {
                0..=2 => NOWHERE + rng.below(0x1000),
                3 if self.bitness == 64
                    && instruction.flow_control() != FlowControl::ConditionalBranch =>
                {
                    0x8000_0000_0000 + rng.below(1 << 40)
                }
                _ => CODE + rng.below(CODE_BYTES as u64 - 1),
            };
            if !own.contains(&target) {
                break target;
            }
        };
        match instruction.flow_control() {
            FlowControl::UnconditionalBranch
            | FlowControl::ConditionalBranch
            | FlowControl::Call
                if matches!(
                    instruction.op0_kind(),
                    OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64
                ) =>
            {
                let mut decoder =
                    Decoder::with_ip(self.bitness, &case.bytes, rip, DecoderOptions::NONE);
                let decoded = decoder.decode();
                let offsets = decoder.get_constant_offsets(&decoded);
                let (at, size) = (offsets.immediate_offset(), offsets.immediate_size());
                let next = decoded.next_ip();
                let relative = if size == 1 {
                    // Anywhere within reach but into the instruction itself.
                    loop {
                        let relative = rng.next() as i8 as i64 as u64;
                        if !own.contains(&next.wrapping_add(relative)) {
                            break relative;
                        }
                    }
                } else if target >> 31 == 0 {
                    target.wrapping_sub(next)
                } else {
                    NOWHERE.wrapping_sub(next)
                };
                case.bytes[at..at + size].copy_from_slice(&relative.to_le_bytes()[..size]);
                *instruction = self.decode(&case.bytes, rip);
            }
            FlowControl::IndirectBranch | FlowControl::IndirectCall => {
                if instruction.op0_kind() == OpKind::Register {
                    let full = instruction.op0_register().full_register().number();
                    case.registers.gpr[full] = target;
                } else if let Some(at) = operand_address(case, instruction) {
                    patch(case, at, &target.to_le_bytes()[..self.bitness as usize / 8]);
                }
            }
            FlowControl::Return => {
                let at = case.registers.gpr[RSP];
                patch(case, at, &target.to_le_bytes()[..self.bitness as usize / 8]);
            }
            _ => {}
        }
    }
}

/// The linear address of an instruction's memory operand.
pub fn operand_address(case: &Case, instruction: &Instruction) -> Option<u64> {
    instruction.virtual_address(0, 0, |register, _, _| {
        Some(match register {
            Register::GS => GS_BASE,
            register if register.is_segment_register() => 0,
            register => read_register(case, register),
        })
    })
}

/// Puts bytes over the data's pattern, as far as they lie in it.
pub fn patch(case: &mut Case, address: u64, bytes: &[u8]) {
    for (i, byte) in bytes.iter().enumerate() {
        let offset = address.wrapping_add(i as u64).wrapping_sub(DATA);
        if offset < DATA_BYTES as u64 {
            case.patches.push((offset as usize, vec![*byte]));
        }
    }
}

fn read_register(case: &Case, register: Register) -> u64 {
    let value = case.registers.gpr[register.full_register().number()];
    match register.size() {
        1 if matches!(
            register,
            Register::AH | Register::CH | Register::DH | Register::BH
        ) =>
        {
            // Never part of an address.
            value >> 8 & 0xff
        }
        1 => value & 0xff,
        2 => value & 0xffff,
        4 => value & 0xffff_ffff,
        _ => value,
    }
}

/// What a bit string instruction adds to its operand's address.
fn bit_offset(case: &Case, instruction: &Instruction) -> u64 {
    use Mnemonic as M;
    if !matches!(instruction.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc)
        || instruction.op1_kind() != OpKind::Register
    {
        return 0;
    }
    let register = instruction.op1_register();
    let value = read_register(case, register);
    let (value, size) = match register.size() {
        2 => (i64::from(value as i16), 2),
        4 => (i64::from(value as i32), 4),
        _ => (value as i64, 8),
    };
    ((value >> (size * 8u64).trailing_zeros()) * size as i64) as u64
}

fn is_loop(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        instruction.mnemonic(),
        M::Loop | M::Loope | M::Loopne | M::Jcxz | M::Jecxz | M::Jrcxz
    )
}

fn is_32bit_count(instruction: &Instruction) -> bool {
    let text = format!("{:?}", instruction.code());
    text.contains("ecx")
        || (0..instruction.op_count()).any(|i| {
            matches!(
                instruction.op_kind(i),
                OpKind::MemorySegESI | OpKind::MemoryESEDI | OpKind::MemorySegEDI
            )
        })
}
