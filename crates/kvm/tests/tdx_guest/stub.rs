//! The guest's code: it executes one instruction after another that the test chooses, with the
//! registers that the test chooses, and reports what became of it.
//!
//! It starts at the reset vector, enters long mode with memory mapped one to one below 4 GiB, and once
//! more above, there with the shared bit. In a page of shared memory (the mailbox) it finds the
//! registers and the number of an instruction, and leaves the registers after it. Reports are writes
//! to ports, by TDG.VP.VMCALL, so that the test runs whenever the guest waits.

/// Guest-physical address of the first of the pages that [`pages`] fills.
pub(crate) const PAGES_AT: u64 = 0xffff_c000;
pub(crate) const PAGES: usize = 4;
/// Where the guest sees the shared half of its memory.
pub(crate) const SHARED: u64 = 4 << 30;
/// Guest-physical address of the mailbox, which is shared.
pub(crate) const MAILBOX: u64 = 0x4000;

/// Ports by which the guest reports.
pub(crate) mod port {
    /// The instruction has completed.
    pub(crate) const DONE: u16 = 0x500;
    /// #VE; the handler has taken the information.
    pub(crate) const VE: u16 = 0x501;
    /// Another exception; the instruction is given up.
    pub(crate) const EXCEPTION: u16 = 0x502;
}

/// Offsets in the mailbox; 16 registers are at 0.
pub(crate) mod mailbox {
    pub(crate) const COMMAND: usize = 0x80;
    /// After #VE: status, RCX, RDX, R8, R9 and R10 of VE.INFO.GET, and the instruction's address.
    /// After another exception: the vector, three words of the frame, and CR2.
    pub(crate) const REPORT: usize = 0x90;
    /// By how much the handler of #VE advances RIP.
    pub(crate) const SKIP: usize = 0xd0;
    /// Interrupts that the guest has taken.
    pub(crate) const INTERRUPTS: usize = 0xd8;
}

/// Instructions that the guest can be told to execute.
#[derive(Clone, Copy, Debug)]
#[repr(u64)]
pub(crate) enum Instruction {
    Tdcall,
    /// `mov rax, [rdi]`
    Load,
    /// `mov [rdi], rax`
    Store,
    Hlt,
    /// `in al, dx`
    In,
    /// `out dx, eax`
    Out,
    Rdmsr,
    Wrmsr,
    Cpuid,
    Vmcall,
    /// `rep insb`
    RepInsb,
    /// `sti; nop; cli`
    TakeInterrupts,
    /// `call rdi`
    Call,
}

/// The vector of the interrupt that the guest handles.
pub(crate) const INTERRUPT: u64 = 0x40;

