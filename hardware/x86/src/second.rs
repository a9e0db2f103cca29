//! Work for the second processor.

use crate::smp;
use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use core::hint::spin_loop;
use spin::Mutex;

type Job = Box<dyn FnOnce() + Send>;

static JOB: Mutex<Option<Job>> = Mutex::new(None);

/// What the second processor does, for ever: what it is given.
pub fn work() -> ! {
    loop {
        // Taken in a statement of its own: the lock is not held while the job runs.
        let job = JOB.lock().take();
        match job {
            Some(job) => job(),
            None => spin_loop(),
        }
    }
}

/// Work in progress on the second processor.
pub struct Running<T>(Arc<Mutex<Option<T>>>);

/// Has the second processor do something while this one goes on.
///
/// # Panics
/// On the second processor, and while it still works.
pub fn start<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Running<T> {
    assert!(smp::processor() == 0, "only the first processor gives work");
    let result = Arc::new(Mutex::new(None));
    let place = Arc::clone(&result);
    let mut job = JOB.lock();
    assert!(job.is_none(), "the second processor has work already");
    *job = Some(Box::new(move || {
        let value = work();
        *place.lock() = Some(value);
    }));
    Running(result)
}

impl<T> Running<T> {
    /// Whether it is done.
    pub fn is_done(&self) -> bool {
        self.0.lock().is_some()
    }

    /// Waits until it is done.
    pub fn join(self) -> T {
        let value = loop {
            if let Some(value) = self.0.lock().take() {
                break value;
            }
            spin_loop();
        };
        // The job's own reference goes when it returns.
        while Arc::strong_count(&self.0) > 1 {
            spin_loop();
        }
        value
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
