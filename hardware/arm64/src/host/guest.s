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
