//! The locks: spinning, or `loom`'s when every interleaving is explored.
//!
//! Order: the table of VMs, then the host, then a guest or the hypervisor (SPEC 2.4). A vCPU's own
//! lock is only ever taken by the processor that has it loaded, before the host's.

#[cfg(not(loom))]
pub(crate) use spin::Mutex as Lock;

#[cfg(loom)]
pub(crate) use self::explored::Lock;

#[cfg(loom)]
mod explored {
    use loom::sync::MutexGuard as Guard;

    /// `loom`'s mutex with the spinning one's signatures.
    pub(crate) struct Lock<T>(loom::sync::Mutex<T>);

    impl<T> Lock<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(loom::sync::Mutex::new(value))
        }

        #[expect(clippy::unwrap_used, reason = "poisoned only after a failed test")]
        pub(crate) fn lock(&self) -> Guard<'_, T> {
            self.0.lock().unwrap()
        }
    }
}
