# A guest for QEMU: started by its firmware (a multiboot image), it uses the processor and QEMU's
# devices as an operating system does when it starts, and says on the debug console what it finds, in
# the form of a test's report ("ok 1 - ..."). It ends by ACPI's power-off if everything was right, so
# that QEMU's exit status is 0, and otherwise by isa-debug-exit.
#
# A flat image at 1 MiB: `as --64`, `ld -Ttext=0x100000 --oformat binary`.

        .intel_syntax noprefix

        .set    LOADED, 0x100000
        .set    CONSOLE, 0xe9           # -debugcon
        .set    DEBUG_EXIT, 0xf4        # -device isa-debug-exit,iobase=0xf4
        .set    POWER, 0x604            # PM1a control, where SeaBIOS puts it
        .set    APIC, 0xfee00000

        # Below 1 MiB, where real mode reaches.
        .set    FIRMWARE_CALL, 0x8000
        .set    SECOND, 0x9000          # a page: a start-up interrupt names it
        .set    LOW_MEMORY, 0x7000      # what the firmware said
        .set    MAP_ANSWER, 0x7004
        .set    ARRIVED, 0x7008         # the second processor's steps
        .set    BALL, 0x700c            # whose turn it is
        .set    TABLES, 0x10000         # page tables: 6 pages
        .set    STACK, 0x80000
        .set    SECOND_STACK, 0x70000

        .set    CODE32, 0x08
        .set    DATA, 0x10
        .set    CODE64, 0x18
        .set    CODE16, 0x20
        .set    DATA16, 0x28

        .set    PLAN_ONE, 20            # checks with one processor
        .set    PLAN_MORE, 22           # and with more

        .text
        .globl  _start
_start:
        jmp     begin32

        .balign 8
multiboot:
        .set    FLAGS, 1 << 16          # the addresses below are valid
        .long   0x1badb002, FLAGS, -(0x1badb002 + FLAGS)
        .long   multiboot, LOADED, 0, 0, begin32

# ---- 32-bit mode, without paging -------------------------------------------------------------------

        .code32
begin32:
        cli
        mov     [loader], eax
        lgdt    [gdt_pointer]
        ljmp    CODE32, offset 1f
1:      mov     eax, DATA
        mov     ds, eax
        mov     es, eax
        mov     ss, eax
        mov     esp, STACK

        # A call of the firmware: down to real mode and back.
        mov     esi, offset firmware_call
        mov     edi, FIRMWARE_CALL
        mov     ecx, offset firmware_call_end - firmware_call
        rep     movsb
        mov     esi, offset second
        mov     edi, SECOND
        mov     ecx, offset second_end - second
        rep     movsb
        ljmp    CODE16, FIRMWARE_CALL
back32:
        mov     eax, DATA
        mov     ds, eax
        mov     es, eax
        mov     ss, eax
        mov     esp, STACK

        # Four levels that map the first 4 GiB to themselves with 2 MiB pages.
        xor     eax, eax
        mov     edi, TABLES
        mov     ecx, 6 * 1024
        rep     stosd
        mov     dword ptr [TABLES], TABLES + 0x1000 + 7
        mov     ecx, 4
        mov     edi, TABLES + 0x1000
        mov     eax, TABLES + 0x2000 + 7
1:      mov     [edi], eax
        add     eax, 0x1000
        add     edi, 8
        loop    1b
        mov     edi, TABLES + 0x2000
        mov     eax, 0x87
        mov     ecx, 2048
1:      mov     [edi], eax
        add     eax, 0x200000
        add     edi, 8
        loop    1b
        call    enter_long_mode
        ljmp    CODE64, offset begin64

enter_long_mode:
        mov     eax, TABLES
        mov     cr3, eax
        mov     eax, cr4
        or      eax, 1 << 5 | 1 << 9    # PAE, OSFXSR
        mov     cr4, eax
        mov     ecx, 0xc0000080
        rdmsr
        or      eax, 1 << 8             # LME
        wrmsr
        mov     eax, cr0
        or      eax, 1 << 31 | 1 << 16  # PG, WP
        mov     cr0, eax
        ret

