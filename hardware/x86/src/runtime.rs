//! What compiled code expects of its surroundings and a Linux program gets from the C library: copying,
//! filling and comparing memory, and names for unwinding, which does not happen here.

// UNSAFETY: symbols with fixed names; C's contracts, which the compiler keeps.
#![expect(unsafe_code)]

use core::arch::asm;

/// C's `memcpy`.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, size: usize) -> *mut u8 {
    // SAFETY: the caller's.
    unsafe {
        asm!("rep movsb", inout("rdi") to => _, inout("rsi") from => _, inout("rcx") size => _,
            options(nostack, preserves_flags));
    }
    to
}

/// C's `memmove`.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, size: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= size {
        // SAFETY: copying forwards does not overwrite what is still to be copied.
        return unsafe { memcpy(to, from, size) };
    }
    // SAFETY: the caller's; here the end of `from` is copied first.
    unsafe {
        asm!("std", "rep movsb", "cld",
            inout("rdi") to.wrapping_add(size).wrapping_sub(1) => _,
            inout("rsi") from.wrapping_add(size).wrapping_sub(1) => _,
            inout("rcx") size => _, options(nostack));
    }
    to
}

/// C's `memset`.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memset(to: *mut u8, byte: i32, size: usize) -> *mut u8 {
    // SAFETY: the caller's.
    unsafe {
        asm!("rep stosb", inout("rdi") to => _, in("al") byte as u8, inout("rcx") size => _,
            options(nostack, preserves_flags));
    }
    to
}

/// C's `memcmp`.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcmp(one: *const u8, other: *const u8, size: usize) -> i32 {
    for offset in 0..size {
        // SAFETY: the caller's. Volatile, or the compiler would call this function for the loop.
        let (a, b) = unsafe {
            (
                one.add(offset).read_volatile(),
                other.add(offset).read_volatile(),
            )
        };
        if a != b {
            return i32::from(a) - i32::from(b);
        }
    }
    0
}

/// `memcmp` whose order does not matter.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bcmp(one: *const u8, other: *const u8, size: usize) -> i32 {
    // SAFETY: the caller's.
    unsafe { memcmp(one, other, size) }
}

/// `alloc` is compiled to unwind and names these two; the image aborts instead.
#[unsafe(no_mangle)]
pub extern "C" fn rust_eh_personality() {}

/// See [`rust_eh_personality`].
#[unsafe(no_mangle)]
pub extern "C" fn _Unwind_Resume() -> ! {
    crate::power::off(false)
}
