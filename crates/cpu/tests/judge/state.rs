//! What both sides start from and what they end with, and where memory is.

/// First of two pages of code, readable, writable and executable.
pub const CODE: u64 = 0x2000_0000;
/// Bytes of code pages.
pub const CODE_BYTES: usize = 0x2000;
/// First of two pages of data, readable and writable. Nothing is mapped around them.
pub const DATA: u64 = 0x2001_0000;
/// Bytes of data pages.
pub const DATA_BYTES: usize = 0x2000;
/// Where nothing is mapped.
pub const NOWHERE: u64 = 0x2008_0000;
/// The base of GS on both sides.
pub const GS_BASE: u64 = DATA + 0x740;

/// RSP's index in [`Registers::gpr`].
pub const RSP: usize = 4;

/// RFLAGS bits.
pub mod flag {
    pub const CF: u64 = 1 << 0;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const DF: u64 = 1 << 10;
    pub const OF: u64 = 1 << 11;
    pub const ARITHMETIC: u64 = CF | PF | AF | ZF | SF | OF;
    /// Everything that is compared.
    pub const COMPARED: u64 = ARITHMETIC | DF;
}

/// An x87 exception waits, in the status word: ES, and B, which is the same.
pub const SUMMARY: u16 = 1 << 7 | 1 << 15;

/// The registers that user code sees.
#[derive(Clone, PartialEq, Debug)]
pub struct Registers {
    /// In the order of their encoding.
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub xmm: [u128; 16],
    /// Upper halves of the YMM registers.
    pub ymm_high: [u128; 16],
    pub mxcsr: u32,
    /// ST0 to ST7 (80 bits each).
    pub st: [u128; 8],
    pub fcw: u16,
    pub fsw: u16,
    /// One bit a register, set when it is not empty.
    pub ftw: u8,
    /// Opcode, instruction and operand pointer of the last x87 instruction.
    pub fop: u16,
    pub fip: u64,
    pub fdp: u64,
}

/// How a case ended: the exception that followed the instruction, int3 if it completed.
#[derive(Clone, PartialEq, Debug)]
pub struct Outcome {
    pub registers: Registers,
    pub vector: u8,
    /// Zero for vectors without one.
    pub error: u32,
    /// CR2, of a page fault.
    pub address: u64,
}

/// Whether an exception pushes an error code.
pub fn has_error_code(vector: u8) -> bool {
    matches!(vector, 8 | 10..=14 | 17 | 21)
}

/// One instruction and everything it may depend on.
#[derive(Clone)]
pub struct Case {
    /// The instruction's bytes.
    pub bytes: Vec<u8>,
    /// 64 or 32.
    pub bitness: u32,
    /// Registers before it; RIP says where it lies.
    pub registers: Registers,
    /// Bytes to put over the data pages' pattern, by offset.
    pub patches: Vec<(usize, Vec<u8>)>,
    /// Flags that are not compared, beside those that the last instruction leaves undefined.
    pub undefined: u64,
}
