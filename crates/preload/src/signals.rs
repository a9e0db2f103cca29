//! Signals that arrive while their thread is inside a call to KVM.
//!
//! With the kernel's KVM a signal ends `KVM_RUN` with `EINTR`, and the handler runs when the system
//! call has returned; no handler ever runs in the middle of one. Here the guest, and everything
//! else that KVM does, runs in the program's own thread: a handler would see a half-executed
//! instruction or a lock that its own thread holds, and might leave with `longjmp`.
//!
//! So every handler of the program is replaced by [`arrived`], which calls it unless the thread is
//! in an [`Undisturbed`] section. If it is, a run is asked to end, all signals are blocked and this
//! one is queued again, with all it carried. It is pending in the kernel now, and when the section
//! ends the mask is restored: the kernel delivers it in its own way, with the program's mask, on
//! its alternate stack.
//!
//! What the program has asked for is in [`crate::handlers`].

// UNSAFETY: handles signals, changes the mask with which the interrupted code continues, and calls
// the program's handlers. Exports functions in libc's place.
#![expect(unsafe_code)]

use std::cell::Cell;
use std::ptr;
use std::sync::atomic::{Ordering, compiler_fence};

use libc::{SIG_DFL, SIG_IGN, SIGBUS, SIGSEGV, c_int, c_void, siginfo_t, sigset_t, ucontext_t};
use twofold_kvm::{RunSignals, abi};

use crate::raw::{self, Mask};
use crate::{handlers, real};

/// Signals that no mask of ours blocks: those that an instruction raises (a blocked one kills the
/// process, and guest accesses need theirs), and the two that libc uses within itself.
pub(crate) const NEVER_BLOCKED: Mask = raw::bit(SIGSEGV)
    | raw::bit(SIGBUS)
    | raw::bit(libc::SIGILL)
    | raw::bit(libc::SIGFPE)
    | raw::bit(libc::SIGTRAP)
    | raw::bit(libc::SIGSYS)
    | raw::bit(32)
    | raw::bit(33);

/// What the kernel is never asked about.
pub(crate) const NO_HANDLER: Mask =
    raw::bit(libc::SIGKILL) | raw::bit(libc::SIGSTOP) | raw::bit(32) | raw::bit(33);

/// What a thread knows about the signals that have to wait. Only the thread itself and handlers
/// that interrupt it use it.
struct Waiting {
    /// How many [`Undisturbed`] sections the thread is in.
    sections: Cell<u32>,
    /// The mask to be restored at the end of the outermost one.
    afterwards: Cell<Option<Mask>>,
    /// Whether that mask was set aside by `KVM_SET_SIGNAL_MASK` and not by a deferred signal.
    run_has_mask: Cell<bool>,
    /// Whether the thread is known not to block SIGSEGV and SIGBUS.
    faults_arrive: Cell<bool>,
}

thread_local! {
    static WAITING: Waiting = const {
        Waiting { sections: Cell::new(0), afterwards: Cell::new(None), run_has_mask: Cell::new(false), faults_arrive: Cell::new(false) }
    };
}

/// While one exists, no handler of the program runs in this thread. What arrives is delivered when
/// the last one is dropped, in there; the handler may leave with `longjmp`.
pub(crate) struct Undisturbed {
    /// Looked up once: in a shared library that is a call. Not `Send`, as it must not be.
    waiting: *const Waiting,
}

impl Undisturbed {
    /// Begins a section.
    #[inline]
    pub(crate) fn begin() -> Self {
        let waiting = WAITING.with(ptr::from_ref);
        let section = Self { waiting };
        let sections = &section.waiting().sections;
        sections.set(sections.get() + 1);
        // `arrived` runs in this thread: what it sees is a matter of the compiler alone.
        compiler_fence(Ordering::SeqCst);
        if !section.waiting().faults_arrive.get() {
            section.let_faults_arrive();
        }
        section
    }

    /// Whether the thread is in a section.
    #[inline]
    pub(crate) fn is_in_force() -> bool {
        WAITING.with(|waiting| waiting.sections.get() != 0)
    }

    /// Unblocks SIGSEGV and SIGBUS. Threads of VMMs like to block all signals; but an access to
    /// memory that has vanished kills the process if its signal is blocked.
    #[cold]
    fn let_faults_arrive(&self) {
        if handlers::are_taken_over() {
            raw::unblock(raw::bit(SIGSEGV) | raw::bit(SIGBUS));
            self.waiting().faults_arrive.set(true);
        }
    }

    #[inline]
    fn waiting(&self) -> &Waiting {
        // SAFETY: belongs to this thread, has no destructor, and so lives as long as the thread.
        unsafe { &*self.waiting }
    }
}

