//! The ring in which KVM notes what a vCPU writes.

// UNSAFETY: maps memory that KVM writes.
#![expect(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd as _;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};
use kvm_bindings::kvm_dirty_gfn;
use kvm_ioctls::VcpuFd;

/// Bits of an entry's flags: KVM has written it, and it may be taken back.
const DIRTY: u32 = 1;
const RESET: u32 = 2;

/// A dirty ring that is mapped for as long as the process lives.
#[derive(Debug)]
pub struct Ring {
    entries: NonNull<kvm_dirty_gfn>,
    next: usize,
}

impl Ring {
    /// Its size, which is enabled before there is a vCPU.
    pub const BYTES: u64 = 1 << 16;
    const ENTRIES: usize = Self::BYTES as usize / size_of::<kvm_dirty_gfn>();
    /// `KVM_DIRTY_LOG_PAGE_OFFSET`, in bytes.
    const OFFSET: libc::off_t = 64 << 12;

    /// The ring of a vCPU.
    pub fn of(vcpu: &VcpuFd) -> Result<Self> {
        // SAFETY: a new mapping of KVM's, which replaces nothing.
        let mapping = unsafe {
            libc::mmap(
                ptr::null_mut(),
                Self::BYTES as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                Self::OFFSET,
            )
        };
        ensure!(
            mapping != libc::MAP_FAILED,
            "cannot map the dirty ring: {}",
            io::Error::last_os_error()
        );
        Ok(Self {
            entries: NonNull::new(mapping.cast()).context("mmap returned address zero")?,
            next: 0,
        })
    }

    /// Takes what is new: slots and the pages in them.
    pub fn harvest(&mut self) -> Vec<(u32, u64)> {
        let mut found = Vec::new();
        loop {
            // SAFETY: the index is below the number of entries.
            let entry = unsafe { self.entries.add(self.next % Self::ENTRIES) }.as_ptr();
            // SAFETY: KVM changes the flags too, and both do it atomically.
            let flags = unsafe { AtomicU32::from_ptr(&raw mut (*entry).flags) };
            if flags.load(Ordering::Acquire) & DIRTY == 0 {
                return found;
            }
            // SAFETY: KVM does not touch an entry that is dirty.
            found.push(unsafe { ((*entry).slot, (*entry).offset) });
            flags.fetch_or(RESET, Ordering::Release);
            self.next += 1;
        }
    }
}
