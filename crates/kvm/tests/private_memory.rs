//! Private memory, guest memory files and pre-faulting, as a program uses them.
// UNSAFETY: handles a signal, and changes the program's own memory.
#![expect(unsafe_code)]
#![expect(clippy::unwrap_used)] // Helpers outside #[test] functions.

mod common;

use common::*;
use kvm_bindings::*;
use rustix::mm::Advice;
use std::sync::atomic::{AtomicBool, Ordering};
use twofold_kvm::abi;

const PAGE: u64 = 4096;
/// Where the data is: two slots' worth of frames.
const DATA: u64 = 0x10_0000;
const PAGES: u64 = 16;
const KEEP_SIZE: i32 = libc::FALLOC_FL_KEEP_SIZE;
const PUNCH: i32 = libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE;

/// Three little programs of the guest, at these offsets.
#[rustfmt::skip]
const CODE_BYTES: &[u8] = &[
    0x89, 0x07, 0xf4,             // mov [bx], ax; hlt
    0x8b, 0x07, 0xf4,             // mov ax, [bx]; hlt
    0x0f, 0x01, 0xc1, 0xf4,       // vmcall; hlt
];
const WRITE: u64 = CODE;
const READ: u64 = CODE + 3;
const HYPERCALL: u64 = CODE + 6;

/// A software-protected VM whose data slot has a guest memory file.
struct Protected {
    vcpu: Fd,
    run: Memory,
    file: Option<Fd>,
    vm: Fd,
    shared: Memory,
    _code: Memory,
    kvm: Fd,
}

fn create_file(vm: &Fd, size: u64) -> Result<Fd, Errno> {
    let mut request = kvm_create_guest_memfd {
        size,
        ..Default::default()
    };
    let argument = (&raw mut request).addr();
    vm.call(KVM_CREATE_GUEST_MEMFD, argument).map(Fd)
}

fn slot(
    id: u32,
    gpa: u64,
    pages: u64,
    hva: u64,
    file: Option<(&Fd, u64)>,
) -> kvm_userspace_memory_region2 {
    kvm_userspace_memory_region2 {
        slot: id,
        flags: file.map_or(0, |_| KVM_MEM_GUEST_MEMFD),
        guest_phys_addr: gpa,
        memory_size: pages * PAGE,
        userspace_addr: hva,
        guest_memfd: file.map_or(0, |(file, _)| file.0 as u32),
        guest_memfd_offset: file.map_or(0, |(_, offset)| offset),
        ..Default::default()
    }
}

fn attributes(address: u64, size: u64, attributes: u32) -> kvm_memory_attributes {
    kvm_memory_attributes {
        address,
        size,
        attributes: attributes.into(),
        flags: 0,
    }
}

impl Protected {
    fn new() -> Self {
        Self::with_type(KVM_X86_SW_PROTECTED_VM)
    }

    fn with_type(kind: u32) -> Self {
        let kvm = Fd::open();
        let vm = kvm.descriptor(KVM_CREATE_VM, kind as usize);
        let code = Memory::new(MEMORY_SIZE as usize);
        code.write_bytes(0, CODE_BYTES);
        let region = slot(0, CODE, MEMORY_SIZE / PAGE, code.address(), None);
        assert_eq!(vm.set(KVM_SET_USER_MEMORY_REGION2, region), Ok(0));
        let shared = Memory::new((PAGES * PAGE) as usize);
        let file = create_file(&vm, PAGES * PAGE).unwrap();
        let bound = (kind == KVM_X86_SW_PROTECTED_VM).then_some((&file, 0));
        let region = slot(1, DATA, PAGES, shared.address(), bound);
        assert_eq!(vm.set(KVM_SET_USER_MEMORY_REGION2, region), Ok(0));
        let vcpu = vm.descriptor(KVM_CREATE_VCPU, 0);
        let run = Memory::of_vcpu(&vcpu);
        let mut sregs: kvm_sregs = vcpu.get(KVM_GET_SREGS);
        sregs.cs.base = 0;
        sregs.cs.selector = 0;
        sregs.ds.base = DATA;
        assert_eq!(vcpu.set(KVM_SET_SREGS, sregs), Ok(0));
        Self {
            vcpu,
            run,
            file: Some(file),
            vm,
            shared,
            _code: code,
            kvm,
        }
    }

    fn set_private(&self, page: u64, pages: u64, private: bool) {
        let value = if private {
            KVM_MEMORY_ATTRIBUTE_PRIVATE
        } else {
            0
        };
        let request = attributes(DATA + page * PAGE, pages * PAGE, value);
        assert_eq!(self.vm.set(KVM_SET_MEMORY_ATTRIBUTES, request), Ok(0));
    }

    fn start(&self, rip: u64, rax: u64, rbx: u64) -> Result<i32, Errno> {
        let regs = kvm_regs {
            rip,
            rax,
            rbx,
            rflags: 2,
            ..Default::default()
        };
        assert_eq!(self.vcpu.set(KVM_SET_REGS, regs), Ok(0));
        self.vcpu.call(KVM_RUN, 0)
    }

