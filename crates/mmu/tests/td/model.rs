//! Random operations, with locks of the module that are busy on purpose, beside a model that says
//! exactly what is mapped: after each the mirror, the Secure EPT and the module's page metadata
//! agree (SPEC 8, rule 8), and so do the shared half and the model.

use crate::common::td::{HVA, Memory, PAGE, PRIVATE, SHARED, TdMachine};
use crate::common::{Found, usual_frame};
use proptest::prelude::*;
use std::collections::BTreeMap;
use twofold_arch::{Gfn, Hpa, Level};
use twofold_mmu::{FaultError, Outcome, PrefaultError, Reader, TdRoots};
use twofold_tdx::{Accept, PageType, Point, State, Status};

const SLOT_PAGES: u64 = 16;
/// The second slot begins in another table.
const SLOTS: [u64; 2] = [8, 0x200 - 4];
/// Frames that are looked at.
const FRAMES: [std::ops::Range<u64>; 2] = [4..28, 0x200 - 8..0x200 + 16];
const VCPUS: usize = 2;

#[derive(Clone, Copy, Debug)]
enum Op {
    Fault {
        gfn: u64,
        private: bool,
    },
    /// Initial memory, before the TD runs.
    Add {
        gfn: u64,
    },
    Prefault {
        gfn: u64,
        pages: u64,
    },
    Set {
        gfn: u64,
        pages: u64,
        private: bool,
    },
    Punch {
        gfn: u64,
        pages: u64,
    },
    HostChange {
        gfn: u64,
        pages: u64,
    },
    Slot(u32),
    ZapAll,
    Finalize,
    Enter(usize),
    Leave(usize),
    Accept(usize, u64),
    Use(usize, u64),
    Busy(Point, u32, u32),
}

fn gfn() -> impl Strategy<Value = u64> + Clone {
    prop_oneof![FRAMES[0].clone(), FRAMES[1].clone()]
}

fn op() -> impl Strategy<Value = Op> {
    let range = (gfn(), 1u64..12);
    let point = prop::sample::select(vec![
        Point::Td,
        Point::SeptTree,
        Point::SeptEntry,
        Point::TdEpoch,
    ]);
    prop_oneof![
        8 => (gfn(), prop::bool::weighted(0.7))
            .prop_map(|(gfn, private)| Op::Fault { gfn, private }),
        2 => gfn().prop_map(|gfn| Op::Add { gfn }),
        3 => range.clone().prop_map(|(gfn, pages)| Op::Prefault { gfn, pages }),
        5 => (range.clone(), prop::bool::weighted(0.7))
            .prop_map(|((gfn, pages), private)| Op::Set { gfn, pages, private }),
        2 => range.clone().prop_map(|(gfn, pages)| Op::Punch { gfn, pages }),
        1 => range.prop_map(|(gfn, pages)| Op::HostChange { gfn, pages }),
        1 => (0u32..2).prop_map(Op::Slot),
        1 => Just(Op::ZapAll),
        1 => Just(Op::Finalize),
        3 => (0..VCPUS).prop_map(Op::Enter),
        1 => (0..VCPUS).prop_map(Op::Leave),
        4 => (0..VCPUS, gfn()).prop_map(|(vcpu, gfn)| Op::Accept(vcpu, gfn)),
        3 => (0..VCPUS, gfn()).prop_map(|(vcpu, gfn)| Op::Use(vcpu, gfn)),
        4 => (point, 0u32..6, 1u32..3)
            .prop_map(|(point, skip, times)| Op::Busy(point, skip, times)),
    ]
}

/// A private page that the TD has.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Page {
    accepted: bool,
    /// Its first word.
    content: u64,
}

#[derive(Default)]
struct Model {
    slots: BTreeMap<u32, ()>,
    private: BTreeMap<u64, bool>,
    secure: BTreeMap<u64, Page>,
    shared: BTreeMap<u64, ()>,
}

impl Model {
    fn has_slot(&self, gfn: u64) -> bool {
        self.slots.keys().any(|&id| {
            let base = SLOTS[id as usize];
            (base..base + SLOT_PAGES).contains(&gfn)
        })
    }

    fn is_private(&self, gfn: u64) -> bool {
        self.private.get(&gfn).copied().unwrap_or(false)
    }
}

struct Run {
    machine: TdMachine,
    reader: Reader,
    roots: TdRoots,
    model: Model,
    /// Contents written so far, so that no two pages have the same.
    stamp: u64,
}

impl Run {
    fn new(wide: bool) -> Self {
        let machine = TdMachine::new(wide, VCPUS as u64);
        let reader = machine.mmu.reader();
        let roots = machine.roots();
        Self {
            machine,
            reader,
            roots,
            model: Model::default(),
            stamp: 1,
        }
    }

    fn memory(&self) -> &Memory {
        &self.machine.memory
    }

    /// Whether the module may have found something busy since `before`.
    fn was_busy(&self, before: u32) -> bool {
        self.pending_busy() != before
    }

    fn pending_busy(&self) -> u32 {
        self.memory().busy_left()
    }

