//! What a vCPU's processor writes down about the guest's writes, on its way to the dirty log.
//!
//! The processor fills a page of 512 entries while it runs the guest (page-modification logging).
//! The thread that runs the vCPU empties it whenever the processor has stopped.

use std::sync::atomic::{AtomicU64, Ordering};
use twofold_arch::{Gpa, Hpa};

/// Entries of a log.
const ENTRIES: usize = 512;

/// The page that a processor writes to.
#[repr(align(4096))]
struct Page([AtomicU64; ENTRIES]);

/// A processor's log.
pub(crate) struct WriteLog(Box<Page>);

impl WriteLog {
    pub(crate) fn new() -> Self {
        Self(Box::new(Page([const { AtomicU64::new(0) }; ENTRIES])))
    }

    /// Where the processor finds the page.
    pub(crate) fn page(&self) -> Hpa {
        Hpa::new(self.0.0.as_ptr().expose_provenance() as u64)
    }

    /// The addresses that were written down, oldest first, if `next` is the entry that the
    /// processor would fill now: it counts down from the last and wraps below the first.
    pub(crate) fn entries(&self, next: u16) -> impl Iterator<Item = Gpa> {
        let first = usize::from(next.wrapping_add(1)).min(ENTRIES);
        let entries = self.0.0[first..].iter().rev();
        entries.map(|entry| Gpa::new(entry.load(Ordering::Relaxed)))
    }
}

/// Whether a processor runs with a log that has not been emptied since: odd while it does.
#[derive(Debug, Default)]
pub(crate) struct LogState(AtomicU64);

impl LogState {
    /// The processor is about to run. Only the thread that runs the vCPU calls this.
    #[inline]
    pub(crate) fn begin(&self) {
        let count = self.0.load(Ordering::Relaxed);
        self.0.store(count | 1, Ordering::Relaxed);
    }

    /// The log is empty.
    #[inline]
    pub(crate) fn drained(&self) {
        let count = self.0.load(Ordering::Relaxed);
        self.0.store((count | 1).wrapping_add(1), Ordering::Release);
    }

    /// Waits until everything that the processor wrote down before it was stopped has been taken
    /// from its log. The caller has stopped it: then it is not long.
    pub(crate) fn wait_until_drained(&self) {
        let seen = self.0.load(Ordering::Acquire);
        if seen & 1 == 1 {
            while self.0.load(Ordering::Acquire) == seen {
                std::thread::yield_now();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_come_oldest_first_and_a_full_log_has_all() {
        let log = WriteLog::new();
        assert_eq!(log.page().get() % 4096, 0);
        for (index, entry) in log.0.0.iter().enumerate() {
            entry.store((index as u64) << 12, Ordering::Relaxed);
        }
        assert_eq!(log.entries(511).count(), 0);
        let pages: Vec<_> = log.entries(508).map(|gpa| gpa.get() >> 12).collect();
        assert_eq!(pages, [511, 510, 509]);
        assert_eq!(log.entries(0xffff).count(), 512);
        assert_eq!(log.entries(0).last(), Some(Gpa::new(1 << 12)));
    }

    #[test]
    fn whoever_waits_goes_on_when_the_log_has_been_emptied() {
        let state = LogState::default();
        state.wait_until_drained();
        state.begin();
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| state.wait_until_drained());
            std::thread::sleep(std::time::Duration::from_millis(5));
            assert!(!waiter.is_finished());
            state.drained();
        });
        state.drained();
        state.wait_until_drained();
    }
}
