//! Locks that fail instead of waiting: the module never spins on behalf of its caller.

use twofold_table::sync::atomic::{AtomicU32, Ordering};

const EXCLUSIVE: u32 = 1 << 31;

/// Held by one, or shared by many.
#[derive(Debug)]
pub(crate) struct Sharex(AtomicU32);

impl Sharex {
    pub(crate) fn new() -> Self {
        Self(AtomicU32::new(0))
    }

    /// Shares the lock, unless someone holds it alone.
    pub(crate) fn try_shared(&self) -> Option<SharexGuard<'_>> {
        let mut value = self.0.load(Ordering::Relaxed);
        loop {
            if value >= EXCLUSIVE - 1 {
                return None;
            }
            match self
                .0
                .compare_exchange(value, value + 1, Ordering::Acquire, Ordering::Relaxed)
            {
                Ok(_) => {
                    return Some(SharexGuard {
                        lock: self,
                        value: 1,
                    });
                }
                Err(found) => value = found,
            }
        }
    }

    /// Takes the lock alone, if nobody has it.
    pub(crate) fn try_exclusive(&self) -> Option<SharexGuard<'_>> {
        self.0
            .compare_exchange(0, EXCLUSIVE, Ordering::Acquire, Ordering::Relaxed)
            .ok()
            .map(|_| SharexGuard {
                lock: self,
                value: EXCLUSIVE,
            })
    }
}

/// The lock, until dropped.
#[must_use = "the lock is held until this is dropped"]
#[derive(Debug)]
pub(crate) struct SharexGuard<'a> {
    lock: &'a Sharex,
    value: u32,
}

impl Drop for SharexGuard<'_> {
    fn drop(&mut self) {
        self.lock.0.fetch_sub(self.value, Ordering::Release);
    }
}

#[cfg(all(test, not(loom), not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn many_share_or_one_holds() {
        let lock = Sharex::new();
        let first = lock.try_shared().unwrap();
        let second = lock.try_shared().unwrap();
        assert!(lock.try_exclusive().is_none());
        drop((first, second));
        let alone = lock.try_exclusive().unwrap();
        assert!(lock.try_shared().is_none());
        assert!(lock.try_exclusive().is_none());
        drop(alone);
        assert!(lock.try_shared().is_some());
    }
}
