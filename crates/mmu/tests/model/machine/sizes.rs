//! Splitting, recovering, and the NX mitigation.

use super::{Machine, View};
use crate::common::Processor;
use crate::operations::{FRAMES, ROLES};
use crate::reference::{Mapping, READONLY, Slot, extent};
use std::collections::BTreeSet;
use std::ops::Range;
use twofold_arch::Level;
use twofold_mmu::nx_huge_pages::NX_SPLIT;
use twofold_table::{Entry, Height};

impl<F: Processor> Machine<F> {
    /// Tables that only the mitigation keeps from being leaves: role, level of the entry, first
    /// frame.
    pub(super) fn marked_tables(&self) -> BTreeSet<(usize, Level, u64)> {
        let mut marked = BTreeSet::new();
        for role in 0..ROLES.len() {
            for gfn in FRAMES {
                for (level, value) in self.path(role, gfn) {
                    let table = matches!(F::decode(value, Height::from(level)), Entry::Table(_));
                    if table && value & NX_SPLIT != 0 {
                        marked.insert((role, level, extent(gfn, level).start));
                    }
                }
            }
        }
        marked
    }

    pub(super) fn recover_nx(&mut self) {
        let marked = self.marked_tables();
        self.mmu.recover_nx_huge_pages(1);
        for (role, level, first) in marked {
            let slot = self.reference.slot_at(ROLES[role].as_id(), first);
            if slot.is_some_and(|(_, slot)| slot.logs()) {
                continue;
            }
            let gone = extent(first, level);
            self.reference
                .mapped
                .retain(|&(other, gfn), _| other != role || !gone.contains(&gfn));
        }
    }

    /// Without pages for tables some leaves stay larger than they should be: that is allowed.
    pub(super) fn learn_levels(&mut self) {
        for role in 0..ROLES.len() {
            for gfn in FRAMES {
                while let (Some(expected), Some(found)) =
                    (self.reference.get(role, gfn), self.leaf_level(role, gfn))
                    && found < expected.level
                {
                    self.reference.split_leaf(role, gfn);
                }
            }
        }
    }

    pub(super) fn host_level(&self, page: u64) -> Level {
        self.world.level_at(page << 12, self.setup.level)
    }

    /// Small leaves have become large where they may be. What the large leaf allows is taken from
    /// one of them; that it is not too much is all that is asked.
    pub(super) fn learn_recovered(&mut self, as_id: u16, id: u16) {
        if let Some(slot) = self.reference.slots.get(&(as_id, id)).copied() {
            self.learn_recovered_in(as_id, &slot, slot.frames());
        }
    }

    /// The same of a part of the slot.
    pub(super) fn learn_recovered_in(&mut self, as_id: u16, slot: &Slot, gfns: Range<u64>) {
        if slot.logs() {
            return;
        }
        let roles = 0..ROLES.len();
        for role in roles.filter(|&role| ROLES[role].as_id() == as_id) {
            for gfn in FRAMES.into_iter().filter(|gfn| gfns.contains(gfn)) {
                let Some(old) = self.reference.get(role, gfn) else {
                    continue;
                };
                let path = self.path(role, gfn);
                let (level, value) = *path.last().unwrap();
                let found = self.view(role, gfn);
                let may = |level: Level| {
                    level <= self.host_level(slot.host_page(gfn))
                        && slot.may_be_huge(gfn, level)
                        && !self.reference.guards(as_id, extent(gfn, level))
                };
                // Nothing that could be larger is left.
                for &(at, value) in &path {
                    let is_table = matches!(F::decode(value, Height::from(at)), Entry::Table(_));
                    let marked = value & NX_SPLIT != 0 && self.reference.nx;
                    if at.may_map() && is_table && !marked {
                        assert!(!may(at), "{gfn:#x} is small");
                    }
                }
                if level <= old.level {
                    continue;
                }
                assert!(may(level));
                let mut new = Mapping { level, ..old };
                new.execute = !self.reference.nx;
                match found {
                    View::Leaf {
                        write,
                        accessed,
                        dirty,
                        ..
                    } => {
                        assert!(!write || slot.flags & READONLY == 0);
                        (new.write, new.accessed, new.dirty) = (write, accessed, dirty);
                        new.tracked = false;
                    }
                    _ => {
                        assert!(!self.reference.rules.flags);
                        new.write = false;
                        new.tracked = true;
                    }
                }
                new.may_write = value & F::MMU_WRITABLE != 0;
                self.reference.put_leaf(role, gfn, new);
            }
        }
    }
}
