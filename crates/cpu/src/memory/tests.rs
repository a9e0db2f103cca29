//! The memory half of a processor against tables built by hand.

use super::*;
use crate::machine::{MachineConfig, SecondStageKind};
use crate::state::{cr0, cr4, efer};
use crate::{Cpu, Exit, SecondStageFault};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use twofold_arch::Level;
use twofold_arch::ept::{EptFlags, Eptp, Qualification};
use twofold_arch::npt::NptFlags;

const PAGES: usize = 64;
/// What the tables call the first page: not its address in this process.
const BASE: u64 = 0x45_6780_0000;

/// Host memory: pages by index. 0 to 3 hold the second-stage tables; guest frame n is page n.
struct Host {
    words: Box<[AtomicU64]>,
    kind: SecondStageKind,
}

const FRAMES: usize = 8;

impl Host {
    fn new(kind: SecondStageKind) -> Self {
        let words = (0..(PAGES + 1) * 512).map(|_| AtomicU64::new(0)).collect();
        let host = Self { words, kind };
        for level in 0..3 {
            host.put(level, 0, host.hpa(level + 1) | host.table());
        }
        for frame in FRAMES..PAGES {
            host.put(3, frame, host.hpa(frame) | host.leaf());
        }
        host
    }

    fn table(&self) -> u64 {
        match self.kind {
            SecondStageKind::Ept => EptFlags::RWX.bits(),
            SecondStageKind::Npt => 7,
        }
    }

    fn leaf(&self) -> u64 {
        match self.kind {
            SecondStageKind::Ept => EptFlags::RWX.bits() | 6 << 3,
            SecondStageKind::Npt => 7,
        }
    }

    /// The first word of the first whole page.
    fn first(&self) -> usize {
        (self.words.as_ptr() as usize).wrapping_neg() % 4096 / 8
    }

    fn hpa(&self, page: usize) -> u64 {
        BASE + page as u64 * 4096
    }

    fn word(&self, page: usize, index: usize) -> &AtomicU64 {
        &self.words[self.first() + page * 512 + index]
    }

    fn put(&self, page: usize, index: usize, value: u64) {
        self.word(page, index).store(value, Ordering::Relaxed);
    }

    fn get(&self, page: usize, index: usize) -> u64 {
        self.word(page, index).load(Ordering::Relaxed)
    }

    fn machine(&self) -> Arc<Machine> {
        let start = &raw const self.words[self.first()] as usize;
        Machine::new(MachineConfig {
            second_stage: self.kind,
            maxphyaddr: 46,
            hpa_offset: start.wrapping_sub(BASE as usize),
        })
    }

    fn cpu(&self, machine: &Arc<Machine>) -> Cpu {
        let mut cpu = Cpu::new(Arc::clone(machine), 0);
        let (root, level) = (Hpa::new(self.hpa(0)), Level::L512G);
        cpu.set_second_stage(match self.kind {
            SecondStageKind::Ept => SecondStage::Ept(Eptp::new(root, level, true)),
            SecondStageKind::Npt => SecondStage::Npt { root, level },
        });
        cpu
    }

    /// Guest tables in frames 8 to 11 that map linear page n of the first 2 MiB to frame n, and a
    /// processor in long mode that uses them.
    fn paged(&self, machine: &Arc<Machine>) -> Cpu {
        for level in 0..3 {
            self.put(8 + level, 0, (9 + level as u64) << 12 | 7);
        }
        for frame in 12..PAGES {
            self.put(11, frame, (frame as u64) << 12 | 7);
        }
        let mut cpu = self.cpu(machine);
        let core = &mut cpu.core;
        core.cr0 = cr0::PG | cr0::PE | cr0::WP;
        core.cr3 = 8 << 12;
        core.cr4 = cr4::PAE;
        core.efer = efer::LME | efer::LMA | efer::NXE;
        core.flush_all();
        cpu
    }
}

fn exit_of<T: std::fmt::Debug>(core: &Core, result: Result<T, Trap>) -> Exit {
    match result {
        Err(Trap::Exit) => core.exit,
        other => panic!("expected an exit, got {other:?} {:?}", core.fault),
    }
}

