//! Random operations beside a model that says exactly which frames are mapped.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

const SLOT_PAGES: u64 = 24;
const FRAMES: u64 = 2 * SLOT_PAGES + 4;

#[derive(Clone, Debug)]
enum Op {
    Touch {
        gfn: u64,
        write: bool,
    },
    Prefault {
        start: u64,
        pages: u64,
    },
    Set {
        start: u64,
        pages: u64,
        private: bool,
    },
    /// A hole in the file: its pages are others afterwards.
    Punch {
        start: u64,
        pages: u64,
    },
    HostChange {
        start: u64,
        pages: u64,
    },
    /// Creates the slot, with or without a private half, or deletes it.
    Slot {
        id: u32,
        private: bool,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let range = (0..FRAMES, 1u64..12);
    prop_oneof![
        6 => (0..FRAMES, any::<bool>()).prop_map(|(gfn, write)| Op::Touch { gfn, write }),
        2 => range.clone().prop_map(|(start, pages)| Op::Prefault { start, pages }),
        3 => (range.clone(), any::<bool>())
            .prop_map(|((start, pages), private)| Op::Set { start, pages, private }),
        2 => range.clone().prop_map(|(start, pages)| Op::Punch { start, pages }),
        1 => range.prop_map(|(start, pages)| Op::HostChange { start, pages }),
        1 => (0u32..2, any::<bool>()).prop_map(|(id, private)| Op::Slot { id, private }),
    ]
}

#[derive(Default)]
struct Model {
    /// Slots by id, and whether they have a private half.
    slots: BTreeMap<u32, bool>,
    private: Vec<bool>,
    /// What is mapped: the frame.
    mapped: BTreeMap<u64, (bool, u64)>,
    /// Holes made so far, by file page.
    holes: Vec<u64>,
}

impl Model {
    fn slot(&self, gfn: u64) -> Option<bool> {
        self.slots.get(&((gfn / SLOT_PAGES) as u32)).copied()
    }

    fn frame(&self, gfn: u64, private: bool) -> u64 {
        match private {
            true => usual_frame(FILE + gfn * PAGE) + (self.holes[gfn as usize] << 20),
            false => usual_frame(HVA + gfn * PAGE),
        }
    }

    /// Whether the frame could be mapped; it is now.
    fn map(&mut self, gfn: u64) -> bool {
        let private = self.private[gfn as usize];
        match self.slot(gfn) {
            Some(file) if file || !private => {
                let frame = self.frame(gfn, private);
                self.mapped.insert(gfn, (private, frame));
                true
            }
            _ => false,
        }
    }
}

fn run<F: Processor>(ops: &[Op]) {
    let mut vm = vm::<F>();
    let mut model = Model {
        private: vec![false; FRAMES as usize],
        holes: vec![0; FRAMES as usize],
        ..Model::default()
    };
    for op in ops {
        match *op {
            Op::Touch { gfn, write } => {
                let error = if write { Pferr::WRITE } else { READ };
                let outcome = vm.fault(gfn, error);
                let was = model.mapped.contains_key(&gfn);
                let private = model.private[gfn as usize];
                match outcome {
                    Ok(Outcome::Fixed { .. }) => assert!(!was && model.map(gfn)),
                    Ok(Outcome::Spurious) => assert!(was),
                    Ok(Outcome::Mmio) => assert!(model.slot(gfn).is_none() && !private),
                    Err(FaultError::WrongKind { private: true }) => {
                        assert!(private && model.slot(gfn) != Some(true));
                    }
                    other => panic!("{op:?}: {other:?}"),
                }
            }
            Op::Prefault { start, pages } => {
                let end = (start + pages).min(FRAMES);
                let result = vm.prefault_all(start..end);
                let mut gfn = start;
                while gfn < end && (model.mapped.contains_key(&gfn) || model.map(gfn)) {
                    gfn += 1;
                }
                let expected = match (gfn == end, gfn < end && model.private[gfn as usize]) {
                    (true, _) => Ok(()),
                    (_, true) => Err(FaultError::WrongKind { private: true }.into()),
                    (_, false) => Err(PrefaultError::NoSlot),
                };
                assert_eq!(result, expected, "{op:?}");
            }
            Op::Set {
                start,
                pages,
                private,
            } => {
                let end = (start + pages).min(FRAMES);
                vm.set(start..end, private);
                model.private[start as usize..end as usize].fill(private);
                model
                    .mapped
                    .retain(|gfn, (kind, _)| !(start..end).contains(gfn) || *kind == private);
            }
            Op::Punch { start, pages } => {
                let end = (start + pages).min(FRAMES);
                let addresses = FILE + start * PAGE..FILE + end * PAGE;
                let change = vm.mmu.begin_private_change(addresses);
                for gfn in start..end {
                    model.holes[gfn as usize] += 1;
                    let state = HostState {
                        frame: model.frame(gfn, true),
                        present: true,
                        writable: true,
                    };
                    let mut memory = vm.world.memory.lock().unwrap();
                    memory.insert((FILE >> 12) + gfn, state);
                }
                vm.mmu.end_host_change(change);
                model
                    .mapped
                    .retain(|gfn, (kind, _)| !(start..end).contains(gfn) || !*kind);
            }
            Op::HostChange { start, pages } => {
                let end = (start + pages).min(FRAMES);
                drop(vm.mmu.host_change(HVA + start * PAGE..HVA + end * PAGE));
                model
                    .mapped
                    .retain(|gfn, (kind, _)| !(start..end).contains(gfn) || *kind);
            }
            Op::Slot { id, private } => {
                let first = u64::from(id) * SLOT_PAGES;
                if model.slots.remove(&id).is_some() {
                    let deleted = region(id, first, 0, 0, 0);
                    vm.mmu.set_region(deleted).unwrap();
                    let slot = first..first + SLOT_PAGES;
                    model.mapped.retain(|gfn, _| !slot.contains(gfn));
                } else {
                    match private {
                        true => vm.private_slot(id, first, SLOT_PAGES),
                        false => vm.slot(id, first, SLOT_PAGES, 0),
                    }
                    model.slots.insert(id, private);
                }
            }
        }
        for gfn in 0..FRAMES {
            let expected = model.mapped.get(&gfn).map(|(_, frame)| *frame);
            let found = match vm.found(gfn) {
                Found::Page { frame, level, .. } => {
                    assert_eq!(level, Level::L4K);
                    Some(frame)
                }
                // Remembered absence of memory.
                Found::Nothing | Found::Refused => None,
            };
            assert_eq!(found, expected, "gfn {gfn} after {op:?}");
            assert_eq!(
                vm.mmu.is_private(Gfn::new(gfn)),
                model.private[gfn as usize]
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 160, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_operation_takes_exactly_the_mappings_that_it_should(
        ops in prop::collection::vec(op(), 1..60),
    ) {
        run::<Ept>(&ops);
        run::<Npt>(&ops);
    }
}
