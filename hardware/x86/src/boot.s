# From 32-bit mode (multiboot, or rom.asm) to long mode and Rust, on the first processor and, from a
# start-up interrupt, on the second.

.section .boot.header, "ax"
.code32
multiboot_header:
  .long 0x1badb002
  .long 0x00010003                      # page aligned, memory map, addresses below are valid
  .long -(0x1badb002 + 0x00010003)
  .long multiboot_header
  .long __load_start
  .long __load_end
  .long __bss_end
  .long entry32
  .long entry32                         # at 0x20: for rom.asm

.section .boot.text, "ax"
.global entry32
entry32:
  cli
  cld
  mov edi, offset __bss_start
  mov ecx, offset __bss_end
  sub ecx, edi
  shr ecx, 2
  xor eax, eax
  rep stosd
  # The hypervisor's own address space: the first 4 GiB as they are, in 2 MiB pages.
  mov eax, offset boot_pdpt
  or eax, 3
  mov [boot_pml4], eax
  mov edi, offset boot_pdpt
  mov eax, offset boot_pd
  or eax, 3
  mov ecx, 4
1:
  mov [edi], eax
  add edi, 8
  add eax, 4096
  loop 1b
  mov edi, offset boot_pd
  mov eax, 0x83
  mov ecx, 2048
2:
  mov [edi], eax
  add edi, 8
  add eax, 0x200000
  loop 2b
  mov esp, offset first_stack_top
  call enable_long_mode
  ljmp 0x08, offset first64

# Turns on long mode with boot_pml4; the caller still has to jump to a 64-bit segment.
enable_long_mode:
  mov eax, cr4
  or eax, 0x6a0                         # PAE, PGE, OSFXSR, OSXMMEXCPT
  mov cr4, eax
  mov eax, offset boot_pml4
  mov cr3, eax
  mov ecx, 0xc0000080
  rdmsr
  or eax, 0x900                         # EFER: LME, NXE
  wrmsr
  mov eax, cr0
  and eax, 0x9ffffffb                   # caches on, no FPU emulation
  or eax, 0x80010023                    # PG, WP, NE, MP, PE
  mov cr0, eax
  lgdt [gdt_pointer]
  ret

.code64
load_segments:
  mov ax, 0x10
  mov ds, ax
  mov es, ax
  mov ss, ax
  xor eax, eax
  mov fs, ax
  mov gs, ax
  ret

first64:
  lea rsp, [rip + first_stack_top]
  call load_segments
  call first_processor
  ud2

second64:
  lea rsp, [rip + second_stack_top]
  call load_segments
  call second_processor
  ud2

# The second processor starts here in real mode, after this was copied to 0x8000.
.section .rodata
.code16
.global second_start
.global second_start_end
second_start:
  cli
  xor ax, ax
  mov ds, ax
  lgdtd [start_gdt_pointer_there]
  mov eax, cr0
  or al, 1
  mov cr0, eax
  # A far jump with a 32-bit offset to second32 in the copy.
  .byte 0x66, 0xea
  .long 0x8000 + (second32 - second_start)
  .word 0x08
.code32
second32:
  mov ax, 0x10
  mov ds, ax
  mov es, ax
  mov ss, ax
  mov esp, offset second_stack_top
  mov eax, offset enable_long_mode
  call eax
  ljmp 0x08, offset second64
.balign 8
start_gdt:
  .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
start_gdt_pointer:
  .word 23
  .long 0x8000 + (start_gdt - second_start)
second_start_end:
.set start_gdt_pointer_there, 0x8000 + (start_gdt_pointer - second_start)
.code64

.section .data
.balign 16
.global gdt
gdt:
  .quad 0
  .quad 0x00af9b000000ffff              # 0x08: 64-bit code
  .quad 0x00cf93000000ffff              # 0x10: data
  .quad 0, 0                            # 0x18: task state of processor 0, filled in by smp.rs
  .quad 0, 0                            # 0x28: and of processor 1
gdt_end:
gdt_pointer:
  .word gdt_end - gdt - 1
  .quad gdt

.section .bss
.balign 4096
.global boot_pml4
boot_pml4: .space 4096
boot_pdpt: .space 4096
boot_pd: .space 16384
first_stack: .space 131072
first_stack_top:
second_stack: .space 131072
second_stack_top:
