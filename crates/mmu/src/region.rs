//! What `KVM_SET_USER_MEMORY_REGION` asks for, and why it is refused.

use bitflags::bitflags;

bitflags! {
    /// Flags of a memory region, numbered as in KVM's API.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct RegionFlags: u32 {
        /// `KVM_MEM_LOG_DIRTY_PAGES`: writes are recorded.
        const LOG_DIRTY = 1 << 0;
        /// `KVM_MEM_READONLY`: writes exit as MMIO.
        const READONLY = 1 << 1;
        /// `KVM_MEM_GUEST_MEMFD`: the slot has a private half, in a guest memory file.
        const GUEST_MEMFD = 1 << 2;
    }
}

/// Address spaces of a VM: 0 normal, 1 system management mode.
pub const ADDRESS_SPACES: usize = 2;
/// Slot ids that a program may use: 0 to 32763.
pub const USER_SLOTS: usize = 32764;
/// Most pages that one slot may have.
pub const MAX_SLOT_PAGES: u64 = (1 << 31) - 1;

/// A request to create, move, change or (with size 0) delete a slot, exactly as the program gave
/// it: nothing has been checked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Region {
    /// Slot id in bits 15:0, address space in bits 31:16.
    pub slot: u32,
    /// [`RegionFlags`]; unknown bits are refused.
    pub flags: u32,
    /// First guest-physical address, in bytes.
    pub gpa: u64,
    /// Size in bytes; 0 deletes.
    pub size: u64,
    /// First host-virtual address, in bytes.
    pub hva: u64,
}

/// Why a region is refused. [`kind`](Self::kind) says which errno KVM returns for it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RegionError {
    /// An unknown flag, or flags that exclude each other.
    #[error("flags {0:#x} are unknown here or exclude each other")]
    Flags(u32),
    /// The size is not a multiple of the page size.
    #[error("the size is not a multiple of the page size")]
    Size,
    /// The guest-physical address is not page aligned.
    #[error("the guest-physical address is not page aligned")]
    GpaAlignment,
    /// The host-virtual address is not page aligned, or the range leaves user space.
    #[error("the host-virtual range is not page aligned user memory")]
    Hva,
    /// No such slot id or address space.
    #[error("slot id or address space out of range")]
    Id,
    /// The guest-physical range wraps.
    #[error("the guest-physical range wraps")]
    Wraps,
    /// More than [`MAX_SLOT_PAGES`], or too many pages in all slots together.
    #[error("too many pages")]
    TooManyPages,
    /// Deletion of a slot that does not exist.
    #[error("no such slot")]
    NoSuchSlot,
    /// A change that no slot allows: other host address, other size, other READONLY flag.
    #[error("only address and dirty logging of a slot can change")]
    Immutable,
    /// The range overlaps another slot of the same address space.
    #[error("overlaps another slot")]
    Overlap,
    /// The range ends beyond what the tables can map.
    #[error("beyond the guest-physical addresses that the tables can map")]
    BeyondTables,
    /// The guest memory file does not fit.
    #[error("guest memory file: {0}")]
    GuestMemory(crate::guest_memory::GuestMemoryError),
    /// No memory for the slot's own data.
    #[error("out of memory")]
    OutOfMemory,
}

/// The errno that belongs to a [`RegionError`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RegionErrorKind {
    /// `-EINVAL`.
    Invalid,
    /// `-EEXIST`.
    Exists,
    /// `-ENOMEM`.
    NoMemory,
    /// `-EBADF`.
    BadDescriptor,
}

impl RegionError {
    /// Which errno KVM returns.
    pub const fn kind(self) -> RegionErrorKind {
        match self {
            Self::Overlap => RegionErrorKind::Exists,
            Self::OutOfMemory => RegionErrorKind::NoMemory,
            Self::GuestMemory(error) => error.kind(),
            _ => RegionErrorKind::Invalid,
        }
    }
}
