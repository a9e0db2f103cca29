//! The function that checks the invariants notices each kind of breach, and says where it is.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use common::{Processor, Step, TestHost, World, region};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use twofold_arch::{Gfn, Hpa, Level, Pferr};
use twofold_mmu::{
    AccessKind, Config, Conversion, Ept, Fault, Mmu, MmuFormat, Npt, PrivateMemory, Reader, Root,
    RootRole, Rule,
};
use twofold_table::Format;

struct Vm<F: Processor> {
    world: Arc<World>,
    mmu: Mmu<F, TestHost>,
    root: Root,
    reader: Reader,
}

const HVA: u64 = 0x4000_0000;

impl<F: Processor> Vm<F> {
    /// Slot 0 with frames up to 0x1000, slot 1 read-only from 0x10000, slot 2 logging from 0x20000;
    /// small pages mapped at 5, 6 and in the other slots, a large one at 0x200, MMIO at 0x40000.
    fn new() -> Self {
        Self::with(Config::default())
    }

    fn with(config: Config) -> Self {
        let world = World::new(0x2000_0000_0000);
        let mmu = Mmu::new(TestHost(Arc::clone(&world)), config);
        let root = mmu.load_root(RootRole::NORMAL).unwrap();
        let reader = mmu.reader();
        let mut vm = Self {
            world,
            mmu,
            root,
            reader,
        };
        for (id, gfn, pages, flags) in [(0, 0, 0x1000, 0), (1, 0x10000, 8, 2), (2, 0x20000, 8, 1)] {
            let region = region(id, gfn, pages, (HVA >> 12) + gfn, flags);
            vm.mmu.set_region(region).unwrap();
        }
        for (gfn, error) in [
            (5, Pferr::WRITE),
            (6, Pferr::WRITE),
            (0x10001, Pferr::USER),
            (0x20001, Pferr::WRITE),
            (0x40000, Pferr::USER),
        ] {
            vm.fault(gfn, error);
        }
        *vm.world.level.lock().unwrap() = Level::L2M;
        vm.fault(0x234, Pferr::WRITE);
        vm
    }

    fn fault(&mut self, gfn: u64, error: Pferr) {
        let gpa = Gfn::new(gfn).address();
        let fault = Fault { gpa, error };
        self.mmu.fault(&mut self.reader, &self.root, fault).unwrap();
    }

    /// The entry for `gfn` in the table at `level`.
    fn entry(&self, gfn: u64, level: Level) -> &AtomicU64 {
        let gfn = Gfn::new(gfn);
        let (mut table, mut at) = (self.root.hpa(), Level::L512G);
        while at > level {
            let value = self.world.entry(table, at.index(gfn)).load(Relaxed);
            let Step::Table(next) = F::entry(value, at) else {
                panic!("no table at {at:?}");
            };
            table = next;
            at = at.below().unwrap();
        }
        self.world.entry(table, at.index(gfn))
    }

    fn rules(&self) -> Vec<(Rule, u64)> {
        let violations = self.mmu.check().violations;
        violations
            .iter()
            .map(|found| (found.rule, found.gfn.get()))
            .collect()
    }

    /// With `change` made to the entry, exactly `expected` is broken there.
    fn breaks(&self, gfn: u64, level: Level, change: impl Fn(u64) -> u64, expected: &[Rule]) {
        let entry = self.entry(gfn, level);
        let before = entry.load(Relaxed);
        entry.store(change(before), Relaxed);
        let found = self.rules();
        entry.store(before, Relaxed);
        let expected: Vec<_> = expected.iter().map(|&rule| (rule, gfn)).collect();
        assert_eq!(found, expected, "entry {before:#x} at {gfn:#x}");
    }
}

