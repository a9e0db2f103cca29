//! What selecting a handler needs to know about an instruction, and the macros that turn widths,
//! addresses and conditions known at decoding into types.

use crate::core_state::{seg, slot};
use crate::mode::Mode;
use crate::op::{HIGH_BYTE, Op};
use iced_x86::{Code, ConditionCode, EncodingKind, Instruction, Mnemonic, OpKind, Register};

/// What an operand is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    None,
    /// A general register.
    Reg,
    /// An MMX register.
    Mm,
    /// An XMM register.
    Xmm,
    /// A YMM register.
    Ymm,
    /// A segment register.
    Seg,
    /// A control register.
    Control,
    /// A debug register.
    Debug,
    /// A memory operand with ModRM or an absolute offset.
    Mem,
    Imm,
    /// The target of a near branch.
    Near,
    /// The target of a far branch.
    Far,
    /// What string instructions imply, and registers of parts that are not there.
    Other,
}

impl Kind {
    /// A register that an operation names by its slot.
    fn is_register(self) -> bool {
        matches!(
            self,
            Self::Reg | Self::Mm | Self::Xmm | Self::Ymm | Self::Seg | Self::Control | Self::Debug
        )
    }
}

/// How the memory operand's address is formed; names the types of [`crate::op`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum AddressKind {
    Based,
    Scaled,
    Segmented,
}

/// An instruction, looked at closely enough to select its handler.
pub(crate) struct Form {
    pub(crate) instruction: Instruction,
    pub(crate) mnemonic: Mnemonic,
    pub(crate) mode: Mode,
    /// In the VEX encoding.
    pub(crate) is_vex: bool,
    /// The first four operands.
    pub(crate) kinds: [Kind; 4],
    /// Bytes of the first operand.
    pub(crate) width: usize,
    pub(crate) address: AddressKind,
    /// The condition of Jcc, SETcc, CMOVcc, LOOPcc.
    pub(crate) condition: Option<ConditionCode>,
    pub(crate) is_set: bool,
    pub(crate) is_cmov: bool,
}

/// Turns [`Form::width`] into an integer type.
macro_rules! by_width {
    ($form:expr, $t:ident => $select:expr) => {
        match $form.width {
            1 => {
                type $t = u8;
                $select
            }
            2 => {
                type $t = u16;
                $select
            }
            4 => {
                type $t = u32;
                $select
            }
            8 => {
                type $t = u64;
                $select
            }
            _ => None,
        }
    };
}
pub(crate) use by_width;

/// Turns [`Form::address`] into a type and the expression into a handler.
macro_rules! by_address {
    ($form:expr, $a:ident => $handler:expr) => {
        match $form.address {
            $crate::form::AddressKind::Based => {
                type $a = $crate::op::Based;
                $handler as $crate::op::Handler
            }
            $crate::form::AddressKind::Scaled => {
                type $a = $crate::op::Scaled;
                $handler as $crate::op::Handler
            }
            $crate::form::AddressKind::Segmented => {
                type $a = $crate::op::Segmented;
                $handler as $crate::op::Handler
            }
        }
    };
}
pub(crate) use by_address;

/// Turns a condition code into a type and the expression into a handler.
macro_rules! by_condition {
    ($condition:expr, $c:ident => $handler:expr) => {
        by_condition!(@ $condition, $c => $handler;
            o Overflow, no NoOverflow, b Below, ae AboveOrEqual, e Equal, ne NotEqual,
            be BelowOrEqual, a Above, s Sign, ns NoSign, p Parity, np NoParity,
            l Less, ge GreaterOrEqual, le LessOrEqual, g Greater)
    };
    (@ $condition:expr, $c:ident => $handler:expr; $($code:ident $type:ident),*) => {
        match $condition {
            $(iced_x86::ConditionCode::$code => {
                type $c = $crate::alu::$type;
                $handler as $crate::op::Handler
            })*
            _ => return None,
        }
    };
}
pub(crate) use by_condition;

