//! Everything at once: threads fault on the same and on different frames below several roots while
//! others zap, split, recover, log, age, change host memory and slots. Afterwards (and now and then
//! meanwhile) the invariants hold, the counters agree with the tables, and every table page comes
//! back. That no access reaches what is lost is for the tests whose processors have TLBs.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use common::{Processor, TestHost, World, region};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};
use twofold_arch::{Gfn, Level, Pferr};
use twofold_mmu::{Config, Ept, Fault, FaultError, Mmu, Npt, Outcome, RootRole};

const LOG: u32 = 1;
const HVA_PAGE: u64 = 0x10_0000;
/// Slots: first frame, pages, flags. The first two stay; the last comes and goes.
const SLOTS: [(u64, u64, u32); 3] = [(0, 0x800, 0), (0x1000, 0x400, LOG), (0x2000, 0x400, 0)];
const ROLES: [RootRole; 3] = [
    RootRole::NORMAL,
    RootRole {
        level: Level::L256T,
        ..RootRole::NORMAL
    },
    RootRole {
        guest_mode: true,
        ..RootRole::NORMAL
    },
];

struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }

    /// A frame, most of them in slots, and few enough that threads meet.
    fn frame(&mut self) -> u64 {
        let (base, _, _) = SLOTS[self.below(3) as usize];
        base + self.below(4) * 0x1ff + self.below(6)
    }
}

struct Storm<F: Processor> {
    world: Arc<World>,
    mmu: Mmu<F, TestHost>,
    stop: AtomicBool,
    faults: AtomicU64,
}

impl<F: Processor> Storm<F> {
    fn set(&self, id: usize, flags: u32) {
        let (base, pages, _) = SLOTS[id];
        let request = region(id as u32, base, pages, HVA_PAGE + base, flags);
        self.mmu.set_region(request).unwrap();
    }

    fn fault(&self, seed: u64) {
        let mut random = Random(seed);
        let mut reader = self.mmu.reader();
        let mut roots = ROLES.map(|role| self.mmu.load_root(role).unwrap());
        while !self.stop.load(SeqCst) {
            let role = random.below(3) as usize;
            let gpa = Gfn::new(random.frame()).address();
            let access = [Pferr::USER, Pferr::WRITE, Pferr::FETCH][random.below(3) as usize];
            let present = [Pferr::empty(), Pferr::PRESENT][random.below(2) as usize];
            let fault = Fault {
                gpa,
                error: access | present,
            };
            match self.mmu.fault(&mut reader, &roots[role], fault) {
                Ok(Outcome::ObsoleteRoot) => {
                    roots[role] = self.mmu.load_root(ROLES[role]).unwrap();
                }
                Ok(_) | Err(FaultError::BadHostMemory) => {}
                Err(error) => panic!("{error}"),
            }
            if random.below(64) == 0 {
                let gfns = gpa.frame()..Gfn::new(gpa.frame().get() + 20);
                let _ = self.mmu.prefault(&mut reader, &roots[role], gfns);
            }
            self.faults.fetch_add(1, SeqCst);
        }
    }

    /// Takes mappings away and changes how they look.
    fn disturb(&self, seed: u64) {
        let mut random = Random(seed);
        let mut bits = vec![0; 0x20];
        while !self.stop.load(SeqCst) {
            let gfn = random.frame();
            let gfns = Gfn::new(gfn)..Gfn::new(gfn + random.below(0x210));
            let hva = (HVA_PAGE + gfn) << 12;
            match random.below(12) {
                0 => self.mmu.zap_all(),
                1 | 2 => drop(self.mmu.host_change(hva..hva + (random.below(0x400) << 12))),
                3 => drop(self.mmu.clear_young_gfns(0, gfns)),
                4 => drop(self.mmu.test_young(hva..hva + 4096)),
                5 => self.mmu.dirty_log_get(0, 1, &mut bits).unwrap(),
                6 => {
                    bits.fill(u64::MAX);
                    let clear = self.mmu.dirty_log_clear(0, 1, 64, 64, &mut bits);
                    clear.unwrap();
                }
                7 => self.mmu.recover_huge_pages(0, 0),
                8 => drop(self.mmu.recover_nx_huge_pages(2)),
                9 => drop(self.mmu.stats()),
                10 => {
                    let level = [Level::L4K, Level::L2M][random.below(2) as usize];
                    // The host's pages change their size: nobody may rely on the old one.
                    let change = self.mmu.host_change_all();
                    *self.world.level.lock().unwrap() = level;
                    *self.world.level_if_asked.lock().unwrap() = level;
                    drop(change);
                }
                _ => {
                    let report = self.mmu.check();
                    assert!(report.violations.is_empty(), "{report}");
                }
            }
        }
    }

