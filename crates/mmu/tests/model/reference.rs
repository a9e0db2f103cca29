//! The reference: plain maps of what should be there, and what each operation should do to them.

use crate::operations::{Access, FRAMES, ROLES};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use twofold_arch::Level;

pub(crate) const LOG: u32 = 1;
pub(crate) const READONLY: u32 = 2;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    pub(crate) base: u64,
    pub(crate) pages: u64,
    /// Host page of the first frame.
    pub(crate) host: u64,
    pub(crate) flags: u32,
}

impl Slot {
    pub(crate) fn holds(&self, gfn: u64) -> bool {
        (self.base..self.base + self.pages).contains(&gfn)
    }

    pub(crate) fn host_page(&self, gfn: u64) -> u64 {
        self.host + gfn - self.base
    }

    pub(crate) fn hva(&self, gfn: u64) -> u64 {
        self.host_page(gfn) << 12
    }

    pub(crate) fn logs(&self) -> bool {
        self.flags & LOG != 0
    }

    pub(crate) fn frames(&self) -> Range<u64> {
        self.base..self.base + self.pages
    }

    /// Whether a page of this size around `gfn` is in the slot with all its parts, and host and
    /// guest agree where it begins.
    pub(crate) fn may_be_huge(&self, gfn: u64, level: Level) -> bool {
        let whole = extent(gfn, level);
        whole.start >= self.base
            && whole.end <= self.base + self.pages
            && (self.host_page(gfn) ^ gfn).is_multiple_of(level.frames())
    }
}

/// The frames of the page of this size that holds `gfn`.
pub(crate) fn extent(gfn: u64, level: Level) -> Range<u64> {
    let first = gfn & !(level.frames() - 1);
    first..first + level.frames()
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

/// What one frame is mapped to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Mapping {
    /// The host frame.
    pub(crate) frame: u64,
    pub(crate) level: Level,
    /// Some write needs no exit: by W or, if the frame is guarded, by way of the sub-page permission
    /// table.
    pub(crate) write: bool,
    pub(crate) execute: bool,
    /// W may be given back without asking the host.
    pub(crate) may_write: bool,
    pub(crate) accessed: bool,
    pub(crate) dirty: bool,
    /// Every permission was taken away to notice the next use.
    pub(crate) tracked: bool,
}

impl Mapping {
    pub(crate) fn allows(&self, access: Access) -> bool {
        !self.tracked
            && match access {
                Access::Read => true,
                Access::Write => self.write,
                Access::Fetch => self.execute,
            }
    }

    fn at(&self, from: u64, to: u64) -> Self {
        Self {
            frame: self.frame.wrapping_add(to.wrapping_sub(from)),
            ..*self
        }
    }
}

/// How processors and the MMU of one sequence keep track of use and writes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    /// Processors set accessed and dirty bits.
    pub(crate) flags: bool,
    /// And keep a log.
    pub(crate) pml: bool,
    pub(crate) zap_all: bool,
}

#[derive(Debug)]
pub(crate) struct Reference {
    pub(crate) rules: Rules,
    pub(crate) nx: bool,
    pub(crate) slots: BTreeMap<(u16, u16), Slot>,
    /// Access maps that are not full, by address space and frame.
    pub(crate) maps: BTreeMap<(u16, u64), u32>,
    /// Regions of 2M of each address space whose vectors are in the table, by number.
    pub(crate) vectors: BTreeSet<(u16, u64)>,
    /// By role and frame, of those in [`FRAMES`].
    pub(crate) mapped: BTreeMap<(usize, u64), Mapping>,
    /// A bit for each page of a slot that logs; empty where rings are used.
    pub(crate) dirty: BTreeMap<(u16, u16), Vec<u64>>,
    /// What waits in the ring, if there is one; and what was harvested and not reset.
    pub(crate) ring: Option<VecDeque<(u16, u16, u64)>>,
    pub(crate) harvested: Vec<(u16, u16, u64)>,
}

impl Reference {
    pub(crate) fn slot_at(&self, as_id: u16, gfn: u64) -> Option<(u16, Slot)> {
        let mut slots = self.slots.iter();
        slots
            .find(|((a, _), slot)| *a == as_id && slot.holds(gfn))
            .map(|((_, id), slot)| (*id, *slot))
    }

    pub(crate) fn map_of(&self, as_id: u16, gfn: u64) -> u32 {
        self.maps.get(&(as_id, gfn)).copied().unwrap_or(u32::MAX)
    }

    /// Whether any of `gfns` has a map that is not full.
    pub(crate) fn guards(&self, as_id: u16, gfns: Range<u64>) -> bool {
        let mut guarded = self.maps.range((as_id, gfns.start)..(as_id, gfns.end));
        guarded.next().is_some()
    }

    /// Whether the map of `gfn` forbids writes at its beginning, where guests write.
    pub(crate) fn denies(&self, as_id: u16, gfn: u64) -> bool {
        self.map_of(as_id, gfn) & 1 == 0
    }

