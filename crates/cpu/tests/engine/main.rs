//! Small guests run through the public interface.

mod code;
mod debug;
mod events;
mod exits;
mod features;
mod guest;
mod modes;
mod smp;
mod sub_pages;
#[path = "../support/mod.rs"]
mod support;
mod trust_domain;
mod virtualization_exceptions;
mod x87;
mod xsave;
