//! The calls: what they answer, and what they refuse before anything has changed.

use super::*;

const FULL: u32 = KVM_SUBPAGE_FULL_ACCESS;

fn set_raw(vm: &Fd, words: &[u32]) -> Result<i32, Errno> {
    vm.call(KVM_SUBPAGES_SET_ACCESS, words.as_ptr().addr())
}

fn get_raw(vm: &Fd, words: &mut [u32]) -> Result<i32, Errno> {
    vm.call(KVM_SUBPAGES_GET_ACCESS, words.as_mut_ptr().addr())
}

#[test]
fn row_1_the_capability_tells_the_limit_and_nothing_works_before_it_is_enabled() {
    let kvm = Fd::open();
    let vm = kvm.descriptor(KVM_CREATE_VM, 0);
    for fd in [&kvm, &vm] {
        let found = fd.call(KVM_CHECK_EXTENSION, KVM_CAP_X86_SPP as usize);
        assert_eq!(found, Ok(KVM_SUBPAGE_MAX_PAGES as i32));
        // The number that the old patches used is another capability's.
        assert_eq!(
            fd.call(KVM_CHECK_EXTENSION, KVM_CAP_HALT_POLL as usize),
            Ok(0)
        );
    }
    // Whatever the request holds.
    let missing = Err(Errno::NODEV);
    assert_eq!(set_raw(&vm, &request(0, 0, 0, &[])), missing);
    assert_eq!(set_raw(&vm, &request(0, 513, 1, &[])), missing);
    assert_eq!(get_raw(&vm, &mut request(0, 1, 0, &[0])), missing);
    assert_eq!(enable(&vm, KVM_CAP_X86_SPP, 1), Err(Errno::INVAL));
    assert_eq!(set_raw(&vm, &request(0, 0, 0, &[])), missing);
    assert_eq!(enable(&vm, KVM_CAP_X86_SPP, 0), Ok(0));
    assert_eq!(enable(&vm, KVM_CAP_X86_SPP, 0), Ok(0), "again");
    assert_eq!(set_raw(&vm, &request(0, 0, 0, &[])), Ok(0));
}

#[test]
fn d10_enabling_before_there_are_vcpus_or_slots_protects_what_comes_later() {
    let guarded = Guarded::with(
        |vm| assert_eq!(set_access(vm, DATA >> 12, &[0]), Err(Errno::FAULT)),
        0,
    );
    assert_eq!(guarded.maps(0, 2), [FULL, FULL]);
    guarded.protect(0, &[1]);
    assert_eq!(guarded.store(DATA + 0x80, 1), denied(DATA + 0x80, 3));
    assert_eq!(guarded.store(DATA, 1), End::Halt);
}

#[test]
fn d11_a_vcpu_that_has_run_before_and_one_that_is_made_later_both_obey() {
    let guest = Guest::new(&[0x88, 0x07, 0xf4]); // mov [bx], al; hlt
    let store = |guest: &Guest, address| {
        guest.start();
        guest.set_regs(|regs| regs.rbx = address);
        guest.run().unwrap()
    };
    assert_eq!(store(&guest, 0x2080), KVM_EXIT_HLT);
    assert_eq!(enable(&guest.vm, KVM_CAP_X86_SPP, 0), Ok(0));
    assert_eq!(set_access(&guest.vm, 2, &[1]), Ok(1));
    assert_eq!(store(&guest, 0x2000), KVM_EXIT_HLT, "permitted, first");
    assert_eq!(store(&guest, 0x2080), KVM_EXIT_SPP);
    let vcpu = guest.vm.descriptor(KVM_CREATE_VCPU, 1);
    let run = Memory::of_vcpu(&vcpu);
    let regs: kvm_regs = guest.vcpu.get(KVM_GET_REGS);
    let sregs: kvm_sregs = guest.vcpu.get(KVM_GET_SREGS);
    assert_eq!(vcpu.set(KVM_SET_SREGS, sregs), Ok(0));
    assert_eq!(vcpu.set(KVM_SET_REGS, regs), Ok(0));
    assert_eq!(vcpu.call(KVM_RUN, 0), Ok(0));
    assert_eq!(run.read::<u32>(8), KVM_EXIT_SPP);
    assert_eq!(run.read::<u64>(32), 0x2080);
}

