//! Writes that signal an eventfd instead of leaving the guest (`KVM_IOEVENTFD`).
//!
//! Errors, in KVM's order, when one is attached: `EINVAL` for a length other than 0, 1, 2, 4 or 8,
//! for a range that wraps, for an unknown flag, and for a length of 0 together with a value to
//! match; `EBADF` or `EINVAL` when the descriptor is no eventfd; `EEXIST` when another at the same
//! address would answer the same write. Detaching one that is not there is `ENOENT`.

use super::Space;
use crate::eventfd::{EventFd, Identity};
use kvm_bindings::{
    kvm_ioeventfd, kvm_ioeventfd_flag_nr_datamatch, kvm_ioeventfd_flag_nr_deassign,
    kvm_ioeventfd_flag_nr_fast_mmio, kvm_ioeventfd_flag_nr_pio,
};
use rustix::io::Errno;

const DATAMATCH: u32 = 1 << kvm_ioeventfd_flag_nr_datamatch;
const PIO: u32 = 1 << kvm_ioeventfd_flag_nr_pio;
const DEASSIGN: u32 = 1 << kvm_ioeventfd_flag_nr_deassign;
/// The flags that a program may give: those below `KVM_IOEVENTFD_FLAG_FAST_MMIO`.
const VALID: u32 = (1 << kvm_ioeventfd_flag_nr_fast_mmio) - 1;

pub(super) fn is_deassign(request: &kvm_ioeventfd) -> bool {
    request.flags & DEASSIGN != 0
}

pub(super) fn space(request: &kvm_ioeventfd) -> Space {
    if request.flags & PIO != 0 {
        Space::Port
    } else {
        Space::Memory
    }
}

/// One attached eventfd.
#[derive(Debug)]
pub(super) struct IoEvent {
    address: u64,
    /// Bytes; 0 matches a write of any size.
    length: u32,
    datamatch: Option<u64>,
    eventfd: EventFd,
}

impl IoEvent {
    pub(super) fn from_user(request: &kvm_ioeventfd) -> Result<(Space, Self), Errno> {
        if !matches!(request.len, 0 | 1 | 2 | 4 | 8) {
            return Err(Errno::INVAL);
        }
        if request.addr.checked_add(request.len.into()).is_none() {
            return Err(Errno::INVAL);
        }
        if request.flags & !VALID != 0 {
            return Err(Errno::INVAL);
        }
        let datamatch = (request.flags & DATAMATCH != 0).then_some(request.datamatch);
        if request.len == 0 && datamatch.is_some() {
            return Err(Errno::INVAL);
        }
        let eventfd = EventFd::from_user(request.fd)?;
        let event = Self {
            address: request.addr,
            length: request.len,
            datamatch,
            eventfd,
        };
        Ok((space(request), event))
    }

    /// Whether both would answer some write.
    pub(super) fn collides(&self, other: &Self) -> bool {
        self.address == other.address
            && (self.length == 0
                || other.length == 0
                || self.length == other.length
                    && (self.datamatch.is_none()
                        || other.datamatch.is_none()
                        || self.datamatch == other.datamatch))
    }

    /// Whether this is the one that a program wants to detach.
    pub(super) fn is(&self, request: &kvm_ioeventfd, identity: Identity) -> bool {
        let datamatch = (request.flags & DATAMATCH != 0).then_some(request.datamatch);
        self.eventfd.identity() == identity
            && self.address == request.addr
            && self.length == request.len
            && self.datamatch == datamatch
    }

    /// Signals the eventfd if this write is for it. Whether it was.
    pub(super) fn signal(&self, address: u64, data: &[u8]) -> bool {
        if address != self.address {
            return false;
        }
        if self.length != 0 {
            if data.len() != self.length as usize {
                return false;
            }
            let mut value = [0; 8];
            value[..data.len()].copy_from_slice(data);
            if self
                .datamatch
                .is_some_and(|wanted| wanted != u64::from_le_bytes(value))
            {
                return false;
            }
        }
        if let Err(error) = self.eventfd.signal() {
            tracing::warn!(%error, address = format_args!("{address:#x}"), "ioeventfd is lost");
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use rustix::fd::OwnedFd;
    use std::os::fd::AsRawFd;

    fn request(fd: &OwnedFd, length: u32, datamatch: Option<u64>) -> kvm_ioeventfd {
        kvm_ioeventfd {
            datamatch: datamatch.unwrap_or(0),
            addr: 0x1000,
            len: length,
            fd: fd.as_raw_fd(),
            flags: if datamatch.is_some() { DATAMATCH } else { 0 },
            ..Default::default()
        }
    }

    #[test]
    fn only_the_matching_write_signals() {
        let fd = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let (_, event) = IoEvent::from_user(&request(&fd, 2, Some(0x1337))).unwrap();
        assert!(!event.signal(0x1000, &0x1338_u16.to_le_bytes()));
        assert!(!event.signal(0x1000, &0x1337_u32.to_le_bytes()));
        assert!(!event.signal(0x1002, &0x1337_u16.to_le_bytes()));
        assert!(event.signal(0x1000, &0x1337_u16.to_le_bytes()));
        let mut count = [0; 8];
        assert_eq!(rustix::io::read(&fd, &mut count), Ok(8));
        assert_eq!(u64::from_ne_bytes(count), 1);
    }

    #[test]
    fn bad_requests_get_kvms_errors() {
        let fd = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let error = |request: kvm_ioeventfd| IoEvent::from_user(&request).map(|_| ()).unwrap_err();
        assert_eq!(error(request(&fd, 3, None)), Errno::INVAL);
        assert_eq!(error(request(&fd, 0, Some(1))), Errno::INVAL);
        assert_eq!(
            error(kvm_ioeventfd {
                flags: 1 << 4,
                ..request(&fd, 4, None)
            }),
            Errno::INVAL
        );
        assert_eq!(
            error(kvm_ioeventfd {
                addr: u64::MAX,
                ..request(&fd, 4, None)
            }),
            Errno::INVAL
        );
        assert_eq!(
            error(kvm_ioeventfd {
                fd: -1,
                ..request(&fd, 4, None)
            }),
            Errno::BADF
        );
        let file = crate::shared::memfd("not-an-eventfd", 0).unwrap();
        assert_eq!(error(request(&file, 4, None)), Errno::INVAL);
    }
}
