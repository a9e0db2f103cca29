//! Dirty tracking in all its forms, against a plain set of frames: what a form reports in a round
//! is exactly what was written in it (and what was first mapped in it, which counts as written).
//!
//! The processor here has a TLB that only flushes empty, so that a flush which is owed and not paid
//! shows as a write that nobody noticed.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use common::{Processor, TestHost, World, region, touch};
use proptest::prelude::*;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use twofold_arch::{Gfn, Gpa, Level};
use twofold_mmu::{
    Config, DirtyGfn, DirtyLogError, DirtyRingError, Ept, Fault, ManualProtect, Mmu, Npt, Outcome,
    Reader, RingMemory, Root, RootRole,
};

const LOG: u32 = 1;
/// The slot begins and ends in the middle of large pages, and its pages are no multiple of 64.
const BASE: u64 = 0x1f0;
const PAGES: u64 = 0x3f0 + 5;
const HVA_PAGE: u64 = 0x4_0000 + BASE;
/// Pages of the slot: neighbours, ends of words, ends of large pages.
const TOUCHED: [u64; 12] = [0, 1, 2, 15, 16, 17, 63, 64, 65, 0x20f, 0x210, PAGES - 1];
const RING_BYTES: u64 = 16384;

/// What the program has chosen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Form {
    Bitmap,
    Manual,
    InitiallySet,
    Ring,
}

/// What the processor can do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Means {
    /// Accessed and dirty bits, and a log.
    Log,
    /// Accessed and dirty bits.
    Flags,
    Nothing,
}

struct Ring(Box<[DirtyGfn]>);

impl RingMemory for Ring {
    fn entries(&self) -> &[DirtyGfn] {
        &self.0
    }
}

struct Vm<F: Processor> {
    world: Arc<World>,
    mmu: Mmu<F, TestHost>,
    reader: Reader,
    root: Root,
    form: Form,
    means: Means,
    ring: Option<(Arc<Ring>, usize)>,
    /// Frames with a translation, and whether it allows writes.
    tlb: HashMap<u64, bool>,
    flushes_seen: u64,
    /// What the processor has written down.
    log: Vec<Gpa>,
    /// What the program was told through the ring in this round.
    harvested: BTreeSet<u64>,
    logging: bool,
    /// Pages of the slot that are dirty.
    expected: BTreeSet<u64>,
}

impl<F: Processor> Vm<F> {
    fn new(form: Form, means: Means) -> Self {
        Self::with_split(form, means, true)
    }

    /// `eager_split`: large leaves are split when logging begins, not when they are written.
    fn with_split(form: Form, means: Means, eager_split: bool) -> Self {
        let world = World::new(0x1000_0000_0000);
        let config = Config {
            slot_zap_all: false,
            accessed_dirty: means != Means::Nothing,
            pml: means == Means::Log,
            eager_split,
            ..Config::default()
        };
        let mmu = Mmu::new(TestHost(Arc::clone(&world)), config);
        let mut ring = None;
        let reader = match form {
            Form::Ring => {
                let entries = mmu.enable_dirty_ring(RING_BYTES).unwrap();
                let memory: Box<[DirtyGfn]> = (0..entries).map(|_| DirtyGfn::default()).collect();
                let memory = Arc::new(Ring(memory));
                ring = Some((Arc::clone(&memory), 0));
                mmu.ring_reader(memory)
            }
            _ => mmu.reader(),
        };
        mmu.set_manual_protect(match form {
            Form::Bitmap | Form::Ring => ManualProtect::empty(),
            Form::Manual => ManualProtect::ENABLE,
            Form::InitiallySet => ManualProtect::all(),
        });
        let root = mmu.load_root(RootRole::NORMAL).unwrap();
        let vm = Self {
            world,
            mmu,
            reader,
            root,
            form,
            means,
            ring,
            tlb: HashMap::new(),
            flushes_seen: 0,
            log: Vec::new(),
            harvested: BTreeSet::new(),
            logging: false,
            expected: BTreeSet::new(),
        };
        vm.set_flags(0);
        vm
    }

