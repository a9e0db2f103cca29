//! The guest: machine code in the file of the program that runs it. It is started in 64-bit mode
//! and works on [`PAGES`] pages from [`DATA`] on. It tells the VMM through [`STEP_PORT`] which
//! step is done, and ends in `hlt` with its verdict in `rax`: 0 when everything was as it should be,
//! otherwise the number of the step that was not.
//!
//! 1. Writes [`GREETING`] into every page.
//! 2. Asks for every second page to become private, finds zeros there, and writes [`SECRET`].
//! 3. Finds the secret in every second page and the greeting in the others.
//! 4. Reads the page at [`FOREIGN`], which the VMM has made private although there is nothing
//!    private behind it.
//! 5. Asks for all pages to become shared again. The VMM has given away the shared half of those that
//!    were private, so zeros are there, and the greeting is in the others.
//! 6. Asks for them to become private once more, and finds zeros: the VMM has punched holes.

// UNSAFETY: machine code in a section of its own, which this program copies but never runs, and the
// labels at its two ends.
#![expect(unsafe_code)]

use std::arch::global_asm;

/// Guest-physical (and linear) address at which the VMM puts the image.
pub(crate) const LOAD_ADDRESS: u64 = 0x10_0000;
/// Where the pages are.
pub(crate) const DATA: u64 = 1 << 30;
/// How many there are.
pub(crate) const PAGES: u64 = 16;
/// A page of a slot that has no private half.
pub(crate) const FOREIGN: u64 = DATA + (1 << 21);
/// The guest writes the number of the step that is done here.
pub(crate) const STEP_PORT: u16 = 0x80;
/// What the program may see.
pub(crate) const GREETING: u64 = u64::from_le_bytes(*b"to all !");
/// What it may not.
pub(crate) const SECRET: u64 = u64::from_le_bytes(*b"secret!!");

/// `KVM_HC_MAP_GPA_RANGE`: address, pages, and what they shall be.
pub(crate) const MAP_GPA_RANGE: u64 = 12;
/// In the third argument: private.
pub(crate) const ENCRYPTED: u64 = 1 << 4;

global_asm!(
    ".pushsection .rodata.private_guest, \"a\"",
    ".balign 16",
    ".globl private_guest, private_guest_end",
    "private_guest:",
    "    mov r12, {data}",
    "    mov r13, {data_end}",
    "    mov r14, {greeting}",
    "    mov r15, {secret}",
    //
    // 1. Fill every page with the greeting.
    "    mov rdi, r12",
    "    mov rcx, {words}",
    "    mov rax, r14",
    "    rep stosq",
    "    mov al, 1",
    "    out {port}, al",
    //
    // 2. Every second page becomes private, is empty, and gets the secret.
    "    mov r8, r12",
    "2:  mov ecx, 1",
    "    mov edx, {encrypted}",
    "    call map",
    "    mov ebp, 2",
    "    test rax, rax",
    "    jnz 9f",
    "    xor eax, eax",
    "    call check",
    "    mov rdi, r8",
    "    mov rcx, 512",
    "    mov rax, r15",
    "    rep stosq",
    "    add r8, 0x2000",
    "    cmp r8, r13",
    "    jb 2b",
    "    mov al, 2",
    "    out {port}, al",
    //
    // 3. Each kind is where it belongs.
    "    mov ebp, 3",
    "    mov r8, r12",
    "2:  mov rax, r15",
    "    call check",
    "    add r8, 0x1000",
    "    mov rax, r14",
    "    call check",
    "    add r8, 0x1000",
    "    cmp r8, r13",
    "    jb 2b",
    "    mov al, 3",
    "    out {port}, al",
    //
    // 4. A page that is private and is not there.
    "    mov rax, {foreign}",
    "    mov rax, [rax]",
    "    mov al, 4",
    "    out {port}, al",
    //
    // 5. Everything is shared again.
    "    mov ebp, 5",
    "    mov r8, r12",
    "    mov ecx, {pages}",
    "    xor edx, edx",
    "    call map",
    "    test rax, rax",
    "    jnz 9f",
    "2:  xor eax, eax",
    "    call check",
    "    add r8, 0x1000",
    "    mov rax, r14",
    "    call check",
    "    add r8, 0x1000",
    "    cmp r8, r13",
    "    jb 2b",
    "    mov al, 5",
    "    out {port}, al",
    //
    // 6. And private once more: nothing is left.
    "    mov ebp, 6",
    "    mov r8, r12",
    "    mov ecx, {pages}",
    "    mov edx, {encrypted}",
    "    call map",
    "    test rax, rax",
    "    jnz 9f",
    "2:  xor eax, eax",
    "    call check",
    "    add r8, 0x1000",
    "    cmp r8, r13",
    "    jb 2b",
    "    mov al, 6",
    "    out {port}, al",
    "    xor ebp, ebp",
    "9:  mov rax, rbp",
    "    hlt",
    "    jmp 9b",
    //
    // Asks for ecx pages from r8 on to become what edx says. The answer is in rax.
    "map:",
    "    mov eax, {map_gpa_range}",
    "    mov rbx, r8",
    "    vmcall",
    "    ret",
    //
    // Makes sure that every word of the page at r8 is rax; ends the guest if not.
    "check:",
    "    mov rdi, r8",
    "    mov rcx, 512",
    "    repe scasq",
    "    jne 9b",
    "    ret",
    "private_guest_end:",
    ".popsection",
    data = const DATA,
    data_end = const DATA + PAGES * 0x1000,
    greeting = const GREETING,
    secret = const SECRET,
    words = const PAGES * 512,
    pages = const PAGES,
    foreign = const FOREIGN,
    encrypted = const ENCRYPTED,
    map_gpa_range = const MAP_GPA_RANGE,
    port = const STEP_PORT,
);

unsafe extern "C" {
    static private_guest: u8;
    static private_guest_end: u8;
}

/// The image.
pub(crate) fn image() -> &'static [u8] {
    // SAFETY: the two labels are the ends of one piece of read-only data.
    unsafe {
        let start = &raw const private_guest;
        let end = &raw const private_guest_end;
        std::slice::from_raw_parts(start, end.addr() - start.addr())
    }
}
