//! The time stamp counter.

/// The host's time stamp counter, read after everything before in program order: a guest that orders
/// its reads with LFENCE is owed that.
pub(crate) fn host_tsc() -> u64 {
    #[expect(unsafe_code)]
    // UNSAFETY: the intrinsic is declared unsafe.
    // SAFETY: LFENCE and RDTSC touch no memory and are there on every x86-64 host that lets
    // programs use them.
    unsafe {
        core::arch::x86_64::_mm_lfence();
        core::arch::x86_64::_rdtsc()
    }
}
