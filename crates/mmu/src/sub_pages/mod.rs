//! Sub-page write protection: which 128-byte pieces of a page the guest may write (SPEC 1).
//!
//! A program gives each frame an [`AccessMap`]. A frame whose map is full is not protected, and
//! nothing here concerns it. The leaf of a protected frame never has W. It has the bit that tells
//! the processor to ask the sub-page permission table (SPPT), wherever an unprotected frame's leaf
//! would have W; so whatever is done by taking W away and giving it back (dirty logging, access
//! tracking, copy on write) is done to that bit.
//!
//! Each address space has its maps and its table. The table is filled lazily: the first write that
//! the processor has to look up in a region of 2M is a miss, which fills the whole region from
//! the maps.
//!
//! What takes permissions away goes in this order: store the maps; wait for the faults that may
//! have read the old ones; cut the path through the table; weaken the leaves; flush once; return.

use crate::fault::{FaultError, Outcome};
use crate::format::MmuFormat;
use crate::host::Host;
use crate::mmu::Mmu;
use crate::reader::Reader;
use crate::root::{Root, RootRole};
use twofold_arch::sppt::AccessMap;
use twofold_arch::{Gfn, Gpa, Hpa};

/// The most pages that one call sets or gets maps of, so that none holds locks for long.
pub const SUB_PAGE_MAX_PAGES: usize = 512;

/// Why sub-page permissions cannot be enabled, set or read. Nothing has changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SubPageError {
    /// Processors of this format cannot protect sub-pages, or [`Mmu::enable_sub_pages`] was not called: `-ENODEV`.
    #[error("sub-page write protection is not enabled, or the processor has none")]
    NotEnabled,
    /// More than [`SUB_PAGE_MAX_PAGES`]: `-EINVAL`.
    #[error("{0} pages at once; at most 512 are possible")]
    TooManyPages(usize),
    /// The range wraps, or ends beyond 2^48 or the guest-physical addresses that the table can
    /// describe; or there is no such address space: `-EINVAL`.
    #[error("the range leaves the guest-physical addresses that can be protected")]
    Range,
    /// No slot has this frame: `-EFAULT`.
    #[error("no memory slot at gfn {:#x}", .0.get())]
    NoSlot(Gfn),
    /// The frame is private memory, which the hypervisor cannot protect: `-EINVAL`.
    #[error("gfn {:#x} is private memory", .0.get())]
    Private(Gfn),
    /// `-ENOMEM`.
    #[error("no memory for access maps or tables")]
    OutOfMemory,
}

impl<F: MmuFormat, H: Host> Mmu<F, H> {
    /// Makes sub-page permissions possible: from now on each address space has a table, which
    /// processors load with the root ([`sppt_root`](Self::sppt_root)). Once is enough; there is no
    /// way back. Slots may come before or after.
    ///
    /// # Errors
    /// [`SubPageError::NotEnabled`] where the format has no such permissions,
    /// [`SubPageError::OutOfMemory`].
    pub fn enable_sub_pages(&self) -> Result<(), SubPageError> {
        Err(SubPageError::NotEnabled)
    }

    /// Gives the frames of address space `as_id` from `first` on these access maps, all of them or
    /// none. When this returns, no write that the new maps forbid succeeds any more.
    ///
    /// # Errors
    /// See [`SubPageError`]; checked in the order in which they are listed there, slots and private
    /// memory frame by frame.
    pub fn set_access(
        &self,
        as_id: u16,
        first: Gfn,
        maps: &[AccessMap],
    ) -> Result<(), SubPageError> {
        let _ = (as_id, first, maps);
        Err(SubPageError::NotEnabled)
    }

    /// Reads the access maps of the frames of address space `as_id` from `first` on, as they are at
    /// one moment.
    ///
    /// # Errors
    /// As [`set_access`](Self::set_access), but private frames have maps to read, and nothing
    /// needs memory. `maps` is left as it is then.
    pub fn get_access(
        &self,
        as_id: u16,
        first: Gfn,
        maps: &mut [AccessMap],
    ) -> Result<(), SubPageError> {
        let _ = (as_id, first, maps);
        Err(SubPageError::NotEnabled)
    }

    /// Where the sub-page permission table for this role is: what goes into SPPTP. `None` until
    /// [`enable_sub_pages`](Self::enable_sub_pages); the same from then on.
    pub fn sppt_root(&self, role: RootRole) -> Option<Hpa> {
        let _ = role;
        None
    }

    /// Resolves an SPPT miss (exit reason 66): fills the 2M region of the table around `gpa` from
    /// the access maps. [`Outcome::Fixed`], or [`Outcome::Spurious`] if somebody was faster.
    ///
    /// # Errors
    /// [`FaultError::OutOfMemory`]; nothing has changed then.
    ///
    /// # Panics
    /// If `reader` belongs to another MMU.
    pub fn sppt_miss(
        &self,
        reader: &mut Reader,
        root: &Root,
        gpa: Gpa,
    ) -> Result<Outcome, FaultError> {
        let _ = (reader, root, gpa);
        Ok(Outcome::Spurious)
    }

    /// The first byte that a write of `bytes` bytes at `gpa`, all in one page, must not write, if
    /// there is one: for whoever writes guest memory in the guest's name without its processor.
    pub fn first_denied(&self, as_id: u16, gpa: Gpa, bytes: u64) -> Option<Gpa> {
        let _ = (as_id, gpa, bytes);
        None
    }
}