fn kind_of(instruction: &Instruction, operand: u32) -> Kind {
    match instruction.op_kind(operand) {
        OpKind::Register => {
            let register = instruction.op_register(operand);
            if register.is_gpr() {
                Kind::Reg
            } else if register.is_mm() {
                Kind::Mm
            } else if register.is_xmm() && register.number() < 16 {
                Kind::Xmm
            } else if register.is_ymm() && register.number() < 16 {
                Kind::Ymm
            } else if register.is_segment_register() {
                Kind::Seg
            } else if register.is_cr() {
                Kind::Control
            } else if register.is_dr() {
                Kind::Debug
            } else {
                Kind::Other
            }
        }
        OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => Kind::Near,
        OpKind::FarBranch16 | OpKind::FarBranch32 => Kind::Far,
        OpKind::Immediate8
        | OpKind::Immediate8_2nd
        | OpKind::Immediate16
        | OpKind::Immediate32
        | OpKind::Immediate64
        | OpKind::Immediate8to16
        | OpKind::Immediate8to32
        | OpKind::Immediate8to64
        | OpKind::Immediate32to64 => Kind::Imm,
        OpKind::Memory => Kind::Mem,
        _ => Kind::Other,
    }
}

/// The slot of a register in the file that it belongs to.
pub(crate) fn slot_of(register: Register) -> u8 {
    match register {
        Register::None => slot::ZERO,
        // iced counts AL, CL, DL, BL, AH, CH, DH, BH, SPL, BPL, SIL, DIL, R8L ...
        _ if register.is_gpr8() => match register.number() as u8 {
            low @ 0..4 => low,
            high @ 4..8 => (high - 4) | HIGH_BYTE,
            wide => wide - 4,
        },
        _ => register.number() as u8,
    }
}

/// The index of a segment register.
pub(crate) fn segment_of(register: Register) -> u8 {
    match register {
        Register::ES => seg::ES,
        Register::CS => seg::CS,
        Register::SS => seg::SS,
        Register::FS => seg::FS,
        Register::GS => seg::GS,
        _ => seg::DS,
    }
}

impl Form {
    pub(crate) fn new(instruction: Instruction, mode: Mode) -> Self {
        let mut kinds = [Kind::None; 4];
        for operand in 0..instruction.op_count().min(4) {
            kinds[operand as usize] = kind_of(&instruction, operand);
        }
        let mnemonic = instruction.mnemonic();
        let condition = match instruction.condition_code() {
            ConditionCode::None => None,
            code => Some(code),
        };
        let mut form = Self {
            instruction,
            mnemonic,
            mode,
            is_vex: instruction.encoding() == EncodingKind::VEX,
            kinds,
            width: 0,
            address: AddressKind::Segmented,
            condition,
            is_set: is_set(mnemonic),
            is_cmov: is_cmov(mnemonic),
        };
        form.width = match instruction.code() {
            // The operand size decides how much of the base is loaded.
            Code::Lgdt_m1632_16 | Code::Lidt_m1632_16 => 2,
            _ => form.operand_width(0),
        };
        form.address = form.address_kind();
        form
    }

    /// Bytes of an operand.
    pub(crate) fn operand_width(&self, operand: u32) -> usize {
        match self.kinds.get(operand as usize) {
            Some(Kind::Mem) => self.instruction.memory_size().size(),
            Some(kind) if kind.is_register() => self.instruction.op_register(operand).size(),
            _ => match self.instruction.op_kind_or_none(operand) {
                Some(OpKind::Immediate8 | OpKind::Immediate8_2nd) => 1,
                Some(OpKind::Immediate16 | OpKind::Immediate8to16) => 2,
                Some(OpKind::Immediate32 | OpKind::Immediate8to32) => 4,
                Some(OpKind::Immediate64 | OpKind::Immediate8to64 | OpKind::Immediate32to64) => 8,
                Some(_) => self.instruction.memory_size().size(),
                None => 0,
            },
        }
    }

    /// Bytes of the second operand.
    pub(crate) fn source_width(&self) -> usize {
        self.operand_width(1)
    }

    /// Bytes of the last source of a vector instruction.
    pub(crate) fn rm_width(&self) -> usize {
        self.operand_width(if self.is_vex { 2 } else { 1 })
    }

