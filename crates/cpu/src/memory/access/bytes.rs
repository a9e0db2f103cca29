//! Accesses to many bytes, which other vCPUs may see in part.

use super::{Datum, Vanished, fixup_entry};
use core::arch::asm;

/// Copies bytes from guest memory. What was copied before the memory vanished stays in `buffer`.
///
/// # Safety
/// As for [`Datum::load`], for every byte.
pub(crate) unsafe fn copy_from(buffer: &mut [u8], pointer: *const u8) -> Result<(), Vanished> {
    // SAFETY: the destination is an exclusive buffer of that length; the caller's promise covers
    // the source.
    unsafe { copy(buffer.as_mut_ptr(), pointer, buffer.len()) }
}

/// Copies bytes to guest memory. What was copied before the memory vanished stays.
///
/// # Safety
/// As for [`Datum::store`], for every byte.
pub(crate) unsafe fn copy_to(pointer: *mut u8, buffer: &[u8]) -> Result<(), Vanished> {
    // SAFETY: the source is a shared buffer of that length; the caller's promise covers the
    // destination.
    unsafe { copy(pointer, buffer.as_ptr(), buffer.len()) }
}

/// Copies bytes upwards; if the ranges overlap, the result is that of a byte-wise loop.
///
/// # Safety
/// Each side is the process's own memory, or as for [`Datum::load`] (`from`) and [`Datum::store`]
/// (`to`), for every byte.
pub(crate) unsafe fn copy(to: *mut u8, from: *const u8, length: usize) -> Result<(), Vanished> {
    let left: usize;
    // SAFETY: the caller's; if memory is gone, the table leads past the copy with RCX not zero.
    unsafe {
        asm!(
            "2: rep movsb",
            "3:",
            fixup_entry!(),
            inout("rcx") length => left,
            inout("rdi") to => _,
            inout("rsi") from => _,
            options(nostack),
        );
    }
    if left == 0 { Ok(()) } else { Err(Vanished) }
}

/// Copies as [`copy`] does, past the caches: for a part of a copy that is larger than they are. The
/// stores are ordered before any later one. Ranges of which the target begins within the source's
/// next 64 bytes go through the caches all the same.
///
/// # Safety
/// As for [`copy`].
pub(crate) unsafe fn copy_past_caches(
    to: *mut u8,
    from: *const u8,
    length: usize,
) -> Result<(), Vanished> {
    /// Bytes that one round of the loop loads before it stores them.
    const LINE: usize = 64;
    let head = to.align_offset(LINE).min(length);
    let lines = (length - head) / LINE;
    if to.addr().wrapping_sub(from.addr()) < LINE || lines == 0 {
        // SAFETY: the caller's.
        return unsafe { copy(to, from, length) };
    }
    // SAFETY: the caller's, for a part of the range.
    unsafe { copy(to, from, head) }?;
    let left: usize;
    // SAFETY: the caller's; the target is aligned to what is stored. If memory is gone, the table
    // leads past the copy with the count of lines not zero. The fence orders these stores, which are
    // not ordered among others by themselves.
    unsafe {
        asm!(
            "2: movups {a}, [{from}]",
            "4: movups {b}, [{from} + 16]",
            "5: movups {c}, [{from} + 32]",
            "6: movups {d}, [{from} + 48]",
            "7: movntps [{to}], {a}",
            "8: movntps [{to} + 16], {b}",
            "9: movntps [{to} + 32], {c}",
            "22: movntps [{to} + 48], {d}",
            "add {from}, 64",
            "add {to}, 64",
            "dec {left}",
            "jnz 2b",
            "3: sfence",
            fixup_entry!("2b"),
            fixup_entry!("4b"),
            fixup_entry!("5b"),
            fixup_entry!("6b"),
            fixup_entry!("7b"),
            fixup_entry!("8b"),
            fixup_entry!("9b"),
            fixup_entry!("22b"),
            a = out(xmm_reg) _,
            b = out(xmm_reg) _,
            c = out(xmm_reg) _,
            d = out(xmm_reg) _,
            from = inout(reg) from.wrapping_add(head) => _,
            to = inout(reg) to.wrapping_add(head) => _,
            left = inout(reg) lines => left,
            options(nostack),
        );
    }
    if left != 0 {
        return Err(Vanished);
    }
    let done = head + lines * LINE;
    // SAFETY: the caller's, for the rest of the range.
    unsafe {
        copy(
            to.wrapping_add(done),
            from.wrapping_add(done),
            length - done,
        )
    }
}

/// Fills guest memory with `count` times the same 8 bytes.
///
/// # Safety
/// As for [`Datum::store`], for every byte.
pub(crate) unsafe fn fill(to: *mut u8, value: u64, count: usize) -> Result<(), Vanished> {
    let left: usize;
    // SAFETY: as for `copy`.
    unsafe {
        asm!(
            "2: rep stosq",
            "3:",
            fixup_entry!(),
            inout("rcx") count => left,
            inout("rdi") to => _,
            in("rax") value,
            options(nostack),
        );
    }
    if left == 0 { Ok(()) } else { Err(Vanished) }
}

/// Whether guest memory holds exactly `bytes`.
///
/// # Safety
/// As for [`Datum::load`], for every byte.
pub(crate) unsafe fn equals(pointer: *const u8, bytes: &[u8]) -> Result<bool, Vanished> {
    let (words, rest) = bytes.as_chunks::<8>();
    let mut at = pointer;
    for word in words {
        // SAFETY: the caller's; `at` stays within the range.
        if unsafe { u64::load(at) }? != u64::from_le_bytes(*word) {
            return Ok(false);
        }
        at = at.wrapping_add(8);
    }
    for byte in rest {
        // SAFETY: as above.
        if unsafe { u8::load(at) }? != *byte {
            return Ok(false);
        }
        at = at.wrapping_add(1);
    }
    Ok(true)
}
