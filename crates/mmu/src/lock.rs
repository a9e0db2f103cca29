//! The writers' lock.

use crate::host::Host;
use crate::sync::switch_point;
use core::hint::spin_loop;
use spin::{Mutex, MutexGuard};

/// A spin lock that asks the host for patience, since its holder may wait for other processors.
#[derive(Debug)]
pub(crate) struct Lock<T>(Mutex<T>);

impl<T> Lock<T> {
    pub(crate) const fn new(value: T) -> Self {
        Self(Mutex::new(value))
    }

    pub(crate) fn lock(&self, host: &impl Host) -> MutexGuard<'_, T> {
        loop {
            switch_point();
            for _ in 0..64 {
                if let Some(guard) = self.0.try_lock() {
                    return guard;
                }
                spin_loop();
            }
            host.wait_hint();
        }
    }
}
