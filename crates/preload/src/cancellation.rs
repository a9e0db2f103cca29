//! Threads that let themselves be cancelled at any moment (`PTHREAD_CANCEL_ASYNCHRONOUS`).
//!
//! libc cancels such a thread by a signal, whose handler unwinds its stack from wherever it is. With
//! the kernel's KVM that interrupts `KVM_RUN` as every signal does. Here it would unwind out of the
//! middle of an instruction of the guest. So while such a thread is in an `ioctl` of KVM it is one
//! that is cancelled only where it says; whoever cancels it has its `KVM_RUN` end; and when it
//! changes back, libc cancels it there.

// UNSAFETY: exports functions in libc's place, and calls one of libc's that may unwind.
#![expect(unsafe_code)]

use libc::{c_int, pthread_t};
use std::ptr;
use twofold_kvm::abi;

use crate::real;

/// Values of `pthread.h` that the `libc` crate does not have.
const DEFERRED: c_int = 0;
const ASYNCHRONOUS: c_int = 1;

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn pthread_setcanceltype(kind: c_int, before: *mut c_int) -> c_int {
    // SAFETY: the call has no condition.
    let thread = unsafe { libc::pthread_self() } as usize;
    if kind == ASYNCHRONOUS {
        abi::set_cancellable(thread, true);
    }
    // SAFETY: the caller passes what libc's function asks for.
    let result = unsafe { set_type(kind, before) };
    if kind != ASYNCHRONOUS {
        abi::set_cancellable(thread, false);
    }
    result
}

#[unsafe(no_mangle)]
unsafe extern "C" fn pthread_cancel(thread: pthread_t) -> c_int {
    // SAFETY: the caller passes what libc's function asks for.
    let result = unsafe { real::pthread_cancel(thread) };
    abi::interrupt_run_of(thread as usize);
    result
}

/// Runs `work` in a thread that may be cancelled at any moment, but not in the middle of `work`.
/// Does not return if it has been cancelled meanwhile.
pub(crate) fn not_within<R>(work: impl FnOnce() -> R) -> R
where
    R: Copy,
{
    // SAFETY: a null pointer says that the type before is not wanted.
    unsafe { set_type(DEFERRED, ptr::null_mut()) };
    let result = work();
    // SAFETY: as above. If this unwinds, nothing here has to be dropped.
    unsafe { set_type(ASYNCHRONOUS, ptr::null_mut()) };
    result
}

/// libc's `pthread_setcanceltype`, which unwinds if the thread has been cancelled.
unsafe fn set_type(kind: c_int, before: *mut c_int) -> c_int {
    type SetType = unsafe extern "C-unwind" fn(c_int, *mut c_int) -> c_int;
    let address = real::PTHREAD_SETCANCELTYPE.address();
    if address.is_null() {
        return libc::ENOSYS;
    }
    // SAFETY: the dynamic linker gave the address of the function of this name.
    let real = unsafe { std::mem::transmute::<*mut libc::c_void, SetType>(address) };
    // SAFETY: the caller passes what the function asks for.
    unsafe { real(kind, before) }
}
