//! `libtwofold.so`: hands a KVM program over to the software KVM.
//!
//! The library is loaded before libc (`LD_PRELOAD`) and stands in front of the calls that KVM
//! programs make. It looks whether a call is about KVM: a path, a descriptor that
//! [`twofold_kvm::abi`] knows, an address range that backs a memory slot. If so the call goes
//! there; if not it goes to libc, unchanged.
//!
//! | module | calls |
//! |---|---|
//! | `files` | `open`, `fopen`, `access`, `stat` and their variants |
//! | `control` | `ioctl` |
//! | `descriptors` | `close`, `dup`, `fcntl` and their variants |
//! | `transfers` | `read`, `write` and their variants |
//! | `memory` | `mmap`, `munmap`, `madvise`, `ftruncate` and what else changes memory |
//! | `handlers` | `sigaction`, `signal`: handlers wait until `KVM_RUN` has returned (`signals`) |
//! | `faults` | SIGSEGV and SIGBUS: those of guest accesses end in an error, not in a signal |
//! | `cancellation` | `pthread_cancel`, `pthread_setcanceltype`: a thread is not cancelled within `KVM_RUN` |
//! | `inline` | `syscall`, for all of the above |
//!
//! Calls that libc makes within itself, and system calls that a program makes without libc, are
//! not seen.

mod cancellation;
mod control;
mod descriptors;
mod faults;
mod files;
mod handlers;
mod inline;
mod log;
mod memory;
mod paths;
mod process;
mod raw;
mod real;
mod signals;
mod transfers;