#[test]
fn maps_are_read_back_as_they_were_set_and_full_at_first() {
    let guarded = Guarded::new();
    assert_eq!(guarded.maps(0, PAGES as usize), [FULL; PAGES as usize]);
    let maps: Vec<u32> = (0..PAGES as u32)
        .map(|page| page.wrapping_mul(0x9e37_79b9))
        .collect();
    guarded.protect(0, &maps);
    assert_eq!(guarded.maps(0, PAGES as usize), maps);
    guarded.protect(3, &[7, FULL]);
    let mut expected = maps;
    (expected[3], expected[4]) = (7, FULL);
    assert_eq!(guarded.maps(0, PAGES as usize), expected);
    let mut none = request(DATA >> 12, 0, 0, &[]);
    assert_eq!(get_raw(&guarded.vm, &mut none), Ok(0));
}

#[test]
fn a_request_that_makes_no_sense_is_refused_and_changes_nothing() {
    let guarded = Guarded::new();
    let vm = &guarded.vm;
    let gfn = DATA >> 12;
    let before = [1, 2, 3];
    guarded.protect(0, &before);
    let maps = vec![0; 513];
    let invalid = Err(Errno::INVAL);
    for (first, pages, flags, expected) in [
        (gfn, 3, 1, invalid),
        (gfn, 3, 1 << 31, invalid),
        (gfn, 513, 0, invalid),
        (gfn, u32::MAX, 0, invalid),
        // D4: the range wraps, or ends above what the table can describe.
        (u64::MAX, 2, 0, invalid),
        (u64::MAX - 1, 1, 0, invalid),
        (u64::MAX - 511, 512, 0, invalid),
        ((1 << 36) - 1, 2, 0, invalid),
        (1 << 36, 1, 0, invalid),
        (1 << 52, 1, 0, invalid),
        // No slot: in front, behind, everywhere.
        (gfn - 1, 3, 0, Err(Errno::FAULT)),
        (gfn + PAGES - 1, 2, 0, Err(Errno::FAULT)),
        ((1 << 36) - 1, 1, 0, Err(Errno::FAULT)),
        // What is wrong with the request comes before what is wrong with memory.
        (1 << 40, 513, 0, invalid),
        (gfn, 0, 1, invalid),
    ] {
        let mut words = request(first, pages, flags, &maps);
        let name = format!("{first:#x}, {pages} pages, flags {flags}");
        assert_eq!(set_raw(vm, &words), expected, "{name}");
        assert_eq!(get_raw(vm, &mut words), expected, "{name}");
        assert_eq!(&words[4..], &maps, "{name}: nothing was written");
        assert_eq!(guarded.maps(0, 3), before, "{name}");
    }
    assert_eq!(
        set_raw(vm, &request(u64::MAX, 0, 0, &[])),
        Ok(0),
        "of no page"
    );
}

#[test]
fn requests_that_cannot_be_read_or_written_are_faults_and_change_nothing() {
    let guarded = Guarded::new();
    let vm = &guarded.vm;
    guarded.protect(0, &[1, 2]);
    let page = Memory::new(8192);
    // SAFETY: this memory is the test's own.
    unsafe {
        let second = page.start.add(4096).cast();
        rustix::mm::mprotect(second, 4096, rustix::mm::MprotectFlags::empty()).unwrap();
    }
    let fault = Err(Errno::FAULT);
    for call in [KVM_SUBPAGES_SET_ACCESS, KVM_SUBPAGES_GET_ACCESS] {
        assert_eq!(vm.call(call, 0), fault);
        assert_eq!(vm.call(call, usize::MAX - 7), fault);
        // The header ends where memory does; so do the maps, after the first.
        for at in [4096 - 8, 4096 - 16, 4096 - 20] {
            let words = request(DATA >> 12, 2, 0, &[9]);
            for (index, word) in words.iter().enumerate() {
                if at + index * 4 < 4096 {
                    page.write(at + index * 4, *word);
                }
            }
            assert_eq!(vm.call(call, page.start.addr() + at), fault, "at {at}");
            assert_eq!(guarded.maps(0, 2), [1, 2]);
        }
    }
}

