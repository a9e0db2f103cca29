//! What is done to the memory behind protected pages: by the system, the program, and other vCPUs.

use super::*;
use rustix::mm::Advice;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use twofold_kvm::abi;

const FULL: u32 = KVM_SUBPAGE_FULL_ACCESS;

fn replace(memory: &Memory, page: u64) {
    let at = (page * PAGE) as usize;
    let change = abi::host_change(memory.start.addr() + at, PAGE as usize);
    // SAFETY: this memory is the test's own; guests have lost it.
    unsafe {
        rustix::mm::madvise(
            memory.start.add(at).cast(),
            PAGE as usize,
            Advice::LinuxDontNeed,
        )
    }
    .unwrap();
    drop(change);
}

#[test]
fn row_9_a_page_that_the_system_replaces_is_as_protected_as_before() {
    let guarded = Guarded::new();
    guarded.protect(3, &[0b1]);
    let page = DATA + 3 * PAGE;
    for round in 1..4 {
        assert_eq!(guarded.store(page, round), End::Halt);
        assert_eq!(guarded.store(page + 0x80, round), denied(page + 0x80, 3));
        // The notifier: the page goes, and another comes when it is touched.
        replace(&guarded.data, 3);
        assert_eq!(guarded.word(page), 0);
        assert_eq!(guarded.store(page + 0x80, round), denied(page + 0x80, 3));
        assert_eq!(guarded.load(page), 0);
    }
}

#[test]
fn row_9_copy_on_write_gives_a_permitted_write_its_own_page_and_a_denied_one_none() {
    let guarded = Guarded::new();
    guarded.data.write(0, 7_u64);
    // A page of a file that is mapped privately: reading shows the file's, writing copies it.
    let file = rustix::fs::memfd_create("shared", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, PAGE).unwrap();
    rustix::io::pwrite(&file, &0x99_u64.to_le_bytes(), 0).unwrap();
    let change = abi::host_change(guarded.data.start.addr(), PAGE as usize);
    // SAFETY: replaces the first page of the test's own memory, which guests have lost.
    unsafe {
        rustix::mm::mmap(
            guarded.data.start.cast(),
            PAGE as usize,
            rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE,
            rustix::mm::MapFlags::PRIVATE | rustix::mm::MapFlags::FIXED,
            &file,
            0,
        )
    }
    .unwrap();
    drop(change);
    guarded.protect(0, &[0b1]);
    assert_eq!(guarded.load(DATA), 0x99);
    assert_eq!(guarded.store(DATA + 0x80, 1), denied(DATA + 0x80, 3));
    rustix::io::pwrite(&file, &0x9a_u64.to_le_bytes(), 0).unwrap();
    assert_eq!(guarded.load(DATA), 0x9a, "a denied write copies nothing");
    assert_eq!(guarded.store(DATA + 8, 5), End::Halt);
    rustix::io::pwrite(&file, &0x9b_u64.to_le_bytes(), 0).unwrap();
    assert_eq!((guarded.load(DATA), guarded.load(DATA + 8)), (0x9a, 5));
    assert_eq!(guarded.store(DATA + 0x80, 1), denied(DATA + 0x80, 3));
}

#[test]
fn a_read_only_slot_is_emulated_and_never_asks_for_sub_pages() {
    let guarded = Guarded::new();
    // Flags of a slot do not change while it exists; a new one is needed.
    let none = region(1, DATA, 0, guarded.data.address());
    assert_eq!(guarded.vm.set(KVM_SET_USER_MEMORY_REGION, none), Ok(0));
    guarded.set_slot(KVM_MEM_READONLY);
    guarded.protect(0, &[1]);
    assert_eq!(guarded.store(DATA, 1), End::Other(KVM_EXIT_MMIO));
    assert_eq!(guarded.load(DATA), 0);
}

#[test]
fn host_writes_are_not_the_guests_and_pass() {
    let guarded = Guarded::new();
    guarded.protect(0, &[0]);
    assert_eq!(guarded.store(DATA, 1), denied(DATA, 3));
    // The program's own stores, and those of calls that it makes.
    guarded.data.write(0, 3_u64);
    let from = 0x77_u64.to_le_bytes();
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    rustix::io::write(&writer, &from).unwrap();
    // SAFETY: within the test's own memory.
    let to = unsafe { std::slice::from_raw_parts_mut(guarded.data.start.add(0x80), 8) };
    assert_eq!(rustix::io::read(&reader, to).unwrap(), 8);
    assert_eq!((guarded.load(DATA), guarded.load(DATA + 0x80)), (3, 0x77));
    // KVM's calls that look at the guest's memory do not write there.
    let translation = kvm_translation {
        linear_address: DATA + 0x123,
        ..Default::default()
    };
    assert_eq!(guarded.vcpu.set(KVM_TRANSLATE, translation), Ok(0));
    assert_eq!(guarded.store(DATA, 1), denied(DATA, 3));
}