    fn exit_reason(&self) -> u32 {
        self.run.read(8)
    }

    /// Flags, address and size of the memory fault that the guest ended in.
    fn memory_fault(&self) -> (u64, u64, u64) {
        assert_eq!(self.exit_reason(), KVM_EXIT_MEMORY_FAULT);
        (self.run.read(32), self.run.read(40), self.run.read(48))
    }

    fn write(&self, page: u64, value: u16) {
        assert_eq!(self.start(WRITE, value.into(), page * PAGE), Ok(0));
        assert_eq!(self.exit_reason(), KVM_EXIT_HLT);
    }

    fn read(&self, page: u64) -> u16 {
        assert_eq!(self.start(READ, 0, page * PAGE), Ok(0));
        assert_eq!(self.exit_reason(), KVM_EXIT_HLT);
        let regs: kvm_regs = self.vcpu.get(KVM_GET_REGS);
        regs.rax as u16
    }

    fn prefault(&self, gpa: u64, size: u64) -> (Result<i32, Errno>, u64, u64) {
        let mut request = kvm_pre_fault_memory {
            gpa,
            size,
            ..Default::default()
        };
        let result = self.vcpu.with(KVM_PRE_FAULT_MEMORY, &mut request);
        (result, request.gpa, request.size)
    }

    fn fallocate(&self, mode: i32, offset: i64, length: i64) -> Result<(), Errno> {
        let file = self.file.as_ref().unwrap();
        abi::fallocate(file.0, mode, offset, length).unwrap()
    }

    /// A counter of the vCPU's statistics.
    fn counter(&self, name: &str) -> u64 {
        let stats = self.vcpu.descriptor(KVM_GET_STATS_FD, 0);
        let bytes = stats.read_at(1 << 16, 0);
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
        let (name_size, count, first, data) = (word(4), word(8), word(16), word(20));
        let descriptor = (0..count)
            .map(|number| first + number * (16 + name_size))
            .find(|at| bytes[at + 16..].starts_with(format!("{name}\0").as_bytes()))
            .unwrap();
        let at = data + word(descriptor + 8);
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }
}

