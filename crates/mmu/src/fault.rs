//! Second-stage faults (SPEC 6.5).
//!
//! A fault takes no lock. It takes a snapshot of the invalidation sequence, finds the slot, has
//! the host make the page present (which may block), and then, in a read section, makes sure that
//! nothing it relied on has changed and publishes one entry with one compare-exchange.

use crate::format::MmuFormat;
use crate::host::{Host, HostPage, PopulateError};
use crate::invalidation::Snapshot;
use crate::mmu::Mmu;
use crate::nx_huge_pages::NX_SPLIT;
use crate::reader::{Counter, Half, KnownSlot, Memory, Reader, ReaderState, Sections};
use crate::region::RegionFlags;
use crate::root::{Root, RootState};
use crate::slots::UPDATE_IN_PROGRESS;
use crate::spte::{self, AdBits, Leaf, Writable};
use crate::tables::{LeafTable, Pages};
use twofold_arch::{Gfn, Gpa, Hpa, Level, Pferr};
use twofold_table::{BuildError, Debt, Entry, Height, Section, Seen, Table};

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

/// What an attempt to map came to.
enum Attempt {
    Done(Outcome),
    /// So many table pages are needed first, outside the read section.
    NeedPages(usize),
    /// No leaf of this size may be here; try the next smaller size.
    Smaller,
    /// A larger leaf than 4K could be here: how large is the host's page?
    AskHost,
    /// Someone changed the entry; look again.
    Again,
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
        match outcome {
            Outcome::Fixed { .. } => state.count(Counter::Fixed),
            Outcome::Spurious => state.count(Counter::Spurious),
            Outcome::Mmio => state.count(Counter::Emulate),
            Outcome::Retry | Outcome::ObsoleteRoot => state.count(Counter::Retry),
        }
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
        if (error.intersects(Pferr::RSVD.union(Pferr::PRESENT)) || root.ad == AdBits::Off)
            && let Some(outcome) = self.fast_fault(state, sections, memory, root, fault)
        {
            return Ok(outcome);
        }
        for _ in 0..ATTEMPTS {
            let snapshot = self.invalidation.snapshot();
            if !self.remember_slot(sections, memory, root.role.as_id(), gfn) {
                if self.is_private(gfn) {
                    return Err(FaultError::WrongKind { private: true });
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
                Err(PopulateError::Fault) => {
                    return self.refused(known, snapshot, FaultError::bad(known));
                }
                Err(PopulateError::Poisoned) => {
                    return self.refused(known, snapshot, FaultError::poisoned(known));
                }
                Err(PopulateError::Interrupted) => return Err(FaultError::Interrupted),
                Err(PopulateError::Again) => return Ok(Outcome::Retry),
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
    fn remember_slot(
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

    /// Maps a small page into an empty entry of a table that is there, which is often that of the
    /// last fault: what most faults come to. `None` if anything is not as it usually is.
    #[expect(
        clippy::too_many_arguments,
        reason = "the state of one fault, in registers"
    )]
    #[inline(always)]
    fn map_in_table(
        &self,
        state: &ReaderState,
        sections: &mut Sections<'_>,
        leaf_table: &mut Option<LeafTable>,
        root: &RootState,
        known: &KnownSlot,
        snapshot: Snapshot,
        fault: Fault,
        page: &HostPage,
    ) -> Option<Outcome> {
        let gfn = fault.gpa.frame();
        if page.level != Level::L4K || known.info.flags.contains(RegionFlags::LOG_DIRTY) {
            return None;
        }
        let space = self.spaces.get(usize::from(known.info.as_id))?;
        let section = sections.enter();
        // The same conditions as in `map`.
        if !self.invalidation.is_quiet_since(snapshot)
            || !known.hint.is_of(space.generation())
            || root.is_obsolete()
            || !self.kind_stands(known, gfn, Level::L4K)
        {
            return None;
        }
        let table = self.table_in(root.table, &section);
        let epoch = self.epoch(&section);
        let remembered = Self::look_again(&table, *leaf_table, gfn, epoch);
        let seen = match remembered {
            Some(seen) => seen,
            None => self.look_elsewhere(root, &section, fault.gpa)?,
        };
        if seen.value() != F::EMPTY {
            return None;
        }
        table
            .install(seen, small_leaf(known, page, root.ad).encode::<F>())
            .ok()?;
        if remembered.is_none() {
            *leaf_table = Some(Self::remember(root.table, seen.place(), fault.gpa, epoch));
        }
        state.count_mapped(Level::L4K);
        Some(Outcome::Fixed { level: Level::L4K })
    }

    /// The entry for `gpa` in whichever table of small pages covers it, if there is one. Apart, so
    /// that the faults that do not need it keep the root in registers.
    #[inline(never)]
    fn look_elsewhere(&self, root: &RootState, section: &Section<'_>, gpa: Gpa) -> Option<Seen> {
        let table = self.table_in(root.table, section);
        if gpa.get() >= table.end() {
            return None;
        }
        let seen = table.lookup(gpa, Height::LEAF);
        (seen.place().height() == Height::LEAF).then_some(seen)
    }

    /// Maps a page that the host has made present, at the largest level that is possible. `None` if
    /// someone was faster and the fault has to look again.
    #[expect(clippy::too_many_arguments, reason = "the state of one fault")]
    #[inline(never)]
    pub(crate) fn map_anywhere(
        &self,
        state: &ReaderState,
        sections: &mut Sections<'_>,
        memory: &mut Memory,
        root: &RootState,
        known: &KnownSlot,
        snapshot: Snapshot,
        fault: Fault,
        mut page: HostPage,
    ) -> Result<Option<Outcome>, FaultError> {
        let gfn = fault.gpa.frame();
        let mut asked = page.level != Level::L4K;
        page.level = self.mapping_level(&known.info, gfn, &page);
        let mut mark = self.nx_mark(fault, &mut page);
        loop {
            match self.map(
                state, sections, memory, root, known, snapshot, fault, page, mark, asked,
            ) {
                Attempt::Done(outcome) => return Ok(Some(outcome)),
                Attempt::Again => return Ok(None),
                Attempt::Smaller => page.level = page.level.below().unwrap_or(Level::L4K),
                Attempt::NeedPages(count) => {
                    if !memory.pool.fill(self.host(), count) {
                        return Err(FaultError::OutOfMemory);
                    }
                }
                Attempt::AskHost => {
                    asked = true;
                    page.level = self.host().mapping_level(known.info.hva_of(gfn));
                    page.level = self.mapping_level(&known.info, gfn, &page);
                    mark = self.nx_mark(fault, &mut page);
                }
            }
        }
    }

    /// A fetch while huge leaves are not executable is mapped with 4K. Returns the largest level at
    /// which the entries of new tables are marked, since a leaf could have been there.
    fn nx_mark(&self, fault: Fault, page: &mut HostPage) -> Level {
        if page.level == Level::L4K || !fault.error.is_fetch() || !self.nx_huge_pages() {
            return Level::L4K;
        }
        core::mem::replace(&mut page.level, Level::L4K)
    }

    /// One attempt to map a page, at the level that `page` asks for.
    #[expect(
        clippy::too_many_arguments,
        reason = "the state of one fault, in registers"
    )]
    #[inline(always)]
    fn map(
        &self,
        state: &ReaderState,
        sections: &mut Sections<'_>,
        memory: &mut Memory,
        root: &RootState,
        known: &KnownSlot,
        snapshot: Snapshot,
        fault: Fault,
        page: HostPage,
        mark: Level,
        asked: bool,
    ) -> Attempt {
        let gfn = fault.gpa.frame();
        let level = page.level;
        let hva = known.info.hva_of(gfn) & !(level.bytes() - 1);
        let section = sections.enter();
        // What this fault relied on must still stand, now that a change would wait for us.
        if !self
            .invalidation
            .allows(snapshot, hva..hva.wrapping_add(level.bytes()))
        {
            return Attempt::Done(Outcome::Retry);
        }
        let Some(slot) = self.slot_of(known, gfn, &section) else {
            return Attempt::Done(Outcome::Retry);
        };
        if !self.kind_stands(known, gfn, level) {
            return Attempt::Done(Outcome::Retry);
        }
        if root.is_obsolete() {
            return Attempt::Done(Outcome::ObsoleteRoot);
        }
        let table = self.table_in(root.table, &section);
        if fault.gpa.get() >= table.end() {
            return Attempt::Done(Outcome::Mmio);
        }
        let leaf = Leaf {
            hpa: Hpa::new(page.hpa.get() & !(level.bytes() - 1)),
            level,
            executable: level == Level::L4K || !self.nx_huge_pages(),
            ..small_leaf(known, &page, root.ad)
        };
        let writable = leaf.writable == Writable::Yes;
        let epoch = self.epoch(&section);
        let target = Height::from(level);
        let remembered = match level {
            Level::L4K => Self::look_again(&table, memory.leaf_table, gfn, epoch),
            _ => None,
        };
        let seen = remembered.unwrap_or_else(|| table.lookup(fault.gpa, target));
        let found = seen.entry::<F>();
        let enough = known.prepared || spte::allows::<F>(seen.value(), fault.error);
        // Nothing smaller is here yet: worth a question to the host, once for each table.
        if !asked
            && seen.place().height() > Height::LEAF
            && !(found == Entry::Leaf && enough)
            && self.largest_level(&known.info, gfn) > Level::L4K
        {
            return Attempt::AskHost;
        }
        match found {
            Entry::Empty | Entry::Special => {}
            Entry::Frozen => return Attempt::Done(Outcome::Retry),
            Entry::Leaf if enough => {
                return Attempt::Done(Outcome::Spurious);
            }
            Entry::Leaf if seen.place().height() > target => {
                let height = seen.place().height();
                let marked = height <= Height::from(mark);
                let split = self.split_for_fault(&table, seen, marked, memory);
                drop(section);
                if marked && split.is_ok() {
                    self.remember_marked(root.role, height, gfn);
                }
                return match split {
                    Err(BuildError::OutOfPages) => Attempt::NeedPages(1),
                    Ok(()) | Err(BuildError::Raced) => Attempt::Again,
                };
            }
            Entry::Leaf => {
                if writable && !slot.mark_dirty(gfn, state) {
                    return Attempt::Done(Outcome::Retry);
                }
                let attempt = self.over_leaf(&table, seen, leaf);
                drop(section);
                return attempt.unwrap_or_else(|debt| {
                    self.pay_flush(debt);
                    Attempt::Again
                });
            }
            Entry::Table(_) if seen.value() & NX_SPLIT != 0 && self.nx_huge_pages() => {
                return Attempt::Smaller;
            }
            Entry::Table(_) => {
                let attempt = self.collapse_for_fault(&table, seen, known, leaf);
                drop(section);
                return attempt.unwrap_or_else(|debt| {
                    // Tables are given back under the lock; nobody waits here for this reader.
                    self.pay(&self.lock(), debt);
                    Attempt::Done(Outcome::Fixed { level })
                });
            }
        }
        let missing = usize::from(seen.place().height().get() - target.get());
        if memory.pool.len() < missing {
            return Attempt::NeedPages(missing);
        }
        // Before the page can be written; see `dirty_log_get`.
        if writable && !slot.mark_dirty(gfn, state) {
            return Attempt::Done(Outcome::Retry);
        }
        let entry = entry::<F>(known, leaf);
        if missing == 0 {
            if table.install(seen, entry).is_err() {
                return Attempt::Again;
            }
            if remembered.is_none() && level == Level::L4K {
                memory.leaf_table =
                    Some(Self::remember(root.table, seen.place(), fault.gpa, epoch));
            }
        } else {
            let marked = |height| match height <= Height::from(mark) {
                true => NX_SPLIT,
                false => 0,
            };
            let pool = &mut memory.pool;
            match table.link_marked_leaf(seen, fault.gpa, target, entry, marked, pool) {
                Ok(place) if level == Level::L4K => {
                    memory.leaf_table = Some(Self::remember(root.table, &place, fault.gpa, epoch));
                }
                Ok(_) => {}
                Err(BuildError::Raced) => return Attempt::Again,
                Err(BuildError::OutOfPages) => return Attempt::NeedPages(missing),
            }
        }
        drop(section);
        state.count_mapped(level);
        if mark != Level::L4K {
            let highest = seen.place().height().min(Height::from(mark));
            for height in 2..=highest.get() {
                self.remember_marked(root.role, Height::new(height), gfn);
            }
        }
        Attempt::Done(Outcome::Fixed { level })
    }

