//! Private memory: slots with two halves, and which of them an access means (SPEC 5.2, 5.4).
//!
//! The shared half of a slot is memory of the hypervisor's program; the private half is in a guest
//! memory file, to which a slot is bound when it is created. What such a file is, is the
//! hypervisor's business. It gives each byte of its files an address (of its own making, the same
//! for the whole life of the file), and the MMU asks it for pages at such addresses
//! ([`Host::populate_private`]). A hole in a file, and its release, are announced like changes of
//! other host memory, and take exactly those mappings that pointed there.
//!
//! Which half of a frame exists for the guest, its attribute says. A change stores the new
//! attributes, waits for the faults that may have seen the old ones, and then takes the mappings of
//! the other half. So a fault either sees the change inside its read section and looks again, or
//! its mapping is there to be taken.

use crate::fault::FaultError;
use crate::filter::{Conversion, RangeOperation};
use crate::format::MmuFormat;
use crate::host::Host;
use crate::mmu::Mmu;
use crate::reader::{Half, KnownSlot, Sections};
use crate::region::{ADDRESS_SPACES, RegionErrorKind, RegionFlags};
use crate::slots::{Slot, SlotInfo, SlotTree};
use core::ops::Range;
use twofold_arch::{Gfn, Level, Pferr};
use twofold_table::Section;

/// What private memory is like in a type of VM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PrivateMemory {
    /// Who says whether an access is private.
    pub access: AccessKind,
    /// What a change of attributes takes out of the tables.
    pub conversion: Conversion,
}

/// Who says whether an access is private.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AccessKind {
    /// The attribute of the frame, at the time of the fault: the guest's processor knows no
    /// difference. (Software-protected VMs.)
    ByAttribute,
    /// The processor, with [`Pferr::PRIVATE_ACCESS`].
    ByProcessor,
}

/// Why a slot cannot be bound to a guest memory file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum GuestMemoryError {
    /// There is no such file: `-EBADF`.
    #[error("no such descriptor")]
    BadDescriptor,
    /// Not a guest memory file of this VM, or not one of that size: `-EINVAL`.
    #[error("not a guest memory file of this VM that is large enough")]
    Unsuitable,
    /// Another slot is bound to a part of it: `-EEXIST`.
    #[error("another slot is bound to this part of it")]
    Overlap,
}

impl GuestMemoryError {
    /// Which errno KVM returns.
    pub const fn kind(self) -> RegionErrorKind {
        match self {
            Self::BadDescriptor => RegionErrorKind::BadDescriptor,
            Self::Unsuitable => RegionErrorKind::Invalid,
            Self::Overlap => RegionErrorKind::Exists,
        }
    }
}

/// Why attributes cannot be set. Nothing has changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum AttributeError {
    /// The VM has no private memory, or the range is empty or not one of guest-physical addresses.
    #[error("no frames that can have attributes")]
    Range,
    /// `-ENOMEM`.
    #[error("no memory for attributes")]
    OutOfMemory,
}

impl KnownSlot {
    /// The fault is about private memory.
    #[inline(always)]
    pub(crate) const fn is_private(&self) -> bool {
        matches!(self.half, Half::Private { .. })
    }

    /// The slot as the tree has it.
    pub(crate) const fn slot_info(&self) -> SlotInfo {
        let mut info = self.info;
        if let Half::Private { shared } = self.half {
            info.hva = shared;
        }
        info
    }

    /// Whether `slot` is the slot that was found, half and all.
    pub(crate) fn is_still(&self, slot: &Slot) -> bool {
        slot.info == self.slot_info()
            && !slot.is_invalid()
            && (!self.is_private() || slot.private == Some(self.info.hva))
    }
}

impl<F: MmuFormat, H: Host> Mmu<F, H> {
    /// Whether `gfn` is private.
    #[inline]
    pub fn is_private(&self, gfn: Gfn) -> bool {
        self.config.private_memory.is_some() && self.attributes.is_private(gfn)
    }