fn each_breach_is_named<F: Processor>() {
    let vm = Vm::<F>::new();
    let report = vm.mmu.check();
    assert!(report.violations.is_empty(), "{report}");
    // Tables: the root, one of 1G entries, one of 2M entries, and 4K tables at 0, 0x10000, 0x20000
    // and 0x40000, the last of which has a table of 2M entries of its own.
    assert_eq!((report.tables, report.leaves), (8, [4, 1, 0]));

    let other_page = vm.entry(6, Level::L4K).load(Relaxed);
    let large = vm.entry(0x200, Level::L2M).load(Relaxed);
    let leaf_table = vm.entry(5, Level::L2M).load(Relaxed);
    vm.breaks(5, Level::L4K, |_| F::FROZEN, &[Rule::Frozen]);
    vm.breaks(
        5,
        Level::L4K,
        |e| e & !F::MMU_WRITABLE,
        &[Rule::WritableState],
    );
    vm.breaks(
        5,
        Level::L4K,
        |e| e & !F::HOST_WRITABLE,
        &[Rule::WritableState],
    );
    vm.breaks(5, Level::L4K, |_| 0, &[Rule::NotEmpty]);
    vm.breaks(7, Level::L4K, |_| F::EMPTY | 1 << 20, &[Rule::NotEmpty]);
    vm.breaks(0x10000, Level::L4K, |_| other_page, &[Rule::ReadOnlySlot]);
    vm.breaks(0x10009, Level::L4K, |_| other_page, &[Rule::NoSlot]);
    vm.breaks(0x20002, Level::L4K, |_| other_page, &[Rule::Unmarked]);
    vm.breaks(
        0x20000,
        Level::L2M,
        |_| large,
        &[Rule::HugeLeaf, Rule::LoggedHuge],
    );
    vm.breaks(0x200, Level::L2M, |e| e + 0x1000, &[Rule::Address]);
    vm.breaks(0x400, Level::L2M, |_| leaf_table, &[Rule::SharedTable]);
    let mmio = vm.entry(0x40000, Level::L4K).load(Relaxed);
    vm.breaks(7, Level::L4K, |_| mmio, &[Rule::Mmio]);
    vm.breaks(0x40001, Level::L4K, |_| mmio, &[Rule::Mmio]);
    vm.breaks(0x40001, Level::L4K, |_| mmio + 0x1000, &[]);
    assert_eq!(vm.rules(), []);
}

#[test]
fn each_breach_in_an_ept_is_named() {
    each_breach_is_named::<Ept>();
}

#[test]
fn each_breach_in_an_npt_is_named() {
    each_breach_is_named::<Npt>();
}

#[test]
fn a_huge_leaf_that_leaves_its_slot_is_named() {
    let vm = Vm::<Ept>::new();
    let table = vm.entry(0x10000, Level::L2M).load(Relaxed);
    let large = vm.entry(0x200, Level::L2M).load(Relaxed);
    vm.entry(0x10000, Level::L2M)
        .store(large & !Ept::WRITE, Relaxed);
    assert_eq!(vm.rules(), [(Rule::HugeLeaf, 0x10000)]);
    vm.entry(0x10000, Level::L2M).store(table, Relaxed);
}

#[test]
fn a_leaf_below_an_obsolete_root_is_named() {
    let mut vm = Vm::<Ept>::new();
    vm.mmu.zap_all();
    assert_eq!(vm.rules(), []);
    vm.fault(5, Pferr::WRITE);
    assert_eq!(vm.rules(), []);
    let entry = vm.world.entry(vm.root.hpa(), 3);
    let empty = entry.load(Relaxed);
    let table = TestTable::new(&vm);
    entry.store(Ept::table_entry(table.page), Relaxed);
    assert_eq!(vm.rules(), [(Rule::ObsoleteRoot, 3 << 27)]);
    entry.store(empty, Relaxed);
    assert_eq!(vm.rules(), []);
    table.free(&vm);
}

/// An empty table that the MMU knows nothing of.
struct TestTable {
    page: Hpa,
}

impl TestTable {
    fn new(vm: &Vm<Ept>) -> Self {
        let page = twofold_mmu::Host::alloc_table(vm.mmu.host()).unwrap();
        for index in 0..512 {
            vm.world.entry(page, index).store(Ept::EMPTY, Relaxed);
        }
        Self { page }
    }

    fn free(self, vm: &Vm<Ept>) {
        twofold_mmu::Host::free_table(vm.mmu.host(), self.page);
    }
}

fn a_mixed_huge_leaf_is_named<F: Processor>() {
    let vm = Vm::<F>::with(Config {
        slot_zap_all: false,
        private_memory: Some(PrivateMemory {
            access: AccessKind::ByAttribute,
            conversion: Conversion::ZapOpposite,
        }),
        ..Config::default()
    });
    let large = vm.entry(0x200, Level::L2M).load(Relaxed);
    assert_eq!(vm.rules(), []);
    let one = Gfn::new(0x201)..Gfn::new(0x202);
    vm.mmu.set_attributes(one.clone(), true).unwrap();
    assert_eq!(vm.rules(), []);
    // As if the conversion had forgotten it.
    vm.breaks(0x200, Level::L2M, |_| large, &[Rule::HugeLeaf]);
    vm.mmu.set_attributes(one, false).unwrap();
    let entry = vm.entry(0x200, Level::L2M);
    let empty = entry.swap(large, Relaxed);
    assert_eq!(vm.rules(), []);
    entry.store(empty, Relaxed);
}

#[test]
fn a_huge_leaf_over_private_and_shared_frames_is_noticed() {
    a_mixed_huge_leaf_is_named::<Ept>();
    a_mixed_huge_leaf_is_named::<Npt>();
}