    /// A larger leaf is there than the one that is wanted: the slot logs, the page is fetched while
    /// huge leaves are not executable, or the host has smaller pages now. What was mapped stays
    /// mapped.
    #[cold]
    #[inline(never)]
    fn split_for_fault(
        &self,
        table: &Table<'_, F, Pages<H>>,
        seen: Seen,
        marked: bool,
        memory: &mut Memory,
    ) -> Result<(), BuildError> {
        let mark = if marked { NX_SPLIT } else { 0 };
        self.split_leaf(table, seen, mark, self.nx_huge_pages(), &mut memory.pool)
    }

    /// Smaller leaves are there than the one that is wanted now: it takes their place, with what
    /// they allow already.
    ///
    /// # Errors
    /// What is owed once the leaf is there, to be paid outside the read section.
    #[cold]
    #[inline(never)]
    fn collapse_for_fault(
        &self,
        table: &Table<'_, F, Pages<H>>,
        seen: Seen,
        known: &KnownSlot,
        leaf: Leaf,
    ) -> Result<Attempt, Debt<F>> {
        let mut debt = Debt::none();
        let entry = entry::<F>(known, leaf);
        match self.collapse_table(table, seen, entry, leaf.level, &mut debt) {
            Ok(()) => Err(debt),
            Err(_) => Ok(Attempt::Again),
        }
    }

