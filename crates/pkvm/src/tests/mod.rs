//! The whole hypervisor over a simulated machine.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

#[cfg(not(loom))]
mod defects;
#[cfg(not(loom))]
mod early;
#[cfg(not(loom))]
mod flush;
#[cfg(not(loom))]
mod host;
#[cfg(loom)]
mod interleavings;
#[cfg(not(loom))]
mod interrupts;
#[cfg(not(loom))]
mod life;
#[cfg(not(loom))]
mod matrix;
#[cfg(not(loom))]
mod memory;
#[cfg(not(loom))]
mod pools;
#[cfg(not(loom))]
mod random;
#[cfg(not(loom))]
mod requests;
mod setting;
#[cfg(not(loom))]
mod tracing;
