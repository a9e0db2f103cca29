//! Page-modification logging: the processor writes down which frames it made dirty, and what it
//! wrote down becomes part of the dirty log (SPEC 6.9; SDM "Page-Modification Logging").
//!
//! Where it is used, the 4K leaves of a slot that logs stay writable; protecting a page again clears
//! D. The processor's log is drained whenever it leaves the guest, and by whoever asks for the dirty
//! log, who makes the processors leave first.

use crate::format::MmuFormat;
use crate::host::Host;
use crate::mmu::Mmu;
use crate::reader::Reader;
use crate::root::RootRole;
use crate::spte::AdBits;
use twofold_arch::{Gfn, Gpa};

impl<F: MmuFormat, H: Host> Mmu<F, H> {
    /// Whether virtual processors of this MMU have to keep a log of what they write and
    /// [drain](Self::drain_pml) it at every exit.
    pub fn logs_by_pml(&self) -> bool {
        F::HAS_PML && self.config.accessed_dirty && self.config.pml
    }

    /// Whether processors set accessed and dirty bits in the tables: bit 6 of an EPT pointer.
    pub fn has_accessed_dirty(&self) -> bool {
        F::TRACKED == 0 || self.config.accessed_dirty
    }

    /// How the leaves below a root for `role` tell what is used.
    pub(crate) fn ad_bits(&self, role: RootRole) -> AdBits {
        if !self.has_accessed_dirty() {
            AdBits::Off
        } else if self.logs_by_pml() && role.guest_mode {
            // The log would hold frames of the guest's own guest.
            AdBits::WriteProtect
        } else {
            AdBits::Hardware
        }
    }

    /// Marks every page that the processor of `reader` has logged since the last drain. Takes no
    /// lock and allocates nothing.
    ///
    /// # Panics
    /// If `reader` belongs to another MMU.
    pub fn drain_pml(&self, reader: &mut Reader, as_id: u16, log: impl Iterator<Item = Gpa>) {
        for gpa in log {
            self.mark_dirty(reader, as_id, gpa.frame());
        }
    }

    /// Marks the page dirty in the slot that holds it, if that slot logs: the hypervisor wrote
    /// there, or is about to. Returns false if the reader's dirty ring was full, so that the page
    /// could not be recorded; [`Reader::is_dirty_ring_soft_full`] tells long before.
    ///
    /// # Panics
    /// If `reader` belongs to another MMU.
    pub fn mark_dirty(&self, reader: &mut Reader, as_id: u16, gfn: Gfn) -> bool {
        let (state, mut sections, _) = reader.parts(self.id);
        let Some(space) = self.spaces.get(usize::from(as_id)) else {
            return true;
        };
        let section = sections.enter();
        match space.tree.find(gfn, &section) {
            Some(slot) => slot.mark_dirty(gfn, state),
            None => true,
        }
    }
}
