//! Guest memory files: `KVM_CREATE_GUEST_MEMFD` (SPEC 5.4).
//!
//! The program gets a descriptor of a sealed, empty file of the right size: a placeholder, which
//! can be asked for its size, copied and closed, and nothing else. The memory itself is a mapping of
//! this library's that no descriptor names. It is anonymous, so that its pages come zeroed when they
//! are used for the first time, and a hole gives them back to the system.
//!
//! This is a model of isolation: no descriptor, ioctl or mapping of the program leads to private
//! bytes, but vCPUs run in the program's own address space, whose memory it could search.
// UNSAFETY: maps memory that guests access by address.
#![expect(unsafe_code)]

use crate::memory_key;
use crate::sync::Mutex;
use crate::vm::Vm;
use rustix::fd::OwnedFd;
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use std::ffi::c_int;
use std::ops::Range;
use std::ptr;
use std::sync::Arc;
use twofold_arch::{Level, PAGE_SIZE};

/// A guest memory file. It keeps its VM alive, and lives until its last descriptor is closed.
pub struct GuestMemory {
    vm: Arc<Vm>,
    memory: Arc<Reservation>,
    size: u64,
    /// One change at a time (the inode's invalidate lock).
    changes: Mutex<()>,
}

/// Addresses that belong to a guest memory file and to nothing else.
#[derive(Debug)]
pub(crate) struct Reservation {
    /// All of it.
    start: usize,
    length: usize,
    /// Where the file's first byte is, at a multiple of 2M.
    first: usize,
}

impl Reservation {
    /// Memory for a file of `size` bytes; a trust domain's is guarded by a protection key.
    fn new(size: usize, guarded: bool) -> Result<Self, Errno> {
        let slack = Level::L2M.bytes() as usize;
        let length = size.checked_add(slack).ok_or(Errno::NOMEM)?;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe {
            rustix::mm::mmap_anonymous(
                ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }?;
        let reservation = Self {
            start: start.expose_provenance(),
            length,
            first: start.expose_provenance().next_multiple_of(slack),
        };
        // SAFETY: a new mapping, which forked children shall not have.
        let advised = unsafe { rustix::mm::madvise(start, length, Advice::LinuxDontFork) };
        if guarded {
            // SAFETY: the same; whoever accesses it opens it first (`Open`).
            unsafe { memory_key::protect(start, length) };
        }
        advised.map(|()| reservation)
    }

    /// The addresses of `range` bytes of the file.
    fn addresses(&self, range: &Range<u64>) -> Range<u64> {
        let first = self.first as u64;
        first + range.start..first + range.end
    }

    /// Gives the pages back to the system; they are zeroed when they are used again.
    fn forget(&self, range: &Range<u64>) -> Result<(), Errno> {
        let addresses = self.addresses(range);
        let length = (addresses.end - addresses.start) as usize;
        // SAFETY: this reservation's own memory, within its size by the callers; no guest has it
        // mapped.
        unsafe { rustix::mm::madvise(pointer(addresses.start), length, Advice::LinuxDontNeed) }
    }

    /// Gives all memory back and leaves nothing that could be accessed; the addresses stay taken.
    fn retire(&self) -> Result<(), Errno> {
        // SAFETY: replaces this reservation's own mapping, which no guest has mapped.
        unsafe {
            rustix::mm::mmap_anonymous(
                pointer(self.start as u64),
                self.length,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED,
            )
        }
        .map(|_| ())
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // SAFETY: this reservation's own mapping, which nobody knows any more.
        let result = unsafe { rustix::mm::munmap(pointer(self.start as u64), self.length) };
        if let Err(error) = result {
            tracing::error!(%error, "unmapping private memory failed");
        }
    }
}

fn pointer(address: u64) -> *mut std::ffi::c_void {
    ptr::with_exposed_provenance_mut(address as usize)
}

impl GuestMemory {
    /// `KVM_CREATE_GUEST_MEMFD`: the file, and its placeholder for the program.
    ///
    /// # Errors
    /// `EINVAL` for flags, of which there are none, and for a size that is zero, negative or no
    /// multiple of the page size; `ENOMEM`, `EMFILE`, `ENFILE`.
    pub(crate) fn new(vm: &Arc<Vm>, size: u64, flags: u64) -> Result<(Self, OwnedFd), Errno> {
        if flags != 0
            || size == 0
            || i64::try_from(size).is_err()
            || !size.is_multiple_of(PAGE_SIZE)
        {
            return Err(Errno::INVAL);
        }
        let size_here = usize::try_from(size).map_err(|_| Errno::NOMEM)?;
        let memory = Reservation::new(size_here, vm.td().is_some())?;
        let memory = Arc::new(memory);
        let placeholder = placeholder(size)?;
        let file = Self {
            vm: Arc::clone(vm),
            memory,
            size,
            changes: Mutex::new(()),
        };
        Ok((file, placeholder))
    }

