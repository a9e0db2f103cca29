//! Asking the hypervisor.

// UNSAFETY: the call itself.
#![expect(unsafe_code)]

use core::arch::asm;
use twofold_pkvm::Error;
use twofold_pkvm::hypercall::Call;

/// The registers after a call.
pub(crate) fn raw(function: u64, arguments: [u64; 5]) -> [u64; 6] {
    let [a, b, c, d, e] = arguments;
    let mut x = [function, a, b, c, d, e];
    // SAFETY: the hypervisor changes x0 to x5 and memory that it was given.
    unsafe {
        asm!("hvc #0",
            inout("x0") x[0], inout("x1") x[1], inout("x2") x[2],
            inout("x3") x[3], inout("x4") x[4], inout("x5") x[5],
            options(nostack));
    }
    x
}

/// A call and its answer.
pub(crate) fn call(call: Call, arguments: &[u64]) -> Result<u64, Error> {
    let mut all = [0; 5];
    for (slot, &argument) in all.iter_mut().zip(arguments) {
        *slot = argument;
    }
    let x = raw(call.function(), all);
    if x[0] != 0 {
        panic!("{} is not supported", call.name());
    }
    match Error::from_code(x[1] as i64) {
        Some(error) => Err(error),
        None => Ok(x[1]),
    }
}

/// The audit of this image: pages of guests, pages of the hypervisor, faults served, aborts given.
/// `None` if a page is in no legal state.
pub(crate) fn audit() -> Option<[u64; 4]> {
    let x = raw(0xc600_ff00, [0; 5]);
    (x[0] == 0).then_some([x[1], x[2], x[3], x[4]])
}

/// Ends the run.
pub(crate) fn power_off(status: u64) -> ! {
    // SAFETY: does not return.
    unsafe {
        asm!("smc #0", in("x0") 0x8400_0008u64, in("x1") status, options(nostack, noreturn));
    }
}

/// Starts the second processor at `entry`; PSCI's answer.
pub(crate) fn start_second(entry: u64) -> i64 {
    let mut x0 = 0xc400_0003u64;
    // SAFETY: a firmware call, which the hypervisor answers.
    unsafe {
        asm!("smc #0", inout("x0") x0, inout("x1") 1u64 => _, inout("x2") entry => _,
            inout("x3") 0u64 => _, options(nostack));
    }
    x0 as i64
}
