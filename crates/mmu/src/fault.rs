//! Second-stage faults (SPEC 6.5).
//!
//! A fault takes no lock. It takes a snapshot of the invalidation sequence, finds the slot, has
//! the host make the page present (which may block), and then, in a read section, makes sure that
//! nothing it relied on has changed and publishes one entry with one compare-exchange.

use crate::format::MmuFormat;
use crate::host::{Host, PopulateError};
use crate::invalidation::Snapshot;
use crate::mmio::MmioFault;
use crate::mmu::Mmu;
use crate::reader::{Counter, Half, KnownSlot, Memory, Reader, ReaderState, Sections};
use crate::region::RegionFlags;
use crate::root::{Root, RootState};
use crate::slots::UPDATE_IN_PROGRESS;
use crate::spte::AdBits;
use twofold_arch::{Gpa, Level, Pferr};
use twofold_table::{Entry, Height};

/// A second-stage fault as the processor reports it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fault {
    /// The guest-physical address.
    pub gpa: Gpa,
    /// The access and why it failed. An EPT misconfiguration is [`Pferr::RSVD`].
    pub error: Pferr,
}

/// What became of a fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// A mapping at this level allows the access now.
    Fixed {
        /// The level of the leaf.
        level: Level,
    },
    /// The access had been allowed by another processor meanwhile.
    Spurious,
    /// Something is changing; run the guest again.
    Retry,
    /// No slot, or a write to a read-only slot: the access is MMIO.
    Mmio,
    /// The root is no longer valid: load a new one, then run the guest again.
    ObsoleteRoot,
    /// A write to a sub-page that must not be written, or by the processor's walk of the guest's own
    /// page tables to a page of which any must not: the program is told (an SPP exit), and nothing
    /// was written.
    SubPageDenied,
}

/// Why a fault cannot be resolved.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FaultError {
    /// The slot's host memory is not there, or does not allow the access: `-EFAULT`.
    #[error("host memory of the slot is not accessible")]
    BadHostMemory,
    /// The slot's host memory is known to be bad: `-EHWPOISON`.
    #[error("host memory of the slot is poisoned")]
    Poisoned,
    /// The access is private and the memory is not, or the other way round; or the memory is private
    /// and there is no slot with a private half: `-EFAULT` with `KVM_EXIT_MEMORY_FAULT`.
    #[error("the access is of the wrong kind, private or shared")]
    WrongKind {
        /// The access was private.
        private: bool,
    },
    /// [`BadHostMemory`](Self::BadHostMemory) of the private half: the guest memory file is gone.
    #[error("private memory of the slot is not accessible")]
    BadPrivateMemory,
    /// [`Poisoned`](Self::Poisoned) of the private half.
    #[error("private memory of the slot is poisoned")]
    PoisonedPrivate,
    /// A signal came while host memory was being made present: `-EINTR`.
    #[error("interrupted by a signal")]
    Interrupted,
    /// No page for a table could be had: `-ENOMEM`.
    #[error("no memory for a table page")]
    OutOfMemory,
    /// The owner of the external tables has refused something it should not have
    /// ([`Mmu::bug`]): the VM is dead, `-EIO`.
    #[error("the tables of private memory are not as they should be; the VM cannot go on")]
    Bugged,
}

impl FaultError {
    /// The host has no page for this half of the slot.
    pub(crate) const fn bad(known: &KnownSlot) -> Self {
        match known.half {
            Half::Shared => Self::BadHostMemory,
            Half::Private { .. } => Self::BadPrivateMemory,
        }
    }

    /// The page of this half of the slot is poisoned.
    pub(crate) const fn poisoned(known: &KnownSlot) -> Self {
        match known.half {
            Half::Shared => Self::Poisoned,
            Half::Private { .. } => Self::PoisonedPrivate,
        }
    }
}

/// How often a fault looks again before it lets the guest try.
const ATTEMPTS: u32 = 8;

impl<F: MmuFormat, H: Host> Mmu<F, H> {
    /// Resolves a second-stage fault.
    ///
    /// # Errors
    /// See [`FaultError`]; nothing has changed then.
    ///
    /// # Panics
    /// If `reader` belongs to another MMU.
    #[inline]
    pub fn fault(
        &self,
        reader: &mut Reader,
        root: &Root,
        fault: Fault,
    ) -> Result<Outcome, FaultError> {
        let (state, mut sections, memory) = reader.parts(self.id);
        state.count(Counter::Taken);
        let outcome = self.resolve(state, &mut sections, memory, &root.state, fault)?;
        state.count_outcome(outcome);
        Ok(outcome)
    }