    /// The VM that the file belongs to.
    pub fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The address of the byte at `offset`, if so many bytes follow.
    pub(crate) fn address(&self, offset: u64, length: u64) -> Option<u64> {
        let end = offset.checked_add(length)?;
        (end <= self.size).then_some(self.memory.first as u64 + offset)
    }

    /// `fallocate`: allocates pages, or punches a hole.
    ///
    /// # Errors
    /// As the kernel gives them: `EINVAL` for a negative offset, a length that is not positive, an
    /// unaligned range, and for allocation beyond the end; `EOPNOTSUPP` for every mode but
    /// `KEEP_SIZE`, alone or with `PUNCH_HOLE`; `EFBIG` for an end that no file has; `EINTR`,
    /// `ENOMEM`.
    pub fn fallocate(&self, mode: c_int, offset: i64, length: i64) -> Result<(), Errno> {
        let (Ok(offset), Ok(length)) = (u64::try_from(offset), u64::try_from(length)) else {
            return Err(Errno::INVAL);
        };
        if length == 0 {
            return Err(Errno::INVAL);
        }
        let punch = mode & libc::FALLOC_FL_PUNCH_HOLE != 0;
        if mode & !(libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE) != 0
            || mode & libc::FALLOC_FL_KEEP_SIZE == 0
        {
            return Err(Errno::OPNOTSUPP);
        }
        let end = offset + length;
        if i64::try_from(end).is_err() {
            return Err(Errno::FBIG);
        }
        if !offset.is_multiple_of(PAGE_SIZE) || !length.is_multiple_of(PAGE_SIZE) {
            return Err(Errno::INVAL);
        }
        if punch {
            let range = offset.min(self.size)..end.min(self.size);
            if range.is_empty() {
                return Ok(());
            }
            self.punch(range)
        } else if end > self.size {
            Err(Errno::INVAL)
        } else {
            self.allocate(offset..end)
        }
    }

    fn punch(&self, range: Range<u64>) -> Result<(), Errno> {
        let _changes = self.changes.lock();
        let tables = self.vm.tables();
        let change = tables.begin_private_change(self.memory.addresses(&range));
        let result = self.memory.forget(&range);
        tables.end_host_change(change);
        result
    }

    fn allocate(&self, range: Range<u64>) -> Result<(), Errno> {
        let _changes = self.changes.lock();
        let addresses = self.memory.addresses(&range);
        let length = (addresses.end - addresses.start) as usize;
        // The kernel looks at this thread's rights, too.
        let _open = memory_key::Open::new();
        // SAFETY: populating changes no byte.
        let result = unsafe {
            rustix::mm::madvise(pointer(addresses.start), length, Advice::LinuxPopulateWrite)
        };
        match result {
            // The kernel ran out of memory for pages, rather than of something mapped here.
            Err(Errno::FAULT) => Err(Errno::NOMEM),
            other => other,
        }
    }
}

impl Drop for GuestMemory {
    /// The last descriptor is closed: slots that are bound to the file lose it.
    fn drop(&mut self) {
        let tables = self.vm.tables();
        let addresses = self.memory.addresses(&(0..self.size));
        let change = tables.begin_private_change(addresses.clone());
        if let Err(error) = self.memory.retire() {
            tracing::error!(%error, "giving back private memory failed");
        }
        tables.end_host_change(change);
        if tables.is_bound(addresses) {
            // Nothing else may come to be at these addresses while a slot refers to them.
            self.vm.keep_reservation(Arc::clone(&self.memory));
        }
    }
}

/// A file of `size` bytes that cannot be written, resized or unsealed, and takes no memory.
fn placeholder(size: u64) -> Result<OwnedFd, Errno> {
    // Not closed on exec, as KVM's own.
    let file = rustix::fs::memfd_create("kvm-guest-memory", MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&file, size)?;
    let seals = SealFlags::GROW | SealFlags::SHRINK | SealFlags::WRITE | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&file, seals)?;
    Ok(file)
}
