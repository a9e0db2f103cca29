//! Random sequences of functions, with locks that are busy on purpose: what was refused has changed
//! nothing, what was removed was out of every guest's reach, and no page is lost or owned twice.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

mod common;

use common::{PAGE, World, info};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use twofold_arch::{Gpa, Hpa};
use twofold_tdx::legality::Function;
use twofold_tdx::{
    Accept, Entered, PageType, Platform, Point, Registers, SeptEntry, State, Status,
};

/// The region that the operations are about: one entry for 2 MiB, or a table of 512.
const REGION: u64 = 0x20_0000;
/// So many of the small pages are used.
const SMALL: u64 = 4;

#[derive(Clone, Copy, Debug)]
enum Op {
    Call(Function, Place),
    Accept(usize, Place),
    Enter(usize),
    Leave(usize),
    Busy(Point),
    Interrupt(u32),
}

/// The entry for the region, or for one of its small pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    Whole,
    Part(u64),
}

impl Place {
    fn gpa(self) -> Gpa {
        match self {
            Self::Whole => Gpa::new(REGION),
            Self::Part(number) => Gpa::new(REGION + number * PAGE),
        }
    }

    fn level(self) -> u8 {
        u8::from(self == Self::Whole)
    }
}

fn place() -> impl Strategy<Value = Place> {
    prop_oneof![Just(Place::Whole), (0..SMALL).prop_map(Place::Part)]
}

fn op() -> impl Strategy<Value = Op> {
    let function = prop::sample::select(vec![
        Function::SeptAdd,
        Function::PageAug,
        Function::PageAug,
        Function::RangeBlock,
        Function::RangeBlock,
        Function::RangeUnblock,
        Function::Track,
        Function::Track,
        Function::PageRemove,
        Function::PageRemove,
        Function::SeptRemove,
        Function::PageDemote,
        Function::PagePromote,
        Function::PageRelocate,
    ]);
    let point = prop::sample::select(vec![
        Point::Td,
        Point::SeptTree,
        Point::SeptEntry,
        Point::TdEpoch,
    ]);
    prop_oneof![
        12 => (function, place()).prop_map(|(function, place)| Op::Call(function, place)),
        3 => (0..2usize, place()).prop_map(|(vcpu, place)| Op::Accept(vcpu, place)),
        2 => (0..2usize).prop_map(Op::Enter),
        2 => (0..2usize).prop_map(Op::Leave),
        1 => point.prop_map(Op::Busy),
        1 => (0..700u32).prop_map(Op::Interrupt),
    ]
}

/// Everything that a refused call must leave alone.
#[derive(PartialEq, Debug)]
struct Snapshot {
    entries: Vec<u64>,
    metadata: Vec<(Hpa, twofold_tdx::PageMetadata)>,
}

