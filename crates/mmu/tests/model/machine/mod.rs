//! The MMU, a processor that walks its tables, and the reference, side by side.

mod access;
mod logs;
mod sizes;
mod sub_pages;

use crate::common::{self, HostState, Processor, Step, TestHost, World, region};
use crate::operations::{
    Access, DISTANCES, Extent, FRAMES, MOVES, Op, PLACES, ROLES, Recorder, Refusal, Setup,
};
use crate::reference::{LOG, Mapping, Reference, Rules, Slot, extent};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use twofold_arch::{Gfn, Level};
use twofold_mmu::{DirtyGfn, ManualProtect, Mmu, PopulateError, Reader, Root};
use twofold_table::{Entry, Height};

/// A translation that a processor holds.
#[derive(Clone, Copy, Debug)]
struct Translation {
    frame: u64,
    /// Some write needs no exit.
    write: bool,
    /// The sub-pages that may be written, as far as the processor knows.
    sub_pages: u32,
    dirty: bool,
}

/// What a processor finds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum View {
    Nothing,
    Refused,
    Leaf {
        frame: u64,
        level: Level,
        write: bool,
        /// Writes are looked up in the sub-page permission table.
        asks: bool,
        execute: bool,
        accessed: bool,
        dirty: bool,
    },
}

pub(crate) struct Machine<F: Processor> {
    setup: Setup,
    world: Arc<World>,
    mmu: Mmu<F, TestHost>,
    reader: Reader,
    ring: Arc<Box<[DirtyGfn]>>,
    /// Entries of the ring that the program has taken.
    taken: usize,
    roots: Vec<Option<Root>>,
    /// By processor, role and frame.
    tlb: BTreeMap<(usize, usize, u64), Translation>,
    flushes: u64,
    reference: Reference,
}

const RING_ENTRIES: usize = 4096;

impl<F: Processor> Machine<F> {
    pub(crate) fn new(setup: Setup) -> Self {
        let world = World::new(setup.offset);
        let mmu = Mmu::new(TestHost(Arc::clone(&world)), setup.config);
        *world.level_if_asked.lock().unwrap() = setup.level;
        if !setup.must_ask {
            *world.level.lock().unwrap() = setup.level;
        }
        world.no_execute.store(true, Ordering::Relaxed);
        let mut ring: Vec<DirtyGfn> = Vec::new();
        let reader = match setup.recorder {
            Recorder::Bitmap(manual) => {
                mmu.set_manual_protect(manual);
                mmu.reader()
            }
            Recorder::Ring => {
                ring.resize_with(RING_ENTRIES, DirtyGfn::default);
                mmu.enable_dirty_ring(16 * RING_ENTRIES as u64).unwrap();
                mmu.reader()
            }
        };
        let ring = Arc::new(ring.into_boxed_slice());
        let reader = match setup.recorder {
            Recorder::Ring => mmu.ring_reader(Arc::clone(&ring) as _),
            Recorder::Bitmap(_) => reader,
        };
        if setup.sub_pages {
            assert_eq!(mmu.enable_sub_pages().is_ok(), F::SUB_PAGE_WRITE != 0);
        }
        let roots = ROLES.map(|role| Some(mmu.load_root(role).unwrap()));
        let rules = Rules {
            flags: mmu.has_accessed_dirty(),
            pml: mmu.logs_by_pml(),
            zap_all: setup.config.slot_zap_all,
        };
        let reference = Reference {
            rules,
            nx: setup.config.nx_huge_pages,
            slots: BTreeMap::new(),
            maps: BTreeMap::new(),
            vectors: BTreeSet::new(),
            mapped: BTreeMap::new(),
            dirty: BTreeMap::new(),
            ring: (setup.recorder == Recorder::Ring).then(VecDeque::new),
            harvested: Vec::new(),
        };
        Self {
            setup,
            world,
            mmu,
            reader,
            ring,
            taken: 0,
            roots: roots.into(),
            tlb: BTreeMap::new(),
            flushes: 0,
            reference,
        }
    }

    fn root(&self, role: usize) -> &Root {
        self.roots[role].as_ref().unwrap()
    }

    fn short_of_pages(&self) -> bool {
        self.world.budget.load(Ordering::Relaxed) < common::PLENTY / 2
    }

