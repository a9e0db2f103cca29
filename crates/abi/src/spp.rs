//! Sub-page write protection: guest memory that is write-protected in pieces of 128 bytes.
//!
//! `docs/spp.md` tells what the calls do, in which order to use them and what they answer. The same
//! for programs in C: `include/twofold/kvm_spp.h`.
//!
//! ```
//! use twofold_abi::spp::*;
//!
//! // Of the page at 0x1000 nothing may be written but its second 128 bytes.
//! let request = SubPages::new(0x1000 >> 12, [0b10]);
//! // ioctl(vm, KVM_SUBPAGES_SET_ACCESS, &request)
//! assert_eq!((request.header.npages, request.access_map[0]), (1, 2));
//! ```
#![allow(non_camel_case_types)] // The names are those of the C header.

/// The type of KVM's ioctls, in bits 15:8 of their numbers.
const KVMIO: u32 = 0xae;

const fn ioctl(direction: u32, function: u32) -> u32 {
    direction << 30 | (size_of::<kvm_subpage>() as u32) << 16 | KVMIO << 8 | function
}

macro_rules! constants {
    ($($(#[$about:meta])* $name:ident = $value:expr;)*) => {
        $($(#[$about])* pub const $name: u32 = $value;)*

        /// Every number of this module, by its name in the C header.
        pub const NUMBERS: &[(&str, u32)] = &[$((stringify!($name), $name),)*];
    };
}

constants! {
    /// The capability. `KVM_CHECK_EXTENSION` answers [`KVM_SUBPAGE_MAX_PAGES`], or 0 where the
    /// processor has no sub-page permissions; `KVM_ENABLE_CAP` on a VM turns them on.
    KVM_CAP_X86_SPP = 10182;
    /// Why `KVM_RUN` returned: the guest wanted to write where it must not. The details are a
    /// [`kvm_spp_exit`].
    KVM_EXIT_SPP = 10029;
    /// Pages that one call gets or sets the maps of, at most.
    KVM_SUBPAGE_MAX_PAGES = 512;
    /// Bytes that one bit of a map stands for.
    KVM_SUBPAGE_SIZE = 128;
    /// The map of a page that is not protected: what every page has at first.
    KVM_SUBPAGE_FULL_ACCESS = 0xffff_ffff;
    /// ioctl on a VM: reads access maps. Answers the number of pages.
    KVM_SUBPAGES_GET_ACCESS = ioctl(3, 0xf0);
    /// ioctl on a VM: sets access maps, all of them or none. Answers the number of pages.
    KVM_SUBPAGES_SET_ACCESS = ioctl(1, 0xf1);
}

/// What [`KVM_SUBPAGES_GET_ACCESS`] and [`KVM_SUBPAGES_SET_ACCESS`] take, in front of its maps:
/// `npages` words of 32 bits, in which bit *i* is set if bytes `128 * i` to `128 * i + 127` of the
/// page may be written.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct kvm_subpage {
    /// The first page: its guest-physical address divided by 4096.
    pub gfn_base: u64,
    /// How many pages follow each other.
    pub npages: u32,
    /// There are none yet: 0.
    pub flags: u32,
    /// Where the maps begin.
    pub access_map: [u32; 0],
}

/// The details of [`KVM_EXIT_SPP`], where `struct kvm_run` has the union of its exits (byte 32).
///
/// The instruction has not happened. The program may widen the map and run the vCPU again; or
/// advance RIP by `insn_len`, which drops the write and whatever else the instruction does; or do
/// the instruction's work itself and advance RIP.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct kvm_spp_exit {
    /// The guest-physical address of the first byte that must not be written.
    pub addr: u64,
    /// Bytes of the instruction at RIP. 0 if the write is not that of an instruction: an event was
    /// being delivered, or the processor walked the guest's page tables.
    pub insn_len: u8,
    /// 0.
    pub pad: [u8; 7],
}

/// A request with room for the maps of `N` pages.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SubPages<const N: usize> {
    /// What the maps are about.
    pub header: kvm_subpage,
    /// The maps of the pages, one after the other.
    pub access_map: [u32; N],
}

impl<const N: usize> SubPages<N> {
    /// A request about `N` pages from `gfn` on.
    ///
    /// # Panics
    /// If `N` is more than [`KVM_SUBPAGE_MAX_PAGES`].
    pub const fn new(gfn: u64, access_map: [u32; N]) -> Self {
        assert!(N <= KVM_SUBPAGE_MAX_PAGES as usize);
        let header = kvm_subpage {
            gfn_base: gfn,
            npages: N as u32,
            flags: 0,
            access_map: [],
        };
        Self { header, access_map }
    }
}
