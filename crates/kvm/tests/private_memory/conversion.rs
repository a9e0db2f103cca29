//! Attributes, accesses of the wrong kind, and conversions.

use super::*;

#[test]
fn row_43_attributes_that_make_no_sense_are_refused() {
    let guest = Protected::new();
    let set = |request| guest.vm.set(KVM_SET_MEMORY_ATTRIBUTES, request);
    let private = KVM_MEMORY_ATTRIBUTE_PRIVATE;
    for (address, size) in [
        (1, PAGE),
        (0, PAGE - 1),
        (0, 0),
        (0_u64.wrapping_sub(PAGE), 2 * PAGE),
        (1 << 51, PAGE),
    ] {
        let refused = set(attributes(address, size, private));
        assert_eq!(refused, Err(Errno::INVAL), "{address:#x} {size:#x}");
    }
    assert_eq!(set(attributes(0, PAGE, 1)), Err(Errno::INVAL));
    let flags = kvm_memory_attributes {
        flags: 1,
        ..attributes(0, PAGE, private)
    };
    assert_eq!(set(flags), Err(Errno::INVAL));
    // As far as addresses go, at any number of ranges.
    assert_eq!(set(attributes((1 << 51) - PAGE, PAGE, private)), Ok(0));
    let check = |fd: &Fd, capability: u32| fd.call(KVM_CHECK_EXTENSION, capability as usize);
    assert_eq!(check(&guest.vm, KVM_CAP_MEMORY_ATTRIBUTES), Ok(8));
    assert_eq!(check(&guest.kvm, KVM_CAP_MEMORY_ATTRIBUTES), Ok(8));
    let plain = guest.kvm.descriptor(KVM_CREATE_VM, 0);
    assert_eq!(check(&plain, KVM_CAP_MEMORY_ATTRIBUTES), Ok(0));
    let refused = plain.set(KVM_SET_MEMORY_ATTRIBUTES, attributes(0, PAGE, private));
    assert_eq!(refused, Err(Errno::INVAL));
}

#[test]
fn row_44_the_two_halves_of_a_page_never_see_each_others_bytes() {
    let guest = Protected::new();
    guest.write(3, 0x1111);
    assert_eq!(guest.shared.read::<u16>(3 * 4096), 0x1111);
    guest.set_private(3, 1, true);
    assert_eq!(guest.read(3), 0, "private memory begins with zeros");
    guest.write(3, 0x2222);
    assert_eq!(guest.shared.read::<u16>(3 * 4096), 0x1111);
    // Private to private, and the neighbours with it.
    guest.set_private(0, PAGES, true);
    assert_eq!(guest.read(3), 0x2222);
    guest.set_private(3, 1, false);
    assert_eq!(guest.read(3), 0x1111);
    guest.shared.write(3 * 4096, 0x3333_u16);
    assert_eq!(guest.read(3), 0x3333);
    // The file has kept its page.
    guest.set_private(3, 1, true);
    assert_eq!(guest.read(3), 0x2222);
    // What the program does to its own memory is of no concern to the private half, and the other
    // way round.
    let change = abi::host_change(guest.shared.start.addr(), guest.shared.length);
    // SAFETY: this test's own memory.
    unsafe {
        rustix::mm::madvise(
            guest.shared.start.cast(),
            guest.shared.length,
            Advice::LinuxDontNeed,
        )
        .unwrap();
    }
    drop(change);
    assert_eq!(guest.read(3), 0x2222);
    guest.shared.write(3 * 4096, 0x4444_u16);
    assert_eq!(guest.fallocate(PUNCH, 3 * PAGE as i64, PAGE as i64), Ok(()));
    assert_eq!(guest.read(3), 0, "a hole reads as zeros");
    guest.set_private(3, 1, false);
    assert_eq!(guest.read(3), 0x4444);
}

#[test]
fn row_46_an_access_of_the_wrong_kind_tells_the_program_which_page_and_which_kind() {
    let guest = Protected::new();
    // A slot without a file.
    let plain = slot(1, DATA, 0, 0, None);
    assert_eq!(guest.vm.set(KVM_SET_USER_MEMORY_REGION2, plain), Ok(0));
    let plain = slot(1, DATA, PAGES, guest.shared.address(), None);
    assert_eq!(guest.vm.set(KVM_SET_USER_MEMORY_REGION2, plain), Ok(0));
    guest.set_private(5, 1, true);
    for program in [WRITE, READ] {
        let result = guest.start(program, 0, 5 * PAGE + 18);
        assert_eq!(result, Err(Errno::FAULT));
        let private = u64::from(KVM_MEMORY_EXIT_FLAG_PRIVATE);
        assert_eq!(guest.memory_fault(), (private, DATA + 5 * PAGE, PAGE));
        let regs: kvm_regs = guest.vcpu.get(KVM_GET_REGS);
        assert_eq!(regs.rip, program, "the access has not happened");
    }
    // The program converts, and the guest goes on where it was.
    guest.set_private(5, 1, false);
    assert_eq!(guest.vcpu.call(KVM_RUN, 0), Ok(0));
    assert_eq!(guest.exit_reason(), KVM_EXIT_HLT);
    // No slot at all.
    let none = slot(1, DATA, 0, 0, None);
    assert_eq!(guest.vm.set(KVM_SET_USER_MEMORY_REGION2, none), Ok(0));
    guest.set_private(6, 1, true);
    assert_eq!(guest.start(READ, 0, 6 * PAGE), Err(Errno::FAULT));
    assert_eq!(guest.memory_fault().1, DATA + 6 * PAGE);
}

