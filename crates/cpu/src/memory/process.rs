//! Accesses to memory of this process that may not be there, for the hypervisor's own use: the same
//! landing places as a guest's accesses, without a guest.
#![expect(unsafe_code)]
// UNSAFETY: reads and writes at addresses that somebody else chose.

use super::access::{self, Datum};
use core::ptr;

/// The memory is not there, or does not allow the access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Missing;

/// Makes the page at `address` present: for reading by a load, for writing by a locked exchange
/// that changes nothing.
///
/// # Errors
/// [`Missing`] if nothing is mapped there or it does not allow the access.
///
/// # Safety
/// A handler of SIGSEGV and SIGBUS that asks [`fixup`](crate::fixup) is installed. The memory is
/// the program's, to which atomic accesses that change nothing may be made at any time.
#[inline]
pub unsafe fn touch(address: usize, write: bool) -> Result<(), Missing> {
    let pointer: *mut u8 = ptr::with_exposed_provenance_mut(address);
    // SAFETY: the caller's; memory that is not there is found out.
    unsafe {
        if write {
            u8::compare_exchange(pointer, 0, 0).map(drop)
        } else {
            u8::load(pointer).map(drop)
        }
    }
    .map_err(|_| Missing)
}

/// Copies bytes in from `address`. What was copied before memory was found missing stays in
/// `buffer`.
///
/// # Errors
/// [`Missing`] if not all of it can be read.
///
/// # Safety
/// A handler of SIGSEGV and SIGBUS that asks [`fixup`](crate::fixup) is installed; `buffer` has
/// room for `length` bytes.
#[inline]
pub unsafe fn copy_in(buffer: *mut u8, address: usize, length: usize) -> Result<(), Missing> {
    // SAFETY: the caller's.
    unsafe { access::copy(buffer, ptr::with_exposed_provenance(address), length) }
        .map_err(|_| Missing)
}

/// Copies bytes out to `address`. What was copied before memory was found missing stays there.
///
/// # Errors
/// [`Missing`] if not all of it can be written.
///
/// # Safety
/// A handler of SIGSEGV and SIGBUS that asks [`fixup`](crate::fixup) is installed; `buffer` holds
/// `length` bytes; the memory at `address` is the program's to have written.
#[inline]
pub unsafe fn copy_out(address: usize, buffer: *const u8, length: usize) -> Result<(), Missing> {
    // SAFETY: the caller's.
    unsafe { access::copy(ptr::with_exposed_provenance_mut(address), buffer, length) }
        .map_err(|_| Missing)
}
