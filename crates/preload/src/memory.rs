//! The calls that change what is behind an address: the MMU notifier of a process.
//!
//! Guest memory is memory of the program. Before the kernel takes a page of it away or replaces it,
//! the second-stage tables must stop referring to it; [`abi::host_change`] sees to that and stays
//! in force until its guard is dropped, after the system call.
//!
//! The calls that concern only memory go to the kernel directly rather than through libc, which
//! does nothing else with them: a memory allocator may call them from within the dynamic linker.

// UNSAFETY: exports functions in libc's place.
#![expect(unsafe_code)]

use libc::{c_int, c_uint, c_ulong, c_void, iovec, off_t};
use rustix::io::Errno;
use twofold_kvm::abi::{self, HostChange};

use crate::raw::{self, RawResult};
use crate::signals::Undisturbed;
use crate::{process, real};

/// A change that is going on: from before the system call until this is dropped, nothing of ours
/// uses the memory. No handler of the program runs meanwhile, as it might wait for the end.
pub(crate) struct Change {
    /// Dropped first.
    _guard: HostChange,
    _section: Undisturbed,
}

impl Change {
    #[inline]
    fn begin(begin: impl FnOnce() -> Option<HostChange>) -> Option<Self> {
        if Undisturbed::is_in_force() {
            // The library itself allocates, with the program's allocator, which may give memory
            // back meanwhile. No slot is behind that memory, and the locks that a change takes may
            // be this thread's own.
            return None;
        }
        process::settle();
        let section = Undisturbed::begin();
        begin().map(|guard| Self {
            _guard: guard,
            _section: section,
        })
    }
}

/// The guard for a change of `len` bytes from `address` on; `None` if nothing of ours is there.
#[inline]
fn change(address: usize, len: usize) -> Option<Change> {
    Change::begin(|| abi::host_change(address, len))
}

/// The guard for a change of a file's contents, wherever it may be mapped.
#[inline]
fn change_of_file() -> Option<Change> {
    Change::begin(abi::host_change_all)
}

#[inline]
fn to_pointer(result: RawResult) -> *mut c_void {
    match result {
        Ok(address) => std::ptr::with_exposed_provenance_mut(address),
        Err(reason) => {
            raw::set_errno(reason);
            libc::MAP_FAILED
        }
    }
}

// ---- mappings -----------------------------------------------------------------------------------

macro_rules! mmap_functions {
    ($($name:ident)*) => { $(
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C" fn $name(
            address: *mut c_void, len: usize, protection: c_int, flags: c_int, fd: c_int,
            offset: off_t,
        ) -> *mut c_void {
            let anonymous = flags & libc::MAP_ANONYMOUS != 0;
            if !anonymous && let Some(reason) = abi::mmap_check(fd, protection, flags, offset, len)
            {
                raw::set_errno(reason.raw_os_error());
                return libc::MAP_FAILED;
            }
            // With MAP_FIXED_NOREPLACE the kernel takes nothing away.
            let replaces = flags & libc::MAP_FIXED != 0;
            let change = if replaces { change(address.addr(), len) } else { None };
            // SAFETY: the caller answers for what is at the address.
            let result = unsafe {
                raw::syscall(
                    libc::SYS_mmap,
                    [
                        address.expose_provenance(),
                        len,
                        protection as usize,
                        flags as usize,
                        fd as usize,
                        offset as usize,
                    ],
                )
            };
            if !anonymous && let Ok(address) = result {
                abi::mapped(fd, address, len, protection, offset);
            }
            drop(change);
            to_pointer(result)
        }
    )* };
}