    fn set_flags(&self, flags: u32) {
        self.mmu
            .set_region(region(0, BASE, PAGES, HVA_PAGE, flags))
            .unwrap();
    }

    fn toggle(&mut self) {
        self.drain();
        self.harvest_ring();
        self.logging = !self.logging;
        self.set_flags(if self.logging { LOG } else { 0 });
        self.expected.clear();
        self.harvested.clear();
        if self.logging && self.form == Form::InitiallySet {
            self.expected = (0..PAGES).collect();
        }
    }

    /// The processor leaves the guest: its log is emptied.
    fn drain(&mut self) {
        let log = std::mem::take(&mut self.log);
        self.mmu.drain_pml(&mut self.reader, 0, log.into_iter());
    }

    fn access(&mut self, page: u64, write: bool) {
        while self.reader.is_dirty_ring_soft_full() {
            self.harvest_ring();
            assert_ne!(self.mmu.reset_dirty_rings(), 0);
        }
        let flushes = self.world.flushes.load(Ordering::Relaxed);
        if std::mem::replace(&mut self.flushes_seen, flushes) != flushes {
            self.tlb.clear();
        }
        let gfn = BASE + page;
        if write {
            self.expected.insert(page);
        }
        if self
            .tlb
            .get(&gfn)
            .is_some_and(|writable| *writable || !write)
        {
            return;
        }
        let gpa = Gfn::new(gfn).address();
        for _ in 0..4 {
            let flags = F::TRACKED == 0 || self.means != Means::Nothing;
            let found = touch::<F>(
                &self.world,
                self.root.hpa(),
                Level::L512G,
                gpa,
                write,
                flags,
            );
            let error = match found {
                Ok(dirtied) => {
                    if dirtied && self.means == Means::Log && F::HAS_PML {
                        self.log.push(gpa);
                    }
                    self.tlb.insert(gfn, write);
                    if self.log.len() == 512 {
                        self.drain();
                    }
                    return;
                }
                Err(error) => error,
            };
            self.drain();
            let fast = self.reader.stats().pf_fast;
            let fault = Fault { gpa, error };
            let outcome = self.mmu.fault(&mut self.reader, &self.root, fault);
            assert!(matches!(outcome, Ok(Outcome::Fixed { .. })), "{outcome:?}");
            // What is mapped for the first time is mapped writable.
            if self.logging && self.reader.stats().pf_fast == fast {
                self.expected.insert(page);
            }
        }
        panic!("page {page:#x} cannot be reached");
    }

    fn harvest_ring(&mut self) {
        let Some((ring, next)) = &mut self.ring else {
            return;
        };
        while let Some((slot, offset)) = ring.0[*next % ring.0.len()].harvest() {
            assert_eq!(slot, 0);
            self.harvested.insert(offset);
            *next += 1;
        }
    }

    /// What the form reports; `clear` chooses what a program that clears by itself clears.
    fn round(&mut self, clear: impl Fn(u64) -> bool) {
        if !self.logging {
            return;
        }
        self.drain();
        if self.form == Form::Ring {
            self.harvest_ring();
            self.mmu.reset_dirty_rings();
            let told = std::mem::take(&mut self.harvested);
            assert_eq!(told, std::mem::take(&mut self.expected));
            return;
        }
        let mut bits = vec![0; PAGES.div_ceil(64) as usize];
        self.mmu.dirty_log_get(0, 0, &mut bits).unwrap();
        let told: BTreeSet<u64> = (0..64 * bits.len() as u64)
            .filter(|page| bits[*page as usize / 64] >> (page % 64) & 1 == 1)
            .collect();
        assert_eq!(told, self.expected);
        if self.form == Form::Bitmap {
            self.expected.clear();
            return;
        }
        // The second half of the slot by itself, then everything.
        let words = bits.len();
        let half = words / 2;
        for (first, pages) in [(64 * half as u64, PAGES - 64 * half as u64), (0, PAGES)] {
            let mut wanted: Vec<u64> = (first / 64..words as u64)
                .map(|word| {
                    (0..64)
                        .filter(|bit| clear(64 * word + bit))
                        .map(|bit| 1 << bit)
                        .sum()
                })
                .collect();
            self.mmu
                .dirty_log_clear(0, 0, first, pages as u32, &mut wanted)
                .unwrap();
            for page in first..PAGES {
                let word = wanted[(page - first) as usize / 64];
                let cleared = word >> (page % 64) & 1 == 1;
                assert_eq!(
                    cleared,
                    clear(page) && self.expected.remove(&page),
                    "page {page:#x}"
                );
                if cleared {
                    self.expected.remove(&page);
                } else if clear(page) {
                    assert!(!self.expected.contains(&page));
                }
            }
        }
    }