    /// The vectors of every region that has a part in `gfns` are gone.
    pub(crate) fn cut_vectors(&mut self, as_id: u16, gfns: &Range<u64>) {
        let regions = gfns.start >> 9..(gfns.end + 511) >> 9;
        self.vectors
            .retain(|(other, region)| *other != as_id || !regions.contains(region));
    }

    /// A slot is gone, with its maps.
    pub(crate) fn forget_maps(&mut self, as_id: u16, gfns: Range<u64>) {
        self.cut_vectors(as_id, &gfns);
        self.maps
            .retain(|(other, gfn), _| *other != as_id || !gfns.contains(gfn));
    }

    /// Frames from `first` on get these maps, which are not what they have.
    pub(crate) fn set_maps(&mut self, as_id: u16, first: u64, maps: &[u32]) {
        let gfns = first..first + maps.len() as u64;
        self.cut_vectors(as_id, &gfns);
        let before = self.maps.clone();
        for (gfn, map) in gfns.clone().zip(maps) {
            match *map {
                u32::MAX => self.maps.remove(&(as_id, gfn)),
                map => self.maps.insert((as_id, gfn), map),
            };
        }
        let after = self.maps.clone();
        // What stands in W's place is not followed by W before the next write.
        for (_, gfn, mapping) in self.in_range(as_id, gfns.clone()) {
            let guarded = |maps: &BTreeMap<_, _>| maps.contains_key(&(as_id, gfn));
            if mapping.level == Level::L4K && guarded(&before) && !guarded(&after) {
                mapping.write = false;
            }
        }
        // What could not be split went as a whole.
        let gone: Vec<_> = self
            .in_range(as_id, gfns)
            .filter(|(_, gfn, mapping)| {
                let whole = extent(*gfn, mapping.level);
                let mut guarded = after.range((as_id, whole.start)..(as_id, whole.end));
                mapping.level > Level::L4K && guarded.next().is_some()
            })
            .map(|(role, gfn, _)| (role, gfn))
            .collect();
        for key in gone {
            self.mapped.remove(&key);
        }
    }

    pub(crate) fn get(&self, role: usize, gfn: u64) -> Option<Mapping> {
        self.mapped.get(&(role, gfn)).copied()
    }

    /// Every mapping of the address space whose leaf has a part in `gfns`.
    fn in_range(
        &mut self,
        as_id: u16,
        gfns: Range<u64>,
    ) -> impl Iterator<Item = (usize, u64, &mut Mapping)> {
        self.mapped
            .iter_mut()
            .filter_map(move |(&(role, gfn), mapping)| {
                let leaf = extent(gfn, mapping.level);
                let concerned = ROLES[role].as_id() == as_id && overlap(&leaf, &gfns);
                concerned.then_some((role, gfn, mapping))
            })
    }

    /// Takes every leaf away that has a part in `gfns`.
    pub(crate) fn unmap(&mut self, as_id: u16, gfns: Range<u64>) {
        let gone: Vec<_> = self
            .in_range(as_id, gfns)
            .map(|(role, gfn, _)| (role, gfn))
            .collect();
        for key in gone {
            self.mapped.remove(&key);
        }
    }

    /// Takes away what has host memory in `host`, a range of host pages.
    pub(crate) fn unmap_host(&mut self, host: Range<u64>) {
        for ((as_id, _), slot) in self.slots.clone() {
            let first = host.start.max(slot.host);
            let end = host.end.min(slot.host + slot.pages);
            if first < end {
                let base = slot.base;
                self.unmap(as_id, base + first - slot.host..base + end - slot.host);
            }
        }
    }

    /// Changes all frames of a leaf in one root alike.
    pub(crate) fn change_leaf(&mut self, role: usize, gfn: u64, change: impl Fn(&mut Mapping)) {
        if let Some(leaf) = self.get(role, gfn) {
            let whole = extent(gfn, leaf.level);
            for (_, mapping) in self
                .mapped
                .range_mut((role, whole.start)..(role, whole.end))
            {
                change(mapping);
            }
        }
    }

    /// Puts a leaf for `gfn` where it belongs, in the place of whatever was there.
    pub(crate) fn put_leaf(&mut self, role: usize, gfn: u64, mapping: Mapping) {
        let whole = extent(gfn, mapping.level);
        for other in FRAMES {
            if whole.contains(&other) {
                self.mapped.insert((role, other), mapping.at(gfn, other));
            }
        }
    }

    fn smaller(mapping: &mut Mapping, nx: bool) {
        mapping.level = mapping.level.below().unwrap();
        if mapping.level == Level::L4K && nx {
            mapping.execute = true;
        }
    }

    /// One leaf becomes leaves of the next smaller size.
    pub(crate) fn split_leaf(&mut self, role: usize, gfn: u64) {
        let nx = self.nx;
        self.change_leaf(role, gfn, |mapping| Self::smaller(mapping, nx));
    }

