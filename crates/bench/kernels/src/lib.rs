//! Loops that time a processor. The same functions run in a program on the host, in a guest of the
//! software KVM and on QEMU (`hardware/speed` boots them), so that figures can be set side by side.
//!
//! All but one are written in assembler: what is executed must not depend on who compiles it.
#![no_std]
// UNSAFETY: the kernels are machine code that accesses the memory it is given.
#![expect(unsafe_code)]

use core::arch::naked_asm;
use sha2::{Digest, Sha256};

/// A loop: `rounds` times its work, in the memory given.
///
/// # Safety
/// [`MEMORY_BYTES`] from `memory` on must be readable and writable, by nobody else meanwhile.
pub type Kernel = unsafe extern "sysv64" fn(rounds: u64, memory: *mut u8);

/// Bytes of memory that a kernel of [`KERNELS`] uses.
pub const MEMORY_BYTES: usize = 1 << 20;

/// The kernels whose speed is averaged, with rounds that take a software processor some tenths of a second.
pub const KERNELS: [(&str, Kernel, u64); 6] = [
    ("integer", integer, 6_000_000),
    ("calls", calls, 6_000_000),
    ("memory", memory, 800),
    ("sha256", sha256, 20),
    ("sse2", sse2, 6_000_000),
    ("strings", strings, 4_000_000),
];

/// Rounds of [`tight`] that go with those of [`KERNELS`].
pub const TIGHT_ROUNDS: u64 = 60_000_000;

/// Bytes that [`page_stride`] goes over.
pub const STRIDE_BYTES: usize = 256 << 20;

/// Steps of [`page_stride`].
pub const STRIDE_STEPS: u64 = 1_000_000;

/// Bytes that [`copy`] copies in one go, and how often.
pub const COPY_BYTES: usize = 512 << 20;
/// See [`COPY_BYTES`].
pub const COPIES: u64 = 2;

/// Two instructions.
///
/// # Safety
/// None: it accesses no memory.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn tight(rounds: u64, memory: *mut u8) {
    naked_asm!("2: dec rdi", "jnz 2b", "ret")
}

/// Ten instructions of integer arithmetic, most of them waiting for the one before.
///
/// # Safety
/// See [`Kernel`].
#[unsafe(naked)]
pub unsafe extern "sysv64" fn integer(rounds: u64, memory: *mut u8) {
    naked_asm!(
        "mov eax, 1",
        "mov edx, 3",
        "mov r9d, 5",
        "2: lea rax, [rax + r9*4 + 7]",
        "xor rcx, rax",
        "add r9, rcx",
        "shl rdx, 3",
        "sub rdx, rax",
        "and r10, rdx",
        "or r11, r9",
        "imul r8, rcx",
        "dec rdi",
        "jnz 2b",
        "ret"
    )
}

/// A call, a frame, a branch taken every other time.
///
/// # Safety
/// See [`Kernel`].
#[unsafe(naked)]
pub unsafe extern "sysv64" fn calls(rounds: u64, memory: *mut u8) {
    naked_asm!(
        "2: call 4f",
        "test edi, 1",
        "je 3f",
        "inc rax",
        "3: dec rdi",
        "jnz 2b",
        "ret",
        "4: push rbp",
        "mov rbp, rsp",
        "pop rbp",
        "ret"
    )
}

/// 64 KiB word by word, then the whole memory at every 192nd byte; each loaded, changed and stored.
///
/// # Safety
/// See [`Kernel`].
#[unsafe(naked)]
pub unsafe extern "sysv64" fn memory(rounds: u64, memory: *mut u8) {
    naked_asm!(
        "2: xor ecx, ecx",
        "3: mov rax, [rsi + rcx]",
        "add rax, rdi",
        "mov [rsi + rcx], rax",
        "add rcx, 8",
        "cmp rcx, 0x10000",
        "jb 3b",
        "xor ecx, ecx",
        "4: mov eax, [rsi + rcx]",
        "mov [rsi + rcx + 8], eax",
        "add rcx, 192",
        "cmp rcx, 0xfff00",
        "jb 4b",
        "dec rdi",
        "jnz 2b",
        "ret"
    )
}

/// SHA-256 of 64 KiB, as rustc compiles it.
///
/// # Safety
/// See [`Kernel`].
pub unsafe extern "sysv64" fn sha256(rounds: u64, memory: *mut u8) {
    // SAFETY: the caller's.
    let memory = unsafe { core::slice::from_raw_parts_mut(memory, 64 << 10) };
    for _ in 0..rounds {
        let digest = Sha256::digest(&*memory);
        memory[..32].copy_from_slice(&digest);
    }
}

/// Floating point, of one number and of two, through memory.
///
/// # Safety
/// See [`Kernel`].
#[unsafe(naked)]
pub unsafe extern "sysv64" fn sse2(rounds: u64, memory: *mut u8) {
    naked_asm!(
        // Ones: nothing gets large or small.
        "mov eax, 1",
        "cvtsi2sd xmm1, eax",
        "unpcklpd xmm1, xmm1",
        "movapd xmm2, xmm1",
        "movapd [rsi], xmm1",
        "2: movsd xmm0, [rsi]",
        "addsd xmm0, xmm1",
        "mulsd xmm0, xmm2",
        "divsd xmm0, xmm0",
        "movsd [rsi], xmm0",
        "movapd xmm3, [rsi]",
        "mulpd xmm3, xmm2",
        "movapd [rsi + 16], xmm3",
        "dec rdi",
        "jnz 2b",
        "ret"
    )
}

/// Short moves: repeated, and one word at a time. A repeated instruction counts as one.
///
/// # Safety
/// See [`Kernel`].
#[unsafe(naked)]
pub unsafe extern "sysv64" fn strings(rounds: u64, memory: *mut u8) {
    naked_asm!(
        "mov rdx, rdi",
        "mov r8, rsi",
        "2: lea rdi, [r8 + 0x1000]",
        "mov rsi, r8",
        "mov ecx, 64",
        "rep movsb",
        "movsq",
        "movsd",
        "movsb",
        "mov ecx, 16",
        "rep stosd",
        "lodsq",
        "stosq",
        "dec rdx",
        "jnz 2b",
        "ret"
    )
}

/// Loads from one page after the other, a little further into each: over [`STRIDE_BYTES`] of `memory`.
///
/// # Safety
/// [`STRIDE_BYTES`] from `memory` on must be readable.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn page_stride(steps: u64, memory: *mut u8) {
    naked_asm!(
        "xor ecx, ecx",
        "2: mov rax, [rsi + rcx]",
        "add rcx, 4096 + 64",
        "and ecx, 0xffffff8",
        "dec rdi",
        "jnz 2b",
        "ret"
    )
}

/// `rep movsb`.
///
/// # Safety
/// `bytes` must be readable at `from` and writable at `to`, and not overlap.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn copy(to: *mut u8, from: *const u8, bytes: usize) {
    naked_asm!("mov rcx, rdx", "rep movsb", "ret")
}
