//! `syscall`, libc's way to make any system call by its number.
//!
//! The numbers of calls that this library stands in front of go to the functions here; all others
//! are made by the same few instructions as in libc, so that even `clone` and `vfork` find the
//! stack as they expect it.

// UNSAFETY: exports a function in libc's place, written in assembly because it has to pass
// arguments on that it knows nothing about.
#![expect(unsafe_code)]

use std::arch::naked_asm;
use std::ptr;

use libc::{c_char, c_int, c_long, c_uint, c_ulong, c_void};

use crate::paths::place;
use crate::{control, descriptors, files, memory, raw, transfers};

/// System call numbers that have a bit: from 0 to 511.
const NUMBERS: usize = 512;

/// A bit for each number that [`intercepted`] knows.
static INTERCEPTED: [u64; NUMBERS / 64] = bits(&[
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_creat,
    libc::SYS_access,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_ioctl,
    libc::SYS_read,
    libc::SYS_pread64,
    libc::SYS_readv,
    libc::SYS_preadv,
    libc::SYS_write,
    libc::SYS_pwrite64,
    libc::SYS_writev,
    libc::SYS_pwritev,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_dup,
    libc::SYS_dup2,
    libc::SYS_dup3,
    libc::SYS_fcntl,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_pkey_mprotect,
    libc::SYS_madvise,
    libc::SYS_process_madvise,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_truncate,
]);

const fn bits(numbers: &[c_long]) -> [u64; NUMBERS / 64] {
    let mut bits = [0; NUMBERS / 64];
    let mut index = 0;
    while index < numbers.len() {
        let number = numbers[index] as usize;
        bits[number / 64] |= 1 << (number % 64);
        index += 1;
    }
    bits
}

#[unsafe(naked)]
#[unsafe(no_mangle)]
unsafe extern "C" fn syscall() {
    // The arguments: number in rdi, then rsi, rdx, rcx, r8, r9 and the stack.
    naked_asm!(
        "cmp rdi, {numbers}",
        "jae 2f",
        "lea rax, [rip + {table}]",
        "bt qword ptr [rax], rdi",
        "jc {intercepted}",
        "2: mov rax, rdi",
        "mov rdi, rsi",
        "mov rsi, rdx",
        "mov rdx, rcx",
        "mov r10, r8",
        "mov r8, r9",
        "mov r9, [rsp + 8]",
        "syscall",
        "cmp rax, -4095",
        "jae 3f",
        "ret",
        "3: mov rdi, rax",
        "jmp {failed}",
        numbers = const NUMBERS,
        table = sym INTERCEPTED,
        intercepted = sym intercepted,
        failed = sym failed,
    )
}

extern "C" fn failed(result: c_long) -> c_long {
    c_long::from(raw::fail(result.unsigned_abs() as c_int))
}

