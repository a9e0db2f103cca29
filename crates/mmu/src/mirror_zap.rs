//! Taking private pages out of the external tables and their mirror (SPEC 5.5).
//!
//! On the way out nothing may fail for good, and a page may go only when no virtual processor uses
//! a translation of it: leaves are frozen and blocked, a batch at a time, then one TRACK makes
//! everybody who is inside leave, and then the pages go.

use crate::external::ExternalError;
use crate::format::MmuFormat;
use crate::host::Host;
use crate::mirror::Mirror;
use crate::mmu::{Mmu, Writer};
use crate::root::RootState;
use crate::sync::atomic::Ordering;
use crate::tables::Pages;
use alloc::sync::Arc;
use core::ops::Range;
use twofold_arch::{Gfn, Level};
use twofold_table::{Cursor, Entry, Frozen, Height};

/// Leaves that share one TRACK.
const BATCH: usize = 64;

/// Keeps virtual processors out from the first busy answer on.
struct Hold<'m> {
    mirror: &'m Mirror,
    held: bool,
}

impl Hold<'_> {
    /// Calls until it succeeds.
    ///
    /// # Errors
    /// The owner of the external tables has refused: the VM has a bug now.
    fn insist(
        &mut self,
        host: &impl Host,
        call: impl Fn(&Mirror) -> Result<(), ExternalError>,
    ) -> Result<(), ()> {
        loop {
            match call(self.mirror) {
                Ok(()) => return Ok(()),
                Err(ExternalError::Busy) if self.held => host.wait_hint(),
                Err(ExternalError::Busy) => {
                    self.mirror.tables.hold_vcpus();
                    self.held = true;
                }
                Err(ExternalError::Refused(status)) => {
                    self.mirror.set_bug(status);
                    return Err(());
                }
            }
        }
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        if self.held {
            self.mirror.tables.release_vcpus();
        }
    }
}

/// Leaves of a mirror that are blocked and frozen. What is left when it is dropped gets its old
/// value back.
struct Batch<'s, F: MmuFormat, H: Host> {
    leaves: [Option<Frozen<'s, Pages<H>>>; BATCH],
    len: usize,
    format: core::marker::PhantomData<fn() -> F>,
}

impl<'s, F: MmuFormat, H: Host> Batch<'s, F, H> {
    fn new() -> Self {
        Self {
            leaves: [const { None }; BATCH],
            len: 0,
            format: core::marker::PhantomData,
        }
    }

    /// Takes a leaf. Returns whether the batch is full now.
    fn add(&mut self, leaf: Frozen<'s, Pages<H>>) -> bool {
        if let Some(free) = self.leaves.get_mut(self.len) {
            *free = Some(leaf);
            self.len += 1;
        }
        self.len == BATCH
    }

    /// Takes the pages of all leaves out. Returns how many.
    fn remove(&mut self, hold: &mut Hold<'_>, host: &H) -> Result<u64, ()> {
        if self.len == 0 {
            return Ok(0);
        }
        hold.insist(host, |mirror| mirror.tables.track())?;
        let mut removed = 0;
        for leaf in &mut self.leaves[..self.len] {
            let Some(frozen) = leaf.take() else { continue };
            let (place, value) = (frozen.seen().place(), frozen.seen().value());
            let gfn = place.gpa().frame();
            let hpa = F::leaf_address(value, place.height());
            hold.insist(host, |mirror| {
                mirror.tables.remove_leaf(gfn, Level::L4K, hpa)
            })?;
            frozen.publish(F::EMPTY);
            removed += 1;
        }
        self.len = 0;
        Ok(removed)
    }
}

impl<F: MmuFormat, H: Host> Mmu<F, H> {
    /// Takes every page of `gfns` out of the mirror and the external tables. The caller has made
    /// sure that no fault brings back what is taken.
    pub(crate) fn zap_mirror(&self, writer: &Writer<F>, root: &RootState, gfns: &Range<Gfn>) {
        let Some(mirror) = self.mirror.get() else {
            return;
        };
        if mirror.bug().is_some() {
            return;
        }
        let mut hold = Hold {
            mirror,
            held: false,
        };
        let mut batch = Batch::<F, H>::new();
        let range = gfns.start.address()..gfns.end.address();
        let mut cursor = Cursor::new(self.table_locked(root, writer), range);
        while let Some(seen) = cursor.next() {
            match seen.entry::<F>() {
                Entry::Leaf => {}
                // A fault on a frame that stays links a table.
                Entry::Frozen => {
                    self.host().wait_hint();
                    cursor.again();
                    continue;
                }
                Entry::Empty | Entry::Table(_) | Entry::Special => continue,
            }
            let Ok(frozen) = cursor.table().freeze(seen) else {
                cursor.again();
                continue;
            };
            let gfn = seen.place().gpa().frame();
            let blocked = hold.insist(self.host(), |mirror| {
                mirror.tables.block_leaf(gfn, Level::L4K)
            });
            if blocked.is_err() {
                return;
            }
            if batch.add(frozen) && self.remove_batch(&mut batch, &mut hold).is_err() {
                return;
            }
        }
        let _ = self.remove_batch(&mut batch, &mut hold);
    }

    fn remove_batch(&self, batch: &mut Batch<'_, F, H>, hold: &mut Hold<'_>) -> Result<(), ()> {
        let removed = batch.remove(hold, self.host())?;
        self.unmapped[0].fetch_add(removed, Ordering::Relaxed);
        Ok(())
    }

    /// The VM ends: takes back what its external tables have. The mirror itself goes like other
    /// roots.
    pub(crate) fn end_mirror(&self, writer: &Writer<F>, roots: &[Arc<RootState>]) {
        let Some(mirror) = self.mirror.get() else {
            return;
        };
        mirror.tables.end();
        for root in roots.iter().filter(|root| root.role.mirror) {
            let table = self.table_locked(root, writer);
            let end = Gfn::new(mirror.shared >> twofold_arch::PAGE_SHIFT);
            let mut cursor = Cursor::new(table, Gfn::new(0).address()..end.address());
            while let Some(seen) = cursor.next() {
                if seen.entry::<F>() == Entry::Leaf {
                    let hpa = F::leaf_address(seen.value(), Height::LEAF);
                    mirror.tables.reclaim_leaf(hpa, Level::L4K);
                }
            }
        }
        for page in mirror.pages.lock(self.host()).drain(..) {
            mirror.tables.reclaim_table(page);
            self.host().free_table(page);
        }
    }
}
