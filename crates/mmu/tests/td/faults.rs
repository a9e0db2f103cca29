//! Faults and pre-faults of a TD, and the order of its two tables.

use crate::common::td::{HVA, PAGE, PRIVATE, SHARED, TdMachine};
use crate::common::{Found, usual_frame};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use twofold_arch::{Gfn, Gpa, Level};
use twofold_mmu::{
    Config, ExternalTables, FaultError, MirrorError, Outcome, PrefaultError, RootRole, Rule,
};
use twofold_tdx::{PageType, Point, State, Status};

const FIXED: Result<Outcome, FaultError> = Ok(Outcome::Fixed { level: Level::L4K });

fn shared_page(gfn: u64) -> Found {
    Found::Page {
        frame: usual_frame(HVA + gfn * PAGE),
        write: true,
        level: Level::L4K,
    }
}

/// SPEC row 34.
#[test]
fn a_prefault_gives_private_pages_to_be_accepted_and_shared_ones_to_the_shared_ept() {
    for wide in [false, true] {
        let machine = TdMachine::new(wide, 1);
        machine.slot(0, 0, 32);
        machine.set(4..12, true);
        machine.td.finalize();
        let (mut reader, roots) = (machine.mmu.reader(), machine.roots());
        let mut gfn = 0;
        while gfn < 16 {
            let gfns = Gfn::new(gfn)..Gfn::new(16);
            gfn += machine.mmu.td_prefault(&mut reader, &roots, gfns).unwrap();
        }
        for gfn in 0..32 {
            let private = (4..12).contains(&gfn);
            let state = machine.td.secure(gfn).map(|(_, state)| state);
            assert_eq!(state, private.then_some(State::Pending), "gfn {gfn}");
            let shared = match gfn < 16 && !private {
                true => shared_page(gfn),
                false => Found::Nothing,
            };
            assert_eq!(machine.shared(&roots, gfn), shared, "gfn {gfn}");
        }
        // Again, nothing is left to do.
        let gfns = Gfn::new(4)..Gfn::new(12);
        assert_eq!(machine.mmu.td_prefault(&mut reader, &roots, gfns), Ok(8));
        let gfns = Gfn::new(32)..Gfn::new(33);
        let nothing = machine.mmu.td_prefault(&mut reader, &roots, gfns);
        assert_eq!(nothing, Err(PrefaultError::NoSlot));
        drop((reader, roots));
        machine.finish();
    }
}

#[test]
fn shared_memory_is_found_behind_the_shared_bit_and_nowhere_else() {
    for (wide, bit, level) in [(false, 47, Level::L512G), (true, 51, Level::L256T)] {
        let machine = TdMachine::new(wide, 1);
        let (mut reader, roots) = (machine.mmu.reader(), machine.roots());
        assert_eq!(roots.shared().role().level, level);
        machine.slot(0, 0x100, 16);
        assert_eq!(machine.fault(&mut reader, &roots, 0x105, SHARED), FIXED);
        let gpa = 0x10_5000;
        let walk = |gpa| machine.shared_walk(&roots, Gpa::new(gpa)).0;
        assert_eq!(walk(gpa | (1 << bit)), shared_page(0x105));
        assert_eq!(walk(gpa), Found::Nothing);
        for other in [30, 39, 46, 47, 48, 50, 51] {
            // What four levels do not look at, the processor refuses before.
            if other != bit && (wide || other < 48) {
                assert_eq!(walk(gpa | (1 << bit) | (1 << other)), Found::Nothing);
            }
        }
        drop((reader, roots));
        machine.finish();
    }
}

#[test]
fn an_access_of_the_wrong_kind_is_the_programs_to_convert() {
    let machine = TdMachine::new(false, 1);
    let (mut reader, roots) = (machine.mmu.reader(), machine.roots());
    machine.slot(0, 0, 8);
    machine.set(4..8, true);
    let mut fault = |gfn, error| machine.fault(&mut reader, &roots, gfn, error);
    let wrong = |private| Err(FaultError::WrongKind { private });
    assert_eq!(fault(0, PRIVATE), wrong(true));
    assert_eq!(fault(4, SHARED), wrong(false));
    // Without a slot, too: only what is shared can be MMIO.
    machine.set(100..101, true);
    assert_eq!(fault(100, SHARED), wrong(false));
    assert_eq!(fault(100, PRIVATE), wrong(true));
    assert_eq!(fault(200, PRIVATE), wrong(true));
    assert_eq!(fault(200, SHARED), Ok(Outcome::Mmio));
    assert_eq!(machine.td.owned(PageType::Regular).len(), 0);
    drop((reader, roots));
    machine.finish();
}

