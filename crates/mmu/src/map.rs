//! Publishing the mapping that a fault asked for: one entry, or the tables to it, with one exchange.
//!
//! The host has made the page present before; here, in a read section, the fault makes sure that
//! what it relied on still stands, and chooses the size.

use crate::format::MmuFormat;
use crate::host::{Host, HostPage};
use crate::invalidation::Snapshot;
use crate::mmu::Mmu;
use crate::nx_huge_pages::NX_SPLIT;
use crate::reader::{KnownSlot, Memory, ReaderState, Sections};
use crate::region::RegionFlags;
use crate::root::RootState;
use crate::spte::{self, AdBits, Leaf, Writable};
use crate::tables::{LeafTable, Pages};
use crate::{Fault, FaultError, Outcome};
use twofold_arch::{Gpa, Hpa, Level};
use twofold_table::{BuildError, Debt, Entry, Height, Section, Seen, Table};

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

impl<F: MmuFormat, H: Host> Mmu<F, H> {
    /// Maps a small page into an empty entry of a table that is there, which is often that of the
    /// last fault: what most faults come to. `None` if anything is not as it usually is.
    #[expect(
        clippy::too_many_arguments,
        reason = "the state of one fault, in registers"
    )]
    #[inline(always)]
    pub(crate) fn map_in_table(
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
            || self.guards(known.info.as_id, gfn, Level::L4K)
        {
            return None;
        }
        let table = self.table_in(root, &section);
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
            .install(seen, small_leaf(known, page, root.ad, false).encode::<F>())
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
        let table = self.table_in(root, section);
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
        let guarded = !known.is_private() && self.guards(known.info.as_id, gfn, level);
        if guarded && level != Level::L4K {
            return Attempt::Smaller;
        }
        let table = self.table_in(root, &section);
        if fault.gpa.get() >= table.end() {
            return Attempt::Done(Outcome::Mmio);
        }
        let leaf = Leaf {
            hpa: Hpa::new(page.hpa.get() & !(level.bytes() - 1)),
            level,
            executable: level == Level::L4K || !self.nx_huge_pages(),
            ..small_leaf(known, &page, root.ad, guarded)
        };
        let writable = leaf.writable.allows_any();
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
                let as_id = root.role.as_id();
                let split = self.split_for_fault(as_id, &table, seen, marked, memory);
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
        as_id: u16,
        table: &Table<'_, F, Pages<H>>,
        seen: Seen,
        marked: bool,
        memory: &mut Memory,
    ) -> Result<(), BuildError> {
        let mark = if marked { NX_SPLIT } else { 0 };
        let executable = self.nx_huge_pages();
        self.split_leaf(as_id, table, seen, mark, executable, &mut memory.pool)
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

/// The leaf for a 4K page of a slot; `guarded` if the frame's sub-pages are protected.
#[inline(always)]
pub(crate) fn small_leaf(known: &KnownSlot, page: &HostPage, ad: AdBits, guarded: bool) -> Leaf {
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
            true => Writable::guarded(guarded),
        },
        executable: true,
        accessed: !known.prepared,
        private: known.is_private(),
        ad,
    }
}
