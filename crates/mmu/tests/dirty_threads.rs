//! No write is forgotten, in any form of dirty tracking, while several virtual processors with TLBs
//! and logs of their own write, and others collect, age pages and take host memory away.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use common::{Processor, TestHost, World, region, touch};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use twofold_arch::{Gfn, Gpa, Level};
use twofold_mmu::{
    Config, DirtyGfn, Ept, Fault, ManualProtect, Mmu, Npt, Outcome, Reader, RingMemory, RootRole,
};

const GUESTS: usize = 2;
const PAGES: u64 = 300;
const BASE: u64 = 0x1f0;
const HVA_PAGE: u64 = 0x4_0000 + BASE;
const RING_BYTES: u64 = 16384;
const ROUNDS: u32 = 40;
const LOG: u32 = 1;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Form {
    Bitmap,
    Cleared,
    Ring,
}

/// Accessed and dirty bits, and a log; or the bits alone; or nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Means {
    Log,
    Flags,
    Nothing,
}

struct Ring(Box<[DirtyGfn]>);

impl RingMemory for Ring {
    fn entries(&self) -> &[DirtyGfn] {
        &self.0
    }
}

/// What other threads see of a virtual processor.
#[derive(Default)]
struct Line {
    in_guest: AtomicBool,
    flush: AtomicBool,
    writes: AtomicU64,
}

/// Leaves guest mode for good, also when the test fails: nobody must wait for this processor.
struct Leave<'a>(&'a Line);

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        self.0.in_guest.store(false, SeqCst);
    }
}

struct Machine<F: Processor> {
    world: Arc<World>,
    mmu: Mmu<F, TestHost>,
    form: Form,
    means: Means,
    lines: Arc<[Line; GUESTS]>,
    readers: Mutex<Vec<Reader>>,
    rings: Vec<Arc<Ring>>,
    /// How often the guests have written each page.
    written: Vec<AtomicU64>,
    stop: AtomicBool,
}

/// What the program knows.
struct Program {
    /// The number of writes to each page when it was last reported.
    reported: Vec<u64>,
    /// The next entry of each ring.
    next: [usize; GUESTS],
}

impl<F: Processor> Machine<F> {
    fn new(form: Form, means: Means) -> Self {
        let world = World::new(0x7000_0000_0000);
        let lines: Arc<[Line; GUESTS]> = Arc::default();
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
            accessed_dirty: means != Means::Nothing,
            pml: means == Means::Log,
            ..Config::default()
        };
        let mmu = Mmu::new(TestHost(Arc::clone(&world)), config);
        if form == Form::Cleared {
            mmu.set_manual_protect(ManualProtect::all());
        }
        let mut rings = Vec::new();
        let readers = (0..GUESTS)
            .map(|_| {
                if form != Form::Ring {
                    return mmu.reader();
                }
                if rings.is_empty() {
                    mmu.enable_dirty_ring(RING_BYTES).unwrap();
                }
                let entries = (0..mmu.ring_entries()).map(|_| DirtyGfn::default());
                let ring = Arc::new(Ring(entries.collect()));
                rings.push(Arc::clone(&ring));
                mmu.ring_reader(ring)
            })
            .collect();
        mmu.set_region(region(0, BASE, PAGES, HVA_PAGE, LOG))
            .unwrap();
        Self {
            world,
            mmu,
            form,
            means,
            lines,
            readers: Mutex::new(readers),
            rings,
            written: (0..PAGES).map(|_| AtomicU64::new(0)).collect(),
            stop: AtomicBool::new(false),
        }
    }

    fn run_guest(&self, index: usize) {
        let line = &self.lines[index];
        let _leave = Leave(line);
        let mut reader = self.readers.lock().unwrap().pop().unwrap();
        let root = self.mmu.load_root(RootRole::NORMAL).unwrap();
        let flags = F::TRACKED == 0 || self.means != Means::Nothing;
        let has_log = F::HAS_PML && self.means == Means::Log;
        // Frames with a translation, and whether it allows writes.
        let mut tlb: HashMap<u64, bool> = HashMap::new();
        let mut log: Vec<Gpa> = Vec::new();
        let mut random = 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(index as u64 + 1);
        let mut again = false;
        while !self.stop.load(SeqCst) {
            if reader.is_dirty_ring_soft_full() {
                std::thread::yield_now();
                continue;
            }
            line.in_guest.store(true, SeqCst);
            let fault = loop {
                if line.flush.load(SeqCst) {
                    tlb.clear();
                    line.flush.store(false, SeqCst);
                }
                if log.len() == 512 || self.stop.load(SeqCst) {
                    break None;
                }
                if !std::mem::take(&mut again) {
                    random = random
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                }
                let page = (random >> 33) % PAGES;
                let write = random >> 62 != 0;
                let (gfn, gpa) = (BASE + page, Gfn::new(BASE + page).address());
                if !tlb.get(&gfn).is_some_and(|writable| *writable || !write) {
                    let level = Level::L512G;
                    match touch::<F>(&self.world, root.hpa(), level, gpa, write, flags) {
                        Ok(dirtied) => {
                            if dirtied && has_log {
                                log.push(gpa);
                            }
                            tlb.insert(gfn, write);
                        }
                        Err(error) => break Some(Fault { gpa, error }),
                    }
                }
                if write {
                    self.written[page as usize].fetch_add(1, SeqCst);
                    line.writes.fetch_add(1, SeqCst);
                }
            };
            line.in_guest.store(false, SeqCst);
            self.mmu.drain_pml(&mut reader, 0, log.drain(..));
            if let Some(fault) = fault {
                let outcome = self.mmu.fault(&mut reader, &root, fault).unwrap();
                assert_ne!(outcome, Outcome::Mmio);
                again = true;
            }
        }
        self.mmu.drain_pml(&mut reader, 0, log.drain(..));
        // The ring is read after the reader has stopped.
        self.readers.lock().unwrap().push(reader);
    }

    fn collect(&self, program: &mut Program) {
        let words = PAGES.div_ceil(64) as usize;
        let mut bits = vec![0_u64; words];
        match self.form {
            Form::Bitmap => self.mmu.dirty_log_get(0, 0, &mut bits).unwrap(),
            Form::Cleared => {
                bits.fill(u64::MAX);
                let pages = PAGES as u32;
                self.mmu.dirty_log_clear(0, 0, 0, pages, &mut bits).unwrap();
            }
            Form::Ring => {
                for (ring, next) in self.rings.iter().zip(&mut program.next) {
                    while let Some((slot, page)) = ring.0[*next % ring.0.len()].harvest() {
                        assert!(slot == 0 && page < PAGES);
                        bits[page as usize / 64] |= 1 << (page % 64);
                        *next += 1;
                    }
                }
                self.mmu.reset_dirty_rings();
            }
        }
        for (page, reported) in program.reported.iter_mut().enumerate() {
            if bits[page / 64] >> (page % 64) & 1 == 1 {
                *reported = self.written[page].load(SeqCst);
            }
        }
    }
}

