//! The first and only program of a Linux host below the hypervisor: it says that it runs, tries to
//! read the hypervisor's memory, and ends the run.
#![no_std]
#![no_main]

mod linux;
mod story;
