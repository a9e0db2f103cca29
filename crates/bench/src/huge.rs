//! Memory in huge pages of the host where it gives them: a hypervisor reaches its tables through
//! mappings of at least that size, and with small pages the benchmark would measure the misses of
//! the host's own page tables.
//!
//! UNSAFETY: maps memory and gives it back.
#![expect(unsafe_code)]

use anyhow::{Context, Result};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

const ALIGNMENT: usize = 2 << 20;

/// Zeroed memory, present, at an address that is a multiple of 2 MiB. Its address is exposed.
pub(crate) struct Huge {
    /// Where the mapping starts, and its size.
    mapping: usize,
    bytes: usize,
    address: u64,
}

impl Huge {
    /// At least `bytes`.
    ///
    /// # Errors
    /// If the machine does not have that much.
    pub(crate) fn new(bytes: u64) -> Result<Self> {
        let wanted = (bytes as usize).next_multiple_of(ALIGNMENT);
        let bytes = wanted + ALIGNMENT;
        let mapping = unsafe {
            // SAFETY: an anonymous mapping at an address of the kernel's choice aliases nothing.
            mmap_anonymous(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }
        .with_context(|| format!("mapping {bytes} bytes"))?;
        let mapping = mapping.expose_provenance();
        let huge = Self {
            mapping,
            bytes,
            address: mapping.next_multiple_of(ALIGNMENT) as u64,
        };
        let start = std::ptr::with_exposed_provenance_mut::<u8>(huge.address as usize);
        // A kernel without transparent huge pages refuses; then the figures are those of small pages.
        // SAFETY: the range lies within the mapping, and the advice changes no content.
        _ = unsafe { madvise(start.cast(), wanted, Advice::LinuxHugepage) };
        // SAFETY: the range lies within the mapping, which nobody else uses yet.
        unsafe { start.write_bytes(0, wanted) };
        Ok(huge)
    }

    /// The address of the first byte.
    pub(crate) const fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for Huge {
    fn drop(&mut self) {
        let mapping = std::ptr::with_exposed_provenance_mut(self.mapping);
        // SAFETY: who uses the memory keeps the owner.
        _ = unsafe { munmap(mapping, self.bytes) };
    }
}
