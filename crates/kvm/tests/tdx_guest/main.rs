//! What a trust domain's guest does and is told, with real guest code (SPEC rows 39, 40, 52, 53).
// UNSAFETY: reads the guest's code from where the assembler has put it.
#![expect(unsafe_code)]
#![expect(clippy::unwrap_used)] // Helpers outside #[test] functions.

mod accept;
#[path = "../common/mod.rs"]
mod common;
mod convert;
mod devices;
mod exceptions;
mod functions;
mod guest;
mod stub;
