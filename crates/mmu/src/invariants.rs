//! What is true of the tables and the slots whenever nobody holds the writers' lock (SPEC chapter
//! 8), as one function.
//!
//! | SPEC 8 | here |
//! |---|---|
//! | 1 frozen entries belong to their owner | [`Rule::Frozen`]: at an unlock nobody is left who owns one |
//! | 2 a leaf never changes its page in place | asserted by the table engine at each exchange |
//! | 3 W implies MMU-writable implies host-writable | [`Rule::WritableState`] |
//! | 4 every empty entry has the one empty value | [`Rule::NotEmpty`] |
//! | 5 no writable leaf above 4K on a slot that logs | [`Rule::LoggedHuge`] |
//! | 6 no huge leaf where none may be | [`Rule::HugeLeaf`], [`Rule::Address`] |
//! | 7 tables are freed when nobody sees them | [`Rule::SharedTable`]; the number of tables against the host's is the caller's to compare |
//! | 8 a mirror has what the external tables have | [`Rule::Mirror`], as far as their owner tells ([`ExternalTables::leaf`](crate::ExternalTables::leaf)) |
//! | 12 nothing is installed after an invalidation began | [`Rule::NoSlot`], [`Rule::ObsoleteRoot`] for slots and roots; host memory needs the host's word |
//! | 13 generations grow, and an update in progress is never remembered | [`Rule::Generation`], [`Rule::Mmio`] |
//! | 15 preparing is not using | needs to know who asked; the model tests do |
//!
//! In debug builds the writers' lock checks itself when it is released, now and then: a check that
//! visited n tables and slots is followed by at least n releases without one, so that each costs
//! at most the look at one table on average.

use crate::filter::Conversion;
use crate::format::MmuFormat;
use crate::host::Host;
use crate::mirror::Mirror;
use crate::mmu::{Mmu, Writer};
use crate::region::{ADDRESS_SPACES, RegionFlags};
use crate::root::{RootRole, RootState};
use crate::slots::{Slot, SlotInfo, UPDATE_IN_PROGRESS};
use crate::spte::{self, AdBits, PRIVATE, Writable};
use crate::tables::Pages;
use crate::zap::Aftermath;
use alloc::collections::BTreeSet;
use alloc::vec::Vec;
use core::fmt;
use core::ops::{Deref, DerefMut};
use spin::MutexGuard;
use twofold_arch::{Gfn, Gpa, Level, PAGE_SHIFT};
use twofold_table::x86::ADDRESS_MASK;
use twofold_table::{Cursor, Entry, Seen, Table};

/// Something that must always be true.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rule {
    /// A frozen entry, and nobody who could unfreeze it.
    Frozen,
    /// W without MMU-writable, or MMU-writable without host-writable.
    WritableState,
    /// An entry that maps nothing, and is neither the empty value nor an MMIO entry of this VM.
    NotEmpty,
    /// A writable leaf above 4K on a slot that logs.
    LoggedHuge,
    /// A huge leaf that leaves its slot, whose guest and host addresses are not congruent, or that
    /// covers private and shared frames.
    HugeLeaf,
    /// A leaf at a level that cannot map, or of a page that is not aligned to its level.
    Address,
    /// A table that can be reached in two ways.
    SharedTable,
    /// A leaf where there is no slot.
    NoSlot,
    /// An obsolete root that still leads somewhere.
    ObsoleteRoot,
    /// A leaf that allows writes to a slot that does not.
    ReadOnlySlot,
    /// A writable leaf of a page that a bitmap logs, and the bitmap does not have it.
    Unmarked,
    /// A generation that went back, or an update that nobody ended.
    Generation,
    /// An MMIO entry that is believed where there is a slot, or names another frame.
    Mmio,
    /// Slots that overlap, or that the indices know differently.
    Slots,
    /// An entry of a mirror and the one that it mirrors have different pages; or something private
    /// is in a root that processors walk although there is a mirror, or the other way round.
    Mirror,
    /// A leaf that allows more than the access maps of the frames that it covers, or asks the
    /// sub-page permission table where nothing is protected; or a vector of that table that is not
    /// the frame's map.
    SubPages,
}

/// One breach of a [`Rule`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Violation {
    /// What should have been true.
    pub rule: Rule,
    /// The root below which the entry was found; `None` if it is about slots alone.
    pub root: Option<RootRole>,
    /// The first frame that the entry or the slot covers.
    pub gfn: Gfn,
    /// The level of the entry; `None` if it is about slots alone.
    pub level: Option<Level>,
    /// The entry as it was read; 0 if it is about slots alone.
    pub entry: u64,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: gfn {:#x}", self.rule, self.gfn.get())?;
        if let (Some(root), Some(level)) = (self.root, self.level) {
            write!(
                f,
                ", {level:?} entry {:#x} below the root of {root:?}",
                self.entry
            )?;
        }
        Ok(())
    }
}

