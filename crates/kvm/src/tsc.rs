//! The host's time stamp counter, which the guest's counts on.

use crate::sync::Mutex;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The counter now.
pub(crate) fn now() -> u64 {
    // UNSAFETY: the intrinsic is declared unsafe.
    #[expect(unsafe_code)]
    // SAFETY: RDTSC touches no memory; every x86-64 processor has it.
    unsafe {
        std::arch::x86_64::_rdtsc()
    }
}

/// Its frequency in kHz, measured once against the system's clock.
pub(crate) fn khz() -> u32 {
    static KHZ: OnceLock<u32> = OnceLock::new();
    *KHZ.get_or_init(measure)
}

/// The multiplier of a guest whose counter runs as the host's does.
pub(crate) const HOST_RATE: u64 = 1 << 48;

/// The multiplier, in units of 2^-48, that makes the guest's counter run at `khz`. `None` if there
/// is none: it has 16 bits before the point, and the rate has 31.
pub(crate) fn multiplier(khz: u32) -> Option<u64> {
    let host = self::khz();
    if khz == host {
        return Some(HOST_RATE);
    }
    if khz >= 0x7fff_ffff {
        return None;
    }
    let multiplier = (u128::from(khz) << 48) / u128::from(host);
    u64::try_from(multiplier)
        .ok()
        .filter(|multiplier| *multiplier != 0)
}

/// How KVM keeps the counters of a VM's vCPUs in step: a counter that is set to nearly what another
/// one shows is taken to be meant the same, and gets the same offset.
#[derive(Debug, Default)]
pub(crate) struct Sync(Mutex<LastWrite>);

/// The last time a vCPU's counter was set.
#[derive(Clone, Copy, Debug, Default)]
struct LastWrite {
    /// The counter's rate; 0 before the first time.
    khz: u32,
    /// The value that was set, and the scaled host counter then.
    value: u64,
    scaled: u64,
    /// The offset that all counters in step share.
    offset: u64,
    /// The program has set a counter, not only made vCPUs.
    by_program: bool,
}

impl Sync {
    /// The offset for a counter that runs at `khz` and is set to `value` while the scaled host
    /// counter shows `scaled`. A value of 0, and so a vCPU that is made, always asks to be in step;
    /// others if the program has set one before and they are within a second of it.
    pub(crate) fn offset(&self, khz: u32, value: u64, scaled: u64, by_program: bool) -> u64 {
        let mut last = self.0.lock();
        let expected = last.value.wrapping_add(scaled.wrapping_sub(last.scaled));
        let second = u64::from(khz) * 1000;
        let near = value.abs_diff(expected) < second;
        let in_step = khz == last.khz && (value == 0 || (last.by_program && near));
        let offset = if in_step {
            last.offset
        } else {
            value.wrapping_sub(scaled)
        };
        *last = LastWrite {
            khz,
            value,
            scaled,
            offset,
            by_program: last.by_program || by_program,
        };
        offset
    }

    /// A counter that runs at `khz` got an offset from the program while the scaled host counter
    /// shows `scaled`.
    pub(crate) fn note_offset(&self, khz: u32, offset: u64, scaled: u64) {
        *self.0.lock() = LastWrite {
            khz,
            value: scaled.wrapping_add(offset),
            scaled,
            offset,
            by_program: true,
        };
    }
}

fn measure() -> u32 {
    const SPAN: Duration = Duration::from_millis(5);
    let start = (Instant::now(), now());
    loop {
        let elapsed = start.0.elapsed();
        if elapsed >= SPAN {
            let ticks = u128::from(now().wrapping_sub(start.1));
            let khz = ticks * 1_000_000 / elapsed.as_nanos();
            return u32::try_from(khz).unwrap_or(u32::MAX).max(1);
        }
        std::hint::spin_loop();
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn other_rates_are_multiples_of_the_hosts() {
        let host = super::khz();
        assert_eq!(super::multiplier(host), Some(super::HOST_RATE));
        assert_eq!(super::multiplier(host * 2), Some(super::HOST_RATE * 2));
        assert_eq!(super::multiplier(0), None);
        assert_eq!(super::multiplier(u32::MAX), None);
    }

    #[test]
    fn counters_that_are_set_to_nearly_the_same_are_in_step() {
        let sync = super::Sync::default();
        let zero = |scaled| sync.offset(1000, 0, scaled, false);
        let first = zero(5_000);
        assert_eq!(first, 0u64.wrapping_sub(5_000));
        assert_eq!(zero(9_000_000), first);
        let second = 1_000_000;
        let set = |value, scaled| sync.offset(1000, value, scaled, true);
        // Nothing was set by the program before.
        let base = set(700, 9_000_000);
        assert_eq!(base, 700u64.wrapping_sub(9_000_000));
        assert_eq!(set(700, 9_000_000 + second / 2), base);
        let far = set(700 + 3 * second, 9_000_000);
        assert_ne!(far, base);
        assert_eq!(zero(10_000_000), far);
        assert_ne!(sync.offset(2000, 0, 10_000_000, false), far);
    }

    #[test]
    fn the_frequency_is_that_of_a_processor() {
        assert!((100_000..20_000_000).contains(&super::khz()));
        assert_eq!(super::khz(), super::khz());
    }
}
