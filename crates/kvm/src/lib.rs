//! A software KVM: KVM's objects as a Rust API, and the ioctl table over it.
//!
//! [`Kvm`] is what `/dev/kvm` answers, [`Vm`] a virtual machine, [`Vcpu`] a virtual processor,
//! [`StatsFile`] their statistics. Each method is an ioctl and returns the kernel's own error
//! numbers. The guest's machine code is executed by `twofold-cpu`, and its memory is translated by
//! the second-stage tables that `twofold-mmu` writes.
//!
//! [`abi`] is the same as descriptors, ioctl numbers and pointers, for the preloaded library.
//!
//! Guest memory is the program's own memory: host-physical addresses in the tables are the
//! process's virtual addresses.

pub mod abi;
mod bus;
pub mod capability;
mod clock;
pub mod cpuid;
mod descriptor;
mod dirty_log;
mod eventfd;
mod fd_table;
mod fork;
mod guest_memory;
mod host;
mod host_change;
mod huge_page;
pub mod ioctl;
mod irqchip;
mod kvm;
mod mappings;
mod memory_key;
mod module_file;
mod msr_filter;
mod nx_recovery;
mod object;
mod page_scan;
mod pagemap;
mod parameter;
mod presence;
mod private_memory;
mod second_stage;
mod service_thread;
mod shared;
mod stats_file;
mod sub_pages;
mod summary;
mod sync;
mod table_pool;
mod td;
mod trace;
mod tsc;
mod usercopy;
mod vanishing;
mod vcpu;
mod vm;
mod vm_type;

pub use guest_memory::GuestMemory;
pub use kvm::Kvm;
pub use module_file::paths as module_file_paths;
pub use rustix::io::Errno;
pub use second_stage::Kind;
pub use stats_file::StatsFile;
pub use summary::{Summary, summary};
pub use vcpu::{RunSignals, VCPU_MMAP_SIZE, Vcpu, register_run_signals};
pub use vm::Vm;
