//! How a run ends.

// UNSAFETY: two instructions that stop the machine.
#![expect(unsafe_code)]

use crate::instructions::{out8, out32};
use core::arch::asm;

/// Ends the run: QEMU exits with status 33 or 35, Bochs with 0 or not by itself with another.
pub fn off(success: bool) -> ! {
    // QEMU's isa-debug-exit: the status is twice the value plus one.
    out32(0xf4, if success { 16 } else { 17 });
    if success {
        // Bochs' magic breakpoint: its debugger is told to quit there.
        // SAFETY: does nothing else.
        unsafe { asm!("xchg bx, bx", options(nomem, nostack)) }
    }
    // Bochs' shutdown port, a panic there.
    for byte in *b"Shutdown" {
        out8(0x8900, byte);
    }
    loop {
        // SAFETY: waits for an interrupt that is masked.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) }
    }
}
