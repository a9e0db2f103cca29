//! Locks that no panic poisons and that a forked child can use.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{MutexGuard, PoisonError, RwLockReadGuard, RwLockWriteGuard};

/// A mutex whose guard is handed out even after a panic in another thread.
///
/// Uncontended, taking and releasing it is one locked instruction each and no system call.
#[derive(Debug, Default)]
pub(crate) struct Mutex<T>(std::sync::Mutex<T>);

impl<T> Mutex<T> {
    pub(crate) const fn new(value: T) -> Self {
        Self(std::sync::Mutex::new(value))
    }

    /// Waits until the mutex is free and takes it.
    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A readers-writer lock with the same attitude.
#[derive(Debug, Default)]
pub(crate) struct RwLock<T>(std::sync::RwLock<T>);

impl<T> RwLock<T> {
    pub(crate) const fn new(value: T) -> Self {
        Self(std::sync::RwLock::new(value))
    }

    pub(crate) fn read(&self) -> RwLockReadGuard<'_, T> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn write(&self) -> RwLockWriteGuard<'_, T> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A process-wide mutex that can be held across `fork`, so that the child never finds it locked
/// by a thread that it does not have.
///
/// The gate in front is what `fork` holds: whoever passes it finds the inner mutex free. Waiting
/// at the gate yields the processor; these locks are held for a few instructions, when
/// descriptors and VMs come and go.
#[derive(Debug, Default)]
pub(crate) struct ProcessMutex<T> {
    gate: AtomicBool,
    value: Mutex<T>,
}

impl<T> ProcessMutex<T> {
    pub(crate) const fn new(value: T) -> Self {
        Self {
            gate: AtomicBool::new(false),
            value: Mutex::new(value),
        }
    }

    /// Runs `work` with the lock held.
    pub(crate) fn with<R>(&self, work: impl FnOnce(&mut T) -> R) -> R {
        self.close_gate();
        let result = work(&mut self.value.lock());
        self.open_gate();
        result
    }

    /// Before `fork`: waits for the lock and holds it without a guard.
    pub(crate) fn close_gate(&self) {
        while self
            .gate
            .compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed)
            .is_err()
        {
            rustix::thread::sched_yield();
        }
    }

    /// After `fork`, in parent and child: lets go of what [`Self::close_gate`] took.
    pub(crate) fn open_gate(&self) {
        self.gate.store(false, Ordering::Release);
    }
}
