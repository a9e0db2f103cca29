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
//! Before the first use of `/dev/kvm` nothing of this happens; [`take_over`] then replaces the
//! handlers that are there.

// UNSAFETY: installs signal handlers, calls those of the program, and exports functions in libc's
// place.
#![expect(unsafe_code)]

use std::cell::{Cell, UnsafeCell};
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, compiler_fence};

use libc::{
    SIG_DFL, SIG_ERR, SIG_IGN, SIGBUS, SIGSEGV, c_int, c_void, sigaction as Action, siginfo_t,
    ucontext_t,
};
use twofold_kvm::{RunSignals, abi};

use crate::raw::{self, Mask};
use crate::real;

/// Signals that no mask of ours blocks: those that an instruction raises (a blocked one kills the
/// process, and guest accesses need theirs), and the two that libc uses within itself.
const NEVER_BLOCKED: Mask = raw::bit(SIGSEGV)
    | raw::bit(SIGBUS)
    | raw::bit(libc::SIGILL)
    | raw::bit(libc::SIGFPE)
    | raw::bit(libc::SIGTRAP)
    | raw::bit(libc::SIGSYS)
    | raw::bit(32)
    | raw::bit(33);

/// What the kernel is never asked about.
const NO_HANDLER: Mask =
    raw::bit(libc::SIGKILL) | raw::bit(libc::SIGSTOP) | raw::bit(32) | raw::bit(33);

const SIGNALS: usize = 65;

// ---- what the program has asked for -------------------------------------------------------------

/// The program's disposition of one signal, where ours is installed in its place.
pub(crate) struct Disposition {
    /// What [`arrived`] reads, in one piece: `SIG_DFL`, `SIG_IGN` or a function.
    handler: AtomicUsize,
    /// Whether the handler is to be called only once: `SA_RESETHAND`.
    once: AtomicBool,
    /// All of it, read and written with the lock held.
    action: UnsafeCell<MaybeUninit<Action>>,
    /// Whether ours is installed. Otherwise the kernel has the program's own.
    ours: AtomicBool,
}

// SAFETY: the action is only reached through a `Table`, which holds the lock.
unsafe impl Sync for Disposition {}

static DISPOSITIONS: [Disposition; SIGNALS] = [const {
    Disposition {
        handler: AtomicUsize::new(SIG_DFL),
        once: AtomicBool::new(false),
        action: UnsafeCell::new(MaybeUninit::zeroed()),
        ours: AtomicBool::new(false),
    }
}; SIGNALS];

/// Whether handlers are being replaced.
static ACTIVE: AtomicBool = AtomicBool::new(false);

static LOCK: AtomicBool = AtomicBool::new(false);

/// The right to change dispositions. Signals are blocked meanwhile, so that a handler, which may
/// call `sigaction` itself, never waits for the thread that it interrupted.
struct Table {
    mask: Mask,
}

impl Table {
    fn lock() -> Self {
        let mask = raw::block(!NEVER_BLOCKED);
        while LOCK
            .compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed)
            .is_err()
        {
            std::hint::spin_loop();
        }
        Self { mask }
    }

    /// The program's disposition of `signal`.
    fn action(&self, signal: c_int) -> Action {
        let disposition = &DISPOSITIONS[signal as usize];
        if disposition.ours.load(Ordering::Relaxed) {
            // SAFETY: this table holds the lock; zeroed at first, and all fields are integers.
            return unsafe { (*disposition.action.get()).assume_init() };
        }
        let mut action = MaybeUninit::<Action>::zeroed();
        // SAFETY: only asks.
        unsafe { real::sigaction(signal, ptr::null(), action.as_mut_ptr()) };
        // SAFETY: as above.
        unsafe { action.assume_init() }
    }

    /// Records `action` as the program's, and installs ours with what it says about masks and
    /// stacks.
    fn replace(&self, signal: c_int, action: Action) -> c_int {
        let disposition = &DISPOSITIONS[signal as usize];
        // SAFETY: this table holds the lock.
        unsafe { (*disposition.action.get()).write(action) };
        disposition
            .once
            .store(action.sa_flags & libc::SA_RESETHAND != 0, Ordering::Relaxed);
        disposition
            .handler
            .store(action.sa_sigaction, Ordering::Release);
        disposition.ours.store(true, Ordering::Relaxed);
        if signal == SIGSEGV || signal == SIGBUS {
            // The handler of faults is there already and stays.
            return 0;
        }
        let ours = Action {
            sa_sigaction: arrived as *const () as usize,
            // SA_RESETHAND is done by `arrived`: the kernel would do it when a signal is deferred.
            sa_flags: (action.sa_flags | libc::SA_SIGINFO) & !libc::SA_RESETHAND,
            ..action
        };
        // SAFETY: `arrived` is a handler that can run at any time.
        unsafe { real::sigaction(signal, &raw const ours, ptr::null_mut()) }
    }

    /// Gives the kernel the program's own disposition, which needs nothing of us.
    fn hand_back(&self, signal: c_int, action: &Action) -> c_int {
        let disposition = &DISPOSITIONS[signal as usize];
        // SAFETY: the program's own action.
        let result = unsafe { real::sigaction(signal, action, ptr::null_mut()) };
        if result == 0 {
            disposition.ours.store(false, Ordering::Relaxed);
            disposition
                .handler
                .store(action.sa_sigaction, Ordering::Release);
        }
        result
    }

    /// Makes `action` what the program has for `signal`.
    fn set(&self, signal: c_int, action: Action) -> c_int {
        let plain = action.sa_sigaction == SIG_DFL || action.sa_sigaction == SIG_IGN;
        let faults = signal == SIGSEGV || signal == SIGBUS;
        if plain && !faults {
            self.hand_back(signal, &action)
        } else {
            self.replace(signal, action)
        }
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        LOCK.store(false, Ordering::Release);
        raw::set_mask(self.mask);
    }
}

