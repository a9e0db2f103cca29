//! Which slots have memory in a range of host-virtual addresses.
//!
//! Slots may share host memory, so their ranges overlap. They are kept by size class (log2 of the
//! pages), each class ordered by address: a slot of class k that overlaps a range begins less than
//! 2^(k+1) pages before its end, so a class is searched with one bounded scan.

use alloc::collections::BTreeMap;
use core::ops::Range;

const CLASSES: usize = 32;
const PAGE_SHIFT: u32 = twofold_arch::PAGE_SHIFT;

/// The writers' index from host-virtual addresses to slots, named by address space and id.
#[derive(Debug)]
pub(crate) struct HvaIndex {
    /// For each class: (first address, name) to the address after the last byte.
    classes: [BTreeMap<(u64, u32), u64>; CLASSES],
    /// Bit k: class k is not empty.
    used: u32,
}

fn class(pages: u64) -> usize {
    (pages.max(1).ilog2() as usize).min(CLASSES - 1)
}

fn name(as_id: u16, id: u16) -> u32 {
    u32::from(as_id) << 16 | u32::from(id)
}

impl HvaIndex {
    pub(crate) fn new() -> Self {
        Self {
            classes: core::array::from_fn(|_| BTreeMap::new()),
            used: 0,
        }
    }

    pub(crate) fn insert(&mut self, hva: u64, pages: u64, as_id: u16, id: u16) {
        let class = class(pages);
        self.classes[class].insert((hva, name(as_id, id)), hva + (pages << PAGE_SHIFT));
        self.used |= 1 << class;
    }

    pub(crate) fn remove(&mut self, hva: u64, pages: u64, as_id: u16, id: u16) {
        let class = class(pages);
        self.classes[class].remove(&(hva, name(as_id, id)));
        if self.classes[class].is_empty() {
            self.used &= !(1 << class);
        }
    }

    /// Calls `found` with address space and id of each slot that has memory in `hva`.
    pub(crate) fn overlapping(&self, hva: Range<u64>, mut found: impl FnMut(u16, u16)) {
        let mut used = self.used;
        while used != 0 {
            let class = used.trailing_zeros();
            used &= used - 1;
            let longest = 1u64 << (class + 1 + PAGE_SHIFT);
            let first = hva.start.saturating_sub(longest);
            let members = self.classes[class as usize].range((first, 0)..(hva.end, 0));
            for (&(_, name), &end) in members {
                if end > hva.start {
                    found((name >> 16) as u16, name as u16);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_overlapping_slot_is_found_and_no_other(
            slots in prop::collection::vec((0u64..64, 1u64..40), 0..24),
            removed in prop::collection::vec(any::<bool>(), 24),
            query in (0u64..110, 1u64..20),
        ) {
            let mut index = HvaIndex::new();
            let mut expected = Vec::new();
            let asked = query.0 << 12..(query.0 + query.1) << 12;
            for (id, &(page, pages)) in slots.iter().enumerate() {
                index.insert(page << 12, pages, (id % 2) as u16, id as u16);
            }
            for (id, &(page, pages)) in slots.iter().enumerate() {
                if removed[id] {
                    index.remove(page << 12, pages, (id % 2) as u16, id as u16);
                } else if page < query.0 + query.1 && query.0 < page + pages {
                    expected.push(id as u16);
                }
            }
            let mut found = Vec::new();
            index.overlapping(asked, |as_id, id| {
                assert_eq!(as_id, id % 2);
                found.push(id);
            });
            found.sort_unstable();
            prop_assert_eq!(found, expected);
        }
    }
}
