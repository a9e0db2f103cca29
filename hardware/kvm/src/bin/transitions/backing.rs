//! Host memory that can be changed below a slot.

// UNSAFETY: maps memory and gives it to KVM; the guest changes it while Rust looks on, so it is
// reached through raw pointers only, never through a reference.
#![expect(unsafe_code)]

use std::io;
use std::ptr::{self, NonNull};

use anyhow::{Context, Result, ensure};

const HUGE: usize = 2 << 20;

/// Memory that begins at a multiple of 2 MiB and is unmapped at the end.
#[derive(Debug)]
pub struct Backing {
    mapping: NonNull<u8>,
    mapped: usize,
    start: NonNull<u8>,
    size: usize,
}

/// What is done to some pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Change {
    /// They go back to the system and are zeros from now on.
    Discard,
    /// They may be read only.
    ReadOnly,
    /// They may be read and written again.
    Writable,
    /// There is nothing from now on.
    Unmap,
}

impl Backing {
    /// Maps `size` bytes, in huge pages or not.
    pub fn new(size: usize, huge: bool) -> Result<Self> {
        let mapped = size + HUGE;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice replaces nothing.
        let mapping = unsafe {
            libc::mmap(
                ptr::null_mut(),
                mapped,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        ensure!(
            mapping != libc::MAP_FAILED,
            "cannot map memory: {}",
            io::Error::last_os_error()
        );
        let mapping = NonNull::new(mapping.cast::<u8>()).context("mmap returned address zero")?;
        let offset = mapping.as_ptr().align_offset(HUGE);
        // SAFETY: within the mapping, which has room for the alignment.
        let start = unsafe { mapping.add(offset) };
        let backing = Self {
            mapping,
            mapped,
            start,
            size,
        };
        let advice = if huge {
            libc::MADV_HUGEPAGE
        } else {
            libc::MADV_NOHUGEPAGE
        };
        backing.advise(0, size, advice)?;
        Ok(backing)
    }

    /// Where it begins.
    pub fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    /// Its length in bytes.
    pub const fn size(&self) -> u64 {
        self.size as u64
    }

    /// Writes a byte, and so makes the page present.
    pub fn write(&self, offset: usize, bytes: &[u8]) -> Result<()> {
        ensure!(
            offset
                .checked_add(bytes.len())
                .is_some_and(|end| end <= self.size),
            "{offset:#x} is not in the memory"
        );
        // SAFETY: within the mapping, as was just checked; no reference into it exists.
        unsafe {
            ptr::copy_nonoverlapping(bytes.as_ptr(), self.start.as_ptr().add(offset), bytes.len())
        };
        Ok(())
    }

    /// Changes `size` bytes at `offset`.
    pub fn change(&self, offset: usize, size: usize, change: Change) -> Result<()> {
        let at = self.pointer(offset, size)?;
        // SAFETY: the memory is this value's, and nothing refers into it.
        let result = unsafe {
            match change {
                Change::Discard => libc::madvise(at, size, libc::MADV_DONTNEED),
                Change::ReadOnly => libc::mprotect(at, size, libc::PROT_READ),
                Change::Writable => libc::mprotect(at, size, libc::PROT_READ | libc::PROT_WRITE),
                Change::Unmap => libc::munmap(at, size),
            }
        };
        ensure!(
            result == 0,
            "{change:?} of {size:#x} bytes: {}",
            io::Error::last_os_error()
        );
        Ok(())
    }

    fn advise(&self, offset: usize, size: usize, advice: i32) -> Result<()> {
        let at = self.pointer(offset, size)?;
        // SAFETY: such advice changes no content.
        let result = unsafe { libc::madvise(at, size, advice) };
        ensure!(result == 0, "madvise: {}", io::Error::last_os_error());
        Ok(())
    }

    fn pointer(&self, offset: usize, size: usize) -> Result<*mut libc::c_void> {
        ensure!(
            offset.checked_add(size).is_some_and(|end| end <= self.size),
            "{size:#x} bytes at {offset:#x} are not in the memory"
        );
        // SAFETY: within the mapping, as was just checked.
        Ok(unsafe { self.start.as_ptr().add(offset) }.cast())
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        // SAFETY: the mapping belongs to this value, and nothing refers into it any more.
        unsafe { libc::munmap(self.mapping.as_ptr().cast(), self.mapped) };
    }
}
