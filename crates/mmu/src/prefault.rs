//! Mapping memory before it is used: `KVM_PRE_FAULT_MEMORY` (SPEC 3.2).
//!
//! It acts like a read by the guest that leaves no trace: no copy on write is broken, no entry is
//! accessed or dirty, no page counts as written. What is mapped already stays as it is. A
//! range is a range here: the host is asked for many pages at once, and their entries are written in one
//! read section.

use crate::fault::{Fault, FaultError, Outcome};
use crate::filter::Conversion;
use crate::format::MmuFormat;
use crate::guest_memory::{AccessKind, PrivateMemory};
use crate::host::{Host, HostPage, PopulateError};
use crate::invalidation::Snapshot;
use crate::map::{self, small_leaf};
use crate::mmu::Mmu;
use crate::reader::{KnownSlot, Memory, Reader, ReaderState, Sections};
use crate::root::{Root, RootState};
use crate::sync::atomic::Ordering;
use alloc::vec::Vec;
use core::ops::Range;
use twofold_arch::{Gfn, Gpa, Hpa, Level, PAGE_SHIFT, PAGE_SIZE, Pferr};
use twofold_table::{BuildError, Cursor, Entry, Height, Storage, Table};

/// Why memory cannot be mapped ahead.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PrefaultError {
    /// There is no slot: `-ENOENT`.
    #[error("no memory slot")]
    NoSlot,
    /// The slot is being deleted or moved: `-EAGAIN`.
    #[error("the slot is changing")]
    SlotChanges,
    /// Something else is changing; to be tried again.
    #[error("memory is changing")]
    Retry,
    /// Load another root and try again.
    #[error("the root is obsolete")]
    ObsoleteRoot,
    /// A fault would end like this.
    #[error(transparent)]
    Fault(#[from] FaultError),
}

/// What one step can say about its first frame.
enum Step {
    /// So many frames are done.
    Done(u64),
    /// Somebody was faster.
    Again,
}

/// How often a step looks again before it gives the caller the chance to do something else.
const ATTEMPTS: u32 = 8;
/// Kind of an access that is no access: the attribute decides.
const BY_ATTRIBUTE: PrivateMemory = PrivateMemory {
    access: AccessKind::ByAttribute,
    conversion: Conversion::ZapOpposite,
};

impl<F: MmuFormat, H: Host> Mmu<F, H> {
    /// Maps the first frames of `gfns`, which is not empty, as reads would. Returns how many are mapped
    /// now: at least one, and no more than one page of 2M or 1G holds. The rest is for further
    /// calls, so that the caller can look for signals in between.
    ///
    /// # Errors
    /// See [`PrefaultError`]; for the first frame, and nothing is done then.
    ///
    /// # Panics
    /// If `reader` belongs to another MMU.
    pub fn prefault(
        &self,
        reader: &mut Reader,
        root: &Root,
        gfns: Range<Gfn>,
    ) -> Result<u64, PrefaultError> {
        let (state, mut sections, memory) = reader.parts(self.id);
        for _ in 0..ATTEMPTS {
            let step = self.prefault_step(state, &mut sections, memory, &root.state, &gfns)?;
            if let Step::Done(frames) = step {
                let wanted = gfns.end.get().saturating_sub(gfns.start.get());
                return Ok(frames.min(wanted));
            }
        }
        Err(PrefaultError::Retry)
    }

