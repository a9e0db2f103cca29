//! The host's own x87 unit.
//!
//! What an x87 instruction computes is asked of the host: the guest's registers and control,
//! status and tag words are put into the host's unit, the instruction is executed, and they are
//! taken out again. Unmasked exceptions stay unmasked meanwhile, because their response differs
//! from the masked one. They are harmless: the host's processor reports an exception at the next
//! instruction that waits for it, and FNSAVE, which is the next, neither waits nor leaves anything
//! of the guest in the unit.
//!
//! This takes some 100 ns, nearly all of it FRSTOR and FNSAVE. It keeps [`FpuState`] the only
//! state there is.
#![expect(unsafe_code)]
// UNSAFETY: executes x87 instructions, chosen at run time, as inline assembly.

use crate::state::FpuState;
use core::arch::{asm, naked_asm};

/// Registers of the stack.
const REGISTERS: usize = 8;
/// Bytes from one stub to the next.
const STUB_BYTES: usize = 4;

/// What FRSTOR loads and FNSAVE stores, in the format of 32-bit protected mode.
#[repr(C, align(64))]
#[derive(Clone)]
pub(super) struct Unit {
    control: u32,
    status: u32,
    /// Two bits a register: 3 if it is empty. FRSTOR works the others out from the contents.
    tags: u32,
    /// Of the last instruction. The guest's are kept elsewhere.
    pointers: [u32; 4],
    /// From the top of the stack on.
    registers: [Register; REGISTERS],
}

/// A register as the host accesses it: significand, sign and exponent. In other parts it would have
/// to wait for its own stores.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Register {
    significand: [u8; 8],
    exponent: [u8; 2],
}

impl Register {
    fn new(value: u128) -> Self {
        Self {
            significand: (value as u64).to_le_bytes(),
            exponent: ((value >> 64) as u16).to_le_bytes(),
        }
    }

    fn value(self) -> u128 {
        let exponent = u16::from_le_bytes(self.exponent);
        u128::from(exponent) << 64 | u128::from(u64::from_le_bytes(self.significand))
    }
}

/// A memory operand.
#[repr(C, align(16))]
#[derive(Clone, Copy, Default)]
pub(super) struct Operand(pub(super) u128);

impl Unit {
    /// The unit as the guest has it. No unmasked exception may be waiting: the host would report it
    /// to this process.
    pub(super) fn new(state: &FpuState) -> Self {
        debug_assert!(!super::exception_waits(state));
        let mut unit = Self {
            control: state.fcw.into(),
            status: state.fsw.into(),
            tags: full_tags(state.ftw),
            pointers: [0; 4],
            registers: [Register::default(); _],
        };
        for (i, register) in state.st.iter().enumerate() {
            unit.registers[i] = Register::new(*register);
        }
        unit
    }

    /// Puts what the unit holds into the guest's state.
    pub(super) fn store(&self, state: &mut FpuState) {
        state.fcw = self.control as u16;
        state.fsw = self.status as u16;
        state.ftw = abridged_tags(self.tags);
        for (i, register) in state.st.iter_mut().enumerate() {
            *register = self.registers[i].value();
        }
    }

    /// The control word.
    pub(super) fn control(&self) -> u16 {
        self.control as u16
    }

    /// The status word.
    pub(super) fn status(&self) -> u16 {
        self.status as u16
    }

    /// Executes an instruction.
    pub(super) fn execute(&mut self, instruction: Instruction, operand: &mut Operand) {
        let mut control = 0u16;
        // SAFETY: what is called is one x87 instruction and RET. It accesses at most ten bytes at
        // RDI, within `operand`. FRSTOR finds no exception waiting in what it loads, FNSAVE stores
        // 108 bytes, less than `self` has, and leaves the unit empty; the host's control word is
        // what it was.
        unsafe {
            asm!(
                "fnstcw word ptr [{control}]",
                "frstor [{unit}]",
                "call {stub}",
                "fnsave [{unit}]",
                "fldcw word ptr [{control}]",
                control = in(reg) &raw mut control,
                unit = in(reg) &raw mut *self,
                stub = in(reg) instruction.stub(),
                in("rdi") &raw mut *operand,
                out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
            );
        }
    }

    /// Executes an instruction that reads or writes the arithmetic flags of RFLAGS, without operand
    /// in memory, and gives the flags back.
    pub(super) fn execute_with_flags(&mut self, instruction: Instruction, arithmetic: u64) -> u64 {
        let mut control = 0u16;
        let mut flags = arithmetic;
        // SAFETY: as for `execute`; the stack pointer is as before afterwards, and only arithmetic
        // flags are changed.
        unsafe {
            asm!(
                "fnstcw word ptr [{control}]",
                "frstor [{unit}]",
                "push {flags}",
                "popfq",
                "call {stub}",
                "pushfq",
                "pop {flags}",
                "fnsave [{unit}]",
                "fldcw word ptr [{control}]",
                control = in(reg) &raw mut control,
                unit = in(reg) &raw mut *self,
                stub = in(reg) instruction.stub(),
                flags = inout(reg) flags,
                out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
            );
        }
        flags
    }
}

/// An x87 instruction: the low three bits of its opcode, which are D8 to DF, and its ModRM byte, as
/// the last-opcode register has them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Instruction(pub(super) u16);

