//! Accesses to host memory that may vanish at any moment.
//!
//! A guest's memory is memory of the program that made the VM. The program may unmap it or
//! truncate the file behind it without the hypervisor noticing; the access that follows raises
//! SIGSEGV or SIGBUS. Every access to guest memory is therefore made by one of the functions here.
//! Each is a few instructions of which the accessing one is listed in a table (a linker section of
//! its own); the signal handler asks [`fixup`] where to go on, and the function returns
//! [`Vanished`]. Without a signal an access costs one more instruction than the access itself.
//!
//! Plain accesses are single host instructions, so that vCPUs see each other's stores as whole and
//! in the order that the host keeps, which is x86's own.
#![expect(unsafe_code)]
// UNSAFETY: this is the place where raw guest memory is read and written.

mod bytes;

pub(crate) use bytes::{copy, copy_from, copy_past_caches, copy_to, equals, fill};

use core::arch::asm;
use core::arch::x86_64::__m128i;

/// The memory behind a guest access is gone. Nothing was changed by the part that failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Vanished;

/// One instruction that may fault, and where to go on after it has. Both are relative to the
/// place of the field, so that the table needs no relocation in a shared library.
#[repr(C)]
struct FixupEntry {
    instruction: i32,
    landing: i32,
}

unsafe extern "C" {
    #[link_name = "__start_twofold_fixup"]
    static TABLE_START: FixupEntry;
    #[link_name = "__stop_twofold_fixup"]
    static TABLE_STOP: FixupEntry;
}

/// Where execution goes on when the instruction at `rip` has raised SIGSEGV or SIGBUS, or `None`
/// if it is not an access to guest memory.
///
/// For a signal handler, which puts the answer into the interrupted context's RIP and returns.
/// Async-signal-safe: reads a constant table.
pub fn fixup(rip: usize) -> Option<usize> {
    let start = &raw const TABLE_START;
    let stop = &raw const TABLE_STOP;
    let count = (stop as usize - start as usize) / size_of::<FixupEntry>();
    for i in 0..count {
        // SAFETY: the linker puts the entries of the section between the two symbols, and they
        // are constant.
        let entry = unsafe { start.add(i) };
        // SAFETY: as above.
        let (instruction, landing) = unsafe {
            (
                (&raw const (*entry).instruction as usize)
                    .wrapping_add_signed((*entry).instruction as isize),
                (&raw const (*entry).landing as usize)
                    .wrapping_add_signed((*entry).landing as isize),
            )
        };
        if instruction == rip {
            return Some(landing);
        }
    }
    None
}

/// The table entry for the instruction at local label 2 (or another one that comes before), which
/// goes on at label 3.
macro_rules! fixup_entry {
    () => {
        fixup_entry!("2b")
    };
    ($label:literal) => {
        concat!(
            ".pushsection twofold_fixup, \"aR\", @progbits\n",
            ".balign 4\n",
            ".long ",
            $label,
            " - .\n",
            ".long 3b - .\n",
            ".popsection",
        )
    };
}

use fixup_entry;

/// A value that guest memory is read and written in one instruction.
pub(crate) trait Datum: Copy + PartialEq + Default {
    /// Bytes.
    const SIZE: usize = size_of::<Self>();

    /// Reads.
    ///
    /// # Safety
    /// `pointer` was obtained from the guest's second-stage tables, in guest mode. It need not be
    /// aligned, nor mapped.
    unsafe fn load(pointer: *const u8) -> Result<Self, Vanished>;

    /// Writes.
    ///
    /// # Safety
    /// As for [`Datum::load`], and the tables allow writing.
    unsafe fn store(pointer: *mut u8, value: Self) -> Result<(), Vanished>;

    /// Replaces `old` by `new` with a locked instruction. Returns what was there: `old` if the
    /// exchange was made.
    ///
    /// # Safety
    /// As for [`Datum::store`]. For 16 bytes the pointer must be aligned to 16, or the host raises
    /// #GP.
    unsafe fn compare_exchange(pointer: *mut u8, old: Self, new: Self) -> Result<Self, Vanished>;

    /// The value's bytes as memory holds them, in the first [`Datum::SIZE`].
    fn to_bytes(self) -> [u8; 16];

    /// The value whose bytes are the first [`Datum::SIZE`].
    fn from_bytes(bytes: [u8; 16]) -> Self;
}