/// Whether the program may handle `signal`.
fn can_be_handled(signal: c_int) -> bool {
    raw::bit(signal) & !NO_HANDLER != 0
}

/// From now on the handlers of the program are ours to call, beginning with those that are
/// installed already. The handlers of faults must be installed: [`crate::faults::install`].
pub(crate) fn take_over() {
    let table = Table::lock();
    ACTIVE.store(true, Ordering::Release);
    for signal in (1..SIGNALS as c_int).filter(|signal| can_be_handled(*signal)) {
        let action = table.action(signal);
        if action.sa_sigaction != SIG_DFL && action.sa_sigaction != SIG_IGN {
            table.replace(signal, action);
        }
    }
}

/// Records what the program had for a signal whose handler of faults was just installed.
pub(crate) fn record_fault_handler(signal: c_int, action: Action) {
    Table::lock().replace(signal, action);
}

/// The program's disposition of `signal`, where it is ours to carry out; takes the lock.
pub(crate) fn disposition(signal: c_int) -> Action {
    Table::lock().action(signal)
}

/// Makes the program's disposition of `signal` the default one.
pub(crate) fn reset(signal: c_int) {
    Table::lock().set(signal, default_action());
}

/// Lets the kernel do to the process what it does by default, from the next `signal` on.
pub(crate) fn surrender(signal: c_int) {
    Table::lock().hand_back(signal, &default_action());
}

fn default_action() -> Action {
    let action = MaybeUninit::<Action>::zeroed();
    // SAFETY: zero is SIG_DFL, no flags and an empty mask.
    unsafe { action.assume_init() }
}

/// In a forked child: another thread may have held the lock.
pub(crate) fn after_fork() {
    LOCK.store(false, Ordering::Release);
}

// ---- arrival ------------------------------------------------------------------------------------

/// What a thread knows about the signals that have to wait. Only the thread itself and handlers
/// that interrupt it use it.
struct Waiting {
    /// How many [`Undisturbed`] sections the thread is in.
    sections: Cell<u32>,
    /// The mask to be restored at the end of the outermost one.
    afterwards: Cell<Option<Mask>>,
    /// Whether that mask was set aside by `KVM_SET_SIGNAL_MASK` and not by a deferred signal.
    run_has_mask: Cell<bool>,
}

