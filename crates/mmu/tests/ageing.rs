//! Which pages are young: with accessed bits, and by taking permissions away.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use common::{Found, Processor, TestHost, World, region, touch, walk};
use proptest::prelude::*;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use twofold_arch::{Gfn, Level};
use twofold_mmu::{Config, Ept, Fault, Mmu, Npt, Outcome, Reader, Root, RootRole};

const PAGES: u64 = 0x400;
const HVA: u64 = 0x4000_0000;

struct Vm<F: Processor> {
    world: Arc<World>,
    mmu: Mmu<F, TestHost>,
    reader: Reader,
    root: Root,
    flags: bool,
}

impl<F: Processor> Vm<F> {
    fn new(accessed_dirty: bool) -> Self {
        let world = World::new(0x1000_0000_0000);
        let config = Config {
            slot_zap_all: false,
            accessed_dirty,
            ..Config::default()
        };
        let mmu = Mmu::new(TestHost(Arc::clone(&world)), config);
        let reader = mmu.reader();
        let root = mmu.load_root(RootRole::NORMAL).unwrap();
        // Two slots share the upper half of the memory.
        mmu.set_region(region(0, 0, PAGES, HVA >> 12, 0)).unwrap();
        let shared = (HVA >> 12) + PAGES / 2;
        mmu.set_region(region(1, 0x1000, PAGES / 2, shared, 0))
            .unwrap();
        Self {
            world,
            mmu,
            reader,
            root,
            flags: F::TRACKED == 0 || accessed_dirty,
        }
    }

    fn access(&mut self, gfn: u64, write: bool) {
        let gpa = Gfn::new(gfn).address();
        for _ in 0..4 {
            let found = touch::<F>(
                &self.world,
                self.root.hpa(),
                Level::L512G,
                gpa,
                write,
                self.flags,
            );
            let Err(error) = found else { return };
            let fault = Fault { gpa, error };
            let outcome = self.mmu.fault(&mut self.reader, &self.root, fault);
            assert!(matches!(outcome, Ok(Outcome::Fixed { .. })), "{outcome:?}");
        }
        panic!("frame {gfn:#x} cannot be reached");
    }

    fn frames(gfn: u64) -> std::ops::Range<Gfn> {
        Gfn::new(gfn)..Gfn::new(gfn + 1)
    }

    fn is_young(&self, gfn: u64) -> bool {
        self.mmu.test_young_gfns(0, Self::frames(gfn))
    }

    fn clear(&self, gfn: u64) -> bool {
        self.mmu.clear_young_gfns(0, Self::frames(gfn))
    }
}

fn young_is_told_once_for_each_use<F: Processor>(accessed_dirty: bool) {
    let mut vm = Vm::<F>::new(accessed_dirty);
    assert!(!vm.is_young(5) && !vm.clear(5), "nothing is mapped");
    for write in [false, true] {
        vm.access(5, write);
        assert!(vm.is_young(5) && vm.is_young(5), "testing changes nothing");
        assert!(vm.clear(5));
        assert!(!vm.clear(5) && !vm.is_young(5));
        assert!(!vm.is_young(4) && !vm.is_young(6));
    }
    let flushes = vm.world.flushes.load(Ordering::Relaxed);
    vm.access(5, true);
    vm.clear(5);
    assert_eq!(vm.world.flushes.load(Ordering::Relaxed), flushes);
}

#[test]
fn young_is_told_once_for_each_use_over_each_format_and_means() {
    young_is_told_once_for_each_use::<Ept>(true);
    young_is_told_once_for_each_use::<Ept>(false);
    young_is_told_once_for_each_use::<Npt>(true);
    // AMD's processors always set accessed bits.
    young_is_told_once_for_each_use::<Npt>(false);
}