    fn change_host(&mut self, page: u64) {
        self.drain();
        let hva = (HVA_PAGE + page) << 12;
        drop(self.mmu.host_change(hva..hva + 4096));
    }

    fn age(&mut self, page: u64) {
        let gfn = BASE + page;
        self.mmu
            .clear_young_gfns(0, Gfn::new(gfn)..Gfn::new(gfn + 1));
    }
}

#[derive(Clone, Debug)]
enum Op {
    Access { page: usize, write: bool },
    HostWrite { page: usize },
    Round { clear: u64 },
    Toggle,
    Change { page: usize },
    Age { page: usize },
    Level { large: bool },
}

fn ops() -> impl Strategy<Value = Op> {
    let page = || 0..TOUCHED.len();
    prop_oneof![
        20 => (page(), any::<bool>()).prop_map(|(page, write)| Op::Access { page, write }),
        2 => page().prop_map(|page| Op::HostWrite { page }),
        5 => any::<u64>().prop_map(|clear| Op::Round { clear }),
        2 => Just(Op::Toggle),
        2 => page().prop_map(|page| Op::Change { page }),
        4 => page().prop_map(|page| Op::Age { page }),
        1 => any::<bool>().prop_map(|large| Op::Level { large }),
    ]
}

fn run<F: Processor>(form: Form, means: Means, eager_split: bool, ops: &[Op]) {
    let mut vm = Vm::<F>::with_split(form, means, eager_split);
    for op in ops {
        match *op {
            Op::Access { page, write } => vm.access(TOUCHED[page], write),
            Op::HostWrite { page } => {
                let page = TOUCHED[page];
                assert!(vm.mmu.mark_dirty(&mut vm.reader, 0, Gfn::new(BASE + page)));
                vm.expected.insert(page);
            }
            Op::Round { clear } => vm.round(|page| clear >> (page % 61) & 1 == 1),
            Op::Toggle => vm.toggle(),
            Op::Change { page } => vm.change_host(TOUCHED[page]),
            Op::Age { page } => vm.age(TOUCHED[page]),
            Op::Level { large } => {
                *vm.world.level.lock().unwrap() = if large { Level::L2M } else { Level::L4K };
            }
        }
        let report = vm.mmu.check();
        assert!(report.violations.is_empty(), "{report}");
    }
    vm.round(|_| true);
    vm.round(|_| true);
}

const FORMS: [Form; 4] = [Form::Bitmap, Form::Manual, Form::InitiallySet, Form::Ring];

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        cases: ProptestConfig::default().cases / 4,
        ..ProptestConfig::default()
    })]

    #[test]
    fn every_form_tells_exactly_what_was_written_in_each_round_over_ept(
        ops in prop::collection::vec(ops(), 1..160), form in 0..FORMS.len(),
        eager in any::<bool>(),
    ) {
        run::<Ept>(FORMS[form], Means::Flags, eager, &ops);
    }

    #[test]
    fn every_form_tells_exactly_what_a_processor_with_a_log_has_written(
        ops in prop::collection::vec(ops(), 1..160), form in 0..FORMS.len(),
        eager in any::<bool>(),
    ) {
        run::<Ept>(FORMS[form], Means::Log, eager, &ops);
    }

    #[test]
    fn every_form_tells_exactly_what_was_written_without_accessed_and_dirty_bits(
        ops in prop::collection::vec(ops(), 1..160), form in 0..FORMS.len(),
        eager in any::<bool>(),
    ) {
        run::<Ept>(FORMS[form], Means::Nothing, eager, &ops);
    }

    #[test]
    fn every_form_tells_exactly_what_was_written_in_each_round_over_npt(
        ops in prop::collection::vec(ops(), 1..160), form in 0..FORMS.len(),
        eager in any::<bool>(),
    ) {
        run::<Npt>(FORMS[form], Means::Flags, eager, &ops);
    }
}