    /// Whether it works on 256 bits.
    pub(crate) fn is_wide(&self) -> bool {
        self.kinds.contains(&Kind::Ymm)
    }

    /// Whether any operand is memory.
    pub(crate) fn has_memory(&self) -> bool {
        self.kinds.contains(&Kind::Mem)
    }

    fn address_kind(&self) -> AddressKind {
        let instruction = &self.instruction;
        let flat = self.mode.has(Mode::CODE64)
            && !matches!(instruction.memory_segment(), Register::FS | Register::GS)
            && self.address_bits() == 64
            && !instruction.has_lock_prefix();
        if !flat {
            AddressKind::Segmented
        } else if instruction.memory_index() == Register::None {
            AddressKind::Based
        } else {
            AddressKind::Scaled
        }
    }

    /// Bits of the memory operand's offset: 16, 32 or 64.
    fn address_bits(&self) -> u8 {
        let instruction = &self.instruction;
        let by_register = |register: Register| match register.size() {
            2 => Some(16),
            4 => Some(32),
            8 => Some(64),
            _ => None,
        };
        match instruction.memory_base() {
            Register::EIP => return 32,
            Register::RIP => return 64,
            base => {
                if let Some(bits) = by_register(base) {
                    return bits;
                }
            }
        }
        if let Some(bits) = by_register(instruction.memory_index()) {
            return bits;
        }
        match instruction.memory_displ_size() {
            2 => 16,
            4 => 32,
            _ => 64,
        }
    }

    /// The segment of the memory operand. In 64-bit code a prefix that names another segment than
    /// FS and GS is ignored; the default then only decides between #SS and #GP.
    fn memory_segment(&self) -> u8 {
        let instruction = &self.instruction;
        let segment = instruction.memory_segment();
        if self.mode.has(Mode::CODE64) && !matches!(segment, Register::FS | Register::GS) {
            return match instruction.memory_base() {
                Register::RSP | Register::RBP | Register::ESP | Register::EBP => seg::SS,
                _ => seg::DS,
            };
        }
        segment_of(segment)
    }

    /// The operation without its handler.
    pub(crate) fn operands(&self, ip: u64, nothing: crate::op::Handler) -> Op {
        let instruction = &self.instruction;
        let mut op = Op {
            run: nothing,
            disp: 0,
            imm: 0,
            ip,
            base: slot::ZERO,
            index: slot::ZERO,
            scale: 0,
            seg: seg::DS,
            dst: slot::ZERO,
            src: slot::ZERO,
            aux: slot::ZERO,
            len: instruction.len() as u8,
            address_bits: self.mode.bitness() as u8,
            lock: instruction.has_lock_prefix(),
            repeat: 0,
            width: self.width as u8,
        };
        if instruction.is_stack_instruction() {
            op.seg = seg::SS;
        }
        if instruction.has_rep_prefix() {
            op.repeat = 1;
        } else if instruction.has_repne_prefix() {
            op.repeat = 2;
        }
        let mut immediates = 0;
        for (operand, kind) in (0u32..).zip(self.kinds) {
            match kind {
                _ if kind.is_register() => {
                    let register = instruction.op_register(operand);
                    let slot = if kind == Kind::Seg {
                        segment_of(register)
                    } else {
                        slot_of(register)
                    };
                    match operand {
                        0 => op.dst = slot,
                        1 => op.src = slot,
                        2 => op.aux = slot,
                        // VEX has a register in an immediate.
                        _ => op.imm = slot.into(),
                    }
                }
                Kind::Mem => {
                    op.disp = instruction.memory_displacement64();
                    op.address_bits = self.address_bits();
                    op.seg = self.memory_segment();
                    let base = instruction.memory_base();
                    if !matches!(base, Register::RIP | Register::EIP) {
                        op.base = slot_of(base);
                    }
                    op.index = slot_of(instruction.memory_index());
                    op.scale = instruction.memory_index_scale().trailing_zeros() as u8;
                }
                Kind::Imm => {
                    // ENTER, EXTRQ and INSERTQ have two immediates; the second goes to the top.
                    let value = instruction.immediate(operand);
                    op.imm = if immediates == 0 {
                        value
                    } else {
                        op.imm | value << 32
                    };
                    immediates += 1;
                }
                Kind::Near => {
                    op.imm = instruction.near_branch_target();
                    if let Some(bits) = count_bits(instruction.code()) {
                        op.address_bits = bits;
                    }
                }
                Kind::Far => {
                    let offset = if instruction.op_kind(operand) == OpKind::FarBranch16 {
                        u64::from(instruction.far_branch16())
                    } else {
                        u64::from(instruction.far_branch32())
                    };
                    op.imm = offset | u64::from(instruction.far_branch_selector()) << 32;
                }
                Kind::Other => op.implied_string_operand(instruction, operand, self.mode),
                _ => {}
            }
        }
        op
    }
}

