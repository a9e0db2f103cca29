//! The guest: a loop that uses everything that a vCPU has, and whose results depend on all of it.

/// Guest-physical memory is 2 MiB from 0, mapped one to one.
pub(crate) const MEMORY: usize = 2 << 20;
const TABLES: usize = 0x1000;
const IDT: u64 = 0x4000;
const GDT: u64 = 0x5000;
const STACK: u64 = 0x1_0000;
const CODE: u64 = 0x2_0000;
/// What the guest computes is in these bytes, and in registers.
pub(crate) const DATA: usize = 0x3_0000;
pub(crate) const DATA_BYTES: usize = 0x1000;

/// Ports of the guest.
pub(crate) mod port {
    pub(crate) const OUT: u16 = 0x10;
    pub(crate) const IN: u16 = 0x11;
    pub(crate) const END: u16 = 0x12;
}

/// What the guest uses, in R14: YMM registers.
pub(crate) const WITH_AVX: u64 = 1;
/// Single steps and breakpoints of its own.
pub(crate) const WITH_DEBUG: u64 = 2;

core::arch::global_asm!(
    ".pushsection .rodata.snapshot_guest, \"a\", @progbits",
    ".balign 16",
    "2: fninit",
    "fld1",
    "mov eax, 3",
    "cvtsi2sd xmm2, eax",
    "sti",
    // A random number.
    "20: mov rax, r15",
    "shl rax, 13",
    "xor r15, rax",
    "mov rax, r15",
    "shr rax, 7",
    "xor r15, rax",
    "mov rax, r15",
    "shl rax, 17",
    "xor r15, rax",
    // Integers and flags.
    "add r8, r15",
    "adc r9, r8",
    "rcl r10, 5",
    "mov rax, r15",
    "mul r9",
    "xor r10, rdx",
    "bsf r11, r15",
    "lock cmpxchg [rbp], r10",
    // Strings, both ways.
    "lea rsi, [rbp + 0x100]",
    "lea rdi, [rbp + 0x180]",
    "mov ecx, r15d",
    "and ecx, 0x3f",
    "mov [rsi], r15",
    "rep movsb",
    "std",
    "lea rdi, [rbp + 0x2f8]",
    "mov ecx, r15d",
    "and ecx, 0xf",
    "mov eax, r10d",
    "rep stosw",
    "cld",
    // x87 with some rounding: sqrt(previous + a number).
    "mov ecx, r15d",
    "and ecx, 0xc00",
    "or ecx, 0x37f",
    "mov [rbp + 0x40], cx",
    "fldcw [rbp + 0x40]",
    "fild word ptr [rbp]",
    "fabs",
    "faddp st(1), st",
    "fsqrt",
    // SSE with some rounding.
    "mov ecx, r15d",
    "and ecx, 0x6000",
    "or ecx, 0x1f80",
    "mov [rbp + 0x44], ecx",
    "ldmxcsr [rbp + 0x44]",
    "cvtsi2sd xmm1, r15d",
    "addsd xmm0, xmm1",
    "divsd xmm0, xmm2",
    "pshufd xmm3, xmm0, 0x1b",
    "paddq xmm4, xmm3",
    "test r14b, 1",
    "jz 21f",
    "vmovq xmm5, r15",
    "vinsertf128 ymm6, ymm6, xmm5, 1",
    "vxorps ymm7, ymm7, ymm6",
    "21:",
    // MMX, with the x87 registers put away.
    "fnsave [rbp + 0x400]",
    "movq mm0, [rbp]",
    "movd mm1, r15d",
    "paddb mm0, mm1",
    "pmaddwd mm1, mm0",
    "movq [rbp + 0x50], mm1",
    "frstor [rbp + 0x400]",
    // Debug registers, and those that MSRs hold.
    "mov dr0, r15",
    "mov rax, dr0",
    "add r8, rax",
    "mov dr3, r9",
    "mov ecx, 0xc0000102",
    "mov rax, r15",
    "shr rax, 18",
    "mov rdx, rax",
    "shr rdx, 32",
    "wrmsr",
    "swapgs",
    "mov ecx, 0xc0000101",
    "rdmsr",
    "add r8, rax",
    "wrfsbase rax",
    // Exceptions, and an interrupt that waits.
    "ud2",
    "int 0x80",
    "mov ecx, 0x40000000",
    "mov rax, [rcx]",
    "cli",
    "mov ecx, 0x83f",
    "mov eax, 0x40",
    "xor edx, edx",
    "wrmsr",
    "imul r8, r8, 37",
    "sti",
    "nop",
    "add r9, 1",
    "test r14b, 2",
    "jz 22f",
    // Single steps, then a breakpoint.
    "pushfq",
    "or dword ptr [rsp], 0x100",
    "popfq",
    "nop",
    "lea r8, [r8 + r8 * 2]",
    "pushfq",
    "and dword ptr [rsp], ~0x100",
    "popfq",
    "lea rax, [rip + 23f]",
    "mov dr1, rax",
    "mov eax, 0x404",
    "mov dr7, rax",
    "23: inc r9",
    "mov eax, 0x400",
    "mov dr7, rax",
    "22:",
    // The program's turn.
    "mov eax, r10d",
    "out 0x10, eax",
    "in al, 0x11",
    "movzx eax, al",
    "add r8, rax",
    "dec rbx",
    "jnz 20b",
    "fxsave [rbp + 0x800]",
    "out 0x12, al",
    "hlt",
    // Handlers: of #UD, of the software interrupt, of the interrupt, #PF and #DB.
    "30: inc qword ptr [rbp + 8]",
    "add qword ptr [rsp], 2",
    "iretq",
    "31: inc qword ptr [rbp + 0x10]",
    "iretq",
    "32: push rax",
    "push rcx",
    "push rdx",
    "inc qword ptr [rbp + 0x18]",
    "xor eax, eax",
    "xor edx, edx",
    "mov ecx, 0x80b",
    "wrmsr",
    "pop rdx",
    "pop rcx",
    "pop rax",
    "iretq",
    "33: push rax",
    "mov rax, cr2",
    "add [rbp + 0x20], rax",
    "add qword ptr [rsp + 16], 3",
    "pop rax",
    "add rsp, 8",
    "iretq",
    "34: push rax",
    "mov rax, dr6",
    "add [rbp + 0x28], rax",
    "mov eax, 0xffff0ff0",
    "mov dr6, rax",
    "or dword ptr [rsp + 24], 0x10000",
    "pop rax",
    "iretq",
    "35:",
    ".global twofold_snapshot_guest",
    "twofold_snapshot_guest:",
    // Where the code begins, its bytes, and its handlers.
    ".quad 2b - twofold_snapshot_guest, 35b - 2b, 30b - 2b, 31b - 2b, 32b - 2b, 33b - 2b, 34b - 2b",
    ".popsection",
);

