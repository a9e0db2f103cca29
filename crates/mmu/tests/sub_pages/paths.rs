//! Every way to a leaf: misses, sizes, roots, host memory, pre-faulting. Rows 7 to 9 of the feature
//! table.

use crate::common::guarded::{AT_ONCE, Guarded, Refused, Written, vector};
use crate::common::vm::{HVA, Vm, fixed};
use crate::common::{Found, HostState, region, usual_frame};
use crate::{at, config, maps, vm};
use std::sync::atomic::{AtomicU64, Ordering};
use twofold_arch::{Gfn, Gpa, Level, Pferr};
use twofold_mmu::{Config, Ept, Fault, MmuFormat, Outcome, RootRole, Rule};

const MISSED: Written = Written::Done {
    faults: 0,
    misses: 1,
};

pub(super) fn huge(level: Level) -> Vm<Ept> {
    let vm = vm();
    *vm.world.level.lock().unwrap() = level;
    *vm.world.level_if_asked.lock().unwrap() = level;
    vm
}

fn sizes(vm: &Vm<Ept>) -> [u64; 3] {
    let stats = vm.mmu.stats();
    let counted = [stats.pages_4k, stats.pages_2m, stats.pages_1g];
    assert_eq!(vm.mmu.check().leaves, counted);
    counted
}

/// Row 7.
#[test]
fn the_first_allowed_write_of_a_region_misses_and_no_other() {
    let mut vm = vm();
    vm.slot(0, 0, 2048, 0);
    for gfn in [3, 511, 512, 700] {
        vm.protect(gfn, 0x8000_0001);
        vm.fault(gfn, Pferr::USER).unwrap();
    }
    let flushes = vm.world.flushes.load(Ordering::Relaxed);
    assert_eq!(vm.write(at(3, 0)), MISSED);
    for gpa in [at(3, 0), at(3, 31), at(511, 31)] {
        assert_eq!(vm.write(gpa), AT_ONCE);
    }
    assert_eq!(vm.write(at(700, 0)), MISSED);
    assert_eq!(vm.write(at(512, 0)), AT_ONCE);
    assert_eq!(vm.write(at(512, 1)), Written::Denied);
    assert_eq!(vm.world.flushes.load(Ordering::Relaxed), flushes);
    vm.is_sound();
    // A miss that somebody else has answered, and one where nobody can ask.
    let root = vm.root.clone();
    let mut miss = |gpa| vm.mmu.sppt_miss(&mut vm.reader, &root, Gpa::new(gpa));
    assert_eq!(miss(at(700, 5)), Ok(Outcome::Spurious));
    assert_eq!(miss(1 << 48), Ok(Outcome::Spurious));
    assert_eq!(miss(at(1024, 0)), Ok(Outcome::Fixed { level: Level::L2M }));
}

/// Row 7: the table that a fault of memory or of software has spoilt.
#[test]
fn a_reserved_bit_in_a_vector_is_a_misconfiguration_that_the_check_names() {
    let mut vm = vm();
    vm.slot(0, 0, 512, 0);
    vm.protect(3, 1);
    assert!(vm.write(at(3, 0)).is_done());
    let sppt = vm.mmu.sppt_root(RootRole::NORMAL).unwrap();
    let mut table = sppt;
    for _ in 0..3 {
        table = twofold_arch::Hpa::new(vm.world.read(table, 0) & !0xfff);
    }
    let entry = vm.world.entry(table, 3);
    let good = entry.fetch_or(1 << 9, Ordering::Relaxed);
    let found = vector(&vm.world, sppt, Gpa::new(at(3, 0)));
    assert_eq!(found, Err(Refused::Misconfigured));
    let report = vm.mmu.check();
    assert_eq!(report.violations.len(), 1, "{report}");
    assert_eq!(report.violations[0].rule, Rule::SubPages);
    assert_eq!(report.violations[0].gfn, Gfn::new(3));
    // A vector that allows more than the map, and one that allows less.
    for wrong in [good | 1 << 2, 0] {
        entry.store(wrong, Ordering::Relaxed);
        assert_eq!(vm.mmu.check().violations.len(), 1);
    }
    entry.store(good, Ordering::Relaxed);
    vm.is_sound();
}

