//! What Twofold adds to the KVM API, for programs that use it: numbers and structures, and nothing
//! else.
//!
//! Everything that Linux has is in `kvm-bindings`; what is here has never been in a released kernel.
//! The C headers in `include/twofold` say the same, and a test of this crate compares the two and
//! lets a C compiler check every number, size and offset: a change of one that forgets the other
//! does not pass.
#![no_std]

pub mod spp;