fn fault_of<T: std::fmt::Debug>(
    core: &Core,
    result: Result<T, Trap>,
) -> (u8, Option<u32>, Option<u64>) {
    match result {
        Err(Trap::Exception) => (core.fault.vector, core.fault.error_code, core.fault.payload),
        other => panic!("expected an exception, got {other:?} {:?}", core.exit),
    }
}

fn violation(exit: Exit) -> (u64, Qualification, u64) {
    match exit {
        Exit::SecondStage(SecondStageFault::EptViolation {
            gpa,
            qualification,
            gla,
        }) => (
            gpa.get(),
            Qualification::from_bits_retain(qualification),
            gla,
        ),
        other => panic!("expected an EPT violation, got {other:?}"),
    }
}

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
    core.store(0x20_000, 0x1122_3344_5566_7788u64).unwrap();
    // As far as the nearer end of a page goes.
    assert_eq!(core.copy_span(0x21_ff0, 0x20_000, 0x1000, 1), Ok(16));
    assert_eq!(core.load::<u64>(0x21_ff0), Ok(0x1122_3344_5566_7788));
    assert_eq!(core.copy_span(0x21_fee, 0x20_000, 0x1000, 4), Ok(16));
    // Bytes that overlap spread; longer elements that overlap are not done this way.
    assert_eq!(core.copy_span(0x20_001, 0x20_000, 7, 1), Ok(7));
    assert_eq!(core.load::<u64>(0x20_000), Ok(0x8888_8888_8888_8888));
    assert_eq!(core.copy_span(0x20_002, 0x20_000, 8, 4), Ok(0));
    assert_eq!(
        core.copy_span(0x20_000, 0x20_002, 8, 4),
        Ok(8),
        "downwards nothing is read twice"
    );
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
    let before = machine.code().generation();
    core.stop = false;
    core.store(0x21_000, 0x91u8).unwrap();
    core.store(0x20_ffe, 0u8).unwrap();
    assert_eq!(
        machine.code().generation(),
        before + 1,
        "one store each, the cached entry is gone"
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

#[test]
fn locked_changes_of_two_processors_add_up_even_across_scattered_pages() {
    const ROUNDS: u64 = 2000;
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    let _ = host.paged(&machine);
    host.put(11, 0x21, 0x30 << 12 | 7);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            let (machine, host) = (&machine, &host);
            scope.spawn(move || {
                let mut cpu = host.cpu(machine);
                let core = &mut cpu.core;
                core.cr0 = cr0::PG | cr0::PE;
                core.cr3 = 8 << 12;
                core.cr4 = cr4::PAE;
                core.efer = efer::LME | efer::LMA;
                core.flush_all();
                core.line.enter();
                for round in 0..ROUNDS {
                    if core.line.asked() {
                        core.serve_requests();
                    }
                    core.rmw::<u64>(0x22_001, true, |x| x + 1).unwrap();
                    if round % 16 == 0 {
                        core.rmw::<u32>(0x20_ffe, true, |x| x + 1).unwrap();
                    }
                }
                core.line.leave();
            });
        }
    });
    let mut cpu = host.paged(&machine);
    host.put(11, 0x21, 0x30 << 12 | 7);
    assert_eq!(cpu.core.load::<u64>(0x22_001), Ok(2 * ROUNDS));
    assert_eq!(cpu.core.load::<u32>(0x20_ffe), Ok((2 * ROUNDS / 16) as u32));
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