#[test]
fn the_check_names_leaves_that_disagree_with_the_maps() {
    let mut vm = vm();
    vm.slot(0, 0, 512, 0);
    vm.protect(3, 1);
    for gfn in [3, 4] {
        assert!(vm.write(at(gfn, 0)).is_done());
    }
    let mut table = vm.root.hpa();
    for _ in 0..3 {
        table = twofold_arch::Hpa::new(vm.world.read(table, 0) & 0x000f_ffff_ffff_f000);
    }
    for (index, flip) in [
        (3, Ept::WRITE | Ept::SUB_PAGE_WRITE),
        (4, Ept::WRITE | Ept::SUB_PAGE_WRITE),
    ] {
        let entry = vm.world.entry(table, index);
        let good = entry.fetch_xor(flip, Ordering::Relaxed);
        let report = vm.mmu.check();
        assert_eq!(report.violations.len(), 1, "{report}");
        assert_eq!(report.violations[0].rule, Rule::SubPages);
        entry.store(good, Ordering::Relaxed);
    }
    vm.is_sound();
}

/// Row 8.
#[test]
fn one_protected_page_splits_its_huge_page_and_the_last_full_map_brings_it_back() {
    let mut vm = huge(Level::L2M);
    vm.slot(0, 0, 2048, 0);
    for gfn in [0, 600] {
        assert_eq!(vm.fault(gfn, Pferr::WRITE), fixed(Level::L2M));
    }
    assert_eq!(sizes(&vm), [0, 2, 0]);
    vm.protect(600, 0xffff_0000);
    vm.protect(601, 0);
    assert_eq!(sizes(&vm), [512, 1, 0]);
    for (gfn, write) in [(512, true), (599, true), (600, false), (601, false)] {
        assert_eq!(vm.found(gfn), Vm::<Ept>::page(gfn, write, Level::L4K));
    }
    // Nobody lost anything that he may do.
    assert_eq!(vm.write(at(599, 0)), AT_ONCE);
    assert_eq!(vm.write(at(600, 16)), MISSED);
    assert_eq!(vm.write(at(600, 15)), Written::Denied);
    // Nothing brings the huge page back while one of its frames is protected.
    vm.protect(601, u32::MAX);
    drop(vm.mmu.host_change((HVA + (700 << 12))..(HVA + (701 << 12))));
    assert_eq!(vm.fault(700, Pferr::WRITE), fixed(Level::L4K));
    vm.mmu.recover_huge_pages(0, 0);
    assert_eq!(sizes(&vm), [512, 1, 0]);
    vm.is_sound();

    vm.protect(600, u32::MAX);
    assert_eq!(sizes(&vm), [0, 2, 0]);
    assert!(vm.write(at(600, 0)).is_done());
    assert_eq!(vm.found(600), Vm::<Ept>::page(600, true, Level::L2M));
    vm.is_sound();
}

/// Row 8, a gigabyte.
#[test]
fn a_protected_page_of_a_gigabyte_leaves_the_rest_of_it_in_pages_of_2m() {
    let mut vm = huge(Level::L1G);
    vm.slot(0, 0, 2 << 18, 0);
    assert_eq!(vm.fault(1, Pferr::WRITE), fixed(Level::L1G));
    vm.protect(0x1_2345, 0);
    assert_eq!(sizes(&vm), [512, 511, 0]);
    assert_eq!(vm.write(at(0x1_2345, 9)), Written::Denied);
    assert_eq!(vm.write(at(0x1_2344, 9)), AT_ONCE);
    assert_eq!(vm.write(at(0x2_0000, 9)), AT_ONCE);
    vm.protect(0x1_2345, u32::MAX);
    assert_eq!(sizes(&vm), [0, 0, 1]);
    vm.is_sound();
}

