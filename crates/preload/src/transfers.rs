//! The calls that read and write files: of KVM's, only those with statistics can be read.

// UNSAFETY: exports functions in libc's place.
#![expect(unsafe_code)]
#![allow(
    non_snake_case,
    reason = "libc's names for its checked variants begin with underscores"
)]

use libc::{c_int, c_void, iovec, off_t};
use rustix::io::Errno;
use twofold_kvm::abi;

use crate::signals::Undisturbed;
use crate::{process, raw, real};

/// Why `fd` cannot be read; `None` if it can, or is not ours.
#[inline]
fn refusal(fd: c_int, before: fn(c_int) -> Option<Errno>) -> Option<Errno> {
    if !abi::is_ours(fd) {
        return None;
    }
    process::settle();
    let _section = Undisturbed::begin();
    before(fd)
}

macro_rules! transfer_functions {
    ($($before:ident: $name:ident($($argument:ident: $kind:ty),*);)*) => { $(
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C" fn $name(fd: c_int $(, $argument: $kind)*) -> isize {
            if let Some(reason) = refusal(fd, abi::$before) {
                return raw::fail(reason.raw_os_error()) as isize;
            }
            // SAFETY: the caller passes what libc's function asks for.
            unsafe { real::$name(fd $(, $argument)*) }
        }
    )* };
}

transfer_functions! {
    before_read: read(to: *mut c_void, len: usize);
    before_read: pread(to: *mut c_void, len: usize, offset: off_t);
    before_read: pread64(to: *mut c_void, len: usize, offset: off_t);
    before_read: readv(to: *const iovec, count: c_int);
    before_read: preadv(to: *const iovec, count: c_int, offset: off_t);
    before_read: preadv64(to: *const iovec, count: c_int, offset: off_t);
    before_read: __read_chk(to: *mut c_void, len: usize, room: usize);
    before_read: __pread_chk(to: *mut c_void, len: usize, offset: off_t, room: usize);
    before_read: __pread64_chk(to: *mut c_void, len: usize, offset: off_t, room: usize);
    before_write: write(from: *const c_void, len: usize);
    before_write: pwrite(from: *const c_void, len: usize, offset: off_t);
    before_write: pwrite64(from: *const c_void, len: usize, offset: off_t);
    before_write: writev(from: *const iovec, count: c_int);
    before_write: pwritev(from: *const iovec, count: c_int, offset: off_t);
    before_write: pwritev64(from: *const iovec, count: c_int, offset: off_t);
}
