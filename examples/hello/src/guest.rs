//! The guest: some 200 bytes of machine code, a GDT and an IDT, in the file of the program that runs
//! it. It is started in 64-bit mode at [`LOAD_ADDRESS`], with a stack and with the page tables that
//! the VMM put into its memory, and ends in `hlt` with its verdict in `rax`: 0 when everything was
//! as it should be, otherwise the number of the step that was not.

// UNSAFETY: machine code in a section of its own, which this program copies but never runs, and the
// labels at its two ends.
#![expect(unsafe_code)]

use std::arch::global_asm;

/// Guest-physical (and linear) address at which the VMM puts the image.
pub(crate) const LOAD_ADDRESS: u64 = 0x10_0000;

/// Where the guest says something, one character a write: a serial port without the rest of it.
pub(crate) const CONSOLE_PORT: u16 = 0x3f8;

/// The page directory for linear addresses from [`WINDOW`]. The VMM leaves it empty; the guest's
/// page-fault handler fills it in.
pub(crate) const WINDOW_DIRECTORY: u64 = 0xa000;

/// Linear addresses that have nothing behind them until the guest touches them: 1 GiB.
pub(crate) const WINDOW: u64 = 7 << 30;

/// The guest-physical memory that the page-fault handler puts behind the window.
pub(crate) const BEHIND_WINDOW: u64 = 6 << 30;

/// Guest-physical address of a device with two registers of 8 bytes. A write to the first one gives
/// it a number, a read of the second one returns that number squared. No memory is there.
pub(crate) const SQUARER: u64 = 0xd000_0000;

/// First and last-plus-one guest-physical address of the memory that step 1 walks over.
pub(crate) const HIGH_MEMORY: (u64, u64) = (4 << 30, 5 << 30);

/// Distance in bytes between the places where step 1 writes.
pub(crate) const STRIDE: u64 = 64 << 20;

/// What the guest stores through the window in step 3.
pub(crate) const GREETING: u64 = u64::from_le_bytes(*b"twofold!");

