//! Huge leaves again where logging or the NX mitigation had split them (SPEC 6.7).
//!
//! The table gives the huge leaf its permissions, the host says whether it still has so large a
//! page there. The host is asked without the lock; a change of its memory meanwhile is found as
//! faults find it, by the sequence of changes.

use crate::format::MmuFormat;
use crate::host::Host;
use crate::mmu::Mmu;
use crate::nx_huge_pages::NX_SPLIT;
use crate::page_size::larger_leaf;
use crate::region::RegionFlags;
use crate::root::RootState;
use crate::slots::SlotInfo;
use crate::spte::PRIVATE;
use crate::sync::atomic::Ordering;
use crate::tables::Pages;
use alloc::vec::Vec;
use core::ops::Range;
use twofold_arch::{Gfn, Gpa, Level};
use twofold_table::{Cursor, Debt, Entry, Height, Seen, Table};

/// Tables looked at under one hold of the lock.
const BATCH: usize = 32;

impl<F: MmuFormat, H: Host> Mmu<F, H> {
    /// Maps the slot with huge leaves again where the host has huge pages. For a slot that does not
    /// log; KVM does so when logging ends, and so does [`set_region`](Self::set_region).
    pub fn recover_huge_pages(&self, as_id: u16, slot: u16) {
        let _slots = self.lock_slots();
        if let Some(info) = self.slot(as_id, slot) {
            self.recover_range(&info, info.base..info.end());
        }
    }

    /// Maps `gfns` of `slot` with huge leaves again where the host has huge pages.
    ///
    /// The caller holds the slots' lock and not the writers'.
    pub(crate) fn recover_range(&self, slot: &SlotInfo, gfns: Range<Gfn>) {
        // Of a slot with two halves it is not known here which host page to ask about; the next
        // fault on each table knows.
        if slot
            .flags
            .intersects(RegionFlags::LOG_DIRTY | RegionFlags::GUEST_MEMFD)
        {
            return;
        }
        for root in self.roots_of(slot.as_id) {
            for level in [Level::L1G, Level::L2M] {
                let mut position = Some(gfns.start);
                while let Some(start) = position {
                    position = self.recover_some(&root, slot, start..gfns.end, level);
                }
            }
        }
    }

    /// Recovers a few leaves at `level`. Returns where to go on.
    fn recover_some(
        &self,
        root: &RootState,
        slot: &SlotInfo,
        gfns: Range<Gfn>,
        level: Level,
    ) -> Option<Gfn> {
        let snapshot = self.invalidation.snapshot();
        let (mut found, next) = self.collapsible(root, slot, gfns, level);
        found.retain(|gfn| self.host().mapping_level(slot.hva_of(*gfn)) >= level);
        if !found.is_empty() {
            let writer = self.lock();
            let mut debt = Debt::none();
            for gfn in found {
                let first = gfn.align_down(level.frames());
                let hva = slot.hva_of(first);
                let hva = hva..hva.wrapping_add(level.bytes());
                if root.is_obsolete() || !self.invalidation.allows(snapshot, hva) {
                    break;
                }
                let table = self.table_locked(root, &writer);
                let seen = table.lookup(first.address(), Height::from(level));
                if let Some(leaf) = self.leaf_for_table(&table, &seen, level) {
                    // Who was faster may have what he wanted.
                    let _ = self.collapse_table(&table, seen, leaf, level, &mut debt);
                }
            }
            self.pay(&writer, debt);
        }
        next
    }

    /// Tables at `level` that the slot would allow to be leaves, by a frame that is mapped below
    /// each, and where to look for more.
    fn collapsible(
        &self,
        root: &RootState,
        slot: &SlotInfo,
        gfns: Range<Gfn>,
        level: Level,
    ) -> (Vec<Gfn>, Option<Gfn>) {
        let mut found = Vec::new();
        let writer = self.lock();
        if root.is_obsolete() {
            return (found, None);
        }
        let table = self.table_locked(root, &writer);
        let mut cursor = Cursor::new(table, gfns.start.address()..gfns.end.address());
        while let Some(seen) = cursor.next() {
            let (place, height) = (seen.place(), Height::from(level));
            if place.height() > height || !matches!(seen.entry::<F>(), Entry::Table(_)) {
                continue;
            }
            cursor.skip();
            let gfn = place.gpa().frame();
            if place.height() < height
                || seen.value() & NX_SPLIT != 0 && self.nx_huge_pages()
                || !self.may_be_huge(slot, gfn, level)
            {
                continue;
            }
            if found.len() == BATCH {
                return (found, Some(gfn));
            }
            let mapped = first_leaf::<F, H>(table, place.gpa(), level);
            found.extend(mapped.map(|mapped| mapped.place().gpa().frame()));
        }
        (found, None)
    }

    /// The leaf that could stand in the place of the table `seen` at `level`, made from the first
    /// leaf below it.
    pub(crate) fn leaf_for_table(
        &self,
        table: &Table<'_, F, Pages<H>>,
        seen: &Seen,
        level: Level,
    ) -> Option<u64> {
        let model = first_leaf::<F, H>(*table, seen.place().gpa(), level)?;
        let place = model.place();
        // What the host says of a slot's ordinary memory is nothing to its private half.
        if place.height() >= Height::from(level) || model.value() & PRIVATE != 0 {
            return None;
        }
        larger_leaf::<F>(
            model.value(),
            place.height(),
            place.gpa().frame(),
            level,
            !self.nx_huge_pages(),
        )
    }

    /// Exchanges the table `seen` for a leaf at `level`.
    pub(crate) fn collapse_table(
        &self,
        table: &Table<'_, F, Pages<H>>,
        seen: Seen,
        leaf: u64,
        level: Level,
        debt: &mut Debt<F>,
    ) -> Result<(), twofold_table::Raced> {
        // Formats of this crate are replaced in one exchange, without a flush in between.
        table.collapse(seen, leaf, debt, |_| {})?;
        if let Some(mapped) = self.mapped.get(usize::from(level.number()) - 1) {
            mapped.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// The first leaf in what an entry at `level` and `gpa` covers.
fn first_leaf<F: MmuFormat, H: Host>(
    table: Table<'_, F, Pages<H>>,
    gpa: Gpa,
    level: Level,
) -> Option<Seen> {
    let mut cursor = Cursor::new(table, gpa..Gpa::new(gpa.get() + level.bytes()));
    while let Some(seen) = cursor.next() {
        if seen.entry::<F>() == Entry::Leaf {
            return Some(seen);
        }
    }
    None
}
