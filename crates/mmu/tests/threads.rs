//! Virtual processors with TLBs of their own run on several threads while host memory, slots and
//! roots change under them. What must never happen: a guest access to a page that has been taken
//! away, a walk into a table that has been freed, a write that no dirty bitmap reports.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use common::{Found, Processor, TestHost, World, region, walk};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::SeqCst};
use twofold_arch::{Gfn, Gpa, Level, Pferr};
use twofold_mmu::{Config, Ept, Fault, FaultError, Mmu, Npt, Outcome, RootRole};

const PAGES: u64 = 1200;
/// Guest frames: a slot that stays, and a slot that comes and goes at two places.
const STAYS: u64 = 0x100;
const COMES: [u64; 2] = [0x1000, 0x1003];
const COMES_PAGES: u64 = 16;
const HVA: u64 = 0x5000_0000;
const HVA_COMES: u64 = 0x6000_0000;
/// Rounds of changes; each waits for both processors a few times.
const ROUNDS: u64 = 2000;

/// What other threads see of a virtual processor.
#[derive(Default)]
struct Line {
    in_guest: AtomicBool,
    flush: AtomicBool,
    accesses: AtomicU64,
}

/// Leaves guest mode for good, also when the test fails: nobody must wait for this processor.
struct Leave<'a>(&'a Line);

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        self.0.in_guest.store(false, SeqCst);
    }
}

/// Host memory: whether a page is there, and how often the guest has written it.
struct Page {
    there: AtomicU8,
    written: AtomicU64,
}

struct Machine<F: Processor> {
    world: Arc<World>,
    mmu: Mmu<F, TestHost>,
    lines: Arc<[Line; 2]>,
    pages: Vec<Page>,
    stop: AtomicBool,
}

fn number(hva: u64) -> usize {
    match hva {
        HVA_COMES.. => (PAGES + (hva - HVA_COMES) / 4096) as usize,
        _ => ((hva - HVA) / 4096) as usize,
    }
}

impl<F: Processor> Machine<F> {
    fn new(zap_all: bool) -> Self {
        let world = World::new(0x7000_0000_0000);
        world.slow_populate.store(5, SeqCst);
        let lines: Arc<[Line; 2]> = Arc::default();
        let flushed = Arc::clone(&lines);
        *world.on_flush.lock().unwrap() = Some(Arc::new(move || {
            for line in flushed.iter() {
                line.flush.store(true, SeqCst);
            }
            for line in flushed.iter() {
                while line.in_guest.load(SeqCst) && line.flush.load(SeqCst) {
                    std::thread::yield_now();
                }
            }
        }));
        let config = Config {
            slot_zap_all: zap_all,
            ..Config::default()
        };
        let mmu = Mmu::new(TestHost(Arc::clone(&world)), config);
        mmu.set_region(region(0, STAYS, PAGES, HVA >> 12, 1))
            .unwrap();
        let page = |_| Page {
            there: AtomicU8::new(1),
            written: AtomicU64::new(0),
        };
        let pages = (0..PAGES + COMES_PAGES).map(page).collect();
        Self {
            world,
            mmu,
            lines,
            pages,
            stop: AtomicBool::new(false),
        }
    }

    fn page(&self, frame: u64) -> &Page {
        let hva = (frame - common::usual_frame(0)) << 12;
        &self.pages[number(hva)]
    }

    fn run_guest(&self, index: usize) {
        let line = &self.lines[index];
        let _leave = Leave(line);
        let mut reader = self.mmu.reader();
        let mut root = self.mmu.load_root(RootRole::NORMAL).unwrap();
        let mut tlb: HashMap<u64, (u64, bool)> = HashMap::new();
        let mut random = 0x9e37_79b9_7f4a_7c15u64.wrapping_mul(index as u64 + 1);
        let mut again = false;
        while !self.stop.load(SeqCst) {
            line.in_guest.store(true, SeqCst);
            let (gpa, write, present) = loop {
                if line.flush.load(SeqCst) {
                    tlb.clear();
                    line.flush.store(false, SeqCst);
                }
                // After a fault the same access is made again.
                if again {
                    again = false;
                } else {
                    random = random
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                }
                let choice = random >> 33;
                let gfn = match choice % 8 {
                    0 => COMES[0] + choice / 8 % (COMES_PAGES + 4),
                    _ => STAYS + choice / 8 % (PAGES + 2),
                };
                let write = random >> 62 & 1 == 1;
                let gpa = Gfn::new(gfn).address();
                let found = tlb.get(&gfn).copied().or_else(|| {
                    match walk::<F>(&self.world, root.hpa(), Level::L512G, gpa) {
                        Found::Page { frame, write, .. } => {
                            tlb.insert(gfn, (frame, write));
                            Some((frame, write))
                        }
                        _ => None,
                    }
                });
                match found {
                    Some((frame, writable)) if writable || !write => {
                        let page = self.page(frame);
                        assert_eq!(
                            page.there.load(SeqCst),
                            1,
                            "gfn {gfn:#x} reaches a lost page"
                        );
                        if write {
                            page.written.fetch_add(1, SeqCst);
                        }
                        line.accesses.fetch_add(1, SeqCst);
                    }
                    _ => {
                        // A fault drops the translation, as on a processor.
                        tlb.remove(&gfn);
                        break (gpa, write, found.is_some());
                    }
                }
                if self.stop.load(SeqCst) {
                    break (gpa, false, false);
                }
            };
            line.in_guest.store(false, SeqCst);
            again = self.handle_fault(&mut reader, &mut root, gpa, write, present, &mut tlb);
        }
    }

