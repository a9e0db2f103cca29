//! Taking mappings away, and paying what that owes.

use crate::filter::{RangeFilter, RangeOperation};
use crate::format::MmuFormat;
use crate::host::Host;
use crate::mmu::{Mmu, Writer};
use crate::root::RootState;
use crate::slots::SlotInfo;
use crate::sync::atomic::Ordering;
use crate::tables::Pages;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;
use spin::Mutex;
use twofold_arch::{Gfn, Gpa, Level};
use twofold_table::{
    Cursor, Debt, Entry, Height, Leaves, Quiesced, Seen, Settled, Table, wait_for_readers,
};

/// Pages that an operation which may block works on under one hold of the writers' lock: half a
/// gigabyte, some ten microseconds' work if it goes table by table.
const PAGES_AT_ONCE: u64 = 1 << 17;
/// The same where each page may have to be taken from somebody else.
const MIRRORED_PAGES_AT_ONCE: u64 = 1 << 10;

impl<F: MmuFormat, H: Host> Mmu<F, H> {
    /// Waits for every read section that may have missed what this thread has changed, and frees
    /// what was waiting for that.
    pub(crate) fn synchronize(&self, writer: &mut Writer<F>) -> Quiesced {
        if !writer.readers.is_empty() {
            self.host().heavy_barrier();
        }
        let readers = self.wait_for_readers(writer);
        writer.garbage.clear(&readers);
        readers
    }

    pub(crate) fn wait_for_readers(&self, writer: &Writer<F>) -> Quiesced {
        wait_for_readers(writer.readers.iter().map(|reader| reader.word()), || {
            self.host().wait_hint();
        })
    }

    /// Flushes what must be flushed, and waits for readers where tables were taken out. The tables
    /// are given back when the lock is released, which takes far longer.
    pub(crate) fn pay(&self, writer: &Writer<F>, debt: Debt<F>) {
        if debt.is_none() {
            return;
        }
        // Before anyone is waited for: a reader that still sees the old value is in a section
        // that the wait below will find.
        self.unlinked.fetch_add(1, Ordering::SeqCst);
        let settled = debt.settle(|range| self.flush(range));
        match settled.leaves() {
            Ok(leaves) => self.count_unmapped(&leaves),
            Err(settled) => {
                // The flush was a barrier on every reader's thread.
                let readers = self.wait_for_readers(writer);
                writer.retired.add(settled, readers, true);
            }
        }
    }

    /// Pays a debt of leaves only, without the writers' lock.
    pub(crate) fn pay_flush(&self, debt: Debt<F>) {
        if let Ok(leaves) = debt.settle(|range| self.flush(range)).leaves() {
            self.count_unmapped(&leaves);
        }
    }

    pub(crate) fn flush(&self, _range: Range<Gpa>) {
        self.remote_tlb_flush.fetch_add(1, Ordering::Relaxed);
        self.host().flush_tlbs();
    }

    fn count_unmapped(&self, leaves: &Leaves) {
        for (level, count) in [Level::L4K, Level::L2M, Level::L1G]
            .into_iter()
            .zip(&self.unmapped)
        {
            let gone = leaves.at(Height::from(level));
            if gone != 0 {
                count.fetch_add(gone, Ordering::Relaxed);
            }
        }
    }

    /// Carries out an operation that takes mappings away, and pays for it. If it may block, the
    /// writers' lock is held for a part at a time. The caller does not hold it, and has made sure
    /// that no fault brings back what is taken.
    pub(crate) fn zap_range(&self, operation: &RangeOperation) {
        let end = operation.gfns.end;
        let mut start = operation.gfns.start;
        let at_once = match self.mirror.is_completed() {
            true => MIRRORED_PAGES_AT_ONCE,
            false => PAGES_AT_ONCE,
        };
        while start < end {
            let stop = match operation.may_block {
                true => Gfn::new(start.get().saturating_add(at_once)).min(end),
                false => end,
            };
            let writer = self.lock();
            let mut debt = Debt::none();
            self.zap_gfns(
                &writer,
                &RangeOperation {
                    gfns: start..stop,
                    ..operation.clone()
                },
                &mut debt,
            );
            self.pay(&writer, debt);
            start = stop;
        }
    }