unsafe extern "C" {
    #[link_name = "twofold_snapshot_guest"]
    static GUEST: [u64; 7];
}

/// Puts tables, descriptors and code into memory.
pub(crate) fn load(put: &dyn Fn(usize, &[u8])) {
    let word = |at: usize, value: u64| put(at, &value.to_le_bytes());
    word(TABLES, 0x2000 | 7);
    word(0x2000, 0x3000 | 7);
    // One page of 2 MiB.
    word(0x3000, 0x87);
    word(GDT as usize + 8, 0x00af_9b00_0000_ffff);
    word(GDT as usize + 0x10, 0x00cf_9300_0000_ffff);
    // SAFETY: constants; the code lies before them, as many bytes as they say.
    let (code, handlers) = unsafe {
        let [back, length, handlers @ ..] = GUEST;
        let first = (&raw const GUEST).cast::<u8>().offset(back as isize);
        (std::slice::from_raw_parts(first, length as usize), handlers)
    };
    put(CODE as usize, code);
    for (vector, offset) in [6, 0x80, 0x40, 14, 1].into_iter().zip(handlers) {
        let handler = CODE + offset;
        let low = handler & 0xffff | 8 << 16 | 0x8e00 << 32 | (handler >> 16) << 48;
        word(IDT as usize + 16 * vector, low);
    }
}

/// The registers to start with.
pub(crate) fn start(regs: &mut kvm_bindings::kvm_regs, rounds: u64, with: u64) {
    regs.rip = CODE;
    regs.rsp = STACK;
    regs.rbp = DATA as u64;
    regs.rbx = rounds;
    regs.r14 = with;
    regs.r15 = 0x9e37_79b9_7f4a_7c15;
    regs.rflags = 2;
}

/// 64-bit mode at CPL 0.
pub(crate) fn enter_long_mode(sregs: &mut kvm_bindings::kvm_sregs) {
    let data = kvm_bindings::kvm_segment {
        selector: 0x10,
        limit: u32::MAX,
        type_: 3,
        s: 1,
        present: 1,
        db: 1,
        g: 1,
        ..Default::default()
    };
    (sregs.ds, sregs.es, sregs.fs) = (data, data, data);
    (sregs.gs, sregs.ss) = (data, data);
    sregs.cs = kvm_bindings::kvm_segment {
        selector: 8,
        type_: 11,
        l: 1,
        db: 0,
        ..data
    };
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, 0x17);
    (sregs.idt.base, sregs.idt.limit) = (IDT, 0xfff);
    sregs.cr0 = 0x8005_0033;
    sregs.cr3 = TABLES as u64;
    // PAE, OSFXSR, OSXMMEXCPT, FSGSBASE, OSXSAVE.
    sregs.cr4 = 0x5_0620;
    sregs.efer = 0x500;
    // Enabled, x2APIC, bootstrap processor.
    sregs.apic_base = 0xfee0_0d00;
}
