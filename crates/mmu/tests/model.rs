//! The MMU against a plain map from guest frame to host frame and permission: the same random
//! operations, and after each of them a processor that walks the tables finds exactly what the map
//! holds. Over EPT and NPT, with table pages at and away from their host-physical addresses, and
//! with allocations that fail.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use common::{Found, HostState, Processor, TestHost, World, region, walk};
use proptest::prelude::*;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use twofold_arch::{Gfn, Level, Pferr};
use twofold_mmu::{Config, Ept, Fault, FaultError, Mmu, Npt, Outcome, Reader, Root, RootRole};

/// Guest frames at the ends of tables, and a few far apart, in each address space.
const FRAMES: [u64; 14] = [
    0, 1, 2, 5, 510, 511, 512, 513, 1023, 1024, 0x3_ffff, 0x4_0000, 0x7ff_ffff, 0x800_0000,
];
/// Slots: first frame, pages. Some overlap, so that not all can exist.
const PLACES: [(u64, u64); 7] = [
    (0, 4),
    (2, 6),
    (508, 8),
    (0x3_fff0, 0x20),
    (0x7ff_fff0, 0x20),
    (1000, 100),
    (0, 2048),
];
/// Host pages that slots begin at.
const HOST: [u64; 3] = [0x10000, 0x10004, 0x20200];
const ROLES: [RootRole; 3] = [
    RootRole::NORMAL,
    RootRole {
        level: Level::L256T,
        smm: false,
        guest_mode: false,
    },
    RootRole {
        level: Level::L512G,
        smm: true,
        guest_mode: false,
    },
];

#[derive(Clone, Copy, Debug)]
enum Access {
    Read,
    Write,
    Fetch,
}

#[derive(Clone, Debug)]
enum Op {
    Set {
        as_id: u16,
        id: u16,
        place: usize,
        host: usize,
        flags: u32,
    },
    Delete {
        as_id: u16,
        id: u16,
    },
    Fault {
        role: usize,
        frame: usize,
        access: Access,
    },
    /// The host page of a frame changes in a host change.
    Change {
        as_id: u16,
        frame: usize,
        frame_now: u64,
        present: bool,
        writable: bool,
    },
    ChangeAll,
    ZapAll,
    GetDirty {
        as_id: u16,
        id: u16,
    },
    /// The hypervisor has this many table pages left.
    Budget {
        pages: i64,
    },
}

fn ops() -> impl Strategy<Value = Op> {
    let as_id = prop_oneof![4 => Just(0u16), 1 => Just(1u16)];
    let access = prop::sample::select(vec![Access::Read, Access::Write, Access::Fetch]);
    prop_oneof![
        5 => (as_id.clone(), 0u16..4, 0..PLACES.len(), 0..HOST.len(), 0u32..4)
            .prop_map(|(as_id, id, place, host, flags)| Op::Set { as_id, id, place, host, flags }),
        1 => (as_id.clone(), 0u16..4).prop_map(|(as_id, id)| Op::Delete { as_id, id }),
        16 => (0..ROLES.len(), 0..FRAMES.len(), access)
            .prop_map(|(role, frame, access)| Op::Fault { role, frame, access }),
        3 => (as_id.clone(), 0..FRAMES.len(), 1u64..4, any::<bool>(), any::<bool>()).prop_map(
            |(as_id, frame, frame_now, present, writable)| Op::Change {
                as_id, frame, frame_now, present, writable,
            }
        ),
        1 => Just(Op::ChangeAll),
        1 => Just(Op::ZapAll),
        3 => (as_id, 0u16..4).prop_map(|(as_id, id)| Op::GetDirty { as_id, id }),
        1 => prop_oneof![(0i64..6), Just(common::PLENTY)].prop_map(|pages| Op::Budget { pages }),
    ]
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    base: u64,
    pages: u64,
    host: u64,
    flags: u32,
}

impl Slot {
    fn holds(&self, gfn: u64) -> bool {
        (self.base..self.base + self.pages).contains(&gfn)
    }

    fn hva(&self, gfn: u64) -> u64 {
        (self.host + gfn - self.base) << 12
    }
}

const LOG: u32 = 1;
const READONLY: u32 = 2;

/// What the tables should hold.
#[derive(Default)]
struct Model {
    slots: HashMap<(u16, u16), Slot>,
    /// By role and frame: host frame, host-writable, W.
    mapped: HashMap<(usize, u64), (u64, bool, bool)>,
    /// By address space, slot and page.
    dirty: BTreeSet<(u16, u16, u64)>,
}

impl Model {
    fn slot_at(&self, as_id: u16, gfn: u64) -> Option<(u16, Slot)> {
        let mut slots = self.slots.iter();
        slots
            .find(|((a, _), s)| *a == as_id && s.holds(gfn))
            .map(|((_, id), s)| (*id, *s))
    }

    fn unmap(&mut self, as_id: u16, gone: impl Fn(u64) -> bool) {
        self.mapped
            .retain(|(role, gfn), _| ROLES[*role].as_id() != as_id || !gone(*gfn));
    }

