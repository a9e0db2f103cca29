//! The calls that close and copy descriptors.
//!
//! Twofold's descriptors are descriptors of the kernel's, so libc does the work. What is done here
//! is to tell [`abi`] which numbers name its objects.

// UNSAFETY: exports functions in libc's place.
#![expect(unsafe_code)]

use libc::{c_int, c_uint};
use twofold_kvm::abi;

use crate::signals::Undisturbed;
use crate::{process, real};

/// Notes that `fd` is about to be closed.
#[inline]
pub(crate) fn closing(fd: c_int) {
    if abi::is_ours(fd) {
        if process::is_borrowed() {
            return;
        }
        process::settle();
    }
    let _section = Undisturbed::begin();
    abi::closing(fd);
}

/// Notes that `new` was made a copy of `old`, whatever it was before.
#[inline]
fn duplicated(old: c_int, new: c_int) {
    if new < 0 || old == new || !(abi::is_ours(old) || abi::is_ours(new)) || process::is_borrowed()
    {
        return;
    }
    process::settle();
    let _section = Undisturbed::begin();
    if abi::is_ours(new) {
        abi::closing(new);
    }
    if abi::is_ours(old) {
        abi::duplicated(old, new);
    }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn close(fd: c_int) -> c_int {
    closing(fd);
    // SAFETY: the caller answers for the descriptor.
    unsafe { real::close(fd) }
}

/// Notes that all descriptors from `first` to `last` are about to be closed.
fn closing_range(first: c_uint, last: c_uint) {
    if !process::is_borrowed() {
        process::settle();
        let _section = Undisturbed::begin();
        abi::closing_range(first, last);
    }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int {
    if flags as c_uint & libc::CLOSE_RANGE_CLOEXEC == 0 && first <= last {
        closing_range(first, last);
    }
    // SAFETY: the caller answers for the descriptors.
    unsafe { real::close_range(first, last, flags) }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn closefrom(first: c_int) {
    closing_range(c_uint::try_from(first).unwrap_or(0), c_uint::MAX);
    // SAFETY: the caller answers for the descriptors.
    unsafe { real::closefrom(first) }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn dup(fd: c_int) -> c_int {
    // SAFETY: a copy of a descriptor harms nothing.
    let new = unsafe { real::dup(fd) };
    duplicated(fd, new);
    new
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn dup2(old: c_int, new: c_int) -> c_int {
    // SAFETY: the caller answers for what `new` was.
    let result = unsafe { real::dup2(old, new) };
    duplicated(old, result);
    result
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn dup3(old: c_int, new: c_int, flags: c_int) -> c_int {
    // SAFETY: the caller answers for what `new` was.
    let result = unsafe { real::dup3(old, new, flags) };
    duplicated(old, result);
    result
}

macro_rules! fcntl_functions {
    ($($name:ident)*) => { $(
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C" fn $name(fd: c_int, command: c_int, argument: usize) -> c_int {
            // SAFETY: the caller passes what libc's function asks for.
            let result = unsafe { real::$name(fd, command, argument) };
            if matches!(command, libc::F_DUPFD | libc::F_DUPFD_CLOEXEC) {
                duplicated(fd, result);
            }
            result
        }
    )* };
}

fcntl_functions! { fcntl fcntl64 }
