//! Whether a page that was made present for reading may be written without changing what is there.
//!
//! KVM maps a page writable on a read fault when the host's own page table does. From outside the
//! kernel, `/proc/self/pagemap` tells enough for private memory: a present anonymous page that
//! nobody else maps is the program's own; the zero page, a page shared since `fork` and a file's
//! page in a private mapping are not. A page of a shared mapping is whoever maps it writable. A page
//! under userfaultfd write protection never is. Where nothing is known the answer is no, and the
//! first write faults again.

use crate::mappings;
use rustix::fd::BorrowedFd;
use rustix::fs::{Mode, OFlags};
use std::os::fd::{AsRawFd, IntoRawFd, RawFd};
use std::sync::atomic::{AtomicI32, Ordering};
use twofold_arch::PAGE_SIZE;

/// Bits of a pagemap entry (Documentation/admin-guide/mm/pagemap.rst).
const EXCLUSIVE: u64 = 1 << 56;
const WRITE_PROTECTED: u64 = 1 << 57;
const FILE_OR_SHARED: u64 = 1 << 61;
const PRESENT: u64 = 1 << 63;

/// Not open yet, or closed by the program.
const NONE: RawFd = -1;
/// Cannot be opened: do not try again.
const UNAVAILABLE: RawFd = -2;

static DESCRIPTOR: AtomicI32 = AtomicI32::new(NONE);

/// Whether a write to the present page at `hva` would go to that very page.
pub(crate) fn may_write_in_place(hva: u64) -> bool {
    let Some(entry) = entry(hva) else {
        return false;
    };
    if entry & PRESENT == 0 || entry & WRITE_PROTECTED != 0 {
        false
    } else if entry & FILE_OR_SHARED == 0 {
        entry & EXCLUSIVE != 0
    } else {
        mappings::is_shared_and_writable(hva)
    }
}

/// The program is closing or replacing this descriptor, which may be ours.
pub(crate) fn forget_descriptor(fd: RawFd) {
    let _ = DESCRIPTOR.compare_exchange(fd, NONE, Ordering::Relaxed, Ordering::Relaxed);
}

/// [`forget_descriptor`] for every descriptor from `first` to `last`.
pub(crate) fn forget_descriptors(first: u32, last: u32) {
    let fd = DESCRIPTOR.load(Ordering::Relaxed);
    if u32::try_from(fd).is_ok_and(|fd| (first..=last).contains(&fd)) {
        forget_descriptor(fd);
    }
}

/// In a forked child: the descriptor shows the parent's memory.
pub(crate) fn forget_parent() {
    let fd = DESCRIPTOR.swap(NONE, Ordering::Relaxed);
    if fd >= 0 {
        // UNSAFETY: closes a raw descriptor.
        #[expect(unsafe_code)]
        // SAFETY: this module opened it, and nothing uses it any more.
        unsafe {
            rustix::io::close(fd);
        }
    }
}

fn entry(hva: u64) -> Option<u64> {
    with_file(|file| {
        let mut bytes = [0; 8];
        match rustix::io::pread(file, &mut bytes, hva / PAGE_SIZE * 8) {
            Ok(8) => Some(u64::from_le_bytes(bytes)),
            Err(rustix::io::Errno::BADF) => {
                forget_descriptor(file.as_raw_fd());
                None
            }
            _ => None,
        }
    })?
}

/// What `work` finds in `/proc/self/pagemap`, or `None` if that cannot be opened.
pub(crate) fn with_file<R>(work: impl FnOnce(BorrowedFd<'_>) -> R) -> Option<R> {
    let mut fd = DESCRIPTOR.load(Ordering::Relaxed);
    if fd == NONE {
        fd = open();
    }
    if fd < 0 {
        return None;
    }
    // UNSAFETY: borrows a raw descriptor.
    #[expect(unsafe_code)]
    // SAFETY: if the program closed it behind the interposed `close`, the request fails or reads
    // something else, at worst eight bytes of another file; memory safety does not depend on it.
    let file = unsafe { BorrowedFd::borrow_raw(fd) };
    Some(work(file))
}

#[cold]
fn open() -> RawFd {
    let opened = rustix::fs::open(
        "/proc/self/pagemap",
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    );
    match opened {
        Ok(file) => {
            // Out of the way of the low numbers that programs expect to be given.
            let file = rustix::io::fcntl_dupfd_cloexec(&file, 500).unwrap_or(file);
            let fd = file.into_raw_fd();
            match DESCRIPTOR.compare_exchange(NONE, fd, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => fd,
                Err(other) => {
                    // UNSAFETY: closes a raw descriptor.
                    #[expect(unsafe_code)]
                    // SAFETY: just opened here, and another thread's is used instead.
                    unsafe {
                        rustix::io::close(fd);
                    }
                    other
                }
            }
        }
        Err(error) => {
            tracing::info!(%error, "/proc/self/pagemap cannot be read: first writes fault twice");
            DESCRIPTOR.store(UNAVAILABLE, Ordering::Relaxed);
            UNAVAILABLE
        }
    }
}
