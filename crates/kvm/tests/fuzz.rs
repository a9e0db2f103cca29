//! Random sequences of ioctls: nothing that a program passes may crash the process, hang it, or
//! get an answer that is neither success nor an error number that KVM uses.
//!
//! `TWOFOLD_FUZZ_CASES` makes it run longer than the few sequences of an ordinary test run.
// UNSAFETY: maps memory, handles signals.
#![expect(unsafe_code)]
#![expect(clippy::unwrap_used)] // Helpers outside #[test] functions.

mod common;

use common::*;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use twofold_kvm::abi;

/// Every request, and a few that nobody defines.
#[rustfmt::skip]
const REQUESTS: &[u64] = &[
    KVM_GET_API_VERSION, KVM_CREATE_VM, KVM_GET_MSR_INDEX_LIST, KVM_CHECK_EXTENSION,
    KVM_GET_VCPU_MMAP_SIZE, KVM_GET_SUPPORTED_CPUID, KVM_GET_EMULATED_CPUID,
    KVM_GET_MSR_FEATURE_INDEX_LIST, KVM_CREATE_VCPU, KVM_GET_DIRTY_LOG, KVM_SET_NR_MMU_PAGES,
    KVM_GET_NR_MMU_PAGES, KVM_SET_TSS_ADDR, KVM_SET_IDENTITY_MAP_ADDR, KVM_CREATE_IRQCHIP,
    KVM_IRQ_LINE, KVM_GET_IRQCHIP, KVM_SET_IRQCHIP, KVM_CREATE_PIT2, KVM_GET_PIT2, KVM_SET_PIT2,
    KVM_IRQ_LINE_STATUS, KVM_REGISTER_COALESCED_MMIO, KVM_UNREGISTER_COALESCED_MMIO,
    KVM_SET_GSI_ROUTING, KVM_IRQFD, KVM_SET_BOOT_CPU_ID, KVM_IOEVENTFD, KVM_SET_CLOCK,
    KVM_GET_CLOCK, KVM_GET_REGS, KVM_SET_REGS, KVM_GET_SREGS, KVM_SET_SREGS, KVM_TRANSLATE,
    KVM_INTERRUPT, KVM_GET_MSRS, KVM_SET_MSRS, KVM_SET_CPUID, KVM_SET_SIGNAL_MASK, KVM_GET_FPU,
    KVM_SET_FPU, KVM_GET_LAPIC, KVM_SET_LAPIC, KVM_SET_CPUID2, KVM_GET_CPUID2, KVM_GET_MP_STATE,
    KVM_SET_MP_STATE, KVM_NMI, KVM_SET_GUEST_DEBUG, KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS,
    KVM_GET_DEBUGREGS, KVM_SET_TSC_KHZ, KVM_SET_DEBUGREGS, KVM_GET_TSC_KHZ, KVM_ENABLE_CAP,
    KVM_GET_XSAVE, KVM_SIGNAL_MSI, KVM_SET_XSAVE, KVM_GET_XCRS, KVM_SET_XCRS, KVM_KVMCLOCK_CTRL,
    KVM_GET_SREGS2, KVM_SET_SREGS2, KVM_GET_STATS_FD, KVM_RUN, KVM_SUBPAGES_GET_ACCESS,
    KVM_SUBPAGES_SET_ACCESS, 0xaeff, 0x1234, 0,
];

/// What KVM answers anything with.
const ERRORS: &[Errno] = &[
    Errno::INVAL,
    Errno::FAULT,
    Errno::NOTTY,
    Errno::EXIST,
    Errno::NOENT,
    Errno::NXIO,
    Errno::TOOBIG,
    Errno::BADF,
    Errno::AGAIN,
    Errno::BUSY,
    Errno::INTR,
    Errno::NOSPC,
    Errno::NOMEM,
    // Of sub-page permissions.
    Errno::NODEV,
    Errno::PERM,
];

const ARENA_PAGES: u64 = 64;
/// Addresses that nothing else is mapped at: slots may be described anywhere in it.
const RESERVED: usize = 1 << 30;

