//! The line to a vCPU: the only part of it that other threads touch.
//!
//! A vCPU is *in guest mode* between [`Line::enter`] and [`Line::leave`]; only then does it use
//! translations from its TLB or walk second-stage tables. Both are plain stores to a sequence
//! number that is odd in guest mode. Whoever needs the vCPU to forget translations posts a
//! request, issues a heavy barrier, reads the sequence number and, if it is odd, waits until it
//! changes: entering looks at the requests after the store, so a vCPU that was not seen in guest
//! mode sees the request before it uses anything.

use crate::barrier::light_barrier;
#[cfg(loom)]
use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

bitflags::bitflags! {
    /// What other threads ask of a vCPU.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Request: u32 {
        /// Leave `run()` with `Exit::Kicked`. Stays until `run()` has returned for it.
        const EXIT = 1 << 0;
        /// Forget every cached translation.
        const FLUSH_TLB = 1 << 1;
        /// Forget which pages may be written without telling anyone, because code was decoded
        /// from a page that was not known to hold code.
        const DROP_WRITES = 1 << 2;
        /// Leave guest mode and stay outside until the machine's exclusive section ends.
        const PAUSE = 1 << 3;
    }
}

/// The shared half of a vCPU. Every method is safe to call from any thread.
#[derive(Debug)]
#[repr(align(128))]
pub struct Line {
    index: u32,
    requests: AtomicU32,
    /// Odd while the vCPU is in guest mode. Written only by the thread that runs the vCPU.
    sequence: AtomicU64,
}

impl Line {
    pub(crate) fn new(index: u32) -> Self {
        Self {
            index,
            requests: AtomicU32::new(0),
            sequence: AtomicU64::new(0),
        }
    }

    /// The vCPU's index, as given when it was created.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Makes `run()` return `Exit::Kicked` soon; if the vCPU is not running, at once when it is
    /// run next. One atomic instruction: async-signal-safe.
    pub fn kick(&self) {
        self.post(Request::EXIT);
    }

    /// Takes back a kick that no `run()` has reported yet.
    pub fn cancel_kick(&self) {
        self.clear(Request::EXIT);
    }

    /// Whether the vCPU is in guest mode at this moment.
    pub fn in_guest(&self) -> bool {
        self.sequence.load(Ordering::Acquire) & 1 == 1
    }

    /// Posts requests. The vCPU meets them at the next block boundary, or when it next enters
    /// guest mode.
    pub(crate) fn post(&self, request: Request) {
        self.requests.fetch_or(request.bits(), Ordering::SeqCst);
    }

    /// Whether anything is asked of the vCPU: one relaxed load, made at the start of each block.
    #[inline(always)]
    pub(crate) fn asked(&self) -> bool {
        self.requests.load(Ordering::Relaxed) != 0
    }

    /// What is asked of the vCPU. Acquires what the requester did before posting.
    pub(crate) fn pending(&self) -> Request {
        Request::from_bits_truncate(self.requests.load(Ordering::Acquire))
    }

    /// Marks requests as met. Called outside guest mode: whoever waits for a request takes it for
    /// met as soon as it is cleared.
    pub(crate) fn clear(&self, request: Request) {
        self.requests.fetch_and(!request.bits(), Ordering::SeqCst);
    }

    /// Enters guest mode. The caller looks at [`Line::asked`] afterwards and meets what it finds
    /// before it uses any translation.
    #[inline]
    pub(crate) fn enter(&self) {
        let sequence = self.sequence.load(Ordering::Relaxed);
        debug_assert!(sequence & 1 == 0, "the vCPU is in guest mode already");
        // Release, since a waiting thread may see only this store and not that of the `leave` before
        // it. On x86 it is an ordinary store all the same.
        self.sequence
            .store(sequence.wrapping_add(1), Ordering::Release);
        light_barrier();
        #[cfg(loom)]
        loom::sync::atomic::fence(Ordering::SeqCst);
    }

    /// Leaves guest mode: everything the vCPU did with its translations happened before.
    #[inline]
    pub(crate) fn leave(&self) {
        let sequence = self.sequence.load(Ordering::Relaxed);
        debug_assert!(sequence & 1 == 1, "the vCPU is not in guest mode");
        self.sequence
            .store(sequence.wrapping_add(1), Ordering::Release);
    }