/// Takes `syscall`'s own arguments: `syscall` jumps here.
///
/// # Safety
/// As for the system call.
unsafe extern "C" fn intercepted(
    number: c_long,
    a: usize,
    b: usize,
    c: usize,
    d: usize,
    e: usize,
    f: usize,
) -> c_long {
    let path = |address: usize| ptr::with_exposed_provenance::<c_char>(address);
    let pointer = ptr::with_exposed_provenance_mut::<c_void>;
    // SAFETY: the arguments are those of the system call, which libc's functions of the same names
    // take in the same order.
    unsafe {
        let result = match number {
            libc::SYS_open => files::open(path(a), b as c_int, c as u32),
            libc::SYS_openat => files::openat(a as c_int, path(b), c as c_int, d as u32),
            libc::SYS_openat2 if place(path(b)).is_some() => {
                // The flags are the first field of `struct open_how`.
                let flags = ptr::with_exposed_provenance::<u64>(c);
                match flags.is_null() {
                    true => raw::fail(libc::EFAULT),
                    false => files::openat(a as c_int, path(b), flags.read_unaligned() as c_int, 0),
                }
            }
            libc::SYS_creat => files::creat(path(a), b as u32),
            libc::SYS_access => files::access(path(a), b as c_int),
            libc::SYS_faccessat => files::faccessat(a as c_int, path(b), c as c_int, 0),
            libc::SYS_faccessat2 if place(path(b)).is_some() => {
                files::faccessat(a as c_int, path(b), c as c_int, d as c_int)
            }
            libc::SYS_stat => files::stat(path(a), pointer(b).cast()),
            libc::SYS_lstat => files::lstat(path(a), pointer(b).cast()),
            libc::SYS_newfstatat if place(path(b)).is_some() => {
                files::fstatat(a as c_int, path(b), pointer(c).cast(), d as c_int)
            }
            libc::SYS_statx if place(path(b)).is_some() => files::statx(
                a as c_int,
                path(b),
                c as c_int,
                d as c_uint,
                pointer(e).cast(),
            ),
            libc::SYS_ioctl => control::ioctl(a as c_int, b as c_ulong, c),
            libc::SYS_close => descriptors::close(a as c_int),
            libc::SYS_close_range => descriptors::close_range(a as c_uint, b as c_uint, c as c_int),
            libc::SYS_dup => descriptors::dup(a as c_int),
            libc::SYS_dup2 => descriptors::dup2(a as c_int, b as c_int),
            libc::SYS_dup3 => descriptors::dup3(a as c_int, b as c_int, c as c_int),
            libc::SYS_fcntl if matches!(b as c_int, libc::F_DUPFD | libc::F_DUPFD_CLOEXEC) => {
                descriptors::fcntl(a as c_int, b as c_int, c)
            }
            libc::SYS_mmap => {
                let offset = f as libc::off_t;
                return memory::mmap(pointer(a), b, c as c_int, d as c_int, e as c_int, offset)
                    .addr() as c_long;
            }
            libc::SYS_munmap => memory::munmap(pointer(a), b),
            libc::SYS_mremap => {
                return memory::mremap(pointer(a), b, c, d as c_int, pointer(e)).addr() as c_long;
            }
            libc::SYS_mprotect => memory::mprotect(pointer(a), b, c as c_int),
            libc::SYS_pkey_mprotect => memory::pkey_mprotect(pointer(a), b, c as c_int, d as c_int),
            libc::SYS_madvise => memory::madvise(pointer(a), b, c as c_int),
            libc::SYS_process_madvise => {
                let ranges = pointer(b).cast();
                return memory::process_madvise(a as c_int, ranges, c, d as c_int, e as c_uint)
                    as c_long;
            }
            libc::SYS_fallocate => {
                memory::fallocate(a as c_int, b as c_int, c as libc::off_t, d as libc::off_t)
            }
            libc::SYS_ftruncate => memory::ftruncate(a as c_int, b as libc::off_t),
            libc::SYS_truncate => memory::truncate(path(a), b as libc::off_t),
            libc::SYS_read => return transfers::read(a as c_int, pointer(b), c) as c_long,
            libc::SYS_pread64 => {
                let offset = d as libc::off_t;
                return transfers::pread(a as c_int, pointer(b), c, offset) as c_long;
            }
            libc::SYS_readv => {
                return transfers::readv(a as c_int, pointer(b).cast(), c as c_int) as c_long;
            }
            libc::SYS_preadv => {
                let offset = d as libc::off_t;
                return transfers::preadv(a as c_int, pointer(b).cast(), c as c_int, offset)
                    as c_long;
            }
            libc::SYS_write => return transfers::write(a as c_int, pointer(b), c) as c_long,
            libc::SYS_pwrite64 => {
                let offset = d as libc::off_t;
                return transfers::pwrite(a as c_int, pointer(b), c, offset) as c_long;
            }
            libc::SYS_writev => {
                return transfers::writev(a as c_int, pointer(b).cast(), c as c_int) as c_long;
            }
            libc::SYS_pwritev => {
                let offset = d as libc::off_t;
                return transfers::pwritev(a as c_int, pointer(b).cast(), c as c_int, offset)
                    as c_long;
            }
            _ => {
                return match raw::syscall(number, [a, b, c, d, e, f]) {
                    Ok(value) => value as c_long,
                    Err(reason) => c_long::from(raw::fail(reason)),
                };
            }
        };
        c_long::from(result)
    }
}