#[derive(Clone, Debug)]
enum Argument {
    /// A pointer to bytes made of these words.
    Words(Vec<Word>),
    Number(u64),
}

#[derive(Clone, Debug)]
enum Word {
    Raw(u64),
    /// A page of the arena, or behind it.
    Arena(u64),
}

#[derive(Clone, Debug)]
enum Step {
    Call {
        object: usize,
        request: usize,
        argument: Argument,
    },
    Region {
        object: usize,
        slot: u32,
        flags: u32,
        page: u64,
        pages: u64,
        arena: u64,
    },
    /// Access maps of the guest's frames.
    Protect {
        object: usize,
        gfn: u64,
        pages: u32,
        map: u32,
    },
    Run {
        object: usize,
        immediate: bool,
    },
    Duplicate(usize),
    Close(usize),
    /// The program changes its memory as if with `madvise`.
    Discard {
        page: u64,
        pages: u64,
    },
}

fn word() -> impl Strategy<Value = Word> {
    prop_oneof![
        4 => (0_u64..16).prop_map(Word::Raw),
        2 => (0_u32..64).prop_map(|bit| Word::Raw(1 << bit)),
        1 => (0_u64..32).prop_map(|pages| Word::Raw(pages << 12)),
        1 => any::<u32>().prop_map(|value| Word::Raw(value.into())),
        1 => Just(Word::Raw(u64::MAX)),
        1 => (0_u64..2 * ARENA_PAGES).prop_map(Word::Arena),
    ]
}

fn argument() -> impl Strategy<Value = Argument> {
    prop_oneof![
        6 => proptest::collection::vec(word(), 0..80).prop_map(Argument::Words),
        2 => (0_u64..300).prop_map(Argument::Number),
        1 => prop_oneof![Just(8), Just(1 << 47), Just(u64::MAX), Just(u64::MAX - 4095)]
            .prop_map(Argument::Number),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => (any::<usize>(), 0..REQUESTS.len(), argument())
            .prop_map(|(object, request, argument)| Step::Call { object, request, argument }),
        6 => (any::<usize>(), 0_u32..6, 0_u32..4, 0_u64..32, 0_u64..16, 0..2 * ARENA_PAGES)
            .prop_map(|(object, slot, flags, page, pages, arena)| {
                Step::Region { object, slot, flags, page, pages, arena }
            }),
        4 => (any::<usize>(), 0_u64..40, 0_u32..20, any::<u32>())
            .prop_map(|(object, gfn, pages, map)| Step::Protect { object, gfn, pages, map }),
        6 => (any::<usize>(), any::<bool>())
            .prop_map(|(object, immediate)| Step::Run { object, immediate }),
        1 => any::<usize>().prop_map(Step::Duplicate),
        1 => any::<usize>().prop_map(Step::Close),
        1 => (0..ARENA_PAGES, 1_u64..8).prop_map(|(page, pages)| Step::Discard { page, pages }),
    ]
}

/// The program's memory: a few pages with code, in the middle of nothing.
struct Arena(*mut u8);

impl Arena {
    fn new() -> Self {
        use rustix::mm::{MapFlags, MprotectFlags, ProtFlags};
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping, of which some pages become usable.
        unsafe {
            let start = rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                RESERVED,
                ProtFlags::empty(),
                flags,
            )
            .unwrap();
            let usable = ARENA_PAGES as usize * 4096;
            rustix::mm::mprotect(start, usable, MprotectFlags::READ | MprotectFlags::WRITE)
                .unwrap();
            let arena = Self(start.cast());
            arena.fill();
            arena
        }
    }

    /// Code that loops, talks, halts, writes: whatever the guest starts at, something happens.
    fn fill(&self) {
        #[rustfmt::skip]
        let code: &[u8] = &[
            0xe6, 0x80, 0xe4, 0x81, 0x40, 0xa2, 0x00, 0x70, 0xa0, 0x00, 0x80, 0xab, 0x6c, 0xf4,
            0x0f, 0xa2, 0x0f, 0x32, 0xcc, 0xcd, 0x21, 0x0f, 0x0b, 0x0f, 0x01, 0xd9, 0xeb, 0xe0,
        ];
        for (index, byte) in code
            .iter()
            .cycle()
            .take(ARENA_PAGES as usize * 4096)
            .enumerate()
        {
            // SAFETY: within the usable pages.
            unsafe { self.0.add(index).write_volatile(*byte) };
        }
    }

    fn address(&self, page: u64) -> u64 {
        self.0.expose_provenance() as u64 + page * 4096
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        let change = abi::host_change(self.0.addr(), RESERVED);
        // SAFETY: ours, and not used again.
        unsafe { rustix::mm::munmap(self.0.cast(), RESERVED) }.unwrap();
        drop(change);
    }
}

