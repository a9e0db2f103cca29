//! Sub-page write permissions: when the table is asked, what it says, and what remains of that.

use super::*;
use twofold_arch::sppt::{AccessMap, SUB_PAGE_BYTES, SpptEntry, WriteVector};

const SUB_PAGE: u64 = EptFlags::SUB_PAGE_WRITE.bits();
const READ_EXECUTE: u64 = EptFlags::READ.bits() | EptFlags::EXECUTE.bits() | 6 << 3;
const DIRTY: u64 = EptFlags::DIRTY.bits();
const ACCESSED: u64 = EptFlags::ACCESSED.bits();
/// The pages that hold the table, its root first.
const SPPT: usize = 4;
/// A page for a log.
const LOG: usize = 63;

impl Host {
    /// Tables that cover the first 2 MiB of guest frames and allow nothing.
    fn sppt(&self) -> Hpa {
        for level in 0..3 {
            let below = SpptEntry::table(Hpa::new(self.hpa(SPPT + level + 1)));
            self.put(SPPT + level, 0, below);
        }
        Hpa::new(self.hpa(SPPT))
    }

    fn protect(&self, frame: usize, map: u32) {
        self.put(3, frame, self.hpa(frame) | READ_EXECUTE | SUB_PAGE);
        self.put(SPPT + 3, frame, WriteVector::new(AccessMap(map)).0);
    }

    /// A processor that asks the table.
    fn guarded(&self, machine: &Arc<Machine>) -> Cpu {
        let mut cpu = self.paged(machine);
        cpu.set_sppt(Some(self.sppt())).unwrap();
        cpu
    }
}

/// A denied write: where, and that the qualification is that of a write to what may be read.
fn denied_at(exit: Exit) -> u64 {
    use Qualification as Q;
    let (gpa, qualification, gla) = violation(exit);
    let access = Q::READ | Q::WRITE | Q::FETCH | Q::FINAL | Q::LINEAR_VALID;
    let entry = Q::ENTRY_READ | Q::ENTRY_WRITE | Q::ENTRY_EXECUTE;
    assert_eq!(
        qualification & (access | entry),
        Q::WRITE | Q::FINAL | Q::LINEAR_VALID | Q::ENTRY_READ | Q::ENTRY_EXECUTE
    );
    assert_eq!(gla, gpa, "linear addresses are guest-physical ones here");
    gpa
}

#[test]
fn a_write_is_allowed_where_its_sub_page_is_and_reads_are_everywhere() {
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    let mut cpu = host.guarded(&machine);
    let core = &mut cpu.core;
    host.protect(0x20, 0x8000_0001);
    for sub_page in 0..32u64 {
        for at in [0, 8, 120] {
            let at = 0x20_000 + sub_page * SUB_PAGE_BYTES + at;
            let result = core.store(at, u64::MAX);
            if sub_page == 0 || sub_page == 31 {
                assert_eq!(result, Ok(()));
                assert_eq!(core.load::<u64>(at), Ok(u64::MAX));
            } else {
                assert_eq!(denied_at(exit_of(core, result)), at);
                assert_eq!(core.load::<u64>(at), Ok(0));
            }
        }
    }
    assert!(core.exec_place(0x20_000).is_ok());
}

