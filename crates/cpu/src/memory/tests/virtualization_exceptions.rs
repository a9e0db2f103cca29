//! Which EPT violations become #VE, and what the information page says then.

use super::*;
use crate::memory::virtualization_exception::reason;
use crate::memory::{VeBusy, VeControl, VeInfo};

const SUPPRESS: u64 = EptFlags::SUPPRESS_VE.bits();
const LARGE: u64 = EptFlags::LARGE.bits();
const RX: u64 = EptFlags::READ.bits() | EptFlags::EXECUTE.bits();
/// The page that holds the information; the guest never touches its frame.
const INFO: usize = 62;
/// The frame that is accessed.
const FRAME: usize = 32;
const GPA: u64 = (FRAME as u64) << 12 | 0x238;

/// The entry that decides: not present, or a leaf that does not allow writing, and where it is.
#[derive(Clone, Copy, Debug)]
struct Deciding {
    /// 0 for the root table, 3 for the last.
    table: usize,
    leaf: bool,
}

const DECIDING: [Deciding; 7] = [
    Deciding {
        table: 0,
        leaf: false,
    },
    Deciding {
        table: 1,
        leaf: false,
    },
    Deciding {
        table: 2,
        leaf: false,
    },
    Deciding {
        table: 3,
        leaf: false,
    },
    Deciding {
        table: 1,
        leaf: true,
    },
    Deciding {
        table: 2,
        leaf: true,
    },
    Deciding {
        table: 3,
        leaf: true,
    },
];

impl Deciding {
    /// Puts the entry there, below entries that have bit 63 as `above` says.
    fn plant(self, host: &Host, suppress: bool, above: bool) {
        let bit = |on: bool| if on { SUPPRESS } else { 0 };
        for table in 0..self.table {
            let next = host.hpa(table + 1) | host.table();
            host.put(table, 0, next | bit(above));
        }
        let index = if self.table == 3 { FRAME } else { 0 };
        let page = match self.table {
            _ if !self.leaf => 0,
            // The first frame of a large page; none of its bytes is touched.
            1 => RX | LARGE | 6 << 3,
            2 => host.hpa(0) & !0x1f_ffff | RX | LARGE | 6 << 3,
            _ => host.hpa(FRAME) | RX | 6 << 3,
        };
        host.put(self.table, index, page | bit(suppress));
    }
}

fn controlled(host: &Host, machine: &Arc<Machine>, on: bool) -> Cpu {
    let mut cpu = host.cpu(machine);
    cpu.set_ve(on.then(|| VeControl {
        page: Hpa::new(host.hpa(INFO)),
        intercept: false,
    }));
    cpu
}

/// The six fields of the information page.
fn page(host: &Host) -> (u32, u32, u64, u64, u64, u16) {
    let first = host.get(INFO, 0);
    (
        first as u32,
        (first >> 32) as u32,
        host.get(INFO, 1),
        host.get(INFO, 2),
        host.get(INFO, 3),
        host.get(INFO, 4) as u16,
    )
}

fn bools() -> [bool; 2] {
    [false, true]
}

#[test]
fn a_violation_becomes_an_exception_under_exactly_the_conditions_of_the_manual() {
    let mut exceptions = 0;
    for deciding in DECIDING {
        for bits in 0..1u32 << 6 {
            let bit = |n: u32| bits >> n & 1 != 0;
            let (control, suppress, above) = (bit(0), bit(1), bit(2));
            let (protected, delivering, busy) = (bit(3), bit(4), bit(5));
            let host = Host::new(SecondStageKind::Ept);
            let machine = host.machine();
            deciding.plant(&host, suppress, above);
            let mut cpu = controlled(&host, &machine, control);
            let before = if busy { 1 << 32 | 7 } else { 0 };
            host.put(INFO, 0, before);
            let core = &mut cpu.core;
            if protected {
                core.cr0 |= cr0::PE;
            }
            core.delivering = delivering;
            let result = core.store(GPA, 1u8);
            let case = format!("{deciding:?} {bits:06b}");
            if control && !suppress && protected && !delivering && !busy {
                exceptions += 1;
                assert_eq!(fault_of(core, result), (vector::VE, None, None), "{case}");
                let (reason, word, qualification, gla, gpa, index) = page(&host);
                assert_eq!((reason, word, index), (48, u32::MAX, 0), "{case}");
                assert_eq!((gla, gpa), (GPA, GPA), "{case}");
                let qualification = Qualification::from_bits_retain(qualification);
                assert!(qualification.contains(Qualification::WRITE), "{case}");
                let present = qualification.contains(Qualification::ENTRY_READ);
                assert_eq!(present, deciding.leaf, "{case}");
            } else {
                let (gpa, _, _) = violation(exit_of(core, result));
                assert_eq!(gpa, GPA, "{case}");
                assert_eq!(host.get(INFO, 0), before, "{case}");
                assert_eq!(host.get(INFO, 3), 0, "{case}");
            }
        }
    }
    assert_eq!(exceptions, DECIDING.len() * 2);
}