mmap_functions! { mmap mmap64 }

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn munmap(address: *mut c_void, len: usize) -> c_int {
    let change = change(address.addr(), len);
    // SAFETY: the caller answers for what is at the address.
    let result = unsafe { raw::syscall(libc::SYS_munmap, [address.addr(), len, 0, 0, 0, 0]) };
    drop(change);
    raw::to_int(result)
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn mremap(
    old: *mut c_void,
    old_len: usize,
    new_len: usize,
    flags: c_int,
    new: *mut c_void,
) -> *mut c_void {
    let replaces = flags & libc::MREMAP_FIXED != 0;
    let changes = (
        change(old.addr(), old_len),
        if replaces {
            change(new.addr(), new_len)
        } else {
            None
        },
    );
    // SAFETY: the caller answers for what is at the addresses.
    let result = unsafe {
        raw::syscall(
            libc::SYS_mremap,
            [
                old.addr(),
                old_len,
                new_len,
                flags as usize,
                new.expose_provenance(),
                0,
            ],
        )
    };
    drop(changes);
    to_pointer(result)
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn mprotect(
    address: *mut c_void,
    len: usize,
    protection: c_int,
) -> c_int {
    let change = change(address.addr(), len);
    // SAFETY: the caller answers for what is at the address.
    let result = unsafe {
        raw::syscall(
            libc::SYS_mprotect,
            [address.addr(), len, protection as usize, 0, 0, 0],
        )
    };
    drop(change);
    raw::to_int(result)
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn pkey_mprotect(
    address: *mut c_void,
    len: usize,
    protection: c_int,
    key: c_int,
) -> c_int {
    let change = change(address.addr(), len);
    let arguments = [address.addr(), len, protection as usize, key as usize, 0, 0];
    // SAFETY: the caller answers for what is at the address.
    let result = unsafe { raw::syscall(libc::SYS_pkey_mprotect, arguments) };
    drop(change);
    raw::to_int(result)
}

// ---- advice -------------------------------------------------------------------------------------

/// Whether `advice` leaves every page where it is and as it is.
const fn is_harmless(advice: c_int) -> bool {
    matches!(
        advice,
        libc::MADV_NORMAL
            | libc::MADV_RANDOM
            | libc::MADV_SEQUENTIAL
            | libc::MADV_WILLNEED
            | libc::MADV_DONTFORK
            | libc::MADV_DOFORK
            | libc::MADV_HUGEPAGE
            | libc::MADV_NOHUGEPAGE
            | libc::MADV_DONTDUMP
            | libc::MADV_DODUMP
            | libc::MADV_WIPEONFORK
            | libc::MADV_KEEPONFORK
            | libc::MADV_COLD
            | libc::MADV_POPULATE_READ
            | libc::MADV_POPULATE_WRITE
    )
}

fn advise(address: usize, len: usize, advice: c_int) -> RawResult {
    let change = if is_harmless(advice) {
        None
    } else {
        change(address, len)
    };
    // SAFETY: the program answers for what is at the address.
    let result =
        unsafe { raw::syscall(libc::SYS_madvise, [address, len, advice as usize, 0, 0, 0]) };
    drop(change);
    result
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn madvise(address: *mut c_void, len: usize, advice: c_int) -> c_int {
    raw::to_int(advise(address.addr(), len, advice))
}

/// As libc has it, `POSIX_MADV_DONTNEED` does nothing, because it must not lose data; the result is
/// the error number itself.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn posix_madvise(
    address: *mut c_void,
    len: usize,
    advice: c_int,
) -> c_int {
    if advice == libc::POSIX_MADV_DONTNEED {
        return 0;
    }
    advise(address.addr(), len, advice).err().unwrap_or(0)
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn process_madvise(
    process: c_int,
    ranges: *const iovec,
    count: usize,
    advice: c_int,
    flags: c_uint,
) -> isize {
    // The descriptor may stand for this process or for another one. To forget too much is harmless.
    let change = if is_harmless(advice) {
        None
    } else {
        change_of_file()
    };
    let arguments = [
        process as usize,
        ranges.addr(),
        count,
        advice as usize,
        flags as usize,
        0,
    ];
    // SAFETY: the caller answers for what is at the addresses.
    let result = unsafe { raw::syscall(libc::SYS_process_madvise, arguments) };
    drop(change);
    match result {
        Ok(bytes) => bytes.cast_signed(),
        Err(reason) => raw::fail(reason) as isize,
    }
}

// ---- files that may be mapped -------------------------------------------------------------------

/// `fallocate` of one of our descriptors; `None` for others.
#[inline]
fn guest_memory_fallocate(fd: c_int, mode: c_int, offset: off_t, len: off_t) -> Option<c_int> {
    if !abi::is_ours(fd) {
        return None;
    }
    process::settle();
    let _section = Undisturbed::begin();
    abi::fallocate(fd, mode, offset, len).map(|result| match result {
        Ok(()) => 0,
        Err(reason) => raw::fail(reason.raw_os_error()),
    })
}

/// Why the file cannot be resized; `None` if the kernel knows.
trait Resized: Copy {
    fn refusal(self) -> Option<Errno>;
}

impl Resized for c_int {
    #[inline]
    fn refusal(self) -> Option<Errno> {
        abi::before_truncate(self)
    }
}

impl Resized for *const libc::c_char {
    #[inline]
    fn refusal(self) -> Option<Errno> {
        None
    }
}

macro_rules! fallocate_functions {
    ($($name:ident)*) => { $(
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C" fn $name(fd: c_int, mode: c_int, offset: off_t, len: off_t) -> c_int {
            if let Some(result) = guest_memory_fallocate(fd, mode, offset, len) {
                return result;
            }
            // Allocating adds pages and takes none away; every other mode does.
            let change = match mode & !libc::FALLOC_FL_KEEP_SIZE {
                0 => None,
                _ => change_of_file(),
            };
            // SAFETY: the caller passes what libc's function asks for.
            let result = unsafe { real::$name(fd, mode, offset, len) };
            drop(change);
            result
        }
    )* };
}

fallocate_functions! { fallocate fallocate64 }

macro_rules! truncate_functions {
    ($($name:ident($file:ident: $kind:ty);)*) => { $(
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C" fn $name($file: $kind, len: off_t) -> c_int {
            if let Some(reason) = Resized::refusal($file) {
                return raw::fail(reason.raw_os_error());
            }
            let change = change_of_file();
            // SAFETY: the caller passes what libc's function asks for.
            let result = unsafe { real::$name($file, len) };
            drop(change);
            result
        }
    )* };
}

truncate_functions! {
    ftruncate(fd: c_int);
    ftruncate64(fd: c_int);
    truncate(path: *const libc::c_char);
    truncate64(path: *const libc::c_char);
}

// ---- userfaultfd --------------------------------------------------------------------------------

/// `UFFDIO_WRITEPROTECT`: `_IOWR(0xAA, 0x06, struct uffdio_writeprotect)`.
const UFFDIO_WRITEPROTECT: c_ulong = 0xc018_aa06;

/// `struct uffdio_writeprotect` of `linux/userfaultfd.h`.
#[repr(C)]
struct WriteProtect {
    start: u64,
    len: u64,
    mode: u64,
}

/// The guard for a request to a driver that changes memory: write protection by userfaultfd.
#[inline]
pub(crate) fn change_by_ioctl(request: c_ulong, argument: usize) -> Option<Change> {
    if request != UFFDIO_WRITEPROTECT || argument == 0 {
        return None;
    }
    // SAFETY: the request's argument is this structure, or the kernel will refuse it.
    let range =
        unsafe { std::ptr::with_exposed_provenance::<WriteProtect>(argument).read_unaligned() };
    let (start, len) = (
        usize::try_from(range.start).ok()?,
        usize::try_from(range.len).ok()?,
    );
    change(start, len)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_advice_that_keeps_every_page_is_harmless() {
        for advice in [
            libc::MADV_DONTNEED,
            libc::MADV_FREE,
            libc::MADV_REMOVE,
            libc::MADV_PAGEOUT,
            libc::MADV_HWPOISON,
            libc::MADV_MERGEABLE,
            i32::MAX,
        ] {
            assert!(!is_harmless(advice), "{advice}");
        }
        assert!(is_harmless(libc::MADV_HUGEPAGE));
    }

    #[test]
    fn the_write_protect_request_has_the_size_of_its_structure() {
        assert_eq!(
            (UFFDIO_WRITEPROTECT >> 16) as usize & 0x3fff,
            size_of::<WriteProtect>()
        );
    }
}