core::arch::global_asm!(
    ".pushsection .rodata.tdx_stub, \"a\", @progbits",
    ".balign 16",
    "2:",
    ".code32",
    "mov eax, cr4",
    "or eax, 0x220",
    "mov cr4, eax",
    "mov eax, {pages}",
    "mov cr3, eax",
    "mov eax, cr0",
    "or eax, 0x80000000",
    "mov cr0, eax",
    // lgdt [system page + 0x480]; far jump to 64-bit code
    ".byte 0x0f, 0x01, 0x15",
    ".long {pages} + 0x2480",
    ".byte 0xea",
    ".long {pages} + 0x3000 + 20f - 2b",
    ".word 8",
    ".code64",
    "20: mov esp, {pages} + 0x3000",
    "mov eax, {pages} + 0x2490",
    "lidt [rax]",
    "xor eax, eax",
    "jmp 31f",
    // The next instruction: its registers, then the instruction.
    "30: mov r15, {mailbox}",
    "mov rax, [r15 + 0x80]",
    "lea rbx, [rip + 40f]",
    "movsxd rax, dword ptr [rbx + rax * 4]",
    "add rax, rbx",
    "push rax",
    "mov rax, [r15]",
    "mov rcx, [r15 + 0x08]",
    "mov rdx, [r15 + 0x10]",
    "mov rbx, [r15 + 0x18]",
    "mov rbp, [r15 + 0x28]",
    "mov rsi, [r15 + 0x30]",
    "mov rdi, [r15 + 0x38]",
    "mov r8, [r15 + 0x40]",
    "mov r9, [r15 + 0x48]",
    "mov r10, [r15 + 0x50]",
    "mov r11, [r15 + 0x58]",
    "mov r12, [r15 + 0x60]",
    "mov r13, [r15 + 0x68]",
    "mov r14, [r15 + 0x70]",
    "mov r15, [r15 + 0x78]",
    "ret",
    ".balign 4",
    "40: .long 50f-40b, 51f-40b, 52f-40b, 53f-40b, 54f-40b, 55f-40b",
    ".long 56f-40b, 57f-40b, 58f-40b, 59f-40b, 60f-40b, 61f-40b, 62f-40b",
    "50: .byte 0x66, 0x0f, 0x01, 0xcc",
    "jmp 31f",
    "51: mov rax, [rdi]",
    "jmp 31f",
    "52: mov [rdi], rax",
    "jmp 31f",
    "53: hlt",
    "jmp 31f",
    "54: in al, dx",
    "jmp 31f",
    "55: out dx, eax",
    "jmp 31f",
    "56: rdmsr",
    "jmp 31f",
    "57: wrmsr",
    "jmp 31f",
    "58: cpuid",
    "jmp 31f",
    "59: vmcall",
    "jmp 31f",
    "60: rep insb",
    "jmp 31f",
    "61: sti",
    "nop",
    "cli",
    "jmp 31f",
    "62: call rdi",
    // The instruction has completed.
    "31: push r15",
    "mov r15, {mailbox}",
    "mov [r15], rax",
    "mov [r15 + 0x08], rcx",
    "mov [r15 + 0x10], rdx",
    "mov [r15 + 0x18], rbx",
    "mov [r15 + 0x28], rbp",
    "mov [r15 + 0x30], rsi",
    "mov [r15 + 0x38], rdi",
    "mov [r15 + 0x40], r8",
    "mov [r15 + 0x48], r9",
    "mov [r15 + 0x50], r10",
    "mov [r15 + 0x58], r11",
    "mov [r15 + 0x60], r12",
    "mov [r15 + 0x68], r13",
    "mov [r15 + 0x70], r14",
    "pop rax",
    "mov [r15 + 0x78], rax",
    "mov r14d, {done}",
    "call 70f",
    "jmp 30b",
    // TDG.VP.VMCALL: write a byte to the port in R14.
    "70: xor eax, eax",
    "mov ecx, 0xfc00",
    "xor r10d, r10d",
    "mov r11d, 30",
    "mov r12d, 1",
    "mov r13d, 1",
    "xor r15d, r15d",
    ".byte 0x66, 0x0f, 0x01, 0xcc",
    "ret",
    // #VE.
    ".balign 16",
    "80: push rax",
    "push rcx",
    "push rdx",
    "push rbx",
    "push r8",
    "push r9",
    "push r10",
    "push r11",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "mov eax, 3",
    ".byte 0x66, 0x0f, 0x01, 0xcc",
    "mov r15, {mailbox}",
    "mov [r15 + 0x90], rax",
    "mov [r15 + 0x98], rcx",
    "mov [r15 + 0xa0], rdx",
    "mov [r15 + 0xa8], r8",
    "mov [r15 + 0xb0], r9",
    "mov [r15 + 0xb8], r10",
    "mov rax, [rsp + 12 * 8]",
    "mov [r15 + 0xc0], rax",
    "mov r14d, {ve}",
    "call 70b",
    "mov r15, {mailbox}",
    "mov rax, [r15 + 0xd0]",
    "add [rsp + 12 * 8], rax",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop r11",
    "pop r10",
    "pop r9",
    "pop r8",
    "pop rbx",
    "pop rdx",
    "pop rcx",
    "pop rax",
    "iretq",
    // An interrupt: counted, and its end told to the local APIC.
    ".balign 16",
    "81: push rax",
    "push rcx",
    "push rdx",
    "mov rax, {mailbox}",
    "inc qword ptr [rax + 0xd8]",
    "mov ecx, 0x80b",
    "xor eax, eax",
    "xor edx, edx",
    "wrmsr",
    "pop rdx",
    "pop rcx",
    "pop rax",
    "iretq",
    // Any other exception.
    "82: mov r15, {mailbox}",
    "pop rax",
    "mov [r15 + 0x90], rax",
    "pop rax",
    "mov [r15 + 0x98], rax",
    "pop rax",
    "mov [r15 + 0xa0], rax",
    "pop rax",
    "mov [r15 + 0xa8], rax",
    "mov rax, cr2",
    "mov [r15 + 0xb0], rax",
    "mov esp, {pages} + 0x3000",
    "mov r14d, {exception}",
    "call 70b",
    "jmp 30b",
    ".balign 16",
    "90:",
    ".set tdx_stub_vector, 0",
    ".rept 32",
    ".balign 16",
    ".byte 0x6a, tdx_stub_vector",
    "jmp 82b",
    ".set tdx_stub_vector, tdx_stub_vector + 1",
    ".endr",
    "91:",
    ".global twofold_tdx_stub",
    "twofold_tdx_stub:",
    // Where things are in the code: its bytes, the handlers of #VE and of the interrupt, the others.
    ".quad 2b - twofold_tdx_stub, 91b - 2b, 80b - 2b, 81b - 2b, 90b - 2b",
    ".popsection",
    pages = const PAGES_AT,
    mailbox = const SHARED + MAILBOX,
    done = const port::DONE,
    ve = const port::VE,
    exception = const port::EXCEPTION,
);

