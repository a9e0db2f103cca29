//! Changes of host memory under the guest: what Linux calls an MMU notifier.

use crate::filter::{RangeFilter, RangeOperation};
use crate::format::MmuFormat;
use crate::host::Host;
use crate::mmu::{Mmu, Writer};
use crate::slots::SlotInfo;
use alloc::vec::Vec;
use core::ops::Range;
use twofold_arch::{Gfn, PAGE_SHIFT, PAGE_SIZE};
use twofold_table::Debt;

/// A change of host memory in progress: from [`Mmu::begin_host_change`] to
/// [`Mmu::end_host_change`]. No guest can reach the range in between.
#[must_use = "the range stays unreachable for the guest until the change is ended"]
#[derive(Debug)]
pub struct PendingChange {
    mmu: u64,
}

/// [`PendingChange`] that ends itself when dropped.
#[must_use = "the change ends when this is dropped"]
pub struct HostChange<'a, F: MmuFormat, H: Host> {
    mmu: &'a Mmu<F, H>,
}

impl<F: MmuFormat, H: Host> Drop for HostChange<'_, F, H> {
    fn drop(&mut self) {
        self.mmu.invalidation.end();
    }
}

/// The frames of `slot` that have memory in `hva`.
pub(crate) fn frames_in(slot: &SlotInfo, hva: &Range<u64>) -> Range<Gfn> {
    let first = hva.start.saturating_sub(slot.hva) >> PAGE_SHIFT;
    let end = hva.end.saturating_sub(slot.hva);
    let end = (end.saturating_add(PAGE_SIZE - 1) >> PAGE_SHIFT).min(slot.pages);
    let base = slot.base.get();
    Gfn::new(base + first.min(end))..Gfn::new(base + end)
}

impl<F: MmuFormat, H: Host> Mmu<F, H> {
    /// Announces a change of host memory in `hva` (a range of addresses) and takes it away from
    /// the guest; when this returns, no virtual processor can reach it until the guard is dropped.
    pub fn host_change(&self, hva: Range<u64>) -> HostChange<'_, F, H> {
        self.begin(hva);
        HostChange { mmu: self }
    }

    /// [`host_change`](Self::host_change) of all host memory (a file behind some slot shrinks,
    /// for instance).
    pub fn host_change_all(&self) -> HostChange<'_, F, H> {
        self.host_change(0..u64::MAX)
    }

    /// [`host_change`](Self::host_change) without a guard that borrows the MMU: the caller owes
    /// one [`end_host_change`](Self::end_host_change).
    pub fn begin_host_change(&self, hva: Range<u64>) -> PendingChange {
        self.begin(hva);
        PendingChange { mmu: self.id }
    }

    /// Ends a change. Faults on its range, which were told to retry, go on.
    ///
    /// # Panics
    /// If the change belongs to another MMU.
    pub fn end_host_change(&self, change: PendingChange) {
        assert!(
            change.mmu == self.id,
            "a change was ended at an MMU that is not its own"
        );
        self.invalidation.end();
    }

    /// [`begin_host_change`](Self::begin_host_change) of private memory: `addresses` are those that
    /// the hypervisor gave its guest memory files. What the guest had mapped there is gone when
    /// this returns, and what it had mapped of the shared half stays.
    pub fn begin_private_change(&self, addresses: Range<u64>) -> PendingChange {
        let operations = {
            let mut writer = self.lock();
            self.invalidation.begin(addresses.clone());
            let mut operations = Vec::new();
            writer
                .by_private
                .overlapping(addresses.clone(), |as_id, id| {
                    let slot = self.slot_by_id(&writer, as_id, id);
                    if let Some((info, address)) =
                        slot.and_then(|slot| Some((slot.info, slot.private?)))
                    {
                        let half = SlotInfo {
                            hva: address,
                            ..info
                        };
                        operations.push(RangeOperation {
                            as_id,
                            gfns: frames_in(&half, &addresses),
                            filter: RangeFilter::Private,
                            may_block: true,
                        });
                    }
                });
            if !operations.is_empty() {
                let _readers = self.synchronize(&mut writer);
            }
            operations
        };
        // Slots that come now cannot map the range before the change ends, and slots that go take
        // their mappings along.
        for operation in &operations {
            self.zap_range(operation);
        }
        PendingChange { mmu: self.id }
    }

    /// Whether a slot is bound to any of these addresses of guest memory files.
    pub fn is_bound(&self, addresses: Range<u64>) -> bool {
        let mut any = false;
        self.lock()
            .by_private
            .overlapping(addresses, |_, _| any = true);
        any
    }

    fn begin(&self, hva: Range<u64>) {
        let mut writer = self.lock();
        // Recorded even if no slot has memory there: one may be created before the change ends.
        self.invalidation.begin(hva.clone());
        let mut any = false;
        writer.by_hva.overlapping(hva.clone(), |_, _| any = true);
        if !any {
            return;
        }
        let _readers = self.synchronize(&mut writer);
        let writer: &Writer<F> = &writer;
        let mut debt = Debt::none();
        writer.by_hva.overlapping(hva.clone(), |as_id, id| {
            if let Some(slot) = self.slot_by_id(writer, as_id, id) {
                let operation = RangeOperation {
                    as_id,
                    gfns: frames_in(&slot.info, &hva),
                    filter: RangeFilter::Shared,
                    may_block: false,
                };
                self.zap_gfns(writer, &operation, &mut debt);
            }
        });
        self.pay(writer, debt);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::region::RegionFlags;

    #[test]
    fn a_partly_changed_page_is_changed_and_nothing_beyond_the_slot() {
        let slot = SlotInfo {
            id: 0,
            as_id: 0,
            base: Gfn::new(100),
            pages: 10,
            hva: 0x20000,
            flags: RegionFlags::empty(),
        };
        let frames = |start, end| {
            let range = frames_in(&slot, &(start..end));
            (range.start.get(), range.end.get())
        };
        assert_eq!(frames(0, u64::MAX), (100, 110));
        assert_eq!(frames(0x20000, 0x20001), (100, 101));
        assert_eq!(frames(0x20fff, 0x21001), (100, 102));
        assert_eq!(frames(0x29fff, 0x40000), (109, 110));
        assert_eq!(frames(0, 0x20000), (100, 100));
        assert_eq!(frames(0x2a000, 0x30000), (110, 110));
    }
}
