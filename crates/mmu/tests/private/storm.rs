//! Threads that convert, punch and delete while others fault.

use super::*;
use std::sync::atomic::{AtomicBool, AtomicU64};

/// Acceptance row 47: processors fault, while others convert, punch holes and delete slots. After each
/// change the one who made it looks at what is mapped. Ends after a number of changes.
#[test]
fn a_storm_of_conversions_holes_and_deletions_never_leaves_a_mapping_of_the_past() {
    const PAGES: u64 = 512;
    const ROUNDS: u64 = 300;
    let Vm {
        world,
        mmu,
        reader,
        root,
    } = vm::<Ept>();
    drop(reader);
    let mmu = Arc::new(mmu);
    let create = |id: u32| {
        let gfn = u64::from(id) * PAGES;
        let region = region(id, gfn, PAGES, (HVA >> 12) + gfn, GUEST_MEMFD);
        mmu.set_region_with_guest_memory(region, || Ok(FILE + gfn * PAGE))
            .unwrap();
    };
    for id in 0..2 {
        create(id);
    }
    let hpa = root.hpa();
    let found = |gfn: u64| common::walk::<Ept>(&world, hpa, Level::L512G, Gfn::new(gfn).address());
    let stop = AtomicBool::new(false);
    let faults = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for seed in 1..3u64 {
            let (mmu, root, stop, faults) = (&mmu, &root, &stop, &faults);
            scope.spawn(move || {
                let mut reader = mmu.reader();
                let mut random = seed;
                while !stop.load(Ordering::Relaxed) {
                    random = random
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    let gfn = Gfn::new(random >> 40 & (2 * PAGES - 1));
                    let error = [READ, Pferr::WRITE][(random >> 33 & 1) as usize];
                    let gpa = gfn.address();
                    match mmu.fault(&mut reader, root, Fault { gpa, error }) {
                        Ok(_) => {
                            faults.fetch_add(1, Ordering::Relaxed);
                        }
                        Err(FaultError::WrongKind { .. }) => {}
                        Err(other) => panic!("{other:?}"),
                    }
                    if random >> 50 & 63 == 0 {
                        let range = gfn..Gfn::new(gfn.get() + 64);
                        let _ = mmu.prefault(&mut reader, root, range);
                    }
                }
            });
        }
        let converter = scope.spawn(|| {
            for round in 0..ROUNDS {
                let start = round * 37 % (PAGES - 64);
                let private = round % 2 == 0;
                mmu.set_attributes(gfns(start..start + 64), private)
                    .unwrap();
                for gfn in start..start + 64 {
                    // Only this thread changes these attributes.
                    if let Found::Page { frame, .. } = found(gfn) {
                        assert_eq!(frame >= usual_frame(FILE), private, "gfn {gfn}");
                    }
                }
            }
        });
        let puncher = scope.spawn(|| {
            for round in 0..ROUNDS {
                let start = round * 53 % (2 * PAGES - 64);
                let file = FILE + start * PAGE..FILE + (start + 64) * PAGE;
                let change = mmu.begin_private_change(file);
                for gfn in start..start + 64 {
                    if let Found::Page { frame, .. } = found(gfn) {
                        assert!(frame < usual_frame(FILE), "a hole is mapped at {gfn}");
                    }
                }
                mmu.end_host_change(change);
            }
        });
        let deleter = scope.spawn(|| {
            for _ in 0..ROUNDS / 4 {
                mmu.set_region(region(1, PAGES, 0, 0, 0)).unwrap();
                for gfn in PAGES..2 * PAGES {
                    let found = found(gfn);
                    assert!(!matches!(found, Found::Page { .. }), "a deleted slot");
                }
                create(1);
            }
        });
        for thread in [converter, puncher, deleter] {
            let result = thread.join();
            if result.is_err() {
                stop.store(true, Ordering::Relaxed);
            }
            result.unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(faults.load(Ordering::Relaxed) > 0);
}
