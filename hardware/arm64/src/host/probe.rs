//! Touching memory that may not be there.

// UNSAFETY: reads and writes any address, which is the point of it.
#![expect(unsafe_code)]

use core::arch::global_asm;

global_asm!(include_str!("boot.s"));

#[repr(C)]
struct Outcome {
    value: u64,
    done: u64,
}

unsafe extern "C" {
    fn probe_read(address: u64) -> Outcome;
    fn probe_write(address: u64, value: u64) -> u64;
    fn probe_forbidden() -> Outcome;
    static last_syndrome: u64;
}

/// The word at an address, or `None` if the access was answered with an abort.
pub(crate) fn read(address: u64) -> Option<u64> {
    // SAFETY: an abort is caught; nothing else can follow from a read.
    let outcome = unsafe { probe_read(address) };
    (outcome.done != 0).then_some(outcome.value)
}

/// Writes a word of memory that this program does not use for anything else. Says whether it was
/// written.
pub(crate) fn write(address: u64, value: u64) -> bool {
    // SAFETY: callers name pages outside the program.
    unsafe { probe_write(address, value) != 0 }
}

/// The syndrome of the last abort.
pub(crate) fn syndrome() -> u64 {
    // SAFETY: written by this processor's handler; a word.
    unsafe { (&raw const last_syndrome).read_volatile() }
}

/// Whether an instruction that the host may not use is executed.
pub(crate) fn forbidden() -> bool {
    // SAFETY: changes x0 at most; the exception is caught.
    unsafe { probe_forbidden() }.done != 0
}
