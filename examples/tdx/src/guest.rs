//! The guest: machine code that fills the 64 KiB below 4 GiB, where a TDX guest begins.
//!
//! It starts as the TDX module starts every guest, in 32-bit protected mode 16 bytes below 4 GiB,
//! builds page tables in the memory at [`LOW`], and goes on in 64-bit mode. Linear addresses are
//! guest-physical ones; 512 GiB higher the same addresses appear with the shared bit. Whatever it
//! wants from outside it asks for by `TDCALL`, since nobody outside can read its instructions or
//! registers. It tells the VMM through [`STEP_PORT`] which step is done.
//!
//! 1. Accepts all memory at [`RAM`], page by page, finds zeros and writes [`SECRET`] everywhere.
//! 2. Asks for [`BUFFER`] to be shared, and writes [`GREETING`] into each of its pages there.
//! 3. Reads the device at [`DEVICE`] and writes one more back, with ordinary `mov` instructions. They
//!    raise #VE, whose handler turns them into calls.
//! 4. Asks for the buffer to be private again, accepts it, finds zeros, and writes the secret; the
//!    secret is in all other memory still.
//! 5. Asks the TDX module for its own measurement and hands it out through [`MRTD_PORT`].
//!
//! If something is not as it should be the guest reports a fatal error with the number of the step.

// UNSAFETY: machine code in a section of its own, which this program copies but never runs, and the
// labels at its two ends.
#![expect(unsafe_code)]

use std::arch::global_asm;

/// Guest-physical address at which the VMM puts the image; it ends at 4 GiB.
pub(crate) const LOAD_ADDRESS: u64 = 0xffff_0000;
/// Memory that is there from the start, zeroed: page tables, interrupt descriptors, the stack.
pub(crate) const LOW: u64 = 0;
/// Bytes of it.
pub(crate) const LOW_SIZE: u64 = 128 << 10;
/// Memory that the guest has to accept.
pub(crate) const RAM: u64 = 16 << 20;
/// Bytes of it.
pub(crate) const RAM_SIZE: u64 = 8 << 20;
/// The part of it that the guest shares for a while.
pub(crate) const BUFFER: u64 = RAM + (2 << 20);
/// Bytes of that part: two pieces of 2 MiB, which is what KVM converts at a time, and a half.
pub(crate) const BUFFER_SIZE: u64 = 5 << 20;
/// A device of the VMM's: four bytes to read, and four to write behind them.
pub(crate) const DEVICE: u64 = 0xd000_0000;
/// The guest writes the number of the step that is done here.
pub(crate) const STEP_PORT: u16 = 0x80;
/// In place of a number: all are done.
pub(crate) const DONE: u8 = 0xff;
/// The guest's measurement, four bytes at a time.
pub(crate) const MRTD_PORT: u16 = 0x81;
/// What the VMM may see.
pub(crate) const GREETING: u64 = u64::from_le_bytes(*b"to all !");
/// What it may not.
pub(crate) const SECRET: u64 = u64::from_le_bytes(*b"secret!!");

/// The shared bit of guest-physical addresses.
const SHARED: u64 = 1 << 47;
/// Where linear addresses with it begin.
const ALIAS: u64 = 512 << 30;

/// The pages at [`LOW`]: a root table, and for each half a table and four directories of 2 MiB pages.
const PML4: u64 = LOW + 0x1000;
const PDPT: u64 = LOW + 0x2000;
const DIRECTORIES: u64 = LOW + 0x3000;
const ALIAS_PDPT: u64 = LOW + 0x7000;
const ALIAS_DIRECTORIES: u64 = LOW + 0x8000;
const IDT: u64 = LOW + 0xc000;
const STACK: u64 = LOW + LOW_SIZE;
/// Entries of four directories.
const LARGE_PAGES: u64 = 4 * 512;

/// Functions of the TDX module.
const TDG_VP_VEINFO_GET: u64 = 3;
const TDG_MEM_PAGE_ACCEPT: u64 = 6;
const TDG_VM_RD: u64 = 7;
/// The field that holds the measurement, in six words.
const MRTD: u64 = 0x1310_0003_0000_0000;
/// Subfunctions of TDG.VP.VMCALL.
const IO: u64 = 30;
const EPT_VIOLATION: u64 = 48;
const MAP_GPA: u64 = 0x1_0001;
const FATAL_ERROR: u64 = 0x1_0003;
/// Its registers that KVM may see: R10 to R15.
const EXPOSED: u64 = 0xfc00;

