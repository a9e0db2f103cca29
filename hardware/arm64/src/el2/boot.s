// Where both processors begin, the vectors, and the way into a lower exception level and back.

.section .text.boot, "ax"
.global _start
_start:
    // The machine starts its first processor here, at EL2 with translation off.
    mrs x1, CurrentEL
    cmp x1, #(2 << 2)
    b.ne .
    ldr x0, =__bss_start
    ldr x1, =__bss_end
1:  cmp x0, x1
    b.hs 2f
    str xzr, [x0], #8
    b 1b
2:  mov x19, #0
    bl build_identity
    b common

// The second processor, with its number in x0.
.global second_start
second_start:
    mov x19, x0
common:
    mov x0, #0x33ff             // CPTR_EL2: RES1; vector registers are not trapped
    msr cptr_el2, x0
    // A stack of 64 KiB for each processor.
    ldr x0, =__stacks
    add x1, x19, #1
    add x0, x0, x1, lsl #16
    mov sp, x0
    msr tpidr_el2, x19
    ldr x1, =0x00ff             // attribute 0: normal write-back; 1: device
    msr mair_el2, x1
    ldr x1, =0x80823519         // RES1, 40 bits, 4K, inner shareable, write-back, T0SZ 25
    msr tcr_el2, x1
    ldr x0, =el2_level1
    msr ttbr0_el2, x0
    dsb sy
    tlbi alle2
    dsb sy
    isb
    ldr x0, =0x30c5183d         // RES1, I, C, M; no alignment checks
    bic x0, x0, #2
    msr sctlr_el2, x0
    isb
    ldr x0, =vectors
    msr vbar_el2, x0
    isb
    mov x0, x19
    bl rust_main
    b .