    /// What a thread that posted a request and then issued a heavy barrier has to wait for.
    pub(crate) fn ticket(&self, request: Request) -> Ticket {
        Ticket {
            sequence: self.sequence.load(Ordering::Acquire),
            request,
        }
    }

    /// Whether the vCPU has left guest mode, however briefly, since the request was posted, or was
    /// not in guest mode then.
    ///
    /// A request that is not posted any more has been met, perhaps before the ticket was taken:
    /// requests are cleared outside guest mode.
    pub(crate) fn has_passed(&self, ticket: Ticket) -> bool {
        ticket.sequence & 1 == 0
            || self.sequence.load(Ordering::Acquire) != ticket.sequence
            || !self.pending().intersects(ticket.request)
    }
}

/// The state of a vCPU at one moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ticket {
    sequence: u64,
    request: Request,
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_vcpu_outside_guest_mode_need_not_be_waited_for() {
        let line = Line::new(0);
        let request = Request::FLUSH_TLB;
        line.post(request);
        assert!(line.has_passed(line.ticket(request)));
        line.enter();
        let ticket = line.ticket(request);
        assert!(!line.has_passed(ticket));
        line.leave();
        line.enter();
        assert!(line.has_passed(ticket));
        assert!(line.in_guest());
        line.leave();
        assert!(!line.in_guest());
    }

    #[test]
    fn a_request_that_was_met_before_the_ticket_was_taken_is_not_waited_for() {
        let line = Line::new(0);
        line.enter();
        line.post(Request::FLUSH_TLB);
        line.leave();
        line.clear(Request::FLUSH_TLB);
        line.enter();
        assert!(line.has_passed(line.ticket(Request::FLUSH_TLB)));
    }

    #[test]
    fn a_kick_stays_until_it_is_met() {
        let line = Line::new(3);
        line.kick();
        assert!(line.asked());
        assert_eq!(line.pending(), Request::EXIT);
        line.cancel_kick();
        assert!(!line.asked());
    }
}

/// Every interleaving of one vCPU with one thread that takes a page away:
/// `make interleavings`.
#[cfg(all(test, loom))]
mod interleavings {
    use super::*;
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;
    use loom::thread;

    struct Shared {
        line: Line,
        /// The page behind a translation that the vCPU has cached. Loom reports it when a use is
        /// not ordered before the page is given to somebody else.
        page: UnsafeCell<u32>,
        /// The guest goes on until it is told to stop, so that a flush that waits for ever shows.
        stop: AtomicU32,
    }

    fn vcpu(shared: &Shared) {
        let line = &shared.line;
        let mut cached = true;
        line.enter();
        loop {
            if line.asked() {
                line.leave();
                line.clear(Request::FLUSH_TLB);
                cached = false;
                line.enter();
                continue;
            }
            if cached {
                // SAFETY: that nobody writes meanwhile is what the model shows.
                #[expect(unsafe_code)]
                // UNSAFETY: loom's cell hands out pointers.
                shared.page.with(|page| assert_eq!(unsafe { *page }, 0));
            }
            if shared.stop.load(Ordering::Acquire) != 0 {
                break;
            }
            thread::yield_now();
        }
        line.leave();
    }

    #[test]
    fn a_page_is_taken_only_after_its_last_use() {
        loom::model(|| {
            let shared = Arc::new(Shared {
                line: Line::new(0),
                page: UnsafeCell::new(0),
                stop: AtomicU32::new(0),
            });
            let guest = thread::spawn({
                let shared = Arc::clone(&shared);
                move || vcpu(&shared)
            });
            shared.line.post(Request::FLUSH_TLB);
            // What `heavy_barrier` amounts to, with the fence in `enter` as its other half.
            loom::sync::atomic::fence(Ordering::SeqCst);
            let ticket = shared.line.ticket(Request::FLUSH_TLB);
            while !shared.line.has_passed(ticket) {
                thread::yield_now();
            }
            // SAFETY: as above.
            #[expect(unsafe_code)]
            // UNSAFETY: loom's cell hands out pointers.
            shared.page.with_mut(|page| unsafe { *page = 1 });
            shared.stop.store(1, Ordering::Release);
            guest.join().unwrap();
        });
    }
}
