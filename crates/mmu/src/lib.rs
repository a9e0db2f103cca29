//! Guest memory slots and the second-stage ("TDP") MMU of a hypervisor.
//!
//! A [`Mmu`] belongs to one VM. The hypervisor supplies a [`Host`]: pages for tables, pages for
//! the guest, TLB flushes. It describes guest memory with [`Mmu::set_region`], gives the root of
//! [`Mmu::load_root`] to its virtual processors, hands their faults to [`Mmu::fault`], and
//! announces changes of its own memory with [`Mmu::host_change`].
//!
//! The VM may be a TD, whose private memory is mapped by tables that the TDX module owns: then the
//! MMU keeps a mirror of them ([`mirror`]) and asks their owner for every change
//! ([`ExternalTables`]).
//!
//! The worked example is `hardware/x86` in this project's repository: a bare-metal hypervisor for
//! EPT and nested paging (`docs/hardware.md`).
#![cfg_attr(not(any(loom, shuttle)), no_std)]

extern crate alloc;

pub mod dirty_log;
pub mod dirty_ring;
pub mod external;
pub mod fault;
pub mod filter;
pub mod format;
pub mod guest_memory;
pub mod host;
pub mod host_change;
pub mod invariants;
pub mod mirror;
pub mod mmio;
pub mod mmu;
pub mod nx_huge_pages;
pub mod prefault;
pub mod reader;
pub mod region;
pub mod root;
pub mod slots;
pub mod spte;
pub mod stats;
pub mod sub_pages;

mod age;
mod attributes;
mod fast_fault;
mod garbage;
mod gigabytes;
mod invalidation;
mod known_slot;
mod lock;
mod map;
mod mirror_zap;
mod page_size;
mod pml;
mod recover;
mod set_region;
mod split;
mod sync;
mod tables;
mod zap;

pub use dirty_log::{DirtyLogError, ManualProtect};
pub use dirty_ring::{DirtyGfn, DirtyRingError, RingMemory};
pub use external::{ExternalError, ExternalTables, Unknown};
pub use fault::{Fault, FaultError, Outcome};
pub use filter::{Conversion, RangeFilter};
pub use format::{Ept, MmuFormat, Npt};
pub use guest_memory::{AccessKind, AttributeError, GuestMemoryError, PrivateMemory};
pub use host::{Host, HostPage, PopulateError};
pub use host_change::{HostChange, PendingChange};
pub use invariants::{Report, Rule, Violation};
pub use mirror::{MirrorError, TdRoots};
pub use mmio::MmioFault;
pub use mmu::{Config, Mmu, OutOfMemory};
pub use prefault::PrefaultError;
pub use reader::{Reader, ReaderStats};
pub use region::{Region, RegionError, RegionErrorKind, RegionFlags};
pub use root::{Root, RootRole};
pub use slots::SlotInfo;
pub use stats::Stats;
pub use sub_pages::{SUB_PAGE_MAX_PAGES, SubPageError};
pub use twofold_table::{Change, Tracer};