#[test]
fn the_table_is_asked_only_when_every_condition_holds() {
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    let mut cpu = host.guarded(&machine);
    let table = Hpa::new(host.hpa(SPPT));
    let rights = [0u64, 1, 2, 3, 4, 5, 6, 7];
    for (leaf, above) in rights.iter().flat_map(|l| [1u64, 3, 5, 7].map(|a| (*l, a))) {
        for (bit, on, allowed) in [
            (true, true, true),
            (true, true, false),
            (true, false, true),
            (false, true, true),
        ] {
            for large in [false, true] {
                host.protect(0x20, if allowed { u32::MAX } else { 0 });
                cpu.set_sppt(on.then_some(table)).unwrap();
                // A leaf of 2 MiB in its place, or one of 4 KiB: guest paging is off, so that
                // nothing else is looked up.
                let flags = leaf | if bit { SUB_PAGE } else { 0 };
                if large {
                    host.put(2, 0, BASE | flags | 6 << 3 | 1 << 7);
                } else {
                    host.put(2, 0, host.hpa(3) | above);
                    host.put(3, 0x20, host.hpa(0x20) | flags | 6 << 3);
                }
                let core = &mut cpu.core;
                (core.cr0, core.cr4, core.efer) = (0, 0, 0);
                core.flush_all();
                let all = if large { leaf } else { leaf & above };
                let misconfigured = leaf & 3 == 2;
                let asked = all & 3 == 1 && bit && on && !large;
                let place = 0x20_008;
                let result = core.store(place, 7u8);
                let case = format!("leaf {leaf:#b}, above {above:#b}, {bit} {on} {large}");
                if misconfigured {
                    assert!(
                        matches!(
                            exit_of(core, result),
                            Exit::SecondStage(SecondStageFault::EptMisconfiguration { .. })
                        ),
                        "{case}"
                    );
                } else if all & 3 == 3 || asked && allowed {
                    assert_eq!(result, Ok(()), "{case}");
                } else {
                    assert_eq!(violation(exit_of(core, result)).0, place, "{case}");
                }
                // A read needs no more than R, and a fetch no more than X.
                assert_eq!(
                    core.load::<u8>(place).is_ok(),
                    all & 1 != 0 && !misconfigured,
                    "{case}"
                );
                let fetched = core.exec_place(place).is_ok();
                assert_eq!(fetched, all & 4 != 0 && !misconfigured, "{case}");
            }
        }
    }
}

#[test]
fn a_table_that_is_missing_is_a_miss_and_a_reserved_bit_a_misconfiguration() {
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    let mut cpu = host.guarded(&machine);
    let core = &mut cpu.core;
    host.protect(0x20, u32::MAX);
    let place = 0x20_ff8;
    let store = |core: &mut Core| {
        // What is cached of the table's upper levels goes with a flush.
        core.flush_all();
        match core.store(place, 1u64) {
            Ok(()) => None,
            result => match exit_of(core, result) {
                Exit::SecondStage(SecondStageFault::SpptMiss { gpa, gla }) => {
                    assert_eq!((gpa.get(), gla), (place, place));
                    Some("miss")
                }
                Exit::SecondStage(SecondStageFault::SpptMisconfiguration { gpa, gla }) => {
                    assert_eq!((gpa.get(), gla), (place, place));
                    Some("misconfiguration")
                }
                other => panic!("{other:?}"),
            },
        }
    };
    assert_eq!(store(core), None);
    for level in 0..3 {
        let good = host.get(SPPT + level, 0);
        // Whatever else an entry that is not valid holds.
        for absent in [0, !1, good & !1] {
            host.put(SPPT + level, 0, absent);
            assert_eq!(store(core), Some("miss"));
        }
        for bit in (1..12).chain(46..64) {
            host.put(SPPT + level, 0, good | 1 << bit);
            assert_eq!(store(core), Some("misconfiguration"), "bit {bit}");
        }
        host.put(SPPT + level, 0, good);
    }
    for bit in (1..64).step_by(2) {
        host.put(
            SPPT + 3,
            0x20,
            WriteVector::new(AccessMap::FULL).0 | 1 << bit,
        );
        assert_eq!(store(core), Some("misconfiguration"), "bit {bit}");
        // Also where the permission itself is there or not.
        host.put(SPPT + 3, 0x20, 1 << bit);
        assert_eq!(store(core), Some("misconfiguration"), "bit {bit}");
    }
    host.put(SPPT + 3, 0x20, 0);
    let result = core.store(place, 1u64);
    assert_eq!(denied_at(exit_of(core, result)), place);
    assert_eq!(
        host.get(3, 0x20) & DIRTY,
        DIRTY,
        "the first store of this test was allowed"
    );
}

