//! `ioctl`: the door to everything that KVM does.

// UNSAFETY: exports a function in libc's place.
#![expect(unsafe_code)]

use libc::{c_int, c_ulong};
use twofold_kvm::abi;

use crate::signals::Undisturbed;
use crate::{memory, process, raw, real};

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, argument: usize) -> c_int {
    process::settle();
    let section = Undisturbed::begin();
    let result = abi::ioctl(fd, request, argument);
    // A handler that had to wait runs here.
    drop(section);
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
