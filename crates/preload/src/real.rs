//! The functions that this library stands in front of.
//!
//! All are looked up when the library is loaded, so that a call from a signal handler needs no
//! dynamic linker. A constructor of another library may run before that; its calls look up what
//! they need.

// UNSAFETY: calls libc functions through pointers that the dynamic linker gave.
#![expect(unsafe_code)]

use std::ffi::CStr;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

use libc::{
    FILE, c_char, c_int, c_uint, c_ulong, c_void, iovec, mode_t, off_t, sigaction as Action,
    sigset_t, stat as Stat, statx as Statx,
};

use crate::raw;

/// One function of the next library that has it, normally libc.
pub(crate) struct Real {
    name: &'static CStr,
    address: AtomicPtr<c_void>,
}

impl Real {
    const fn new(name: &'static CStr) -> Self {
        Self {
            name,
            address: AtomicPtr::new(ptr::null_mut()),
        }
    }

    /// Its address; null if no library has it.
    #[inline]
    pub(crate) fn address(&self) -> *mut c_void {
        let address = self.address.load(Ordering::Relaxed);
        if address.is_null() {
            self.look_up()
        } else {
            address
        }
    }

    #[cold]
    fn look_up(&self) -> *mut c_void {
        // SAFETY: the name ends in a zero byte; RTLD_NEXT is asked from this library, and means
        // those that come after it.
        let address = unsafe { libc::dlsym(libc::RTLD_NEXT, self.name.as_ptr()) };
        self.address.store(address, Ordering::Relaxed);
        address
    }
}

/// It may unwind, which no function declared below may.
pub(crate) static PTHREAD_SETCANCELTYPE: Real = Real::new(c"pthread_setcanceltype");

/// Declares the functions, and for each a Rust function of that name which calls the real one, or
/// fails with `ENOSYS` (as the given value) where libc does not have it.
macro_rules! real {
    ($(fn $name:ident($($argument:ident: $kind:ty),* $(,)?) -> $result:ty, else $missing:expr;)*) => {
        mod table {
            use super::Real;
            $(
                #[allow(non_upper_case_globals, reason = "named like the functions")]
                pub(super) static $name: Real = {
                    const NAME: &str = concat!(stringify!($name), "\0");
                    match std::ffi::CStr::from_bytes_with_nul(NAME.as_bytes()) {
                        Ok(name) => Real::new(name),
                        Err(_) => unreachable!(),
                    }
                };
            )*
        }

        /// Looks all of them up.
        pub(crate) fn look_up_all() {
            $(table::$name.address();)*
            PTHREAD_SETCANCELTYPE.address();
        }

        $(
            /// libc's function of this name.
            ///
            /// # Safety
            /// As libc's.
            #[inline]
            pub(crate) unsafe fn $name($($argument: $kind),*) -> $result {
                let address = table::$name.address();
                if address.is_null() {
                    raw::set_errno(libc::ENOSYS);
                    #[allow(clippy::unused_unit, reason = "of functions that return nothing")]
                    return $missing;
                }
                // SAFETY: libc's function of this name takes these arguments. Those that it
                // declares as variadic are passed in the same registers on x86-64.
                unsafe {
                    let function: unsafe extern "C" fn($($kind),*) -> $result =
                        std::mem::transmute(address);
                    function($($argument),*)
                }
            }
        )*
    };
}

