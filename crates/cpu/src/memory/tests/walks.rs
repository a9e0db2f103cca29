//! Translation: what both walks find, report and mark.

use super::*;

#[test]
fn a_violation_names_the_access_and_what_the_entries_allow() {
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    let mut cpu = host.paged(&machine);
    let core = &mut cpu.core;
    // As KVM leaves an empty entry: only the suppress bit is set.
    host.put(3, 0x20, EptFlags::SUPPRESS_VE.bits());
    host.put(
        3,
        0x21,
        host.hpa(0x21) | (EptFlags::READ | EptFlags::EXECUTE).bits() | 6 << 3,
    );
    use Qualification as Q;
    let linear = Q::LINEAR_VALID | Q::FINAL | Q::LINEAR_USER | Q::LINEAR_WRITABLE;
    let result = core.load::<u8>(0x20_123);
    assert_eq!(
        violation(exit_of(core, result)),
        (0x20_123, Q::READ | linear, 0x20_123)
    );
    let result = core.store(0x20_123, 1u8);
    assert_eq!(
        violation(exit_of(core, result)),
        (0x20_123, Q::WRITE | linear, 0x20_123)
    );
    let result = core.store(0x21_456, 1u8);
    let allowed = Q::ENTRY_READ | Q::ENTRY_EXECUTE;
    assert_eq!(
        violation(exit_of(core, result)),
        (0x21_456, Q::WRITE | allowed | linear, 0x21_456)
    );
    let result = core.fetch(0x20_789);
    assert_eq!(
        violation(exit_of(core, result)),
        (0x20_789, Q::FETCH | linear, 0x20_789)
    );
    // A guest table: read and write, since accessed and dirty flags are enabled.
    host.put(3, 11, 0);
    core.flush_all();
    let result = core.load::<u8>(0x22_000);
    let place = (11 << 12) | (0x22 * 8);
    assert_eq!(
        violation(exit_of(core, result)),
        (place, Q::READ | Q::WRITE | Q::LINEAR_VALID, 0x22_000)
    );
    assert_eq!(host.get(11, 0x22), 0x22 << 12 | 7, "nothing was marked");
}

#[test]
fn entries_that_make_no_sense_are_misconfigurations() {
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    let mut cpu = host.paged(&machine);
    let core = &mut cpu.core;
    for entry in [0b110, 0b010, 0b111 | 7 << 3, 0b111 | 6 << 3 | 1 << 46] {
        host.put(3, 0x20, host.hpa(0x20) | entry);
        let result = core.load::<u8>(0x20_010);
        assert_eq!(
            exit_of(core, result),
            Exit::SecondStage(SecondStageFault::EptMisconfiguration {
                gpa: Gpa::new(0x20_010)
            })
        );
    }
}

#[test]
fn nested_page_faults_carry_amds_error_code() {
    let host = Host::new(SecondStageKind::Npt);
    let machine = host.machine();
    let mut cpu = host.paged(&machine);
    let core = &mut cpu.core;
    let code = |core: &Core, result| match exit_of::<()>(core, result) {
        Exit::SecondStage(SecondStageFault::NestedPageFault { gpa, error }) => (gpa.get(), error),
        other => panic!("{other:?}"),
    };
    const FINAL: u64 = 1 << 32;
    const TABLE: u64 = 1 << 33;
    host.put(3, 0x20, 1 << 63);
    let result = core.load::<u8>(0x20_000).map(|_| ());
    assert_eq!(code(core, result), (0x20_000, FINAL | 4));
    host.put(3, 0x20, host.hpa(0x20) | 5);
    let result = core.store(0x20_000, 0u8);
    assert_eq!(code(core, result), (0x20_000, FINAL | 4 | 2 | 1));
    host.put(3, 0x20, host.hpa(0x20) | 7 | 1 << 51);
    let result = core.load::<u8>(0x20_000).map(|_| ());
    assert_eq!(code(core, result), (0x20_000, FINAL | 4 | 8 | 1));
    host.put(3, 0x20, host.hpa(0x20) | 3);
    let result = core.load::<u8>(0x20_000).map(|_| ());
    assert_eq!(
        code(core, result),
        (0x20_000, FINAL | 4 | 1),
        "without U nothing is allowed"
    );
    host.put(3, 0x20, host.hpa(0x20) | 7 | NptFlags::NO_EXECUTE.bits());
    let result = core.fetch(0x20_000).map(|_| ());
    assert_eq!(code(core, result), (0x20_000, FINAL | 16 | 4 | 1));
    host.put(3, 11, host.hpa(11) | 5);
    core.flush_all();
    let result = core.load::<u8>(0x22_000).map(|_| ());
    assert_eq!(
        code(core, result),
        ((11 << 12) | (0x22 * 8), TABLE | 4 | 2 | 1)
    );
}