#[test]
fn a_permitted_write_marks_and_logs_the_page_and_a_denied_one_does_neither() {
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    let mut cpu = host.guarded(&machine);
    let page = Hpa::new(host.hpa(LOG));
    host.protect(0x20, 1);
    host.protect(0x21, 1);
    // The guest's tables are logged by this.
    cpu.set_pml(Some(Pml::empty(page)));
    cpu.core.store(0x22_000, 0u8).unwrap();
    let before = cpu.pml_index();
    let result = cpu.core.store(0x20_080, 1u8);
    assert_eq!(denied_at(exit_of(&cpu.core, result)), 0x20_080);
    assert_eq!(host.get(3, 0x20) & (ACCESSED | DIRTY), 0);
    assert_eq!(cpu.pml_index(), before);
    cpu.core.store(0x20_000, 1u8).unwrap();
    cpu.core.store(0x20_001, 1u8).unwrap();
    assert_eq!(host.get(3, 0x20) & (ACCESSED | DIRTY), ACCESSED | DIRTY);
    assert_eq!(cpu.pml_index(), before.map(|index| index - 1));
    assert_eq!(host.get(LOG, usize::from(before.unwrap())), 0x20_000);
    // A log without room stops what is permitted, before anything has changed.
    cpu.set_pml(Some(Pml { page, index: 512 }));
    let result = cpu.core.store(0x21_000, 1u8);
    assert_eq!(exit_of(&cpu.core, result), Exit::PmlFull);
    assert_eq!(host.get(3, 0x21) & (ACCESSED | DIRTY), 0);
    assert_eq!(host.get(0x21, 0), 0);
    // And a denied write is denied first.
    let result = cpu.core.store(0x21_080, 1u8);
    assert_eq!(denied_at(exit_of(&cpu.core, result)), 0x21_080);
}

#[test]
fn each_write_is_judged_again_whatever_was_read_or_written_before() {
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    let mut cpu = host.guarded(&machine);
    let core = &mut cpu.core;
    host.protect(0x20, u32::MAX);
    for round in 0..3u64 {
        core.load::<u64>(0x20_000).unwrap();
        core.store(0x20_000, round).unwrap();
        core.store(0x20_800, round).unwrap();
    }
    // The vector itself is read for each write: no flush is needed to see that it changed.
    host.put(SPPT + 3, 0x20, 1);
    core.store(0x20_000, 9u64).unwrap();
    let result = core.store(0x20_800, 9u64);
    assert_eq!(denied_at(exit_of(core, result)), 0x20_800);
    host.put(SPPT + 3, 0x20, 1 << 32);
    core.store(0x20_800, 9u64).unwrap();
    let misses = core.counters.tlb_misses;
    for _ in 0..100 {
        assert_eq!(core.load::<u64>(0x20_800), Ok(9));
    }
    assert_eq!(core.counters.tlb_misses, misses, "reads are cached");
}

#[test]
fn a_flush_drops_whatever_was_cached_of_the_table() {
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    let mut cpu = host.guarded(&machine);
    host.protect(0x20, u32::MAX);
    cpu.core.store(0x20_000, 1u8).unwrap();
    // The path is cut: no write may go by the old vectors after a flush.
    let path = host.get(SPPT + 2, 0);
    host.put(SPPT + 2, 0, 0);
    machine.flush_tlbs();
    cpu.core.line.enter();
    assert!(!cpu.core.serve_requests());
    cpu.core.line.leave();
    let result = cpu.core.store(0x20_000, 1u8);
    assert!(matches!(
        exit_of(&cpu.core, result),
        Exit::SecondStage(SecondStageFault::SpptMiss { .. })
    ));
    host.put(SPPT + 2, 0, path);
    cpu.core.store(0x20_000, 1u8).unwrap();
    // Another table, and none.
    cpu.set_sppt(None).unwrap();
    let result = cpu.core.store(0x20_000, 1u8);
    assert_eq!(denied_at(exit_of(&cpu.core, result)), 0x20_000);
    cpu.set_sppt(Some(Hpa::new(host.hpa(SPPT)))).unwrap();
    cpu.core.store(0x20_000, 1u8).unwrap();
}

