//! One table engine for every second-stage format.
//!
//! A [`Format`] says what entries look like; a [`Storage`] says how they are reached; the engine
//! does the rest: it walks ([`Table`]), visits ranges ([`Cursor`]), builds tables in private and
//! publishes them with one exchange, changes entries by compare-exchange and keeps account of what
//! a change still owes ([`Debt`]): a TLB flush, and tables to give back once nobody can see them.
//! Readers without a lock are waited for through [`section`].
//!
//! The engine allocates nothing, takes no lock and knows no policy.
#![cfg_attr(not(any(test, loom, shuttle)), no_std)]

pub mod break_before_make;
pub mod build;
pub mod change;
pub mod cursor;
pub mod exclusive;
pub mod format;
pub mod retire;
pub mod section;
pub mod split;
pub mod sppt;
pub mod stage2;
pub mod storage;
pub mod sync;
pub mod trace;
pub mod walk;
pub mod x86;

#[cfg(all(test, not(loom)))]
mod engine_tests;
#[cfg(all(test, loom))]
mod interleaving_world;
#[cfg(all(test, loom))]
mod interleavings;
#[cfg(all(test, loom))]
mod interleavings_of_breaks;
#[cfg(all(test, loom))]
mod interleavings_of_sizes;
#[cfg(all(test, not(loom)))]
mod laws;
#[cfg(all(test, not(loom)))]
mod size_tests;
#[cfg(all(test, not(loom)))]
mod stale_translations;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod toy;

pub use break_before_make::{BreakRule, Broken, Gap};
pub use build::{BuildError, PageSource};
pub use change::{Debt, Frozen, Raced, Settled};
pub use cursor::Cursor;
pub use exclusive::Exclusive;
pub use format::{Entry, Format, Height, Replacement};
pub use retire::Leaves;
pub use section::{Quiesced, ReaderWord, Section, wait_for_readers};
pub use storage::{At, PageAccess, RawPages, Storage, TablePage};
pub use trace::{Change, Tracer};
pub use walk::{Place, RootTable, Seen, Table};
