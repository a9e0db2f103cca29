//! The host's time stamp counter, which the guest's counts on.

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
    fn the_frequency_is_that_of_a_processor() {
        assert!((100_000..20_000_000).contains(&super::khz()));
        assert_eq!(super::khz(), super::khz());
    }
}
