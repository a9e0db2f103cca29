//! What compiled code expects of a C library: copying, filling and comparing memory.
//!
//! The loops use volatile accesses so that the compiler does not find the very functions in them.

// UNSAFETY: symbols with fixed names; C's contracts, which the compiler keeps.
#![expect(unsafe_code)]

/// C's `memcpy`.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, size: usize) -> *mut u8 {
    let mut done = 0;
    if (to as usize | from as usize).is_multiple_of(8) {
        while done + 8 <= size {
            // SAFETY: the caller's; both are aligned.
            unsafe {
                let word = from.add(done).cast::<u64>().read_volatile();
                to.add(done).cast::<u64>().write_volatile(word);
            }
            done += 8;
        }
    }
    while done < size {
        // SAFETY: the caller's.
        unsafe { to.add(done).write_volatile(from.add(done).read_volatile()) };
        done += 1;
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
    for index in (0..size).rev() {
        // SAFETY: the caller's; here the end of `from` is copied first.
        unsafe {
            to.add(index)
                .write_volatile(from.add(index).read_volatile())
        };
    }
    to
}

/// C's `memset`.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memset(to: *mut u8, byte: i32, size: usize) -> *mut u8 {
    let mut done = 0;
    if (to as usize).is_multiple_of(8) {
        let word = u64::from(byte as u8) * 0x0101_0101_0101_0101;
        while done + 8 <= size {
            // SAFETY: the caller's; `to` is aligned.
            unsafe { to.add(done).cast::<u64>().write_volatile(word) };
            done += 8;
        }
    }
    while done < size {
        // SAFETY: the caller's.
        unsafe { to.add(done).write_volatile(byte as u8) };
        done += 1;
    }
    to
}

/// C's `memcmp`.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, size: usize) -> i32 {
    for index in 0..size {
        // SAFETY: the caller's.
        let (x, y) = unsafe { (a.add(index).read_volatile(), b.add(index).read_volatile()) };
        if x != y {
            return i32::from(x) - i32::from(y);
        }
    }
    0
}