    fn prefault_step(
        &self,
        state: &ReaderState,
        sections: &mut Sections<'_>,
        memory: &mut Memory,
        root: &RootState,
        gfns: &Range<Gfn>,
    ) -> Result<Step, PrefaultError> {
        let gfn = gfns.start;
        let snapshot = self.invalidation.snapshot();
        let Some(known) = self.find_slot(sections, memory, root.role.as_id(), gfn) else {
            return Err(match self.is_private(gfn) {
                true => FaultError::WrongKind { private: true }.into(),
                false => PrefaultError::NoSlot,
            });
        };
        let mut known = match self.config.private_memory {
            None => known,
            Some(_) => match self.half_of(BY_ATTRIBUTE, sections, known, gfn, Pferr::USER)? {
                Some(known) => known,
                None => return Err(PrefaultError::SlotChanges),
            },
        };
        // It was shared a moment ago, or this would not be the root to map it in.
        if known.is_private() && self.mirror.is_completed() {
            return Ok(Step::Again);
        }
        known.prepared = true;
        {
            let section = sections.enter();
            match self.slot_of(&known, gfn, &section) {
                Some(slot) if !slot.is_invalid() => {}
                _ => return Err(PrefaultError::SlotChanges),
            }
            if root.is_obsolete() {
                return Err(PrefaultError::ObsoleteRoot);
            }
            let table = self.table_in(root, &section);
            if gfn.address().get() >= table.end() {
                return Err(PrefaultError::NoSlot);
            }
            let seen = table.lookup(gfn.address(), Height::LEAF);
            if seen.entry::<F>() == Entry::Leaf && seen.place().height() > Height::LEAF {
                let frames = F::bytes(seen.place().height()) >> PAGE_SHIFT;
                return Ok(Step::Done(frames - gfn.get() % frames));
            }
        }
        if self.largest_level(&known.info, gfn) > Level::L4K {
            let mut page = [NO_PAGE];
            let address = known.info.hva_of(gfn);
            let (found, error) = self
                .host()
                .populate_range(address, known.is_private(), &mut page);
            if found == 0 {
                return self.not_there(&known, snapshot, error);
            }
            let [mut page] = page;
            page.level = page.level.max(self.host().mapping_level(address));
            if self.mapping_level(&known.info, gfn, &page) > Level::L4K {
                return self
                    .prefault_page(state, sections, memory, root, &known, snapshot, gfn, page);
            }
        }
        self.prefault_small(state, sections, memory, root, &known, snapshot, gfns)
    }

    /// The host has no page.
    fn not_there(
        &self,
        known: &KnownSlot,
        snapshot: Snapshot,
        error: Option<PopulateError>,
    ) -> Result<Step, PrefaultError> {
        let reason = match error {
            Some(PopulateError::Again) | None => return Err(PrefaultError::Retry),
            Some(PopulateError::Interrupted) => return Err(FaultError::Interrupted.into()),
            Some(PopulateError::Poisoned) => FaultError::poisoned(known),
            Some(PopulateError::Fault) => FaultError::bad(known),
        };
        // As for a fault: only if nothing has changed since the slot was looked up.
        match self.refused(known, snapshot, reason) {
            Ok(_) => Ok(Step::Again),
            Err(reason) => Err(reason.into()),
        }
    }

    /// Maps one page of the host, of whatever size.
    #[expect(clippy::too_many_arguments, reason = "the state of one fault")]
    fn prefault_page(
        &self,
        state: &ReaderState,
        sections: &mut Sections<'_>,
        memory: &mut Memory,
        root: &RootState,
        known: &KnownSlot,
        snapshot: Snapshot,
        gfn: Gfn,
        page: HostPage,
    ) -> Result<Step, PrefaultError> {
        let fault = Fault {
            gpa: gfn.address(),
            error: Pferr::USER,
        };
        match self.map_anywhere(state, sections, memory, root, known, snapshot, fault, page)? {
            Some(Outcome::Fixed { level }) => {
                Ok(Step::Done(level.frames() - gfn.get() % level.frames()))
            }
            Some(Outcome::Spurious) => Ok(Step::Done(1)),
            Some(Outcome::ObsoleteRoot) => Err(PrefaultError::ObsoleteRoot),
            Some(Outcome::Retry | Outcome::Mmio | Outcome::SubPageDenied) | None => Ok(Step::Again),
        }
    }

