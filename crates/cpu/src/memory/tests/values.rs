//! Loads, stores and changes, in plain and in emulated memory and in pages with code.

use super::*;

#[test]
fn values_of_all_sizes_are_stored_and_loaded_across_pages() {
    for kind in [SecondStageKind::Ept, SecondStageKind::Npt] {
        let host = Host::new(kind);
        let machine = host.machine();
        let mut cpu = host.paged(&machine);
        let core = &mut cpu.core;
        for at in [
            0x20_000u64,
            0x20_ff1,
            0x20_ff8,
            0x20_ffc,
            0x20_fff,
            0x21_003,
        ] {
            core.store(at, 0x1122_3344_5566_7788_99aa_bbcc_ddee_ff00u128)
                .unwrap();
            assert_eq!(
                core.load::<u128>(at),
                Ok(0x1122_3344_5566_7788_99aa_bbcc_ddee_ff00)
            );
            assert_eq!(core.load::<u64>(at), Ok(0x99aa_bbcc_ddee_ff00));
            assert_eq!(core.load::<u32>(at), Ok(0xddee_ff00));
            assert_eq!(core.load::<u16>(at), Ok(0xff00));
            assert_eq!(core.load::<u8>(at + 15), Ok(0x11));
            assert_eq!(
                core.rmw::<u64>(at, true, |x| x + 1).unwrap().1,
                0x99aa_bbcc_ddee_ff01
            );
            assert_eq!(
                core.rmw::<u32>(at, false, |x| x + 1).unwrap().0,
                0xddee_ff01
            );
            assert_eq!(core.load::<u8>(at), Ok(2));
        }
    }
}

#[test]
fn pages_that_are_not_neighbours_are_one_to_a_guest() {
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    let mut cpu = host.paged(&machine);
    let core = &mut cpu.core;
    host.put(11, 0x21, 0x30 << 12 | 7);
    core.store(0x20_ffb, 0x1122_3344_5566_7788u64).unwrap();
    assert_eq!(host.get(0x20, 511), 0x4455_6677_8800_0000);
    assert_eq!(host.get(0x30, 0), 0x11_2233);
    assert_eq!(core.load::<u64>(0x20_ffb), Ok(0x1122_3344_5566_7788));
    core.line.enter();
    assert_eq!(
        core.rmw::<u64>(0x20_ffb, true, |x| x + 1).unwrap().1,
        0x1122_3344_5566_7789
    );
    core.line.leave();
    assert_eq!(core.load::<u64>(0x20_ffb), Ok(0x1122_3344_5566_7789));
}

#[test]
fn a_store_that_faults_on_its_second_page_has_changed_nothing() {
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    let mut cpu = host.paged(&machine);
    let core = &mut cpu.core;
    host.put(11, 0x21, 0);
    host.put(0x20, 511, 7);
    let result = core.store(0x20_ffc, u64::MAX);
    assert_eq!(
        fault_of(core, result),
        (vector::PF, Some(2), Some(0x21_000))
    );
    host.put(11, 0x21, 0x21 << 12 | 7);
    host.put(3, 0x21, 0);
    let result = core.rmw::<u64>(0x20_ffc, false, |_| u64::MAX);
    assert_eq!(violation(exit_of(core, result)).0, 0x21_000);
    assert_eq!(host.get(0x20, 511), 7);
}

#[test]
fn spans_are_what_their_elements_would_be() {
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    let mut cpu = host.paged(&machine);
    let core = &mut cpu.core;
    for large in [false, true] {
        core.store(0x20_000, 0x1122_3344_5566_7788u64).unwrap();
        // As far as the nearer end of a page goes.
        assert_eq!(core.copy_span(0x21_ff0, 0x20_000, 0x1000, 1, large), Ok(16));
        assert_eq!(core.load::<u64>(0x21_ff0), Ok(0x1122_3344_5566_7788));
        assert_eq!(core.copy_span(0x21_fee, 0x20_000, 0x1000, 4, large), Ok(16));
        // Bytes that overlap spread; longer elements that overlap are not done this way.
        assert_eq!(core.copy_span(0x20_001, 0x20_000, 7, 1, large), Ok(7));
        assert_eq!(core.load::<u64>(0x20_000), Ok(0x8888_8888_8888_8888));
        assert_eq!(core.copy_span(0x20_002, 0x20_000, 8, 4, large), Ok(0));
        assert_eq!(
            core.copy_span(0x20_000, 0x20_002, 8, 4, large),
            Ok(8),
            "downwards nothing is read twice"
        );
    }
    for (element, expected) in [
        (1, 0x8888_8888_8888_8888),
        (2, 0x7788_7788_7788_7788),
        (4, 0x5566_7788_5566_7788),
        (8, 0x1122_3344_5566_7788u64),
    ] {
        assert_eq!(
            core.fill_span(0x22_003, 0x1122_3344_5566_7788, element, 23),
            Ok(16)
        );
        assert_eq!(core.load::<u64>(0x22_00b), Ok(expected));
        assert_eq!(core.load::<u8>(0x22_013), Ok(0));
    }
    host.put(3, 0x23, 0);
    let result = core.fill_span(0x23_000, 0, 1, 64);
    assert_eq!(violation(exit_of(core, result)).0, 0x23_000);
    core.line.enter();
    core.fetch(0x22_000).unwrap();
    core.line.leave();
    assert_eq!(
        core.fill_span(0x22_000, 0, 1, 64),
        Ok(0),
        "stores to code are noticed one by one"
    );
}

