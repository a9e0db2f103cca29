//! Access maps and the table that processors look them up in.

use super::Machine;
use crate::common::Processor;
use crate::common::guarded::{Refused, vector};
use crate::operations::{FRAMES, ROLES};
use crate::reference::extent;
use twofold_arch::sppt::AccessMap;
use twofold_arch::{Gfn, Level};
use twofold_mmu::{FaultError, MmuFormat, Outcome, SubPageError};

impl<F: Processor> Machine<F> {
    fn has_sub_pages(&self) -> bool {
        self.setup.sub_pages && <F as MmuFormat>::SUB_PAGE_WRITE != 0
    }

    pub(super) fn set_access(&mut self, as_id: u16, first: u64, maps: &[u32]) {
        let set: Vec<_> = maps.iter().map(|map| AccessMap(*map)).collect();
        let was_short = self.short_of_pages();
        let answer = self.mmu.set_access(as_id, Gfn::new(first), &set);
        let gfns = first..first + maps.len() as u64;
        let mut without = gfns.clone();
        let without = without.find(|&gfn| self.reference.slot_at(as_id, gfn).is_none());
        let expected = match without {
            _ if !self.has_sub_pages() => Err(SubPageError::NotEnabled),
            Some(gfn) => Err(SubPageError::NoSlot(Gfn::new(gfn))),
            None => Ok(()),
        };
        assert_eq!(answer, expected);
        let mut frames = gfns.clone().zip(maps);
        let same = frames.all(|(gfn, map)| self.reference.map_of(as_id, gfn) == *map);
        if answer.is_err() || same {
            return;
        }
        let mut guarded = gfns.clone().zip(maps).filter(|(_, map)| **map != u32::MAX);
        if let Some((from, _)) = guarded.next() {
            let to = guarded.last().map_or(from, |(gfn, _)| gfn);
            self.expect_split(as_id, from..to + 1, was_short);
        }
        let regions = [first, gfns.end - 1].map(|gfn| extent(gfn, Level::L2M));
        let before = regions
            .clone()
            .map(|region| self.reference.guards(as_id, region));
        self.reference.set_maps(as_id, first, maps);
        for (region, guarded) in regions.into_iter().zip(before) {
            let slot = self.reference.slot_at(as_id, region.start);
            if let Some((_, slot)) = slot
                && guarded
                && !self.reference.guards(as_id, region.clone())
                && slot.holds(region.end - 1)
            {
                self.learn_recovered_in(as_id, &slot, region);
            }
        }
    }

    /// What the table says now, if it says anything.
    pub(super) fn vector(&self, role: usize, gfn: u64) -> Option<u32> {
        let table = self.mmu.sppt_root(ROLES[role])?;
        match vector(&self.world, table, Gfn::new(gfn).address()) {
            Ok(map) => Some(map.0),
            Err(Refused::Miss) => None,
            Err(other) => panic!("{other:?}"),
        }
    }

    /// A processor asks the table whether it may write at the beginning of the page, after a miss
    /// if need be. `None` without memory for that.
    pub(super) fn look_up(&mut self, role: usize, gfn: u64) -> Option<bool> {
        if self.vector(role, gfn).is_none() {
            let was_short = self.short_of_pages();
            let root = self.roots[role].as_ref().unwrap();
            let gpa = Gfn::new(gfn).address();
            match self.mmu.sppt_miss(&mut self.reader, root, gpa) {
                Err(FaultError::OutOfMemory) if was_short => return None,
                outcome => assert_eq!(outcome, Ok(Outcome::Fixed { level: Level::L2M })),
            }
            let region = (ROLES[role].as_id(), gfn >> 9);
            assert!(self.reference.vectors.insert(region));
        }
        self.vector(role, gfn).map(|map| map & 1 != 0)
    }

    /// The tables have the vectors that they should have, and those are the maps.
    pub(super) fn check_vectors(&self) {
        for role in [0, 2] {
            for gfn in FRAMES {
                let as_id = ROLES[role].as_id();
                let filled = self.reference.vectors.contains(&(as_id, gfn >> 9));
                let expected = filled.then(|| self.reference.map_of(as_id, gfn));
                assert_eq!(self.vector(role, gfn), expected, "gfn {gfn:#x}");
            }
        }
    }
}
