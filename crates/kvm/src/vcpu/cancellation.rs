//! Threads that may be cancelled at any moment: whoever cancels one while it runs a vCPU has the run
//! end.

use super::VcpuCore;
use crate::sync::ProcessMutex;
use std::cell::Cell;
use std::sync::atomic::Ordering;

/// A thread that may be cancelled at any moment.
#[derive(Debug)]
struct Thread {
    name: usize,
    cancelled: bool,
    /// The vCPU that it runs, or null. Not null only while the run's [`CancellableRun`] exists.
    runs: *const VcpuCore,
}

// UNSAFETY: sends a pointer to other threads.
#[expect(unsafe_code)]
// SAFETY: it points to a vCPU, which threads share, and is followed only while it is known to be there.
unsafe impl Send for Thread {}

static THREADS: ProcessMutex<Vec<Thread>> = ProcessMutex::new(Vec::new());

thread_local! {
    /// This thread's name in [`THREADS`], or 0.
    static NAME: Cell<usize> = const { Cell::new(0) };
}

pub(crate) fn set_cancellable(thread: usize, on: bool) {
    NAME.set(if on { thread } else { 0 });
    THREADS.with(|threads| {
        // Also what is left of a thread that had the name before.
        threads.retain(|other| other.name != thread);
        if on {
            threads.push(Thread {
                name: thread,
                cancelled: false,
                runs: std::ptr::null(),
            });
        }
    });
}

#[inline]
pub(crate) fn is_cancellable() -> bool {
    NAME.get() != 0
}

pub(crate) fn interrupt_run_of(thread: usize) {
    THREADS.with(|threads| {
        for other in threads.iter_mut().filter(|other| other.name == thread) {
            other.cancelled = true;
            // UNSAFETY: dereferences what `CancellableRun::begin` stored.
            #[expect(unsafe_code)]
            // SAFETY: not null only until `CancellableRun` is dropped, which takes this lock, and
            // that outlives the borrow of the vCPU it was made from.
            if let Some(core) = unsafe { other.runs.as_ref() } {
                core.signalled.store(true, Ordering::SeqCst);
                core.line.kick();
                core.inbox.ring();
            }
        }
    });
}

/// A run in a thread that may be cancelled.
pub(super) struct CancellableRun(usize);

impl CancellableRun {
    /// If this thread is one. If it has been cancelled, the run ends at once.
    #[inline]
    pub(super) fn begin(core: &VcpuCore) -> Option<Self> {
        is_cancellable().then(|| Self::register(core))
    }

    fn register(core: &VcpuCore) -> Self {
        let name = NAME.get();
        THREADS.with(|threads| {
            for thread in threads.iter_mut().filter(|thread| thread.name == name) {
                thread.runs = core;
                if thread.cancelled {
                    core.signalled.store(true, Ordering::SeqCst);
                    core.line.kick();
                }
            }
        });
        Self(name)
    }
}

impl Drop for CancellableRun {
    fn drop(&mut self) {
        THREADS.with(|threads| {
            for thread in threads.iter_mut().filter(|thread| thread.name == self.0) {
                thread.runs = std::ptr::null();
            }
        });
    }
}