#[test]
fn row_28_the_guest_touches_what_was_prefaulted_without_an_exit() {
    let guest = Protected::new();
    guest.set_private(4, 4, true);
    let all = guest.prefault(DATA, PAGES * PAGE);
    assert_eq!(all, (Ok(0), DATA + PAGES * PAGE, 0));
    assert_eq!(guest.read(0), 0);
    let before = guest.counter("pf_taken");
    for page in 4..8 {
        guest.write(page, 7);
    }
    for page in 0..PAGES {
        let expected = if (4..8).contains(&page) { 7 } else { 0 };
        assert_eq!(guest.read(page), expected);
    }
    assert_eq!(guest.counter("pf_taken"), before);
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

#[test]
fn row_48_a_guest_memory_file_can_do_what_kvms_can_and_nothing_else() {
    let guest = Protected::new();
    for (size, flags) in [
        (0, 0),
        (1, 0),
        (PAGE + 1, 0),
        (1 << 63, 0),
        (PAGE, 1),
        (PAGE, 2),
        (PAGE, 1 << 63),
    ] {
        let request = kvm_create_guest_memfd {
            size,
            flags,
            ..Default::default()
        };
        assert_eq!(
            guest.vm.set(KVM_CREATE_GUEST_MEMFD, request),
            Err(Errno::INVAL)
        );
    }
    let file = guest.file.as_ref().unwrap();
    assert_eq!(abi::before_read(file.0), Some(Errno::INVAL));
    assert_eq!(abi::before_write(file.0), Some(Errno::INVAL));
    assert_eq!(abi::before_truncate(file.0), Some(Errno::INVAL));
    assert_eq!(file.call(KVM_RUN, 0), Err(Errno::NOTTY));
    let mmap = abi::mmap_check(file.0, 3, libc::MAP_SHARED, 0, 4096);
    assert_eq!(mmap, Some(Errno::NODEV));
    let stat = rustix::fs::fstat(file.borrow()).unwrap();
    assert_eq!((stat.st_size as u64, stat.st_blksize), (PAGES * PAGE, 4096));
    assert_eq!(stat.st_blocks, 0);
    // Even behind the library's back there is nothing to write to, and nothing to read.
    assert!(rustix::io::pwrite(file.borrow(), b"x", 0).is_err());
    guest.set_private(0, PAGES, true);
    guest.write(0, 0x5a5a);
    let mut byte = [1; 2];
    rustix::io::pread(file.borrow(), &mut byte, 0).unwrap();
    assert_eq!(byte, [0, 0]);

    let (page, size) = (PAGE as i64, (PAGES * PAGE) as i64);
    for (mode, offset, length, expected) in [
        (KEEP_SIZE, 0, size, Ok(())),
        (KEEP_SIZE, size, page, Err(Errno::INVAL)),
        (KEEP_SIZE, 1, page, Err(Errno::INVAL)),
        (KEEP_SIZE, 0, page - 1, Err(Errno::INVAL)),
        (KEEP_SIZE, 0, 0, Err(Errno::INVAL)),
        (KEEP_SIZE, -page, page, Err(Errno::INVAL)),
        (0, 0, page, Err(Errno::OPNOTSUPP)),
        (libc::FALLOC_FL_PUNCH_HOLE, 0, page, Err(Errno::OPNOTSUPP)),
        (
            KEEP_SIZE | libc::FALLOC_FL_ZERO_RANGE,
            0,
            page,
            Err(Errno::OPNOTSUPP),
        ),
        (PUNCH, size, page, Ok(())),
        (PUNCH, size + page, page, Ok(())),
        (PUNCH, 0, page + 1, Err(Errno::INVAL)),
        (PUNCH, i64::MAX - page + 1, page, Err(Errno::FBIG)),
    ] {
        assert_eq!(
            guest.fallocate(mode, offset, length),
            expected,
            "{mode:#x} {offset} {length}"
        );
    }
    assert_eq!(guest.read(0), 0x5a5a, "allocating keeps what is there");
}

#[test]
fn row_48_slots_are_bound_to_files_as_kvm_binds_them() {
    let guest = Protected::new();
    let hva = guest.shared.address();
    let file = guest.file.as_ref().unwrap();
    let set = |region| guest.vm.set(KVM_SET_USER_MEMORY_REGION2, region);
    let at = 1 << 30;
    let mut closed = slot(2, at, 1, hva, Some((file, 0)));
    closed.guest_memfd = 0x7fff_0000;
    assert_eq!(set(closed), Err(Errno::BADF));
    closed.guest_memfd = u32::MAX;
    assert_eq!(set(closed), Err(Errno::BADF));
    let other_vm = guest
        .kvm
        .descriptor(KVM_CREATE_VM, KVM_X86_SW_PROTECTED_VM as usize);
    let foreign = create_file(&other_vm, PAGE).unwrap();
    for (file, offset, pages, expected) in [
        (&guest.vm, 0, 1, Err(Errno::INVAL)),
        (&guest.kvm, 0, 1, Err(Errno::INVAL)),
        (&foreign, 0, 1, Err(Errno::INVAL)),
        (file, 1, 1, Err(Errno::INVAL)),
        (file, 0_u64.wrapping_sub(PAGE), 2, Err(Errno::INVAL)),
        (file, 2 * PAGE, PAGES, Err(Errno::INVAL)),
        (file, 2 * PAGE, 2, Err(Errno::EXIST)),
    ] {
        assert_eq!(set(slot(2, at, pages, hva, Some((file, offset)))), expected);
    }
    let plain = rustix::fs::memfd_create("plain", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let mut region = slot(2, at, 1, hva, Some((file, 0)));
    region.guest_memfd = std::os::fd::AsRawFd::as_raw_fd(&plain) as u32;
    assert_eq!(set(region), Err(Errno::INVAL));
    // The old call does not know of files.
    let mut old = region_v1(2, at, PAGE, hva);
    old.flags = KVM_MEM_GUEST_MEMFD;
    assert_eq!(
        guest.vm.set(KVM_SET_USER_MEMORY_REGION, old),
        Err(Errno::INVAL)
    );
    // A slot that is deleted gives its part back.
    assert_eq!(set(slot(1, DATA, 0, 0, None)), Ok(0));
    assert_eq!(set(slot(2, at, 2, hva, Some((file, 2 * PAGE)))), Ok(0));
}

fn region_v1(id: u32, gpa: u64, size: u64, hva: u64) -> kvm_userspace_memory_region {
    region(id, gpa, size, hva)
}

#[test]
fn row_48_when_the_last_descriptor_goes_the_slot_loses_its_private_half() {
    let mut guest = Protected::new();
    guest.set_private(0, 4, true);
    guest.write(1, 0x7777);
    let copy = guest.file.as_ref().unwrap().duplicate();
    guest.file = None;
    assert_eq!(guest.read(1), 0x7777, "a copy keeps the file");
    drop(copy);
    assert_eq!(guest.start(READ, 0, PAGE), Err(Errno::FAULT));
    let private = u64::from(KVM_MEMORY_EXIT_FLAG_PRIVATE);
    assert_eq!(guest.memory_fault(), (private, DATA + PAGE, PAGE));
    // The shared half is still there.
    guest.write(8, 3);
    guest.set_private(1, 1, false);
    assert_eq!(guest.read(1), 0);
}

#[test]
fn row_48_a_file_outlives_the_descriptors_of_its_vm() {
    let guest = Protected::new();
    guest.set_private(0, PAGES, true);
    guest.write(2, 1);
    let Protected {
        vcpu,
        run,
        file,
        vm,
        shared,
        ..
    } = guest;
    drop((vm, vcpu, run, shared));
    let file = file.unwrap();
    let size = (PAGES * PAGE) as i64;
    assert_eq!(abi::fallocate(file.0, PUNCH, 0, size), Some(Ok(())));
    assert_eq!(abi::fallocate(file.0, KEEP_SIZE, 0, size), Some(Ok(())));
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
