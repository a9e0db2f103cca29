//! The host at EL1: an operating system in the small, which would like to see what its guests do.
#![no_std]
#![no_main]

mod calls;
mod probe;
mod second;
mod story;