#[test]
fn accessed_and_dirty_flags_are_set_in_the_real_tables() {
    for kind in [SecondStageKind::Ept, SecondStageKind::Npt] {
        let host = Host::new(kind);
        let machine = host.machine();
        let mut cpu = host.paged(&machine);
        let core = &mut cpu.core;
        let (accessed, dirty) = match kind {
            SecondStageKind::Ept => (1 << 8, 1 << 9),
            SecondStageKind::Npt => (1 << 5, 1 << 6),
        };
        core.load::<u8>(0x20_000).unwrap();
        assert_eq!(host.get(3, 0x20) & (accessed | dirty), accessed);
        assert_eq!(host.get(0, 0) & (accessed | dirty), accessed);
        assert_eq!(
            host.get(3, 8) & dirty,
            dirty,
            "a guest table's page counts as written"
        );
        core.store(0x20_000, 1u8).unwrap();
        assert_eq!(host.get(3, 0x20) & (accessed | dirty), accessed | dirty);
        // The hypervisor clears D and flushes: the next store must set it again.
        host.put(3, 0x20, host.get(3, 0x20) & !dirty);
        machine.flush_tlbs();
        core.line.enter();
        assert!(!core.serve_requests());
        core.line.leave();
        core.load::<u8>(0x20_000).unwrap();
        core.store(0x20_000, 1u8).unwrap();
        assert_eq!(host.get(3, 0x20) & dirty, dirty);
        // And the guest's own flags.
        assert_eq!(host.get(11, 0x20) & 0x60, 0x60);
    }
}

#[test]
fn addresses_beyond_the_root_and_without_a_root_are_violations() {
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    let mut cpu = host.paged(&machine);
    host.put(11, 0x20, 1 << 45 | 7);
    let result = cpu.core.load::<u8>(0x20_008);
    assert_eq!(violation(exit_of(&cpu.core, result)).0, 1 << 45 | 8);
    let mut fresh = Cpu::new(machine, 1);
    let result = fresh.core.load::<u8>(0x20);
    assert_eq!(violation(exit_of(&fresh.core, result)).0, 0x20);
}

#[test]
fn tables_that_point_at_themselves_end_in_an_answer() {
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    let mut cpu = host.paged(&machine);
    let core = &mut cpu.core;
    host.put(8, 0, 8 << 12 | 7);
    core.flush_all();
    assert_eq!(
        core.load::<u64>(0),
        Ok(8 << 12 | 7 | 0x20),
        "the root maps itself as a page"
    );
    // The second stage too: the root as its own table, then as a page.
    host.put(0, 0, host.hpa(0) | host.leaf());
    core.flush_all();
    let result = core.load::<u64>(0);
    assert!(matches!(exit_of(core, result), Exit::SecondStage(_)));
}

#[test]
fn a_guest_that_changes_its_tables_sees_it_after_a_flush_and_large_pages_flush_whole() {
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    let mut cpu = host.paged(&machine);
    let core = &mut cpu.core;
    host.put(0x20, 0, 0x20);
    host.put(0x21, 0, 0x21);
    assert_eq!(core.load::<u64>(0x20_000), Ok(0x20));
    host.put(11, 0x20, 0x21 << 12 | 7);
    core.flush_page(0x20_000);
    assert_eq!(core.load::<u64>(0x20_000), Ok(0x21));
    // A 2 MiB page instead of the table: both of its 4 KiB pieces go with one INVLPG.
    host.put(10, 0, 0x87);
    core.flush_all();
    assert_eq!(core.load::<u64>(0x20_000), Ok(0x20));
    assert_eq!(core.load::<u64>(0x21_000), Ok(0x21));
    host.put(10, 0, 11 << 12 | 7);
    core.flush_page(0x1f_f000);
    assert_eq!(core.load::<u64>(0x20_000), Ok(0x21));
}