#[test]
fn d12_pages_that_the_program_adds_after_the_header_was_read_do_not_count() {
    let guarded = Guarded::new();
    let words = Memory::new(4096);
    let header = request(DATA >> 12, 1, 0, &[FULL; 512]);
    for (index, word) in header.iter().enumerate() {
        words.write(index * 4, *word);
    }
    let stop = std::sync::atomic::AtomicBool::new(false);
    let place = words.start.expose_provenance();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // The count of pages changes all the time, to more than there are.
            let pages = std::ptr::with_exposed_provenance_mut::<u32>(place + 8);
            let mut count = 1;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                count = if count == 1 { 5000 } else { 1 };
                // SAFETY: the memory lives as long as this scope.
                unsafe { pages.write_volatile(count) };
            }
        });
        for _ in 0..2000 {
            let result = guarded.vm.call(KVM_SUBPAGES_SET_ACCESS, place);
            assert!(matches!(result, Ok(1) | Err(Errno::INVAL)), "{result:?}");
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

fn cpuid(leaves: &[(u32, u32)]) -> Vec<u32> {
    let mut words = vec![leaves.len() as u32, 0];
    for (leaf, ecx) in leaves {
        words.extend_from_slice(&[*leaf, 0, 0, 0, 0, *ecx, 0, 0, 0, 0]);
    }
    words
}

#[test]
fn d27_a_vm_has_sub_pages_or_nested_virtualization_as_its_own_cpuid_tables_say() {
    let set =
        |vcpu: &Fd, leaves: &[(u32, u32)]| vcpu.call(KVM_SET_CPUID2, cpuid(leaves).as_ptr().addr());
    const VMX: (u32, u32) = (1, 1 << 5);
    const SVM: (u32, u32) = (0x8000_0001, 1 << 2);
    let kvm = Fd::open();
    for nested in [VMX, SVM] {
        let vm = kvm.descriptor(KVM_CREATE_VM, 0);
        let plain = vm.descriptor(KVM_CREATE_VCPU, 0);
        let offering = vm.descriptor(KVM_CREATE_VCPU, 1);
        assert_eq!(set(&plain, &[(1, !(1 << 5)), (0x8000_0001, 1)]), Ok(0));
        assert_eq!(set(&offering, &[nested]), Ok(0));
        assert_eq!(enable(&vm, KVM_CAP_X86_SPP, 0), Err(Errno::PERM));
        assert_eq!(set_raw(&vm, &request(0, 0, 0, &[])), Err(Errno::NODEV));
        // Another VM of this machine is not concerned.
        let other = kvm.descriptor(KVM_CREATE_VM, 0);
        assert_eq!(enable(&other, KVM_CAP_X86_SPP, 0), Ok(0));
        // It is no more, once no vCPU offers it.
        assert_eq!(set(&offering, &[(1, 0)]), Ok(0));
        assert_eq!(enable(&vm, KVM_CAP_X86_SPP, 0), Ok(0));
        assert_eq!(set(&plain, &[nested]), Err(Errno::PERM));
        assert_eq!(set(&plain, &[(1, 1)]), Ok(0));
    }
}

#[test]
fn row_13_private_memory_is_refused() {
    let kvm = Fd::open();
    let vm = kvm.descriptor(KVM_CREATE_VM, KVM_X86_SW_PROTECTED_VM as usize);
    assert_eq!(enable(&vm, KVM_CAP_X86_SPP, 0), Ok(0));
    let memory = Memory::new((PAGES * PAGE) as usize);
    let slot = region(0, DATA, PAGES * PAGE, memory.address());
    assert_eq!(vm.set(KVM_SET_USER_MEMORY_REGION, slot), Ok(0));
    let gfn = DATA >> 12;
    let attributes = |private| kvm_memory_attributes {
        address: DATA + 2 * PAGE,
        size: PAGE,
        attributes: if private { 8 } else { 0 },
        flags: 0,
    };
    let all = [0; 4];
    assert_eq!(vm.set(KVM_SET_MEMORY_ATTRIBUTES, attributes(true)), Ok(0));
    assert_eq!(set_access(&vm, gfn, &all), Err(Errno::INVAL));
    assert_eq!(get_access(&vm, gfn, 4), Ok(vec![FULL; 4]), "none of them");
    assert_eq!(set_access(&vm, gfn, &all[..2]), Ok(2));
    assert_eq!(vm.set(KVM_SET_MEMORY_ATTRIBUTES, attributes(false)), Ok(0));
    assert_eq!(set_access(&vm, gfn, &all), Ok(4));
}

#[test]
fn row_9_maps_are_those_of_the_address_space_that_vcpus_use() {
    let guarded = Guarded::new();
    // The second address space is that of system management mode, which no vCPU enters here: a slot
    // of it shows no guest memory around the maps of the first, and has none that a call reaches.
    let at = DATA + 64 * PAGE;
    for (number, gpa) in [(1 << 16, DATA), (1 << 16 | 1, at)] {
        let slot = region(number, gpa, 2 * PAGE, guarded.data.address());
        assert_eq!(guarded.vm.set(KVM_SET_USER_MEMORY_REGION, slot), Ok(0));
    }
    guarded.protect(0, &[0b1]);
    assert_eq!(guarded.store(DATA, 1), End::Halt);
    assert_eq!(guarded.store(DATA + 0x80, 1), denied(DATA + 0x80, 3));
    assert_eq!(guarded.store(at + 0x80, 1), End::Other(KVM_EXIT_MMIO));
    assert_eq!(set_access(&guarded.vm, at >> 12, &[0]), Err(Errno::FAULT));
}

#[test]
fn row_12_slots_that_come_later_have_maps_and_a_slot_that_goes_takes_only_its_own() {
    let guarded = Guarded::new();
    guarded.protect(0, &[0; 4]);
    let more = Memory::new((PAGES * PAGE) as usize);
    let at = DATA + 2 * PAGES * PAGE;
    let slot = |size| region(2, at, size, more.address());
    assert_eq!(set_access(&guarded.vm, at >> 12, &[0]), Err(Errno::FAULT));
    assert_eq!(
        guarded
            .vm
            .set(KVM_SET_USER_MEMORY_REGION, slot(PAGES * PAGE)),
        Ok(0)
    );
    assert_eq!(set_access(&guarded.vm, at >> 12, &[0]), Ok(1));
    assert_eq!(guarded.store(at, 1), denied(at, 3));
    assert_eq!(guarded.store(DATA, 1), denied(DATA, 3));
    // D26: one slot goes, and the other stays as it was.
    assert_eq!(guarded.vm.set(KVM_SET_USER_MEMORY_REGION, slot(0)), Ok(0));
    assert_eq!(guarded.maps(0, 5), [0, 0, 0, 0, FULL]);
    assert_eq!(guarded.store(DATA + PAGE, 1), denied(DATA + PAGE, 3));
    assert_eq!(set_access(&guarded.vm, at >> 12, &[0]), Err(Errno::FAULT));
    // D25: and what comes back has maps, which are full: they went with the slot.
    assert_eq!(
        guarded
            .vm
            .set(KVM_SET_USER_MEMORY_REGION, slot(PAGES * PAGE)),
        Ok(0)
    );
    assert_eq!(get_access(&guarded.vm, at >> 12, 1), Ok(vec![FULL]));
    assert_eq!(guarded.store(at, 7), End::Halt);
    assert_eq!(set_access(&guarded.vm, at >> 12, &[0]), Ok(1));
    assert_eq!(guarded.store(at, 8), denied(at, 3));
    assert_eq!(more.read::<u64>(0), 7);
}
