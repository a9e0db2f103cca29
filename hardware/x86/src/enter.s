# Into a guest and back, on both kinds of processor.
#
# In both, rdi is the address of `Registers`; its rax and rdi are dealt with where they are used. What
# Rust's calling convention lets a function destroy is not kept, among it the vector registers: the
# guest does not use them.

.macro LOAD_REGISTERS
  mov rbx, [rdi + 8]
  mov rcx, [rdi + 16]
  mov rdx, [rdi + 24]
  mov rsi, [rdi + 32]
  mov rbp, [rdi + 48]
  mov r8, [rdi + 56]
  mov r9, [rdi + 64]
  mov r10, [rdi + 72]
  mov r11, [rdi + 80]
  mov r12, [rdi + 88]
  mov r13, [rdi + 96]
  mov r14, [rdi + 104]
  mov r15, [rdi + 112]
.endm
# The address of `Registers` is on the stack, and rdi afterwards.
.macro SAVE_REGISTERS
  push rdi
  mov rdi, [rsp + 8]
  mov [rdi + 8], rbx
  mov [rdi + 16], rcx
  mov [rdi + 24], rdx
  mov [rdi + 32], rsi
  mov [rdi + 48], rbp
  mov [rdi + 56], r8
  mov [rdi + 64], r9
  mov [rdi + 72], r10
  mov [rdi + 80], r11
  mov [rdi + 88], r12
  mov [rdi + 96], r13
  mov [rdi + 104], r14
  mov [rdi + 112], r15
  pop qword ptr [rdi + 40]
.endm
.macro PUSH_CALLEE_SAVED
  push rbx
  push rbp
  push r12
  push r13
  push r14
  push r15
  push rdi
.endm
.macro POP_CALLEE_SAVED
  pop rdi
  pop r15
  pop r14
  pop r13
  pop r12
  pop rbp
  pop rbx
.endm

.section .text
# svm_enter(registers, address of the VMCB). Interrupts are allowed between STI and CLI, but GIF keeps
# them away from the hypervisor there: one that arrives leaves the guest and is taken later.
.global svm_enter
svm_enter:
  PUSH_CALLEE_SAVED
  mov rax, rsi
  LOAD_REGISTERS
  mov rdi, [rdi + 40]
  clgi
  sti
  vmrun rax
  cli
  SAVE_REGISTERS
  stgi
  POP_CALLEE_SAVED
  ret

# vmx_enter(registers, launched): 0 after an exit, 1 or 2 if the entry failed.
.global vmx_enter
vmx_enter:
  PUSH_CALLEE_SAVED
  mov rax, 0x6c14                       # the hypervisor's RSP
  vmwrite rax, rsp
  lea rdx, [rip + vmx_left]
  mov rax, 0x6c16                       # and RIP
  vmwrite rax, rdx
  test rsi, rsi
  LOAD_REGISTERS
  mov rax, [rdi]
  mov rdi, [rdi + 40]
  jnz 1f
  vmlaunch
  jmp 2f
1:
  vmresume
2:
  mov eax, 1
  jc 3f
  mov eax, 2
3:
  POP_CALLEE_SAVED
  ret
vmx_left:
  SAVE_REGISTERS
  mov [rdi], rax
  xor eax, eax
  POP_CALLEE_SAVED
  ret
