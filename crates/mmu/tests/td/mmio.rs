//! Empty entries, and entries that remember the absence of memory.

use crate::common::td::{HVA, PAGE, PRIVATE, SHARED, TdMachine};
use crate::common::vm::Vm;
use crate::common::{Found, region, usual_frame, walk};
use twofold_arch::ept::{self, EptCaps, EptEntry, EptFlags};
use twofold_arch::{Gfn, Gpa, Level, Pferr};
use twofold_mmu::mmio::MmioEncoding;
use twofold_mmu::{Ept, MmioFault, Npt, Outcome, Reader, TdRoots};

const SUPPRESS_VE: u64 = EptFlags::SUPPRESS_VE.bits();

/// Entries of both roots that lack the suppress bit.
fn convertible(machine: &TdMachine, roots: &TdRoots) -> Vec<u64> {
    let mut found = Vec::new();
    for root in [roots.shared(), roots.mirror()] {
        machine.not_present(root.hpa(), root.role().level, &mut |entry| {
            if entry & SUPPRESS_VE == 0 {
                found.push(entry);
            }
        });
    }
    found
}

/// SPEC row 35.
#[test]
fn every_empty_entry_suppresses_ve_except_what_says_that_there_is_no_memory() {
    let machine = TdMachine::new(false, 1);
    machine.slot(0, 0, 16);
    machine.set(0..8, true);
    machine.td.finalize();
    let (mut reader, mut roots) = (machine.mmu.reader(), machine.roots());
    let mmio = MmioEncoding::new::<Ept>(51, MmioFault::Violation).unwrap();
    let touch = |reader: &mut Reader, roots: &TdRoots| {
        for gfn in 0..16 {
            let error = if gfn < 8 { PRIVATE } else { SHARED };
            machine.fault(reader, roots, gfn, error).unwrap();
        }
        let outcome = machine.fault(reader, roots, 0x1_0000, SHARED);
        assert_eq!(outcome, Ok(Outcome::Mmio));
        let found = convertible(&machine, roots);
        assert_eq!(found.len(), 1, "{found:x?}");
        assert!(mmio.matches(found[0]));
    };
    assert_eq!(convertible(&machine, &roots), []);
    touch(&mut reader, &roots);
    // After each kind of zap what was mapped is empty, and no entry is zero.
    machine.change_host(8..16);
    assert_eq!(convertible(&machine, &roots).len(), 1);
    machine.punch(0..8);
    assert_eq!(convertible(&machine, &roots).len(), 1);
    touch(&mut reader, &roots);
    machine.set(0..8, false);
    machine.set(8..16, true);
    assert_eq!(convertible(&machine, &roots).len(), 1);
    machine.mmu.zap_all();
    assert_eq!(convertible(&machine, &roots), []);
    roots = machine.roots();
    assert_eq!(convertible(&machine, &roots), []);
    machine.delete_slot(0);
    assert_eq!(convertible(&machine, &roots), []);
    drop((reader, roots));
    machine.finish();
}

/// SPEC row 39.
#[test]
fn the_same_absence_of_memory_misconfigures_a_normal_vm_and_becomes_ve_in_a_td() {
    let gfn = 0xfee00;
    let mut normal = Vm::<Ept>::new();
    assert_eq!(normal.fault(gfn, Pferr::WRITE), Ok(Outcome::Mmio));
    assert_eq!(normal.found(gfn), Found::Refused);
    // The processor says by itself what it is.
    assert_eq!(normal.fault(gfn, Pferr::RSVD), Ok(Outcome::Mmio));

    for wide in [false, true] {
        let machine = TdMachine::new(wide, 1);
        let (mut reader, roots) = (machine.mmu.reader(), machine.roots());
        let walk = |gfn| {
            let gpa = Gpa::new((gfn * PAGE) | (1 << machine.shared_bit));
            machine.shared_walk(&roots, gpa)
        };
        // At first the violation leaves the guest, so that the entry can be made.
        assert_eq!(walk(gfn), (Found::Nothing, false));
        let outcome = machine.fault(&mut reader, &roots, gfn, SHARED);
        assert_eq!(outcome, Ok(Outcome::Mmio));
        assert_eq!(walk(gfn), (Found::Nothing, true));
        assert_eq!(walk(gfn + 1), (Found::Nothing, false));
        // A violation all the same (#VE cannot be delivered always) is recognised.
        let outcome = machine.fault(&mut reader, &roots, gfn, SHARED);
        assert_eq!(outcome, Ok(Outcome::Mmio));
        assert_eq!(reader.stats().pf_mmio_spte_created, 1);
        drop((reader, roots));
        machine.finish();
    }
}