    /// Every leaf with a part in `gfns` becomes small.
    pub(crate) fn split(&mut self, as_id: u16, gfns: Range<u64>) {
        let nx = self.nx;
        for level in [Level::L1G, Level::L2M] {
            for (_, _, mapping) in self.in_range(as_id, gfns.clone()) {
                if mapping.level == level {
                    Self::smaller(mapping, nx);
                }
            }
        }
    }

    /// The next write to each of `gfns` is noticed.
    pub(crate) fn notice_writes(&mut self, as_id: u16, gfns: Range<u64>) {
        let pml = self.rules.pml;
        for (role, _, mapping) in self.in_range(as_id, gfns) {
            if !mapping.write {
                continue;
            }
            if pml && mapping.level == Level::L4K && !ROLES[role].guest_mode {
                mapping.dirty = false;
            } else {
                mapping.write = false;
            }
        }
    }

    /// A page of the slot is written, or may be written from now on.
    pub(crate) fn mark(&mut self, as_id: u16, gfn: u64) {
        let Some((id, slot)) = self.slot_at(as_id, gfn) else {
            return;
        };
        if slot.logs() {
            let page = (as_id, id, gfn - slot.base);
            match &mut self.ring {
                Some(ring) => ring.push_back(page),
                None => {
                    let bits = self.dirty.get_mut(&(as_id, id)).unwrap();
                    bits[(page.2 / 64) as usize] |= 1 << (page.2 % 64);
                }
            }
        }
    }

    /// Whether a write to the page now would tell nobody anything new.
    pub(crate) fn is_known_dirty(&self, as_id: u16, gfn: u64) -> bool {
        let Some((id, slot)) = self.slot_at(as_id, gfn) else {
            return false;
        };
        let page = gfn - slot.base;
        let name = (as_id, id, page);
        !slot.logs()
            || match &self.ring {
                Some(ring) => ring.contains(&name) || self.harvested.contains(&name),
                None => self.dirty[&(as_id, id)][(page / 64) as usize] >> (page % 64) & 1 == 1,
            }
    }

    /// The bitmap of a slot that has begun to log.
    pub(crate) fn begin_log(&mut self, as_id: u16, id: u16, all_dirty: bool) {
        let pages = self.slots[&(as_id, id)].pages;
        let bits = (0..pages.div_ceil(64)).map(|word| match pages - 64 * word {
            _ if !all_dirty => 0,
            rest @ 0..64 => (1 << rest) - 1,
            _ => u64::MAX,
        });
        if self.ring.is_none() {
            self.dirty.insert((as_id, id), bits.collect());
        }
    }

    /// The next write is noticed to those pages of a slot, from `first` on, that have a bit.
    pub(crate) fn notice_taken(&mut self, as_id: u16, slot: &Slot, first: u64, bits: &[u64]) {
        let taken = |gfn: u64| {
            let page = gfn.wrapping_sub(slot.base).wrapping_sub(first);
            let word = bits.get((page / 64) as usize).copied().unwrap_or(0);
            word >> (page % 64) & 1 == 1
        };
        let leaves: BTreeSet<_> = self
            .in_range(as_id, slot.frames())
            .map(|(_, gfn, mapping)| {
                let whole = extent(gfn, mapping.level);
                (whole.start, whole.end)
            })
            .collect();
        for (start, end) in leaves {
            if let Some(gfn) = (start..end).find(|&gfn| taken(gfn)) {
                self.notice_writes(as_id, gfn..gfn + 1);
            }
        }
    }

    /// A page is asked whether it is young, and made old.
    pub(crate) fn age(&mut self, as_id: u16, gfn: u64, clear: bool) -> bool {
        let flags = self.rules.flags;
        let mut young = false;
        for (role, kind) in ROLES.iter().enumerate() {
            if kind.as_id() != as_id {
                continue;
            }
            let Some(leaf) = self.get(role, gfn) else {
                continue;
            };
            young |= if flags { leaf.accessed } else { !leaf.tracked };
            if !clear {
                continue;
            }
            // What stands in W's place stays, and means nothing while reading is not allowed.
            let guarded = self.guards(as_id, gfn..gfn + 1);
            self.change_leaf(role, gfn, |mapping| {
                if flags {
                    mapping.accessed = false;
                } else {
                    mapping.tracked = true;
                    mapping.write &= guarded;
                }
            });
        }
        young
    }

    /// A new leaf of a page that nobody has used.
    pub(crate) fn prepared(
        &self,
        frame: u64,
        level: Level,
        write: bool,
        logs: bool,
        guarded: bool,
    ) -> Mapping {
        let flags = self.rules.flags;
        Mapping {
            write: write && (flags || guarded) && !logs,
            may_write: write,
            accessed: false,
            dirty: false,
            tracked: !flags,
            ..self.fresh(frame, level, write)
        }
    }

    /// A new leaf of a page that the host has made present.
    pub(crate) fn fresh(&self, frame: u64, level: Level, write: bool) -> Mapping {
        Mapping {
            frame,
            level,
            write,
            execute: level == Level::L4K || !self.nx,
            may_write: write,
            accessed: self.rules.flags,
            dirty: self.rules.flags && write,
            tracked: false,
        }
    }
}
