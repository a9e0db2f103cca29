//! What both programs of the image need of the machine: `qemu-system-aarch64 -M virt`.
#![no_std]

pub mod memory;
pub mod uart;