/// What a look at everything has found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Report {
    /// The breaches found, at most [`Report::MOST`].
    pub violations: Vec<Violation>,
    /// Tables in use, roots included.
    pub tables: u64,
    /// Slots of all address spaces.
    pub slots: u64,
    /// Leaves, by level: 4K, 2M, 1G.
    pub leaves: [u64; 3],
}

impl Report {
    /// More violations than this are not listed.
    pub const MOST: usize = 32;

    pub(crate) fn add(&mut self, violation: Violation) {
        if self.violations.len() < Self::MOST {
            self.violations.push(violation);
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for violation in &self.violations {
            writeln!(f, "{violation}")?;
        }
        write!(
            f,
            "{} violations in {} tables and {} slots",
            self.violations.len(),
            self.tables,
            self.slots
        )
    }
}

/// How much is compared with what others know.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Depth {
    /// What is mapped.
    WhatIsThere,
    /// What is not mapped, too.
    Everything,
}

/// What a look at one entry of a VM with a mirror has found.
enum Half {
    Right,
    Wrong,
    /// A fault is changing it.
    Changes,
}

/// How often entries of a root are read again that faults are changing.
const PATIENCE: u32 = 1 << 20;

impl<F: MmuFormat, H: Host> Mmu<F, H> {
    /// Looks at every entry below every root and at every slot, and says which of the [`Rule`]s do
    /// not hold. For tests and for the curious: it holds the writers' lock as long as it takes, in
    /// proportion to the number of tables. Faults may go on meanwhile; what they publish obeys the
    /// rules at every moment.
    pub fn check(&self) -> Report {
        self.check_locked(&mut self.lock(), Depth::Everything)
    }

    pub(crate) fn check_locked(&self, writer: &mut Writer<F>, depth: Depth) -> Report {
        let mut report = Report::default();
        self.check_slots(writer, &mut report);
        let mut tables = BTreeSet::new();
        for root in &writer.roots {
            self.check_root(writer, root, depth, &mut tables, &mut report);
        }
        for as_id in 0..ADDRESS_SPACES as u16 {
            self.check_sppt(writer, as_id, &mut tables, &mut report);
        }
        report.tables = tables.len() as u64;
        writer.releases_to_check = report.tables + report.slots;
        report
    }

    fn check_slots(&self, writer: &mut Writer<F>, report: &mut Report) {
        let about = |rule, gfn| Violation {
            rule,
            root: None,
            gfn,
            level: None,
            entry: 0,
        };
        let mut pages = 0;
        for (as_id, space) in self.spaces.iter().enumerate() {
            let generation = space.generation();
            let last = core::mem::replace(&mut writer.last_generation[as_id], generation);
            if generation & UPDATE_IN_PROGRESS != 0
                || generation < last
                || generation % ADDRESS_SPACES as u64 != as_id as u64
            {
                report.add(about(Rule::Generation, Gfn::new(0)));
            }
            for (id, base) in writer.ids[as_id].iter().enumerate() {
                let Some(base) = *base else { continue };
                let Some(slot) = space.tree.find_locked(base) else {
                    report.add(about(Rule::Slots, base));
                    continue;
                };
                let info = slot.info;
                report.slots += 1;
                pages += info.pages;
                let mut indexed = false;
                let end = info.hva + (info.pages << PAGE_SHIFT);
                writer.by_hva.overlapping(info.hva..end, |other_as, other| {
                    indexed |= (other_as, other) == (info.as_id, info.id);
                });
                let sound = indexed
                    && info.base == base
                    && (usize::from(info.as_id), usize::from(info.id)) == (as_id, id)
                    && !slot.is_invalid()
                    && !space.tree.overlaps(info.base, info.pages, Some(info.base));
                if !sound {
                    report.add(about(Rule::Slots, base));
                }
            }
        }
        if pages != writer.slot_pages {
            report.add(about(Rule::Slots, Gfn::new(0)));
        }
    }