/// Bits of the count register of LOOPcc and JCXZ, which the address size decides.
fn count_bits(code: Code) -> Option<u8> {
    use Code as C;
    Some(match code {
        C::Loop_rel8_16_CX
        | C::Loop_rel8_32_CX
        | C::Loope_rel8_16_CX
        | C::Loope_rel8_32_CX
        | C::Loopne_rel8_16_CX
        | C::Loopne_rel8_32_CX
        | C::Jcxz_rel8_16
        | C::Jcxz_rel8_32 => 16,
        C::Loop_rel8_16_ECX
        | C::Loop_rel8_32_ECX
        | C::Loop_rel8_64_ECX
        | C::Loope_rel8_16_ECX
        | C::Loope_rel8_32_ECX
        | C::Loope_rel8_64_ECX
        | C::Loopne_rel8_16_ECX
        | C::Loopne_rel8_32_ECX
        | C::Loopne_rel8_64_ECX
        | C::Jecxz_rel8_16
        | C::Jecxz_rel8_32
        | C::Jecxz_rel8_64 => 32,
        C::Loop_rel8_16_RCX
        | C::Loop_rel8_64_RCX
        | C::Loope_rel8_16_RCX
        | C::Loope_rel8_64_RCX
        | C::Loopne_rel8_16_RCX
        | C::Loopne_rel8_64_RCX
        | C::Jrcxz_rel8_16
        | C::Jrcxz_rel8_64 => 64,
        _ => return None,
    })
}

impl Op {
    /// Address size and segment of the memory operand that a string instruction implies.
    /// In 64-bit code a prefix that names another segment than FS and GS is ignored.
    fn implied_string_operand(&mut self, instruction: &Instruction, operand: u32, mode: Mode) {
        let bits = match instruction.op_kind(operand) {
            OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => 16,
            OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => 32,
            OpKind::MemorySegRSI | OpKind::MemorySegRDI | OpKind::MemoryESRDI => 64,
            _ => return,
        };
        self.address_bits = bits;
        self.seg = match instruction.memory_segment() {
            segment @ (Register::FS | Register::GS) => segment_of(segment),
            _ if mode.has(Mode::CODE64) => seg::DS,
            segment => segment_of(segment),
        };
    }
}

/// What iced's `op_kind` lacks: an answer for operands that are not there.
trait OpKindOrNone {
    fn op_kind_or_none(&self, operand: u32) -> Option<OpKind>;
}

impl OpKindOrNone for Instruction {
    fn op_kind_or_none(&self, operand: u32) -> Option<OpKind> {
        (operand < self.op_count()).then(|| self.op_kind(operand))
    }
}

fn is_set(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Seto
            | M::Setno
            | M::Setb
            | M::Setae
            | M::Sete
            | M::Setne
            | M::Setbe
            | M::Seta
            | M::Sets
            | M::Setns
            | M::Setp
            | M::Setnp
            | M::Setl
            | M::Setge
            | M::Setle
            | M::Setg
    )
}

fn is_cmov(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Cmovo
            | M::Cmovno
            | M::Cmovb
            | M::Cmovae
            | M::Cmove
            | M::Cmovne
            | M::Cmovbe
            | M::Cmova
            | M::Cmovs
            | M::Cmovns
            | M::Cmovp
            | M::Cmovnp
            | M::Cmovl
            | M::Cmovge
            | M::Cmovle
            | M::Cmovg
    )
}