#[test]
fn a_write_is_judged_on_each_page_that_it_lies_in() {
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    let mut cpu = host.guarded(&machine);
    let core = &mut cpu.core;
    for (first, second, denied) in [
        (u32::MAX, u32::MAX, None),
        (1 << 31, 1, None),
        (!(1 << 31), 1, Some(0x20_ffd)),
        (1 << 31, !1, Some(0x21_000)),
        (0, 0, Some(0x20_ffd)),
    ] {
        host.protect(0x20, first);
        host.protect(0x21, second);
        for kind in 0..4 {
            let result = match kind {
                0 => core.store(0x20_ffd, u64::MAX),
                1 => core.rmw::<u64>(0x20_ffd, false, |x| !x).map(|_| ()),
                2 => {
                    core.line.enter();
                    let result = core.rmw::<u64>(0x20_ffd, true, |x| !x).map(|_| ());
                    core.line.leave();
                    result
                }
                _ => core.touch_write(0x20_ffd, 8),
            };
            match denied {
                None => assert_eq!(result, Ok(())),
                Some(at) => {
                    assert_eq!(denied_at(exit_of(core, result)), at);
                    assert_eq!(host.get(0x20, 511) >> 40, 0, "nothing was written");
                    assert_eq!(host.get(0x21, 0), 0);
                }
            }
            host.put(0x20, 511, 0);
            host.put(0x21, 0, 0);
        }
    }
    // One page protected, its neighbour not.
    host.protect(0x20, 1 << 31);
    host.put(3, 0x21, host.hpa(0x21) | host.leaf());
    core.store(0x20_ffd, u64::MAX).unwrap();
    host.protect(0x20, 0);
    let result = core.store(0x1f_ffd, u64::MAX);
    assert_eq!(denied_at(exit_of(core, result)), 0x20_000);
}

#[test]
fn the_guests_own_page_walk_is_never_rescued() {
    use Qualification as Q;
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    let mut cpu = host.guarded(&machine);
    // The last guest table is in a page of which every sub-page may be written.
    host.protect(11, u32::MAX);
    let place = (11 << 12) | (0x22 * 8);
    // With EPT's accessed and dirty flags each read of a guest table counts as a write.
    let result = cpu.core.load::<u8>(0x22_000);
    let (gpa, qualification, gla) = violation(exit_of(&cpu.core, result));
    assert_eq!((gpa, gla), (place, 0x22_000));
    let entry = Q::ENTRY_READ | Q::ENTRY_EXECUTE;
    assert_eq!(qualification, Q::READ | Q::WRITE | Q::LINEAR_VALID | entry);
    // Without them, setting a flag in the table does.
    let root = Hpa::new(host.hpa(0));
    cpu.set_second_stage(SecondStage::Ept(Eptp::new(root, Level::L512G, false)));
    host.put(11, 0x21, 0x21 << 12 | 0x27);
    cpu.core.load::<u8>(0x21_000).unwrap();
    let result = cpu.core.load::<u8>(0x22_000);
    let (gpa, qualification, _) = violation(exit_of(&cpu.core, result));
    assert_eq!(
        (gpa, qualification),
        (place, Q::WRITE | Q::LINEAR_VALID | entry)
    );
    assert_eq!(host.get(11, 0x22), 0x22 << 12 | 7, "no flag was set");
    // The guest's stores to the same table are data.
    host.put(11, 11, 11 << 12 | 0x67);
    cpu.core.store(place, 0x22_067u64).unwrap();
    cpu.core.load::<u8>(0x22_000).unwrap();
}

#[test]
fn a_denial_carries_the_first_denied_byte_of_every_access() {
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    let mut cpu = host.guarded(&machine);
    let core = &mut cpu.core;
    host.protect(0x20, !0b1010);
    // Ends in sub-page 1, and covers 1 to 3.
    let result = core.store(0x20_07c, u128::MAX);
    assert_eq!(denied_at(exit_of(core, result)), 0x20_080);
    let result = core.touch_write(0x20_100, 300);
    assert_eq!(denied_at(exit_of(core, result)), 0x20_180);
    let result = core.touch_write(0x20_0ff, 2);
    assert_eq!(denied_at(exit_of(core, result)), 0x20_0ff);
    assert_eq!(core.touch_write(0x20_100, 128), Ok(()));
}

#[test]
fn there_is_no_table_where_a_processor_would_not_take_one() {
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    let mut cpu = host.guarded(&machine);
    host.protect(0x20, u32::MAX);
    for root in [host.hpa(SPPT) | 1, host.hpa(SPPT) | 0x800, 1 << 46, 1 << 63] {
        assert!(cpu.set_sppt(Some(Hpa::new(root))).is_err());
        cpu.core.store(0x20_000, 1u8).unwrap();
    }
    let host = Host::new(SecondStageKind::Npt);
    let mut cpu = host.paged(&host.machine());
    assert!(cpu.set_sppt(Some(Hpa::new(host.hpa(SPPT)))).is_err());
    assert_eq!(cpu.set_sppt(None), Ok(()));
}