#[test]
fn a_processor_with_a_log_does_not_fault_for_pages_that_were_collected() {
    let mut vm = Vm::<Ept>::new(Form::Bitmap, Means::Log);
    vm.toggle();
    for page in 0..PAGES {
        vm.access(page, true);
    }
    vm.round(|_| true);
    let faults = vm.reader.stats().pf_taken;
    for page in 0..PAGES {
        vm.access(page, true);
    }
    assert_eq!(vm.reader.stats().pf_taken, faults);
    vm.round(|_| true);
}

/// Ageing does not flush: a processor may go on writing through what it has, until the page is
/// collected.
#[test]
fn a_page_that_has_aged_is_not_written_unnoticed_after_it_was_collected() {
    for form in FORMS {
        for means in [Means::Log, Means::Flags, Means::Nothing] {
            let mut vm = Vm::<Ept>::new(form, means);
            vm.toggle();
            vm.round(|_| true);
            vm.access(3, true);
            vm.age(3);
            vm.access(3, true);
            vm.round(|_| true);
            vm.access(3, true);
            vm.round(|_| true);
        }
    }
}

#[test]
fn the_tables_of_a_nested_guest_are_protected_even_if_the_processor_has_a_log() {
    let mut vm = Vm::<Ept>::new(Form::Bitmap, Means::Log);
    vm.root = vm
        .mmu
        .load_root(RootRole {
            guest_mode: true,
            ..RootRole::NORMAL
        })
        .unwrap();
    vm.toggle();
    vm.access(3, true);
    vm.round(|_| true);
    let faults = vm.reader.stats().pf_fast;
    vm.access(3, true);
    assert_eq!(vm.reader.stats().pf_fast, faults + 1);
    vm.round(|_| true);
}

#[test]
fn a_ring_that_is_soft_full_takes_what_one_more_run_of_the_processor_can_add() {
    let mut vm = Vm::<Ept>::new(Form::Ring, Means::Log);
    vm.toggle();
    let mut marked = 0;
    while !vm.reader.is_dirty_ring_soft_full() {
        assert!(vm.mmu.mark_dirty(&mut vm.reader, 0, Gfn::new(BASE)));
        marked += 1;
    }
    assert_eq!(marked, RING_BYTES / 16 - 64 - 512);
    let log = (0..512).map(|page| Gfn::new(BASE + page % PAGES).address());
    vm.mmu.drain_pml(&mut vm.reader, 0, log);
    for _ in 0..64 {
        assert!(vm.mmu.mark_dirty(&mut vm.reader, 0, Gfn::new(BASE)));
    }
    // Nothing is lost: a page that cannot be recorded does not become writable.
    assert!(!vm.mmu.mark_dirty(&mut vm.reader, 0, Gfn::new(BASE)));
    let fault = Fault {
        gpa: Gfn::new(BASE + 7).address(),
        error: twofold_arch::Pferr::WRITE,
    };
    assert_eq!(
        vm.mmu.fault(&mut vm.reader, &vm.root, fault),
        Ok(Outcome::Retry)
    );
    vm.harvest_ring();
    assert_eq!(vm.mmu.reset_dirty_rings(), (RING_BYTES / 16) as u32);
    assert!(!vm.reader.is_dirty_ring_soft_full());
    assert_eq!(vm.mmu.reset_dirty_rings(), 0);
}

#[test]
fn the_ring_of_a_reader_that_is_gone_can_still_be_reset() {
    let mut vm = Vm::<Ept>::new(Form::Ring, Means::Flags);
    vm.toggle();
    vm.access(3, true);
    let entries = (0..vm.mmu.ring_entries()).map(|_| DirtyGfn::default());
    let second = Arc::new(Ring(entries.collect()));
    vm.reader = vm
        .mmu
        .ring_reader(Arc::clone(&second) as Arc<dyn RingMemory>);
    let _ = vm.mmu.stats();
    vm.harvest_ring();
    assert_eq!(vm.harvested, BTreeSet::from([3]));
    assert_eq!(vm.mmu.reset_dirty_rings(), 1);
    vm.access(3, true);
    assert_eq!(second.0[0].harvest(), Some((0, 3)));
}