unsafe extern "C" {
    #[link_name = "twofold_tdx_stub"]
    static STUB: [u64; 5];
}

/// Where the guest sees the gate of a vector, which it may change.
pub(crate) fn gate_at(vector: u64) -> u64 {
    PAGES_AT + 0x2000 + 16 * vector
}

/// The two words of a gate that leads to the handler which reports an exception and gives up.
pub(crate) fn plain_gate(vector: u64) -> [u64; 2] {
    // SAFETY: constants.
    let [_, _, _, _, exceptions] = unsafe { STUB };
    gate(exceptions + 16 * vector)
}

/// A gate to an offset in the code.
fn gate(offset: u64) -> [u64; 2] {
    let handler = PAGES_AT + 0x3000 + offset;
    [
        handler & 0xffff | 8 << 16 | 0x8e00 << 32 | handler >> 16 << 48,
        handler >> 32,
    ]
}

/// The four pages that a TD starts with, for a shared bit: the two tables, descriptors and stack, and
/// the code with the reset vector.
pub(crate) fn pages(shared_bit: u32) -> Vec<u8> {
    // SAFETY: constants that the assembler has put there; the first leads to the code, which is as
    // long as the second says.
    let (code, layout) = unsafe {
        let layout = STUB;
        let start = (&raw const STUB)
            .cast::<u8>()
            .wrapping_offset(layout[0] as isize);
        (
            std::slice::from_raw_parts(start, layout[1] as usize),
            layout,
        )
    };
    let [_, _, ve, interrupt, exceptions] = layout;
    let mut pages = vec![0; PAGES * 4096];
    let mut put = |at: usize, value: u64| {
        pages[at..at + 8].copy_from_slice(&value.to_le_bytes());
    };
    const TABLE: u64 = 0b11;
    const LARGE_PAGE: u64 = 0b1000_0011;
    put(0, (PAGES_AT + 0x1000) | TABLE);
    for gigabyte in 0..4 {
        let address = (gigabyte as u64) << 30;
        put(0x1000 + 8 * gigabyte, address | LARGE_PAGE);
        let shared = address | 1 << shared_bit;
        put(0x1020 + 8 * gigabyte, shared | LARGE_PAGE);
    }
    let plain = (0..32).map(|vector| (vector, exceptions + 16 * vector));
    for (vector, offset) in plain.chain([(20, ve), (INTERRUPT, interrupt)]) {
        let [low, high] = gate(offset);
        put(0x2000 + 16 * vector as usize, low);
        put(0x2008 + 16 * vector as usize, high);
    }
    // 64-bit code; the table's register image, and that of the IDT.
    put(0x2458, 0x00af_9b00_0000_ffff);
    put(0x2480, (PAGES_AT + 0x2450) << 16 | 0xf);
    put(
        0x2490,
        (PAGES_AT + 0x2000) << 16 | (16 * (INTERRUPT + 1) - 1),
    );
    pages[0x3000..0x3000 + code.len()].copy_from_slice(code);
    assert!(code.len() <= 0xff0);
    // jmp to the first byte of the page
    pages[0x3ff0..0x3ff5].copy_from_slice(&[0xe9, 0x0b, 0xf0, 0xff, 0xff]);
    pages
}