real! {
    fn open(path: *const c_char, flags: c_int, mode: mode_t) -> c_int, else -1;
    fn open64(path: *const c_char, flags: c_int, mode: mode_t) -> c_int, else -1;
    fn openat(dir: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int, else -1;
    fn openat64(dir: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int, else -1;
    fn __open_2(path: *const c_char, flags: c_int) -> c_int, else -1;
    fn __open64_2(path: *const c_char, flags: c_int) -> c_int, else -1;
    fn __openat_2(dir: c_int, path: *const c_char, flags: c_int) -> c_int, else -1;
    fn __openat64_2(dir: c_int, path: *const c_char, flags: c_int) -> c_int, else -1;
    fn creat(path: *const c_char, mode: mode_t) -> c_int, else -1;
    fn creat64(path: *const c_char, mode: mode_t) -> c_int, else -1;
    fn fopen(path: *const c_char, mode: *const c_char) -> *mut FILE, else ptr::null_mut();
    fn fopen64(path: *const c_char, mode: *const c_char) -> *mut FILE, else ptr::null_mut();
    fn fclose(stream: *mut FILE) -> c_int, else libc::EOF;

    fn access(path: *const c_char, mode: c_int) -> c_int, else -1;
    fn euidaccess(path: *const c_char, mode: c_int) -> c_int, else -1;
    fn eaccess(path: *const c_char, mode: c_int) -> c_int, else -1;
    fn faccessat(dir: c_int, path: *const c_char, mode: c_int, flags: c_int) -> c_int, else -1;
    fn stat(path: *const c_char, to: *mut Stat) -> c_int, else -1;
    fn stat64(path: *const c_char, to: *mut Stat) -> c_int, else -1;
    fn lstat(path: *const c_char, to: *mut Stat) -> c_int, else -1;
    fn lstat64(path: *const c_char, to: *mut Stat) -> c_int, else -1;
    fn fstatat(dir: c_int, path: *const c_char, to: *mut Stat, flags: c_int) -> c_int, else -1;
    fn fstatat64(dir: c_int, path: *const c_char, to: *mut Stat, flags: c_int) -> c_int, else -1;
    fn __xstat(version: c_int, path: *const c_char, to: *mut Stat) -> c_int, else -1;
    fn __xstat64(version: c_int, path: *const c_char, to: *mut Stat) -> c_int, else -1;
    fn __lxstat(version: c_int, path: *const c_char, to: *mut Stat) -> c_int, else -1;
    fn __lxstat64(version: c_int, path: *const c_char, to: *mut Stat) -> c_int, else -1;
    fn __fxstatat(
        version: c_int, dir: c_int, path: *const c_char, to: *mut Stat, flags: c_int,
    ) -> c_int, else -1;
    fn __fxstatat64(
        version: c_int, dir: c_int, path: *const c_char, to: *mut Stat, flags: c_int,
    ) -> c_int, else -1;
    fn statx(
        dir: c_int, path: *const c_char, flags: c_int, mask: c_uint, to: *mut Statx,
    ) -> c_int, else -1;

    fn ioctl(fd: c_int, request: c_ulong, argument: usize) -> c_int, else -1;

    fn read(fd: c_int, to: *mut c_void, len: usize) -> isize, else -1;
    fn pread(fd: c_int, to: *mut c_void, len: usize, offset: off_t) -> isize, else -1;
    fn pread64(fd: c_int, to: *mut c_void, len: usize, offset: off_t) -> isize, else -1;
    fn readv(fd: c_int, to: *const iovec, count: c_int) -> isize, else -1;
    fn preadv(fd: c_int, to: *const iovec, count: c_int, offset: off_t) -> isize, else -1;
    fn preadv64(fd: c_int, to: *const iovec, count: c_int, offset: off_t) -> isize, else -1;
    fn __read_chk(fd: c_int, to: *mut c_void, len: usize, room: usize) -> isize, else -1;
    fn __pread_chk(
        fd: c_int, to: *mut c_void, len: usize, offset: off_t, room: usize,
    ) -> isize, else -1;
    fn __pread64_chk(
        fd: c_int, to: *mut c_void, len: usize, offset: off_t, room: usize,
    ) -> isize, else -1;
    fn write(fd: c_int, from: *const c_void, len: usize) -> isize, else -1;
    fn pwrite(fd: c_int, from: *const c_void, len: usize, offset: off_t) -> isize, else -1;
    fn pwrite64(fd: c_int, from: *const c_void, len: usize, offset: off_t) -> isize, else -1;
    fn writev(fd: c_int, from: *const iovec, count: c_int) -> isize, else -1;
    fn pwritev(fd: c_int, from: *const iovec, count: c_int, offset: off_t) -> isize, else -1;
    fn pwritev64(fd: c_int, from: *const iovec, count: c_int, offset: off_t) -> isize, else -1;

    fn close(fd: c_int) -> c_int, else -1;
    fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int, else -1;
    fn closefrom(first: c_int) -> (), else ();
    fn dup(fd: c_int) -> c_int, else -1;
    fn dup2(old: c_int, new: c_int) -> c_int, else -1;
    fn dup3(old: c_int, new: c_int, flags: c_int) -> c_int, else -1;
    fn fcntl(fd: c_int, command: c_int, argument: usize) -> c_int, else -1;
    fn fcntl64(fd: c_int, command: c_int, argument: usize) -> c_int, else -1;

    fn fallocate(fd: c_int, mode: c_int, offset: off_t, len: off_t) -> c_int, else -1;
    fn fallocate64(fd: c_int, mode: c_int, offset: off_t, len: off_t) -> c_int, else -1;
    fn ftruncate(fd: c_int, len: off_t) -> c_int, else -1;
    fn ftruncate64(fd: c_int, len: off_t) -> c_int, else -1;
    fn truncate(path: *const c_char, len: off_t) -> c_int, else -1;
    fn truncate64(path: *const c_char, len: off_t) -> c_int, else -1;

    fn sigaction(signal: c_int, new: *const Action, old: *mut Action) -> c_int, else -1;
    fn signal(signal: c_int, handler: usize) -> usize, else libc::SIG_ERR;
    fn __sysv_signal(signal: c_int, handler: usize) -> usize, else libc::SIG_ERR;
    fn sigset(signal: c_int, handler: usize) -> usize, else libc::SIG_ERR;
    fn sigprocmask(how: c_int, new: *const sigset_t, old: *mut sigset_t) -> c_int, else -1;
    fn pthread_sigmask(
        how: c_int, new: *const sigset_t, old: *mut sigset_t,
    ) -> c_int, else libc::ENOSYS;
    fn pthread_cancel(thread: libc::pthread_t) -> c_int, else libc::ENOSYS;
    fn sigignore(signal: c_int) -> c_int, else -1;
    fn siginterrupt(signal: c_int, interrupt: c_int) -> c_int, else -1;
}
