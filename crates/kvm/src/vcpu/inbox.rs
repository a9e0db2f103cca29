//! What other threads leave for a vCPU: interrupts, and requests that it meets before it enters the
//! guest again. And the bell that wakes it if it sleeps.
//!
//! Nothing here takes a lock. Whoever leaves something first stores it, then asks, then kicks and
//! rings; the vCPU takes back the kick before it looks at what is asked, and announces that it
//! sleeps before it looks for the last time. So nothing is left unseen.

use super::VcpuCore;
use crate::irqchip::{Address, AddressMode};
use rustix::thread::{Timespec, futex};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

bitflags::bitflags! {
    /// What is asked of a vCPU.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub(crate) struct Ask: u32 {
        /// Interrupts have arrived for the local APIC.
        const INTERRUPT = 1 << 0;
        const NMI = 1 << 1;
        const INIT = 1 << 2;
        /// A start-up message has arrived.
        const START = 1 << 3;
        /// The time has come that it asked to be woken at.
        const ALARM = 1 << 4;
        /// The PICs' output has changed.
        const EXTERNAL = 1 << 5;
        /// Another vCPU wants it to go on although it halts.
        const UNHALT = 1 << 6;
        /// The VM's clock was set.
        const CLOCK = 1 << 7;
    }
}

/// No alarm.
pub(crate) const NEVER: u64 = u64::MAX;

/// The shared half of a vCPU with a local APIC.
#[derive(Debug)]
#[repr(align(64))]
pub(crate) struct Inbox {
    asked: AtomicU32,
    /// Moves whenever a sleeper should look again.
    bell: AtomicU32,
    sleeping: AtomicBool,
    start_vector: AtomicU8,
    /// Vectors that have arrived, by how they are triggered.
    edge: [AtomicU64; 4],
    level: [AtomicU64; 4],
    /// When to ask [`Ask::ALARM`] of the vCPU, in nanoseconds of [`crate::irqchip::now`].
    alarm: AtomicU64,
    /// How the local APIC is addressed: the id in the upper half, the logical id in the lower.
    address: AtomicU64,
    mode: AtomicU32,
    /// Messages of lowest priority that it has taken.
    taken: AtomicU32,
}

impl Default for Inbox {
    fn default() -> Self {
        Self {
            asked: AtomicU32::new(0),
            bell: AtomicU32::new(0),
            sleeping: AtomicBool::new(false),
            start_vector: AtomicU8::new(0),
            edge: Default::default(),
            level: Default::default(),
            alarm: AtomicU64::new(NEVER),
            address: AtomicU64::new(0),
            mode: AtomicU32::new(0),
            taken: AtomicU32::new(0),
        }
    }
}

impl Inbox {
    /// How the local APIC is addressed.
    pub(crate) fn address(&self) -> Address {
        let address = self.address.load(Ordering::Relaxed);
        Address {
            id: (address >> 32) as u32,
            logical: address as u32,
            mode: AddressMode::from_bits_truncate(self.mode.load(Ordering::Relaxed)),
        }
    }

    /// The local APIC is addressed like this from now on.
    pub(super) fn set_address(&self, address: &Address) {
        let both = u64::from(address.id) << 32 | u64::from(address.logical);
        self.address.store(both, Ordering::Relaxed);
        self.mode.store(address.mode.bits(), Ordering::Relaxed);
    }

    /// Messages of lowest priority that the vCPU has taken.
    pub(crate) fn taken(&self) -> u32 {
        self.taken.load(Ordering::Relaxed)
    }

    pub(crate) fn count_taken(&self) {
        self.taken.fetch_add(1, Ordering::Relaxed);
    }

    /// Leaves an interrupt. [`Ask::INTERRUPT`] has to follow.
    pub(crate) fn put_interrupt(&self, vector: u8, level: bool) {
        let kind = if level { &self.level } else { &self.edge };
        kind[usize::from(vector / 64)].fetch_or(1 << (vector % 64), Ordering::Relaxed);
    }

    /// Takes the interrupts: 64 vectors at a time, those that are edge-triggered and the others.
    pub(super) fn take_interrupts(&self) -> [(u64, u64); 4] {
        std::array::from_fn(|i| {
            let take = |word: &AtomicU64| match word.load(Ordering::Relaxed) {
                0 => 0,
                _ => word.swap(0, Ordering::Relaxed),
            };
            (take(&self.edge[i]), take(&self.level[i]))
        })
    }