    /// Takes the mappings that the operation is about out of every root of the address space. A
    /// leaf that is only partly in the range goes as a whole.
    pub(crate) fn zap_gfns(
        &self,
        writer: &Writer<F>,
        operation: &RangeOperation,
        debt: &mut Debt<F>,
    ) {
        // Where nothing is private, there is nothing to tell apart.
        let filter = match self.config.private_memory {
            Some(_) => operation.filter,
            None if operation.filter == RangeFilter::Private => return,
            None => RangeFilter::Both,
        };
        // In a VM with a mirror each half has a root of its own.
        let mirrors = self.mirror.is_completed();
        for root in writer
            .roots
            .iter()
            .filter(|root| root.role.as_id() == operation.as_id)
        {
            match root.role.mirror {
                true if filter.covers(true) => self.zap_mirror(writer, root, &operation.gfns),
                false if !mirrors || filter.covers(false) => {
                    self.zap_in_root(writer, root, &operation.gfns, filter, debt);
                }
                _ => {}
            }
        }
    }

    fn zap_in_root(
        &self,
        writer: &Writer<F>,
        root: &Arc<RootState>,
        gfns: &Range<Gfn>,
        filter: RangeFilter,
        debt: &mut Debt<F>,
    ) {
        let (start, end) = (gfns.start.address(), gfns.end.address());
        let mut cursor = Cursor::new(self.table_locked(root, writer), start..end);
        while let Some(seen) = cursor.next() {
            match seen.entry::<F>() {
                Entry::Empty => continue,
                Entry::Table(_) => {
                    let first = seen.place().gpa();
                    let covered = first >= start
                        && first.get() + F::bytes(seen.place().height()) <= end.get();
                    if !covered || !self.holds_only(&cursor.table(), &seen, filter) {
                        continue;
                    }
                    cursor.skip();
                }
                Entry::Leaf if !filter.covers_leaf(seen.value()) => continue,
                // They say that there is no slot, which is not a matter of halves.
                Entry::Special if filter != RangeFilter::Both => continue,
                Entry::Leaf | Entry::Special | Entry::Frozen => {}
            }
            if cursor.table().remove(seen, debt).is_err() {
                cursor.again();
            }
        }
    }

    /// Takes out what remembers the absence of memory where the slot is now. Nobody caches such an
    /// entry, so nothing is owed.
    pub(crate) fn zap_mmio(&self, writer: &Writer<F>, slot: &SlotInfo) {
        let mut nothing = Debt::none();
        for root in writer.direct_roots(slot.as_id) {
            let range = slot.base.address()..slot.end().address();
            let mut cursor = Cursor::new(self.table_locked(root, writer), range);
            while let Some(seen) = cursor.next() {
                if seen.entry::<F>() == Entry::Special
                    && cursor.table().remove(seen, &mut nothing).is_err()
                {
                    cursor.again();
                }
            }
        }
        self.pay(writer, nothing);
    }

    /// Whether the table that `seen` links may go as a whole. Of tables above leaf tables that is not
    /// found out: their entries are looked at one by one. A leaf of the other kind that a
    /// fault adds afterwards goes too, and is made again by the next access: nobody's content
    /// depends on a leaf where both kinds live under one root.
    fn holds_only(&self, table: &Table<'_, F, Pages<H>>, seen: &Seen, filter: RangeFilter) -> bool {
        if filter == RangeFilter::Both {
            return true;
        }
        if seen.place().height() != Height::LEAF.above() {
            return false;
        }
        let first = seen.place().gpa();
        let last = Gpa::new(first.get() + (F::bytes(seen.place().height()) - 1));
        let mut cursor = Cursor::new(*table, first..last);
        while let Some(below) = cursor.next() {
            if below.entry::<F>() == Entry::Leaf && !filter.covers_leaf(below.value()) {
                return false;
            }
        }
        true
    }