    /// Logging of one slot begins and ends, another comes and goes, the mitigation too.
    fn rearrange(&self, seed: u64) {
        let mut random = Random(seed);
        while !self.stop.load(SeqCst) {
            self.set(0, LOG);
            std::thread::yield_now();
            self.set(2, 0);
            self.set(0, 0);
            if random.below(4) == 0 {
                self.mmu.set_nx_huge_pages(random.below(2) == 0);
            }
            self.mmu.set_region(region(2, 0, 0, 0, 0)).unwrap();
        }
    }
}

fn storm<F: Processor>(config: Config) {
    let world = World::new(0x3000_0000_0000);
    *world.level.lock().unwrap() = Level::L2M;
    *world.level_if_asked.lock().unwrap() = Level::L2M;
    let storm = Storm::<F> {
        mmu: Mmu::new(TestHost(Arc::clone(&world)), config),
        world,
        stop: AtomicBool::new(false),
        faults: AtomicU64::new(0),
    };
    for (id, &(_, _, flags)) in SLOTS[..2].iter().enumerate() {
        storm.set(id, flags);
    }
    // Ends the others even if one fails.
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, SeqCst);
        }
    }
    std::thread::scope(|scope| {
        let stop = &storm.stop;
        let run = |work: fn(&Storm<F>, u64), seed| {
            let storm = &storm;
            scope.spawn(move || {
                let _stop = Stop(stop);
                work(storm, seed);
            });
        };
        for seed in 1..=4 {
            run(Storm::fault, seed);
        }
        run(Storm::disturb, 5);
        run(Storm::disturb, 6);
        run(Storm::rearrange, 7);
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(1500) && !stop.load(SeqCst) {
            std::thread::sleep(Duration::from_millis(20));
        }
        stop.store(true, SeqCst);
    });
    assert!(
        storm.faults.load(SeqCst) > 1000,
        "hardly anything was tried"
    );
    let Storm { world, mmu, .. } = storm;
    let report = mmu.check();
    assert!(report.violations.is_empty(), "{report}");
    let stats = mmu.stats();
    let counted = [stats.pages_4k, stats.pages_2m, stats.pages_1g];
    assert_eq!(counted, report.leaves, "leaves are miscounted");
    mmu.zap_all();
    let stats = mmu.stats();
    assert_eq!([stats.pages_4k, stats.pages_2m, stats.pages_1g], [0; 3]);
    drop(mmu);
    let live = world.live_tables.load(SeqCst);
    assert_eq!(live, 0, "table pages leaked");
}

#[test]
fn a_storm_over_ept_leaves_everything_in_order() {
    storm::<Ept>(Config {
        slot_zap_all: false,
        ..Config::default()
    });
}

#[test]
fn a_storm_over_ept_without_accessed_bits_leaves_everything_in_order() {
    storm::<Ept>(Config {
        accessed_dirty: false,
        eager_split: false,
        nx_huge_pages: true,
        ..Config::default()
    });
}

#[test]
fn a_storm_over_npt_leaves_everything_in_order() {
    storm::<Npt>(Config {
        slot_zap_all: false,
        nx_huge_pages: true,
        ..Config::default()
    });
}
