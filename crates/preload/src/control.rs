//! `ioctl`: the door to everything that KVM does.

// UNSAFETY: exports a function in libc's place.
#![expect(unsafe_code)]

use libc::{c_int, c_ulong};
use twofold_kvm::abi;

use crate::{memory, process, raw, real, signals};

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, argument: usize) -> c_int {
    process::settle();
    match abi::ioctl(fd, request, argument) {
        // SAFETY: the caller passes what libc's function asks for.
        None => unsafe {
            let change = memory::change_by_ioctl(request, argument);
            let result = real::ioctl(fd, request, argument);
            drop(change);
            result
        },
        Some(result) => {
            // A handler that had to wait for the end of KVM_RUN runs in here. It may leave with
            // `longjmp`, and it may change `errno`.
            signals::deliver_deferred();
            result.unwrap_or_else(|reason| raw::fail(reason.raw_os_error()))
        }
    }
}
