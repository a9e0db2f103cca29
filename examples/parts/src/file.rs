//! A guest memory file, as this program can use it: not by reading it.

// UNSAFETY: system calls on a descriptor of this program.
#![expect(unsafe_code)]

use std::io;
use std::os::fd::RawFd;
use std::ptr;

use anyhow::{Context, Result};

/// Punches a hole into a guest memory file: its pages go back to the system.
///
/// # Errors
/// The file is none that can have holes.
pub fn punch_hole(file: RawFd, offset: u64, length: u64) -> Result<()> {
    let mode = libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE;
    // SAFETY: takes no pointer.
    if unsafe { libc::fallocate(file, mode, offset as i64, length as i64) } != 0 {
        return Err(io::Error::last_os_error()).context("cannot punch a hole");
    }
    Ok(())
}

/// Tries to map a guest memory file, as someone would who wants to look into it, and says why that
/// does not work. `None`: it does.
pub fn cannot_map(file: RawFd) -> Option<io::Error> {
    // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
    let mapping = unsafe {
        libc::mmap(
            ptr::null_mut(),
            4096,
            libc::PROT_READ,
            libc::MAP_SHARED,
            file,
            0,
        )
    };
    (mapping == libc::MAP_FAILED).then(io::Error::last_os_error)
}