# ---- real mode, copied below 1 MiB -----------------------------------------------------------------

        .code16
firmware_call:
        mov     ax, DATA16
        mov     ds, ax
        mov     es, ax
        mov     ss, ax
        mov     eax, cr0
        and     al, 0xfe
        mov     cr0, eax
        .set    real_at, FIRMWARE_CALL + (1f - firmware_call)
        .byte   0xea                    # far jump to 0:real_at
        .word   real_at, 0
1:      xor     ax, ax
        mov     ds, ax
        mov     es, ax
        mov     ss, ax
        mov     sp, 0x7000
        .set    ivt_at, FIRMWARE_CALL + (ivt_pointer - firmware_call)
        lidt    [ivt_at]
        sti
        int     0x12                    # kilobytes below 1 MiB
        mov     [LOW_MEMORY], ax
        mov     eax, 0xe820             # the memory map
        mov     edx, 0x534d4150
        mov     ecx, 24
        mov     di, 0x7100
        xor     ebx, ebx
        int     0x15
        mov     [MAP_ANSWER], eax
        cli
        .set    gdt_at, FIRMWARE_CALL + (low_gdt_pointer - firmware_call)
        lgdt    [gdt_at]
        mov     eax, cr0
        or      al, 1
        mov     cr0, eax
        .byte   0x66, 0xea              # far jump, 32 bits
        .long   back32
        .word   CODE32
        .balign 4
ivt_pointer:
        .word   0x3ff
        .long   0
low_gdt_pointer:
        .word   gdt_end - gdt - 1
        .long   gdt
firmware_call_end:

# The second processor begins here, in real mode.
second:
        cli
        xor     ax, ax
        mov     ds, ax
        .set    second_gdt_at, SECOND + (second_gdt_pointer - second)
        lgdt    [second_gdt_at]
        mov     eax, cr0
        or      al, 1
        mov     cr0, eax
        .byte   0x66, 0xea
        .long   second32
        .word   CODE32
        .balign 4
second_gdt_pointer:
        .word   gdt_end - gdt - 1
        .long   gdt
second_end:

        .code32
second32:
        mov     eax, DATA
        mov     ds, eax
        mov     es, eax
        mov     ss, eax
        mov     esp, SECOND_STACK
        call    enter_long_mode
        ljmp    CODE64, offset second64

# ---- 64-bit mode -----------------------------------------------------------------------------------

# check CC, "text": reports whether condition CC holds.
        .macro  check cc, text
        set\cc  al
        lea     rsi, [rip + 9f]
        call    report
        .pushsection .rodata
9:      .asciz  "\text"
        .popsection
        .endm

# expect VECTOR, ERROR, "text": reports whether what came before faulted like this.
        .macro  expect vector, error, text
        mov     rax, qword ptr [seen_vector]
        mov     rbx, qword ptr [seen_error]
        mov     qword ptr [resume], 0
        mov     qword ptr [seen_vector], -1
        shl     rax, 32
        or      rax, rbx
        mov     rbx, \vector << 32 | \error
        cmp     rax, rbx
        check   e, "\text"
        .endm

        .code64
begin64:
        mov     rsp, STACK
        call    make_interrupt_table
        lidt    [idt_pointer]

        # How many processors there are, by QEMU's configuration device.
        mov     dx, 0x510
        mov     ax, 5
        out     dx, ax
        mov     dx, 0x511
        in      al, dx
        mov     [processors], al
        lea     rsi, [rip + plan_one]
        cmp     al, 1
        je      1f
        lea     rsi, [rip + plan_more]
1:      call    print

        cmp     dword ptr [loader], 0x2badb002
        check   e, "the firmware loads the image and starts it in protected mode"
        cmp     dword ptr [LOW_MEMORY], 639
        check   e, "a firmware service called from real mode knows the memory below 1 MiB"
        cmp     dword ptr [MAP_ANSWER], 0x534d4150
        check   e, "another one has a memory map"

        # Exceptions.
        mov     qword ptr [resume], offset 8f
        ud2