/// SPEC row 49: whatever is busy, nothing has changed, and the fault says "try again".
#[test]
fn a_fault_that_finds_the_module_busy_restores_the_mirror_and_is_tried_again() {
    // Three tables and a page: each call may find each lock taken.
    for (point, skip) in [Point::Td, Point::SeptTree, Point::SeptEntry]
        .into_iter()
        .flat_map(|point| (0..4).map(move |skip| (point, skip)))
    {
        let machine = TdMachine::new(false, 1);
        machine.slot(0, 0, 8);
        machine.set(0..8, true);
        let (mut reader, roots) = (machine.mmu.reader(), machine.roots());
        machine.memory.make_busy(point, skip, 1);
        let outcome = machine.fault(&mut reader, &roots, 1, PRIVATE);
        assert_eq!(outcome, Ok(Outcome::Retry), "{point:?} {skip}");
        assert_eq!(machine.memory.busy_left(), 0);
        assert_eq!(machine.mirrored(&roots, 1), None);
        assert_eq!(machine.td.secure(1), None);
        // The tables that were linked before stay, in both.
        let tables = machine.td.owned(PageType::Ept).len();
        assert_eq!(tables, skip as usize);
        // With the roots, which the module has elsewhere.
        assert_eq!(machine.mmu.check().tables as usize, tables + 2);
        assert_eq!(machine.fault(&mut reader, &roots, 1, PRIVATE), FIXED);
        assert_eq!(machine.mirrored(&roots, 1), machine.memory.page_of(1));
        let again = machine.fault(&mut reader, &roots, 1, PRIVATE);
        assert_eq!(again, Ok(Outcome::Spurious));
        drop((reader, roots));
        machine.finish();
    }
}

#[test]
fn a_table_or_page_that_the_module_refuses_kills_the_vm_and_changes_nothing() {
    let machine = TdMachine::new(false, 1);
    machine.slot(0, 0, 8);
    machine.set(0..8, true);
    let (mut reader, roots) = (machine.mmu.reader(), machine.roots());
    assert_eq!(machine.fault(&mut reader, &roots, 0, PRIVATE), FIXED);
    // Behind the MMU's back.
    let (td, page) = (&machine.td, machine.memory.take());
    td.module.page_aug(1 << 12, td.tdr, page).unwrap();
    let refused = machine.fault(&mut reader, &roots, 1, PRIVATE);
    assert_eq!(refused, Err(FaultError::Bugged));
    let status = machine.mmu.bug().map(Status::from_raw);
    assert!(status.is_some_and(|status| status.is(Status::EPT_ENTRY_STATE_INCORRECT)));
    assert_eq!(machine.mirrored(&roots, 1), None);
    assert_eq!(machine.mirrored(&roots, 0), machine.memory.page_of(0));
    // The check finds what is wrong.
    let report = machine.mmu.check();
    assert_eq!(report.violations.len(), 1, "{report}");
    assert_eq!(report.violations[0].rule, Rule::Mirror);
    assert_eq!(report.violations[0].gfn, Gfn::new(1));
    let other = machine.fault(&mut reader, &roots, 2, PRIVATE);
    assert_eq!(other, Err(FaultError::Bugged));
    td.module.page_remove(1 << 12, td.tdr).unwrap();
    machine.memory.give_back(page);
    drop((reader, roots));
    machine.end();
}

#[test]
fn a_private_fault_without_memory_for_tables_changes_nothing() {
    let machine = TdMachine::new(true, 1);
    machine.slot(0, 0, 8);
    machine.set(0..8, true);
    let (mut reader, roots) = (machine.mmu.reader(), machine.roots());
    machine.memory.out_of_memory.store(true, Ordering::Relaxed);
    let outcome = machine.fault(&mut reader, &roots, 1, PRIVATE);
    assert_eq!(outcome, Err(FaultError::OutOfMemory));
    // Nor is there anything to tell the guest by that there is no memory.
    let outcome = machine.fault(&mut reader, &roots, 100, SHARED);
    assert_eq!(outcome, Err(FaultError::OutOfMemory));
    assert_eq!(machine.td.owned(PageType::Ept).len(), 0);
    machine.memory.out_of_memory.store(false, Ordering::Relaxed);
    assert_eq!(machine.fault(&mut reader, &roots, 1, PRIVATE), FIXED);
    drop((reader, roots));
    machine.finish();
}

#[test]
fn a_mirror_comes_before_the_first_root_and_only_where_processors_know_what_is_private() {
    let machine = TdMachine::new(false, 1);
    let tables = || -> Arc<dyn ExternalTables> { Arc::clone(&machine.td) as _ };
    let again = machine.mmu.enable_mirror(47, tables());
    assert_eq!(again, Err(MirrorError::TooLate));
    let mmu = |config| {
        let host = crate::common::td::Machine(Arc::clone(&machine.memory));
        twofold_mmu::Mmu::<twofold_mmu::Ept, _>::new(host, config)
    };
    let with = mmu(crate::common::td::config());
    for bit in [0, 46, 48, 52, 63] {
        let refused = with.enable_mirror(bit, tables());
        assert_eq!(refused, Err(MirrorError::SharedBit(bit)));
    }
    assert!(with.load_td_roots().unwrap().is_none());
    let root = with.load_root(RootRole::NORMAL).unwrap();
    assert_eq!(with.enable_mirror(47, tables()), Err(MirrorError::TooLate));
    let without = mmu(Config::default());
    let refused = without.enable_mirror(47, tables());
    assert_eq!(refused, Err(MirrorError::NotPrivate));
    drop((root, with, without));
    machine.finish();
}
