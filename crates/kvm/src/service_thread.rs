//! Threads of the library's own, which the program does not know of: its signals are not for them.

use std::io;
use std::thread::JoinHandle;

/// Starts a thread that takes no signals.
pub(crate) fn start(
    name: &str,
    work: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    without_signals(|| std::thread::Builder::new().name(name.into()).spawn(work))
}

/// Has the kernel wake this thread when its time has come, not some 50 µs later together with
/// others.
pub(crate) fn be_punctual() {
    // UNSAFETY: prctl.
    #[expect(unsafe_code)]
    // SAFETY: the call changes a number of this thread. It cannot fail with these arguments.
    unsafe {
        libc::prctl(libc::PR_SET_TIMERSLACK, 1_u64);
    }
}

/// Runs `work` with every signal blocked, which new threads inherit.
fn without_signals<R>(work: impl FnOnce() -> R) -> R {
    // UNSAFETY: the signal mask of this thread.
    #[expect(unsafe_code)]
    // SAFETY: both sets are initialised here, and the mask is put back as it was.
    unsafe {
        let mut all = std::mem::zeroed();
        let mut old = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut old);
        let result = work();
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const old, std::ptr::null_mut());
        result
    }
}