8:      expect  6, 0, "an invalid instruction raises #UD"
        mov     qword ptr [resume], offset 8f
        xor     eax, eax
        xor     edx, edx
        xor     ecx, ecx
        div     ecx
8:      expect  0, 0, "a division by zero raises #DE"
        mov     qword ptr [resume], offset 8f
        mov     eax, 0x50
        mov     ds, eax
8:      expect  13, 0x50, "a selector beyond the table raises #GP with the selector"
        mov     qword ptr [resume], offset 8f
        mov     rbx, 0x123456789a
        mov     qword ptr [rbx], 1
8:      expect  14, 2, "a write to an unmapped page raises #PF with its error code"
        mov     rax, 0x123456789a
        cmp     [seen_address], rax
        check   e, "and leaves the address in CR2"
        mov     qword ptr [resume], offset 8f
        mov     rbx, 1 << 63
        mov     qword ptr [rbx], 1
8:      expect  13, 0, "a write to no canonical address raises #GP"

        # Memory that the firmware lives in cannot be written.
        mov     ebx, 0xfffffff0
        mov     rax, [rbx]
        mov     qword ptr [rbx], 0
        cmp     [rbx], rax
        check   e, "a write to the firmware's ROM changes nothing"

        # String input from a port.
        mov     dx, 0x510
        xor     eax, eax
        out     dx, ax
        mov     dx, 0x511
        mov     edi, LOW_MEMORY
        mov     ecx, 4
        rep     insb
        cmp     dword ptr [LOW_MEMORY], 0x554d4551
        check   e, "rep insb reads QEMU's signature from a port"

        # The keyboard controller's test of itself.
        mov     al, 0xaa
        out     0x64, al
        mov     ecx, 1000000
1:      in      al, 0x64
        test    al, 1
        loopz   1b
        in      al, 0x60
        cmp     al, 0x55
        check   e, "the keyboard controller passes its test"

        # Time: ACPI's counter against itself.
        mov     dx, 0x608
        in      eax, dx
        mov     ebx, eax
        mov     ecx, 1000
1:      in      eax, dx
        loop    1b
        sub     eax, ebx
        and     eax, 0xffffff
        dec     eax
        cmp     eax, 3579545            # a second
        check   b, "the power-management timer counts"

        # The old interrupt controllers, remapped, with the old timer at 100 Hz.
        mov     al, 0x11
        out     0x20, al
        out     0xa0, al
        mov     al, 0x20
        out     0x21, al
        mov     al, 0x28
        out     0xa1, al
        mov     al, 4
        out     0x21, al
        mov     al, 2
        out     0xa1, al
        mov     al, 1
        out     0x21, al
        out     0xa1, al
        mov     al, 0xfe
        out     0x21, al
        mov     al, 0xff
        out     0xa1, al
        mov     al, 0x34
        out     0x43, al
        mov     al, 11932 & 0xff
        out     0x40, al
        mov     al, 11932 >> 8
        out     0x40, al
        mov     ecx, 10
1:      sti
        hlt
        cli
        loop    1b
        cmp     dword ptr [ticks], 10
        check   e, "ten interrupts of the old timer end ten halts"
        # Without a halt, to see an interrupt arrive while code runs.
        mov     eax, [ticks]
        mov     rcx, 20000000000
        sti
1:      cmp     eax, [ticks]
        jne     2f
        pause
        dec     rcx
        jnz     1b
2:      cli
        cmp     eax, [ticks]
        check   ne, "another one interrupts a loop"
        mov     al, 0xff
        out     0x21, al

        # The local APIC: its timer, and priorities by CR8.
        mov     ebx, APIC
        mov     dword ptr [rbx + 0xf0], 0x1ff
        mov     dword ptr [rbx + 0x3e0], 0xb
        mov     dword ptr [rbx + 0x320], 0x40
        mov     dword ptr [rbx + 0x380], 1000000
        sti
        hlt
        cli
        cmp     dword ptr [alarms], 1
        check   e, "the local APIC's timer ends a halt"
        mov     eax, 5
        mov     cr8, rax
        cmp     dword ptr [rbx + 0x80], 0x50
        check   e, "CR8 is the local APIC's task priority"
        mov     dword ptr [rbx + 0x380], 1000000
        sti
        mov     ecx, 10000000