global_asm!(
    ".pushsection .rodata.guest, \"a\"",
    ".balign 16",
    // Global, since the code that names them may be compiled into another object.
    ".globl guest_image, guest_image_end",
    "guest_image:",
    "    lgdt [rip + gdt_pointer]",
    "    lidt [rip + idt_pointer]",
    "    lea rsi, [rip + hello]",
    "    call print",
    //
    // Step 1. Write the address of every place into that place, over a whole gigabyte from 4 GiB
    // on; then read them all back.
    "    mov rdi, {high_memory}",
    "    mov r8, {high_memory_end}",
    "2:  mov [rdi], rdi",
    "    add rdi, {stride}",
    "    cmp rdi, r8",
    "    jb 2b",
    "    mov rdi, {high_memory}",
    "    mov eax, 1",
    "2:  cmp [rdi], rdi",
    "    jne 9f",
    "    add rdi, {stride}",
    "    cmp rdi, r8",
    "    jb 2b",
    "    lea rsi, [rip + memory_is_good]",
    "    call print",
    //
    // Step 2. Let the device square a number.
    "    mov rbx, {squarer}",
    "    mov dword ptr [rbx], 1111",
    "    mov rdi, [rbx + 8]",
    "    mov eax, 2",
    "    cmp rdi, 1111 * 1111",
    "    jne 9f",
    "    lea rsi, [rip + device_says]",
    "    call print",
    "    call print_hex",
    //
    // Step 3. Store through the window. The first access faults, the handler below maps the page,
    // and the store is executed again; the word must then be found under its other address too.
    "    mov rbx, {window}",
    "    mov rcx, {greeting}",
    "    mov [rbx + 0x123458], rcx",
    "    mov rdx, {behind_window}",
    "    mov eax, 3",
    "    cmp [rdx + 0x123458], rcx",
    "    jne 9f",
    "    lea rsi, [rip + store_was_repeated]",
    "    call print",
    "    xor eax, eax",
    "9:  hlt",
    "    jmp 9b",
    //
    // Page fault: put the 2 MiB page at the same offset of the memory behind the window there.
    "page_fault:",
    "    push rax",
    "    push rcx",
    "    push rdx",
    "    push rsi",
    "    push rdi",
    "    lea rsi, [rip + fault_at]",
    "    call print",
    "    mov rdi, cr2",
    "    call print_hex",
    "    mov rcx, {window}",
    "    sub rdi, rcx",
    "    and rdi, -0x200000",
    "    mov rax, {behind_window}",
    "    lea rax, [rdi + rax + 0x83]", // present, writable, 2 MiB
    "    shr rdi, 21",
    "    mov [rdi * 8 + {window_directory}], rax",
    "    pop rdi",
    "    pop rsi",
    "    pop rdx",
    "    pop rcx",
    "    pop rax",
    "    add rsp, 8", // the error code
    "    iretq",
    //
    // Prints the string at rsi up to its zero. Uses al and dx.
    "print:",
    "    mov edx, {console_port}",
    "2:  lodsb",
    "    test al, al",
    "    jz 3f",
    "    out dx, al",
    "    jmp 2b",
    "3:  ret",
    //
    // Prints rdi as 16 hexadecimal digits and ends the line. Uses rax, rcx, rdx.
    "print_hex:",
    "    mov edx, {console_port}",
    "    mov ecx, 16",
    "2:  rol rdi, 4",
    "    mov eax, edi",
    "    and eax, 15",
    "    cmp al, 10",
    "    jb 3f",
    "    add al, 'a' - 10 - '0'",
    "3:  add al, '0'",
    "    out dx, al",
    "    dec ecx",
    "    jnz 2b",
    "    mov al, 10",
    "    out dx, al",
    "    ret",
    //
    "hello:              .asciz \"Hello from a 64-bit guest.\\n\"",
    "memory_is_good:     .asciz \"The gigabyte from 4 GiB on keeps what I write.\\n\"",
    "device_says:        .asciz \"The device squares 0x457 to 0x\"",
    "fault_at:           .asciz \"Page fault at 0x\"",
    "store_was_repeated: .asciz \"Mapped the page, and the store went to 6 GiB.\\n\"",
    //
    // Selector 0x08: 64-bit code. Selector 0x10: data.
    ".balign 8",
    "gdt: .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff",
    "gdt_end:",
    "gdt_pointer:",
    "    .word gdt_end - gdt - 1",
    "    .quad gdt - guest_image + {load_address}",
    //
    // Vectors 0 to 13 have no handler: such an exception ends in a triple fault, which the VMM
    // reports. Vector 14, the page fault, has an interrupt gate.
    ".balign 8",
    "idt: .fill 14 * 2, 8, 0",
    "    .word (page_fault - guest_image + {load_address}) & 0xffff",
    "    .word 0x08, 0x8e00",
    "    .word (page_fault - guest_image + {load_address}) >> 16",
    "    .quad 0",
    "idt_end:",
    "idt_pointer:",
    "    .word idt_end - idt - 1",
    "    .quad idt - guest_image + {load_address}",
    "guest_image_end:",
    ".popsection",
    load_address = const LOAD_ADDRESS,
    console_port = const CONSOLE_PORT,
    window_directory = const WINDOW_DIRECTORY,
    window = const WINDOW,
    behind_window = const BEHIND_WINDOW,
    squarer = const SQUARER,
    high_memory = const HIGH_MEMORY.0,
    high_memory_end = const HIGH_MEMORY.1,
    stride = const STRIDE,
    greeting = const GREETING,
);

/// The bytes to be put at [`LOAD_ADDRESS`].
pub(crate) fn image() -> &'static [u8] {
    // SAFETY: both are labels of the read-only section above, which has no other symbols.
    unsafe extern "C" {
        safe static guest_image: u8;
        safe static guest_image_end: u8;
    }
    let start = &raw const guest_image;
    let len = (&raw const guest_image_end).addr() - start.addr();
    // SAFETY: the bytes between the labels are the image: initialised, and never written.
    unsafe { std::slice::from_raw_parts(start, len) }
}