#[test]
fn an_aged_page_is_given_back_without_asking_the_host() {
    let mut vm = Vm::<Ept>::new(false);
    vm.access(7, true);
    let mapped = walk::<Ept>(
        &vm.world,
        vm.root.hpa(),
        Level::L512G,
        Gfn::new(7).address(),
    );
    vm.clear(7);
    let find = |vm: &Vm<Ept>| {
        walk::<Ept>(
            &vm.world,
            vm.root.hpa(),
            Level::L512G,
            Gfn::new(7).address(),
        )
    };
    assert_eq!(find(&vm), Found::Nothing);
    // The host would refuse: it must not be asked.
    vm.world.memory.lock().unwrap().insert(
        (HVA >> 12) + 7,
        common::HostState {
            frame: 0,
            present: false,
            writable: false,
        },
    );
    vm.access(7, false);
    assert_eq!(vm.reader.stats().pf_fast, 1);
    assert!(matches!(find(&vm), Found::Page { write: false, .. }));
    vm.access(7, true);
    assert_eq!(vm.reader.stats().pf_fast, 2);
    assert_eq!(find(&vm), mapped);
    vm.clear(7);
    vm.access(7, true);
    assert_eq!((vm.reader.stats().pf_fast, find(&vm)), (3, mapped));
}

#[test]
fn a_read_only_page_stays_read_only_when_it_is_used_again() {
    let mut vm = Vm::<Ept>::new(false);
    vm.world.memory.lock().unwrap().insert(
        (HVA >> 12) + 9,
        common::HostState {
            frame: 0x1234,
            present: true,
            writable: false,
        },
    );
    vm.access(9, false);
    vm.clear(9);
    vm.access(9, false);
    let found = walk::<Ept>(
        &vm.world,
        vm.root.hpa(),
        Level::L512G,
        Gfn::new(9).address(),
    );
    assert_eq!(
        found,
        Found::Page {
            frame: 0x1234,
            write: false,
            level: Level::L4K
        }
    );
}

#[test]
fn host_memory_is_young_if_any_slot_that_shows_it_was_used() {
    for accessed_dirty in [true, false] {
        let mut vm = Vm::<Ept>::new(accessed_dirty);
        let page = HVA + ((PAGES / 2 + 3) << 12);
        let range = page..page + 4096;
        assert!(!vm.mmu.test_young(0..u64::MAX));
        vm.access(0x1003, false);
        assert!(vm.mmu.test_young(range.clone()) && vm.mmu.test_young(0..u64::MAX));
        assert!(!vm.mmu.test_young(page + 4096..page + 8192));
        vm.access(PAGES / 2 + 3, false);
        assert!(vm.mmu.clear_young(range.clone()));
        assert!(!vm.is_young(0x1003) && !vm.is_young(PAGES / 2 + 3));
        assert!(!vm.mmu.clear_young(range));
    }
}

#[test]
fn a_large_page_is_young_as_a_whole() {
    for accessed_dirty in [true, false] {
        let mut vm = Vm::<Ept>::new(accessed_dirty);
        *vm.world.level.lock().unwrap() = Level::L2M;
        vm.access(0x201, true);
        assert!(vm.is_young(0x3ff) && vm.clear(0x2ff) && !vm.is_young(0x201));
        vm.access(0x202, false);
        assert!(vm.is_young(0x201));
        assert_eq!(vm.mmu.stats().pages_2m, 1);
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        cases: ProptestConfig::default().cases / 4,
        ..ProptestConfig::default()
    })]

    /// With neither a TLB nor anything else between, a page is young exactly if it was used.
    #[test]
    fn a_page_is_young_exactly_if_it_was_used_since_it_was_asked(
        ops in prop::collection::vec((0u64..6, 0u8..6), 1..120), accessed_dirty in any::<bool>(),
    ) {
        let mut ept = Vm::<Ept>::new(accessed_dirty);
        let mut npt = Vm::<Npt>::new(true);
        let mut used = [false; 6];
        for (page, what) in ops {
            let number = page as usize;
            match what {
                0 | 1 => {
                    ept.access(page, what == 1);
                    npt.access(page, what == 1);
                    used[number] = true;
                }
                2 => {
                    let hva = HVA + (page << 12);
                    drop(ept.mmu.host_change(hva..hva + 1));
                    drop(npt.mmu.host_change(hva..hva + 1));
                    used[number] = false;
                }
                3 => {
                    prop_assert_eq!(ept.is_young(page), used[number]);
                    prop_assert_eq!(npt.is_young(page), used[number]);
                }
                _ => {
                    prop_assert_eq!(ept.clear(page), used[number]);
                    prop_assert_eq!(npt.clear(page), used[number]);
                    used[number] = false;
                }
            }
        }
        let report = ept.mmu.check();
        prop_assert!(report.violations.is_empty(), "{}", report);
    }
}
