//! The shared half of guest memory: an anonymous mapping of this process.

// UNSAFETY: maps memory and gives it to KVM; the guest changes it while Rust looks on, so it is
// reached through raw pointers only, never through a reference.
#![expect(unsafe_code)]

use std::io;
use std::os::fd::RawFd;
use std::ptr::{self, NonNull};

use anyhow::{Context, Result, ensure};
use kvm_bindings::{KVM_MEM_GUEST_MEMFD, kvm_userspace_memory_region2};
use kvm_ioctls::VmFd;

/// A piece of guest-physical memory.
#[derive(Debug)]
pub(crate) struct Memory {
    guest_address: u64,
    host_address: NonNull<u8>,
    size: usize,
}

impl Memory {
    /// Maps `size` bytes that are to appear at `guest_address`.
    ///
    /// # Errors
    /// The host has no address space left.
    pub(crate) fn map(guest_address: u64, size: usize) -> Result<Self> {
        // SAFETY: a new anonymous mapping at an address of the kernel's choice replaces nothing.
        let mapping = unsafe {
            libc::mmap(
                ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if mapping == libc::MAP_FAILED {
            return Err(io::Error::last_os_error())
                .with_context(|| format!("cannot map {size:#x} bytes of guest memory"));
        }
        let host_address = NonNull::new(mapping.cast()).context("mmap returned address zero")?;
        Ok(Self {
            guest_address,
            host_address,
            size,
        })
    }

    /// Makes the memory appear in `vm`, as its memory slot `slot`, with the beginning of
    /// `guest_memfd` as its private half if there is one. It must outlive the VM: declare it first.
    ///
    /// # Errors
    /// KVM refuses the slot.
    pub(crate) fn add_to(&self, vm: &VmFd, slot: u32, guest_memfd: Option<RawFd>) -> Result<()> {
        let region = kvm_userspace_memory_region2 {
            slot,
            flags: guest_memfd.map_or(0, |_| KVM_MEM_GUEST_MEMFD),
            guest_phys_addr: self.guest_address,
            memory_size: self.size as u64,
            userspace_addr: self.host_address.as_ptr() as u64,
            guest_memfd_offset: 0,
            guest_memfd: guest_memfd.unwrap_or_default() as u32,
            ..Default::default()
        };
        // SAFETY: the region is this value's mapping, which outlives the VM as documented.
        unsafe { vm.set_user_memory_region2(region) }
            .with_context(|| format!("KVM refuses the slot at {:#x}", self.guest_address))
    }

    /// Copies `bytes` to guest-physical `address`.
    ///
    /// # Errors
    /// The bytes do not fit into this memory.
    pub(crate) fn write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        let to = self.host_pointer(address, bytes.len())?;
        // SAFETY: `host_pointer` checked that all of the range lies in the mapping, and the slice
        // cannot overlap it because no reference into the mapping exists.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        Ok(())
    }

    /// A copy of the 4096 bytes at guest-physical `address`.
    ///
    /// # Errors
    /// They do not lie in this memory.
    pub(crate) fn page(&self, address: u64) -> Result<[u8; 4096]> {
        let from = self.host_pointer(address, 4096)?;
        // SAFETY: `host_pointer` checked the range; every bit pattern is an array of bytes.
        Ok(unsafe { from.cast::<[u8; 4096]>().read_unaligned() })
    }

    /// Gives the pages from guest-physical `address` on back to the system; they are zeros from
    /// now on.
    ///
    /// # Errors
    /// They do not lie in this memory.
    pub(crate) fn discard(&self, address: u64, len: u64) -> Result<()> {
        let start = self.host_pointer(address, len as usize)?;
        // SAFETY: pages of this value's own mapping, by `host_pointer`.
        if unsafe { libc::madvise(start.cast(), len as usize, libc::MADV_DONTNEED) } != 0 {
            return Err(io::Error::last_os_error()).context("cannot discard shared memory");
        }
        Ok(())
    }

    fn host_pointer(&self, address: u64, len: usize) -> Result<*mut u8> {
        let offset = address
            .checked_sub(self.guest_address)
            .map(|offset| offset as usize);
        let offset =
            offset.filter(|offset| offset.checked_add(len).is_some_and(|e| e <= self.size));
        ensure!(
            offset.is_some(),
            "{len} bytes at {address:#x} are not in the memory at {:#x}",
            self.guest_address
        );
        // SAFETY: the offset was just compared with the size of the mapping.
        Ok(unsafe { self.host_address.as_ptr().add(offset.unwrap_or_default()) })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping belongs to this value, and nothing refers into it any more.
        unsafe { libc::munmap(self.host_address.as_ptr().cast(), self.size) };
    }
}

/// Punches a hole into a guest memory file: its pages go back to the system.
///
/// # Errors
/// The file is none that can have holes.
pub(crate) fn punch_hole(file: RawFd, offset: u64, length: u64) -> Result<()> {
    let mode = libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE;
    // SAFETY: takes no pointer.
    if unsafe { libc::fallocate(file, mode, offset as i64, length as i64) } != 0 {
        return Err(io::Error::last_os_error()).context("cannot punch a hole");
    }
    Ok(())
}

/// Tries to map a guest memory file, as someone would who wants to look into it, and says why that
/// does not work. `None`: it does.
pub(crate) fn cannot_map(file: RawFd) -> Option<io::Error> {
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