fn hammer<F: Processor>(form: Form, means: Means) {
    let machine = Machine::<F>::new(form, means);
    let mut program = Program {
        reported: vec![0; PAGES as usize],
        next: [0; GUESTS],
    };
    std::thread::scope(|scope| {
        let guests = [0, 1].map(|index| {
            let machine = &machine;
            scope.spawn(move || machine.run_guest(index))
        });
        let failed = || guests.iter().any(|guest| guest.is_finished());
        let mut random = 7_u64;
        let mut seen = [0; GUESTS];
        for round in 0..ROUNDS {
            // Both have written since the last round, unless a full ring stops them.
            for (line, seen) in machine.lines.iter().zip(&mut seen) {
                for _ in 0..2000 {
                    if line.writes.load(SeqCst) >= *seen + 20 || failed() {
                        break;
                    }
                    std::thread::yield_now();
                }
                *seen = line.writes.load(SeqCst);
            }
            machine.collect(&mut program);
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let page = (random >> 33) % PAGES;
            let gfns = Gfn::new(BASE + page)..Gfn::new((BASE + page + 40).min(BASE + PAGES));
            machine.mmu.clear_young_gfns(0, gfns);
            if round % 4 == 0 {
                let hva = (HVA_PAGE + page) << 12;
                drop(machine.mmu.host_change(hva..hva + 0x3000));
            }
        }
        machine.stop.store(true, SeqCst);
        for guest in guests {
            guest.join().unwrap();
        }
    });
    machine.collect(&mut program);
    for (page, reported) in program.reported.iter().enumerate() {
        let written = machine.written[page].load(SeqCst);
        assert_eq!(
            *reported, written,
            "{form:?}, {means:?}: writes to page {page:#x} were not reported"
        );
    }
}

#[test]
fn no_write_is_forgotten_by_a_bitmap() {
    hammer::<Ept>(Form::Bitmap, Means::Log);
    hammer::<Ept>(Form::Bitmap, Means::Flags);
    hammer::<Ept>(Form::Bitmap, Means::Nothing);
    hammer::<Npt>(Form::Bitmap, Means::Flags);
}

#[test]
fn no_write_is_forgotten_by_a_bitmap_that_is_cleared_by_hand() {
    hammer::<Ept>(Form::Cleared, Means::Log);
    hammer::<Ept>(Form::Cleared, Means::Flags);
    hammer::<Ept>(Form::Cleared, Means::Nothing);
    hammer::<Npt>(Form::Cleared, Means::Flags);
}

#[test]
fn no_write_is_forgotten_by_rings() {
    hammer::<Ept>(Form::Ring, Means::Log);
    hammer::<Ept>(Form::Ring, Means::Flags);
    hammer::<Ept>(Form::Ring, Means::Nothing);
    hammer::<Npt>(Form::Ring, Means::Flags);
}