#[test]
fn huge_pages_are_not_made_over_protected_frames_by_faults_and_prefaults() {
    for prefault in [false, true] {
        let mut vm = huge(Level::L2M);
        vm.slot(0, 0, 2048, 0);
        vm.protect(700, 0x10);
        let range = |gfn| Gfn::new(gfn)..Gfn::new(1024);
        for gfn in 512..1024 {
            if prefault {
                vm.mmu
                    .prefault(&mut vm.reader, &vm.root, range(gfn))
                    .unwrap();
            } else {
                vm.fault(gfn, Pferr::USER).unwrap();
            }
        }
        assert_eq!(sizes(&vm), [512, 0, 0]);
        assert_eq!(vm.found(700), Vm::<Ept>::page(700, false, Level::L4K));
        assert_eq!(vm.write(at(699, 0)), AT_ONCE);
        assert_eq!(vm.write(at(700, 4)), MISSED);
        assert_eq!(vm.write(at(700, 5)), Written::Denied);
        vm.is_sound();
    }
}

/// Row 9.
#[test]
fn protection_holds_below_every_root_and_each_address_space_has_its_own() {
    let mut vm = vm();
    vm.slot(0, 0, 512, 0);
    let smm_slot = 1 << 16;
    vm.mmu
        .set_region(region(smm_slot, 0, 512, (HVA >> 12) + 0x1000, 0))
        .unwrap();
    let role = |level, smm, guest_mode| RootRole {
        level,
        smm,
        guest_mode,
        ..RootRole::NORMAL
    };
    let normal: Vec<_> = [
        RootRole::NORMAL,
        role(Level::L256T, false, false),
        role(Level::L512G, false, true),
    ]
    .map(|role| vm.root_of(role))
    .into();
    let smm = vm.root_of(role(Level::L512G, true, false));
    for root in normal.iter().chain([&smm]) {
        assert!(vm.write_by(root, at(7, 0), 1).unwrap().is_done());
    }
    vm.protect(7, 0x0000_fff0);
    let mut decided = |root, sub_page| vm.write_by(root, at(7, sub_page), 1).unwrap().is_done();
    for root in &normal {
        assert!(decided(root, 4) && !decided(root, 0) && !decided(root, 16));
    }
    assert!(decided(&smm, 0));
    vm.mmu.set_access(1, Gfn::new(7), &maps(&[1])).unwrap();
    let mut decided = |root, sub_page| vm.write_by(root, at(7, sub_page), 1).unwrap().is_done();
    assert!(decided(&smm, 0) && !decided(&smm, 4));
    assert!(decided(&normal[0], 4) && !decided(&normal[0], 0));
    // A root that is made later.
    let late = vm.root_of(role(Level::L256T, true, false));
    let mut decided = |root, sub_page| vm.write_by(root, at(7, sub_page), 1).unwrap().is_done();
    assert!(decided(&late, 0) && !decided(&late, 4));
    vm.is_sound();
}

/// Row 9: maps belong to the guest's frame and not to the host's page.
#[test]
fn another_host_page_is_protected_like_the_one_before() {
    let mut vm = vm();
    vm.slot(0, 0, 512, 0);
    vm.protect(7, 0x0f);
    assert!(vm.write(at(7, 0)).is_done());
    let hva = HVA + (7 << 12);
    {
        let _change = vm.mmu.host_change(hva..hva + 1);
        let state = HostState {
            frame: 0x77,
            present: true,
            writable: true,
        };
        vm.world.memory.lock().unwrap().insert(hva >> 12, state);
    }
    assert_eq!(vm.write(at(7, 4)), Written::Denied);
    assert!(vm.write(at(7, 3)).is_done());
    let moved = Found::Page {
        frame: 0x77,
        write: false,
        level: Level::L4K,
    };
    assert_eq!(vm.found(7), moved);
    vm.is_sound();
}

