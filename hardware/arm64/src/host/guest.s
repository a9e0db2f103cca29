// What the guests run, at EL1 with translation off, copied to address 0x80000 of each. Each stands for
// itself: no literal pools, which the assembler would share.

.macro call function
    mov x0, #(\function & 0xffff)
    movk x0, #(\function >> 16), lsl #16
    hvc #0
.endm

.section .rodata.guests, "a"

// A protected guest. Its secret is at 0x90000, what it shows the host at 0xa0000.
.balign 8
.global protected_guest
protected_guest:
    call 0x86000000             // FEATURES
    mov x20, x0
    movz x9, #0x9, lsl #16
    movz x10, #0xc2e7
    movk x10, #0xe75e, lsl #16
    movk x10, #0x5ec2, lsl #32
    str x10, [x9]               // nothing is there yet: the host gives a page
    movz x11, #0xa, lsl #16
    mov x1, x11
    mov x2, #0
    mov x3, #0
    call 0xc6000003             // MEM_SHARE of a page that is not there yet either
    mov x21, x0
    movz x10, #0x6548
    movk x10, #0x6c6c, lsl #16
    movk x10, #0x6f, lsl #32      // "Hello"
    str x10, [x11]
    mov x1, x20
    mov x2, x21
    call 0x10000001             // the host's turn
    mov x22, x0                 // its answer
    movz x1, #0xa, lsl #16
    mov x2, #0
    mov x3, #0
    call 0xc6000004             // MEM_UNSHARE
    mov x1, x0
    movz x9, #0x9, lsl #16
    ldr x10, [x9]
    movz x11, #0xc2e7
    movk x11, #0xe75e, lsl #16
    movk x11, #0x5ec2, lsl #32
    cmp x10, x11
    cset x2, eq                 // is the secret still there?
    mov x3, x22
    call 0x10000002
    movz x9, #0x9, lsl #16
    ldr x10, [x9]               // the host has taken the page by force
    mov x1, x10
    call 0x10000003             // never reached
    b .
.global protected_guest_end
protected_guest_end:

// An ordinary guest: two addresses that are one page, and one that it may only read.
.balign 8
.global ordinary_guest
ordinary_guest:
    movz x9, #0x9, lsl #16
    movz x10, #0xb, lsl #16
    mov x11, #0x77
    str x11, [x9]
    ldr x1, [x10]               // the same page
    call 0x10000001
    movz x9, #0xc, lsl #16
    str x11, [x9]               // read-only until the host relents
    ldr x1, [x9]
    call 0x10000002
    b .
.global ordinary_guest_end
ordinary_guest_end:

// A protected guest that reads its secret at 0x90000 for ever and counts that at 0xa0000, which it
// shows the host.
.balign 8
.global spinning_guest
spinning_guest:
    movz x9, #0x9, lsl #16
    movz x11, #0xa, lsl #16
    mov x1, x11
    mov x2, #0
    mov x3, #0
    call 0xc6000003
1:  ldr x10, [x9]
    ldr x12, [x11]
    add x12, x12, #1
    str x12, [x11]
    b 1b
.global spinning_guest_end
spinning_guest_end:

// A protected guest that its timer interrupts, once while it spins and once while it waits. Its vectors
// stand 2 KiB after its beginning. x19 counts interrupts, x20 has the last one's number.
.balign 4096
.global timer_guest
timer_guest:
    adr x0, timer_guest + 2048
    msr vbar_el1, x0
    mov x0, #0xff
    msr icc_pmr_el1, x0
    mov x0, #1
    msr icc_igrpen1_el1, x0
    isb
    mov x19, #0
    mov x0, #1000
    msr cntv_tval_el0, x0
    mov x0, #1
    msr cntv_ctl_el0, x0
    msr daifclr, #2
1:  cbz x19, 1b
    msr daifset, #2
    mov x1, x19
    mov x2, x20
    call 0x10000001
    movz x0, #0x10, lsl #16     // some milliseconds
    msr cntv_tval_el0, x0
    mrs x21, cntv_cval_el0
    mov x0, #1
    msr cntv_ctl_el0, x0
    isb
2:  wfi
    msr daifclr, #2
    isb
    msr daifset, #2
    cmp x19, #2
    b.lo 2b
    mov x1, x19
    mov x2, x20
    isb
    mrs x3, cntvct_el0
    cmp x3, x21
    cset x3, hs                 // not before its time
    call 0x10000002
    b .
    .org timer_guest + 2048 + 0x280
    mrs x20, icc_iar1_el1
    msr cntv_ctl_el0, xzr
    isb
    msr icc_eoir1_el1, x20
    add x19, x19, #1
    eret
.global timer_guest_end
.balign 8
timer_guest_end:

// An ordinary guest that tells its time and uses a device, at 0x9000000, that the host plays.
.balign 4096
.global device_guest
device_guest:
    adr x0, device_guest + 2048
    msr vbar_el1, x0
    isb
    mrs x1, cntvct_el0
    call 0x10000001
    movz x9, #0x900, lsl #16
    ldr w1, [x9]
    movz x10, #0x1234, lsl #16
    movk x10, #0x5678
    strh w10, [x9, #2]
    call 0x10000002
    ldr x1, [x9, #8]            // where there is nothing
    b .
    .org device_guest + 2048 + 0x200
    mrs x1, esr_el1
    mrs x2, far_el1
    mov x3, #0
    call 0x10000003
    b .
.global device_guest_end
.balign 8
device_guest_end:

// A guest that calls the host for ever.
.balign 8
.global calling_guest
calling_guest:
1:  call 0x10000001
    b 1b
.global calling_guest_end
.balign 8
calling_guest_end:
