//! Eventfds that a program hands over.

use rustix::event::{PollFd, PollFlags};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

/// Our duplicates of the program's eventfds start at this number, out of its way.
const FIRST_DESCRIPTOR: i32 = 500;

/// Our duplicate of an eventfd.
#[derive(Debug)]
pub(crate) struct EventFd {
    file: OwnedFd,
    identity: Identity,
}

/// Which eventfd a descriptor is, however many descriptors it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity(u64);

impl EventFd {
    /// The eventfd that the program calls `fd`: `EBADF` if it is not open, `EINVAL` if it is
    /// something else.
    pub(crate) fn from_user(fd: i32) -> Result<Self, Errno> {
        let identity = identity(fd)?;
        let file = rustix::io::fcntl_dupfd_cloexec(borrow(fd)?, FIRST_DESCRIPTOR)?;
        Ok(Self { file, identity })
    }

    pub(crate) fn identity(&self) -> Identity {
        self.identity
    }

    /// Adds 1 to its count.
    ///
    /// # Errors
    /// Whatever writing gives. A count that is full is none.
    pub(crate) fn signal(&self) -> Result<(), Errno> {
        match rustix::io::write(&self.file, &1_u64.to_ne_bytes()) {
            Ok(_) | Err(Errno::AGAIN) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Takes its count, which a poll has found not to be 0.
    pub(crate) fn take(&self) {
        let mut count = [0; 8];
        // It fails only if somebody else has taken it, and without blocking only then.
        let _ = rustix::io::read(&self.file, &mut count);
    }

    /// For waiting until it is signalled.
    pub(crate) fn poll(&self) -> PollFd<'_> {
        PollFd::from_borrowed_fd(self.file.as_fd(), PollFlags::IN)
    }
}

fn borrow<'a>(fd: i32) -> Result<BorrowedFd<'a>, Errno> {
    if fd < 0 {
        return Err(Errno::BADF);
    }
    // UNSAFETY: borrows a number that the program calls a descriptor.
    #[expect(unsafe_code)]
    // SAFETY: it is only handed to system calls, which answer EBADF if it is none.
    Ok(unsafe { BorrowedFd::borrow_raw(fd) })
}

/// Which eventfd `fd` is: `EBADF` if it is not open, `EINVAL` if it is something else.
pub(crate) fn identity(fd: i32) -> Result<Identity, Errno> {
    rustix::io::fcntl_getfd(borrow(fd)?)?;
    let info = rustix::fs::open(
        format!("/proc/self/fdinfo/{fd}"),
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let mut text = [0; 1024];
    let length = rustix::io::read(&info, &mut text)?;
    let text = String::from_utf8_lossy(&text[..length]);
    text.lines()
        .find_map(|line| line.strip_prefix("eventfd-id:"))
        .and_then(|number| number.trim().parse().ok())
        .map(Identity)
        .ok_or(Errno::INVAL)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use std::os::fd::AsRawFd;

    #[test]
    fn descriptors_of_one_eventfd_are_the_same_eventfd() {
        let fd = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let other = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let copy = rustix::io::dup(&fd).unwrap();
        assert_eq!(identity(fd.as_raw_fd()), identity(copy.as_raw_fd()));
        assert_ne!(identity(fd.as_raw_fd()), identity(other.as_raw_fd()));
    }

    #[test]
    fn a_signal_is_taken_once() {
        let fd = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let event = EventFd::from_user(fd.as_raw_fd()).unwrap();
        event.signal().unwrap();
        event.signal().unwrap();
        event.take();
        let mut count = [0; 8];
        assert_eq!(rustix::io::read(&fd, &mut count), Err(Errno::AGAIN));
    }
}