/// Interrupts the vCPU that the test's thread runs every few milliseconds, as a program's timer
/// would.
struct Alarm {
    stop: std::sync::Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

extern "C" fn on_signal(_: libc::c_int) {
    abi::interrupt_current_run();
}

impl Alarm {
    fn start() -> Self {
        // SAFETY: the handler is async-signal-safe; pthread_self has no preconditions.
        let target = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_signal as extern "C" fn(libc::c_int) as usize;
            assert_eq!(
                libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut()),
                0
            );
            libc::pthread_self()
        };
        let stop = std::sync::Arc::new(AtomicBool::new(false));
        let stopped = std::sync::Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(2));
                // SAFETY: the target outlives this thread, which it joins.
                unsafe { libc::pthread_kill(target, libc::SIGUSR1) };
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

struct Program {
    /// Before the arena: descriptors go first, then the memory.
    fds: Vec<Fd>,
    runs: Vec<(i32, Memory)>,
    arena: Arena,
    buffer: Vec<u64>,
}

impl Program {
    fn new() -> Self {
        let kvm = Fd::open();
        let vm = kvm.descriptor(KVM_CREATE_VM, 0);
        let mut program = Self {
            fds: vec![kvm, vm],
            runs: Vec::new(),
            arena: Arena::new(),
            buffer: vec![0; 4096],
        };
        let slot = region(0, 0xf000, 0x4000, program.arena.address(0));
        assert_eq!(program.fds[1].set(KVM_SET_USER_MEMORY_REGION, slot), Ok(0));
        let sub_pages = kvm_bindings::kvm_enable_cap {
            cap: twofold_abi::spp::KVM_CAP_X86_SPP,
            ..Default::default()
        };
        // Where processors have none, the calls that follow answer so.
        let _ = program.fds[1].set(KVM_ENABLE_CAP, sub_pages);
        program.create_vcpu();
        program
    }

    fn create_vcpu(&mut self) {
        let vcpu = self.fds[1].descriptor(KVM_CREATE_VCPU, 0);
        let mut sregs: kvm_bindings::kvm_sregs = vcpu.get(KVM_GET_SREGS);
        sregs.cs.base = 0xf000;
        assert_eq!(vcpu.set(KVM_SET_SREGS, sregs), Ok(0));
        let regs = kvm_bindings::kvm_regs {
            rflags: 2,
            ..Default::default()
        };
        assert_eq!(vcpu.set(KVM_SET_REGS, regs), Ok(0));
        self.runs.push((vcpu.0, Memory::of_vcpu(&vcpu)));
        self.fds.push(vcpu);
    }

    fn fd(&self, object: usize) -> Option<&Fd> {
        self.fds.get(object % self.fds.len().max(1))
    }

