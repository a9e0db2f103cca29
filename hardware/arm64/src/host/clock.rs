//! The machine's counter, as EL1 sees it.

// UNSAFETY: reads registers.
#![expect(unsafe_code)]

/// Nanoseconds to wait for what must come: the machine may be busy.
pub(crate) const PATIENCE: u64 = 60_000_000_000;

/// The virtual counter.
pub(crate) fn ticks() -> u64 {
    let value: u64;
    // SAFETY: reads the counter.
    unsafe { core::arch::asm!("isb", "mrs {}, cntvct_el0", out(reg) value, options(nostack)) };
    value
}

/// How long a tick is.
pub(crate) fn nanoseconds_per_tick() -> u64 {
    let frequency: u64;
    // SAFETY: reads the counter's frequency.
    unsafe { core::arch::asm!("mrs {}, cntfrq_el0", out(reg) frequency, options(nostack)) };
    1_000_000_000 / frequency.max(1)
}

/// Waits for something that must come.
pub(crate) fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let start = ticks();
    while !done() {
        let waited = (ticks() - start) * nanoseconds_per_tick();
        assert!(waited < PATIENCE, "{what}");
        core::hint::spin_loop();
    }
}
