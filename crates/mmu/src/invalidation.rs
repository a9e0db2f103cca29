//! Changes of host memory against faults in flight (SPEC 5.3).
//!
//! A fault takes a [`Snapshot`], finds the host page, and asks again inside its read section
//! before it publishes. A change of host memory raises the count, waits for the read sections that
//! began before, and only then zaps. So either the fault saw the change and retries, or its mapping
//! is there to be zapped.
//!
//! The recorded range is the union of all changes in progress, in host-virtual addresses: a slot
//! that is created while its memory changes is covered too.

use core::ops::Range;
use twofold_table::sync::atomic::{AtomicU64, Ordering};

/// Changes in progress in the low bits, changes ended above.
const ONE_ENDED: u64 = 1 << 20;
const IN_PROGRESS: u64 = ONE_ENDED - 1;

/// The sequence, and the range of the changes in progress.
#[derive(Debug)]
pub(crate) struct Invalidation {
    state: AtomicU64,
    start: AtomicU64,
    end: AtomicU64,
}

/// The state before the host was asked for a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Snapshot(u64);

impl Invalidation {
    pub(crate) fn new() -> Self {
        Self {
            state: AtomicU64::new(0),
            start: AtomicU64::new(0),
            end: AtomicU64::new(0),
        }
    }

    /// To be taken before the host is asked.
    #[inline(always)]
    pub(crate) fn snapshot(&self) -> Snapshot {
        Snapshot(self.state.load(Ordering::Acquire))
    }

    /// Whether what was learnt since `snapshot` about host memory in `hva` still stands. To be
    /// asked inside the read section that publishes it.
    #[inline(always)]
    pub(crate) fn allows(&self, snapshot: Snapshot, hva: Range<u64>) -> bool {
        let state = self.state.load(Ordering::Acquire);
        state == snapshot.0 && (state & IN_PROGRESS == 0 || self.outside(state, hva))
    }

    /// [`allows`](Self::allows) for any address: nothing was changing at `snapshot` and nothing has
    /// begun since.
    #[inline(always)]
    pub(crate) fn is_quiet_since(&self, snapshot: Snapshot) -> bool {
        snapshot.0 & IN_PROGRESS == 0 && self.state.load(Ordering::Acquire) == snapshot.0
    }

    #[cold]
    fn outside(&self, state: u64, hva: Range<u64>) -> bool {
        let start = self.start.load(Ordering::Acquire);
        let end = self.end.load(Ordering::Acquire);
        // The range belongs to this state only if the state has not moved on meanwhile.
        (hva.end <= start || end <= hva.start) && self.state.load(Ordering::Acquire) == state
    }

    /// A change of `hva` begins. The caller holds the writers' lock; afterwards it runs the heavy
    /// barrier and waits for the readers before it zaps.
    pub(crate) fn begin(&self, hva: Range<u64>) {
        let (mut start, mut end) = (hva.start, hva.end);
        if self.state.load(Ordering::Acquire) & IN_PROGRESS != 0 {
            start = start.min(self.start.load(Ordering::Relaxed));
            end = end.max(self.end.load(Ordering::Relaxed));
        }
        self.start.store(start, Ordering::Release);
        self.end.store(end, Ordering::Release);
        self.state.fetch_add(1, Ordering::SeqCst);
    }

