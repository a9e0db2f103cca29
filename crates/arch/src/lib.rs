//! Typed addresses and levels, and the hardware's bits of second-stage translation.
//!
//! This crate knows what a processor reads from memory when it translates a guest-physical
//! address, and what it reports when it cannot. It knows no software bit: how a hypervisor uses
//! the ignored bits of an entry is decided by `twofold-mmu`, so that the processor model in
//! `twofold-cpu` and the MMU that writes the tables share no such bit and cannot share a mistake
//! about one.
#![no_std]

pub mod addr;
pub mod ept;
pub mod eptp;
pub mod level;
pub mod npt;
pub mod pferr;
pub mod qualification;
pub mod sppt;
pub mod stage2;

pub use addr::{Gfn, Gpa, Hfn, Hpa, PAGE_SHIFT, PAGE_SIZE};
pub use level::Level;
pub use pferr::Pferr;
