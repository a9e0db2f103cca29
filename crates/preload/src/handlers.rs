//! Which handlers the program has installed.
//!
//! In place of a function of the program the kernel is given [`signals::arrived`], which calls it
//! when it may. The program does not see that: what it asks for is recorded here, and it is told
//! what it asked for. `SIG_DFL` and `SIG_IGN` go to the kernel as they are.
//!
//! Before the first use of `/dev/kvm` nothing of this happens; [`take_over`] then replaces the
//! handlers that are there.

// UNSAFETY: installs signal handlers, and exports functions in libc's place.
#![expect(unsafe_code)]

use std::cell::UnsafeCell;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use libc::{SIG_DFL, SIG_ERR, SIG_IGN, SIGBUS, SIGSEGV, c_int, sigaction as Action};

use crate::raw::{self, Mask};
use crate::real;
use crate::signals::{self, NEVER_BLOCKED, NO_HANDLER};

/// Signal numbers, with none for 0.
const SIGNALS: usize = 65;

/// The program's disposition of one signal, where ours is installed in its place.
struct Disposition {
    /// What [`handler`] reads, in one piece: `SIG_DFL`, `SIG_IGN` or a function.
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
        let mut ours = Action {
            sa_sigaction: signals::arrived as *const () as usize,
            // SA_RESETHAND is done by `signals::arrived`, since the kernel would do it when a
            // signal is deferred.
            sa_flags: (action.sa_flags | libc::SA_SIGINFO) & !libc::SA_RESETHAND,
            ..action
        };
        // SAFETY: a set of signals of this function's; a handler that can run at any time.
        unsafe {
            // A handler may call KVM, whose accesses may fault.
            libc::sigdelset(&raw mut ours.sa_mask, SIGSEGV);
            libc::sigdelset(&raw mut ours.sa_mask, SIGBUS);
            real::sigaction(signal, &raw const ours, ptr::null_mut())
        }
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

/// Whether [`take_over`] has begun.
pub(crate) fn are_taken_over() -> bool {
    ACTIVE.load(Ordering::Relaxed)
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

/// [`take_over`] for one signal, also if the program has no handler for it.
pub(crate) fn take_over_one(signal: c_int) {
    if !DISPOSITIONS[signal as usize].ours.load(Ordering::Relaxed) {
        let table = Table::lock();
        let action = table.action(signal);
        table.replace(signal, action);
    }
}

/// What to call for `signal`, and whether only once. Takes no lock.
pub(crate) fn handler(signal: c_int) -> (usize, bool) {
    let disposition = &DISPOSITIONS[signal as usize];
    (
        disposition.handler.load(Ordering::Acquire),
        disposition.once.load(Ordering::Relaxed),
    )
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