macro_rules! datum {
    ($type:ty, $class:ident, $modifier:literal, $accumulator:tt, $load:literal) => {
        impl Datum for $type {
            #[inline(always)]
            unsafe fn load(pointer: *const u8) -> Result<Self, Vanished> {
                let value: u64;
                let gone: u32;
                // SAFETY: the caller's; if the memory is gone, the table leads past the access
                // with `gone` still 1.
                unsafe {
                    asm!(
                        "mov {gone:e}, 1",
                        concat!("2: ", $load, " [{pointer}]"),
                        "xor {gone:e}, {gone:e}",
                        "3:",
                        fixup_entry!(),
                        pointer = in(reg) pointer,
                        value = out(reg) value,
                        gone = out(reg) gone,
                        options(nostack, readonly),
                    );
                }
                if gone == 0 { Ok(value as $type) } else { Err(Vanished) }
            }

            #[inline(always)]
            unsafe fn store(pointer: *mut u8, value: Self) -> Result<(), Vanished> {
                let gone: u32;
                // SAFETY: as for `load`.
                unsafe {
                    asm!(
                        "mov {gone:e}, 1",
                        concat!("2: mov [{pointer}], {value", $modifier, "}"),
                        "xor {gone:e}, {gone:e}",
                        "3:",
                        fixup_entry!(),
                        pointer = in(reg) pointer,
                        value = in($class) value,
                        gone = out(reg) gone,
                        options(nostack),
                    );
                }
                if gone == 0 { Ok(()) } else { Err(Vanished) }
            }

            #[inline]
            unsafe fn compare_exchange(
                pointer: *mut u8,
                old: Self,
                new: Self,
            ) -> Result<Self, Vanished> {
                let found: $type;
                let gone: u32;
                // SAFETY: as for `store`.
                unsafe {
                    asm!(
                        "mov {gone:e}, 1",
                        concat!("2: lock cmpxchg [{pointer}], {new", $modifier, "}"),
                        "mov {gone:e}, 0",
                        "3:",
                        fixup_entry!(),
                        pointer = in(reg) pointer,
                        new = in($class) new,
                        gone = out(reg) gone,
                        inout($accumulator) old => found,
                        options(nostack),
                    );
                }
                if gone == 0 { Ok(found) } else { Err(Vanished) }
            }

            #[inline(always)]
            fn to_bytes(self) -> [u8; 16] {
                u128::from(self).to_le_bytes()
            }

            #[inline(always)]
            fn from_bytes(bytes: [u8; 16]) -> Self {
                u128::from_le_bytes(bytes) as $type
            }
        }
    };
}

datum!(u8, reg_byte, "", "al", "movzx {value:e}, byte ptr");
datum!(u16, reg, ":x", "ax", "movzx {value:e}, word ptr");
datum!(u32, reg, ":e", "eax", "mov {value:e}, dword ptr");
datum!(u64, reg, ":r", "rax", "mov {value:r}, qword ptr");

impl Datum for u128 {
    #[inline(always)]
    unsafe fn load(pointer: *const u8) -> Result<Self, Vanished> {
        let value: __m128i;
        let gone: u32;
        // SAFETY: as for the integers above.
        unsafe {
            asm!(
                "mov {gone:e}, 1",
                "2: movups {value}, [{pointer}]",
                "xor {gone:e}, {gone:e}",
                "3:",
                fixup_entry!(),
                pointer = in(reg) pointer,
                value = out(xmm_reg) value,
                gone = out(reg) gone,
                options(nostack, readonly),
            );
        }
        if gone == 0 {
            // SAFETY: both are 16 bytes without invalid values.
            Ok(unsafe { core::mem::transmute::<__m128i, u128>(value) })
        } else {
            Err(Vanished)
        }
    }

    #[inline(always)]
    unsafe fn store(pointer: *mut u8, value: Self) -> Result<(), Vanished> {
        // SAFETY: both are 16 bytes without invalid values.
        let value = unsafe { core::mem::transmute::<u128, __m128i>(value) };
        let gone: u32;
        // SAFETY: as for the integers above.
        unsafe {
            asm!(
                "mov {gone:e}, 1",
                "2: movups [{pointer}], {value}",
                "xor {gone:e}, {gone:e}",
                "3:",
                fixup_entry!(),
                pointer = in(reg) pointer,
                value = in(xmm_reg) value,
                gone = out(reg) gone,
                options(nostack),
            );
        }
        if gone == 0 { Ok(()) } else { Err(Vanished) }
    }

    #[inline]
    unsafe fn compare_exchange(pointer: *mut u8, old: Self, new: Self) -> Result<Self, Vanished> {
        let (low, high): (u64, u64);
        let gone: u64;
        // SAFETY: as for the integers above. RBX is LLVM's own, so it is exchanged for the low
        // half of the new value and back; a fault lands before the exchange back.
        unsafe {
            asm!(
                "xchg rbx, rsi",
                "mov r8d, 1",
                "2: lock cmpxchg16b [rdi]",
                "mov r8d, 0",
                "3:",
                "xchg rbx, rsi",
                fixup_entry!(),
                in("rdi") pointer,
                inout("rsi") new as u64 => _,
                out("r8") gone,
                inout("rax") old as u64 => low,
                inout("rdx") (old >> 64) as u64 => high,
                in("rcx") (new >> 64) as u64,
                options(nostack),
            );
        }
        if gone == 0 {
            Ok(u128::from(low) | u128::from(high) << 64)
        } else {
            Err(Vanished)
        }
    }

    #[inline(always)]
    fn to_bytes(self) -> [u8; 16] {
        self.to_le_bytes()
    }

    #[inline(always)]
    fn from_bytes(bytes: [u8; 16]) -> Self {
        Self::from_le_bytes(bytes)
    }
}

#[cfg(test)]
pub(super) mod tests;