    fn protect(&mut self, as_id: u16, pages: impl Fn(u64) -> bool) {
        for ((role, gfn), (_, _, write)) in &mut self.mapped {
            if ROLES[*role].as_id() == as_id && pages(*gfn) {
                *write = false;
            }
        }
    }
}

struct Test<F: Processor> {
    world: Arc<World>,
    mmu: Mmu<F, TestHost>,
    reader: Reader,
    roots: [Root; 3],
    model: Model,
    zap_all: bool,
}

impl<F: Processor> Test<F> {
    fn new(offset: u64, zap_all: bool) -> Self {
        let world = World::new(offset);
        let config = Config {
            slot_zap_all: zap_all,
            ..Config::default()
        };
        let mmu = Mmu::new(TestHost(Arc::clone(&world)), config);
        let reader = mmu.reader();
        let roots = ROLES.map(|role| mmu.load_root(role).unwrap());
        Self {
            world,
            mmu,
            reader,
            roots,
            model: Model::default(),
            zap_all,
        }
    }

    /// As a hypervisor does before it runs the guest: loads new roots in place of obsolete ones.
    fn reload(&mut self) {
        for (root, role) in self.roots.iter_mut().zip(ROLES) {
            if root.is_obsolete() {
                self.world.budget.store(common::PLENTY, Ordering::Relaxed);
                *root = self.mmu.load_root(role).unwrap();
            }
        }
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Set {
                as_id,
                id,
                place,
                host,
                flags,
            } => self.set(as_id, id, place, host, flags),
            Op::Delete { as_id, id } => {
                let request = region(u32::from(as_id) << 16 | u32::from(id), 0, 0, 0, 0);
                let existed = self.model.slots.remove(&(as_id, id));
                assert_eq!(self.mmu.set_region(request).is_ok(), existed.is_some());
                if let Some(slot) = existed {
                    self.slot_gone(as_id, id, slot);
                }
            }
            Op::Fault {
                role,
                frame,
                access,
            } => self.fault(role, FRAMES[frame], access),
            Op::Change {
                as_id,
                frame,
                frame_now,
                present,
                writable,
            } => {
                let Some((_, slot)) = self.model.slot_at(as_id, FRAMES[frame]) else {
                    return;
                };
                let hva = slot.hva(FRAMES[frame]);
                let change = self.mmu.host_change(hva..hva + 4096);
                let now = HostState {
                    frame: common::usual_frame(hva) + (frame_now << 28),
                    present,
                    writable,
                };
                self.world.memory.lock().unwrap().insert(hva >> 12, now);
                for ((as_id, _), slot) in self.model.slots.clone() {
                    self.model
                        .unmap(as_id, |gfn| slot.holds(gfn) && slot.hva(gfn) == hva);
                }
                self.check();
                drop(change);
            }
            Op::ChangeAll => {
                drop(self.mmu.host_change_all());
                self.model.mapped.clear();
            }
            Op::ZapAll => {
                self.mmu.zap_all();
                self.model.mapped.clear();
            }
            Op::GetDirty { as_id, id } => self.get_dirty(as_id, id),
            Op::Budget { pages } => self.world.budget.store(pages, Ordering::Relaxed),
        }
        self.reload();
        self.check();
    }

    fn slot_gone(&mut self, as_id: u16, id: u16, slot: Slot) {
        if self.zap_all {
            self.model.mapped.clear();
        } else {
            self.model.unmap(as_id, |gfn| slot.holds(gfn));
        }
        self.model.dirty.retain(|&(a, i, _)| (a, i) != (as_id, id));
    }

    fn set(&mut self, as_id: u16, id: u16, place: usize, host: usize, flags: u32) {
        let (base, pages) = PLACES[place];
        let name = u32::from(as_id) << 16 | u32::from(id);
        let answer = self
            .mmu
            .set_region(region(name, base, pages, HOST[host], flags));
        if answer.is_err() {
            return;
        }
        let new = Slot {
            base,
            pages,
            host: HOST[host],
            flags,
        };
        let old = self.model.slots.insert((as_id, id), new);
        let Some(old) = old else { return };
        let dirty: Vec<_> = self.model.dirty.iter().copied().collect();
        if old.base != base {
            self.slot_gone(as_id, id, old);
            if old.flags & flags & LOG != 0 {
                // The bitmap moves with the slot.
                self.model
                    .dirty
                    .extend(dirty.iter().filter(|(a, i, _)| (*a, *i) == (as_id, id)));
            }
        } else if (old.flags ^ flags) & LOG != 0 {
            self.model.dirty.retain(|&(a, i, _)| (a, i) != (as_id, id));
            if flags & LOG != 0 {
                self.model.protect(as_id, |gfn| new.holds(gfn));
            }
        }
    }

    fn fault(&mut self, role: usize, gfn: u64, access: Access) {
        let as_id = ROLES[role].as_id();
        let root = &self.roots[role];
        let gpa = Gfn::new(gfn).address();
        let mut error = match access {
            Access::Read => Pferr::USER,
            Access::Write => Pferr::WRITE,
            Access::Fetch => Pferr::FETCH,
        } | Pferr::GUEST_FINAL;
        // The processor says what it found.
        match walk::<F>(&self.world, root.hpa(), ROLES[role].level, gpa) {
            Found::Nothing => {}
            Found::Refused => error |= Pferr::RSVD,
            Found::Page { .. } => error |= Pferr::PRESENT,
        }
        let before = self.world.live_tables.load(Ordering::Relaxed);
        let outcome = self.mmu.fault(&mut self.reader, root, Fault { gpa, error });
        let write = matches!(access, Access::Write);
        let Some((id, slot)) = self.model.slot_at(as_id, gfn) else {
            assert_eq!(outcome, Ok(Outcome::Mmio));
            return;
        };
        if write && slot.flags & READONLY != 0 {
            assert_eq!(outcome, Ok(Outcome::Mmio));
            return;
        }
        let mapped = self.model.mapped.get(&(role, gfn)).copied();
        let state = self.world.host_state(slot.hva(gfn));
        // A page that is only protected to notice writes needs nothing from the host.
        let restore = matches!(mapped, Some((_, true, _))) && write;
        if !restore && (!state.present || write && !state.writable) {
            assert_eq!(outcome, Err(FaultError::BadHostMemory));
            return;
        }
        if outcome == Err(FaultError::OutOfMemory) {
            assert!(self.world.budget.load(Ordering::Relaxed) < 5);
            assert_eq!(mapped, None);
            assert!(self.world.live_tables.load(Ordering::Relaxed) >= before);
            return;
        }
        match mapped {
            Some((_, _, can_write)) if !write || can_write => {
                assert_eq!(outcome, Ok(Outcome::Spurious));
                return;
            }
            _ => assert_eq!(outcome, Ok(Outcome::Fixed { level: Level::L4K })),
        }
        let writable = state.writable && slot.flags & READONLY == 0;
        self.model
            .mapped
            .insert((role, gfn), (state.frame, writable, writable));
        if writable && slot.flags & LOG != 0 {
            self.model.dirty.insert((as_id, id, gfn - slot.base));
        }
    }

    fn get_dirty(&mut self, as_id: u16, id: u16) {
        let mut bits = vec![0; 32];
        let answer = self.mmu.dirty_log_get(as_id, id, &mut bits);
        let Some(slot) = self
            .model
            .slots
            .get(&(as_id, id))
            .filter(|s| s.flags & LOG != 0)
        else {
            assert!(answer.is_err());
            return;
        };
        let slot = *slot;
        answer.unwrap();
        let mut expected = vec![0u64; 32];
        for &(_, _, page) in self
            .model
            .dirty
            .iter()
            .filter(|(a, i, _)| (*a, *i) == (as_id, id))
        {
            expected[page as usize / 64] |= 1 << (page % 64);
        }
        assert_eq!(bits, expected);
        self.model.dirty.retain(|&(a, i, _)| (a, i) != (as_id, id));
        let is_dirty = |gfn: u64| {
            let page = gfn.wrapping_sub(slot.base);
            page < slot.pages && expected[page as usize / 64] >> (page % 64) & 1 == 1
        };
        self.model.protect(as_id, is_dirty);
    }

    /// A processor finds what the model holds, and nothing else.
    fn check(&self) {
        for (role, root) in self.roots.iter().enumerate() {
            for gfn in FRAMES {
                let gpa = Gfn::new(gfn).address();
                let found = walk::<F>(&self.world, root.hpa(), ROLES[role].level, gpa);
                match (self.model.mapped.get(&(role, gfn)), found) {
                    (None, Found::Nothing | Found::Refused) => {}
                    (
                        Some(&(frame, _, write)),
                        Found::Page {
                            frame: found,
                            write: found_write,
                            level: Level::L4K,
                        },
                    ) => assert_eq!((found, found_write), (frame, write), "gfn {gfn:#x}"),
                    (expected, found) => panic!("gfn {gfn:#x}: {expected:?}, found {found:?}"),
                }
            }
        }
        assert_eq!(self.mmu.stats().pages_4k, self.model.mapped.len() as u64);
    }

    fn finish(self) {
        let Self {
            world,
            mmu,
            reader,
            roots,
            ..
        } = self;
        drop((roots, reader));
        drop(mmu);
        assert_eq!(
            world.live_tables.load(Ordering::Relaxed),
            0,
            "table pages leaked"
        );
    }
}

fn run<F: Processor>(ops: &[Op], offset: u64, zap_all: bool) {
    let mut test = Test::<F>::new(offset, zap_all);
    for op in ops {
        test.apply(op);
    }
    test.finish();
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn ept_holds_what_the_model_holds(
        ops in prop::collection::vec(ops(), 1..120), zap_all in any::<bool>(), away in any::<bool>(),
    ) {
        run::<Ept>(&ops, if away { 0x1_2340_0000_0000 } else { 0 }, zap_all);
    }

    #[test]
    fn npt_holds_what_the_model_holds(
        ops in prop::collection::vec(ops(), 1..120), zap_all in any::<bool>(), away in any::<bool>(),
    ) {
        run::<Npt>(&ops, if away { 0x1_2340_0000_0000 } else { 0 }, zap_all);
    }
}