impl Host {
    /// A processor in 64-bit code at CPL 0, about to execute `code` in frame 24.
    fn running(&self, machine: &Arc<Machine>, index: u32, code: &[u8]) -> Cpu {
        let mut cpu = self.paged(machine);
        drop(std::mem::replace(&mut cpu, {
            let mut cpu = Cpu::new(Arc::clone(machine), index);
            let root = Hpa::new(self.hpa(0));
            cpu.set_second_stage(SecondStage::Ept(Eptp::new(root, Level::L512G, true)));
            cpu
        }));
        for (i, chunk) in code.chunks(8).enumerate() {
            let mut word = [0xf4; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.put(24, i, u64::from_le_bytes(word));
        }
        let flat = crate::Segment {
            limit: u32::MAX,
            kind: 3,
            code_or_data: true,
            present: true,
            big: true,
            granular: true,
            ..crate::Segment::default()
        };
        cpu.set_system_registers(&crate::SystemRegisters {
            cs: crate::Segment {
                kind: 11,
                long: true,
                big: false,
                ..flat
            },
            ds: flat,
            es: flat,
            fs: flat,
            gs: flat,
            ss: flat,
            cr0: cr0::PG | cr0::PE | cr0::WP | cr0::ET | cr0::NE,
            cr3: 8 << 12,
            cr4: cr4::PAE,
            efer: efer::LME | efer::LMA | efer::NXE,
            ..crate::SystemRegisters::default()
        });
        cpu.set_registers(&crate::Registers {
            rip: 24 << 12,
            rflags: 2,
            gpr: [0; 16],
        });
        cpu
    }
}

/// `inc qword [0x20000]` for ever.
const COUNT_FOR_EVER: [u8; 10] = [0x48, 0xff, 0x04, 0x25, 0, 0, 2, 0, 0xeb, 0xf6];

#[test]
fn after_a_flush_running_guests_write_only_where_the_tables_say() {
    const ROUNDS: usize = 200;
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    let mut cpus: Vec<Cpu> = (0..2)
        .map(|index| host.running(&machine, index, &COUNT_FOR_EVER))
        .collect();
    let lines: Vec<_> = cpus.iter().map(|cpu| Arc::clone(cpu.line())).collect();
    std::thread::scope(|scope| {
        for cpu in &mut cpus {
            scope.spawn(|| assert_eq!(cpu.run(), Exit::Kicked));
        }
        while !lines.iter().all(|line| line.in_guest()) {
            std::thread::yield_now();
        }
        let mut moved = 0;
        for round in 0..ROUNDS {
            let (old, new) = if round % 2 == 0 {
                (0x20, 0x30)
            } else {
                (0x30, 0x20)
            };
            host.put(3, 0x20, host.hpa(new) | host.leaf());
            machine.flush_tlbs();
            let value = host.get(old, 0);
            for _ in 0..50 {
                std::hint::spin_loop();
                assert_eq!(
                    host.get(old, 0),
                    value,
                    "a store went to the page that was taken"
                );
            }
            moved += u64::from(host.get(new, 0) != 0);
        }
        machine.kick_all();
        assert!(moved > 0, "the guests did not run");
    });
    assert!(cpus.iter().all(|cpu| cpu.counters().tlb_flushes > 1));
}

#[test]
fn memory_that_vanishes_under_a_running_guest_is_reported_with_the_state_before() {
    access::tests::install_handler();
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    // mov rax, 5; inc qword [0x20000]; hlt
    let code = [0xb8, 5, 0, 0, 0, 0x48, 0xff, 0x04, 0x25, 0, 0, 2, 0, 0xf4];
    let mut cpu = host.running(&machine, 0, &code);
    // SAFETY: the kernel chooses the address; only the guest uses the page.
    #[expect(unsafe_code)]
    // UNSAFETY: a page that can be taken away.
    let page = unsafe {
        rustix::mm::mmap_anonymous(
            std::ptr::null_mut(),
            4096,
            rustix::mm::ProtFlags::empty(),
            rustix::mm::MapFlags::PRIVATE,
        )
    }
    .unwrap() as usize;
    let hpa = (page as u64).wrapping_sub(machine.config().hpa_offset as u64);
    assert!(
        hpa < 1 << 46,
        "the test's offset keeps addresses within MAXPHYADDR"
    );
    host.put(3, 0x20, hpa | host.leaf());
    assert_eq!(cpu.run(), Exit::HostFault { hva: page as u64 });
    let registers = cpu.registers();
    assert_eq!((registers.rip, registers.gpr[0]), ((24 << 12) + 5, 5));
    // The program maps something else there: the instruction goes on.
    host.put(3, 0x20, host.hpa(0x20) | host.leaf());
    machine.flush_tlbs();
    assert_eq!(cpu.run(), Exit::Halt);
    assert_eq!(host.get(0x20, 0), 1);
    #[expect(unsafe_code)]
    // UNSAFETY: a page that can be taken away.
    // SAFETY: the tables do not lead to the page any more.
    unsafe {
        rustix::mm::munmap(page as *mut _, 4096).unwrap();
    }
}