#[test]
fn reads_writes_and_fetches_are_converted_with_what_they_would_have_exited_with() {
    for write in bools() {
        let host = Host::new(SecondStageKind::Ept);
        let machine = host.machine();
        host.put(3, FRAME, SUPPRESS);
        let mut cpu = controlled(&host, &machine, true);
        cpu.core.cr0 |= cr0::PE;
        let access = |core: &mut Core| match write {
            true => core.store(GPA, 1u8),
            false => core.load::<u8>(GPA).map(drop),
        };
        let result = access(&mut cpu.core);
        let (gpa, qualification, gla) = violation(exit_of(&cpu.core, result));
        host.put(3, FRAME, 0);
        let result = access(&mut cpu.core);
        assert_eq!(fault_of(&cpu.core, result).0, vector::VE);
        assert_eq!(
            page(&host),
            (48, u32::MAX, qualification.bits(), gla, gpa, 0)
        );
    }
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    host.put(3, FRAME, 0);
    let mut cpu = controlled(&host, &machine, true);
    cpu.core.cr0 |= cr0::PE;
    let result = cpu.core.exec_place(GPA);
    assert_eq!(fault_of(&cpu.core, result).0, vector::VE);
    let fetched = Qualification::from_bits_retain(host.get(INFO, 1));
    assert!(fetched.contains(Qualification::FETCH | Qualification::FINAL));
}

#[test]
fn the_guests_own_page_walk_is_converted_too() {
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    let mut cpu = host.paged(&machine);
    cpu.set_ve(Some(VeControl {
        page: Hpa::new(host.hpa(INFO)),
        intercept: false,
    }));
    // The frame of the guest's last table.
    host.put(3, 11, 0);
    let result = cpu.core.load::<u8>(0x20_000);
    assert_eq!(fault_of(&cpu.core, result), (vector::VE, None, None));
    let (_, _, qualification, gla, gpa, _) = page(&host);
    let qualification = Qualification::from_bits_retain(qualification);
    assert!(!qualification.contains(Qualification::FINAL));
    assert_eq!((gla, gpa & !0xfff), (0x20_000, 11 << 12));
    assert_eq!(cpu.core.cr2, 0, "#VE does not touch CR2");
}

#[test]
fn a_misconfiguration_is_never_converted() {
    // Write without read; a reserved memory type; write and execute without read.
    for entry in [0b010, 0b111 | 3 << 3, 0b110] {
        for table in 0..4 {
            let malformed = if table == 3 { entry } else { 0b110 };
            let host = Host::new(SecondStageKind::Ept);
            let machine = host.machine();
            host.put(table, if table == 3 { FRAME } else { 0 }, malformed);
            let mut cpu = controlled(&host, &machine, true);
            cpu.core.cr0 |= cr0::PE;
            let result = cpu.core.load::<u8>(GPA);
            let exit = exit_of(&cpu.core, result);
            assert!(
                matches!(
                    exit,
                    Exit::SecondStage(SecondStageFault::EptMisconfiguration { .. })
                ),
                "{exit:?}"
            );
            assert_eq!(host.get(INFO, 0), 0);
        }
    }
}

#[test]
fn an_address_that_no_entry_covers_leaves_the_guest() {
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    let mut cpu = host.paged(&machine);
    cpu.set_ve(Some(VeControl {
        page: Hpa::new(host.hpa(INFO)),
        intercept: false,
    }));
    cpu.core.physical_bits = 52;
    cpu.core.flush_tlb();
    host.put(11, 0x20, 1 << 48 | 7);
    let result = cpu.core.load::<u8>(0x20_000);
    assert_eq!(violation(exit_of(&cpu.core, result)).0, 1 << 48);
}

#[test]
fn an_intercepted_exception_fills_the_page_and_leaves() {
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    host.put(3, FRAME, 0);
    let mut cpu = host.cpu(&machine);
    cpu.set_ve(Some(VeControl {
        page: Hpa::new(host.hpa(INFO)),
        intercept: true,
    }));
    cpu.core.cr0 |= cr0::PE;
    let result = cpu.core.load::<u8>(GPA);
    let Exit::VirtualizationException(info) = exit_of(&cpu.core, result) else {
        panic!("{:?}", cpu.core.exit);
    };
    assert_eq!((info.reason, info.gpa.get(), info.gla), (48, GPA, GPA));
    assert_eq!(page(&host).1, u32::MAX);
    // As long as nobody takes it, violations leave as such.
    let result = cpu.core.load::<u8>(GPA);
    assert_eq!(violation(exit_of(&cpu.core, result)).0, GPA);
    assert_eq!(
        cpu.second_stage_walk(Gpa::new(GPA)),
        [
            (Level::L512G, host.get(0, 0)),
            (Level::L1G, host.get(1, 0)),
            (Level::L2M, host.get(2, 0)),
            (Level::L4K, 0),
        ]
    );
}

#[test]
fn what_was_injected_is_taken_once_and_blocks_the_next_until_then() {
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    let mut cpu = host.cpu(&machine);
    let info = VeInfo::of_instruction(reason::IO, 0x3f8_0000, 2);
    assert_eq!(cpu.inject_ve(&info), Err(VeBusy), "there is no page");
    assert_eq!(cpu.take_ve(), None);
    cpu.set_ve(Some(VeControl {
        page: Hpa::new(host.hpa(INFO)),
        intercept: false,
    }));
    assert_eq!(cpu.take_ve(), None);
    assert_eq!(cpu.inject_ve(&info), Ok(()));
    assert_eq!(cpu.events().exception.map(|e| e.vector), Some(vector::VE));
    let second = VeInfo {
        reason: reason::HLT,
        ..info
    };
    assert_eq!(cpu.inject_ve(&second), Err(VeBusy));
    assert_eq!(cpu.take_ve(), Some(info));
    assert_eq!(cpu.take_ve(), None);
    assert_eq!(cpu.inject_ve(&second), Ok(()));
}