    fn check_root(
        &self,
        writer: &Writer<F>,
        root: &RootState,
        depth: Depth,
        tables: &mut BTreeSet<u64>,
        report: &mut Report,
    ) {
        let mut patience = PATIENCE;
        let table = self.table_locked(root, writer);
        let mut cursor = Cursor::new(table, Gpa::new(0)..Gpa::new(table.end()));
        let mut count_table = |page: u64, report: &mut Report, gfn| {
            let new = tables.insert(page);
            if !new {
                report.add(Violation {
                    rule: Rule::SharedTable,
                    root: Some(root.role),
                    gfn,
                    level: None,
                    entry: page,
                });
            }
            new
        };
        count_table(root.table.page.hpa().get(), report, Gfn::new(0));
        while let Some(seen) = cursor.next() {
            let gfn = seen.place().gpa().frame();
            let mut broken = |rule| {
                report.add(Violation {
                    rule,
                    root: Some(root.role),
                    gfn,
                    level: Level::from_number(seen.place().height().get()),
                    entry: seen.value(),
                });
            };
            if let Some(mirror) = self.mirror.get() {
                match self.check_half(mirror, root, &cursor.table(), &seen, depth) {
                    Half::Right => {}
                    Half::Wrong => broken(Rule::Mirror),
                    Half::Changes if patience > 0 => {
                        patience -= 1;
                        self.host().wait_hint();
                        cursor.again();
                        continue;
                    }
                    Half::Changes => {}
                }
            }
            match seen.entry::<F>() {
                Entry::Empty => continue,
                Entry::Frozen => broken(Rule::Frozen),
                Entry::Special => {
                    if let Some(rule) = self.check_special(root.role.as_id(), gfn, &seen) {
                        broken(rule);
                    }
                }
                Entry::Leaf => {
                    for rule in self.check_leaf(writer, root.role.as_id(), gfn, &seen) {
                        broken(rule);
                    }
                    let level = usize::from(seen.place().height().get()) - 1;
                    if let Some(count) = report.leaves.get_mut(level) {
                        *count += 1;
                    }
                }
                Entry::Table(child) => {
                    if !count_table(child.get(), report, gfn) {
                        cursor.skip();
                    }
                }
            }
            if root.is_obsolete() && seen.entry::<F>() != Entry::Special {
                report.add(Violation {
                    rule: Rule::ObsoleteRoot,
                    root: Some(root.role),
                    gfn,
                    level: Level::from_number(seen.place().height().get()),
                    entry: seen.value(),
                });
            }
        }
    }

    /// Whether an entry of a VM with a mirror is in the right half, and a mirror's like the one that
    /// it mirrors.
    fn check_half(
        &self,
        mirror: &Mirror,
        root: &RootState,
        table: &Table<'_, F, Pages<H>>,
        seen: &Seen,
        depth: Depth,
    ) -> Half {
        let place = seen.place();
        let (entry, height) = (seen.entry::<F>(), place.height());
        let is_private = seen.value() & PRIVATE != 0;
        if !root.role.mirror {
            return match entry {
                Entry::Leaf if is_private => Half::Wrong,
                _ => Half::Right,
            };
        }
        let ours = match entry {
            Entry::Empty if depth == Depth::WhatIsThere => return Half::Right,
            Entry::Empty => None,
            Entry::Leaf if is_private => Some(F::leaf_address(seen.value(), height)),
            Entry::Leaf | Entry::Special => return Half::Wrong,
            Entry::Table(_) => return Half::Right,
            // A fault takes no lock.
            Entry::Frozen => return Half::Changes,
        };
        let Some(level) = Level::from_number(height.get()) else {
            return Half::Wrong;
        };
        let Ok(theirs) = mirror.tables.leaf(place.gpa().frame(), level) else {
            return Half::Right;
        };
        match theirs == ours {
            true => Half::Right,
            false if table.look(*place).value() != seen.value() => Half::Changes,
            false => Half::Wrong,
        }
    }

    fn slot_holding(&self, as_id: u16, gfn: Gfn) -> Option<&Slot> {
        let space = self.spaces.get(usize::from(as_id))?;
        space.tree.find_locked(gfn)
    }

    fn check_special(&self, as_id: u16, gfn: Gfn, seen: &Seen) -> Option<Rule> {
        let entry = seen.value();
        let Some(mmio) = self.mmio.filter(|mmio| mmio.matches(entry)) else {
            return Some(Rule::NotEmpty);
        };
        let generation = self.spaces.get(usize::from(as_id))?.generation();
        let believed = mmio.is_fresh(entry, generation);
        let right =
            mmio.encode(gfn, generation) == entry && self.slot_holding(as_id, gfn).is_none();
        (believed && !right).then_some(Rule::Mmio)
    }

