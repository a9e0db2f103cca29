//! The host's time stamp counter, which the guest's counts on.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The counter now.
pub(crate) fn now() -> u64 {
    #[expect(unsafe_code)] // UNSAFETY: the intrinsic is declared unsafe.
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
    fn the_frequency_is_that_of_a_processor() {
        assert!((100_000..20_000_000).contains(&super::khz()));
        assert_eq!(super::khz(), super::khz());
    }
}
