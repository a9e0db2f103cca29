// The host at EL1. The first processor finds the first address of the hypervisor in x0; the second
// begins at second_entry.

.section .text.boot, "ax"
.global _start
_start:
    mov x19, #0
    mov x20, x0
    b 4f
.global second_entry
second_entry:
    mov x19, #1
    mov x20, #0
4:  ldr x1, =__stacks
    add x2, x19, #1
    add x1, x1, x2, lsl #16
    mov sp, x1
    cbnz x19, 2f
    ldr x1, =__bss_start
    ldr x2, =__bss_end
1:  cmp x1, x2
    b.hs 3f
    str xzr, [x1], #8
    b 1b
3:  // Identity: devices below 1 GiB, memory above.
    ldr x1, =level1
    ldr x2, =0x60000000000405
    str x2, [x1]
    ldr x2, =0x40000701
    str x2, [x1, #8]
    dsb sy
2:  ldr x1, =0x00ff
    msr mair_el1, x1
    ldr x1, =0x200803519        // 40 bits, TTBR1 off, 4K, inner shareable, write-back, T0SZ 25
    msr tcr_el1, x1
    ldr x1, =level1
    msr ttbr0_el1, x1
    ldr x1, =host_vectors
    msr vbar_el1, x1
    tlbi vmalle1
    dsb sy
    isb
    ldr x1, =0x30d0181d         // RES1, I, C, M, stack alignment; no other alignment checks
    bic x1, x1, #2
    msr sctlr_el1, x1
    isb
    mov x0, x19
    mov x1, x20
    bl rust_main
    b .

.text
// Reads a word: x0 = the value, x1 = whether it could be read.
.global probe_read
probe_read:
    mov x1, #1
probe_load:
    ldr x0, [x0]
    ret

// Writes a word: x0 = whether it could be written.
.global probe_write
probe_write:
    mov x2, #1
probe_store:
    str x1, [x0]
    mov x0, x2
    ret

// Executes an instruction of SVE, which the hypervisor keeps from the host: x1 = whether it could.
.global probe_forbidden
probe_forbidden:
    mov x1, #1
probe_instruction:
    .inst 0x04bf5020            // rdvl x0, #1
    ret

.macro host_entry target
    .balign 128
    b \target
.endm

.balign 2048
host_vectors:
    .rept 4
    host_entry unexpected
    .endr
    host_entry at_el1
    .rept 11
    host_entry unexpected
    .endr

at_el1:
    stp x9, x10, [sp, #-16]!
    mrs x9, elr_el1
    ldr x10, =probe_load
    cmp x9, x10
    b.eq 1f
    ldr x10, =probe_store
    cmp x9, x10
    b.eq 1f
    ldr x10, =probe_instruction
    cmp x9, x10
    b.ne unexpected
1:  mov x1, #0
    mov x2, #0
    add x9, x9, #4
    msr elr_el1, x9
    mrs x9, esr_el1
    ldr x10, =last_syndrome
    str x9, [x10]
    ldp x9, x10, [sp], #16
    eret

unexpected:
    mrs x0, esr_el1
    mrs x1, elr_el1
    mrs x2, far_el1
    bl rust_unexpected
    b .

.section .bss.tables, "aw", @nobits
.balign 4096
level1: .space 4096
.global last_syndrome
last_syndrome: .space 8
