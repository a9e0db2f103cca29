//! The local APIC's timer: one-shot, periodic, and to a deadline of the time stamp counter (SDM Vol.
//! 3, "APIC Timer").
//!
//! Nothing counts. The time of the next expiry is known; the current count is computed from it, and
//! the vCPU asks to be woken then.

use super::{Lapic, register};
use crate::irqchip;
use crate::tsc;
use twofold_cpu::Cpu;

/// The timer's mode in its local vector.
pub(super) const MODE: u32 = 3 << 17;
const MODE_PERIODIC: u32 = 1 << 17;
const MODE_DEADLINE: u32 = 2 << 17;

/// Shortest period in nanoseconds, so that a guest cannot keep the host busy (KVM's
/// `min_timer_period_us`).
const SHORTEST_PERIOD: u64 = 200_000;

/// The timer's state beside its registers.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Timer {
    /// Nanoseconds of the bus clock's cycle.
    cycle: u64,
    /// When the count arrives at 0 next, in nanoseconds of [`irqchip::now`].
    expires: Option<u64>,
    /// IA32_TSC_DEADLINE; 0 if the timer is not armed so.
    deadline: u64,
}

impl Timer {
    /// A timer that does not run; nanoseconds of the bus clock's cycle.
    pub(super) fn new(cycle: u64) -> Self {
        Self {
            cycle,
            ..Self::default()
        }
    }
}

impl Lapic {
    fn timer_mode(&self) -> u32 {
        self.get(register::LOCAL_TIMER) & MODE
    }

    fn counts_to_deadline(&self) -> bool {
        self.timer_mode() == MODE_DEADLINE
    }

    /// Nanoseconds of one count.
    fn count_time(&self) -> u64 {
        let divide = self.get(register::DIVIDE);
        let power = ((divide & 3 | divide >> 1 & 4) + 1) & 7;
        self.timer.cycle << power
    }

    /// Nanoseconds from the initial count to 0.
    fn period(&self) -> u64 {
        let period = u64::from(self.get(register::INITIAL_COUNT)).saturating_mul(self.count_time());
        if period != 0 && self.timer_mode() == MODE_PERIODIC {
            period.max(SHORTEST_PERIOD)
        } else {
            period
        }
    }

    /// The initial count was written.
    pub(super) fn set_initial_count(&mut self, count: u32) {
        if self.counts_to_deadline() {
            return;
        }
        self.set(register::INITIAL_COUNT, count);
        self.timer.expires = (count != 0).then(|| irqchip::now().saturating_add(self.period()));
    }

    /// The divisor was written: what is left of the count goes on at the new pace.
    pub(super) fn set_divisor(&mut self, value: u32) {
        let now = irqchip::now();
        let before = self.count_time();
        self.set(register::DIVIDE, value & 0xb);
        if let Some(expires) = self.timer.expires {
            let left = u128::from(expires.saturating_sub(now)) * u128::from(self.count_time());
            let left = u64::try_from(left / u128::from(before.max(1))).unwrap_or(u64::MAX);
            self.timer.expires = Some(now.saturating_add(left));
        }
    }

    /// The local vector was written. Switching to a deadline, or back, stops the timer.
    pub(super) fn set_timer_vector(&mut self, value: u32, cpu: &Cpu) {
        // What has expired until now did so under the old mask.
        self.settle_timer(cpu);
        let before = self.counts_to_deadline();
        self.set(register::LOCAL_TIMER, value);
        if self.counts_to_deadline() != before {
            self.set(register::INITIAL_COUNT, 0);
            self.timer.expires = None;
            self.timer.deadline = 0;
        }
    }

    /// IA32_TSC_DEADLINE as it is read: 0 unless the timer counts to it.
    pub(in crate::vcpu) fn deadline(&self) -> u64 {
        if self.counts_to_deadline() {
            self.timer.deadline
        } else {
            0
        }
    }

    /// IA32_TSC_DEADLINE was written: without effect unless the timer counts to a deadline.
    pub(in crate::vcpu) fn set_deadline(&mut self, deadline: u64, cpu: &Cpu) {
        if self.counts_to_deadline() {
            self.timer.deadline = deadline;
            self.settle_timer(cpu);
        }
    }

    /// The current count.
    pub(super) fn current_count(&self) -> u32 {
        if self.counts_to_deadline() {
            return 0;
        }
        let Some(expires) = self.timer.expires else {
            return 0;
        };
        let now = irqchip::now();
        let period = self.period().max(1);
        let left = match expires.checked_sub(now) {
            Some(left) => left,
            None if self.timer_mode() == MODE_PERIODIC => period - (now - expires) % period,
            None => 0,
        };
        u32::try_from(left / self.count_time().max(1)).unwrap_or(u32::MAX)
    }

    /// The registers were replaced: the count goes on from what they say.
    pub(super) fn restart_timer(&mut self) {
        self.timer.deadline = 0;
        let current = u64::from(self.get(register::CURRENT_COUNT));
        let initial = self.get(register::INITIAL_COUNT);
        let runs = initial != 0 && !self.counts_to_deadline();
        self.timer.expires =
            (runs && (current != 0 || self.timer_mode() == MODE_PERIODIC)).then(|| {
                let left = match current.saturating_mul(self.count_time()) {
                    0 => self.period(),
                    left => left.min(self.period()),
                };
                irqchip::now().saturating_add(left)
            });
    }

    /// Stops the timer, as a reset does.
    pub(super) fn stop_timer(&mut self) {
        self.timer.expires = None;
        self.timer.deadline = 0;
    }

    /// Requests the timer's interrupt if it has expired.
    pub(in crate::vcpu) fn settle_timer(&mut self, cpu: &Cpu) {
        let expired = if self.counts_to_deadline() {
            let expired = self.timer.deadline != 0 && cpu.tsc() >= self.timer.deadline;
            if expired {
                self.timer.deadline = 0;
            }
            expired
        } else {
            let now = irqchip::now();
            let expired = self.timer.expires.filter(|expires| *expires <= now);
            if let Some(expires) = expired {
                let periodic = self.timer_mode() == MODE_PERIODIC;
                let period = self.period().max(1);
                // Periods that nobody was there for have passed.
                let periods = (now - expires) / period + 1;
                self.timer.expires =
                    periodic.then(|| expires.saturating_add(periods.saturating_mul(period)));
            }
            expired.is_some()
        };
        if expired {
            self.local_interrupt(register::LOCAL_TIMER);
        }
    }

    /// When the vCPU has to look at the timer again, in nanoseconds of [`irqchip::now`]: never if
    /// nothing would come of it.
    pub(in crate::vcpu) fn alarm(&self, cpu: &Cpu) -> Option<u64> {
        if self.get(register::LOCAL_TIMER) & register::MASKED != 0 {
            return None;
        }
        if !self.counts_to_deadline() {
            return self.timer.expires;
        }
        if self.timer.deadline == 0 {
            return None;
        }
        let left = self.timer.deadline.saturating_sub(cpu.tsc());
        let host = (u128::from(left) << 48) / u128::from(cpu.msrs().tsc_multiplier.max(1));
        let nanoseconds = host * 1_000_000 / u128::from(tsc::khz().max(1)) + 1;
        let nanoseconds = u64::try_from(nanoseconds).unwrap_or(u64::MAX);
        Some(irqchip::now().saturating_add(nanoseconds))
    }
}
