//! TLB epochs: how the module knows that no virtual processor uses an old translation (SPEC 5.7).
//!
//! Every virtual processor that is inside belongs to the epoch in which it entered. TRACK begins a
//! new epoch, and refuses while anyone from the epoch before the present one is inside: so two
//! counts, by the epoch's parity, are enough. What was blocked in epoch *e* is tracked once the
//! present epoch is later than *e* and nobody from *e* is inside.

use crate::lock::Sharex;
use crate::status::{Operand, Status};
use twofold_table::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// The present epoch of a TD and who is inside.
#[derive(Debug)]
pub(crate) struct Epochs {
    lock: Sharex,
    now: AtomicU64,
    inside: [AtomicU32; 2],
}

impl Epochs {
    pub(crate) fn new() -> Self {
        Self {
            lock: Sharex::new(),
            now: AtomicU64::new(1),
            inside: [AtomicU32::new(0), AtomicU32::new(0)],
        }
    }

    fn count(&self, epoch: u64) -> &AtomicU32 {
        &self.inside[(epoch & 1) as usize]
    }

    /// The present epoch.
    pub(crate) fn now(&self) -> u64 {
        self.now.load(Ordering::SeqCst)
    }

    /// A virtual processor enters. Returns the epoch that it belongs to until it leaves.
    ///
    /// # Errors
    /// `OPERAND_BUSY` while someone begins a new epoch.
    pub(crate) fn enter(&self) -> Result<u64, Status> {
        let _shared = self
            .lock
            .try_shared()
            .ok_or(Status::OPERAND_BUSY.with(Operand::TdEpoch))?;
        let epoch = self.now();
        self.count(epoch).fetch_add(1, Ordering::SeqCst);
        Ok(epoch)
    }

    /// A virtual processor that entered in `epoch` leaves.
    pub(crate) fn leave(&self, epoch: u64) {
        self.count(epoch).fetch_sub(1, Ordering::SeqCst);
    }

    /// Begins a new epoch.
    ///
    /// # Errors
    /// `OPERAND_BUSY` while someone enters, `PREVIOUS_TLB_EPOCH_BUSY` while someone from the epoch
    /// before this one is inside.
    pub(crate) fn track(&self) -> Result<(), Status> {
        let _alone = self
            .lock
            .try_exclusive()
            .ok_or(Status::OPERAND_BUSY.with(Operand::TdEpoch))?;
        let now = self.now();
        if self.count(now + 1).load(Ordering::SeqCst) != 0 {
            return Err(Status::PREVIOUS_TLB_EPOCH_BUSY);
        }
        self.now.store(now + 1, Ordering::SeqCst);
        Ok(())
    }

    /// Whether nobody can use a translation of what was blocked in `blocked_in`.
    pub(crate) fn is_tracked(&self, blocked_in: u64) -> bool {
        let now = self.now();
        match now.checked_sub(blocked_in) {
            None | Some(0) => false,
            Some(1) => self.count(blocked_in).load(Ordering::SeqCst) == 0,
            Some(_) => true,
        }
    }
}

#[cfg(all(test, not(loom), not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn what_is_blocked_is_tracked_once_its_epoch_is_over_and_empty() {
        let epochs = Epochs::new();
        let blocked = epochs.now();
        assert!(!epochs.is_tracked(blocked));
        let inside = epochs.enter().unwrap();
        assert_eq!(inside, blocked);
        epochs.track().unwrap();
        // It entered before the range was blocked, perhaps.
        assert!(!epochs.is_tracked(blocked));
        epochs.leave(inside);
        assert!(epochs.is_tracked(blocked));
    }

    #[test]
    fn a_second_track_is_refused_while_the_epoch_before_is_inside() {
        let epochs = Epochs::new();
        let inside = epochs.enter().unwrap();
        epochs.track().unwrap();
        assert!(
            epochs
                .track()
                .unwrap_err()
                .is(Status::PREVIOUS_TLB_EPOCH_BUSY)
        );
        epochs.leave(inside);
        epochs.track().unwrap();
        assert!(epochs.is_tracked(inside));
    }

    #[test]
    fn who_enters_the_new_epoch_does_not_hold_the_old_one_up() {
        let epochs = Epochs::new();
        let blocked = epochs.now();
        epochs.track().unwrap();
        let late = epochs.enter().unwrap();
        assert!(epochs.is_tracked(blocked));
        epochs.leave(late);
    }
}

/// Every interleaving of entry, BLOCK, TRACK and removal:
/// `RUSTFLAGS="--cfg loom" cargo test -p twofold-tdx --lib interleavings`.
#[cfg(all(test, loom))]
mod interleavings {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    /// A virtual processor enters, reads a mapping and uses it; the host blocks it, tracks, and
    /// takes the page away once that is allowed.
    #[test]
    fn no_page_is_removed_while_a_guest_may_use_an_old_translation() {
        loom::model(|| {
            let epochs = Arc::new(Epochs::new());
            let mapped = Arc::new(AtomicU32::new(1));
            let page = Arc::new(AtomicU32::new(1));
            let guest = {
                let (epochs, mapped, page) =
                    (Arc::clone(&epochs), Arc::clone(&mapped), Arc::clone(&page));
                thread::spawn(move || {
                    if let Ok(epoch) = epochs.enter() {
                        if mapped.load(Ordering::SeqCst) == 1 {
                            assert_eq!(page.load(Ordering::SeqCst), 1, "a page in use was removed");
                        }
                        epochs.leave(epoch);
                    }
                })
            };
            mapped.store(0, Ordering::SeqCst);
            let blocked = epochs.now();
            let _ = epochs.track();
            if epochs.is_tracked(blocked) {
                page.store(0, Ordering::SeqCst);
            }
            guest.join().unwrap();
        });
    }

    #[test]
    fn two_tracks_and_a_late_guest_never_lose_count() {
        loom::model(|| {
            let epochs = Arc::new(Epochs::new());
            let guest = {
                let epochs = Arc::clone(&epochs);
                thread::spawn(move || {
                    if let Ok(epoch) = epochs.enter() {
                        assert!(!epochs.is_tracked(epoch));
                        epochs.leave(epoch);
                    }
                })
            };
            let _ = epochs.track();
            let _ = epochs.track();
            guest.join().unwrap();
            assert!(epochs.track().is_ok() || epochs.track().is_ok());
        });
    }
}
