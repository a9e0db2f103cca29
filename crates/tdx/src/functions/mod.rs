//! The functions that a host calls, by subject.

mod build;
mod control;
mod map;
mod resize;
mod unmap;

pub use unmap::Reclaimed;
