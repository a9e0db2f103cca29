//! Making descriptors, and what the kernel would refuse to do with them.

use crate::fd_table;
use crate::object::Object;
use rustix::fd::OwnedFd;
use std::os::fd::{IntoRawFd, RawFd};

/// Makes a descriptor refer to an object. The descriptor's number.
pub(crate) fn install(file: OwnedFd, object: Object) -> RawFd {
    let fd = file.into_raw_fd();
    fd_table::insert(fd, object);
    fd
}