    fn check_leaf(
        &self,
        writer: &Writer<F>,
        as_id: u16,
        gfn: Gfn,
        seen: &Seen,
    ) -> impl Iterator<Item = Rule> + use<F, H> {
        let mut broken = [None; 7];
        let (entry, height) = (seen.value(), seen.place().height());
        let level = Level::from_number(height.get()).filter(|level| level.may_map());
        if level.is_none_or(|level| entry & ADDRESS_MASK & (level.bytes() - 1) != 0) {
            broken[0] = Some(Rule::Address);
        }
        let writable = spte::writable::<F>(entry);
        if writable.is_none() {
            broken[1] = Some(Rule::WritableState);
        }
        let Some(slot) = self.slot_holding(as_id, gfn) else {
            broken[2] = Some(Rule::NoSlot);
            return broken.into_iter().flatten();
        };
        let level = level.unwrap_or(Level::L4K);
        // While logging begins, the leaves follow part by part.
        let begins = writer.begins_to_log == Some((slot.info.as_id, slot.info.id));
        let logs = slot.info.flags.contains(RegionFlags::LOG_DIRTY) && !begins;
        let writes = writable.is_some_and(Writable::allows_any);
        if !self.obeys_access_map(as_id, gfn, level, entry) {
            broken[6] = Some(Rule::SubPages);
        }
        if level != Level::L4K
            && !(may_be_huge(&slot.info, gfn, level) && self.is_of_one_kind(gfn, level))
        {
            broken[2] = Some(Rule::HugeLeaf);
        }
        // A slot in which every page counts as dirty is only protected where that was cleared.
        if level != Level::L4K && logs && writes && !is_all_dirty(slot, gfn, level) {
            broken[3] = Some(Rule::LoggedHuge);
        }
        if writes && slot.info.flags.contains(RegionFlags::READONLY) {
            broken[4] = Some(Rule::ReadOnlySlot);
        }
        // The leaf was read before the bitmap, and is written after it. What processors have logged
        // is not in the bitmap yet, and what is in rings never is.
        let by_log = self.logs_by_pml() && spte::ad_bits(entry) == AdBits::Hardware
            || self.ring_entries() != 0;
        if writes && level == Level::L4K && !by_log && !begins && !slot.is_marked(gfn) {
            broken[5] = Some(Rule::Unmarked);
        }
        broken.into_iter().flatten()
    }

    /// Whether private and shared frames do not mix in the page at `gfn`; asked of the frames and
    /// not of the summary that page sizes are chosen by. Where a change of attributes leaves the
    /// mappings to the guest memory file, they may lag behind.
    fn is_of_one_kind(&self, gfn: Gfn, level: Level) -> bool {
        match self.config.private_memory {
            Some(policy) if policy.conversion == Conversion::ZapOpposite => {
                let private = self.attributes.is_private(gfn);
                let end = Gfn::new(gfn.get() + level.frames());
                self.attributes.all(&(gfn..end), private)
            }
            _ => true,
        }
    }
}

/// Whether a bitmap has every page that a leaf at `gfn` covers.
fn is_all_dirty(slot: &Slot, gfn: Gfn, level: Level) -> bool {
    slot.dirty.is_some()
        && (gfn.get()..gfn.get() + level.frames()).all(|gfn| slot.is_marked(Gfn::new(gfn)))
}

/// Whether the slot has a whole page of this size at `gfn`, with guest and host addresses
/// congruent. Written here again, since what is checked must not check itself.
fn may_be_huge(slot: &SlotInfo, gfn: Gfn, level: Level) -> bool {
    let host_frame = slot.hva_of(gfn) >> PAGE_SHIFT;
    gfn.is_aligned(level.frames())
        && gfn >= slot.base
        && gfn.get() + level.frames() <= slot.end().get()
        && host_frame.is_multiple_of(level.frames())
}

/// The writers' lock, held. In debug builds it looks now and then whether the rules hold when it is
/// released.
pub(crate) struct Locked<'a, F: MmuFormat, H: Host> {
    // Released before the tables are taken apart: fields are dropped in this order.
    writer: MutexGuard<'a, Writer<F>>,
    aftermath: Aftermath<'a, F, H>,
    mmu: &'a Mmu<F, H>,
}

impl<'a, F: MmuFormat, H: Host> Locked<'a, F, H> {
    pub(crate) fn new(mmu: &'a Mmu<F, H>, writer: MutexGuard<'a, Writer<F>>) -> Self {
        Self {
            writer,
            aftermath: Aftermath::new(mmu),
            mmu,
        }
    }
}

impl<F: MmuFormat, H: Host> Deref for Locked<'_, F, H> {
    type Target = Writer<F>;

    fn deref(&self) -> &Writer<F> {
        &self.writer
    }
}

impl<F: MmuFormat, H: Host> DerefMut for Locked<'_, F, H> {
    fn deref_mut(&mut self) -> &mut Writer<F> {
        &mut self.writer
    }
}

impl<F: MmuFormat, H: Host> Drop for Locked<'_, F, H> {
    #[inline(always)]
    fn drop(&mut self) {
        if cfg!(all(debug_assertions, not(shuttle))) {
            self.check_now_and_then();
        }
        self.aftermath.take_over(&mut self.writer.retired);
    }
}

impl<F: MmuFormat, H: Host> Locked<'_, F, H> {
    #[cold]
    fn check_now_and_then(&mut self) {
        if let Some(rest) = self.writer.releases_to_check.checked_sub(1) {
            self.writer.releases_to_check = rest;
            return;
        }
        let depth = Depth::WhatIsThere;
        let report = self.mmu.check_locked(&mut self.writer, depth);
        assert!(report.violations.is_empty(), "{report}");
    }
}