    /// The entries that a walk for `gfn` meets, from the root down.
    fn path(&self, role: usize, gfn: u64) -> Vec<(Level, u64)> {
        let gfn = Gfn::new(gfn);
        let (mut table, mut level) = (self.root(role).hpa(), ROLES[role].level);
        let mut path = Vec::new();
        loop {
            let value = self.world.entry(table, level.index(gfn));
            let value = value.load(Ordering::Acquire);
            path.push((level, value));
            match F::decode(value, Height::from(level)) {
                Entry::Table(next) => {
                    table = next;
                    level = level.below().unwrap();
                }
                _ => return path,
            }
        }
    }

    fn view(&self, role: usize, gfn: u64) -> View {
        let (level, value) = *self.path(role, gfn).last().unwrap();
        match F::entry(value, level) {
            Step::Nothing => View::Nothing,
            Step::Refused => View::Refused,
            Step::Table(_) => panic!("{value:#x} is a table for the processor alone"),
            Step::Leaf {
                hpa,
                write,
                execute,
            } => View::Leaf {
                frame: (hpa.get() >> 12) + (gfn & (level.frames() - 1)),
                level,
                write,
                asks: level == Level::L4K && value & F::SUB_PAGE_WRITE != 0,
                execute,
                accessed: value & F::ACCESSED != 0,
                dirty: value & F::DIRTY != 0,
            },
        }
    }

    /// The level of the leaf for `gfn`, also of one that no processor can use.
    fn leaf_level(&self, role: usize, gfn: u64) -> Option<Level> {
        let (level, value) = *self.path(role, gfn).last().unwrap();
        (F::decode(value, Height::from(level)) == Entry::Leaf).then_some(level)
    }

    pub(crate) fn apply(&mut self, op: &Op) {
        match *op {
            Op::Create {
                as_id,
                id,
                place,
                distance,
                flags,
            } => self.create(as_id, id, PLACES[place], DISTANCES[distance], flags),
            Op::Delete { as_id, id } => self.delete(as_id, id),
            Op::Move { as_id, id, by } => self.relocate(as_id, id, MOVES[by]),
            Op::Flip { as_id, id } => self.flip(as_id, id),
            Op::Access {
                cpu,
                role,
                frame,
                access,
                anyway,
            } => self.access(cpu, role, FRAMES[frame], access, anyway),
            Op::Prefault { role, frame } => self.prefault(role, FRAMES[frame]),
            Op::HostChange {
                as_id,
                frame,
                extent,
            } => self.host_change(as_id, FRAMES[frame], extent),
            Op::HostChangeAll => {
                drop(self.mmu.host_change_all());
                self.reference.mapped.clear();
            }
            Op::ZapAll => {
                self.mmu.zap_all();
                self.reference.mapped.clear();
            }
            Op::GetDirty { as_id, id } => self.get_dirty(as_id, id),
            Op::ClearDirty {
                as_id,
                id,
                first,
                words,
                mask,
            } => self.clear_dirty(as_id, id, first * 64, words, mask),
            Op::HarvestRing { most } => self.harvest_ring(most),
            Op::ResetRing => self.reset_ring(),
            Op::HostWrite { as_id, frame } => {
                let gfn = FRAMES[frame];
                assert!(self.mmu.mark_dirty(&mut self.reader, as_id, Gfn::new(gfn)));
                self.reference.mark(as_id, gfn);
            }
            Op::Age {
                as_id,
                frame,
                clear,
            } => self.age(as_id, FRAMES[frame], clear),
            Op::Recover { as_id, id } => {
                self.mmu.recover_huge_pages(as_id, id);
                self.learn_recovered(as_id, id);
            }
            Op::NxHugePages { on } => {
                self.mmu.set_nx_huge_pages(on);
                if self.reference.nx != on {
                    self.reference.nx = on;
                    self.reference.mapped.clear();
                }
            }
            Op::RecoverNx => self.recover_nx(),
            Op::Reload { role } => {
                self.roots[role] = None;
                self.tlb.clear();
                self.roots[role] = Some(self.mmu.load_root(ROLES[role]).unwrap());
            }
            Op::SetAccess {
                as_id,
                frame,
                before,
                ref maps,
                write,
            } => {
                let gfn = FRAMES[frame];
                self.set_access(as_id, gfn.saturating_sub(before), maps);
                if write {
                    self.check();
                    let role = ROLES.iter().position(|role| role.as_id() == as_id);
                    self.access(0, role.unwrap(), gfn, Access::Write, false);
                }
            }
            Op::Budget { pages } => self.world.budget.store(pages, Ordering::Relaxed),
            Op::Refuse(refusal) => {
                *self.world.refuse.lock().unwrap() = Some(match refusal {
                    Refusal::Again => PopulateError::Again,
                    Refusal::Interrupted => PopulateError::Interrupted,
                    Refusal::Poisoned => PopulateError::Poisoned,
                });
            }
        }
        self.reload();
        self.check();
    }