    /// Maps 4K pages up to the next multiple of 2M.
    #[expect(clippy::too_many_arguments, reason = "the state of one fault")]
    fn prefault_small(
        &self,
        state: &ReaderState,
        sections: &mut Sections<'_>,
        memory: &mut Memory,
        root: &RootState,
        known: &KnownSlot,
        snapshot: Snapshot,
        gfns: &Range<Gfn>,
    ) -> Result<Step, PrefaultError> {
        let first = gfns.start;
        let end = self.end_of_run(known, gfns);
        let mut pages = Vec::new();
        let count = (end.get() - first.get()) as usize;
        if pages.try_reserve_exact(count).is_err() {
            return Err(FaultError::OutOfMemory.into());
        }
        pages.resize(count, NO_PAGE);
        let address = known.info.hva_of(first);
        let (found, error) = self
            .host()
            .populate_range(address, known.is_private(), &mut pages);
        let Some(pages) = pages.get(..found).filter(|pages| !pages.is_empty()) else {
            return self.not_there(known, snapshot, error);
        };
        let end = Gfn::new(first.get() + found as u64);
        let levels = usize::from(F::MAX_HEIGHT.get());
        if !memory.pool.fill(self.host(), levels - 1) {
            return Err(FaultError::OutOfMemory.into());
        }
        let made = {
            let section = sections.enter();
            let addresses = address..address + (found as u64) * PAGE_SIZE;
            if !self.invalidation.allows(snapshot, addresses) {
                return Ok(Step::Again);
            }
            let stands = self
                .slot_of(known, first, &section)
                .is_some_and(|slot| !slot.is_invalid());
            if !stands || self.end_of_run(known, &(first..end)) != end {
                return Ok(Step::Again);
            }
            if root.is_obsolete() {
                return Err(PrefaultError::ObsoleteRoot);
            }
            // What all of them have in common; 4K pages may be executed in any case.
            let read_only = bits::<F>(known, root, false, false);
            let writable = bits::<F>(known, root, true, false);
            let guarded = bits::<F>(known, root, true, true);
            let as_id = known.info.as_id;
            // All of them are in one region of 2M.
            let may_guard = !known.is_private() && self.guards(as_id, first, Level::L2M);
            let leaf = |gpa: Gpa| {
                let number = gpa.frame().get().wrapping_sub(first.get()) as usize;
                match pages.get(number) {
                    Some(page)
                        if page.writable
                            && may_guard
                            && self.guards(as_id, gpa.frame(), Level::L4K) =>
                    {
                        page.hpa.get() | guarded
                    }
                    Some(page) if page.writable => page.hpa.get() | writable,
                    Some(page) => page.hpa.get() | read_only,
                    None => F::EMPTY,
                }
            };
            let range = first.address()..end.address();
            let table = self.table_in(root, &section);
            match table.map_range(range.clone(), Height::LEAF, leaf, &mut memory.pool) {
                Ok(made) if made == found as u64 || is_mapped(table, range) => made,
                Ok(made) => {
                    self.mapped[0].fetch_add(made, Ordering::Relaxed);
                    drop(section);
                    return self.prefault_each(
                        state, sections, memory, root, known, snapshot, first, pages,
                    );
                }
                Err(BuildError::OutOfPages | BuildError::Raced) => return Ok(Step::Again),
            }
        };
        self.mapped[0].fetch_add(made, Ordering::Relaxed);
        Ok(Step::Done(found as u64))
    }

    /// Maps pages among which something is that is no leaf: entries that remember the absence of
    /// memory, for instance.
    #[cold]
    #[expect(clippy::too_many_arguments, reason = "the state of one fault")]
    fn prefault_each(
        &self,
        state: &ReaderState,
        sections: &mut Sections<'_>,
        memory: &mut Memory,
        root: &RootState,
        known: &KnownSlot,
        snapshot: Snapshot,
        first: Gfn,
        pages: &[HostPage],
    ) -> Result<Step, PrefaultError> {
        for (number, page) in pages.iter().enumerate() {
            let gfn = Gfn::new(first.get() + number as u64);
            let step =
                self.prefault_page(state, sections, memory, root, known, snapshot, gfn, *page);
            match step {
                Ok(Step::Done(_)) => {}
                _ if number > 0 => return Ok(Step::Done(number as u64)),
                other => return other,
            }
        }
        Ok(Step::Done(pages.len() as u64))
    }

    /// The end of the frames from the first on that are in one slot, one table and of one kind.
    fn end_of_run(&self, known: &KnownSlot, gfns: &Range<Gfn>) -> Gfn {
        let table = gfns.start.align_down(Level::L2M.frames()).get() + Level::L2M.frames();
        let end = gfns.end.get().min(known.info.end().get()).min(table);
        if self.kind_stands(known, gfns.start, Level::L2M) {
            return Gfn::new(end);
        }
        let other = |gfn: &u64| !self.kind_stands(known, Gfn::new(*gfn), Level::L4K);
        let mut frames = gfns.start.get()..end;
        Gfn::new(frames.find(other).unwrap_or(end))
    }
}

/// Whether there is a leaf everywhere in the range.
fn is_mapped<F: MmuFormat, S: Storage>(table: Table<'_, F, S>, range: Range<Gpa>) -> bool {
    let mut cursor = Cursor::new(table, range);
    while let Some(seen) = cursor.next() {
        if !matches!(seen.entry::<F>(), Entry::Leaf | Entry::Table(_)) {
            return false;
        }
    }
    true
}

const NO_PAGE: HostPage = HostPage {
    hpa: Hpa::new(0),
    writable: false,
    level: Level::L4K,
};

/// A small leaf without its address.
fn bits<F: MmuFormat>(known: &KnownSlot, root: &RootState, writable: bool, guarded: bool) -> u64 {
    let page = HostPage {
        writable,
        ..NO_PAGE
    };
    map::entry::<F>(known, small_leaf(known, &page, root.ad, guarded))
}