    fn fault(&mut self, gfn: u64, private: bool) {
        let before = self.pending_busy();
        let error = if private { PRIVATE } else { SHARED };
        let outcome = self
            .machine
            .fault(&mut self.reader, &self.roots, gfn, error);
        let (slot, kind) = (self.model.has_slot(gfn), self.model.is_private(gfn));
        let mapped = match private {
            true => self.model.secure.contains_key(&gfn),
            false => self.model.shared.contains_key(&gfn),
        };
        match outcome {
            Err(FaultError::WrongKind { private: said }) => {
                assert_eq!(said, private);
                assert!(kind != private || private && !slot);
            }
            Ok(Outcome::Mmio) => assert!(!slot && !private && !kind),
            Ok(Outcome::Spurious) => assert!(mapped),
            Ok(Outcome::Fixed { level: Level::L4K }) if private => {
                assert!(slot && kind && !mapped);
                self.pended(gfn);
            }
            Ok(Outcome::Fixed { level: Level::L4K }) => {
                assert!(slot && !kind && !mapped);
                self.model.shared.insert(gfn, ());
            }
            Ok(Outcome::Retry) => assert!(private && self.was_busy(before), "gfn {gfn:#x}"),
            Ok(Outcome::ObsoleteRoot) => {
                assert!(!private && self.roots.is_obsolete());
                self.roots = self.machine.roots();
            }
            other => panic!("{other:?}"),
        }
    }

    /// The page waits to be accepted.
    fn pended(&mut self, gfn: u64) {
        let page = self.memory().page_of(gfn).unwrap();
        let page = Page {
            accepted: false,
            content: self.memory().word(page),
        };
        self.model.secure.insert(gfn, page);
    }

    fn add(&mut self, gfn: u64) {
        if self.machine.td.is_running() {
            return;
        }
        let before = self.pending_busy();
        let source = self.memory().take();
        self.stamp += 1;
        self.memory().write_word(source, self.stamp);
        let outcome =
            self.machine
                .mmu
                .td_add(&mut self.reader, &self.roots, Gfn::new(gfn), source.get());
        self.memory().give_back(source);
        let mapped = self.model.secure.contains_key(&gfn);
        match outcome {
            Ok(Outcome::Fixed { .. }) => {
                assert!(!mapped && self.model.has_slot(gfn) && self.model.is_private(gfn));
                let page = Page {
                    accepted: true,
                    content: self.stamp,
                };
                self.model.secure.insert(gfn, page);
            }
            Ok(Outcome::Spurious) => assert!(mapped),
            Ok(Outcome::Retry) => assert!(self.was_busy(before)),
            Err(FaultError::WrongKind { private: true }) => {
                assert!(!self.model.has_slot(gfn) || !self.model.is_private(gfn));
            }
            other => panic!("{other:?}"),
        }
    }

    fn prefault(&mut self, first: u64, pages: u64) {
        let mut gfn = first;
        while gfn < first + pages {
            let before = self.pending_busy();
            let gfns = Gfn::new(gfn)..Gfn::new(first + pages);
            let result = self
                .machine
                .mmu
                .td_prefault(&mut self.reader, &self.roots, gfns);
            let private = self.model.is_private(gfn);
            match result {
                Ok(done) => {
                    assert!(done > 0);
                    for gfn in gfn..gfn + done {
                        assert!(self.model.has_slot(gfn));
                        assert_eq!(self.model.is_private(gfn), private);
                        if !private {
                            self.model.shared.insert(gfn, ());
                        } else if !self.model.secure.contains_key(&gfn) {
                            self.pended(gfn);
                        }
                    }
                    gfn += done;
                }
                Err(PrefaultError::Retry) => assert!(private && self.was_busy(before)),
                Err(PrefaultError::ObsoleteRoot) => self.roots = self.machine.roots(),
                Err(PrefaultError::NoSlot) => {
                    assert!(!private && !self.model.has_slot(gfn));
                    return;
                }
                Err(PrefaultError::Fault(FaultError::WrongKind { private: true })) => {
                    assert!(private && !self.model.has_slot(gfn));
                    return;
                }
                Err(other) => panic!("{other}"),
            }
        }
    }

    fn accept(&mut self, vcpu: usize, gfn: u64) {
        let before = self.pending_busy();
        let known = self.model.secure.get(&gfn).copied();
        match self.machine.td.accept(vcpu, gfn) {
            None => {}
            Some(Accept::Returned(Status::SUCCESS)) => {
                assert!(!known.unwrap().accepted);
                let page = self.memory().page_of(gfn).unwrap();
                assert_eq!(self.memory().word(page), 0, "accepted memory is zero");
                self.stamp += 1;
                self.memory().write_word(page, self.stamp);
                let page = Page {
                    accepted: true,
                    content: self.stamp,
                };
                self.model.secure.insert(gfn, page);
            }
            Some(Accept::Returned(status)) if status.is(Status::PAGE_ALREADY_ACCEPTED) => {
                assert!(known.unwrap().accepted);
            }
            Some(Accept::Returned(status)) => {
                assert!(status.may_be_retried() && self.was_busy(before), "{status}");
            }
            Some(Accept::Exit { .. }) => assert_eq!(known, None),
            Some(Accept::Again) => panic!("a page of 4K has no pieces"),
        }
    }