#[test]
fn what_is_kept_of_a_protected_page_goes_with_the_translation() {
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    let mut cpu = host.guarded(&machine);
    let core = &mut cpu.core;
    host.protect(0x20, u32::MAX);
    let misses = |core: &Core| core.counters.tlb_misses;
    let store = |core: &mut Core| {
        let before = misses(core);
        core.store(0x20_008, 1u64).unwrap();
        misses(core) - before
    };
    assert_eq!(
        (store(core), store(core)),
        (1, 0),
        "the second time it is known"
    );
    // INVLPG, and the guest moves the page.
    host.put(11, 0x20, 0x30 << 12 | 0x67);
    core.flush_page(0x20_000);
    core.store(0x20_008, 2u64).unwrap();
    assert_eq!((host.get(0x20, 1), host.get(0x30, 1)), (1, 2));
    host.put(11, 0x20, 0x20 << 12 | 0x67);
    core.flush_tlb();
    assert_eq!((store(core), store(core)), (1, 0));
    // Another privilege level's rights are its own.
    host.put(11, 0x20, 0x20 << 12 | 0x63);
    core.flush_tlb();
    store(core);
    core.user = true;
    core.update_rights();
    let result = core.store(0x20_008, 1u64);
    assert_eq!(fault_of(core, result).0, vector::PF);
    core.user = false;
    core.update_rights();
    assert_eq!(store(core), 0);
    // Code that is decoded from the page: each store has to be announced from then on.
    core.line.enter();
    let code = core.fetch(0x20_000).unwrap();
    core.watch_code(code.host, 0x20);
    core.line.leave();
    let before = machine.code().generation();
    core.store(0x20_008, 1u64).unwrap();
    core.store(0x20_008, 1u64).unwrap();
    assert_eq!(machine.code().generation(), before + 2);
}

#[test]
fn a_denial_becomes_a_virtualization_exception_if_the_leaf_does_not_suppress_it() {
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    let mut cpu = host.guarded(&machine);
    cpu.core.cr0 |= cr0::PE;
    let page = Hpa::new(host.hpa(LOG));
    for (suppressed, miss) in [(true, false), (false, false), (false, true)] {
        host.put(LOG, 0, 0);
        cpu.set_ve(Some(VeControl {
            page,
            intercept: false,
        }));
        host.protect(0x20, 1);
        if suppressed {
            host.put(3, 0x20, host.get(3, 0x20) | EptFlags::SUPPRESS_VE.bits());
        }
        let path = host.sppt();
        if miss {
            host.put(SPPT + 2, 0, 0);
        }
        cpu.set_sppt(Some(path)).unwrap();
        let core = &mut cpu.core;
        let result = core.store(0x20_0fc, 1u64);
        if miss {
            // Exit reason 66 is no EPT violation, and never converted.
            assert!(matches!(
                exit_of(core, result),
                Exit::SecondStage(SecondStageFault::SpptMiss { .. })
            ));
        } else if suppressed {
            assert_eq!(denied_at(exit_of(core, result)), 0x20_0fc);
        } else {
            assert_eq!(fault_of(core, result).0, vector::VE);
            // Linear and guest-physical address, in the information page.
            assert_eq!((host.get(LOG, 2), host.get(LOG, 3)), (0x20_0fc, 0x20_0fc));
        }
    }
}

#[test]
fn a_store_into_code_is_announced_also_by_permission_of_a_sub_page() {
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    let mut cpu = host.guarded(&machine);
    let core = &mut cpu.core;
    host.protect(0x20, 1);
    core.line.enter();
    let code = core.fetch(0x20_000).unwrap();
    core.watch_code(code.host, 0x20);
    core.line.leave();
    let before = machine.code().generation();
    core.store(0x20_010, 0x90u8).unwrap();
    assert_eq!(machine.code().generation(), before + 1);
}
