//! Page-modification logging, and second-stage tables without accessed and dirty flags.

use super::*;

const DIRTY: u64 = EptFlags::DIRTY.bits();
const ACCESSED: u64 = EptFlags::ACCESSED.bits();
/// The page that holds the log; the guest never touches its frame.
const LOG: usize = 63;

/// What was logged since the log was empty, in order.
fn logged(host: &Host, cpu: &Cpu) -> Vec<u64> {
    let next = cpu.pml_index().unwrap();
    let first = usize::from(next.wrapping_add(1));
    (first..512).rev().map(|i| host.get(LOG, i)).collect()
}

fn logging(host: &Host, machine: &Arc<Machine>) -> Cpu {
    let mut cpu = host.paged(machine);
    cpu.set_pml(Some(Pml::empty(Hpa::new(host.hpa(LOG)))));
    cpu
}

/// As the hypervisor does after it cleared dirty flags.
fn flush(machine: &Machine, cpu: &mut Cpu) {
    machine.flush_tlbs();
    cpu.core.line.enter();
    assert!(!cpu.core.serve_requests());
    cpu.core.line.leave();
}

#[test]
fn each_page_that_becomes_dirty_is_logged_once_guest_tables_too() {
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    let mut cpu = logging(&host, &machine);
    cpu.core.load::<u8>(0x20_123).unwrap();
    let tables = [8 << 12, 9 << 12, 10 << 12, 11 << 12];
    assert_eq!(logged(&host, &cpu), tables, "a read is not logged");
    cpu.core.store(0x20_123, 1u8).unwrap();
    cpu.core.store(0x20_456, 1u8).unwrap();
    cpu.core.store(0x21_ffc, 1u64).unwrap();
    let all = [&tables[..], &[0x20_000, 0x21_000, 0x22_000]].concat();
    assert_eq!(logged(&host, &cpu), all);
    assert_eq!(cpu.pml_index(), Some(511 - 7));
    // The hypervisor takes the log and clears the flags.
    for frame in FRAMES..LOG {
        host.put(3, frame, host.get(3, frame) & !DIRTY);
    }
    cpu.set_pml(Some(Pml::empty(Hpa::new(host.hpa(LOG)))));
    flush(&machine, &mut cpu);
    cpu.core.store(0x21_000, 1u8).unwrap();
    assert_eq!(logged(&host, &cpu), [&tables[..], &[0x21_000]].concat());
}

#[test]
fn a_full_log_stops_the_access_before_it_changes_anything() {
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    let mut cpu = logging(&host, &machine);
    cpu.core.load::<u8>(0x20_000).unwrap();
    let page = Hpa::new(host.hpa(LOG));
    cpu.set_pml(Some(Pml { page, index: 0 }));
    cpu.core.store(0x20_000, 1u8).unwrap();
    assert_eq!(host.get(LOG, 0), 0x20_000, "the last entry is one");
    assert_eq!(
        cpu.pml(),
        Some(Pml {
            page,
            index: 0xffff
        })
    );
    for index in [0xffff, 512] {
        cpu.set_pml(Some(Pml { page, index }));
        let before = host.get(3, 0x21);
        let result = cpu.core.store(0x21_000, 7u8);
        assert_eq!(exit_of(&cpu.core, result), Exit::PmlFull);
        let result = cpu.core.rmw::<u32>(0x21_000, true, |_| 7);
        assert_eq!(exit_of(&cpu.core, result), Exit::PmlFull);
        assert_eq!(host.get(3, 0x21), before, "not even accessed");
        assert_eq!(host.get(0x21, 0), 0);
        // Whatever needs no entry goes on.
        cpu.core.store(0x20_008, 1u8).unwrap();
        assert_eq!(cpu.core.load::<u8>(0x22_000), Ok(0));
        host.put(3, 0x22, host.get(3, 0x22) & !ACCESSED);
    }
    cpu.set_pml(Some(Pml::empty(page)));
    cpu.core.store(0x21_000, 7u8).unwrap();
    assert_eq!(logged(&host, &cpu), [0x21_000]);
    assert_eq!(host.get(0x21, 0), 7);
}

#[test]
fn a_large_leaf_is_logged_once_with_the_page_that_was_written() {
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    let mut cpu = logging(&host, &machine);
    // The first 2 MiB of guest frames as one leaf; host pages are 2 MiB aligned by name only.
    host.put(2, 0, BASE | host.leaf() | 1 << 7);
    cpu.core.flush_all();
    // The walk itself makes the leaf dirty: the root of the guest's tables is what it reads first.
    cpu.core.store(0x25_678, 1u8).unwrap();
    cpu.core.store(0x26_678, 1u8).unwrap();
    assert_eq!(logged(&host, &cpu), [8 << 12]);
    host.put(2, 0, host.get(2, 0) & !DIRTY);
    cpu.core.cr0 = 0;
    cpu.core.cr4 = 0;
    cpu.core.efer = 0;
    cpu.core.flush_all();
    cpu.core.store(0x25_678, 1u8).unwrap();
    cpu.core.store(0x26_678, 1u8).unwrap();
    assert_eq!(logged(&host, &cpu), [8 << 12, 0x25_000]);
}

#[test]
fn nothing_is_marked_or_logged_without_accessed_and_dirty_flags() {
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    let mut cpu = logging(&host, &machine);
    let root = Hpa::new(host.hpa(0));
    cpu.set_second_stage(SecondStage::Ept(Eptp::new(root, Level::L512G, false)));
    cpu.core.store(0x20_000, 1u8).unwrap();
    assert_eq!(logged(&host, &cpu), []);
    for (page, index) in [(0, 0), (1, 0), (2, 0), (3, 8), (3, 11), (3, 0x20)] {
        assert_eq!(host.get(page, index) & (ACCESSED | DIRTY), 0);
    }
    // Reading a guest table is a read, setting a flag in it a write.
    use Qualification as Q;
    let read_only = (EptFlags::READ | EptFlags::EXECUTE).bits() | 6 << 3;
    host.put(3, 11, host.hpa(11) | read_only);
    host.put(11, 0x21, 0x21 << 12 | 0x27);
    cpu.core.flush_all();
    cpu.core.load::<u8>(0x21_000).unwrap();
    let result = cpu.core.load::<u8>(0x22_000);
    let place = (11 << 12) | (0x22 * 8);
    let allowed = Q::ENTRY_READ | Q::ENTRY_EXECUTE;
    assert_eq!(
        violation(exit_of(&cpu.core, result)),
        (place, Q::WRITE | allowed | Q::LINEAR_VALID, 0x22_000)
    );
    host.put(3, 11, 0);
    cpu.core.flush_all();
    let result = cpu.core.load::<u8>(0x22_000);
    assert_eq!(
        violation(exit_of(&cpu.core, result)),
        (place, Q::READ | Q::LINEAR_VALID, 0x22_000)
    );
}

#[test]
fn amds_tables_are_not_logged() {
    let host = Host::new(SecondStageKind::Npt);
    let machine = host.machine();
    let mut cpu = logging(&host, &machine);
    cpu.core.store(0x20_000, 1u8).unwrap();
    assert_eq!(logged(&host, &cpu), []);
    let page = Hpa::new(host.hpa(LOG));
    cpu.set_pml(Some(Pml { page, index: 512 }));
    cpu.core.store(0x21_000, 1u8).unwrap();
}