/// SPEC row 38, for a TD: nobody would find out that such an entry is stale.
#[test]
fn where_a_slot_appears_no_entry_of_a_td_says_that_there_is_no_memory() {
    let machine = TdMachine::new(false, 1);
    let (mut reader, roots) = (machine.mmu.reader(), machine.roots());
    for gfn in [9, 10, 15, 16] {
        let outcome = machine.fault(&mut reader, &roots, gfn, SHARED);
        assert_eq!(outcome, Ok(Outcome::Mmio));
    }
    let ve = |gfn: u64| {
        let gpa = Gpa::new((gfn * PAGE) | (1 << machine.shared_bit));
        machine.shared_walk(&roots, gpa).1
    };
    machine.slot(0, 10, 6);
    assert_eq!([9, 10, 15, 16].map(ve), [true, false, false, true]);
    // The others are stale; a fault there makes them new.
    let outcome = machine.fault(&mut reader, &roots, 9, SHARED);
    assert_eq!(outcome, Ok(Outcome::Mmio));
    assert_eq!(reader.stats().pf_mmio_spte_created, 5);
    machine.fault(&mut reader, &roots, 10, SHARED).unwrap();
    let page = usual_frame(HVA + 10 * PAGE);
    assert!(matches!(machine.shared(&roots, 10), Found::Page { frame, .. } if frame == page));
    drop((reader, roots));
    machine.finish();
}

/// SPEC row 38.
#[test]
fn when_generations_begin_anew_no_old_entry_looks_fresh() {
    let mut vm = Vm::<Npt>::new();
    assert_eq!(vm.fault(0xfee00, Pferr::WRITE), Ok(Outcome::Mmio));
    assert_eq!(vm.fault(0xfee00, Pferr::RSVD), Ok(Outcome::Mmio));
    let Vm {
        world,
        mmu,
        reader,
        root,
    } = vm;
    // Nobody has to be waited for.
    drop(reader);
    let generation = || mmu.stats().slots_generation[0];
    let first = generation();
    // Each change moves on by two: one for each address space.
    for _ in 0..1 << 17 {
        mmu.set_region(region(0, 0, 1, 0x100, 0)).unwrap();
        mmu.set_region(region(0, 0, 0, 0, 0)).unwrap();
    }
    // The 19 bits that the entry has are those of the present again.
    assert_eq!(generation() - first, 1 << 19);
    assert!(root.is_obsolete(), "everything was dropped on the way");
    let root = mmu.load_root(root.role()).unwrap();
    let gpa = Gfn::new(0xfee00).address();
    let found = walk::<Npt>(&world, root.hpa(), Level::L512G, gpa);
    assert_eq!(found, Found::Nothing);
}

/// SPEC row 41: a TD's entry violates at every level and under every generation; it never
/// misconfigures and is never taken for empty or frozen.
#[test]
fn a_tds_mmio_entry_is_a_violation_that_is_not_suppressed_whatever_it_carries() {
    let mmio = MmioEncoding::new::<Ept>(51, MmioFault::Violation).unwrap();
    assert_eq!(MmioEncoding::new::<Npt>(51, MmioFault::Violation), None);
    let generations = (0..19)
        .map(|bit| 1u64 << bit)
        .chain([0, (1 << 19) - 1, 0x2_aaaa]);
    for generation in generations {
        for gfn in [0, 1, 0xfee00, (1 << 35) - 1, (1 << 39) - 1] {
            let entry = mmio.encode(Gfn::new(gfn), generation);
            for level in Level::ALL {
                let decoded = ept::decode(entry, level, EptCaps::full(51));
                assert!(
                    matches!(decoded, EptEntry::NotPresent { flags }
                        if !flags.contains(EptFlags::SUPPRESS_VE)),
                    "{entry:#x}"
                );
            }
            assert!(mmio.matches(entry) && mmio.is_fresh(entry, generation));
            assert!(!mmio.is_fresh(entry, generation ^ 2));
        }
    }
    use twofold_mmu::MmuFormat as _;
    use twofold_table::Format as _;
    for other in [Ept::EMPTY, Ept::FROZEN, Ept::LEAF | 1 << 11] {
        assert!(!mmio.matches(other));
    }
}
