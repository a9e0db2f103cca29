//! System calls made directly, and libc's `errno`.
//!
//! What this library does for itself must not go through the symbols it interposes.

// UNSAFETY: the system call instruction, and the thread's errno cell.
#![expect(unsafe_code)]

use std::arch::asm;

use libc::{c_int, c_long, c_void, siginfo_t};

/// A system call's result: the kernel's value, or an error number.
pub(crate) type RawResult = Result<usize, c_int>;

/// Makes system call `number`.
///
/// # Safety
/// Whatever the kernel does for this call with these arguments must be sound.
#[inline]
pub(crate) unsafe fn syscall(number: c_long, arguments: [usize; 6]) -> RawResult {
    let [a, b, c, d, e, f] = arguments;
    let result: isize;
    // SAFETY: the kernel's convention on x86-64: it changes rax, rcx and r11, and the memory that
    // the caller answers for.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number as isize => result,
            in("rdi") a,
            in("rsi") b,
            in("rdx") c,
            in("r10") d,
            in("r8") e,
            in("r9") f,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    if (-4095..0).contains(&result) {
        return Err(result.unsigned_abs() as c_int);
    }
    Ok(result.cast_unsigned())
}

/// The thread's `errno`.
#[inline]
pub(crate) fn errno() -> c_int {
    // SAFETY: libc's cell for this thread, valid as long as the thread.
    unsafe { *libc::__errno_location() }
}

/// Sets the thread's `errno`.
#[inline]
pub(crate) fn set_errno(value: c_int) {
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = value }
}

/// Fails in the manner of C: -1, with the reason in `errno`.
#[inline]
pub(crate) fn fail(reason: c_int) -> c_int {
    set_errno(reason);
    -1
}

/// A system call's result in the manner of C, for calls that return an `int`.
#[inline]
pub(crate) fn to_int(result: RawResult) -> c_int {
    match result {
        Ok(value) => value as c_int,
        Err(reason) => fail(reason),
    }
}

/// A signal set in the kernel's form: bit `signal - 1`.
pub(crate) type Mask = u64;

/// The bit of `signal` in a [`Mask`]; none for a number that is no signal.
#[inline]
pub(crate) const fn bit(signal: c_int) -> Mask {
    if signal >= 1 && signal <= 64 {
        1 << (signal - 1)
    } else {
        0
    }
}

/// Replaces the thread's signal mask; returns the one it had.
#[inline]
pub(crate) fn set_mask(mask: Mask) -> Mask {
    change_mask(libc::SIG_SETMASK, Some(mask))
}

/// Blocks the signals in `mask` in addition; returns the thread's mask before that.
#[inline]
pub(crate) fn block(mask: Mask) -> Mask {
    change_mask(libc::SIG_BLOCK, Some(mask))
}

/// Unblocks the signals in `mask`.
pub(crate) fn unblock(mask: Mask) {
    change_mask(libc::SIG_UNBLOCK, Some(mask));
}

/// The thread's signal mask.
#[inline]
pub(crate) fn mask() -> Mask {
    change_mask(libc::SIG_BLOCK, None)
}

fn change_mask(how: c_int, mask: Option<Mask>) -> Mask {
    let mut old: Mask = 0;
    let new = mask
        .as_ref()
        .map_or(0, |mask| std::ptr::from_ref(mask).addr());
    // SAFETY: the kernel reads one set of 8 bytes and writes another one.
    let result = unsafe {
        syscall(
            libc::SYS_rt_sigprocmask,
            [
                how as usize,
                new,
                (&raw mut old).addr(),
                size_of::<Mask>(),
                0,
                0,
            ],
        )
    };
    debug_assert!(
        result.is_ok(),
        "valid pointers and a valid size cannot fail"
    );
    old
}

/// The signals that wait for the thread or its process.
pub(crate) fn pending() -> Mask {
    let mut pending: Mask = 0;
    let to = (&raw mut pending).addr();
    // SAFETY: the kernel writes one set of 8 bytes.
    let result = unsafe { syscall(libc::SYS_rt_sigpending, [to, size_of::<Mask>(), 0, 0, 0, 0]) };
    debug_assert!(
        result.is_ok(),
        "a valid pointer and a valid size cannot fail"
    );
    pending
}

/// Sends `signal` with `info` to the calling thread. If it is blocked it stays pending there.
pub(crate) fn queue_to_this_thread(signal: c_int, info: *const siginfo_t) -> RawResult {
    // SAFETY: neither call has any effect on memory; `info` is read.
    unsafe {
        let process = syscall(libc::SYS_getpid, [0; 6])?;
        let thread = syscall(libc::SYS_gettid, [0; 6])?;
        let info = info.cast::<c_void>().addr();
        syscall(
            libc::SYS_rt_tgsigqueueinfo,
            [process, thread, signal as usize, info, 0, 0],
        )
    }
}

/// The process id, asked of the kernel: after `vfork` the memory says nothing about it.
pub(crate) fn process_id() -> usize {
    // SAFETY: takes no arguments and touches no memory.
    unsafe { syscall(libc::SYS_getpid, [0; 6]) }.unwrap_or_default()
}