#[test]
fn pre_faulting_maps_a_protected_page_without_the_right_to_write() {
    let guarded = Guarded::new();
    guarded.protect(2, &[0b1]);
    let mut request = kvm_pre_fault_memory {
        gpa: DATA,
        size: PAGES * PAGE,
        ..Default::default()
    };
    assert_eq!(guarded.vcpu.with(KVM_PRE_FAULT_MEMORY, &mut request), Ok(0));
    assert_eq!(request.size, 0);
    let page = DATA + 2 * PAGE;
    assert_eq!(guarded.store(page + 0x80, 1), denied(page + 0x80, 3));
    assert_eq!(guarded.store(page, 1), End::Halt);
}

#[test]
fn protection_takes_hold_of_what_was_mapped_and_written_before() {
    let guarded = Guarded::new();
    for page in 0..PAGES {
        assert_eq!(guarded.store(DATA + page * PAGE, 1), End::Halt);
    }
    guarded.protect(4, &[0, 0b10]);
    assert_eq!(
        guarded.store(DATA + 4 * PAGE, 2),
        denied(DATA + 4 * PAGE, 3)
    );
    assert_eq!(
        guarded.store(DATA + 5 * PAGE, 2),
        denied(DATA + 5 * PAGE, 3)
    );
    assert_eq!(guarded.store(DATA + 5 * PAGE + 0x80, 2), End::Halt);
    assert_eq!(guarded.store(DATA + 6 * PAGE, 2), End::Halt);
    assert_eq!(guarded.word(DATA + 4 * PAGE), 1);
}

#[test]
fn writes_beside_a_guarded_piece_leave_the_guest_only_for_the_first() {
    let guarded = Guarded::new();
    guarded.protect(0, &[!(1 << 9)]);
    assert_eq!(guarded.store(DATA, 1), End::Halt);
    let before = guarded.vcpu.counter("exits");
    // 1: mov [rdi], rcx; mov [rdi+0x500], rcx; loop 1b
    let code = [0x48, 0x89, 0x0f, 0x48, 0x89, 0x8f, 0, 5, 0, 0, 0xe2, 0xf4];
    let end = guarded.execute(&code, |regs| (regs.rdi, regs.rcx) = (DATA, 10_000));
    assert_eq!(end, End::Halt);
    assert_eq!(guarded.vcpu.counter("exits") - before, 1, "the HLT");
    assert_eq!(guarded.word(DATA + 0x500), 1);
}

/// When a call that takes permissions away has returned, no running vCPU writes there any more.
#[test]
fn d29_no_write_comes_after_the_call_that_forbids_it() {
    const ROUNDS: u64 = 300;
    let guarded = Guarded::new();
    // 1: inc qword [rdi]; jmp 1b
    guarded.prepare(&[0x48, 0xff, 0x07, 0xeb, 0xfb], |regs| {
        regs.rdi = DATA + 0x80
    });
    let done = AtomicBool::new(false);
    let exits = AtomicU64::new(0);
    let counter = guarded.data.start.expose_provenance() + 0x80;
    // SAFETY: the guest's memory, which lives as long as the VM.
    let count = || unsafe {
        AtomicU64::from_ptr(std::ptr::with_exposed_provenance_mut(counter)).load(Ordering::SeqCst)
    };
    std::thread::scope(|scope| {
        let (vcpu, done, exits) = (&guarded.vcpu, &done, &exits);
        scope.spawn(move || {
            while !done.load(Ordering::SeqCst) {
                assert_eq!(vcpu.call(KVM_RUN, 0), Ok(0));
                exits.fetch_add(1, Ordering::SeqCst);
            }
        });
        let mut moved = 0;
        for round in 0..ROUNDS {
            let map = if round % 3 == 0 { FULL } else { 0b10 };
            assert_eq!(set_access(&guarded.vm, DATA >> 12, &[map]), Ok(1));
            let before = count();
            while count() == before && round % 8 == 0 {
                std::thread::yield_now();
            }
            moved += u64::from(count() != before);
            assert_eq!(set_access(&guarded.vm, DATA >> 12, &[!0b10]), Ok(1));
            let stopped = count();
            for _ in 0..200 {
                std::hint::spin_loop();
            }
            assert_eq!(count(), stopped, "a write came after it was forbidden");
        }
        assert!(moved > 0, "the guest never ran");
        done.store(true, Ordering::SeqCst);
    });
    assert!(exits.load(Ordering::SeqCst) > 0);
    assert_eq!(guarded.resume(), denied(DATA + 0x80, 3));
}