    /// Leaves the vector of a start-up message. [`Ask::START`] has to follow.
    pub(crate) fn put_start_vector(&self, vector: u8) {
        self.start_vector.store(vector, Ordering::Relaxed);
    }

    pub(super) fn start_vector(&self) -> u8 {
        self.start_vector.load(Ordering::Relaxed)
    }

    /// Asks without waking: for the vCPU's own thread, and those that ring the bell later.
    pub(crate) fn ask(&self, ask: Ask) {
        self.asked.fetch_or(ask.bits(), Ordering::SeqCst);
    }

    /// Whether anything is asked: one load.
    #[inline]
    pub(super) fn is_asked(&self) -> bool {
        self.asked.load(Ordering::SeqCst) != 0
    }

    /// Takes what is asked.
    pub(super) fn take(&self) -> Ask {
        Ask::from_bits_truncate(self.asked.swap(0, Ordering::SeqCst))
    }

    /// Takes back what was asked and not yet taken.
    pub(crate) fn withdraw(&self, ask: Ask) {
        self.asked.fetch_and(!ask.bits(), Ordering::SeqCst);
    }

    /// When the vCPU wants [`Ask::ALARM`], in nanoseconds, or [`NEVER`].
    pub(crate) fn alarm(&self) -> u64 {
        self.alarm.load(Ordering::SeqCst)
    }

    pub(super) fn set_alarm(&self, at: u64) {
        self.alarm.store(at, Ordering::SeqCst);
    }

    /// Takes the alarm back if it is still set for `at`. Whether it was.
    pub(crate) fn take_alarm(&self, at: u64) -> bool {
        self.alarm
            .compare_exchange(at, NEVER, Ordering::SeqCst, Ordering::Relaxed)
            .is_ok()
    }

    /// Makes a sleeper look again, if its thread is the caller's own and was interrupted by a
    /// signal. Async-signal-safe.
    pub(super) fn ring_own(&self) {
        self.bell.fetch_add(1, Ordering::SeqCst);
    }

    /// Wakes the vCPU's thread if it sleeps.
    pub(super) fn ring(&self) {
        self.bell.fetch_add(1, Ordering::SeqCst);
        if self.sleeping.load(Ordering::SeqCst) {
            // It fails only for memory that is not there.
            let _ = futex::wake(&self.bell, futex::Flags::PRIVATE, 1);
        }
    }

    /// Sleeps until the bell rings, a signal arrives or the time is over; not at all if `awake`
    /// finds a reason, which is asked when nothing can be missed any more.
    pub(super) fn sleep(&self, timeout: Option<Duration>, awake: impl FnOnce() -> bool) {
        self.sleeping.store(true, Ordering::SeqCst);
        let bell = self.bell.load(Ordering::SeqCst);
        if !self.is_asked() && !awake() {
            let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
            // Whatever it answers, the caller looks again.
            let _ = futex::wait(&self.bell, futex::Flags::PRIVATE, bell, timeout.as_ref());
        }
        self.sleeping.store(false, Ordering::SeqCst);
    }
}

impl VcpuCore {
    /// Asks something of the vCPU from another thread, and has it look soon.
    pub(crate) fn notify(&self, ask: Ask) {
        self.inbox.ask(ask);
        self.line.kick();
        self.inbox.ring();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn interrupts_are_taken_once_with_their_trigger() {
        let inbox = Inbox::default();
        inbox.put_interrupt(0x41, false);
        inbox.put_interrupt(0xff, true);
        let taken = inbox.take_interrupts();
        assert_eq!(taken[1], (2, 0));
        assert_eq!(taken[3], (0, 1 << 63));
        assert_eq!(inbox.take_interrupts(), [(0, 0); 4]);
    }

    #[test]
    fn a_sleeper_is_woken_by_what_is_asked_before_and_after() {
        let inbox = Inbox::default();
        inbox.ask(Ask::NMI);
        inbox.sleep(None, || false);
        assert_eq!(inbox.take(), Ask::NMI);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(5));
                inbox.ask(Ask::INIT);
                inbox.ring();
            });
            while !inbox.is_asked() {
                inbox.sleep(None, || false);
            }
        });
        assert_eq!(inbox.take(), Ask::INIT);
        let before = Instant::now();
        inbox.sleep(Some(Duration::from_millis(2)), || false);
        assert!(before.elapsed() >= Duration::from_millis(2));
    }
}