thread_local! {
    static WAITING: Waiting = const {
        Waiting { sections: Cell::new(0), afterwards: Cell::new(None), run_has_mask: Cell::new(false) }
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
        section
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

/// The handler that the kernel knows for every signal that the program handles.
extern "C" fn arrived(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
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
    let disposition = &DISPOSITIONS[signal as usize];
    let handler = disposition.handler.load(Ordering::Acquire);
    match handler {
        SIG_IGN => {}
        SIG_DFL => {
            // Ours is installed for KVM_SET_SIGNAL_MASK only, or the program has just changed its
            // mind. The signal takes effect when this handler returns.
            reset(signal);
            let _ = raw::queue_to_this_thread(signal, info);
        }
        _ => {
            if disposition.once.load(Ordering::Relaxed) {
                reset(signal);
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
            if !DISPOSITIONS[signal as usize].ours.load(Ordering::Relaxed) {
                let table = Table::lock();
                let action = table.action(signal);
                table.replace(signal, action);
            }
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

// ---- libc's functions ---------------------------------------------------------------------------

/// `sigaction`, for signals that the program may handle.
///
/// # Safety
/// As libc's.
unsafe fn set_action(signal: c_int, new: *const Action, old: *mut Action) -> c_int {
    if !can_be_handled(signal) || !ACTIVE.load(Ordering::Acquire) {
        // SAFETY: the caller passes what libc's function asks for.
        let result = unsafe { real::sigaction(signal, new, old) };
        let meanwhile = can_be_handled(signal) && ACTIVE.load(Ordering::Acquire);
        if result != 0 || new.is_null() || !meanwhile {
            return result;
        }
        // `take_over` ran in another thread and may have come too early for this one.
        // SAFETY: as above.
        return unsafe { set_action(signal, new, ptr::null_mut()) };
    }
    // A bad pointer of the caller's faults here, where the lock is not held.
    // SAFETY: null, or the caller's structure.
    let new = unsafe { new.as_ref() }.copied();
    let table = Table::lock();
    let before = table.action(signal);
    let result = new.map_or(0, |new| table.set(signal, new));
    drop(table);
    if result == 0 && !old.is_null() {
        // SAFETY: the caller's structure.
        unsafe { old.write(before) };
    }
    result
}

/// Installs `handler` with these flags and nothing in its mask but, if asked for, the signal
/// itself; returns the handler before.
fn set_handler(signal: c_int, handler: usize, flags: c_int) -> usize {
    let mut old = MaybeUninit::<Action>::zeroed();
    let new = MaybeUninit::<Action>::zeroed();
    // SAFETY: zero is an empty mask and no flags.
    let new = Action {
        sa_sigaction: handler,
        sa_flags: flags,
        ..unsafe { new.assume_init() }
    };
    // SAFETY: two structures of this function.
    unsafe {
        if set_action(signal, &raw const new, old.as_mut_ptr()) != 0 {
            return SIG_ERR;
        }
        old.assume_init().sa_sigaction
    }
}

macro_rules! sigaction_functions {
    ($($name:ident)*) => { $(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(
            signal: c_int, new: *const Action, old: *mut Action,
        ) -> c_int {
            // SAFETY: the caller passes what libc's function asks for.
            unsafe { set_action(signal, new, old) }
        }
    )* };
}

sigaction_functions! { sigaction __sigaction }

macro_rules! signal_functions {
    ($($name:ident($real:ident, $flags:expr);)*) => { $(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(signal: c_int, handler: usize) -> usize {
            if !can_be_handled(signal) || !ACTIVE.load(Ordering::Acquire) {
                // SAFETY: the caller passes what libc's function asks for.
                return unsafe { real::$real(signal, handler) };
            }
            set_handler(signal, handler, $flags)
        }
    )* };
}

signal_functions! {
    signal(signal, libc::SA_RESTART);
    bsd_signal(signal, libc::SA_RESTART);
    ssignal(signal, libc::SA_RESTART);
    sysv_signal(__sysv_signal, libc::SA_RESETHAND | libc::SA_NODEFER);
    __sysv_signal(__sysv_signal, libc::SA_RESETHAND | libc::SA_NODEFER);
}

/// System V's `SIG_HOLD`: block the signal and leave its handler.
const SIG_HOLD: usize = 2;

#[unsafe(no_mangle)]
unsafe extern "C" fn sigset(signal: c_int, handler: usize) -> usize {
    if !can_be_handled(signal) || !ACTIVE.load(Ordering::Acquire) {
        // SAFETY: the caller passes what libc's function asks for.
        return unsafe { real::sigset(signal, handler) };
    }
    let bit = raw::bit(signal);
    if handler == SIG_HOLD {
        let before = raw::block(bit);
        return if before & bit != 0 {
            SIG_HOLD
        } else {
            disposition(signal).sa_sigaction
        };
    }
    let before = set_handler(signal, handler, 0);
    if before == SIG_ERR {
        return SIG_ERR;
    }
    let mask = raw::mask();
    raw::set_mask(mask & !bit);
    if mask & bit != 0 { SIG_HOLD } else { before }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn sigignore(signal: c_int) -> c_int {
    if !can_be_handled(signal) || !ACTIVE.load(Ordering::Acquire) {
        // SAFETY: takes no pointer.
        return unsafe { real::sigignore(signal) };
    }
    if set_handler(signal, SIG_IGN, 0) == SIG_ERR {
        -1
    } else {
        0
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn siginterrupt(signal: c_int, interrupt: c_int) -> c_int {
    if !can_be_handled(signal) || !ACTIVE.load(Ordering::Acquire) {
        // SAFETY: takes no pointer.
        return unsafe { real::siginterrupt(signal, interrupt) };
    }
    let table = Table::lock();
    let mut action = table.action(signal);
    if interrupt == 0 {
        action.sa_flags |= libc::SA_RESTART;
    } else {
        action.sa_flags &= !libc::SA_RESTART;
    }
    table.set(signal, action)
}