#[test]
fn sixteen_bytes_are_exchanged_at_once() {
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    let mut cpu = host.paged(&machine);
    let core = &mut cpu.core;
    let new = 7 << 64 | 9u128;
    assert_eq!(core.cmpxchg16(0x20_010, 0, new), Ok(0));
    assert_eq!(core.cmpxchg16(0x20_010, 0, 1), Ok(new));
    assert_eq!(core.load::<u128>(0x20_010), Ok(new));
    let result = core.cmpxchg16(0x20_018, 0, 1);
    assert_eq!(fault_of(core, result), (vector::GP, Some(0), None));
}

#[test]
fn emulated_memory_is_read_and_written_in_fragments_of_one_instruction() {
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    let mut cpu = host.paged(&machine);
    let core = &mut cpu.core;
    core.rip = 0x5000;
    host.put(3, 0x21, 0b110);
    // A 16-byte load of which six bytes are RAM.
    host.put(0x20, 511, 0x6655_4433_2211_0000);
    let at = 0x20_ffa;
    let result = core.load::<u128>(at);
    assert!(matches!(exit_of(core, result), Exit::SecondStage(_)));
    core.allow_mmio(Gpa::new(0x21_000));
    for (gpa, len) in [(0x21_000, 8), (0x21_008, 2)] {
        assert!(core.mmio_attempt());
        let result = core.load::<u128>(at);
        assert_eq!(
            exit_of(core, result),
            Exit::MmioRead {
                gpa: Gpa::new(gpa),
                len
            }
        );
        core.complete_mmio_read(&[gpa as u8 + 1; 8]);
        assert!(core.mmio_in_progress());
    }
    assert!(core.mmio_attempt());
    assert_eq!(
        core.load::<u128>(at),
        Ok(0x0909_0101_0101_0101_0101_6655_4433_2211)
    );
    core.mmio_retire();
    assert!(!core.mmio_in_progress());
    let result = core.load::<u8>(0x21_000);
    assert!(
        matches!(exit_of(core, result), Exit::SecondStage(_)),
        "only that instruction"
    );
    // A read-modify-write.
    core.allow_mmio(Gpa::new(0x21_000));
    assert!(core.mmio_attempt());
    let result = core.rmw::<u32>(0x21_010, true, |x| x + 1);
    assert_eq!(
        exit_of(core, result),
        Exit::MmioRead {
            gpa: Gpa::new(0x21_010),
            len: 4
        }
    );
    core.complete_mmio_read(&5u32.to_le_bytes());
    assert!(core.mmio_attempt());
    assert_eq!(core.rmw::<u32>(0x21_010, true, |x| x + 1), Ok((5, 6)));
    assert_eq!(
        core.mmio_deliver(),
        None,
        "not before the instruction has completed"
    );
    core.mmio_retire();
    let expected = Exit::MmioWrite {
        gpa: Gpa::new(0x21_010),
        len: 4,
        data: [6, 0, 0, 0, 0, 0, 0, 0],
    };
    assert_eq!(core.mmio_deliver(), Some(expected));
    assert_eq!(core.mmio_deliver(), None);
}

#[test]
fn guest_tables_in_emulated_memory_are_as_if_not_present() {
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    let mut cpu = host.paged(&machine);
    let core = &mut cpu.core;
    host.put(3, 11, 0);
    let result = core.load::<u8>(0x20_000);
    let (gpa, qualification, _) = violation(exit_of(core, result));
    assert!(!qualification.contains(Qualification::FINAL));
    core.allow_mmio(Gpa::new(gpa));
    assert!(core.mmio_attempt());
    let result = core.load::<u8>(0x20_000);
    assert_eq!(
        fault_of(core, result),
        (vector::PF, Some(0), Some(0x20_000))
    );
}

#[test]
fn a_store_into_a_page_with_code_is_noticed_and_others_are_not() {
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    let mut cpu = host.paged(&machine);
    let core = &mut cpu.core;
    core.store(0x20_000, 0x90u8).unwrap();
    core.store(0x21_000, 0x90u8).unwrap();
    core.line.enter();
    let code = core.fetch(0x20_000).unwrap();
    assert_eq!(code.available, 4096);
    assert_eq!(core.code_is(code.host, &[0x90, 0]), Ok(true));
    core.watch_code(code.host + 0xfff, 1);
    let before = machine.code().generation();
    core.stop = false;
    core.store(0x21_000, 0x91u8).unwrap();
    core.store(0x20_800, 0u8).unwrap();
    assert_eq!(machine.code().generation(), before, "data beside code");
    assert!(!core.stop);
    core.store(0x20_001, 0u8).unwrap();
    assert_eq!(
        machine.code().generation(),
        before + 1,
        "the cached entry is gone"
    );
    assert!(core.stop);
    core.rmw::<u8>(0x20_000, true, |x| x ^ 1).unwrap();
    core.store(0x20_fff, 0x1234u16).unwrap();
    assert_eq!(machine.code().generation(), before + 3);
    assert_eq!(core.code_is(code.host, &[0x90]), Ok(false));
    let mut bytes = [0; 1];
    core.read_code(code.host, &mut bytes).unwrap();
    assert_eq!(bytes, [0x91]);
    core.line.leave();
}