    #[inline(always)]
    fn resolve(
        &self,
        state: &ReaderState,
        sections: &mut Sections<'_>,
        memory: &mut Memory,
        root: &RootState,
        fault: Fault,
    ) -> Result<Outcome, FaultError> {
        let error = fault.error;
        let gfn = fault.gpa.frame();
        if self.denies(root.role.as_id(), fault) {
            return Ok(Outcome::SubPageDenied);
        }
        if (error.intersects(Pferr::RSVD.union(Pferr::PRESENT)) || root.ad == AdBits::Off)
            && let Some(outcome) = self.fast_fault(state, sections, memory, root, fault)
        {
            return Ok(outcome);
        }
        for _ in 0..ATTEMPTS {
            let snapshot = self.invalidation.snapshot();
            if !self.remember_slot(sections, memory, root.role.as_id(), gfn) {
                if self.is_private(gfn) {
                    return Err(self.private_without_slot(error));
                }
                return self.no_slot(state, sections, memory, root, fault.gpa);
            }
            // Looked at where it is remembered, since copying it would be most of what a fault does.
            let Some(known) = &memory.slots[usize::from(root.role.as_id())] else {
                return Ok(Outcome::Retry);
            };
            let half;
            let known = match self.config.private_memory {
                None => known,
                Some(policy) => match self.half_of(policy, sections, *known, gfn, error)? {
                    Some(known) => {
                        half = known;
                        &half
                    }
                    None => return Ok(Outcome::Retry),
                },
            };
            if error.is_write() && known.info.flags.contains(RegionFlags::READONLY) {
                return Ok(Outcome::Mmio);
            }
            let address = known.info.hva_of(gfn);
            let populated = match known.half {
                Half::Shared => self.host().populate(address, error.is_write()),
                Half::Private { .. } => self.host().populate_private(address, error.is_write()),
            };
            let page = match populated {
                Ok(page) if error.is_write() && !page.writable => {
                    return self.refused(known, snapshot, FaultError::bad(known));
                }
                Ok(page) => page,
                Err(error) => return self.not_populated(known, snapshot, error),
            };
            let leaf_table = &mut memory.leaf_table;
            if let Some(outcome) = self.map_in_table(
                state, sections, leaf_table, root, known, snapshot, fault, &page,
            ) {
                return Ok(outcome);
            }
            let known = *known;
            let mapped =
                self.map_anywhere(state, sections, memory, root, &known, snapshot, fault, page)?;
            if let Some(outcome) = mapped {
                return Ok(outcome);
            }
        }
        Ok(Outcome::Retry)
    }

    /// The host has no page for a fault.
    #[cold]
    pub(crate) fn not_populated(
        &self,
        known: &KnownSlot,
        snapshot: Snapshot,
        error: PopulateError,
    ) -> Result<Outcome, FaultError> {
        match error {
            PopulateError::Fault => self.refused(known, snapshot, FaultError::bad(known)),
            PopulateError::Poisoned => self.refused(known, snapshot, FaultError::poisoned(known)),
            PopulateError::Interrupted => Err(FaultError::Interrupted),
            PopulateError::Again => Ok(Outcome::Retry),
        }
    }

    /// The host has refused a page. That is `reason` enough to fail only if the slot and its memory
    /// have stood still since they were looked up: a program may delete a slot and unmap its
    /// memory while a fault on it is in flight, and nothing waits for a fault that asks the host.
    #[cold]
    pub(crate) fn refused(
        &self,
        known: &KnownSlot,
        snapshot: Snapshot,
        reason: FaultError,
    ) -> Result<Outcome, FaultError> {
        let slot_stands = self
            .spaces
            .get(usize::from(known.info.as_id))
            .is_some_and(|space| known.hint.is_of(space.generation()));
        if slot_stands && self.invalidation.is_quiet_since(snapshot) {
            Err(reason)
        } else {
            Ok(Outcome::Retry)
        }
    }

    /// No slot: the access is MMIO. An entry that says so spares the next access the search.
    #[cold]
    #[inline(never)]
    fn no_slot(
        &self,
        state: &ReaderState,
        sections: &mut Sections<'_>,
        memory: &mut Memory,
        root: &RootState,
        gpa: Gpa,
    ) -> Result<Outcome, FaultError> {
        let (Some(mmio), Some(space)) =
            (self.mmio, self.spaces.get(usize::from(root.role.as_id())))
        else {
            return Ok(Outcome::Mmio);
        };
        // With every page that could be needed at hand one attempt is enough; without, the access
        // is MMIO all the same.
        let enough = memory
            .pool
            .fill(self.host(), usize::from(F::MAX_HEIGHT.get()) - 1);
        if !enough && self.config.mmio == MmioFault::Violation {
            // Only the entry tells the guest.
            return Err(FaultError::OutOfMemory);
        }
        let section = sections.enter();
        let generation = space.generation();
        if space.tree.find(gpa.frame(), &section).is_some() {
            return Ok(Outcome::Retry);
        }
        let table = self.table_in(root, &section);
        if !enough
            || generation & UPDATE_IN_PROGRESS != 0
            || root.is_obsolete()
            || gpa.get() >= table.end()
        {
            return Ok(Outcome::Mmio);
        }
        let seen = table.lookup(gpa, Height::LEAF);
        let entry = mmio.encode(gpa.frame(), generation);
        if !matches!(seen.entry::<F>(), Entry::Empty | Entry::Special) {
            return Ok(Outcome::Retry);
        }
        if seen.value() == entry {
            return Ok(Outcome::Mmio);
        }
        if table
            .link_leaf(seen, gpa, Height::LEAF, entry, &mut memory.pool)
            .is_ok()
        {
            state.count(Counter::MmioCreated);
        }
        Ok(Outcome::Mmio)
    }
}