global_asm!(
    ".pushsection .rodata.tdx_guest, \"a\"",
    ".balign 16",
    ".globl tdx_guest, tdx_guest_end",
    "tdx_guest:",
    ".code32",
    //
    // Page tables: 4 GiB for each half.
    "start:",
    "    mov esp, {stack}",
    "    mov dword ptr [{pml4}], {pdpt} + 3",
    "    mov dword ptr [{pml4} + 8], {alias_pdpt} + 3",
    "    xor ecx, ecx",
    "2:  mov eax, ecx",
    "    shl eax, 12",
    "    add eax, {directories} + 3",
    "    mov [ecx * 8 + {pdpt}], eax",
    "    add eax, {alias_directories} - {directories}",
    "    mov [ecx * 8 + {alias_pdpt}], eax",
    "    inc ecx",
    "    cmp ecx, 4",
    "    jb 2b",
    "    xor ecx, ecx",
    "2:  mov eax, ecx",
    "    shl eax, 21",
    "    or eax, 0x83", // present, writable, large
    "    mov [ecx * 8 + {directories}], eax",
    "    mov [ecx * 8 + {alias_directories}], eax",
    "    mov dword ptr [ecx * 8 + {alias_directories} + 4], {shared_high}",
    "    inc ecx",
    "    cmp ecx, {large_pages}",
    "    jb 2b",
    //
    // 64-bit mode: EFER.LME is set from the start.
    "    mov eax, cr4",
    "    or eax, 0x20",
    "    mov cr4, eax",
    "    mov eax, {pml4}",
    "    mov cr3, eax",
    "    mov eax, cr0",
    "    or eax, 0x80000000",
    "    mov cr0, eax",
    ".set gdt_pointer_at, gdt_pointer - tdx_guest + {load}",
    ".set start64_at, start64 - tdx_guest + {load}",
    "    lgdt [gdt_pointer_at]",
    "    .byte 0xea", // a far jump
    "    .long start64_at",
    "    .word 8",
    ".balign 8",
    "gdt:",
    "    .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff",
    "gdt_pointer:",
    "    .word 23",
    "    .long gdt - tdx_guest + {load}",
    //
    ".code64",
    "start64:",
    "    mov eax, 16",
    "    mov ds, eax",
    "    mov es, eax",
    "    mov ss, eax",
    // The gate of vector 20, #VE.
    "    lea rax, [rip + exception]",
    "    mov edi, {idt} + 20 * 16",
    "    mov word ptr [rdi], ax",
    "    mov dword ptr [rdi + 2], 0x8e000008",
    "    shr rax, 16",
    "    mov word ptr [rdi + 6], ax",
    "    shr rax, 16",
    "    mov dword ptr [rdi + 8], eax",
    "    lidt [rip + idt_pointer]",
    //
    // 1. Memory is accepted, empty, and the guest's own.
    "    mov ebp, 1",
    "    mov ebx, {ram}",
    "    mov esi, {ram_end}",
    "    call take",
    "    call done",
    //
    // 2. A part of it is shared.
    "    mov ebp, 2",
    "    mov r12, {shared} + {buffer}",
    "    call convert",
    "    mov rdi, {alias} + {buffer}",
    "    mov ecx, {buffer_pages}",
    "    mov rax, {greeting}",
    "2:  mov [rdi], rax",
    "    add rdi, 4096",
    "    loop 2b",
    "    call done",
    //
    // 3. The device.
    "    mov ebp, 3",
    "    mov rbx, {alias} + {device}",
    "    mov eax, [rbx]",
    "    inc eax",
    "    add rbx, 4",
    "    mov [rbx], eax",
    "    call done",
    //
    // 4. All of it is private again.
    "    mov ebp, 4",
    "    mov r12, {buffer}",
    "    call convert",
    "    mov ebx, {buffer}",
    "    mov esi, {buffer_end}",
    "    call take",
    "    mov edi, {ram}",
    "    mov ecx, {ram_size} / 8",
    "    mov rax, {secret}",
    "    repe scasq",
    "    jne fail",
    "    call done",
    //
    // 5. Who am I?
    "    mov ebp, 5",
    "    mov rbx, {mrtd}",
    "2:  mov eax, {vm_rd}",
    "    xor ecx, ecx",
    "    mov rdx, rbx",
    "    call tdcall",
    "    test rax, rax",
    "    jnz fail",
    "    mov rsi, r8",
    "    mov r15d, esi",
    "    mov r12d, 4",
    "    mov r14d, {mrtd_port}",
    "    call write",
    "    shr rsi, 32",
    "    mov r15d, esi",
    "    call write",
    "    inc rbx",
    "    cmp bl, 6",
    "    jb 2b",
    "    call done",
    "    mov ebp, {done}",
    "    call done",
    //
    // Something is not as it should be in step ebp.
    "fail:",
    "    mov r11d, {fatal_error}",
    "    mov r12d, ebp",
    "    call vmcall",
    "    jmp fail",
    //
    // Accepts memory from rbx to rsi, makes sure that it is empty, and fills it with the secret.
    "take:",
    "    mov r13, rbx",
    "2:  mov eax, {accept}",
    "    mov rcx, rbx", // 4 KiB
    "    call tdcall",
    // What the host holds at this moment is asked for again.
    "    mov rdx, rax",
    "    shr rdx, 32",
    "    cmp edx, 0x80000200", // OPERAND_BUSY
    "    je 2b",
    "    cmp edx, 0x80000204", // OPERAND_BUSY_HOST_PRIORITY
    "    je 2b",
    "    test rax, rax",
    "    jnz fail",
    "    mov rdi, rbx",
    "    mov ecx, 512",
    "    repe scasq",
    "    jne fail",
    "    add rbx, 4096",
    "    cmp rbx, rsi",
    "    jb 2b",
    "    mov rdi, r13",
    "    mov rcx, rsi",
    "    sub rcx, rdi",
    "    shr rcx, 3",
    "    mov rax, {secret}",
    "    rep stosq",
    "    ret",
    //
    // Asks for the buffer at r12 to become what its shared bit says, as often as it takes.
    "convert:",
    "    mov r13d, {buffer_size}",
    "    lea rbx, [r12 + r13]",
    "2:  mov r11d, {map_gpa}",
    "    mov r13, rbx",
    "    sub r13, r12",
    "    call vmcall",
    "    mov r12, r11",
    "    cmp r10, 1", // not all is done
    "    je 2b",
    "    test r10, r10",
    "    jnz fail",
    "    ret",
    //
    // Step ebp is done.
    "done:",
    "    mov r15d, ebp",
    "    mov r12d, 1",
    "    mov r14d, {step_port}",
    // r12 bytes of r15 to port r14.
    "write:",
    "    mov r11d, {io}",
    "    mov r13d, 1",
    "    call vmcall",
    "    test r10, r10",
    "    jnz fail",
    "    ret",
    //
    // TDG.VP.VMCALL of subfunction r11.
    "vmcall:",
    "    xor eax, eax",
    "    mov ecx, {exposed}",
    "    xor r10d, r10d",
    "tdcall:",
    "    .byte 0x66, 0x0f, 0x01, 0xcc",
    "    ret",
    //
    // #VE: an access to the device, by `mov eax, [rbx]` or `mov [rbx], eax`.
    "exception:",
    "    push rcx",
    "    push rdx",
    "    push r8",
    "    push r9",
    "    push r10",
    "    push r11",
    "    push r12",
    "    push r13",
    "    push r14",
    "    push r15",
    "    mov r15d, eax",
    "    mov eax, {veinfo_get}",
    "    call tdcall",
    "    test rax, rax",
    "    jnz fail",
    "    cmp ecx, {ept_violation}",
    "    jne fail",
    "    mov rcx, [rsp + 80]",
    "    movzx ecx, word ptr [rcx]",
    "    xor r13d, r13d",
    "    cmp ecx, 0x038b",
    "    je 2f",
    "    inc r13d",
    "    cmp ecx, 0x0389",
    "    jne fail",
    "2:  mov r11d, {ept_violation}",
    "    mov r12d, 4",
    "    mov r14, r9",
    "    call vmcall",
    "    test r10, r10",
    "    jnz fail",
    "    mov eax, r15d",
    "    test r13d, r13d",
    "    jnz 2f",
    "    mov eax, r11d",
    "2:  add qword ptr [rsp + 80], 2",
    "    pop r15",
    "    pop r14",
    "    pop r13",
    "    pop r12",
    "    pop r11",
    "    pop r10",
    "    pop r9",
    "    pop r8",
    "    pop rdx",
    "    pop rcx",
    "    iretq",
    //
    ".balign 8",
    "idt_pointer:",
    "    .word 21 * 16 - 1",
    "    .quad {idt}",
    //
    // Where a processor begins.
    "    .org tdx_guest + 0xfff0",
    ".code32",
    "    jmp start",
    "    .org tdx_guest + 0x10000",
    "tdx_guest_end:",
    ".code64",
    ".popsection",
    load = const LOAD_ADDRESS,
    stack = const STACK,
    pml4 = const PML4,
    pdpt = const PDPT,
    directories = const DIRECTORIES,
    alias_pdpt = const ALIAS_PDPT,
    alias_directories = const ALIAS_DIRECTORIES,
    large_pages = const LARGE_PAGES,
    shared_high = const SHARED >> 32,
    idt = const IDT,
    ram = const RAM,
    ram_size = const RAM_SIZE,
    ram_end = const RAM + RAM_SIZE,
    shared = const SHARED,
    alias = const ALIAS,
    buffer = const BUFFER,
    buffer_size = const BUFFER_SIZE,
    buffer_end = const BUFFER + BUFFER_SIZE,
    buffer_pages = const BUFFER_SIZE / 4096,
    device = const DEVICE,
    greeting = const GREETING,
    secret = const SECRET,
    step_port = const STEP_PORT,
    mrtd_port = const MRTD_PORT,
    done = const DONE,
    mrtd = const MRTD,
    veinfo_get = const TDG_VP_VEINFO_GET,
    accept = const TDG_MEM_PAGE_ACCEPT,
    vm_rd = const TDG_VM_RD,
    io = const IO,
    ept_violation = const EPT_VIOLATION,
    map_gpa = const MAP_GPA,
    fatal_error = const FATAL_ERROR,
    exposed = const EXPOSED,
);

unsafe extern "C" {
    static tdx_guest: u8;
    static tdx_guest_end: u8;
}

/// The image.
pub(crate) fn image() -> &'static [u8] {
    // SAFETY: the two labels are the ends of one piece of read-only data.
    unsafe {
        let start = &raw const tdx_guest;
        let end = &raw const tdx_guest_end;
        std::slice::from_raw_parts(start, end.addr() - start.addr())
    }
}