#[test]
fn ring_sizes_are_refused_as_kvm_refuses_them() {
    fn mmu<F: Processor>(pml: bool) -> Mmu<F, TestHost> {
        let config = Config {
            pml,
            ..Config::default()
        };
        Mmu::new(TestHost(World::new(0)), config)
    }
    let invalid = Err(DirtyRingError::Invalid);
    for bytes in [0, 1, 2048, 4095, 12288, u64::MAX] {
        assert_eq!(mmu::<Npt>(false).enable_dirty_ring(bytes), invalid);
    }
    let too_big = Err(DirtyRingError::TooBig);
    assert_eq!(mmu::<Npt>(false).enable_dirty_ring(2 << 20), too_big);
    assert_eq!(mmu::<Npt>(false).enable_dirty_ring(1 << 63), too_big);
    assert_eq!(mmu::<Npt>(false).enable_dirty_ring(1 << 20), Ok(65536));
    assert_eq!(mmu::<Npt>(true).enable_dirty_ring(4096), Ok(256));
    // The processor's log adds 512 entries to the reserve.
    assert_eq!(mmu::<Ept>(false).enable_dirty_ring(4096), Ok(256));
    assert_eq!(mmu::<Ept>(true).enable_dirty_ring(8192), invalid);
    let ept = mmu::<Ept>(true);
    assert_eq!(ept.enable_dirty_ring(16384), Ok(1024));
    assert_eq!(ept.enable_dirty_ring(16384), invalid, "once");
    assert_eq!(
        ept.dirty_log_get(9, 9, &mut []),
        Err(DirtyLogError::RingOnly)
    );
    assert_eq!(
        ept.dirty_log_clear(9, 9, 1, 1, &mut []),
        Err(DirtyLogError::RingOnly)
    );
}

#[test]
fn clearing_is_refused_as_kvm_refuses_it() {
    let mut vm = Vm::<Ept>::new(Form::Manual, Means::Flags);
    let mut bits = [u64::MAX; 64];
    let clear = |vm: &Vm<Ept>, as_id, slot, first, pages, bits: &mut [u64]| {
        vm.mmu.dirty_log_clear(as_id, slot, first, pages, bits)
    };
    let all = PAGES as u32;
    assert_eq!(clear(&vm, 2, 0, 0, all, &mut bits), Err(DirtyLogError::Id));
    assert_eq!(
        clear(&vm, 0, 32764, 1, all, &mut bits),
        Err(DirtyLogError::Id)
    );
    assert_eq!(
        clear(&vm, 0, 0, 1, all, &mut bits),
        Err(DirtyLogError::Range)
    );
    assert_eq!(
        clear(&vm, 0, 0, 0, all, &mut bits),
        Err(DirtyLogError::NotLogged)
    );
    vm.toggle();
    vm.access(1, true);
    for (first, pages) in [
        (0, all + 1),
        (64, all),
        (0, 1),
        (0, 63),
        (64, 65),
        (PAGES.next_multiple_of(64), 0),
        (PAGES.next_multiple_of(64), 64),
        (u64::MAX - 63, 64),
    ] {
        assert_eq!(
            clear(&vm, 0, 0, first, pages, &mut bits),
            Err(DirtyLogError::Range),
            "{first:#x} {pages:#x}"
        );
    }
    assert_eq!(
        clear(&vm, 0, 0, 0, all, &mut [0; 2]),
        Err(DirtyLogError::Buffer)
    );
    // Nothing was cleared so far.
    assert_eq!(clear(&vm, 0, 0, 0, 0, &mut bits), Ok(()));
    assert_eq!(clear(&vm, 0, 0, 64, 64, &mut bits), Ok(()));
    vm.round(|_| true);
}