1:      test    dword ptr [rbx + 0x220], 1      # requested: vector 0x40
        loopz   1b
        pause
        cmp     dword ptr [alarms], 1
        check   e, "it holds a lower interrupt back"
        xor     eax, eax
        mov     cr8, rax
        mov     ecx, 100000000
1:      cmp     dword ptr [alarms], 2
        je      2f
        pause
        loop    1b
2:      cli
        cmp     dword ptr [alarms], 2
        check   e, "and lets it through when it is lowered"
        mov     dword ptr [rbx + 0x320], 0x10000

        # The processor sends an interrupt to itself.
        mov     dword ptr [rbx + 0x310], 0
        mov     dword ptr [rbx + 0x300], 0x44041
        sti
        mov     ecx, 100000000
1:      cmp     dword ptr [calls], 1
        je      2f
        pause
        loop    1b
2:      cli
        cmp     dword ptr [calls], 1
        check   e, "an interrupt to oneself arrives"

        cmp     byte ptr [processors], 1
        je      finish

        # The second processor: INIT, then a start-up interrupt.
        mov     dword ptr [ARRIVED], 0
        mov     dword ptr [BALL], 0
        mov     dword ptr [rbx + 0x310], 1 << 24
        mov     dword ptr [rbx + 0x300], 0x4500
        mov     ecx, 100000
1:      pause
        loop    1b
        mov     dword ptr [rbx + 0x310], 1 << 24
        mov     dword ptr [rbx + 0x300], 0x4600 | SECOND >> 12
        mov     rcx, 2000000000
1:      cmp     dword ptr [ARRIVED], 1
        je      2f
        pause
        dec     rcx
        jnz     1b
2:      cmp     dword ptr [ARRIVED], 1
        check   e, "INIT and a start-up interrupt bring the second processor to 64-bit mode"
        # Both throw a ball a hundred times.
        mov     ecx, 100
        mov     rdx, 20000000000
1:      mov     eax, 0
        mov     esi, 1
        lock cmpxchg [BALL], esi
        je      2f
        pause
        dec     rdx
        jz      3f
        jmp     1b
2:      loop    1b
3:      test    ecx, ecx
        check   e, "both processors see each other's writes"

finish:
        cmp     dword ptr [failures], 0
        jne     failed
        mov     dx, POWER
        mov     ax, 0x2000              # sleep state S5
        out     dx, ax
1:      hlt                             # until QEMU has done it
        jmp     1b
failed:
        mov     al, 1
        out     DEBUG_EXIT, al
        jmp     1b

second64:
        mov     rsp, SECOND_STACK
        lidt    [idt_pointer]
        mov     dword ptr [ARRIVED], 1
1:      mov     eax, 1
        xor     esi, esi
        lock cmpxchg [BALL], esi
        pause
        jmp     1b

# Prints the string at RSI.
print:
        push    rax
        push    rdx
        mov     dx, CONSOLE
1:      lodsb
        test    al, al
        jz      2f
        out     dx, al
        jmp     1b
2:      pop     rdx
        pop     rax
        ret

# Prints EAX in decimal.
number:
        push    rax
        push    rdx
        push    rcx
        xor     edx, edx
        mov     ecx, 10
        div     ecx
        test    eax, eax
        jz      1f
        call    number
1:      lea     eax, [rdx + '0']
        mov     dx, CONSOLE
        out     dx, al
        pop     rcx
        pop     rdx
        pop     rax
        ret

# Reports the check of which RSI is the text; AL is 1 if it holds.
report:
        push    rax
        push    rsi
        lea     rsi, [rip + yes]
        test    al, al
        jnz     1f
        inc     dword ptr [failures]
        lea     rsi, [rip + no]
1:      call    print
        inc     dword ptr [checks]
        mov     eax, [checks]
        call    number
        lea     rsi, [rip + dash]
        call    print
        pop     rsi
        call    print
        lea     rsi, [rip + newline]
        call    print
        pop     rax
        ret

