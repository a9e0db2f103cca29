//! The time stamp counter.

/// The host's time stamp counter.
pub(crate) fn host_tsc() -> u64 {
    #[expect(unsafe_code)]
    // UNSAFETY: the intrinsic is declared unsafe.
    // SAFETY: RDTSC touches no memory and is there on every x86-64 host that lets programs use it.
    unsafe {
        core::arch::x86_64::_rdtsc()
    }
}
