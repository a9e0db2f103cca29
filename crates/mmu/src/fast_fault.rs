//! Faults that need neither a lock nor the host (SPEC 6.6): MMIO that is remembered, and leaves that
//! lost permission only so that the next access is noticed.

use crate::format::MmuFormat;
use crate::host::Host;
use crate::mmu::Mmu;
use crate::reader::{Counter, KnownSlot, Memory, ReaderState, Sections};
use crate::region::RegionFlags;
use crate::root::RootState;
use crate::slots::SlotTree;
use crate::spte::{self, AdBits, PRIVATE, Writable};
use crate::{Fault, Outcome};
use twofold_arch::{Level, Pferr};
use twofold_table::{Entry, Height};

/// How often a leaf that others change is looked at before the slow path has its turn.
const ATTEMPTS: u32 = 4;

impl<F: MmuFormat, H: Host> Mmu<F, H> {
    /// A fault on an entry that was present for the processor, or that access tracking may have
    /// made look empty. `None` if the host has to be asked.
    #[cold]
    #[inline(never)]
    pub(crate) fn fast_fault(
        &self,
        state: &ReaderState,
        sections: &mut Sections<'_>,
        memory: &mut Memory,
        root: &RootState,
        fault: Fault,
    ) -> Option<Outcome> {
        if fault.error.contains(Pferr::RSVD) {
            return self.remembered_mmio(sections, root, fault);
        }
        let write = fault.error.is_write();
        // Where processors set accessed bits, only W is ever taken to notice something.
        if !write && root.ad != AdBits::Off {
            return None;
        }
        let known = match write {
            true => Some(self.find_slot(sections, memory, root.role.as_id(), fault.gpa.frame())?),
            false => None,
        };
        for _ in 0..ATTEMPTS {
            match self.restore_leaf(state, sections, root, known.as_ref(), fault) {
                Restored::Done(outcome) => return Some(outcome),
                Restored::NotHere => return None,
                Restored::Raced => {}
            }
        }
        None
    }

    /// A reserved bit: an entry that says "no memory", if it still does.
    fn remembered_mmio(
        &self,
        sections: &mut Sections<'_>,
        root: &RootState,
        fault: Fault,
    ) -> Option<Outcome> {
        let space = self.spaces.get(usize::from(root.role.as_id()))?;
        let section = sections.enter();
        if root.is_obsolete() {
            return Some(Outcome::ObsoleteRoot);
        }
        let table = self.table_in(root, &section);
        if fault.gpa.get() >= table.end() {
            return None;
        }
        let seen = table.lookup(fault.gpa, Height::LEAF);
        match self.mmio {
            Some(mmio) if seen.entry::<F>() == Entry::Special && mmio.matches(seen.value()) => mmio
                .is_fresh(seen.value(), space.generation())
                .then_some(Outcome::Mmio),
            // Someone has changed it since the processor looked.
            _ => Some(Outcome::Retry),
        }
    }

    /// Gives a leaf back what was taken from it to notice the next access, with one exchange.
    /// `known` is the slot of a write.
    fn restore_leaf(
        &self,
        state: &ReaderState,
        sections: &mut Sections<'_>,
        root: &RootState,
        known: Option<&KnownSlot>,
        fault: Fault,
    ) -> Restored {
        let gfn = fault.gpa.frame();
        let section = sections.enter();
        if root.is_obsolete() {
            return Restored::Done(Outcome::ObsoleteRoot);
        }
        let table = self.table_in(root, &section);
        if fault.gpa.get() >= table.end() {
            return Restored::NotHere;
        }
        let seen = table.lookup(fault.gpa, Height::LEAF);
        if seen.entry::<F>() != Entry::Leaf {
            return Restored::NotHere;
        }
        if spte::allows::<F>(seen.value(), fault.error) {
            return Restored::Done(Outcome::Spurious);
        }
        let Some(level) = Level::from_number(seen.place().height().get()) else {
            return Restored::NotHere;
        };
        let mut new = spte::used::<F>(seen.value());
        if let Some(known) = known
            && spte::writable::<F>(new) == Some(Writable::Logged)
        {
            // A large leaf of a slot that logs is split first.
            if level != Level::L4K && known.info.flags.contains(RegionFlags::LOG_DIRTY) {
                return Restored::NotHere;
            }
            let guarded = new & PRIVATE == 0 && self.guards(known.info.as_id, gfn, level);
            // So is one that has become too large.
            if guarded && level != Level::L4K {
                return Restored::NotHere;
            }
            new = spte::with_write::<F>(new, guarded);
        }
        if !spte::allows::<F>(new, fault.error) {
            return Restored::NotHere;
        }
        if let Some(known) = known {
            let Some(space) = self.spaces.get(usize::from(known.info.as_id)) else {
                return Restored::NotHere;
            };
            let slot = match SlotTree::recall(known.hint, space.generation(), &section) {
                Some(slot) => slot,
                None => match space.tree.find(gfn, &section) {
                    Some(slot) if slot.info == known.info && !slot.is_invalid() => slot,
                    _ => return Restored::NotHere,
                },
            };
            // Before the page can be written; see `dirty_log_get`.
            if !slot.mark_dirty(gfn, state) {
                return Restored::Done(Outcome::Retry);
            }
        }
        if table.widen(seen, new).is_err() {
            return Restored::Raced;
        }
        state.count(Counter::Fast);
        Restored::Done(Outcome::Fixed { level })
    }
}

/// What became of an attempt to restore a leaf.
enum Restored {
    Done(Outcome),
    /// There is nothing that one exchange could give back.
    NotHere,
    /// Someone else has changed the entry.
    Raced,
}
