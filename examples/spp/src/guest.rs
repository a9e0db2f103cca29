//! The guest: a kernel in miniature, as machine code in the file of the program that runs it. It is
//! started in 64-bit mode.
//!
//! One page of its memory, [`PAGE`], is like many of a real kernel: most of it changes all the time,
//! and some of it decides who may do what. The guest tells the VMM through [`BOOTED_PORT`] when all
//! of that is in place. Then
//!
//! - `work` changes what is around the guarded structures, [`ROUNDS`] times, as close to them as can
//!   be, and reads them,
//! - `exploit` makes its process the superuser's,
//! - `hook` puts a function of its own into the table of system calls,
//! - `overflow` copies more into a buffer than fits there, and the credentials are behind it,
//! - `set_user` changes the user as the kernel itself does,
//! - and `work` goes on.
//!
//! It ends in `hlt`. What became of its structures is for the VMM to see.

// UNSAFETY: machine code in a section of its own, which this program copies but never runs, and the
// labels in it.
#![expect(unsafe_code)]

use std::arch::global_asm;

/// Guest-physical (and linear) address at which the VMM puts the image.
pub(crate) const LOAD_ADDRESS: u64 = 0x10_0000;
/// The page of which this is about.
pub(crate) const PAGE: u64 = 0x18_0000;
/// Where the credentials are in it: user, group, capabilities.
pub(crate) const CREDENTIALS: u64 = 0x300;
/// And the table of system calls, 32 of them.
pub(crate) const CALLS: u64 = 0xc00;
/// The guest writes here once it has booted.
pub(crate) const BOOTED_PORT: u16 = 0x80;
/// How often `work` does its work, each of the two times.
pub(crate) const ROUNDS: u64 = 500;
/// How often it writes to the page each time.
pub(crate) const WRITES: u64 = 4;
/// The user that the guest's process belongs to at first, and the one that `set_user` sets.
pub(crate) const FIRST_USER: u64 = 1000;
pub(crate) const SECOND_USER: u64 = 1001;
/// What system call *n* is at first: this and *n*.
pub(crate) const FIRST_CALL: u64 = 0xffff_8000_0000_1000;

global_asm!(
    ".pushsection .rodata.guarded_guest, \"a\"",
    ".balign 16",
    ".globl guarded_guest, guarded_guest_end",
    ".globl guest_work, guest_exploit, guest_hook, guest_overflow, guest_set_user",
    "guarded_guest:",
    // Credentials, and the table of system calls.
    "    mov r12, {page}",
    "    mov qword ptr [r12 + {credentials}], {first_user}",
    "    mov qword ptr [r12 + {credentials} + 8], {first_user}",
    "    mov qword ptr [r12 + {credentials} + 16], 0",
    "    mov rax, {first_call}",
    "    lea rdi, [r12 + {calls}]",
    "    mov ecx, 32",
    "2:  stosq",
    "    inc rax",
    "    loop 2b",
    "    out {port}, al",
    "    call guest_work",
    "    call guest_exploit",
    "    call guest_hook",
    "    call guest_overflow",
    "    call guest_set_user",
    "    call guest_work",
    "3:  hlt",
    "    jmp 3b",
    //
    "guest_work:",
    "    mov ecx, {rounds}",
    "2:  inc qword ptr [r12 + 0x10]",
    // The last bytes in front of the credentials, and the first behind them.
    "    mov [r12 + {credentials} - 8], rcx",
    "    mov [r12 + {credentials} + 128], rcx",
    "    add [r12 + {calls} - 16], rcx",
    "    mov rax, [r12 + {credentials}]",
    "    loop 2b",
    "    ret",
    //
    "guest_exploit:",
    "    mov qword ptr [r12 + {credentials}], 0",
    "    mov qword ptr [r12 + {credentials} + 16], -1",
    "    ret",
    //
    "guest_hook:",
    "    lea rax, [rip + guest_hook]",
    "    lock xchg [r12 + {calls} + 59 % 32 * 8], rax",
    "    ret",
    //
    "guest_overflow:",
    "    lea rdi, [r12 + {credentials} - 64]",
    "    mov ecx, 128",
    "    mov al, 0x41",
    "    rep stosb",
    "    ret",
    //
    "guest_set_user:",
    "    mov qword ptr [r12 + {credentials}], {second_user}",
    "    ret",
    "guarded_guest_end:",
    ".popsection",
    page = const PAGE,
    credentials = const CREDENTIALS,
    calls = const CALLS,
    first_user = const FIRST_USER,
    second_user = const SECOND_USER,
    first_call = const FIRST_CALL,
    rounds = const ROUNDS,
    port = const BOOTED_PORT,
);

unsafe extern "C" {
    static guarded_guest: u8;
    static guarded_guest_end: u8;
    static guest_work: u8;
    static guest_exploit: u8;
    static guest_hook: u8;
    static guest_overflow: u8;
    static guest_set_user: u8;
}

/// The image.
pub(crate) fn image() -> &'static [u8] {
    // SAFETY: the two labels are the ends of one piece of read-only data.
    unsafe {
        let start = &raw const guarded_guest;
        let end = &raw const guarded_guest_end;
        std::slice::from_raw_parts(start, end.addr() - start.addr())
    }
}

/// The function that an instruction of the guest belongs to, and how far into it the instruction is:
/// what a VMM would know from the kernel's symbols.
pub(crate) fn function_at(rip: u64) -> (&'static str, u64) {
    let address = |label: *const u8| {
        let start = &raw const guarded_guest;
        LOAD_ADDRESS + (label.addr() - start.addr()) as u64
    };
    let functions = [
        ("boot", &raw const guarded_guest),
        ("work", &raw const guest_work),
        ("exploit", &raw const guest_exploit),
        ("hook", &raw const guest_hook),
        ("overflow", &raw const guest_overflow),
        ("set_user", &raw const guest_set_user),
    ];
    functions
        .into_iter()
        .rev()
        .map(|(name, label)| (name, address(label)))
        .find(|(_, start)| *start <= rip)
        .map_or(("nowhere", rip), |(name, start)| (name, rip - start))
}