# ---- interrupts ------------------------------------------------------------------------------------

# Every entry notes vector and error code in the same way. Vectors 8, 10 to 14, 17 and 21 have an
# error code.
        .macro  entry vector
        .balign 16
        .if     \vector != 8 && (\vector < 10 || \vector > 14) && \vector != 17 && \vector != 21
        push    0
        .endif
        push    \vector
        jmp     exception
        .endm

        .balign 16
entries:
        .altmacro
        .set    vector, 0
        .rept   32
        entry   %vector
        .set    vector, vector + 1
        .endr
        .noaltmacro

exception:
        push    rax
        mov     rax, [rsp + 8]
        mov     [seen_vector], rax
        mov     rax, [rsp + 16]
        mov     [seen_error], rax
        mov     rax, cr2
        mov     [seen_address], rax
        mov     rax, [resume]
        test    rax, rax
        jz      unexpected
        mov     [rsp + 24], rax
        pop     rax
        add     rsp, 16
        iretq

unexpected:
        lea     rsi, [rip + bail_out]
        call    print
        mov     eax, [rsp + 8]
        call    number
        lea     rsi, [rip + newline]
        call    print
        jmp     failed

tick:
        push    rax
        inc     dword ptr [ticks]
        mov     al, 0x20
        out     0x20, al
        pop     rax
        iretq

alarm:
        inc     dword ptr [alarms]
        jmp     end_of_interrupt
called:
        inc     dword ptr [calls]
end_of_interrupt:
        push    rax
        mov     eax, APIC
        mov     dword ptr [rax + 0xb0], 0
        pop     rax
        iretq

make_interrupt_table:
        mov     rax, offset entries
        mov     rdi, offset idt
        mov     ecx, 32
1:      call    gate
        add     rax, 16
        loop    1b
        mov     rax, offset tick
        mov     rdi, offset idt + 0x20 * 16
        call    gate
        mov     rax, offset alarm
        mov     rdi, offset idt + 0x40 * 16
        call    gate
        mov     rax, offset called
        jmp     gate

# Makes the gate at RDI, and moves on: an interrupt gate to RAX.
gate:
        mov     [rdi], ax
        mov     word ptr [rdi + 2], CODE64
        mov     word ptr [rdi + 4], 0x8e00
        mov     rdx, rax
        shr     rdx, 16
        mov     [rdi + 6], dx
        shr     rdx, 16
        mov     [rdi + 8], rdx
        add     rdi, 16
        ret

# ---- data ------------------------------------------------------------------------------------------

        .balign 8
gdt:
        .quad   0
        .quad   0x00cf9b000000ffff      # 32-bit code
        .quad   0x00cf93000000ffff      # data
        .quad   0x00af9b000000ffff      # 64-bit code
        .quad   0x00009b000000ffff      # 16-bit code
        .quad   0x000093000000ffff      # 16-bit data
gdt_end:
gdt_pointer:
        .word   gdt_end - gdt - 1
        .quad   gdt
idt_pointer:
        .word   0x50 * 16 - 1
        .quad   idt

        .section .rodata
plan_one:
        .ascii  "1.."
        .byte   '0' + PLAN_ONE / 10, '0' + PLAN_ONE % 10
        .asciz  "\n"
plan_more:
        .ascii  "1.."
        .byte   '0' + PLAN_MORE / 10, '0' + PLAN_MORE % 10
        .asciz  "\n"
yes:    .asciz  "ok "
no:     .asciz  "not ok "
dash:   .asciz  " - "
newline: .asciz "\n"
bail_out: .asciz "Bail out! unexpected exception "

# In the image, as there is nobody to clear memory after it.
        .data
        .balign 16
idt:    .fill   0x50 * 16
seen_vector: .quad -1
seen_error: .quad 0
seen_address: .quad 0
resume: .quad   0
loader: .long   0
ticks:  .long   0
alarms: .long   0
calls:  .long   0
checks: .long   0
failures: .long 0
processors: .byte 0