/// Row 9: copy on write.
#[test]
fn only_an_allowed_write_breaks_copy_on_write() {
    let mut vm = vm();
    vm.slot(0, 0, 512, 0);
    vm.protect(7, 0x0f);
    let hva = HVA + (7 << 12);
    let shared = HostState {
        frame: usual_frame(hva),
        present: true,
        writable: false,
    };
    vm.world.memory.lock().unwrap().insert(hva >> 12, shared);
    vm.fault(7, Pferr::USER).unwrap();
    assert_eq!(
        vm.raw_leaf(7) & (Ept::SUB_PAGE_WRITE | Ept::HOST_WRITABLE),
        0
    );
    // The host is not asked for a page that nobody may write.
    let asked = std::sync::Arc::new(AtomicU64::new(0));
    let world = std::sync::Arc::clone(&vm.world);
    let count = std::sync::Arc::clone(&asked);
    *vm.world.on_populate.lock().unwrap() = Some(Box::new(move || {
        count.fetch_add(1, Ordering::Relaxed);
        let private = HostState {
            frame: 0x99,
            present: true,
            writable: true,
        };
        world.memory.lock().unwrap().insert(hva >> 12, private);
    }));
    assert_eq!(vm.write(at(7, 9)), Written::Denied);
    assert_eq!(asked.load(Ordering::Relaxed), 0);
    assert!(vm.write(at(7, 1)).is_done());
    assert_eq!(asked.load(Ordering::Relaxed), 1);
    assert_ne!(vm.raw_leaf(7) & Ept::SUB_PAGE_WRITE, 0);
    assert_eq!(vm.raw_leaf(7) & Ept::WRITE, 0);
    assert_eq!(vm.write(at(7, 4)), Written::Denied);
    vm.is_sound();
}

#[test]
fn a_write_of_the_guests_page_walk_is_never_rescued() {
    let mut vm = vm();
    vm.slot(0, 0, 512, 0);
    vm.protect(7, 0x0f);
    assert!(vm.write(at(7, 0)).is_done());
    let walk = Pferr::WRITE | Pferr::PRESENT | Pferr::GUEST_PAGE;
    assert_eq!(vm.fault(7, walk), Ok(Outcome::SubPageDenied));
    vm.protect(7, u32::MAX);
    assert!(matches!(vm.fault(7, walk), Ok(Outcome::Fixed { .. })));
}

#[test]
fn a_denial_that_was_lifted_meanwhile_is_tried_again() {
    let mut vm = vm();
    vm.slot(0, 0, 512, 0);
    vm.protect(7, 0x0f);
    assert!(vm.write(at(7, 0)).is_done());
    // The processor has found the sub-page denied, and then the program widens the map.
    let denied = Fault {
        gpa: Gpa::new(at(7, 8)),
        error: Pferr::WRITE | Pferr::PRESENT | Pferr::GUEST_FINAL,
    };
    let fault = |vm: &mut Vm<Ept>| vm.mmu.fault(&mut vm.reader, &vm.root, denied);
    assert_eq!(fault(&mut vm), Ok(Outcome::SubPageDenied));
    vm.protect(7, 0x1ff);
    assert_eq!(fault(&mut vm), Ok(Outcome::Spurious));
    assert_eq!(vm.write(at(7, 8)), MISSED);
    vm.protect(7, u32::MAX);
    assert!(matches!(fault(&mut vm), Ok(Outcome::Fixed { .. })));
    assert_eq!(vm.write(at(7, 31)), AT_ONCE);
    vm.is_sound();
}

#[test]
fn nothing_is_asked_and_nothing_is_different_where_nothing_is_protected() {
    let plain = Vm::<Ept>::with(config());
    let enabled = vm();
    let mut leaves = Vec::new();
    for mut vm in [plain, enabled] {
        vm.slot(0, 0, 2048, 0);
        for gfn in 0..64 {
            vm.fault(gfn, Pferr::WRITE).unwrap();
        }
        leaves.push((0..64).map(|gfn| vm.raw_leaf(gfn)).collect::<Vec<_>>());
    }
    assert_eq!(leaves[0], leaves[1]);
}

#[test]
fn a_vm_that_ends_gives_its_tables_back() {
    let mut vm = Vm::<Ept>::guarded(Config {
        accessed_dirty: false,
        ..config()
    });
    vm.slot(0, 0, 2 << 18, 0);
    for gfn in (0..2 << 18).step_by(0x1_1111) {
        vm.protect(gfn, 1);
        assert!(vm.write(at(gfn, 0)).is_done());
    }
    vm.is_sound();
    let world = std::sync::Arc::clone(&vm.world);
    drop((vm.root, vm.reader));
    drop(vm.mmu);
    assert_eq!(world.live_tables.load(Ordering::Relaxed), 0);
}
