//! `ioctl`: the door to everything that KVM does.

// UNSAFETY: exports a function in libc's place.
#![expect(unsafe_code)]

use libc::{c_int, c_ulong};
use rustix::io::Errno;
use twofold_kvm::abi;

use crate::signals::Undisturbed;
use crate::{cancellation, memory, process, raw, real};

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C-unwind" fn ioctl(
    fd: c_int,
    request: c_ulong,
    argument: usize,
) -> c_int {
    process::settle();
    let result = if abi::is_cancellable() && abi::is_ours(fd) {
        cancellation::not_within(|| ask(fd, request, argument))
    } else {
        ask(fd, request, argument)
    };
    match result {
        Some(result) => result.unwrap_or_else(|reason| raw::fail(reason.raw_os_error())),
        None => {
            let change = memory::change_by_ioctl(request, argument);
            // SAFETY: the caller passes what libc's function asks for.
            let result = unsafe { real::ioctl(fd, request, argument) };
            drop(change);
            result
        }
    }
}

/// What KVM answers, if the descriptor is one of its.
#[inline]
fn ask(fd: c_int, request: c_ulong, argument: usize) -> Option<Result<c_int, Errno>> {
    let section = Undisturbed::begin();
    let result = abi::ioctl(fd, request, argument);
    // A handler that had to wait runs here.
    drop(section);
    result
}
