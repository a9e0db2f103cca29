//! The host at EL1: an operating system in the small, which would like to see what its guests do.
#![no_std]
#![no_main]

mod before;
mod beside;
mod calls;
mod clock;
mod devices;
mod events;
mod figures;
mod gic;
mod guests;
mod interrupts;
mod nonsense;
mod probe;
mod second;
mod story;
mod vm;