    fn step(&mut self, op: Op) {
        match op {
            Op::Fault { gfn, private } => self.fault(gfn, private),
            Op::Add { gfn } => self.add(gfn),
            Op::Prefault { gfn, pages } => self.prefault(gfn, pages),
            Op::Set {
                gfn,
                pages,
                private,
            } => {
                let range = gfn..gfn + pages;
                self.machine.set(range.clone(), private);
                for gfn in range {
                    self.model.private.insert(gfn, private);
                    match private {
                        true => drop(self.model.shared.remove(&gfn)),
                        false => drop(self.model.secure.remove(&gfn)),
                    }
                }
            }
            Op::Punch { gfn, pages } => {
                let range = gfn..gfn + pages;
                // Only what is bound to a slot is found; the rest of the file is nobody's.
                let bound = range.clone().filter(|&gfn| self.model.has_slot(gfn));
                let bound: Vec<_> = bound.collect();
                self.machine.punch(range);
                for gfn in bound {
                    self.model.secure.remove(&gfn);
                }
            }
            Op::HostChange { gfn, pages } => {
                self.machine.change_host(gfn..gfn + pages);
                self.model
                    .shared
                    .retain(|other, ()| !(gfn..gfn + pages).contains(other));
            }
            Op::Slot(id) => {
                let base = SLOTS[id as usize];
                if self.model.slots.remove(&id).is_none() {
                    self.machine.slot(id, base, SLOT_PAGES);
                    self.model.slots.insert(id, ());
                } else {
                    self.machine.delete_slot(id);
                    let slot = base..base + SLOT_PAGES;
                    self.model.secure.retain(|gfn, _| !slot.contains(gfn));
                    self.model.shared.retain(|gfn, ()| !slot.contains(gfn));
                }
            }
            Op::ZapAll => {
                self.machine.mmu.zap_all();
                self.model.shared.clear();
            }
            Op::Finalize if self.machine.td.is_running() => {}
            Op::Finalize => self.machine.td.finalize(),
            Op::Enter(vcpu) => drop(self.machine.td.enter(vcpu)),
            Op::Leave(vcpu) => self.machine.td.leave(vcpu),
            Op::Accept(vcpu, gfn) => self.accept(vcpu, gfn),
            Op::Use(vcpu, gfn) => {
                let found = self.machine.td.use_private(vcpu, gfn);
                let accepted = self
                    .model
                    .secure
                    .get(&gfn)
                    .is_some_and(|page| page.accepted);
                assert!(found.is_none_or(|found| found == accepted));
            }
            Op::Busy(point, skip, times) => self.memory().make_busy(point, skip, times),
        }
    }

    fn check(&self) {
        let td = &self.machine.td;
        assert_eq!(self.machine.mmu.bug(), None);
        let report = self.memory().undisturbed(|| self.machine.mmu.check());
        assert!(report.violations.is_empty(), "{report}");
        let mut pages = Vec::new();
        for gfn in FRAMES.into_iter().flatten() {
            let model = self.model.secure.get(&gfn);
            let secure = td.secure(gfn);
            assert_eq!(self.machine.mirrored(&self.roots, gfn), secure.map(|s| s.0));
            assert_eq!(secure.is_some(), model.is_some(), "gfn {gfn:#x}");
            if let (Some((page, state)), Some(model)) = (secure, model) {
                let expected = match model.accepted {
                    true => State::Mapped,
                    false => State::Pending,
                };
                assert_eq!(state, expected);
                assert_eq!(self.memory().page_of(gfn), Some(page));
                assert_eq!(self.memory().word(page), model.content, "content is lost");
                pages.push(page);
            }
            let shared = match self.model.shared.contains_key(&gfn) {
                true => Found::Page {
                    frame: usual_frame(HVA + gfn * PAGE),
                    write: true,
                    level: Level::L4K,
                },
                false => Found::Nothing,
            };
            if !self.roots.is_obsolete() {
                assert_eq!(self.machine.shared(&self.roots, gfn), shared);
            }
        }
        let owned: Vec<_> = pages.iter().map(|page: &Hpa| page.get()).collect();
        let owned = owned.into_iter().collect();
        assert_eq!(td.owned(PageType::Regular), owned, "pages of the TD");
    }
}

fn run(wide: bool, ops: &[Op]) {
    let mut run = Run::new(wide);
    for op in ops {
        run.step(*op);
        run.check();
    }
    let Run {
        machine,
        reader,
        roots,
        ..
    } = run;
    drop((reader, roots));
    machine.finish();
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: std::env::var("TWOFOLD_MODEL_CASES")
            .ok()
            .and_then(|cases| cases.parse().ok())
            .unwrap_or(64),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn the_mirror_equals_the_secure_ept_after_every_operation_with_the_module_busy(
        wide in any::<bool>(),
        ops in prop::collection::vec(op(), 1..90),
    ) {
        run(wide, &ops);
    }
}