    /// As a hypervisor does before it runs the guest: loads new roots in place of obsolete ones.
    fn reload(&mut self) {
        for (role, &wanted) in ROLES.iter().enumerate() {
            if self.root(role).is_obsolete() {
                self.world.budget.store(common::PLENTY, Ordering::Relaxed);
                self.roots[role] = Some(self.mmu.load_root(wanted).unwrap());
                self.tlb.retain(|&(_, other, _), _| other != role);
            }
        }
    }

    fn request(&self, as_id: u16, id: u16, slot: &Slot) -> twofold_mmu::Region {
        let name = u32::from(as_id) << 16 | u32::from(id);
        region(name, slot.base, slot.pages, slot.host, slot.flags)
    }

    fn begins_all_dirty(&self) -> bool {
        self.setup.recorder == Recorder::Bitmap(ManualProtect::all())
    }

    fn create(&mut self, as_id: u16, id: u16, place: (u64, u64), distance: u64, flags: u32) {
        if self.reference.slots.contains_key(&(as_id, id)) {
            return;
        }
        let slot = Slot {
            base: place.0,
            pages: place.1,
            host: place.0 + distance,
            flags,
        };
        let free = self
            .reference
            .slots
            .iter()
            .filter(|((a, _), _)| *a == as_id)
            .all(|(_, other)| {
                other.base + other.pages <= slot.base || slot.base + slot.pages <= other.base
            });
        let answer = self.mmu.set_region(self.request(as_id, id, &slot));
        assert_eq!(answer.is_ok(), free, "{answer:?}");
        if free {
            self.reference.slots.insert((as_id, id), slot);
            if slot.logs() {
                self.reference.begin_log(as_id, id, self.begins_all_dirty());
            }
        }
    }

    fn unmap_slot(&mut self, as_id: u16, slot: &Slot) {
        if self.reference.rules.zap_all {
            self.reference.mapped.clear();
        } else {
            self.reference.unmap(as_id, slot.frames());
        }
    }

    fn delete(&mut self, as_id: u16, id: u16) {
        let request = region(u32::from(as_id) << 16 | u32::from(id), 0, 0, 0, 0);
        let existed = self.reference.slots.remove(&(as_id, id));
        assert_eq!(self.mmu.set_region(request).is_ok(), existed.is_some());
        if let Some(slot) = existed {
            self.unmap_slot(as_id, &slot);
            self.reference.forget_maps(as_id, slot.frames());
            self.reference.dirty.remove(&(as_id, id));
        }
    }

    fn relocate(&mut self, as_id: u16, id: u16, by: i64) {
        let Some(&old) = self.reference.slots.get(&(as_id, id)) else {
            return;
        };
        let Some(base) = old.base.checked_add_signed(by) else {
            return;
        };
        let new = Slot { base, ..old };
        if self.mmu.set_region(self.request(as_id, id, &new)).is_ok() {
            // The bitmap moves with the slot.
            self.reference.slots.insert((as_id, id), new);
            self.unmap_slot(as_id, &old);
            self.reference.forget_maps(as_id, old.frames());
        }
    }

    /// Splits every leaf with a part in the range, or as many as there are pages for.
    fn expect_split(&mut self, as_id: u16, gfns: Range<u64>, was_short: bool) {
        if was_short {
            self.learn_levels();
        } else {
            self.reference.split(as_id, gfns);
        }
    }

    fn flip(&mut self, as_id: u16, id: u16) {
        let Some(&old) = self.reference.slots.get(&(as_id, id)) else {
            return;
        };
        let slot = Slot {
            flags: old.flags ^ LOG,
            ..old
        };
        let was_short = self.short_of_pages();
        self.mmu.set_region(self.request(as_id, id, &slot)).unwrap();
        self.reference.slots.insert((as_id, id), slot);
        if !slot.logs() {
            self.reference.dirty.remove(&(as_id, id));
            self.learn_recovered(as_id, id);
            return;
        }
        self.reference.begin_log(as_id, id, self.begins_all_dirty());
        if !self.begins_all_dirty() {
            if self.setup.config.eager_split {
                self.expect_split(as_id, slot.frames(), was_short);
            }
            self.reference.notice_writes(as_id, slot.frames());
        }
    }