    fn step(&mut self, step: &Step) -> Result<(), TestCaseError> {
        match step {
            Step::Call {
                object,
                request,
                argument,
            } => {
                let request = REQUESTS[*request];
                let argument = match argument {
                    Argument::Number(number) => *number as usize,
                    Argument::Words(words) => {
                        self.buffer.fill(0);
                        for (place, word) in self.buffer.iter_mut().zip(words) {
                            *place = match word {
                                Word::Raw(raw) => *raw,
                                Word::Arena(page) => self.arena.address(*page),
                            };
                        }
                        self.buffer.as_mut_ptr().expose_provenance()
                    }
                };
                self.call(*object, request, argument)
            }
            Step::Region {
                object,
                slot,
                flags,
                page,
                pages,
                arena,
            } => {
                let mut slot = region(*slot, page << 12, pages << 12, self.arena.address(*arena));
                slot.flags = *flags;
                self.call(
                    *object,
                    KVM_SET_USER_MEMORY_REGION,
                    (&raw const slot).addr(),
                )
            }
            Step::Protect {
                object,
                gfn,
                pages,
                map,
            } => {
                self.buffer.fill(u64::from(*map) << 32 | u64::from(!*map));
                self.buffer[0] = *gfn;
                self.buffer[1] = u64::from(*pages);
                let request = self.buffer.as_mut_ptr().expose_provenance();
                self.call(*object, KVM_SUBPAGES_SET_ACCESS, request)
            }
            Step::Run { object, immediate } => {
                let Some(fd) = self.fd(*object) else {
                    return Ok(());
                };
                if let Some((_, run)) = self.runs.iter().find(|(number, _)| *number == fd.0) {
                    run.write(1, u8::from(*immediate));
                }
                self.call(*object, KVM_RUN, 0)
            }
            Step::Duplicate(object) => {
                if let Some(fd) = self.fd(*object) {
                    let copy = fd.duplicate();
                    self.fds.push(copy);
                }
                Ok(())
            }
            Step::Close(object) => {
                if self.fds.len() > 1 {
                    let index = object % self.fds.len();
                    let fd = self.fds.swap_remove(index);
                    self.runs.retain(|(number, _)| *number != fd.0);
                }
                Ok(())
            }
            Step::Discard { page, pages } => {
                let pages = (*pages).min(ARENA_PAGES - page);
                let (start, length) = (self.arena.address(*page), pages as usize * 4096);
                let change = abi::host_change(start as usize, length);
                let start = std::ptr::with_exposed_provenance_mut(start as usize);
                // SAFETY: pages of the arena, which only guests use.
                let discarded = unsafe {
                    rustix::mm::madvise(start, length, rustix::mm::Advice::LinuxDontNeed)
                };
                drop(change);
                prop_assert_eq!(discarded, Ok(()));
                Ok(())
            }
        }
    }

    fn call(&mut self, object: usize, request: u64, argument: usize) -> Result<(), TestCaseError> {
        let Some(fd) = self.fd(object) else {
            return Ok(());
        };
        match fd.call(request, argument) {
            Ok(answer) => {
                let is_descriptor =
                    matches!(request, KVM_CREATE_VM | KVM_CREATE_VCPU | KVM_GET_STATS_FD);
                if is_descriptor {
                    prop_assert!(abi::is_ours(answer));
                    let fd = Fd(answer);
                    if abi::mmap_check(fd.0, 3, libc::MAP_SHARED, 0, 4096).is_none() {
                        self.runs.push((fd.0, Memory::of_vcpu(&fd)));
                    }
                    self.fds.push(fd);
                }
            }
            Err(error) => prop_assert!(ERRORS.contains(&error), "{request:#x} answered {error}"),
        }
        Ok(())
    }
}

#[test]
fn no_sequence_of_ioctls_crashes_or_hangs_the_program() {
    let cases = std::env::var("TWOFOLD_FUZZ_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok());
    let config = Config {
        cases: cases.unwrap_or(200),
        failure_persistence: None,
        max_shrink_iters: 2000,
        ..Config::default()
    };
    let seed = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
    let _alarm = Alarm::start();
    let mut runner = TestRunner::new_with_rng(config, seed);
    let sequences = proptest::collection::vec(step(), 1..60);
    let result = runner.run(&sequences, |steps| {
        let mut program = Program::new();
        for step in &steps {
            program.step(step)?;
        }
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
    assert!(
        abi::host_change(0, 4096).is_none(),
        "a VM outlived its descriptors"
    );
}
