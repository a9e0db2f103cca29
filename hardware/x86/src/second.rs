//! Work for the second processor.

use crate::smp;
use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use core::hint::spin_loop;
use core::sync::atomic::{AtomicBool, Ordering};
use spin::Mutex;

type Job = Box<dyn FnOnce() + Send>;

static JOB: Mutex<Option<Job>> = Mutex::new(None);
/// Whether there is a job. Asked before the lock is: on a simulator that takes its processors in turns,
/// one that takes a lock again and again can keep it from the other for ever.
static JOB_IS_THERE: AtomicBool = AtomicBool::new(false);

/// What the second processor does, for ever: what it is given.
pub fn work() -> ! {
    loop {
        while !JOB_IS_THERE.swap(false, Ordering::Acquire) {
            spin_loop();
        }
        // Taken in a statement of its own: the lock is not held while the job runs.
        let job = JOB.lock().take();
        if let Some(job) = job {
            job();
        }
    }
}

struct Outcome<T> {
    value: Mutex<Option<T>>,
    is_there: AtomicBool,
}

/// Work in progress on the second processor.
pub struct Running<T>(Arc<Outcome<T>>);

/// Has the second processor do something while this one goes on.
///
/// # Panics
/// On the second processor, and while it still works.
pub fn start<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Running<T> {
    assert!(smp::processor() == 0, "only the first processor gives work");
    let outcome = Arc::new(Outcome {
        value: Mutex::new(None),
        is_there: AtomicBool::new(false),
    });
    let there = Arc::clone(&outcome);
    let mut job = JOB.lock();
    assert!(job.is_none(), "the second processor has work already");
    *job = Some(Box::new(move || {
        let value = work();
        *there.value.lock() = Some(value);
        there.is_there.store(true, Ordering::Release);
    }));
    drop(job);
    JOB_IS_THERE.store(true, Ordering::Release);
    Running(outcome)
}

impl<T> Running<T> {
    /// Whether it is done.
    pub fn is_done(&self) -> bool {
        self.0.is_there.load(Ordering::Acquire)
    }

    /// Waits until it is done.
    pub fn join(self) -> T {
        // The job's own reference goes when it returns.
        while !self.is_done() || Arc::strong_count(&self.0) > 1 {
            spin_loop();
        }
        let value = self.0.value.lock().take();
        match value {
            Some(value) => value,
            None => unreachable!("the value was there before the flag"),
        }
    }
}

/// Looks at something until it is so, but not for ever.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) -> Result<(), String> {
    const LOOKS: u32 = 3_000_000;
    for _ in 0..LOOKS {
        if condition() {
            return Ok(());
        }
        spin_loop();
    }
    Err(alloc::format!("waited in vain until {what}"))
}