impl Drop for Undisturbed {
    #[inline]
    fn drop(&mut self) {
        let waiting = self.waiting();
        compiler_fence(Ordering::SeqCst);
        let outer = waiting.sections.get() - 1;
        waiting.sections.set(outer);
        compiler_fence(Ordering::SeqCst);
        if outer == 0
            && let Some(mask) = waiting.afterwards.get()
        {
            waiting.afterwards.set(None);
            waiting.run_has_mask.set(false);
            raw::set_mask(mask);
        }
    }
}

/// The thread's mask may have changed: the next section looks whether faults arrive.
pub(crate) fn mask_changed() {
    WAITING.with(|waiting| waiting.faults_arrive.set(false));
}

macro_rules! mask_functions {
    ($($name:ident)*) => { $(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(
            how: c_int, new: *const sigset_t, old: *mut sigset_t,
        ) -> c_int {
            // SAFETY: the caller passes what libc's function asks for.
            let result = unsafe { real::$name(how, new, old) };
            mask_changed();
            result
        }
    )* };
}

mask_functions! { sigprocmask pthread_sigmask }

/// The handler that the kernel knows for every signal that the program handles.
pub(crate) extern "C" fn arrived(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    let errno = raw::errno();
    if abi::interrupt_current_run() || WAITING.with(|waiting| waiting.sections.get() != 0) {
        defer(signal, info, context.cast());
    } else {
        deliver(signal, info, context);
    }
    raw::set_errno(errno);
}

/// Leaves the signal pending, and blocked until the section ends.
fn defer(signal: c_int, info: *const siginfo_t, context: *mut ucontext_t) {
    // Also without SA_NODEFER another signal may come: not from here on.
    raw::block(!NEVER_BLOCKED);
    // SAFETY: the kernel passed the interrupted context. Its mask is one word of 8 bytes, at the
    // beginning of libc's larger type.
    let interrupted = unsafe { (&raw mut (*context).uc_sigmask).cast::<Mask>() };
    WAITING.with(|waiting| {
        if !waiting.run_has_mask.get() {
            // If this handler interrupted another one that had come less far, that one will store
            // its own, which is the thread's.
            // SAFETY: as above.
            waiting.afterwards.set(Some(unsafe { interrupted.read() }));
        }
    });
    // SAFETY: as above. The kernel takes the mask from there when this handler returns.
    unsafe { interrupted.write(interrupted.read() | !NEVER_BLOCKED) };
    // It fails if too many signals are queued; then a run still ends, as it must.
    let _ = raw::queue_to_this_thread(signal, info);
}

/// Does what the program wants done when `signal` arrives.
fn deliver(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    let (handler, once) = handlers::handler(signal);
    match handler {
        SIG_IGN => {}
        SIG_DFL => {
            // Ours is installed for KVM_SET_SIGNAL_MASK only, or the program has just changed its
            // mind. The signal takes effect when this handler returns.
            handlers::reset(signal);
            let _ = raw::queue_to_this_thread(signal, info);
        }
        _ => {
            if once {
                handlers::reset(signal);
            }
            call(handler, signal, info, context);
        }
    }
}

/// Calls a handler of the program. One that expects the signal's number alone ignores the rest.
pub(crate) fn call(handler: usize, signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    type Handler = extern "C" fn(c_int, *mut siginfo_t, *mut c_void);
    // SAFETY: the program installed this address as a handler of signals.
    let handler =
        unsafe { std::mem::transmute::<*const (), Handler>(ptr::with_exposed_provenance(handler)) };
    handler(signal, info, context);
}

/// Carries out `KVM_SET_SIGNAL_MASK`: a signal that only the mask of a run lets through is to end
/// the run and to stay pending, whether the program handles it or not.
#[derive(Debug)]
pub(crate) struct MaskedRun;

impl RunSignals for MaskedRun {
    fn enter(&self, mask: Mask) {
        let before = raw::mask();
        let mut let_through = before & !mask & !NO_HANDLER & !NEVER_BLOCKED;
        while let_through != 0 {
            let signal = let_through.trailing_zeros() as c_int + 1;
            let_through &= let_through - 1;
            handlers::take_over_one(signal);
        }
        WAITING.with(|waiting| {
            waiting.afterwards.set(Some(before));
            waiting.run_has_mask.set(true);
        });
        // What is pending arrives here, and ends the run that is about to begin.
        raw::set_mask(mask & !NEVER_BLOCKED);
    }

    /// Nothing: the mask is restored by [`Undisturbed`], when a handler may run.
    fn leave(&self) {}

    fn pending(&self, mask: Mask) -> bool {
        raw::pending() & !mask != 0
    }
}
