//! Linux's system calls.

// UNSAFETY: system calls, and the first instruction.
#![expect(unsafe_code)]

use core::arch::{asm, global_asm};
use core::fmt;

global_asm!(".global _start", "_start: bl rust_init", "b .");

/// A system call.
fn call(number: u64, arguments: [u64; 6]) -> i64 {
    let [a, b, c, d, e, f] = arguments;
    let result: i64;
    // SAFETY: the callers below pass what the calls want.
    unsafe {
        asm!("svc #0", in("x8") number, inout("x0") a => result, in("x1") b, in("x2") c,
            in("x3") d, in("x4") e, in("x5") f, options(nostack));
    }
    result
}

const HERE: u64 = -100i64 as u64;

fn path(name: &core::ffi::CStr) -> u64 {
    name.as_ptr() as u64
}

/// Makes a folder.
pub(crate) fn make_folder(name: &core::ffi::CStr) {
    call(34, [HERE, path(name), 0o755, 0, 0, 0]);
}

/// Makes a character device.
pub(crate) fn make_device(name: &core::ffi::CStr, major: u64, minor: u64) {
    call(33, [HERE, path(name), 0o020_600, major << 8 | minor, 0, 0]);
}

/// Opens a file for reading and writing.
pub(crate) fn open(name: &core::ffi::CStr) -> i64 {
    const READ_WRITE_SYNC: u64 = 0o4_010_002;
    call(56, [HERE, path(name), READ_WRITE_SYNC, 0, 0, 0])
}

/// Closes a file.
pub(crate) fn close(file: i64) {
    call(57, [file as u64, 0, 0, 0, 0, 0]);
}

/// Asks a device; its answer, or an error.
pub(crate) fn control(file: i64, request: u64, argument: u64) -> i64 {
    call(29, [file as u64, request, argument, 0, 0, 0])
}

/// Maps a page of a file for reading; its address, or an error.
pub(crate) fn map(file: i64, offset: u64) -> i64 {
    const READ: u64 = 1;
    const SHARED: u64 = 1;
    call(222, [0, 4096, READ, SHARED, file as u64, offset])
}

/// Runs `body` in a child, and says how the child ended, as `wait` does.
pub(crate) fn in_child(body: impl FnOnce() -> u64) -> u64 {
    const SIGCHLD: u64 = 17;
    let child = call(220, [SIGCHLD, 0, 0, 0, 0, 0]);
    if child == 0 {
        let status = body();
        call(93, [status, 0, 0, 0, 0, 0]);
    }
    let mut status = 0u32;
    call(260, [child as u64, &raw mut status as u64, 0, 0, 0, 0]);
    u64::from(status)
}

/// Reads a word.
pub(crate) fn read_word(address: u64) -> u64 {
    // SAFETY: the address was mapped; if nothing is there the child dies, which is the question.
    unsafe { (address as *const u64).read_volatile() }
}

/// Switches the machine off.
pub(crate) fn power_off() -> ! {
    call(142, [0xfee1_dead, 672_274_793, 0x4321_fedc, 0, 0, 0]);
    loop {
        core::hint::spin_loop();
    }
}

/// The console.
pub(crate) struct Console(pub(crate) i64);

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        call(
            64,
            [
                self.0 as u64,
                text.as_ptr() as u64,
                text.len() as u64,
                0,
                0,
                0,
            ],
        );
        Ok(())
    }
}