// Identity: the first GiB is devices; memory's 512 MiB are pages, so that single ones can be taken
// out. Only the hypervisor's own and the pages that the Rust side asks for are valid.
build_identity:
    ldr x0, =el2_level1
    ldr x1, =0x60000000000405   // device, XN, AF, block
    str x1, [x0]
    ldr x1, =el2_level2
    orr x2, x1, #3
    str x2, [x0, #8]
    // After memory, 2 MiB for devices that the host asks to be mapped.
    ldr x3, =el2_private2
    orr x2, x3, #3
    str x2, [x0, #16]
    ldr x2, =el2_private3
    orr x2, x2, #3
    str x2, [x3]
    ldr x2, =el2_level3
    mov x3, #256
1:  orr x4, x2, #3
    str x4, [x1], #8
    add x2, x2, #4096
    subs x3, x3, #1
    b.ne 1b
    // The hypervisor's own pages.
    ldr x0, =el2_level3
    ldr x1, =__own_start
    ldr x2, =__own_end
    mov x3, #0x40000000
2:  sub x4, x1, x3
    lsr x4, x4, #12
    ldr x5, =0x703              // normal, inner shareable, AF, page
    orr x5, x5, x1
    str x5, [x0, x4, lsl #3]
    add x1, x1, #4096
    cmp x1, x2
    b.lo 2b
    ret

.macro entry target
    .balign 128
    b \target
.endm

.text
.balign 2048
.global vectors
vectors:
    // From EL2 itself: never.
    .rept 8
    entry own_exception
    .endr
    // From a lower level in 64-bit state: synchronous, IRQ, FIQ, SError.
    entry left
    entry left_by_interrupt
    entry left_by_interrupt
    entry left_by_interrupt
    .rept 4
    entry own_exception
    .endr

// The same ways in, but first what the lower level left in the branch history is overwritten, so that
// it cannot steer what EL2 speculates on.
.balign 2048
.global hardened_vectors
hardened_vectors:
    .rept 8
    entry own_exception
    .endr
    entry hardened_left
    entry hardened_left_by_interrupt
    entry hardened_left_by_interrupt
    entry hardened_left_by_interrupt
    .rept 4
    entry own_exception
    .endr

.macro overwrite_history
    stp x0, x1, [sp, #-16]!
    mov x0, #32
1:  b 2f
2:  subs x0, x0, #1
    b.ne 1b
    dsb nsh
    isb
    ldp x0, x1, [sp], #16
.endm

hardened_left:
    overwrite_history
    b left
hardened_left_by_interrupt:
    overwrite_history
    b left_by_interrupt

own_exception:
    mrs x0, esr_el2
    mrs x1, elr_el2
    mrs x2, far_el2
    bl rust_own_exception
    b .

// Offsets in Registers.
.equ VECTOR, 0
.equ X, 512
.equ PC, X + 31 * 8
.equ PSTATE, PC + 8
.equ FPCR, PSTATE + 8
.equ FPSR, FPCR + 8

// u64 enter_lower(Registers *): runs what the registers say until it leaves, returns 0 for an
// exception and 1 for an interrupt. The pointer waits on the stack meanwhile.
.global enter_lower
enter_lower:
    stp x29, x30, [sp, #-16]!
    stp x27, x28, [sp, #-16]!
    stp x25, x26, [sp, #-16]!
    stp x23, x24, [sp, #-16]!
    stp x21, x22, [sp, #-16]!
    stp x19, x20, [sp, #-16]!
    stp d14, d15, [sp, #-16]!
    stp d12, d13, [sp, #-16]!
    stp d10, d11, [sp, #-16]!
    stp d8, d9, [sp, #-16]!
    stp x0, x0, [sp, #-16]!
    ldr x1, [x0, #PC]
    ldr x2, [x0, #PSTATE]
    msr elr_el2, x1
    msr spsr_el2, x2
    ldr x1, [x0, #FPCR]
    ldr x2, [x0, #FPSR]
    msr fpcr, x1
    msr fpsr, x2
    ldp q0, q1, [x0, #VECTOR + 0]
    ldp q2, q3, [x0, #VECTOR + 32]
    ldp q4, q5, [x0, #VECTOR + 64]
    ldp q6, q7, [x0, #VECTOR + 96]
    ldp q8, q9, [x0, #VECTOR + 128]
    ldp q10, q11, [x0, #VECTOR + 160]
    ldp q12, q13, [x0, #VECTOR + 192]
    ldp q14, q15, [x0, #VECTOR + 224]
    ldp q16, q17, [x0, #VECTOR + 256]
    ldp q18, q19, [x0, #VECTOR + 288]
    ldp q20, q21, [x0, #VECTOR + 320]
    ldp q22, q23, [x0, #VECTOR + 352]
    ldp q24, q25, [x0, #VECTOR + 384]
    ldp q26, q27, [x0, #VECTOR + 416]
    ldp q28, q29, [x0, #VECTOR + 448]
    ldp q30, q31, [x0, #VECTOR + 480]
    add x30, x0, #X
    ldp x0, x1, [x30]
    ldp x2, x3, [x30, #16]
    ldp x4, x5, [x30, #32]
    ldp x6, x7, [x30, #48]
    ldp x8, x9, [x30, #64]
    ldp x10, x11, [x30, #80]
    ldp x12, x13, [x30, #96]
    ldp x14, x15, [x30, #112]
    ldp x16, x17, [x30, #128]
    ldp x18, x19, [x30, #144]
    ldp x20, x21, [x30, #160]
    ldp x22, x23, [x30, #176]
    ldp x24, x25, [x30, #192]
    ldp x26, x27, [x30, #208]
    ldp x28, x29, [x30, #224]
    ldr x30, [x30, #240]
    eret

left_by_interrupt:
    stp x0, x30, [sp, #-16]!
    mov x30, #1
    b save
left:
    stp x0, x30, [sp, #-16]!
    mov x30, #0
save:
    // On the stack: x0 and x30 of the lower level, then the pointer.
    ldr x0, [sp, #16]
    add x0, x0, #X
    stp x2, x3, [x0, #16]
    stp x4, x5, [x0, #32]
    stp x6, x7, [x0, #48]
    stp x8, x9, [x0, #64]
    stp x10, x11, [x0, #80]
    stp x12, x13, [x0, #96]
    stp x14, x15, [x0, #112]
    stp x16, x17, [x0, #128]
    stp x18, x19, [x0, #144]
    stp x20, x21, [x0, #160]
    stp x22, x23, [x0, #176]
    stp x24, x25, [x0, #192]
    stp x26, x27, [x0, #208]
    stp x28, x29, [x0, #224]
    ldp x2, x3, [sp], #16
    stp x2, x1, [x0]
    str x3, [x0, #240]
    sub x0, x0, #X
    mrs x1, elr_el2
    mrs x2, spsr_el2
    str x1, [x0, #PC]
    str x2, [x0, #PSTATE]
    mrs x1, fpcr
    mrs x2, fpsr
    str x1, [x0, #FPCR]
    str x2, [x0, #FPSR]
    stp q0, q1, [x0, #VECTOR + 0]
    stp q2, q3, [x0, #VECTOR + 32]
    stp q4, q5, [x0, #VECTOR + 64]
    stp q6, q7, [x0, #VECTOR + 96]
    stp q8, q9, [x0, #VECTOR + 128]
    stp q10, q11, [x0, #VECTOR + 160]
    stp q12, q13, [x0, #VECTOR + 192]
    stp q14, q15, [x0, #VECTOR + 224]
    stp q16, q17, [x0, #VECTOR + 256]
    stp q18, q19, [x0, #VECTOR + 288]
    stp q20, q21, [x0, #VECTOR + 320]
    stp q22, q23, [x0, #VECTOR + 352]
    stp q24, q25, [x0, #VECTOR + 384]
    stp q26, q27, [x0, #VECTOR + 416]
    stp q28, q29, [x0, #VECTOR + 448]
    stp q30, q31, [x0, #VECTOR + 480]
    add sp, sp, #16
    ldp d8, d9, [sp], #16
    ldp d10, d11, [sp], #16
    ldp d12, d13, [sp], #16
    ldp d14, d15, [sp], #16
    ldp x19, x20, [sp], #16
    ldp x21, x22, [sp], #16
    ldp x23, x24, [sp], #16
    ldp x25, x26, [sp], #16
    ldp x27, x28, [sp], #16
    mov x0, x30
    ldp x29, x30, [sp], #16
    ret

.section .bss.tables, "aw", @nobits
.balign 4096
.global el2_level1
el2_level1: .space 4096
el2_level2: .space 4096
el2_private2: .space 4096
.global el2_private3
el2_private3: .space 4096
.global el2_level3
el2_level3: .space 256 * 4096
