//! Memory that the program and this library both have mapped.
//!
//! The `kvm_run` page, the coalesced ring and the statistics are such memory. The program may
//! write to it at any time from any thread, so it is never borrowed: it is read and written by
//! value, one volatile copy at a time.
// UNSAFETY: raw access to a mapping whose length is checked here.
#![expect(unsafe_code)]

use crate::usercopy::Plain;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::{MapFlags, MremapFlags, ProtFlags};
use std::ffi::c_void;
use std::mem::size_of;
use std::ptr::{self, NonNull};
use twofold_mmu::DirtyGfn;

/// A shared mapping of a fixed number of bytes; dropping it unmaps it.
#[derive(Debug)]
pub(crate) struct SharedMemory {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: the memory belongs to nobody in particular, and every access to it is a volatile copy.
unsafe impl Send for SharedMemory {}
// SAFETY: as above.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// A memfd of `length` bytes that nobody can resize, and our own mapping of it.
    pub(crate) fn with_file(name: &str, length: usize) -> Result<(Self, OwnedFd), Errno> {
        let file = memfd(name, length)?;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe {
            rustix::mm::mmap(
                ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                file.as_fd(),
                0,
            )
        }?;
        Ok((Self::from_mapping(start, length)?, file))
    }

    /// Shared memory that no descriptor names.
    pub(crate) fn anonymous(length: usize) -> Result<Self, Errno> {
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe {
            rustix::mm::mmap_anonymous(
                ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
            )
        }?;
        Self::from_mapping(start, length)
    }

    fn from_mapping(start: *mut c_void, length: usize) -> Result<Self, Errno> {
        Ok(Self {
            start: NonNull::new(start.cast()).ok_or(Errno::NOMEM)?,
            length,
        })
    }

    /// Maps the same memory at `address` as well, in place of what the program has mapped there.
    ///
    /// The program asked for `self.length` bytes at `address` to show this memory, in an `mmap`
    /// that the kernel could only fill with other pages.
    pub(crate) fn map_over(&self, address: usize, protection: ProtFlags) -> Result<(), Errno> {
        let target: *mut c_void = ptr::without_provenance_mut(address);
        // SAFETY: an old length of zero duplicates a shared mapping. The target is a page of the
        // program's own mapping of one of our descriptors, which holds nothing but this memory.
        unsafe {
            rustix::mm::mremap_fixed(
                self.start.as_ptr().cast(),
                0,
                self.length,
                MremapFlags::MAYMOVE,
                target,
            )?;
            if protection != ProtFlags::READ | ProtFlags::WRITE {
                let flags = rustix::mm::MprotectFlags::from_bits_truncate(protection.bits());
                rustix::mm::mprotect(target, self.length, flags)?;
            }
        }
        Ok(())
    }

    /// `count` entries of a dirty ring at `offset` bytes.
    ///
    /// # Panics
    /// If they do not lie in the mapping or are misaligned: the file was made for them.
    #[inline]
    pub(crate) fn dirty_entries(&self, offset: usize, count: usize) -> &[DirtyGfn] {
        let bytes = count.checked_mul(size_of::<DirtyGfn>());
        let end = bytes.and_then(|bytes| offset.checked_add(bytes));
        assert!(
            end.is_some_and(|end| end <= self.length)
                && offset.is_multiple_of(align_of::<DirtyGfn>()),
            "a dirty ring of {count} entries does not fit"
        );
        // SAFETY: within the mapping, by the assertion. An entry consists of atomics, of which any
        // bytes are a value and which others may change.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().add(offset).cast(), count) }
    }

    fn at<T>(&self, offset: usize) -> *mut T {
        assert!(
            offset
                .checked_add(size_of::<T>())
                .is_some_and(|end| end <= self.length)
                && offset.is_multiple_of(align_of::<T>()),
            "offset {offset:#x} does not fit"
        );
        // SAFETY: within the mapping, by the assertion.
        unsafe { self.start.as_ptr().add(offset).cast() }
    }

    /// A copy of the value at `offset` bytes.
    ///
    /// # Panics
    /// If the value does not lie in the mapping or is misaligned: offsets are the API's constants.
    #[inline]
    pub(crate) fn read<T: Plain>(&self, offset: usize) -> T {
        // SAFETY: `at` checked length and alignment; any bytes are a value of a plain type.
        unsafe { self.at::<T>(offset).read_volatile() }
    }

    /// Replaces the value at `offset` bytes. Panics as [`Self::read`] does.
    #[inline]
    pub(crate) fn write<T: Plain>(&self, offset: usize, value: T) {
        // SAFETY: `at` checked length and alignment.
        unsafe { self.at::<T>(offset).write_volatile(value) }
    }

    /// Copies bytes out. Panics as [`Self::read`] does.
    #[inline]
    pub(crate) fn read_bytes(&self, offset: usize, to: &mut [u8]) {
        assert!(
            offset
                .checked_add(to.len())
                .is_some_and(|end| end <= self.length)
        );
        for (index, byte) in to.iter_mut().enumerate() {
            // SAFETY: within the mapping, by the assertion.
            *byte = unsafe { self.start.as_ptr().add(offset + index).read_volatile() };
        }
    }

    /// Copies bytes in. Panics as [`Self::read`] does.
    #[inline]
    pub(crate) fn write_bytes(&self, offset: usize, from: &[u8]) {
        assert!(
            offset
                .checked_add(from.len())
                .is_some_and(|end| end <= self.length)
        );
        for (index, byte) in from.iter().enumerate() {
            // SAFETY: within the mapping, by the assertion.
            unsafe {
                self.start
                    .as_ptr()
                    .add(offset + index)
                    .write_volatile(*byte)
            };
        }
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nothing refers to any more.
        let result = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.length) };
        if let Err(error) = result {
            tracing::error!(%error, "unmapping shared memory failed");
        }
    }
}

/// An empty memfd or one of `length` bytes, closed on exec, which cannot be resized.
pub(crate) fn memfd(name: &str, length: usize) -> Result<OwnedFd, Errno> {
    let file = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    if length != 0 {
        rustix::fs::ftruncate(&file, length as u64)?;
    }
    rustix::fs::fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
    Ok(file)
}

/// The same file through a descriptor that may only read, where `/proc` allows it.
pub(crate) fn read_only(file: OwnedFd) -> OwnedFd {
    fn reopen(file: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
        use rustix::fd::AsRawFd;
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        rustix::fs::open(
            path,
            rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC,
            rustix::fs::Mode::empty(),
        )
    }
    reopen(file.as_fd()).unwrap_or(file)
}
