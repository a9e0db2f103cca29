//! A precise x86-64 processor in software, with nested paging.
//!
//! A [`Cpu`] executes a guest's machine code until something needs the hypervisor ([`Exit`]). It
//! translates the guest's addresses as hardware does: first by the guest's own page tables, each
//! step of which is itself a guest-physical access, then by the second-stage tables (EPT or NPT)
//! that the hypervisor wrote. It reads those tables' architectural bits and knows no other.
//!
//! Every exit is precise: the state is as before the instruction or as after it. An instruction
//! that the processor does not execute ends in [`Exit::Unknown`], never in a wrong result.
//!
//! The processors of one virtual machine share a [`Machine`]; other threads reach a running
//! processor only through its [`Line`].
//!
//! # Where things are
//!
//! - *Decoding*: `decode` makes operations of bytes (`form` looks at an instruction, `op` is what it
//!   becomes, `fuse` joins two, `features` says which instructions there are); `blocks` keeps them.
//! - *Executing*: `execute` runs blocks and settles what comes between them.
//! - *What instructions compute*, as functions over plain values: `alu`, `shifts`, `muldiv`,
//!   `decimal`, `bits`, `flags`, `int`; `simd` for vectors and MMX, `x87` for that unit.
//! - *What they do it to*: `integer`, `stack`, `control`, `strings` and `io` fetch operands and store
//!   results.
//! - *Modes*: `mode`; `reset` is where a processor begins.
//! - *Segments and far transfers*: `segments`, `tables`, `far`, `gates`, `virtual8086`, `syscall`.
//! - *Events*: `events` delivers exceptions and interrupts; `breakpoints` has the debug registers, `trap`
//!   the ways out of an instruction.
//! - *System instructions*: `control_registers`, `msr`, `system_flags`, `protection_keys`, `xsave`,
//!   `random`, `time`, `cpuid`, `td`, and `system` for those that are few of a kind.
//! - *Memory access*: `memory` translates (`stage1` by the guest's tables, `stage2` by the
//!   hypervisor's, `tlb` keeps both), accesses (`data`, `span`, `mmio`), and notices code that changes
//!   (`fetch`, `code`).
//! - *The hypervisor's side*: `cpu` and `state`; `machine` and `line` for several processors, `barrier`
//!   for their threads. `core_state` is all that an instruction can touch.

mod alu;
mod barrier;
mod bits;
mod blocks;
mod breakpoints;
mod control;
mod control_registers;
mod core_state;
mod cpu;
pub mod cpuid;
mod decimal;
mod decode;
mod events;
mod execute;
mod far;
mod features;
mod flags;
mod form;
mod fuse;
mod gates;
mod int;
mod integer;
mod io;
mod line;
mod machine;
mod memory;
mod mode;
mod msr;
mod muldiv;
mod op;
mod protection_keys;
mod random;
mod reset;
mod segments;
mod shifts;
mod simd;
mod stack;
pub mod state;
mod strings;
mod syscall;
mod system;
mod system_flags;
mod tables;
mod td;
mod time;
mod trap;
mod virtual8086;
mod x87;
pub mod xsave;

pub use barrier::{heavy_barrier, light_barrier};
pub use cpu::Cpu;
pub use decode::{Support, support};
pub use line::Line;
pub use machine::{Machine, MachineConfig, SecondStageKind};
pub use memory::access::fixup;
pub use memory::process;
pub use memory::{InvalidSppt, Pml, SecondStage, Translation, VeBusy, VeControl, VeInfo, reason};
pub use state::{
    Counters, CpuidEntry, DebugControl, DebugRegisters, Events, FpuState, Msrs, Registers, Segment,
    SystemRegisters, TableRegister,
};
pub use trap::{Exception, Exit, SecondStageFault, UnknownInstruction, vector};