    /// Drops every mapping by making every root obsolete: new faults load new roots while the old
    /// ones are taken apart. Mirrors are not affected: what is private cannot be mapped again.
    pub(crate) fn zap_all_locked(&self, writer: &mut Writer<F>) {
        for root in writer.roots.iter().filter(|root| !root.role.mirror) {
            root.make_obsolete();
        }
        let _readers = self.synchronize(writer);
        let mut debt = Debt::none();
        let all = Gfn::new(0)..Gfn::new(u64::MAX >> 12);
        for root in writer.roots.iter().filter(|root| !root.role.mirror) {
            self.zap_in_root(writer, root, &all, RangeFilter::Both, &mut debt);
        }
        self.pay(writer, debt);
        self.sweep_roots(writer);
    }

    /// Gives back the obsolete roots that nobody has loaded. They were emptied and flushed when they
    /// became obsolete, and a [`Root`](crate::Root) is kept as long as a processor may use it; so
    /// there is nothing to flush.
    pub(crate) fn sweep_roots(&self, writer: &mut Writer<F>) {
        let unused = |root: &mut Arc<RootState>| root.is_obsolete() && Arc::get_mut(root).is_some();
        let dropped: Vec<_> = writer.roots.extract_if(.., unused).collect();
        if dropped.is_empty() {
            return;
        }
        let mut debt = Debt::none();
        for root in &dropped {
            self.table_locked(root, writer).retire_root(&mut debt);
        }
        let readers = self.wait_for_readers(writer);
        writer.retired.add(debt.settle(|_| {}), readers, false);
    }
}

/// Tables that no reader and no processor sees any more. Whoever has unlinked them takes them apart
/// after releasing the writers' lock, so that the lock is never held for as long as that takes.
pub(crate) struct Retired<F>(Mutex<Vec<RetiredTables<F>>>);

struct RetiredTables<F> {
    tables: Settled<F>,
    readers: Quiesced,
    /// A zap has taken them out; they did not go with a root.
    zapped: bool,
}

impl<F> Default for Retired<F> {
    fn default() -> Self {
        Self(Mutex::new(Vec::new()))
    }
}

impl<F> Retired<F> {
    fn add(&self, tables: Settled<F>, readers: Quiesced, zapped: bool) {
        self.0.lock().push(RetiredTables {
            tables,
            readers,
            zapped,
        });
    }
}

/// Takes tables apart when it is dropped, which is after the writers' lock was released.
pub(crate) struct Aftermath<'a, F: MmuFormat, H: Host> {
    mmu: &'a Mmu<F, H>,
    retired: Vec<RetiredTables<F>>,
}

impl<'a, F: MmuFormat, H: Host> Aftermath<'a, F, H> {
    pub(crate) const fn new(mmu: &'a Mmu<F, H>) -> Self {
        Self {
            mmu,
            retired: Vec::new(),
        }
    }

    /// Takes what there is; the lock is still held.
    #[inline(always)]
    pub(crate) fn take_over(&mut self, retired: &mut Retired<F>) {
        self.retired = core::mem::take(retired.0.get_mut());
    }
}

impl<F: MmuFormat, H: Host> Drop for Aftermath<'_, F, H> {
    #[inline(always)]
    fn drop(&mut self) {
        if !self.retired.is_empty() {
            self.take_apart();
        }
    }
}

impl<F: MmuFormat, H: Host> Aftermath<'_, F, H> {
    #[cold]
    fn take_apart(&mut self) {
        for retired in self.retired.drain(..) {
            let mut tables = 0;
            let pages = &self.mmu.pages;
            let leaves = retired.tables.reclaim(&retired.readers, pages, |page| {
                tables += 1;
                self.mmu.host().free_table(page.hpa());
            });
            if retired.zapped {
                self.mmu.tables_zapped.fetch_add(tables, Ordering::Relaxed);
            }
            self.mmu.count_unmapped(&leaves);
        }
    }
}