    /// One change has ended. Needs no lock.
    pub(crate) fn end(&self) {
        self.state.fetch_add(ONE_ENDED - 1, Ordering::SeqCst);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_stands_only_until_a_change_begins_or_ends() {
        let invalidation = Invalidation::new();
        let before = invalidation.snapshot();
        assert!(invalidation.allows(before, 0..0x1000));
        invalidation.begin(0x1000..0x2000);
        assert!(!invalidation.allows(before, 0..0x1000));
        let during = invalidation.snapshot();
        assert!(invalidation.allows(during, 0..0x1000));
        assert!(invalidation.allows(during, 0x2000..0x3000));
        assert!(!invalidation.allows(during, 0x1000..0x2000));
        assert!(!invalidation.allows(during, 0..0x20_0000));
        invalidation.end();
        assert!(!invalidation.allows(during, 0..0x1000));
        assert!(invalidation.allows(invalidation.snapshot(), 0x1000..0x2000));
    }

    #[test]
    fn overlapping_changes_forbid_their_union_until_the_last_ends() {
        let invalidation = Invalidation::new();
        invalidation.begin(0x1000..0x2000);
        invalidation.begin(0x5000..0x6000);
        let during = invalidation.snapshot();
        assert!(!invalidation.allows(during, 0x3000..0x4000));
        invalidation.end();
        let during = invalidation.snapshot();
        assert!(!invalidation.allows(during, 0x3000..0x4000));
        invalidation.end();
        invalidation.begin(0x9000..0xa000);
        assert!(invalidation.allows(invalidation.snapshot(), 0x3000..0x4000));
        invalidation.end();
    }
}

/// Every interleaving of faults and changes:
/// `RUSTFLAGS="--cfg loom" cargo test -p twofold-mmu --lib interleavings`.
#[cfg(all(test, loom))]
#[expect(unsafe_code, reason = "UNSAFETY: each reader word has one thread")]
mod interleavings {
    use super::*;
    use loom::sync::{Arc, Mutex};
    use loom::thread;
    use twofold_table::sync::atomic::fence;
    use twofold_table::{ReaderWord, wait_for_readers};

    const PAGE: Range<u64> = 0x1000..0x2000;
    const OTHER: Range<u64> = 0x8000..0x9000;

    struct World {
        invalidation: Invalidation,
        reader: ReaderWord,
        /// The writers' lock.
        lock: Mutex<()>,
        /// What is at `PAGE` in the host: a number that grows with each change.
        host: AtomicU64,
        /// What the guest's table maps there, or 0.
        entry: AtomicU64,
    }

    impl World {
        fn new() -> Arc<Self> {
            Arc::new(Self {
                invalidation: Invalidation::new(),
                reader: ReaderWord::new(),
                lock: Mutex::new(()),
                host: AtomicU64::new(1),
                entry: AtomicU64::new(0),
            })
        }

        fn fault(&self) {
            let snapshot = self.invalidation.snapshot();
            let page = self.host.load(Ordering::Acquire);
            // SAFETY: only the faulting thread uses the word.
            let _section = unsafe { self.reader.enter() };
            if self.invalidation.allows(snapshot, PAGE) {
                let _ = self
                    .entry
                    .compare_exchange(0, page, Ordering::AcqRel, Ordering::Acquire);
            }
        }

        fn change(&self, hva: Range<u64>) {
            {
                let _writer = self.lock.lock().unwrap();
                self.invalidation.begin(hva.clone());
                fence(Ordering::SeqCst);
                let _readers = wait_for_readers([&self.reader].into_iter(), thread::yield_now);
                if hva == PAGE {
                    self.entry.store(0, Ordering::Release);
                }
            }
            if hva == PAGE {
                // From here to the end of the change the page belongs to nobody.
                assert_eq!(self.entry.load(Ordering::Acquire), 0);
                self.host.fetch_add(1, Ordering::AcqRel);
                assert_eq!(self.entry.load(Ordering::Acquire), 0);
            }
            self.invalidation.end();
        }

        fn check(&self) {
            let entry = self.entry.load(Ordering::Acquire);
            assert!(
                entry == 0 || entry == self.host.load(Ordering::Acquire),
                "a stale mapping"
            );
        }
    }

    #[test]
    fn a_fault_in_flight_never_maps_what_a_change_has_taken() {
        loom::model(|| {
            let world = World::new();
            let fault = {
                let world = Arc::clone(&world);
                thread::spawn(move || world.fault())
            };
            world.change(PAGE);
            fault.join().unwrap();
            world.check();
        });
    }

    #[test]
    fn a_fault_in_flight_survives_two_changes_one_of_them_elsewhere() {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(|| {
            let world = World::new();
            let fault = {
                let world = Arc::clone(&world);
                thread::spawn(move || world.fault())
            };
            let elsewhere = {
                let world = Arc::clone(&world);
                thread::spawn(move || world.change(OTHER))
            };
            world.change(PAGE);
            fault.join().unwrap();
            elsewhere.join().unwrap();
            world.check();
        });
    }
}
