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
//! Where things are: bytes become operations in `decode` (`form` looks at an instruction, `op` is
//! what it becomes, `fuse` joins two) and are kept by `blocks`; `execute` runs them for `cpu`, the
//! hypervisor's side. What an instruction computes is in `alu`, `shifts`, `muldiv`, `decimal`, `bits` and
//! `simd` as functions over plain values; `integer`, `stack`, `control`, `strings` and `io` fetch
//! their operands and store their results. `segments`, `far` and `events` know descriptors, far
//! transfers, exceptions and interrupts; `gates` and `virtual8086` two chapters of them; `breakpoints` the debug registers; `control_registers`, `msr`, `tables`, `syscall`,
//! `system_flags`, `protection_keys`, `xsave`, `random`, `system`, `td` and `cpuid` are the
//! system instructions, `x87` the unit of that name. `memory` translates and
//! accesses.

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
