//! Addresses and frame numbers that do not mix.
//!
//! A guest-physical address ([`Gpa`]) is what a guest's own page tables produce; a host-physical
//! address ([`Hpa`]) is what a second-stage table turns it into. [`Gfn`] and [`Hfn`] are the same
//! in frames of 4 KiB.

use core::fmt;

/// log2 of the page size.
pub const PAGE_SHIFT: u32 = 12;
/// Bytes in a page: 4096.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident, $frame:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(u64);

        impl $name {
            /// Wraps an address in bytes.
            pub const fn new(address: u64) -> Self {
                Self(address)
            }

            /// The address in bytes.
            pub const fn get(self) -> u64 {
                self.0
            }

            #[doc = concat!("The ", $what, " frame that holds this address.")]
            pub const fn frame(self) -> $frame {
                $frame(self.0 >> PAGE_SHIFT)
            }

            /// The offset within the 4 KiB page, in bytes.
            pub const fn page_offset(self) -> u64 {
                self.0 & (PAGE_SIZE - 1)
            }

            /// This address plus `bytes`, or `None` on overflow.
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(sum) => Some(Self(sum)),
                    None => None,
                }
            }

            /// Whether the address is a multiple of `bytes`, a power of two.
            pub const fn is_aligned(self, bytes: u64) -> bool {
                self.0 & (bytes - 1) == 0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }
    };
}

macro_rules! frame {
    ($(#[$doc:meta])* $name:ident, $address:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(u64);

        impl $name {
            /// Wraps a frame number.
            pub const fn new(frame: u64) -> Self {
                Self(frame)
            }

            /// The frame number.
            pub const fn get(self) -> u64 {
                self.0
            }

            /// The address of the frame's first byte. Frame numbers above 2^52 lose their top bits.
            pub const fn address(self) -> $address {
                $address(self.0 << PAGE_SHIFT)
            }

            /// This frame number plus `frames`, or `None` on overflow.
            pub const fn checked_add(self, frames: u64) -> Option<Self> {
                match self.0.checked_add(frames) {
                    Some(sum) => Some(Self(sum)),
                    None => None,
                }
            }

            /// The first frame of the naturally aligned block of `frames` (a power of two) that
            /// holds this frame.
            pub const fn align_down(self, frames: u64) -> Self {
                Self(self.0 & !(frames - 1))
            }

            /// Whether the frame number is a multiple of `frames`, a power of two.
            pub const fn is_aligned(self, frames: u64) -> bool {
                self.0 & (frames - 1) == 0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

address!(
    /// A guest-physical address in bytes.
    Gpa,
    Gfn,
    "guest"
);
address!(
    /// A host-physical address in bytes. In the software KVM it is a host-virtual address.
    Hpa,
    Hfn,
    "host"
);
frame!(
    /// A guest frame number: a guest-physical address in units of 4 KiB.
    Gfn,
    Gpa
);
frame!(
    /// A host frame number: a host-physical address in units of 4 KiB.
    Hfn,
    Hpa
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_its_frame_and_its_offset() {
        let gpa = Gpa::new(0x1234_5678);
        assert_eq!(gpa.frame(), Gfn::new(0x12345));
        assert_eq!(gpa.page_offset(), 0x678);
        assert_eq!(gpa.frame().address().get() + gpa.page_offset(), gpa.get());
    }

    #[test]
    fn addition_that_would_wrap_is_refused() {
        assert_eq!(Gpa::new(u64::MAX).checked_add(1), None);
        assert_eq!(Gfn::new(u64::MAX).checked_add(1), None);
        assert_eq!(Hpa::new(1).checked_add(2), Some(Hpa::new(3)));
    }

    #[test]
    fn frames_align_to_blocks() {
        assert_eq!(Gfn::new(0x3ff).align_down(512), Gfn::new(0x200));
        assert!(Gfn::new(0x200).is_aligned(512));
        assert!(!Gfn::new(0x201).is_aligned(512));
    }
}
