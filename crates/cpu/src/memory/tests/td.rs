//! The two second stages of a TD, chosen by the shared bit.

use super::*;
use crate::memory::VeControl;
use crate::memory::stage1::code;

/// Tables of the shared half: a root of their own and three below, in pages 4 to 7.
const SHARED: usize = 4;
const INFO: usize = 62;

/// A processor in long mode whose guest tables map the linear page `0x20` as the caller says; the
/// guest's own tables are private.
fn td(host: &Host, machine: &Arc<Machine>, shared_bit: u8) -> Cpu {
    let mut cpu = host.paged(machine);
    // The shared half is looked up with the bit: the index of the root's entry says so.
    let level = if shared_bit == 51 {
        Level::L256T
    } else {
        Level::L512G
    };
    let root = Hpa::new(host.hpa(SHARED));
    cpu.set_td(true);
    cpu.core.flush_tlb();
    cpu.set_second_stage(SecondStage::Td {
        secure: Eptp::new(Hpa::new(host.hpa(0)), Level::L512G, false),
        shared: Eptp::new(root, level, false),
        shared_bit,
    });
    let mut page = SHARED;
    let mut at = Some(level);
    let gfn = Gpa::new(1 << shared_bit | 0x20 << 12).frame();
    while let Some(this) = at.filter(|this| *this != Level::L4K) {
        // Five levels do not fit in the pages before the guest's frames.
        let next = if page == 7 { 61 } else { page + 1 };
        host.put(page, this.index(gfn), host.hpa(next) | host.table());
        page = next;
        at = this.below();
    }
    host.put(page, 0x20, host.hpa(0x28) | host.leaf());
    cpu
}

#[test]
fn the_shared_bit_selects_the_tables() {
    for shared_bit in [47, 51] {
        let host = Host::new(SecondStageKind::Ept);
        let machine = host.machine();
        let mut cpu = td(&host, &machine, shared_bit);
        host.put(0x20, 0, 0x1111);
        host.put(0x28, 0, 0x2222);
        assert_eq!(cpu.core.load::<u64>(0x20_000), Ok(0x1111), "{shared_bit}");
        host.put(11, 0x21, 1 << shared_bit | 0x20 << 12 | 7);
        assert_eq!(cpu.core.load::<u64>(0x21_000), Ok(0x2222), "{shared_bit}");
        cpu.core.store(0x21_008, 0x3333u64).unwrap();
        assert_eq!(host.get(0x28, 1), 0x3333);
        // Both are cached beside each other.
        assert_eq!(cpu.core.load::<u64>(0x20_000), Ok(0x1111));
    }
}

#[test]
fn an_access_that_fails_reports_the_address_with_its_shared_bit() {
    for shared_bit in [47, 51] {
        let host = Host::new(SecondStageKind::Ept);
        let machine = host.machine();
        let mut cpu = td(&host, &machine, shared_bit);
        let suppressed = EptFlags::SUPPRESS_VE.bits();
        host.put(3, 0x30, suppressed);
        host.put(11, 0x31, 1 << shared_bit | 0x3000_0000 | 7);
        let result = cpu.core.load::<u8>(0x30_123);
        assert_eq!(violation(exit_of(&cpu.core, result)).0, 0x30_123);
        let result = cpu.core.load::<u8>(0x31_123);
        let (gpa, _, gla) = violation(exit_of(&cpu.core, result));
        assert_eq!(gpa, 1 << shared_bit | 0x3000_0123, "{shared_bit}");
        assert_eq!(gla, 0x31_123);
    }
}

#[test]
fn an_empty_shared_entry_without_the_suppress_bit_is_told_to_the_guest() {
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    let mut cpu = td(&host, &machine, 47);
    cpu.set_ve(Some(VeControl {
        page: Hpa::new(host.hpa(INFO)),
        intercept: false,
    }));
    host.put(11, 0x21, 1 << 47 | 0x20 << 12 | 7);
    host.put(7, 0x20, 0);
    let result = cpu.core.load::<u8>(0x21_000);
    assert_eq!(fault_of(&cpu.core, result), (vector::VE, None, None));
    let info = cpu.take_ve().unwrap();
    assert_eq!(info.gpa.get(), 1 << 47 | 0x20 << 12);
}

#[test]
fn bits_above_the_shared_one_are_reserved_in_the_guests_tables() {
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    for (above, write, user) in [
        (1u64 << 48, false, false),
        (1 << 51, true, false),
        (1 << 50 | 1 << 47, false, true),
        (0xf << 48, true, true),
    ] {
        let mut cpu = td(&host, &machine, 47);
        host.put(11, 0x21, above | 0x20 << 12 | 7);
        let core = &mut cpu.core;
        core.cpl = if user { 3 } else { 0 };
        let result = match write {
            true => core.store(0x21_018, 1u8),
            false => core.load::<u8>(0x21_018).map(drop),
        };
        let mut expected = code::PRESENT | code::RESERVED;
        expected |= if write { code::WRITE } else { 0 };
        expected |= if user { code::USER } else { 0 };
        assert_eq!(
            fault_of(core, result),
            (vector::PF, Some(expected), Some(0x21_018)),
            "{above:#x}"
        );
    }
    // In a pointer to a table as well.
    let mut cpu = td(&host, &machine, 47);
    host.put(10, 1, 1 << 49 | 11 << 12 | 7);
    let result = cpu.core.load::<u8>(0x20_0000);
    let (vector, error, _) = fault_of(&cpu.core, result);
    assert_eq!(vector, vector::PF);
    assert!(error.unwrap() & code::RESERVED != 0);
    // With GPAW 52 there is no bit above.
    let mut cpu = td(&host, &machine, 51);
    host.put(11, 0x21, 1 << 50 | 0x20 << 12 | 7);
    let result = cpu.core.load::<u8>(0x21_000);
    assert_eq!(
        violation(exit_of(&cpu.core, result)).0,
        1 << 50 | 0x20 << 12
    );
}

#[test]
fn code_and_page_tables_are_private() {
    for shared_bit in [47, 51] {
        let host = Host::new(SecondStageKind::Ept);
        let machine = host.machine();
        let shared = 1u64 << shared_bit;
        // A page with data may be shared, code may not.
        let mut cpu = td(&host, &machine, shared_bit);
        host.put(11, 0x21, shared | 0x20 << 12 | 7);
        assert_eq!(cpu.core.load::<u8>(0x21_000), Ok(0));
        cpu.core.efer |= efer::NXE;
        cpu.core.flush_tlb();
        let result = cpu.core.exec_place(0x21_010);
        let expected = code::PRESENT | code::RESERVED | code::FETCH;
        assert_eq!(
            fault_of(&cpu.core, result),
            (vector::PF, Some(expected), Some(0x21_010))
        );
        // The table with the leaves, although the shared half has memory there.
        host.put(10, 0, shared | 0x20 << 12 | 7);
        cpu.core.flush_tlb();
        let result = cpu.core.store(0x20_008, 1u8);
        let expected = code::PRESENT | code::RESERVED | code::WRITE;
        assert_eq!(
            fault_of(&cpu.core, result),
            (vector::PF, Some(expected), Some(0x20_008))
        );
        // And the root.
        cpu.core.cr3 = shared | 8 << 12;
        cpu.core.flush_tlb();
        let result = cpu.core.load::<u8>(0x20_008);
        let (vector, error, _) = fault_of(&cpu.core, result);
        assert_eq!(
            (vector, error),
            (vector::PF, Some(code::PRESENT | code::RESERVED))
        );
    }
}
