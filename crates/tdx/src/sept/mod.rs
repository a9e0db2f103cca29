//! The Secure EPT: its entries, and finding and locking them.

mod entry;
mod format;
mod tree;

pub use entry::{SeptEntry, State};
pub(crate) use tree::{Locked, Sept, SeptPages, Side, Walked};