#[test]
fn what_is_remembered_of_upper_levels_never_refuses_an_access() {
    for kind in [SecondStageKind::Ept, SecondStageKind::Npt] {
        let host = Host::new(kind);
        let machine = host.machine();
        let mut cpu = host.paged(&machine);
        let core = &mut cpu.core;
        // Upper levels that allow reading only, remembered by a read, then widened without a
        // flush: of the guest's tables first, then of the second stage.
        host.put(9, 0, (10 << 12) | 5);
        core.load::<u8>(0x20_000).unwrap();
        let result = core.store(0x20_000, 1u8);
        assert_eq!(fault_of(core, result).0, vector::PF);
        host.put(9, 0, (10 << 12) | 7);
        assert_eq!(core.store(0x20_000, 1u8), Ok(()));
        let read_only = match kind {
            SecondStageKind::Ept => (EptFlags::READ | EptFlags::EXECUTE).bits(),
            SecondStageKind::Npt => 5,
        };
        host.put(2, 0, host.hpa(3) | host.table());
        let all = host.get(1, 0);
        core.flush_all();
        core.load::<u8>(0x21_000).unwrap();
        host.put(1, 0, host.hpa(2) | read_only);
        core.flush_all();
        // Guest tables count as written, so the guest walks without them here.
        core.cr0 = 0;
        core.cr4 = 0;
        core.efer = 0;
        core.flush_all();
        core.load::<u8>(0x22_000).unwrap();
        let result = core.store(0x22_000, 1u8);
        assert!(matches!(exit_of(core, result), Exit::SecondStage(_)));
        host.put(1, 0, all);
        assert_eq!(core.store(0x22_000, 1u8), Ok(()));
    }
}

#[test]
fn rights_are_those_of_the_privilege_level_and_of_smap() {
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    let mut cpu = host.paged(&machine);
    let core = &mut cpu.core;
    host.put(11, 0x20, 0x20 << 12 | 3);
    assert_eq!(core.load::<u8>(0x20_000), Ok(0));
    core.user = true;
    core.update_rights();
    let result = core.load::<u8>(0x20_000);
    assert_eq!(
        fault_of(core, result),
        (vector::PF, Some(5), Some(0x20_000))
    );
    assert_eq!(core.load_sys::<u8>(0x20_000), Ok(0));
    core.user = false;
    core.cr4 |= cr4::SMAP;
    core.flush_all();
    let result = core.store(0x21_000, 1u8);
    assert_eq!(
        fault_of(core, result),
        (vector::PF, Some(3), Some(0x21_000))
    );
    core.flags.set_image(rflags::AC | rflags::ONE);
    core.update_rights();
    assert_eq!(core.store(0x21_000, 1u8), Ok(()));
    let result = core.load_sys::<u8>(0x21_000);
    assert_eq!(
        fault_of(core, result),
        (vector::PF, Some(1), Some(0x21_000))
    );
    core.flags.set_image(rflags::ONE);
    core.update_rights();
    let result = core.load::<u8>(0x21_000);
    assert_eq!(
        fault_of(core, result),
        (vector::PF, Some(1), Some(0x21_000))
    );
}

#[test]
fn an_address_that_is_not_canonical_is_a_general_protection_fault() {
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    let mut cpu = host.paged(&machine);
    let core = &mut cpu.core;
    let result = core.load::<u8>(0x8000_0000_0000);
    assert_eq!(fault_of(core, result), (vector::GP, Some(0), None));
    assert_eq!(core.mem.not_canonical, Some(0x8000_0000_0000));
    let result = core.store(0x7fff_ffff_ffff, 0u16);
    assert_eq!(
        fault_of(core, result).0,
        vector::PF,
        "the first half does not translate"
    );
}

#[test]
fn translation_for_a_debugger_reads_where_it_is_told_and_marks_nothing() {
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    let cpu = host.paged(&machine);
    host.put(11, 0x20, 0x2a << 12 | 1 | NptFlags::NO_EXECUTE.bits());
    let read =
        |gpa: Gpa| Some(host.get((gpa.get() >> 12) as usize, (gpa.page_offset() / 8) as usize));
    assert_eq!(
        cpu.translate(0x20_123, read),
        Some(Translation {
            gpa: Gpa::new(0x2a_123),
            writable: false,
            user: false,
            executable: false
        })
    );
    assert_eq!(cpu.translate(0x3_0000_0000, read), None);
    assert_eq!(cpu.translate(1 << 47, read), None);
    assert_eq!(cpu.translate(0x20_123, |_| None), None);
    assert_eq!(host.get(11, 0x20) & 0x20, 0);
}
