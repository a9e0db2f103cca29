//! Ageing: which pages were used since they were last asked (SPEC 6.8).
//!
//! Where processors set accessed bits a question clears the bit; elsewhere it takes every permission
//! of the leaf, which the next access restores ([`fast_fault`](crate::fast_fault)). Neither flushes:
//! a processor that goes on using its old translation makes the page look older than it is, no
//! worse. Private memory has no age: what only its owner may touch is never taken away.

use crate::format::MmuFormat;
use crate::host::Host;
use crate::mmu::{Mmu, Writer};
use crate::spte::{self, PRIVATE};
use core::ops::Range;
use twofold_arch::Gfn;
use twofold_table::{Cursor, Debt, Entry};

/// What is asked of a page.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ask {
    /// Whether it is young.
    Test,
    /// The same, and it shall not be.
    Clear,
}

impl<F: MmuFormat, H: Host> Mmu<F, H> {
    /// Whether any page with host memory in `hva` (a range of addresses) was used by a guest since
    /// [`clear_young`](Self::clear_young): Linux's `test_young` notifier.
    pub fn test_young(&self, hva: Range<u64>) -> bool {
        self.age_host_range(hva, Ask::Test)
    }

    /// The same, and forgets that it was used: Linux's `clear_young` notifier. A use through a
    /// translation that a processor still holds may go unnoticed.
    pub fn clear_young(&self, hva: Range<u64>) -> bool {
        self.age_host_range(hva, Ask::Clear)
    }

    /// [`test_young`](Self::test_young) for frames of an address space.
    pub fn test_young_gfns(&self, as_id: u16, gfns: Range<Gfn>) -> bool {
        self.age(&self.lock(), as_id, gfns, Ask::Test)
    }

    /// [`clear_young`](Self::clear_young) for frames of an address space.
    pub fn clear_young_gfns(&self, as_id: u16, gfns: Range<Gfn>) -> bool {
        self.age(&self.lock(), as_id, gfns, Ask::Clear)
    }

    fn age_host_range(&self, hva: Range<u64>, ask: Ask) -> bool {
        let writer = self.lock();
        let mut young = false;
        writer.by_hva.overlapping(hva.clone(), |as_id, id| {
            if let Some(slot) = self.slot_by_id(&writer, as_id, id)
                && !(young && ask == Ask::Test)
            {
                let gfns = crate::host_change::frames_in(&slot.info, &hva);
                young |= self.age(&writer, as_id, gfns, ask);
            }
        });
        young
    }

    /// Asks every leaf of `gfns` in every root of the address space.
    fn age(&self, writer: &Writer<F>, as_id: u16, gfns: Range<Gfn>, ask: Ask) -> bool {
        let range = gfns.start.address()..gfns.end.address();
        let mut young = false;
        for root in writer.direct_roots(as_id) {
            let mut cursor = Cursor::new(self.table_locked(root, writer), range.clone());
            while let Some(seen) = cursor.next() {
                let entry = seen.value();
                if seen.entry::<F>() != Entry::Leaf
                    || entry & PRIVATE != 0
                    || !spte::is_young::<F>(entry)
                {
                    continue;
                }
                if ask == Ask::Test {
                    return true;
                }
                young = true;
                // The flush that this owes is not paid: see above.
                let mut unpaid = Debt::none();
                let new = spte::unused::<F>(entry);
                if cursor.table().shrink(seen, new, &mut unpaid).is_err() {
                    // The page was used meanwhile, or its mapping is gone.
                    cursor.again();
                }
            }
        }
        young
    }
}