impl Instruction {
    /// Where the host has the same instruction, with its memory operand at RDI.
    fn stub(self) -> usize {
        let opcode = usize::from(self.0 >> 8 & 7);
        let modrm = usize::from(self.0 & 0xff);
        let (table, index) = if modrm >= 0xc0 {
            (on_registers as *const () as usize, opcode << 6 | modrm & 63)
        } else {
            (
                on_memory as *const () as usize,
                opcode << 3 | modrm >> 3 & 7,
            )
        };
        table + index * STUB_BYTES
    }
}

/// One stub for each of D8 C0 to DF FF.
#[unsafe(naked)]
extern "C" fn on_registers() {
    naked_asm!(
        ".irp opcode, 0xd8, 0xd9, 0xda, 0xdb, 0xdc, 0xdd, 0xde, 0xdf",
        ".set .Ltwofold_modrm, 0xc0",
        ".rept 64",
        ".byte \\opcode, .Ltwofold_modrm",
        "ret",
        "int3",
        ".set .Ltwofold_modrm, .Ltwofold_modrm + 1",
        ".endr",
        ".endr",
    )
}

/// One stub for each of D8 /0 to DF /7 at RDI.
#[unsafe(naked)]
extern "C" fn on_memory() {
    naked_asm!(
        ".irp opcode, 0xd8, 0xd9, 0xda, 0xdb, 0xdc, 0xdd, 0xde, 0xdf",
        ".irp modrm, 0x07, 0x0f, 0x17, 0x1f, 0x27, 0x2f, 0x37, 0x3f",
        ".byte \\opcode, \\modrm",
        "ret",
        "int3",
        ".endr",
        ".endr",
    )
}

/// Two bits a register: 3 if its bit is clear, 0 if it is set.
pub(super) fn full_tags(abridged: u8) -> u32 {
    // Each step moves the upper halves of all groups of bits away from the lower ones.
    let mut empty = u32::from(!abridged);
    empty = (empty | empty << 4) & 0x0f0f;
    empty = (empty | empty << 2) & 0x3333;
    empty = (empty | empty << 1) & 0x5555;
    empty * 3
}

/// One bit a register: clear if its tag is 3.
pub(super) fn abridged_tags(tags: u32) -> u8 {
    let mut full = !(tags & tags >> 1) & 0x5555;
    full = (full | full >> 1) & 0x3333;
    full = (full | full >> 2) & 0x0f0f;
    (full | full >> 4) as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::x87::status;

    /// The host's control and status word.
    fn words() -> (u16, u16) {
        let (mut control, mut status) = (0u16, 0u16);
        // SAFETY: stores the two words.
        unsafe {
            asm!(
                "fnstcw word ptr [{0}]",
                "fnstsw word ptr [{1}]",
                in(reg) &raw mut control,
                in(reg) &raw mut status,
                options(nostack),
            );
        }
        (control, status)
    }

    /// Reports whatever waits in the host's unit to this process.
    fn wait() {
        // SAFETY: changes nothing.
        unsafe { asm!("fwait", options(nostack, preserves_flags)) };
    }

    #[test]
    fn an_exception_of_the_guest_stays_out_of_the_hosts_unit() {
        let before = words();
        // Every exception unmasked, rounding down.
        let mut unit = Unit::new(&FpuState {
            fcw: 0x740,
            ..FpuState::default()
        });
        // fadd st0,st0 on an empty register
        unit.execute(Instruction(0x0c0), &mut Operand::default());
        assert_eq!(unit.status() & status::SUMMARY, status::SUMMARY);
        assert_eq!(unit.control(), 0x740);
        wait();
        assert_eq!(words(), (before.0, 0));
    }

    #[test]
    fn what_goes_in_comes_out() {
        let mut state = FpuState {
            fcw: 0x77f,
            fsw: 0x6a3f,
            ftw: 0x5a,
            ..FpuState::default()
        };
        for (i, register) in (1..).zip(&mut state.st) {
            *register = (u128::MAX >> 48) / (i * 1_000_003);
        }
        let mut unit = Unit::new(&state);
        // fnop
        unit.execute(Instruction(0x1d0), &mut Operand::default());
        let mut found = FpuState::default();
        unit.store(&mut found);
        assert_eq!(found, state);
    }

    #[test]
    fn tags_have_two_forms() {
        for abridged in 0..=255u8 {
            let tags = (0..8)
                .filter(|register| abridged >> register & 1 == 0)
                .fold(0, |tags, register| tags | 3 << (2 * register));
            assert_eq!(full_tags(abridged), tags);
            assert_eq!(abridged_tags(tags), abridged);
            assert_eq!(abridged_tags(tags & 0xaaaa), 0xff, "only 3 is empty");
            assert_eq!(abridged_tags(tags | 0xffff_0000), abridged);
        }
    }

    #[test]
    fn each_stub_is_the_instruction_that_is_asked_for() {
        for opcode in 0..0x800u16 {
            let place = Instruction(opcode).stub() as *const u8;
            // SAFETY: the stubs are four bytes of the program's text each.
            let stub = unsafe { place.cast::<[u8; STUB_BYTES]>().read_unaligned() };
            let mut modrm = opcode as u8;
            if modrm < 0xc0 {
                modrm = modrm & 0x38 | 7;
            }
            assert_eq!(stub, [0xd8 | (opcode >> 8) as u8, modrm, 0xc3, 0xcc]);
        }
    }
}
