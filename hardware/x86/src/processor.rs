//! What the two kinds of virtualization have in common.

// UNSAFETY: the ways into a guest are assembler.
#![expect(unsafe_code)]

use core::arch::global_asm;
use twofold_arch::Hpa;
use twofold_mmu::{Fault, MmuFormat};

/// A guest's general registers but RSP, in the order in which the assembler below loads them.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
#[expect(missing_docs, reason = "they are what they are called")]
pub struct Registers {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rbp: u64,
    pub r8_to_r15: [u64; 8],
}

/// Why a guest was left.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exit {
    /// An interrupt for this processor; it is taken as soon as interrupts are allowed.
    Interrupt,
    /// The guest executed CPUID, which is how it asks for something.
    Request,
    /// A second-stage fault.
    Fault(SecondStageFault),
    /// Anything else, with the number of the exit and its qualification or information.
    Other(u64, u64),
}

/// A second-stage fault: what the MMU is told, and what the processor said.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SecondStageFault {
    /// For [`Mmu::fault`](twofold_mmu::Mmu::fault).
    pub fault: Fault,
    /// Whether the processor calls it an EPT misconfiguration.
    pub misconfigured: bool,
    /// The exit qualification or `EXITINFO1`.
    pub raw: u64,
}

/// A virtual processor of one of the two kinds, on the physical processor that made it.
pub trait Virtualization: Sized + 'static {
    /// The second-stage tables that the processor walks.
    type Format: MmuFormat;
    /// For the first line of the output.
    const NAME: &'static str;
    /// Whether the processor has a report of its own for entries that it refuses.
    const MISCONFIGURES: bool;

    /// Turns virtualization on, on the processor that calls. Once for each.
    fn enable();

    /// A virtual processor in 64-bit mode at guest-physical address 0 (see [`guest`](crate::guest)).
    fn new() -> Self;

    /// The second-stage tables to use from the next entry on.
    fn set_root(&mut self, root: Hpa);

    /// The general registers.
    fn registers(&mut self) -> &mut Registers;

    /// Goes over an instruction of `length` bytes instead of executing it.
    fn skip(&mut self, length: u64);

    /// Runs in user mode from now on, or in kernel mode.
    fn set_user(&mut self, user: bool);

    /// Runs the guest until it is left. With `flush`, no translation made before is used. Called
    /// with interrupts forbidden; they are forbidden when it returns.
    fn enter(&mut self, flush: bool) -> Exit;
}

global_asm!(include_str!("enter.s"));