    /// `KVM_SET_MEMORY_ATTRIBUTES`: makes `gfns` private or shared, all of them or none. What the
    /// guest had mapped of the other half is gone when this returns. Setting what is set already
    /// touches nothing.
    ///
    /// # Errors
    /// See [`AttributeError`].
    pub fn set_attributes(&self, gfns: Range<Gfn>, private: bool) -> Result<(), AttributeError> {
        let Some(policy) = self.config.private_memory else {
            return Err(AttributeError::Range);
        };
        if gfns.is_empty() || !self.attributes.covers(&gfns) {
            return Err(AttributeError::Range);
        }
        let _slots = self.lock_slots();
        if self.attributes.all(&gfns, private) {
            return Ok(());
        }
        self.attributes
            .reserve(&gfns)
            .map_err(|_| AttributeError::OutOfMemory)?;
        let nothing_mapped = {
            let mut writer = self.lock();
            self.attributes.set(&gfns, private);
            // Without a root there is no mapping, and a fault needs one.
            let nothing_mapped = writer.roots.is_empty();
            if !nothing_mapped {
                let _readers = self.synchronize(&mut writer);
            }
            nothing_mapped
        };
        if let Some(filter) = policy.conversion.filter(private)
            && !nothing_mapped
        {
            for as_id in 0..ADDRESS_SPACES as u16 {
                self.zap_range(&RangeOperation {
                    as_id,
                    gfns: gfns.clone(),
                    filter,
                    may_block: true,
                });
            }
        }
        Ok(())
    }

    /// Which half of the slot an access means: `None` if the slot has changed meanwhile.
    ///
    /// # Errors
    /// [`FaultError::WrongKind`] if the access is of the wrong kind, or the slot has no private half.
    #[cold]
    #[inline(never)]
    pub(crate) fn half_of(
        &self,
        policy: PrivateMemory,
        sections: &mut Sections<'_>,
        known: KnownSlot,
        gfn: Gfn,
        error: Pferr,
    ) -> Result<Option<KnownSlot>, FaultError> {
        let private = self.attributes.is_private(gfn);
        if policy.access == AccessKind::ByProcessor
            && error.contains(Pferr::PRIVATE_ACCESS) != private
        {
            return Err(FaultError::WrongKind { private: !private });
        }
        if !private {
            return Ok(Some(known));
        }
        if !known.info.flags.contains(RegionFlags::GUEST_MEMFD) {
            return Err(FaultError::WrongKind { private });
        }
        let section = sections.enter();
        let address = self
            .slot_of(&known, gfn, &section)
            .and_then(|slot| slot.private);
        Ok(address.map(|address| {
            let mut known = known;
            known.half = Half::Private {
                shared: known.info.hva,
            };
            known.info.hva = address;
            known
        }))
    }

    /// The slot that was found, if it still is what it was.
    #[inline(always)]
    pub(crate) fn slot_of<'s>(
        &'s self,
        known: &KnownSlot,
        gfn: Gfn,
        section: &'s Section<'_>,
    ) -> Option<&'s Slot> {
        let space = self.spaces.get(usize::from(known.info.as_id))?;
        match SlotTree::recall(known.hint, space.generation(), section) {
            Some(slot) => Some(slot),
            // The slots are changing, perhaps elsewhere.
            None => space
                .tree
                .find(gfn, section)
                .filter(|slot| known.is_still(slot)),
        }
    }

    /// Whether the page of this level around `gfn` still is of the kind that the fault is about.
    /// To be asked inside the read section that publishes the mapping.
    #[inline(always)]
    pub(crate) fn kind_stands(&self, known: &KnownSlot, gfn: Gfn, level: Level) -> bool {
        self.config.private_memory.is_none() || self.kind_is(known, gfn, level)
    }

    #[inline(never)]
    fn kind_is(&self, known: &KnownSlot, gfn: Gfn, level: Level) -> bool {
        self.attributes.is_private(gfn) == known.is_private()
            && self.attributes.is_uniform(gfn, level)
    }
}
