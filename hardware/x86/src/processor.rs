//! What the two kinds of virtualization have in common.

// UNSAFETY: the ways into a guest are assembler.
#![expect(unsafe_code)]

use bitflags::bitflags;
use core::arch::global_asm;
use twofold_arch::sppt::SppQualification;
use twofold_arch::{Gpa, Hpa};
use twofold_mmu::{Fault, MmuFormat};
use twofold_walks::Kind;

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
    /// The processor asked the sub-page permission table about a write and found none, or one that
    /// it refuses.
    SubPages(SubPageEvent),
    /// The log of written frames is full; nothing was written for lack of a place in it.
    LogFull,
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

/// Why the sub-page permission table gave no answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SubPageEvent {
    /// The guest-physical address of the write.
    pub gpa: Gpa,
    /// The exit qualification.
    pub qualification: SppQualification,
}

/// What a processor reports about an EPT violation that it gives to the guest: the information page
/// (SDM volume 3C, "Virtualization-Exception Information").
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VirtualizationException {
    /// The exit that would have happened: 48.
    pub reason: u32,
    /// What its qualification would have been.
    pub qualification: u64,
    /// The linear address.
    pub linear: u64,
    /// The guest-physical address.
    pub gpa: Gpa,
}

bitflags! {
    /// What not every processor has, and not every scenario wants.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Features: u32 {
        /// The processor sets accessed and dirty bits in second-stage entries. Always so with nested
        /// paging.
        const ACCESSED_DIRTY = 1 << 0;
        /// Page-modification logging.
        const WRITE_LOG = 1 << 1;
        /// EPT violations may become exceptions of the guest, #VE.
        const EXCEPTIONS = 1 << 2;
        /// Writes to pieces of 128 bytes may be permitted where a page forbids them.
        const SUB_PAGES = 1 << 3;
    }
}

/// A virtual processor of one of the two kinds, on the physical processor that made it.
pub trait Virtualization: Sized + 'static {
    /// The second-stage tables that the processor walks.
    type Format: MmuFormat;
    /// For the first line of the output.
    const NAME: &'static str;
    /// Whether the processor has a report of its own for entries that it refuses.
    const MISCONFIGURES: bool;
    /// The tables that [`walks`](crate::walks) has it walk.
    const WALKS: &'static [Kind];

    /// Turns virtualization on, on the processor that calls. Once for each.
    fn enable();

    /// What this processor could do of this.
    fn available() -> Features;

    /// A virtual processor in 64-bit mode at guest-physical address 0 (see [`guest`](crate::guest)).
    fn new(features: Features) -> Self;

    /// The second-stage tables to use from the next entry on.
    fn set_root(&mut self, root: Hpa);

    /// The sub-page permission table to use from the next entry on; with [`Features::SUB_PAGES`]
    /// only.
    fn set_sub_pages(&mut self, table: Hpa);

    /// The general registers.
    fn registers(&mut self) -> &mut Registers;

    /// Goes over an instruction of `length` bytes instead of executing it.
    fn skip(&mut self, length: u64);

    /// Goes back to where a new processor begins, after a fault that nobody resolves.
    fn restart(&mut self);

    /// Runs in user mode from now on, or in kernel mode.
    fn set_user(&mut self, user: bool);

    /// The frames that the processor has logged as written since this was called last, to be asked
    /// after each exit. Empty without [`Features::WRITE_LOG`].
    fn take_write_log(&mut self) -> impl Iterator<Item = Gpa>;

    /// What the processor has written about a #VE, or `None` if there was none since this was asked
    /// last. The guest can get another afterwards.
    fn take_exception(&mut self) -> Option<VirtualizationException>;

    /// Runs the guest until it is left. With `flush`, no translation made before is used. Called
    /// with interrupts forbidden; they are forbidden when it returns.
    fn enter(&mut self, flush: bool) -> Exit;
}

global_asm!(include_str!("enter.s"));
