//! The hypervisor at EL2.
//!
//! It takes the machine, checks the ownership matrix on its own tables, starts both processors,
//! and drops to the host at EL1, which can reach nothing from then on that its stage 2 does not
//! have. See `hardware/arm64/README.md` for the story that the run tells.
#![no_std]
#![no_main]

mod enter;
mod gic;
mod machine;
mod registers;
mod start;
