//! The slot of an address, found in the tree or remembered from the last fault.

use crate::format::MmuFormat;
use crate::host::Host;
use crate::mmu::Mmu;
use crate::reader::{Half, KnownSlot, Memory, Sections};
use twofold_arch::Gfn;

impl<F: MmuFormat, H: Host> Mmu<F, H> {
    /// The slot that holds `gfn`, remembered for the next fault.
    #[inline(always)]
    pub(crate) fn find_slot(
        &self,
        sections: &mut Sections<'_>,
        memory: &mut Memory,
        as_id: u16,
        gfn: Gfn,
    ) -> Option<KnownSlot> {
        match self.remembered_slot(memory, as_id, gfn) {
            Some(known) => Some(known),
            None => self.search_slot_apart(sections, memory, as_id, gfn),
        }
    }

    /// Whether a slot holds `gfn`, which is then the one that is remembered.
    #[inline(always)]
    pub(crate) fn remember_slot(
        &self,
        sections: &mut Sections<'_>,
        memory: &mut Memory,
        as_id: u16,
        gfn: Gfn,
    ) -> bool {
        self.remembers_slot(memory, as_id, gfn)
            || self
                .search_slot_apart(sections, memory, as_id, gfn)
                .is_some()
    }

    /// Whether the slot that was found last holds `gfn` and no slot has changed since.
    #[inline(always)]
    fn remembers_slot(&self, memory: &Memory, as_id: u16, gfn: Gfn) -> bool {
        let Some(space) = self.spaces.get(usize::from(as_id)) else {
            return false;
        };
        memory.slots[usize::from(as_id)]
            .as_ref()
            .is_some_and(|known| known.hint.is_of(space.generation()) && known.info.contains(gfn))
    }

    /// The slot that was found last, if it holds `gfn` and no slot has changed since.
    #[inline(always)]
    pub(crate) fn remembered_slot(
        &self,
        memory: &Memory,
        as_id: u16,
        gfn: Gfn,
    ) -> Option<KnownSlot> {
        match self.remembers_slot(memory, as_id, gfn) {
            true => memory.slots[usize::from(as_id)],
            false => None,
        }
    }

    /// [`search_slot`](Self::search_slot), out of the way of the faults that do not need it.
    #[cold]
    #[inline(never)]
    fn search_slot_apart(
        &self,
        sections: &mut Sections<'_>,
        memory: &mut Memory,
        as_id: u16,
        gfn: Gfn,
    ) -> Option<KnownSlot> {
        self.search_slot(sections, memory, as_id, gfn)
    }

    /// The slot that holds `gfn`, from the tree; remembered for the next fault.
    #[inline(always)]
    pub(crate) fn search_slot(
        &self,
        sections: &mut Sections<'_>,
        memory: &mut Memory,
        as_id: u16,
        gfn: Gfn,
    ) -> Option<KnownSlot> {
        let space = self.spaces.get(usize::from(as_id))?;
        let section = sections.enter();
        // Read before the tree: what is found is at least as new.
        let generation = space.generation();
        let found = space.tree.find_entry(gfn, &section)?;
        let known = KnownSlot {
            info: found.info(),
            hint: found.hint(generation),
            half: Half::Shared,
            prepared: false,
        };
        memory.slots[usize::from(as_id)] = Some(known);
        Some(known)
    }
}
