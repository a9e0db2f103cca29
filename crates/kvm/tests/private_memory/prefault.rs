//! `KVM_PRE_FAULT_MEMORY`.

use super::*;

#[test]
fn row_28_the_guest_touches_what_was_prefaulted_without_an_exit() {
    let guest = Protected::new();
    guest.set_private(4, 4, true);
    let all = guest.prefault(DATA, PAGES * PAGE);
    assert_eq!(all, (Ok(0), DATA + PAGES * PAGE, 0));
    assert_eq!(guest.read(0), 0);
    let before = guest.vcpu.counter("pf_taken");
    for page in 4..8 {
        guest.write(page, 7);
    }
    for page in 0..PAGES {
        let expected = if (4..8).contains(&page) { 7 } else { 0 };
        assert_eq!(guest.read(page), expected);
    }
    assert_eq!(guest.vcpu.counter("pf_taken"), before);
}

#[test]
fn row_29_what_comes_before_a_hole_is_mapped_and_the_second_call_says_that_there_is_one() {
    let guest = Protected::new();
    let end = DATA + PAGES * PAGE;
    let first = guest.prefault(end - 3 * PAGE, 8 * PAGE);
    assert_eq!(first, (Ok(0), end, 5 * PAGE));
    assert_eq!(
        guest.prefault(end, 5 * PAGE),
        (Err(Errno::NOENT), end, 5 * PAGE)
    );
}

#[test]
fn row_30_a_prefault_that_makes_no_sense_is_refused_and_changes_nothing() {
    let guest = Protected::new();
    for (gpa, size) in [
        (DATA + 1, PAGE),
        (DATA, PAGE + 1),
        (DATA, 0),
        (0_u64.wrapping_sub(PAGE), 2 * PAGE),
        (0_u64.wrapping_sub(PAGE), PAGE),
    ] {
        assert_eq!(guest.prefault(gpa, size), (Err(Errno::INVAL), gpa, size));
    }
    let mut flags = kvm_pre_fault_memory {
        gpa: DATA,
        size: PAGE,
        flags: 1,
        ..Default::default()
    };
    let refused = guest.vcpu.with(KVM_PRE_FAULT_MEMORY, &mut flags);
    assert_eq!(refused, Err(Errno::INVAL));
    assert_eq!(guest.vcpu.call(KVM_PRE_FAULT_MEMORY, 8), Err(Errno::FAULT));
    // Private, and no file behind the slot of the code.
    let request = attributes(CODE, PAGE, KVM_MEMORY_ATTRIBUTE_PRIVATE);
    assert_eq!(guest.vm.set(KVM_SET_MEMORY_ATTRIBUTES, request), Ok(0));
    assert_eq!(guest.prefault(CODE, PAGE).0, Err(Errno::FAULT));
    // Host memory that cannot be read.
    let forbidden = slot(2, 1 << 30, 1, 0x1000, None);
    assert_eq!(guest.vm.set(KVM_SET_USER_MEMORY_REGION2, forbidden), Ok(0));
    assert_eq!(
        guest.prefault(1 << 30, PAGE),
        (Err(Errno::FAULT), 1 << 30, PAGE)
    );
    assert_ne!(
        guest
            .vm
            .call(KVM_CHECK_EXTENSION, KVM_CAP_PRE_FAULT_MEMORY as usize),
        Ok(0)
    );
}

extern "C" fn interrupt(_: libc::c_int) {
    abi::interrupt_current_run();
}

#[test]
fn row_30_a_signal_ends_a_prefault_and_what_was_done_counts() {
    let guest = Protected::new();
    const GIB: u64 = 1 << 30;
    let memory = Memory::new(GIB as usize);
    let region = slot(3, 4 * GIB, GIB / PAGE, memory.address(), None);
    assert_eq!(guest.vm.set(KVM_SET_USER_MEMORY_REGION2, region), Ok(0));
    // SAFETY: the handler is async-signal-safe.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = interrupt as *const () as usize;
        assert_eq!(
            libc::sigaction(libc::SIGUSR2, &action, std::ptr::null_mut()),
            0
        );
    }
    // SAFETY: no preconditions.
    let this = unsafe { libc::pthread_self() };
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                std::thread::sleep(std::time::Duration::from_micros(500));
                // SAFETY: the thread waits for this one.
                unsafe { libc::pthread_kill(this, libc::SIGUSR2) };
            }
        });
        let (mut gpa, mut size, mut interruptions) = (4 * GIB, GIB, 0);
        while size != 0 {
            let (result, next, left) = guest.prefault(gpa, size);
            match result {
                Ok(_) => assert!(left < size && next == gpa + (size - left)),
                Err(error) => assert_eq!((error, next, left), (Errno::INTR, gpa, size)),
            }
            interruptions += u32::from(left != 0);
            (gpa, size) = (next, left);
        }
        done.store(true, Ordering::Relaxed);
        assert!(interruptions > 0, "a gigabyte in half a millisecond");
    });
}

#[test]
fn row_32_a_prefault_breaks_no_copy_on_write_and_marks_nothing() {
    let guest = Protected::with_type(KVM_X86_DEFAULT_VM);
    let file = rustix::fs::memfd_create("source", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, PAGE).unwrap();
    rustix::io::pwrite(&file, b"before", 0).unwrap();
    // SAFETY: a private mapping of the file over this test's own page.
    unsafe {
        rustix::mm::mmap(
            guest.shared.start.cast(),
            PAGE as usize,
            rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE,
            rustix::mm::MapFlags::PRIVATE | rustix::mm::MapFlags::FIXED,
            &file,
            0,
        )
        .unwrap();
    }
    let mut region = slot(1, DATA, PAGES, guest.shared.address(), None);
    region.flags = KVM_MEM_LOG_DIRTY_PAGES;
    assert_eq!(guest.vm.set(KVM_SET_USER_MEMORY_REGION2, region), Ok(0));
    assert_eq!(guest.prefault(DATA, PAGES * PAGE).0, Ok(0));
    rustix::io::pwrite(&file, b"after!", 0).unwrap();
    assert_eq!(
        &guest.shared.read::<[u8; 6]>(0),
        b"after!",
        "a copy was made"
    );
    // Nobody has written to the others, so they are the kernel's page of zeros: not this
    // process's own.
    let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
    let mut entry = [0; 8];
    let offset = guest.shared.address() / PAGE * 8 + 8;
    std::os::unix::fs::FileExt::read_exact_at(&pagemap, &mut entry, offset).unwrap();
    let entry = u64::from_le_bytes(entry);
    assert_eq!((entry >> 63, entry >> 56 & 1), (1, 0), "{entry:#x}");
    let mut bitmap = [u64::MAX];
    let mut log = kvm_dirty_log {
        slot: 1,
        ..Default::default()
    };
    log.__bindgen_anon_1.padding2 = bitmap.as_mut_ptr().addr() as u64;
    assert_eq!(guest.vm.set(KVM_GET_DIRTY_LOG, log), Ok(0));
    assert_eq!(bitmap, [0]);
    guest.write(2, 1);
    let log = kvm_dirty_log { ..log };
    assert_eq!(guest.vm.set(KVM_GET_DIRTY_LOG, log), Ok(0));
    assert_eq!(bitmap, [1 << 2]);
}
