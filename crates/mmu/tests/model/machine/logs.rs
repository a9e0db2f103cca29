//! Dirty logs, dirty rings and ageing.

use super::{Machine, RING_ENTRIES};
use crate::common::Processor;
use crate::operations::Recorder;
use twofold_arch::Gfn;
use twofold_mmu::{DirtyLogError, ManualProtect};

impl<F: Processor> Machine<F> {
    pub(super) fn bitmap_error(&self, as_id: u16, id: u16) -> Option<DirtyLogError> {
        match self.setup.recorder {
            Recorder::Ring => Some(DirtyLogError::RingOnly),
            Recorder::Bitmap(_) => (!self.reference.dirty.contains_key(&(as_id, id)))
                .then_some(DirtyLogError::NotLogged),
        }
    }

    pub(super) fn get_dirty(&mut self, as_id: u16, id: u16) {
        let mut bits = vec![0; 0x40_0000 / 64 / 8];
        let answer = self.mmu.dirty_log_get(as_id, id, &mut bits);
        if let Some(error) = self.bitmap_error(as_id, id) {
            assert_eq!(answer, Err(error));
            return;
        }
        answer.unwrap();
        let slot = self.reference.slots[&(as_id, id)];
        let expected = self.reference.dirty[&(as_id, id)].clone();
        bits.truncate(expected.len());
        assert_eq!(bits, expected);
        if self.setup.recorder == Recorder::Bitmap(ManualProtect::empty()) {
            let bitmap = self.reference.dirty.get_mut(&(as_id, id)).unwrap();
            bitmap.fill(0);
            self.reference.notice_taken(as_id, &slot, 0, &expected);
        }
    }

    pub(super) fn clear_dirty(&mut self, as_id: u16, id: u16, first: u64, words: usize, mask: u64) {
        let slot = self.reference.slots.get(&(as_id, id)).copied();
        let rest = slot.map_or(0, |slot| slot.pages.saturating_sub(first));
        let pages = match rest {
            0 => 64,
            rest => rest.min(64 * words as u64),
        };
        let mut bits = vec![mask; words];
        let was_short = self.short_of_pages();
        let answer = self
            .mmu
            .dirty_log_clear(as_id, id, first, pages as u32, &mut bits);
        let error = self
            .bitmap_error(as_id, id)
            .or((rest == 0).then_some(DirtyLogError::Range));
        if let Some(error) = error {
            assert_eq!(answer, Err(error));
            return;
        }
        answer.unwrap();
        let slot = slot.unwrap();
        if self.setup.config.eager_split && self.begins_all_dirty() {
            let start = slot.base + first;
            self.expect_split(as_id, start..start + pages, was_short);
        }
        let bitmap = self.reference.dirty.get_mut(&(as_id, id)).unwrap();
        let mut taken = vec![0; pages.div_ceil(64) as usize];
        for (taken, dirty) in taken.iter_mut().zip(&mut bitmap[(first / 64) as usize..]) {
            *taken = *dirty & mask;
            *dirty &= !mask;
        }
        bits.truncate(taken.len());
        assert_eq!(bits, taken);
        self.reference.notice_taken(as_id, &slot, first, &taken);
    }

    pub(super) fn harvest_ring(&mut self, most: usize) {
        let Some(expected) = &mut self.reference.ring else {
            return;
        };
        for _ in 0..most {
            let found = self.ring[self.taken % RING_ENTRIES].harvest();
            let found = found.map(|(slot, page)| ((slot >> 16) as u16, slot as u16, page));
            assert_eq!(found, expected.pop_front());
            let Some(found) = found else { break };
            self.taken += 1;
            self.reference.harvested.push(found);
        }
    }

    pub(super) fn reset_ring(&mut self) {
        let count = self.mmu.reset_dirty_rings();
        let harvested = std::mem::take(&mut self.reference.harvested);
        assert_eq!(count as usize, harvested.len());
        for (as_id, id, page) in harvested {
            let slot = self.reference.slots.get(&(as_id, id)).copied();
            if let Some(slot) = slot.filter(|slot| slot.logs() && page < slot.pages) {
                let gfn = slot.base + page;
                self.reference.notice_writes(as_id, gfn..gfn + 1);
            }
        }
    }

    pub(super) fn age(&mut self, as_id: u16, gfn: u64, clear: bool) {
        let gfns = Gfn::new(gfn)..Gfn::new(gfn + 1);
        let slot = self.reference.slot_at(as_id, gfn);
        let alone = slot.filter(|(_, slot)| {
            let page = slot.host_page(gfn);
            let mut slots = self.reference.slots.values();
            1 == slots
                .by_ref()
                .filter(|slot| (slot.host..slot.host + slot.pages).contains(&page))
                .count()
        });
        let young = match (alone, clear) {
            (Some((_, slot)), false) => self.mmu.test_young(slot.hva(gfn)..slot.hva(gfn) + 1),
            (Some((_, slot)), true) => self.mmu.clear_young(slot.hva(gfn)..slot.hva(gfn) + 1),
            (None, false) => self.mmu.test_young_gfns(as_id, gfns),
            (None, true) => self.mmu.clear_young_gfns(as_id, gfns),
        };
        assert_eq!(young, self.reference.age(as_id, gfn, clear));
    }
}