struct Run<'w> {
    world: &'w World,
    /// The table whose entry 1 is for the region.
    above: Hpa,
    inside: [Option<(Entered<'w, common::Machine>, u64)>; 2],
    /// Steps, as a clock.
    now: u64,
    /// When each page or table was blocked.
    blocked: BTreeMap<Hpa, u64>,
}

impl Run<'_> {
    fn region_entry(&self) -> SeptEntry {
        let raw = self.world.machine().entry(self.above, 1);
        SeptEntry::from_raw(raw.load(Ordering::SeqCst))
    }

    fn part_entries(&self) -> Vec<SeptEntry> {
        let whole = self.region_entry();
        if whole.state().is_none_or(State::is_leaf) || whole.page(1) == Hpa::new(0) {
            return Vec::new();
        }
        let entry = |index| {
            let raw = self.world.machine().entry(whole.page(1), index);
            SeptEntry::from_raw(raw.load(Ordering::SeqCst))
        };
        (0..512).map(entry).collect()
    }

    fn snapshot(&self) -> Snapshot {
        // Whoever was refused a lock may have claimed the entry; that is no change.
        let claim = |entry: SeptEntry| entry.raw() & !(1 << 52);
        let mut entries = vec![claim(self.region_entry())];
        entries.extend(self.part_entries().into_iter().map(claim));
        let machine = self.world.machine();
        let metadata = machine
            .all_pages()
            .filter_map(|page| Some((page, self.world.module.metadata(page)?)))
            .collect();
        Snapshot { entries, metadata }
    }

    /// A block of 2 MiB that is not in use, or a small page.
    fn free_page(&self, level: u8) -> Option<Hpa> {
        if level == 0 {
            return (self.world.machine().handed_out() < 1000).then(|| self.world.fresh());
        }
        (0..3)
            .map(|number| self.world.machine().large(number))
            .find(|&block| {
                (0..512).all(|index| {
                    let page = Hpa::new(block.get() + index * PAGE);
                    self.world.module.metadata(page).is_none()
                })
            })
    }

    fn call(&mut self, function: Function, place: Place) {
        let page = match function {
            Function::PageAug => self.free_page(place.level()),
            _ => self.free_page(0),
        };
        let Some(page) = page else { return };
        let (rcx, rdx) = match function {
            Function::Track => (self.world.tdr.get(), 0),
            _ => (info(place.gpa(), place.level()), self.world.tdr.get()),
        };
        let mut registers = Registers {
            rcx,
            rdx,
            r8: page.get(),
            r9: 0,
        };
        let before = self.snapshot();
        let had = match place {
            Place::Whole => Some(self.region_entry()),
            Place::Part(number) => self.part_entries().get(number as usize).copied(),
        };
        let status = self.world.module.seamcall(function as u64, &mut registers);
        if !status.is(Status::SUCCESS) {
            assert_eq!(self.snapshot(), before, "{function:?} {place:?}: {status}");
            return;
        }
        let Some(had) = had else { return };
        let had_page = had.page(place.level());
        match function {
            Function::RangeBlock => {
                self.blocked.insert(had_page, self.now);
            }
            Function::PageRemove
            | Function::SeptRemove
            | Function::PageDemote
            | Function::PagePromote
            | Function::PageRelocate
            | Function::RangeUnblock => {
                let blocked = self.blocked.remove(&had_page).expect("never blocked");
                for (_, entered) in self.inside.iter().flatten() {
                    assert!(*entered > blocked, "{function:?} under a guest from before");
                }
            }
            _ => {}
        }
    }

    fn check(&self) {
        let module = &self.world.module;
        let whole = self.region_entry();
        let mut used = Vec::new();
        if whole.state().is_some_and(State::is_leaf) {
            used.push((whole.page(1), 1));
        }
        for part in self.part_entries() {
            if part.state().is_some_and(State::is_leaf) {
                used.push((part.page(0), 0));
            }
        }
        used.sort();
        let owned: Vec<_> = self
            .world
            .machine()
            .all_pages()
            .filter_map(|page| Some((page, module.metadata(page)?)))
            .filter(|(_, metadata)| metadata.kind == PageType::Regular)
            .map(|(page, metadata)| (page, metadata.level))
            .collect();
        assert_eq!(used, owned, "pages mapped, and pages owned");
        for entry in self.part_entries().iter().chain([&whole]) {
            assert!(!entry.is_locked(), "a lock was left behind");
            assert_eq!(entry.raw() >> 63, 1, "an entry without suppress-#VE");
        }
    }

    fn step(&mut self, op: Op) {
        self.now += 1;
        match op {
            Op::Call(function, place) => self.call(function, place),
            Op::Accept(vcpu, place) => {
                if let Some((guest, _)) = &self.inside[vcpu] {
                    let before = self.snapshot();
                    let accepted = guest.accept(info(place.gpa(), place.level()));
                    match accepted {
                        Accept::Returned(Status::SUCCESS) | Accept::Again => {}
                        _ => assert_eq!(self.snapshot(), before, "{accepted:?}"),
                    }
                }
            }
            Op::Enter(vcpu) => {
                if self.inside[vcpu].is_none()
                    && let Ok(guest) = self.world.module.vp_enter(self.world.vcpus[vcpu])
                {
                    self.inside[vcpu] = Some((guest, self.now));
                }
            }
            Op::Leave(vcpu) => self.inside[vcpu] = None,
            Op::Busy(point) => self.world.machine().busy.lock().unwrap().push((point, 1)),
            Op::Interrupt(after) => {
                let machine = self.world.machine();
                machine.interrupt_after.store(after, Ordering::Relaxed);
            }
        }
        self.check();
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: std::env::var("TWOFOLD_MODEL_CASES")
            .ok()
            .and_then(|cases| cases.parse().ok())
            .unwrap_or(48),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn any_sequence_of_functions_keeps_pages_and_guests_apart(
        ops in prop::collection::vec(op(), 1..120),
    ) {
        let world = World::initialized(0, 2);
        let tables = world.tables(Gpa::new(REGION), 1);
        world.module.mr_finalize(world.tdr).unwrap();
        let mut run = Run {
            world: &world,
            above: *tables.last().unwrap(),
            inside: [None, None],
            now: 0,
            blocked: BTreeMap::new(),
        };
        // The machine says that it has memory where its pages are.
        prop_assert!(world.machine().has_memory(run.above, PAGE));
        for op in ops {
            run.step(op);
        }
    }
}