#[test]
fn the_guest_asks_for_a_conversion_and_gets_the_programs_answer() {
    let guest = Protected::new();
    let regs = kvm_regs {
        rip: HYPERCALL,
        rax: 12,
        rbx: DATA + 2 * PAGE,
        rcx: 3,
        rdx: 16,
        rflags: 2,
        ..Default::default()
    };
    let call = || {
        assert_eq!(guest.vcpu.set(KVM_SET_REGS, regs), Ok(0));
        guest.vcpu.call(KVM_RUN, 0)
    };
    // Nobody has asked for such exits.
    assert_eq!(call(), Ok(0));
    assert_eq!(guest.exit_reason(), KVM_EXIT_HLT);
    let answer: kvm_regs = guest.vcpu.get(KVM_GET_REGS);
    assert_eq!(answer.rax as u32 as i32, -1000);
    let mut capability = kvm_enable_cap {
        cap: KVM_CAP_EXIT_HYPERCALL,
        ..Default::default()
    };
    capability.args[0] = 1 << 12;
    assert_eq!(guest.vm.set(KVM_ENABLE_CAP, capability), Ok(0));
    assert_eq!(call(), Ok(0));
    assert_eq!(guest.exit_reason(), KVM_EXIT_HYPERCALL);
    assert_eq!(guest.run.read::<u64>(32), 12);
    let arguments: [u64; 3] = guest.run.read(40);
    assert_eq!(arguments, [DATA + 2 * PAGE, 3, 16]);
    guest.set_private(2, 3, true);
    guest.run.write(32 + 8 + 6 * 8, 0_u64);
    assert_eq!(guest.vcpu.call(KVM_RUN, 0), Ok(0));
    assert_eq!(guest.exit_reason(), KVM_EXIT_HLT);
    let answer: kvm_regs = guest.vcpu.get(KVM_GET_REGS);
    assert_eq!(answer.rax, 0);
    guest.write(4, 9);
    assert_eq!(guest.shared.read::<u16>(4 * 4096), 0);
}

/// Several processors' worth of threads: conversions, holes and slots that go while the guest runs. The
/// guest's own values are either there or zeros, never the program's.
#[test]
fn row_47_a_guest_in_a_storm_of_conversions_never_sees_the_other_side() {
    const SHARED: u16 = 0x5151;
    let guest = Protected::new();
    for page in 0..PAGES {
        guest.shared.write((page * PAGE) as usize, SHARED);
    }
    let stop = AtomicBool::new(false);
    let (vm, file, hva) = (
        &guest.vm,
        guest.file.as_ref().unwrap(),
        guest.shared.address(),
    );
    let stopped = &stop;
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for round in 0..400_u64 {
                let page = round * 5 % (PAGES - 4);
                let value = if round % 2 == 0 {
                    KVM_MEMORY_ATTRIBUTE_PRIVATE
                } else {
                    0
                };
                let request = attributes(DATA + page * PAGE, 4 * PAGE, value);
                assert_eq!(vm.set(KVM_SET_MEMORY_ATTRIBUTES, request), Ok(0));
                if round % 3 == 0 {
                    let hole = abi::fallocate(file.0, PUNCH, (page * PAGE) as i64, 4096);
                    assert_eq!(hole, Some(Ok(())));
                }
                if round % 16 == 0 {
                    let region = slot(1, DATA, 0, 0, None);
                    assert_eq!(vm.set(KVM_SET_USER_MEMORY_REGION2, region), Ok(0));
                    let region = slot(1, DATA, PAGES, hva, Some((file, 0)));
                    assert_eq!(vm.set(KVM_SET_USER_MEMORY_REGION2, region), Ok(0));
                }
            }
            stopped.store(true, Ordering::Relaxed);
        });
        let mut page = 0;
        while !stop.load(Ordering::Relaxed) {
            page = (page + 7) % PAGES;
            // The guest never writes; whatever is private is zero.
            match guest.start(READ, 0, page * PAGE) {
                Ok(_) if guest.exit_reason() == KVM_EXIT_HLT => {
                    let regs: kvm_regs = guest.vcpu.get(KVM_GET_REGS);
                    assert!([0, SHARED].contains(&(regs.rax as u16)), "{:#x}", regs.rax);
                }
                // Between deletion and creation of the slot.
                Ok(_) => {
                    assert_eq!(guest.exit_reason(), KVM_EXIT_MMIO);
                    assert_eq!(guest.vcpu.call(KVM_RUN, 0), Ok(0));
                }
                Err(error) => {
                    assert_eq!(error, Errno::FAULT);
                    guest.memory_fault();
                }
            }
        }
    });
    for page in 0..PAGES {
        assert_eq!(guest.shared.read::<u16>((page * PAGE) as usize), SHARED);
    }
}