    /// Whether the access can be made now.
    fn handle_fault(
        &self,
        reader: &mut twofold_mmu::Reader,
        root: &mut twofold_mmu::Root,
        gpa: Gpa,
        write: bool,
        present: bool,
        tlb: &mut HashMap<u64, (u64, bool)>,
    ) -> bool {
        let mut error = if write { Pferr::WRITE } else { Pferr::USER };
        if present {
            error |= Pferr::PRESENT;
        }
        match self.mmu.fault(reader, root, Fault { gpa, error }) {
            Ok(Outcome::ObsoleteRoot) => {
                *root = self.mmu.load_root(RootRole::NORMAL).unwrap();
                // Translations belong to a root.
                tlb.clear();
            }
            Ok(Outcome::Mmio) => {
                let gfn = gpa.frame().get();
                assert!(
                    !(STAYS..STAYS + PAGES).contains(&gfn),
                    "{gfn:#x} lost its slot"
                );
                return false;
            }
            Ok(_) => {}
            Err(FaultError::BadHostMemory) => return false,
            Err(error) => panic!("{error}"),
        }
        true
    }

    /// Pages of the slot that stays vanish and come back, in ranges.
    fn change_host(&self, random: &mut u64) {
        *random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let first = (*random >> 33) % PAGES;
        let count = (*random >> 20) % 40 + 1;
        let end = (first + count).min(PAGES);
        let hva = HVA + first * 4096..HVA + end * 4096;
        let _change = self.mmu.host_change(hva);
        let mut memory = self.world.memory.lock().unwrap();
        for page in first..end {
            self.pages[page as usize].there.store(0, SeqCst);
            let gone = common::HostState {
                frame: 0,
                present: false,
                writable: false,
            };
            memory.insert((HVA >> 12) + page, gone);
        }
        drop(memory);
        std::thread::sleep(std::time::Duration::from_micros(300));
        let mut memory = self.world.memory.lock().unwrap();
        for page in first..end {
            self.pages[page as usize].there.store(1, SeqCst);
            memory.remove(&((HVA >> 12) + page));
        }
    }

    /// The other slot comes, moves, and goes; its memory is lost while it is away.
    fn change_slot(&self, round: u64) {
        let there = |there| {
            for page in &self.pages[PAGES as usize..] {
                page.there.store(there, SeqCst);
            }
        };
        there(1);
        let host = HVA_COMES >> 12;
        let place = (round % 2) as usize;
        self.mmu
            .set_region(region(1, COMES[place], COMES_PAGES, host, 0))
            .unwrap();
        std::thread::yield_now();
        self.mmu
            .set_region(region(1, COMES[1 - place], COMES_PAGES, host, 0))
            .unwrap();
        std::thread::yield_now();
        self.mmu.set_region(region(1, 0, 0, 0, 0)).unwrap();
        there(0);
    }

    fn harvest(&self, reported: &mut [u64]) {
        let mut bits = vec![0u64; PAGES.div_ceil(64) as usize];
        self.mmu.dirty_log_get(0, 0, &mut bits).unwrap();
        for (page, reported) in reported.iter_mut().enumerate() {
            if bits[page / 64] >> (page % 64) & 1 == 1 {
                *reported = self.pages[page].written.load(SeqCst);
            }
        }
    }
}

fn hammer<F: Processor>(zap_all: bool) {
    let machine = Machine::<F>::new(zap_all);
    std::thread::scope(|scope| {
        let guests = [0, 1].map(|index| {
            let machine = &machine;
            scope.spawn(move || machine.run_guest(index))
        });
        let mut random = 1;
        let mut reported = vec![0; PAGES as usize];
        let mut round = 0;
        let mut seen = [0; 2];
        let failed = || guests.iter().any(|guest| guest.is_finished());
        while round < ROUNDS && !failed() {
            // Both have run since the last round.
            for (line, seen) in machine.lines.iter().zip(&mut seen) {
                while line.accesses.load(SeqCst) < *seen + 20 && !failed() {
                    std::thread::yield_now();
                }
                *seen = line.accesses.load(SeqCst);
            }
            machine.change_host(&mut random);
            if round % 3 == 0 {
                machine.change_slot(round);
            }
            if round % 5 == 0 {
                machine.harvest(&mut reported);
            }
            if round % 20 == 0 {
                machine.mmu.zap_all();
            }
            round += 1;
        }
        machine.stop.store(true, SeqCst);
        for guest in guests {
            guest.join().unwrap();
        }
        machine.harvest(&mut reported);
        for (page, reported) in reported.iter().enumerate() {
            let written = machine.pages[page].written.load(SeqCst);
            assert_eq!(
                *reported, written,
                "writes to page {page} were not reported"
            );
        }
    });
    let stats = machine.mmu.stats();
    machine.mmu.zap_all();
    assert_eq!(
        machine.mmu.stats().pages_4k,
        0,
        "leaves are miscounted; before: {stats:?}"
    );
    let Machine { world, mmu, .. } = machine;
    *world.on_flush.lock().unwrap() = None;
    drop(mmu);
    assert_eq!(world.live_tables.load(SeqCst), 0);
}

#[test]
fn guests_never_reach_lost_pages_and_no_write_is_forgotten_over_ept() {
    hammer::<Ept>(false);
}

#[test]
fn guests_never_reach_lost_pages_and_no_write_is_forgotten_over_npt_with_fast_zaps() {
    hammer::<Npt>(true);
}