    /// A leaf is there and does not allow the access, which the host now does.
    ///
    /// # Errors
    /// What is owed, to be paid outside the read section, if the leaf had to go.
    #[cold]
    #[inline(never)]
    fn over_leaf(
        &self,
        table: &Table<'_, F, Pages<H>>,
        seen: Seen,
        leaf: Leaf,
    ) -> Result<Attempt, Debt<F>> {
        let height = seen.place().height();
        let same =
            height == Height::from(leaf.level) && F::leaf_address(seen.value(), height) == leaf.hpa;
        if same {
            return Ok(match table.widen(seen, leaf.encode::<F>()) {
                Ok(()) => Attempt::Done(Outcome::Fixed { level: leaf.level }),
                Err(_) => Attempt::Again,
            });
        }
        // A leaf never changes its page in place: the old one goes first, in the TLBs too.
        let mut debt = Debt::none();
        match table.remove(seen, &mut debt) {
            Ok(()) => Err(debt),
            Err(_) => Ok(Attempt::Again),
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
        let section = sections.enter();
        let generation = space.generation();
        if space.tree.find(gpa.frame(), &section).is_some() {
            return Ok(Outcome::Retry);
        }
        let table = self.table_in(root.table, &section);
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

/// The entry for a leaf of a slot. One that is only prepared is not dirty, as far as that can be
/// seen from the entry.
#[inline(always)]
pub(crate) fn entry<F: MmuFormat>(known: &KnownSlot, leaf: Leaf) -> u64 {
    match known.prepared {
        true => leaf.encode::<F>() & !F::DIRTY,
        false => leaf.encode::<F>(),
    }
}

/// The leaf for a 4K page of a slot.
#[inline(always)]
pub(crate) fn small_leaf(known: &KnownSlot, page: &HostPage, ad: AdBits) -> Leaf {
    let slot = &known.info;
    let writable = page.writable && !slot.flags.contains(RegionFlags::READONLY);
    Leaf {
        hpa: page.hpa,
        level: Level::L4K,
        writable: match writable {
            false => Writable::ReadOnly,
            // Nobody writes yet; the first who does is to be noticed.
            true if known.prepared && slot.flags.contains(RegionFlags::LOG_DIRTY) => {
                Writable::Logged
            }
            true => Writable::Yes,
        },
        executable: true,
        accessed: !known.prepared,
        private: known.is_private(),
        ad,
    }
}
