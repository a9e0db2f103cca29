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

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};
    use std::sync::Once;

    /// Installs a handler as the product's is: the fix-up table first, then the default action.
    pub(in crate::memory) fn install_handler() {
        extern "C" fn on_fault(
            signal: libc::c_int,
            _: *mut libc::siginfo_t,
            context: *mut libc::c_void,
        ) {
            // SAFETY: the kernel passes a valid context to a handler with SA_SIGINFO.
            unsafe {
                let context = &mut *context.cast::<libc::ucontext_t>();
                let rip = &mut context.uc_mcontext.gregs[libc::REG_RIP as usize];
                match fixup(*rip as usize) {
                    Some(landing) => *rip = landing as i64,
                    None => {
                        libc::signal(signal, libc::SIG_DFL);
                    }
                }
            }
        }
        static ONCE: Once = Once::new();
        // SAFETY: the handler is async-signal-safe; the structure is fully initialised.
        ONCE.call_once(|| unsafe {
            let mut action: libc::sigaction = core::mem::zeroed();
            action.sa_sigaction = on_fault as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigaction(libc::SIGSEGV, &action, core::ptr::null_mut());
            libc::sigaction(libc::SIGBUS, &action, core::ptr::null_mut());
        });
    }

    struct Pages {
        base: *mut u8,
        length: usize,
    }

    impl Pages {
        fn new(count: usize) -> Self {
            install_handler();
            let length = count * 4096;
            // SAFETY: the kernel chooses the address.
            let base = unsafe {
                mmap_anonymous(
                    core::ptr::null_mut(),
                    length,
                    ProtFlags::READ | ProtFlags::WRITE,
                    MapFlags::PRIVATE,
                )
            };
            Self {
                base: base.unwrap().cast(),
                length,
            }
        }

        fn take_away(&self, page: usize) {
            // SAFETY: the page is this test's own, and only reached through `Datum`.
            unsafe {
                mprotect(
                    self.base.add(page * 4096).cast(),
                    4096,
                    MprotectFlags::empty(),
                )
                .unwrap();
            }
        }
    }

    impl Drop for Pages {
        fn drop(&mut self) {
            // SAFETY: nobody uses the pages any more.
            unsafe { munmap(self.base.cast(), self.length).unwrap() }
        }
    }

    fn round_trip<T: Datum + std::fmt::Debug>(value: T, other: T) {
        let pages = Pages::new(1);
        // SAFETY: the page is mapped, then not; both are allowed.
        unsafe {
            let at = pages.base.add(64);
            assert_eq!(T::store(at, value), Ok(()));
            assert_eq!(T::load(at), Ok(value));
            assert_eq!(T::compare_exchange(at, other, value), Ok(value));
            assert_eq!(T::load(at), Ok(value));
            assert_eq!(T::compare_exchange(at, value, other), Ok(value));
            assert_eq!(T::load(at), Ok(other));
            assert_eq!(T::from_bytes(value.to_bytes()), value);
            pages.take_away(0);
            assert_eq!(T::load(at), Err(Vanished));
            assert_eq!(T::store(at, value), Err(Vanished));
            assert_eq!(T::compare_exchange(at, value, other), Err(Vanished));
        }
    }

    #[test]
    fn values_of_every_size_are_accessed_and_vanish() {
        round_trip(0x12u8, 0x34);
        round_trip(0x1234u16, 0x5678);
        round_trip(0x1234_5678u32, 0x9abc_def0);
        round_trip(0x1234_5678_9abc_def0u64, 0x0fed_cba9_8765_4321);
        round_trip(
            0x1234_5678_9abc_def0_1122_3344_5566_7788u128,
            0x0fed_cba9_8765_4321_99aa_bbcc_ddee_ff00,
        );
    }

    #[test]
    fn a_copy_stops_where_memory_ends() {
        let pages = Pages::new(2);
        pages.take_away(1);
        // SAFETY: the second page is not mapped, which is allowed.
        unsafe {
            let at = pages.base.add(4096 - 3);
            assert_eq!(copy_to(at, &[1, 2, 3]), Ok(()));
            let mut buffer = [0; 3];
            assert_eq!(copy_from(&mut buffer, at), Ok(()));
            assert_eq!(buffer, [1, 2, 3]);
            assert_eq!(equals(at, &[1, 2, 3]), Ok(true));
            assert_eq!(equals(at, &[1, 2, 4]), Ok(false));
            assert_eq!(copy_to(at, &[9; 4]), Err(Vanished));
            assert_eq!(copy_from(&mut [0; 4], at), Err(Vanished));
            assert_eq!(equals(at, &[9; 4]), Err(Vanished));
            let at8 = pages.base.add(4096 - 16);
            assert_eq!(fill(at8, 0x0807_0605_0403_0201, 2), Ok(()));
            assert_eq!(u64::load(at8.add(8)), Ok(0x0807_0605_0403_0201));
            assert_eq!(fill(at8, 0, 3), Err(Vanished));
            assert_eq!(u32::load(at), Err(Vanished));
        }
    }

    #[test]
    fn a_copy_past_the_caches_is_a_copy_and_stops_where_memory_ends() {
        let pages = Pages::new(3);
        pages.take_away(2);
        let bytes: Vec<u8> = (0..8192u32).map(|i| (i * 7 % 251) as u8).collect();
        for (to, from, length) in [
            (0, 4096, 4096),
            (4096, 0, 4096),
            (3, 4100, 1000),
            (4001, 17, 3999),
            (64, 0, 4096),
            (1, 0, 4096),
            (200, 263, 4000),
            (70, 5000, 63),
            (8, 8, 512),
            (5, 900, 0),
        ] {
            let mut expected = bytes.clone();
            for i in 0..length {
                expected[to + i] = expected[from + i];
            }
            // SAFETY: both ranges lie in the two pages that are mapped.
            unsafe {
                copy_to(pages.base, &bytes).unwrap();
                let base = pages.base;
                assert_eq!(
                    copy_past_caches(base.add(to), base.add(from), length),
                    Ok(())
                );
                assert_eq!(
                    equals(base, &expected),
                    Ok(true),
                    "{length} from {from} to {to}"
                );
            }
        }
        for (to, from) in [(0, 8000), (8000, 0)] {
            // SAFETY: the third page is not mapped, which is allowed.
            let copied = unsafe { copy_past_caches(pages.base.add(to), pages.base.add(from), 400) };
            assert_eq!(copied, Err(Vanished));
        }
    }

    #[test]
    fn the_table_knows_only_accesses_to_guest_memory() {
        assert_eq!(fixup(0), None);
        assert_eq!(fixup(fixup as *const () as usize), None);
    }
}