    fn host_change(&mut self, as_id: u16, gfn: u64, what: Extent) {
        let Some((_, slot)) = self.reference.slot_at(as_id, gfn) else {
            return;
        };
        let page = slot.host_page(gfn);
        let level = match what {
            Extent::Page { .. } => Level::L4K,
            Extent::Large => Level::L2M,
            Extent::Huge => Level::L1G,
        };
        let pages = extent(page, level);
        let change = self
            .mmu
            .begin_host_change(pages.start << 12..pages.end << 12);
        let mut memory = self.world.memory.lock().unwrap();
        let mut broken = self.world.broken.lock().unwrap();
        match what {
            Extent::Page {
                frame_now,
                present,
                writable,
            } => {
                let now = HostState {
                    frame: common::usual_frame(page << 12) + (frame_now << 28),
                    present,
                    writable,
                };
                memory.insert(page, now);
                broken.insert(page >> 9);
            }
            Extent::Large | Extent::Huge => {
                memory.retain(|page, _| !pages.contains(page));
                broken.retain(|large| !pages.contains(&(large << 9)));
            }
        }
        drop((memory, broken));
        self.reference.unmap_host(pages.clone());
        // In the middle of the change nobody reaches what is changing.
        self.check();
        self.mmu.end_host_change(change);
    }

    /// The tables, the processors' translations, the counters and the invariants are as the
    /// reference says.
    fn check(&mut self) {
        for (role, kind) in ROLES.iter().enumerate() {
            for gfn in FRAMES {
                let expected = self.reference.get(role, gfn);
                let found = self.view(role, gfn);
                match (expected, found) {
                    (None, View::Nothing | View::Refused) => {}
                    (Some(Mapping { tracked: true, .. }), View::Nothing) => {
                        assert_eq!(self.leaf_level(role, gfn), expected.map(|leaf| leaf.level));
                    }
                    (Some(leaf), _) if !leaf.tracked => {
                        let guarded = self.reference.guards(kind.as_id(), gfn..gfn + 1);
                        let view = View::Leaf {
                            frame: leaf.frame,
                            level: leaf.level,
                            write: leaf.write && !guarded,
                            asks: leaf.write && guarded,
                            execute: leaf.execute,
                            accessed: leaf.accessed,
                            dirty: leaf.dirty,
                        };
                        assert_eq!(found, view, "gfn {gfn:#x}, {kind:?}");
                    }
                    _ => panic!("gfn {gfn:#x}, {kind:?}: {expected:?}, found {found:?}"),
                }
            }
        }
        self.check_vectors();
        let flushes = self.world.flushes.load(Ordering::Relaxed);
        if flushes != self.flushes {
            self.flushes = flushes;
            self.tlb.clear();
        }
        for (&(_, role, gfn), held) in &self.tlb {
            let leaf = self.reference.get(role, gfn);
            let still = leaf.is_some_and(|leaf| {
                // Ageing does not flush. A processor may go on writing where nobody has to know.
                let old = !self.reference.rules.flags && leaf.may_write;
                let unnoticed = old && self.reference.is_known_dirty(ROLES[role].as_id(), gfn);
                leaf.frame == held.frame
                    && (leaf.write || unnoticed || !held.write)
                    && (leaf.dirty || !held.dirty)
                    && held.sub_pages & !self.reference.map_of(ROLES[role].as_id(), gfn) == 0
            });
            assert!(
                still,
                "gfn {gfn:#x}: {held:?} was not flushed; now {leaf:?}"
            );
        }
        let report = self.mmu.check();
        assert!(report.violations.is_empty(), "{report}");
        let stats = self.mmu.stats();
        let counted = [stats.pages_4k, stats.pages_2m, stats.pages_1g];
        assert_eq!(counted, report.leaves, "leaves are miscounted");
        assert_eq!(stats.nx_lpage_splits, self.marked_tables().len() as u64);
        // What is not in use waits with the reader: a handful.
        let live = self.world.live_tables.load(Ordering::Relaxed) as u64;
        assert!((report.tables..=report.tables + 8).contains(&live));
    }

    /// All table pages come back.
    pub(crate) fn finish(self) {
        let Self {
            world,
            mmu,
            reader,
            roots,
            ..
        } = self;
        drop((roots, reader));
        drop(mmu);
        let live = world.live_tables.load(Ordering::Relaxed);
        assert_eq!(live, 0, "table pages leaked");
    }
}
