# What the guest runs: it asks for an operation, does it, and asks for the next. Copied to
# guest-physical address 0 (see guest.rs), position-independent.
#
# CPUID is the request: it exits on Intel and AMD processors, at every privilege level.
#
#   rax  in: which operation        out: 0 asks for one, 0x7e reports a #VE
#   rdi  an address                 rsi  a value, or the address of a report page
#   rcx  a count                    rbx  the result
#
# The answer to a #VE: rax is how many bytes of the instruction to go over, 0 to try it again, and rbx
# what it has read.

.section .rodata
.balign 4096
.global guest_code
.global guest_code_ve
.global guest_code_end
guest_code:
next:
  xor eax, eax
  cpuid
  cmp eax, 1
  je read
  cmp eax, 2
  je write
  cmp eax, 3
  je fetch
  cmp eax, 4
  je write_pages
  cmp eax, 5
  je read_forever
  cmp eax, 6
  je write_forever
  cmp eax, 7
  je read_pages
  ud2

# The hypervisor's emulation of MMIO relies on these two instructions being 3 bytes long, with the
# result in rbx.
read:
  mov rbx, [rdi]
  jmp next
write:
  mov [rdi], rsi
  jmp next
fetch:
  call rdi
  jmp next

# One write to each of rcx pages.
write_pages:
  mov [rdi], rsi
  add rdi, 4096
  dec rcx
  jnz write_pages
  jmp next
# The sum of one word from each of rcx pages.
read_pages:
  xor ebx, ebx
1:
  add rbx, [rdi]
  add rdi, 4096
  dec rcx
  jnz 1b
  jmp next

# Until word 2 of the report page is not 0: word 0 is what was read or written last, word 1 counts.
read_forever:
  mov rbx, [rdi]
  mov [rsi], rbx
  inc qword ptr [rsi + 8]
  cmp qword ptr [rsi + 16], 0
  je read_forever
  jmp next
write_forever:
  inc rbx
  mov [rdi], rbx
  mov [rsi], rbx
  inc qword ptr [rsi + 8]
  cmp qword ptr [rsi + 16], 0
  je write_forever
  jmp next

# A virtualization exception: ask the hypervisor, as the guest of a trust domain does.
guest_code_ve:
  push rax
  push rbx
  push rcx
  push rdx
  mov eax, 0x7e
  cpuid
  mov [rsp + 16], rbx
  add [rsp + 32], rax
  pop rdx
  pop rcx
  pop rbx
  pop rax
  iretq
guest_code_end:
