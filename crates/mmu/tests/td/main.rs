//! TDs: a mirror beside the Secure EPT of the real TDX module, and the shared half behind the shared
//! bit. SPEC chapter 7, rows 34 to 54 as far as they are about tables.

#![expect(clippy::unwrap_used, reason = "a test may fail")]

#[path = "../common/mod.rs"]
mod common;
mod faults;
mod mmio;
mod model;
mod zap;
