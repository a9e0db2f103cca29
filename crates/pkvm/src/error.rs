//! Why a call was refused.

use core::fmt;

/// Why a call was refused, with the number that Linux has for it. A refused call has changed
/// nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
pub enum Error {
    /// The page is not in the state that the call needs, or is not the caller's.
    NotPermitted = 1,
    /// There is no such VM, vCPU or mapping.
    NotFound = 2,
    /// The mapping has another size than the call is about.
    TooBig = 7,
    /// Something has changed meanwhile; look again.
    Again = 11,
    /// No page for a table, or no free slot.
    NoMemory = 12,
    /// Not memory.
    Fault = 14,
    /// Still in use.
    Busy = 16,
    /// There is one already.
    Exists = 17,
    /// Nothing has been set up for this.
    NoDevice = 19,
    /// An argument makes no sense.
    Invalid = 22,
    /// The page was taken from the guest by force.
    Poisoned = 133,
}

impl Error {
    /// Every error.
    pub const ALL: [Self; 11] = [
        Self::NotPermitted,
        Self::NotFound,
        Self::TooBig,
        Self::Again,
        Self::NoMemory,
        Self::Fault,
        Self::Busy,
        Self::Exists,
        Self::NoDevice,
        Self::Invalid,
        Self::Poisoned,
    ];

    /// The value that a hypercall returns: the negative number.
    pub const fn code(self) -> i64 {
        -(self as i64)
    }

    /// The error that [`code`](Self::code) returned.
    pub fn from_code(code: i64) -> Option<Self> {
        Self::ALL.into_iter().find(|error| error.code() == code)
    }

    /// The name that Linux has for it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NotPermitted => "EPERM",
            Self::NotFound => "ENOENT",
            Self::TooBig => "E2BIG",
            Self::Again => "EAGAIN",
            Self::NoMemory => "ENOMEM",
            Self::Fault => "EFAULT",
            Self::Busy => "EBUSY",
            Self::Exists => "EEXIST",
            Self::NoDevice => "ENODEV",
            Self::Invalid => "EINVAL",
            Self::Poisoned => "EHWPOISON",
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl core::error::Error for Error {}
