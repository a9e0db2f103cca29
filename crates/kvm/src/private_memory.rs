//! Private memory of a VM: its ioctls.

use crate::fd_table;
use crate::guest_memory::{GuestMemory, Reservation};
use crate::object::Object;
use crate::vm::Vm;
use kvm_bindings::{
    KVM_MEM_GUEST_MEMFD, KVM_MEM_READONLY, KVM_MEMORY_ATTRIBUTE_PRIVATE, kvm_memory_attributes,
    kvm_userspace_memory_region2,
};
use rustix::fd::{BorrowedFd, OwnedFd};
use rustix::io::Errno;
use std::os::fd::RawFd;
use std::sync::Arc;
use twofold_arch::{Gfn, PAGE_SHIFT, PAGE_SIZE};
use twofold_mmu::{AttributeError, GuestMemoryError, Region, RegionErrorKind};

impl Vm {
    /// `KVM_SET_USER_MEMORY_REGION2`
    ///
    /// # Errors
    /// For a trust domain `EINVAL` for memory that is read-only or has the shared bit in its addresses.
    /// In KVM's order (SPEC 6.10): `EINVAL` for whatever is malformed or names what does not
    /// exist, `EEXIST` for an overlap, `ENOMEM`; then for the guest memory file `EBADF` if there
    /// is no such descriptor, `EINVAL` if it is none of this VM's or too small, `EEXIST` if another
    /// slot is bound to that part of it.
    pub fn set_user_memory_region(
        &self,
        region: &kvm_userspace_memory_region2,
    ) -> Result<(), Errno> {
        if let Some(td) = self.td() {
            let last = region
                .guest_phys_addr
                .saturating_add(region.memory_size.saturating_sub(1));
            if region.flags & KVM_MEM_READONLY != 0 || last & td.shared_bit().unwrap_or(0) != 0 {
                return Err(Errno::INVAL);
            }
        }
        let has_file = region.flags & KVM_MEM_GUEST_MEMFD != 0;
        let (offset, size) = (region.guest_memfd_offset, region.memory_size);
        if has_file && (!offset.is_multiple_of(PAGE_SIZE) || offset.checked_add(size).is_none()) {
            return Err(Errno::INVAL);
        }
        let request = Region {
            slot: region.slot,
            flags: region.flags,
            gpa: region.guest_phys_addr,
            size,
            hva: region.userspace_addr,
        };
        // Held until the slot is there: a file that is closed meanwhile goes afterwards, and then
        // takes itself out of the slot.
        let mut file = None;
        let bind = || {
            let fd =
                RawFd::try_from(region.guest_memfd).map_err(|_| GuestMemoryError::BadDescriptor)?;
            file = fd_table::get(fd);
            match file.as_ref().and_then(fd_table::FileRef::object) {
                Some(Object::GuestMemory(memory))
                    if std::ptr::eq(&raw const **memory.vm(), self) =>
                {
                    memory
                        .address(offset, size)
                        .ok_or(GuestMemoryError::Unsuitable)
                }
                Some(_) => Err(GuestMemoryError::Unsuitable),
                None if is_open(fd) => Err(GuestMemoryError::Unsuitable),
                None => Err(GuestMemoryError::BadDescriptor),
            }
        };
        let result = self.tables().set_region(request, bind);
        drop(file);
        self.wait_for_guest_accesses();
        result.map_err(|error| {
            tracing::debug!(?request, %error, "memory region refused");
            match error.kind() {
                RegionErrorKind::Invalid => Errno::INVAL,
                RegionErrorKind::Exists => Errno::EXIST,
                RegionErrorKind::NoMemory => Errno::NOMEM,
                RegionErrorKind::BadDescriptor => Errno::BADF,
            }
        })
    }

    /// `KVM_CREATE_GUEST_MEMFD`: the file, and its placeholder for the program.
    ///
    /// # Errors
    /// `EINVAL` for flags, of which there are none, and for a size that is zero, negative or no
    /// multiple of the page size; `ENOMEM`, `EMFILE`, `ENFILE`.
    pub fn create_guest_memfd(
        self: &Arc<Self>,
        size: u64,
        flags: u64,
    ) -> Result<(GuestMemory, OwnedFd), Errno> {
        GuestMemory::new(self, size, flags)
    }

    /// `KVM_SET_MEMORY_ATTRIBUTES`
    ///
    /// # Errors
    /// `EINVAL` for flags, for attributes that this type of VM does not have, and for a range that is
    /// empty, wraps, is not page aligned, or lies beyond what guest-physical addresses can be;
    /// `ENOMEM`. Nothing has changed then.
    pub fn set_memory_attributes(&self, request: &kvm_memory_attributes) -> Result<(), Errno> {
        let supported = match self.vm_type().has_private_memory() {
            true => u64::from(KVM_MEMORY_ATTRIBUTE_PRIVATE),
            false => 0,
        };
        let (start, size) = (request.address, request.size);
        if request.flags != 0 || request.attributes & !supported != 0 {
            return Err(Errno::INVAL);
        }
        let end = match start.checked_add(size) {
            Some(end) if size != 0 => end,
            _ => return Err(Errno::INVAL),
        };
        if !start.is_multiple_of(PAGE_SIZE) || !size.is_multiple_of(PAGE_SIZE) {
            return Err(Errno::INVAL);
        }
        if supported == 0 {
            // Everything is shared, as asked for.
            return Ok(());
        }
        let gfns = Gfn::new(start >> PAGE_SHIFT)..Gfn::new(end >> PAGE_SHIFT);
        self.tables()
            .set_attributes(gfns, request.attributes != 0)
            .map_err(|error| match error {
                AttributeError::Range => Errno::INVAL,
                AttributeError::OutOfMemory => Errno::NOMEM,
            })
    }

    /// Keeps the addresses of a guest memory file that is gone for as long as the VM lives, since
    /// slots refer to them.
    pub(crate) fn keep_reservation(&self, reservation: Arc<Reservation>) {
        self.reservations().lock().push(reservation);
    }
}

/// Whether the program has a descriptor with this number.
fn is_open(fd: RawFd) -> bool {
    if fd < 0 {
        return false;
    }
    // UNSAFETY: borrows a raw descriptor.
    #[expect(unsafe_code)]
    // SAFETY: only asked for its flags; if it is closed meanwhile the answer is an error.
    let file = unsafe { BorrowedFd::borrow_raw(fd) };
    rustix::io::fcntl_getfd(file).is_ok()
}
