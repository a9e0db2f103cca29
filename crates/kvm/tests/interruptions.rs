//! Signals, other threads, and memory that vanishes, while a guest runs.
// UNSAFETY: handles signals and unmaps memory behind the library's back.
#![expect(unsafe_code)]

mod common;

use common::*;
use kvm_bindings::*;
use std::cell::Cell;
use std::time::{Duration, Instant};
use twofold_kvm::abi;

/// mov al, [0x6000]; jmp back to it
const READS: &[u8] = &[0xa0, 0x00, 0x60, 0xeb, 0xfb];
/// jmp $
const SPINS: &[u8] = &[0xeb, 0xfe];

extern "C" fn interrupt(_: libc::c_int) {
    INTERRUPTED.set(abi::interrupt_current_run());
}

thread_local! {
    /// Whether the last signal to this thread interrupted a run.
    static INTERRUPTED: Cell<bool> = const { Cell::new(false) };
}

extern "C" fn fault(_: libc::c_int, information: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a context, whose instruction pointer may be changed.
    unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let rip = &mut registers[libc::REG_RIP as usize];
        match abi::in_guest_access_fixup(*rip as usize, (*information).si_addr().addr()) {
            Some(landing) => *rip = landing as i64,
            None => libc::abort(),
        }
    }
}

fn install(signal: libc::c_int, handler: usize, flags: libc::c_int) {
    // SAFETY: the handlers above are async-signal-safe.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler;
        action.sa_flags = flags;
        assert_eq!(libc::sigaction(signal, &action, std::ptr::null_mut()), 0);
    }
}

/// Runs the guest in this thread while `meanwhile` happens in another, which is given what it needs
/// to interrupt the run.
fn run_while(
    guest: &Guest,
    meanwhile: impl FnOnce(&Fd, libc::pthread_t) + Send,
) -> Result<i32, Errno> {
    // SAFETY: no preconditions.
    let this = unsafe { libc::pthread_self() };
    let vcpu = &guest.vcpu;
    std::thread::scope(|scope| {
        scope.spawn(move || {
            std::thread::sleep(Duration::from_millis(30));
            meanwhile(vcpu, this);
        });
        vcpu.call(KVM_RUN, 0)
    })
}

fn signal(thread: libc::pthread_t) {
    // SAFETY: the thread waits for the one that calls this.
    assert_eq!(unsafe { libc::pthread_kill(thread, libc::SIGUSR1) }, 0);
}

#[test]
fn a_signal_ends_the_run_with_eintr_and_the_next_run_goes_on() {
    install(libc::SIGUSR1, interrupt as *const () as usize, 0);
    let guest = Guest::new(SPINS);
    for _ in 0..3 {
        assert_eq!(
            run_while(&guest, |_, thread| signal(thread)),
            Err(Errno::INTR)
        );
        assert_eq!(guest.exit_reason(), KVM_EXIT_INTR);
        assert_eq!(guest.regs().rip, CODE);
    }
    // Outside KVM_RUN nobody is interrupted, and nothing is left over for the next run.
    // SAFETY: the handler is installed.
    unsafe { libc::raise(libc::SIGUSR1) };
    assert!(!INTERRUPTED.get());
    guest.memory.write_bytes(0, &[0xf4, 0xf4]);
    assert_eq!(guest.run(), Ok(KVM_EXIT_HLT));
}

#[test]
fn other_ioctls_on_a_running_vcpu_wait() {
    install(libc::SIGUSR1, interrupt as *const () as usize, 0);
    let guest = Guest::new(SPINS);
    let vcpu = &guest.vcpu;
    let start = Instant::now();
    let waited = std::sync::Mutex::new(Duration::ZERO);
    let result = run_while(&guest, |_, thread| {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _: kvm_regs = vcpu.get(KVM_GET_REGS);
                *waited.lock().unwrap() = start.elapsed();
            });
            std::thread::sleep(Duration::from_millis(50));
            signal(thread);
        });
    });
    assert_eq!(result, Err(Errno::INTR));
    assert!(*waited.lock().unwrap() >= Duration::from_millis(70));
}

#[test]
fn memory_that_vanishes_under_a_running_guest_answers_efault() {
    for signal in [libc::SIGSEGV, libc::SIGBUS] {
        install(
            signal,
            fault as *const () as usize,
            libc::SA_SIGINFO | libc::SA_NODEFER,
        );
    }
    let guest = Guest::new(READS);
    let more = Memory::new(0x1000);
    let slot = region(1, 0x6000, 0x1000, more.address());
    assert_eq!(guest.vm.set(KVM_SET_USER_MEMORY_REGION, slot), Ok(0));
    let address = more.start.expose_provenance();
    let result = run_while(&guest, move |_, _| {
        // SAFETY: nothing but the guest uses the page; the mapping stays, without permissions.
        let changed = unsafe {
            rustix::mm::mprotect(
                std::ptr::with_exposed_provenance_mut(address),
                0x1000,
                rustix::mm::MprotectFlags::empty(),
            )
        };
        assert_eq!(changed, Ok(()));
    });
    assert_eq!(result, Err(Errno::FAULT));
    assert_eq!(guest.exit_reason(), KVM_EXIT_MEMORY_FAULT);
    assert_eq!(guest.exit::<u64>(8), 0x6000);
    assert_eq!(guest.regs().rip, CODE);
}

#[test]
fn a_page_that_changes_hands_is_read_anew() {
    let guest = Guest::new(READS);
    let more = Memory::new(0x1000);
    more.write(0, 1_u8);
    let slot = region(1, 0x6000, 0x1000, more.address());
    assert_eq!(guest.vm.set(KVM_SET_USER_MEMORY_REGION, slot), Ok(0));
    install(libc::SIGUSR1, interrupt as *const () as usize, 0);
    let (address, length) = (more.start.expose_provenance(), more.length);
    let result = run_while(&guest, move |_, thread| {
        let change = abi::host_change(address, length);
        assert!(change.is_some());
        let start = std::ptr::with_exposed_provenance_mut(address);
        // SAFETY: nothing but the guest uses the page.
        let discarded =
            unsafe { rustix::mm::madvise(start, length, rustix::mm::Advice::LinuxDontNeed) };
        drop(change);
        assert_eq!(discarded, Ok(()));
        std::thread::sleep(Duration::from_millis(30));
        signal(thread);
    });
    assert_eq!(result, Err(Errno::INTR));
    assert_eq!(guest.regs().rax & 0xff, 0, "the page was discarded");
}
