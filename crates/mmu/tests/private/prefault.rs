//! Mapping memory before it is used.

use super::*;

/// Acceptance rows 28 and 34.
#[test]
fn a_prefaulted_range_is_mapped_by_attribute_and_nothing_faults_in_it() {
    let mut vm = vm::<Ept>();
    vm.private_slot(0, 0, 3000);
    vm.set(700..1500, true);
    vm.set(1501..1502, true);
    assert_eq!(vm.prefault_all(5..2990), Ok(()));
    for gfn in 0..3000 {
        let private = (700..1500).contains(&gfn) || gfn == 1501;
        let expected = match gfn {
            0..5 | 2990.. => Found::Nothing,
            _ if private => private_page(gfn),
            _ => shared_page(gfn),
        };
        assert_eq!(vm.found(gfn), expected, "{gfn}");
    }
    assert_eq!(vm.mmu.stats().pages_4k, 2985);
}

/// Acceptance row 31.
#[test]
fn prefaulting_again_changes_nothing_and_each_root_has_its_own_slots() {
    let mut vm = vm::<Ept>();
    vm.slot(0, 0, 100, 0);
    vm.slot(1 << 16, 0, 50, 0);
    assert_eq!(vm.prefault_all(0..100), Ok(()));
    // From here on the reader has spare pages for tables at hand.
    assert_eq!(vm.prefault_all(0..100), Ok(()));
    let before = (
        vm.world.live_tables.load(Ordering::Relaxed),
        vm.world.flushes.load(Ordering::Relaxed),
    );
    for _ in 0..5 {
        assert_eq!(vm.prefault_all(0..100), Ok(()));
    }
    let after = (
        vm.world.live_tables.load(Ordering::Relaxed),
        vm.world.flushes.load(Ordering::Relaxed),
    );
    assert_eq!(before, after);
    let smm = RootRole {
        smm: true,
        ..RootRole::NORMAL
    };
    let smm = vm.mmu.load_root(smm).unwrap();
    let normal = std::mem::replace(&mut vm.root, smm);
    assert_eq!(vm.prefault_all(0..50), Ok(()));
    assert_eq!(vm.prefault_all(50..51), Err(PrefaultError::NoSlot));
    assert_eq!(vm.found(49), shared_page(49));
    vm.root = normal;
    assert_eq!(vm.found(99), shared_page(99));
}

/// Acceptance row 32.
#[test]
fn a_prefaulted_page_is_neither_accessed_nor_dirty_nor_marked() {
    fn entry(vm: &Vm<Ept>, gfn: u64) -> u64 {
        let mut table = vm.root.hpa();
        for level in [Level::L512G, Level::L1G, Level::L2M] {
            let entry = vm.world.entry(table, level.index(Gfn::new(gfn)));
            table = twofold_arch::Hpa::new(entry.load(Ordering::Acquire) & 0xf_ffff_ffff_f000);
        }
        let entry = vm.world.entry(table, (gfn % 512) as usize);
        entry.load(Ordering::Acquire)
    }
    const ACCESSED_DIRTY: u64 = 1 << 8 | 1 << 9;
    let mut vm = vm::<Ept>();
    vm.slot(0, 0, 64, 0);
    vm.slot(1, 64, 64, LOG);
    assert_eq!(vm.prefault_all(0..128), Ok(()));
    for gfn in 0..128 {
        assert_eq!(entry(&vm, gfn) & ACCESSED_DIRTY, 0, "{gfn}");
    }
    // The first write to a logged page is still noticed.
    assert_eq!(
        vm.found(64),
        Found::Page {
            frame: usual_frame(HVA + 64 * PAGE),
            write: false,
            level: Level::L4K
        }
    );
    let mut bitmap = [0];
    vm.mmu.dirty_log_get(0, 1, &mut bitmap).unwrap();
    assert_eq!(bitmap, [0]);
    assert_eq!(vm.fault(70, Pferr::WRITE.union(Pferr::PRESENT)), FIXED);
    vm.mmu.dirty_log_get(0, 1, &mut bitmap).unwrap();
    assert_eq!(bitmap, [1 << 6]);
}

#[test]
fn a_prefault_uses_huge_pages_where_a_fault_would() {
    let mut vm = vm::<Ept>();
    *vm.world.level_if_asked.lock().unwrap() = Level::L2M;
    vm.slot(0, 0, 2048, 0);
    vm.set(600..601, true);
    let outcome = vm.prefault_all(0..2048);
    // Without a private half one page cannot be mapped; what is before it was.
    assert_eq!(
        outcome,
        Err(PrefaultError::Fault(FaultError::WrongKind {
            private: true
        }))
    );
    let level = |gfn| match vm.found(gfn) {
        Found::Page { level, .. } => Some(level),
        _ => None,
    };
    assert_eq!(level(511), Some(Level::L2M));
    assert_eq!(level(599), Some(Level::L4K));
    assert_eq!(level(600), None);
}

#[test]
fn prefaulting_a_slot_that_is_being_deleted_asks_to_try_again() {
    let world = World::new(0x1000_0000_0000);
    let config = Config {
        slot_zap_all: false,
        ..Config::default()
    };
    let mmu = Arc::new(Mmu::<Ept, _>::new(TestHost(Arc::clone(&world)), config));
    mmu.set_region(region(0, 1, 4, HVA >> 12, 0)).unwrap();
    let root = mmu.load_root(RootRole::NORMAL).unwrap();
    let mut reader = mmu.reader();
    assert_eq!(mmu.prefault(&mut reader, &root, gfns(1..2)), Ok(1));
    // The deletion flushes what was mapped. At that moment the slot is there and invalid.
    let answer = Arc::new(Mutex::new(None));
    let (other, asked) = (Arc::clone(&mmu), Arc::clone(&answer));
    let others = Mutex::new((mmu.reader(), root.clone()));
    *world.on_flush.lock().unwrap() = Some(Arc::new(move || {
        let (reader, root) = &mut *others.lock().unwrap();
        *asked.lock().unwrap() = Some(other.prefault(reader, root, gfns(2..3)));
    }));
    mmu.set_region(region(0, 1, 0, HVA >> 12, 0)).unwrap();
    *world.on_flush.lock().unwrap() = None;
    let during = answer.lock().unwrap().take();
    assert_eq!(during, Some(Err(PrefaultError::SlotChanges)));
    let after = mmu.prefault(&mut reader, &root, gfns(2..3));
    assert_eq!(after, Err(PrefaultError::NoSlot));
}

#[test]
fn prefaulting_stops_where_host_memory_does() {
    let mut vm = vm::<Ept>();
    vm.slot(0, 0, 64, 0);
    let state = HostState {
        frame: 0,
        present: false,
        writable: false,
    };
    vm.world
        .memory
        .lock()
        .unwrap()
        .insert((HVA >> 12) + 40, state);
    let done = vm.mmu.prefault(&mut vm.reader, &vm.root, gfns(0..64));
    assert_eq!(done, Ok(40));
    let next = vm.mmu.prefault(&mut vm.reader, &vm.root, gfns(40..64));
    assert_eq!(next, Err(PrefaultError::Fault(FaultError::BadHostMemory)));
}
