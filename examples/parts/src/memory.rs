//! Guest memory: an anonymous mapping of this process for each piece of guest-physical memory.
//!
//! The pages come into being when somebody touches them: the VMM through [`Memory::read_u64`] and
//! [`Memory::write`], or the guest, whose first access makes KVM fault the page in.

// UNSAFETY: maps memory and gives it to KVM; the guest changes it while Rust looks on, so it is
// reached through raw pointers only, never through a reference.
#![expect(unsafe_code)]

use std::io;
use std::os::fd::RawFd;
use std::ptr::{self, NonNull};

use anyhow::{Context, Result, ensure};
use kvm_bindings::{
    KVM_MEM_GUEST_MEMFD, kvm_userspace_memory_region, kvm_userspace_memory_region2,
};
use kvm_ioctls::VmFd;

/// A piece of guest-physical memory.
#[derive(Debug)]
pub struct Memory {
    guest_address: u64,
    host_address: NonNull<u8>,
    size: usize,
}

impl Memory {
    /// Maps `size` bytes that are to appear at `guest_address`.
    ///
    /// # Errors
    /// The host has no address space left.
    pub fn map(guest_address: u64, size: usize) -> Result<Self> {
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

    /// Makes the memory appear in `vm`, as its memory slot `slot`. It must outlive the VM: declare
    /// it first.
    ///
    /// # Errors
    /// KVM refuses the slot: it overlaps another one, or is not aligned to pages.
    pub fn add_to(&self, vm: &VmFd, slot: u32) -> Result<()> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: self.guest_address,
            memory_size: self.size as u64,
            userspace_addr: self.host_address.as_ptr() as u64,
        };
        // SAFETY: the region is this value's mapping, which outlives the VM as documented.
        unsafe { vm.set_user_memory_region(region) }.with_context(|| {
            format!(
                "KVM refuses memory slot {slot} at {:#x}",
                self.guest_address
            )
        })
    }

    /// [`add_to`](Self::add_to) with the beginning of the guest memory file `guest_memfd` as the
    /// slot's private half.
    ///
    /// # Errors
    /// KVM refuses the slot.
    pub fn add_with_private_half(&self, vm: &VmFd, slot: u32, guest_memfd: RawFd) -> Result<()> {
        let region = kvm_userspace_memory_region2 {
            slot,
            flags: KVM_MEM_GUEST_MEMFD,
            guest_phys_addr: self.guest_address,
            memory_size: self.size as u64,
            userspace_addr: self.host_address.as_ptr() as u64,
            guest_memfd_offset: 0,
            guest_memfd: guest_memfd as u32,
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
    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        let to = self.host_pointer(address, bytes.len())?;
        // SAFETY: `host_pointer` checked that all of the range lies in the mapping, and the slice
        // cannot overlap it because no reference into the mapping exists.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        Ok(())
    }

    /// Reads the 8 bytes at guest-physical `address`, whose alignment does not matter.
    ///
    /// # Errors
    /// They do not lie in this memory.
    pub fn read_u64(&self, address: u64) -> Result<u64> {
        let from = self.host_pointer(address, size_of::<u64>())?;
        // SAFETY: `host_pointer` checked the range; every bit pattern is a number.
        Ok(unsafe { from.cast::<u64>().read_unaligned() })
    }

    /// A copy of the 4096 bytes at guest-physical `address`.
    ///
    /// # Errors
    /// They do not lie in this memory.
    pub fn page(&self, address: u64) -> Result<[u8; 4096]> {
        let from = self.host_pointer(address, 4096)?;
        // SAFETY: `host_pointer` checked the range; every bit pattern is an array of bytes.
        Ok(unsafe { from.cast::<[u8; 4096]>().read_unaligned() })
    }

    /// Gives the pages from guest-physical `address` on back to the system; they are zeros from
    /// now on.
    ///
    /// # Errors
    /// They do not lie in this memory.
    pub fn discard(&self, address: u64, len: u64) -> Result<()> {
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
