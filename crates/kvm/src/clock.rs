//! The VM's clock: nanoseconds that it has lived, as its program set them, and as kvmclock shows them
//! to the guest (KVM's "Timekeeping Virtualization", `struct pvclock_vcpu_time_info`).
//!
//! It is counted on the host's time stamp counter, with the very arithmetic that a guest does; so a
//! guest and `KVM_GET_CLOCK` agree to the nanosecond, and so do the vCPUs.

use crate::capability;
use crate::sync::Mutex;
use crate::tsc;
use crate::vcpu::Ask;
use crate::vm::Vm;
use kvm_bindings::{KVM_CLOCK_REALTIME, kvm_clock_data};
use rustix::io::Errno;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

const SECOND: u64 = 1_000_000_000;

/// How ticks become nanoseconds: shifted, then multiplied by a fraction of 32 bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Rate {
    pub(crate) multiplier: u32,
    pub(crate) shift: i8,
}

impl Rate {
    /// For a counter of so many kHz.
    pub(crate) fn of(khz: u32) -> Self {
        let (mut ticks, mut scaled, mut shift) = (u64::from(khz.max(1)) * 1000, SECOND, 0);
        while ticks > 2 * scaled || ticks >> 32 != 0 {
            ticks >>= 1;
            shift -= 1;
        }
        while ticks <= scaled {
            if ticks >> 31 != 0 {
                scaled >>= 1;
            } else {
                ticks <<= 1;
            }
            shift += 1;
        }
        Self {
            multiplier: ((scaled << 32) / ticks) as u32,
            shift,
        }
    }

    /// Nanoseconds of so many ticks.
    fn nanoseconds(self, ticks: u64) -> u64 {
        let ticks = match self.shift {
            shift @ 0.. => ticks.wrapping_shl(shift.unsigned_abs().into()),
            shift => ticks >> shift.unsigned_abs(),
        };
        ((u128::from(ticks) * u128::from(self.multiplier)) >> 32) as u64
    }
}

/// A moment at which the clock's value is known.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Reference {
    /// The host's time stamp counter.
    pub(crate) tsc: u64,
    /// Nanoseconds.
    pub(crate) clock: u64,
}

/// A VM's clock.
#[derive(Debug)]
pub(crate) struct Clock {
    reference: Mutex<Reference>,
    /// Moves when the clock is set.
    generation: AtomicU32,
}

impl Clock {
    /// A clock that begins now.
    pub(crate) fn new() -> Self {
        Self {
            reference: Mutex::new(Reference {
                tsc: tsc::now(),
                clock: 0,
            }),
            generation: AtomicU32::new(0),
        }
    }

    /// The clock, and the host's counter, now.
    pub(crate) fn now(&self) -> Reference {
        let Reference { tsc, clock } = self.reference();
        let now = tsc::now();
        let elapsed = Rate::of(tsc::khz()).nanoseconds(now.wrapping_sub(tsc));
        Reference {
            tsc: now,
            clock: clock.wrapping_add(elapsed),
        }
    }

    /// Sets the clock.
    pub(crate) fn set(&self, clock: u64) {
        let mut reference = self.reference.lock();
        *reference = Reference {
            tsc: tsc::now(),
            clock,
        };
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// The moment that the clock is counted from.
    pub(crate) fn reference(&self) -> Reference {
        *self.reference.lock()
    }

    /// A number that changes when the clock is set.
    pub(crate) fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }
}

impl Vm {
    /// `KVM_GET_CLOCK`: nanoseconds that the VM has lived, as the program set it.
    pub fn get_clock(&self) -> kvm_clock_data {
        let Reference { tsc, clock } = self.clock().now();
        let realtime = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        kvm_clock_data {
            clock,
            flags: capability::CLOCK_FLAGS,
            realtime: nanoseconds(realtime.unwrap_or_default()),
            host_tsc: tsc,
            ..Default::default()
        }
    }

    /// `KVM_SET_CLOCK`. With `KVM_CLOCK_REALTIME` the time that has passed since `realtime` is
    /// added.
    ///
    /// # Errors
    /// `EINVAL` for another flag.
    pub fn set_clock(&self, data: &kvm_clock_data) -> Result<(), Errno> {
        if data.flags & !KVM_CLOCK_REALTIME != 0 {
            return Err(Errno::INVAL);
        }
        let mut clock = data.clock;
        if data.flags & KVM_CLOCK_REALTIME != 0 {
            let realtime = self.get_clock().realtime;
            clock = clock.wrapping_add(realtime.saturating_sub(data.realtime));
        }
        self.clock().set(clock);
        for core in self.members.read().iter() {
            core.notify(Ask::CLOCK);
        }
        Ok(())
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_exact_to_a_few_parts_in_a_billion() {
        for khz in [1, 1_000, 999_999, 1_000_000, 2_400_000, 4_300_000, u32::MAX] {
            let rate = Rate::of(khz);
            // A second, and a day.
            for seconds in [1, 86_400] {
                let ticks = u64::from(khz) * 1000 * seconds;
                let nanoseconds = rate.nanoseconds(ticks);
                let wrong = nanoseconds.abs_diff(seconds * SECOND);
                assert!(wrong <= seconds * 2 + 1, "{khz} kHz: {nanoseconds}");
            }
        }
    }

    #[test]
    fn a_clock_goes_on_from_what_it_was_set_to() {
        let clock = Clock::new();
        let generation = clock.generation();
        clock.set(5 * SECOND);
        assert_ne!(clock.generation(), generation);
        let first = clock.now();
        let second = clock.now();
        assert!(first.clock >= 5 * SECOND && second.clock >= first.clock);
        assert!(second.clock < 60 * SECOND);
    }
}
