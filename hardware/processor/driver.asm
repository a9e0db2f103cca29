; Puts a processor into one state after another, lets it run until an exception, and writes down
; what it finds then. The same bytes run on every machine: what they need is 32-bit mode to begin in
; and memory. `src/image.rs` appends the table of cases, and knows the formats.
;
; A case is entered from 32-bit code without paging, and ends in a handler of real, protected or
; 64-bit mode, from where the way back leads here. Memory below 640 KiB is put into a known state
; before each case (only the windows that the case names), and compared afterwards.

PRISTINE  equ 0x2000000         ; added to an address: what is there before a case's patches
SNAPSHOT  equ 0x2100000         ; and after them
OUTPUT    equ 0x3000000
LOW_END   equ 0xa0000
STACK     equ 0x7ff0
VECTORS   equ 64

CODE32    equ 0x08
DATA32    equ 0x10
CODE16    equ 0x18
DATA16    equ 0x20

org 0x100000
bits 32
header:
  dd 0x1badb002, 0x00010003, -(0x1badb002 + 0x00010003)
  dd header, header
end_of_image: dd 0              ; filled in, like what is below
  dd 0, start
  dd start                      ; at 0x20: for rom.asm
initial: dd 0                   ; patches that make what is pristine
cases:   dd 0
verbose: dd 0                   ; whether to tell each case's number to port 0xe9

start:
  cli
  cld
  xor edi, edi                  ; segments are flat already
  mov ecx, LOW_END / 4
  xor eax, eax
  rep stosd
  mov esi, section.low.start
  mov edi, low_begin
  mov ecx, (low_end - low_begin + 3) / 4
  rep movsd
  lgdt [home_gdtr]
  jmp CODE32:.flat
.flat:
  mov ax, DATA32
  mov ds, ax
  mov es, ax
  mov ss, ax
  mov esp, STACK
  mov al, 0xff                  ; no interrupts from anywhere
  out 0x21, al
  out 0xa1, al
  mov esi, [initial]
  call patch
  xor esi, esi
  mov edi, PRISTINE
  mov ecx, LOW_END / 4
  rep movsd
  mov dword [output], OUTPUT
  mov esi, [cases]

next:
  mov [current], esi
  cmp dword [esi], 0
  je finish
  cmp dword [verbose], 0
  je .quiet
  mov eax, [esi + 4]
  call tell
.quiet:
  mov esi, [current]
  mov edi, context
  mov ecx, CONTEXT_BYTES / 4
  rep movsd
  mov ebx, PRISTINE
  xor ebp, ebp
  call copy_windows
  mov esi, [current]
  add esi, CONTEXT_BYTES
  call patch
  xor ebx, ebx
  mov ebp, SNAPSHOT
  call copy_windows
  jmp enter

finish:
  mov edi, [output]
  mov dword [edi], 0
  mov al, '.'
  out 0xe9, al
  mov al, 10
  out 0xe9, al
  xchg bx, bx                   ; Bochs gives its debugger the word
  mov al, 0x10
  out 0xf4, al                  ; QEMU ends
  cli
  hlt                           ; Twofold ends
  jmp finish

; EAX in hexadecimal.
tell:
  mov ecx, 8
.digit:
  rol eax, 4
  mov ebx, eax
  and ebx, 15
  mov dl, [digits + ebx]
  xchg al, dl
  out 0xe9, al
  xchg al, dl
  loop .digit
  mov al, 10
  out 0xe9, al
  ret
digits: db "0123456789abcdef"

; Applies the patches at ESI: address, length, bytes (as many as make whole words). A length of
; zero ends them.
patch:
  mov edi, [esi]
  mov ecx, [esi + 4]
  add esi, 8
  jecxz .end
  mov edx, ecx
  rep movsb
  neg edx
  and edx, 3
  add esi, edx
  jmp patch
.end:
  ret

; Copies the case's windows from EBX + address to EBP + address.
copy_windows:
  mov edx, [context.windows]
.window:
  mov esi, [edx]
  mov ecx, [edx + 4]
  jecxz .end
  lea edi, [esi + ebp]
  add esi, ebx
  shr ecx, 2
  rep movsd
  add edx, 8
  jmp .window
.end:
  ret

; Back from a case, with flat segments and paging off: writes down what `saved` holds, what lies on
; the stack, and what changed in the windows.
report:
  mov edi, [output]
  mov eax, [context.id]
  mov [edi + 4], eax
  mov ebx, edi                  ; the record
  add edi, 8
  mov esi, saved
  mov ecx, SAVED_BYTES / 4
  rep movsd
  ; Where the stack lies.
  mov edx, -1                   ; bits of an offset that count
  xor ebp, ebp                  ; base
  mov eax, [saved.kind]
  cmp eax, 2
  je .frame                     ; 64-bit mode has no bases
  movzx ecx, word [saved.ss]
  test eax, eax
  jnz .descriptor
  mov edx, 0xffff
  mov ebp, ecx
  shl ebp, 4
  jmp .frame
.descriptor:
  mov esi, [saved.gdtr + 2]
  test cl, 4
  jz .table
  movzx eax, word [saved.ldt]
  and eax, ~7
  call base_of
  mov esi, eax
.table:
  mov eax, ecx
  and eax, ~7
  push esi
  push eax
  call base_of
  mov ebp, eax
  pop eax
  pop esi
  test byte [esi + eax + 6], 0x40
  jnz .frame
  mov edx, 0xffff
.frame:
  mov [edi], ebp
  add edi, 4
  mov esi, [saved.gpr + 4 * 8]
  mov ecx, 32
.word:
  and esi, edx
  mov ax, [ebp + esi]
  stosw
  add esi, 2
  loop .word
  ; What changed.
  mov edx, [context.windows]
.window:
  mov esi, [edx]
  mov ecx, [edx + 4]
  jecxz .end
  lea ebp, [esi + SNAPSHOT]
  shr ecx, 2
.compare:
  xchg edi, ebp
  repe cmpsd
  xchg edi, ebp
  je .same
  lea eax, [esi - 4]
  stosd
  mov eax, [esi - 4]
  stosd
  test ecx, ecx
  jnz .compare
.same:
  add edx, 8
  jmp .window
.end:
  mov [output], edi
  mov eax, edi
  sub eax, ebx
  mov [ebx], eax
  mov esi, [current]
  add esi, [esi]
  jmp next

; EAX = base in the descriptor at ESI + EAX.
base_of:
  push ecx
  mov cl, [esi + eax + 7]
  shl ecx, 8
  mov cl, [esi + eax + 4]
  shl ecx, 16
  mov cx, [esi + eax + 2]
  mov eax, ecx
  pop ecx
  ret

; What runs in 16-bit modes too, or has to be found by a 16-bit offset: below 64 KiB.
section low vstart=0x1000 follows=.text
low_begin:
align 8
home_gdt: dq 0, 0x00cf9b000000ffff, 0x00cf93000000ffff, 0x00009b000000ffff, 0x000093000000ffff
          dq 0x00af9b000000ffff
home_gdtr: dw home_gdtr - home_gdt - 1
  dd home_gdt
no_idt: dw 0
  dd 0
output:  dd 0
current: dd 0

align 8
context:
  dd 0                          ; bytes of the record
.id:      dd 0
.mode:    dd 0                  ; 0 real, 1 protected at level 0, 2 by IRETD, 3 to virtual-8086, 4 long
.windows: dd 0
.gdtr:    dw 0
          dd 0
.idtr:    dw 0
          dd 0
.ldt:     dw 0
.tr:      dw 0
.cr0:     dd 0
.cr3:     dd 0
.cr4:     dd 0
.efer:    dd 0
.pkru:    dd 0
.dr:      dd 0, 0, 0, 0
.dr7:     dd 0
.es:      dw 0
.ss:      dw 0
.ds:      dw 0
.fs:      dw 0
.gs:      dw 0
          dw 0
.gpr:     times 16 dq 0
.flags:   dq 0
.rip:     dq 0
.target:  dd 0                  ; the low half of RIP, and a far pointer with what follows
.cs:      dd 0
CONTEXT_BYTES equ $ - context

; What a handler has found; goes into the record as it is.
align 8
saved:
.kind:    dd 0                  ; handler's mode: 0 real, 1 protected, 2 64-bit
.vector:  dd 0
.gpr:     times 16 dq 0
.flags:   dq 0
.cr2:     dq 0
.cr0:     dd 0
.cr3:     dd 0
.cr4:     dd 0
.efer:    dd 0
.dr6:     dd 0
.dr7:     dd 0
.cs:      dw 0
.ss:      dw 0
.ds:      dw 0
.es:      dw 0
.fs:      dw 0
.gs:      dw 0
.tr:      dw 0
.ldt:     dw 0
.gdtr:    dw 0
          dd 0
.idtr:    dw 0
          dd 0
SAVED_BYTES equ $ - saved
          dw 0, 0, 0, 0         ; SGDT of 64-bit mode writes ten bytes

enter:
  mov edi, saved
  mov ecx, SAVED_BYTES / 4
  xor eax, eax
  rep stosd
  mov eax, [context.rip]
  mov [context.target], eax
  cmp dword [context.mode], 0
  je enter_real
  lgdt [context.gdtr]
  lidt [context.idtr]
  cmp dword [context.mode], 4
  je enter_long
  lldt [context.ldt]
  cmp word [context.tr], 0
  je .no_task
  ltr [context.tr]
.no_task:
  call enable
  push dword [context.gs]
  push dword [context.fs]
  push dword [context.ds]
  push dword [context.es]
  mov ax, [context.ss]
  push eax
  push dword [context.gpr + 4 * 8]
  push dword [context.flags]
  push dword [context.cs]
  push dword [context.rip]
  cmp dword [context.mode], 3
  je .registers
  mov es, [context.es]
  mov fs, [context.fs]
  mov gs, [context.gs]
.registers:
  mov ecx, [context.gpr + 1 * 8]
  mov edx, [context.gpr + 2 * 8]
  mov ebx, [context.gpr + 3 * 8]
  mov ebp, [context.gpr + 5 * 8]
  mov esi, [context.gpr + 6 * 8]
  mov edi, [context.gpr + 7 * 8]
  cmp dword [context.mode], 1
  je .inner
  mov eax, [context.gpr]
  cmp dword [context.mode], 3
  je .virtual
  mov ds, [context.ds]
.virtual:
  iretd
.inner:
  push dword [context.flags]
  popfd
  mov eax, [context.gpr]
  mov ss, [context.ss]
  mov esp, [context.gpr + 4 * 8]
  mov ds, [context.ds]
  jmp far dword [cs:context.target]

; Control and debug registers of the case.
enable:
  mov eax, [context.cr3]
  mov cr3, eax
  mov eax, [context.cr4]
  mov cr4, eax
  mov eax, [context.efer]
  test eax, eax
  jz .no_efer
  mov ecx, 0xc0000080
  xor edx, edx
  wrmsr
.no_efer:
  mov eax, [context.cr0]
  mov cr0, eax
  jmp .here
.here:
  xor eax, eax
  mov cr2, eax
  mov eax, 0xffff0ff0
  mov dr6, eax
  mov eax, [context.dr7]
  test eax, eax
  jz .end
  mov ebx, [context.dr]
  mov dr0, ebx
  mov ebx, [context.dr + 4]
  mov dr1, ebx
  mov ebx, [context.dr + 8]
  mov dr2, ebx
  mov ebx, [context.dr + 12]
  mov dr3, ebx
  mov dr7, eax
.end:
  ret

enter_long:
  call enable
  jmp 0x28:.wide
bits 64
default rel
.wide:
  xor eax, eax
  lldt [context.ldt]
  cmp word [context.tr], ax
  je .no_task
  ltr [context.tr]
.no_task:
  bt dword [context.cr4], 22
  jnc .no_keys
  xor ecx, ecx
  xor edx, edx
  mov eax, [context.pkru]
  wrpkru
.no_keys:
  mov ds, [context.ds]
  mov es, [context.es]
  mov fs, [context.fs]
  mov gs, [context.gs]
  movzx eax, word [context.ss]
  push rax
  push qword [context.gpr + 4 * 8]
  push qword [context.flags]
  mov eax, [context.cs]
  movzx eax, ax
  push rax
  push qword [context.rip]
  mov rax, [context.gpr + 0 * 8]
  mov rcx, [context.gpr + 1 * 8]
  mov rdx, [context.gpr + 2 * 8]
  mov rbx, [context.gpr + 3 * 8]
  mov rbp, [context.gpr + 5 * 8]
  mov rsi, [context.gpr + 6 * 8]
  mov rdi, [context.gpr + 7 * 8]
  mov r8, [context.gpr + 8 * 8]
  mov r9, [context.gpr + 9 * 8]
  mov r10, [context.gpr + 10 * 8]
  mov r11, [context.gpr + 11 * 8]
  mov r12, [context.gpr + 12 * 8]
  mov r13, [context.gpr + 13 * 8]
  mov r14, [context.gpr + 14 * 8]
  mov r15, [context.gpr + 15 * 8]
  iretq
bits 32

enter_real:
  lgdt [home_gdtr]
  jmp CODE16:.narrow
bits 16
.narrow:
  mov ax, DATA16
  mov ds, ax
  mov es, ax
  mov fs, ax
  mov gs, ax
  mov ss, ax
  mov eax, [context.cr0]
  mov cr0, eax
  jmp 0:.real
.real:
  xor ax, ax
  mov ds, ax
  mov ss, ax
  lidt [context.idtr]
  mov esp, STACK
  mov es, [context.es]
  mov fs, [context.fs]
  mov gs, [context.gs]
  mov ecx, [context.gpr + 1 * 8]
  mov edx, [context.gpr + 2 * 8]
  mov ebx, [context.gpr + 3 * 8]
  mov ebp, [context.gpr + 5 * 8]
  mov esi, [context.gpr + 6 * 8]
  mov edi, [context.gpr + 7 * 8]
  push dword [context.flags]
  popfd
  mov eax, [context.gpr]
  mov ss, [context.ss]
  mov esp, [context.gpr + 4 * 8]
  mov ds, [context.ds]
  jmp far dword [cs:context.target]

; Handlers of real mode: CS is writable there.
align 16
real_handlers:
%assign vector 0
%rep VECTORS
  mov [cs:saved.gpr], eax
  mov byte [cs:saved.vector], vector
  jmp near real_common
  align 16
%assign vector vector + 1
%endrep
real_common:
  mov [cs:saved.gpr + 1 * 8], ecx
  mov [cs:saved.gpr + 2 * 8], edx
  mov [cs:saved.gpr + 3 * 8], ebx
  mov [cs:saved.gpr + 4 * 8], esp
  mov [cs:saved.gpr + 5 * 8], ebp
  mov [cs:saved.gpr + 6 * 8], esi
  mov [cs:saved.gpr + 7 * 8], edi
  mov [cs:saved.cs], cs
  mov [cs:saved.ss], ss
  mov [cs:saved.ds], ds
  mov [cs:saved.es], es
  mov [cs:saved.fs], fs
  mov [cs:saved.gs], gs
  mov ax, 0
  mov ds, ax
  mov ss, ax
  mov esp, STACK
  pushfd
  pop dword [saved.flags]
  sgdt [saved.gdtr]
  sidt [saved.idtr]
  mov eax, cr0
  mov [saved.cr0], eax
  o32 lgdt [home_gdtr]
  mov eax, 0x11
  mov cr0, eax
  jmp dword CODE32:home
bits 32

; Handlers of protected mode. Debug registers keep what there is no place for: no segment may be
; writable, and the stack may be full.
align 16
protected_handlers:
%assign vector 0
%rep VECTORS
  mov dr0, eax
  mov al, vector
  jmp near protected_common
  align 16
%assign vector vector + 1
%endrep
protected_common:
  movzx eax, al
  mov dr1, eax
  mov eax, ds
  mov dr2, eax
  mov ax, DATA32
  mov ds, ax
  mov eax, dr0
  mov [saved.gpr], eax
  mov eax, dr1
  mov [saved.vector], eax
  mov eax, dr2
  mov [saved.ds], ax
  mov [saved.gpr + 1 * 8], ecx
  mov [saved.gpr + 2 * 8], edx
  mov [saved.gpr + 3 * 8], ebx
  mov [saved.gpr + 4 * 8], esp
  mov [saved.gpr + 5 * 8], ebp
  mov [saved.gpr + 6 * 8], esi
  mov [saved.gpr + 7 * 8], edi
  mov [saved.cs], cs
  mov [saved.ss], ss
  mov [saved.es], es
  mov [saved.fs], fs
  mov [saved.gs], gs
  mov ax, DATA32
  mov ss, ax
  mov esp, STACK
  pushfd
  pop dword [saved.flags]
  mov byte [saved.kind], 1
  str [saved.tr]
  sldt [saved.ldt]
  sgdt [saved.gdtr]
  sidt [saved.idtr]
protected_rest:
  mov eax, cr0
  mov [saved.cr0], eax
  mov eax, cr2
  mov [saved.cr2], eax
  mov eax, cr3
  mov [saved.cr3], eax
  mov eax, cr4
  mov [saved.cr4], eax
  mov eax, dr6
  mov [saved.dr6], eax
  mov eax, dr7
  mov [saved.dr7], eax
without_paging:
  mov eax, 0x11
  mov cr0, eax
  jmp home

align 32
bits 64
long_handlers:
%assign vector 0
%rep VECTORS
  mov [saved.gpr], rax
  mov byte [saved.vector], vector
  jmp near long_common
  align 32
%assign vector vector + 1
%endrep
long_common:
  mov [saved.gpr + 1 * 8], rcx
  mov [saved.gpr + 2 * 8], rdx
  mov [saved.gpr + 3 * 8], rbx
  mov [saved.gpr + 4 * 8], rsp
  mov [saved.gpr + 5 * 8], rbp
  mov [saved.gpr + 6 * 8], rsi
  mov [saved.gpr + 7 * 8], rdi
  mov [saved.gpr + 8 * 8], r8
  mov [saved.gpr + 9 * 8], r9
  mov [saved.gpr + 10 * 8], r10
  mov [saved.gpr + 11 * 8], r11
  mov [saved.gpr + 12 * 8], r12
  mov [saved.gpr + 13 * 8], r13
  mov [saved.gpr + 14 * 8], r14
  mov [saved.gpr + 15 * 8], r15
  mov [saved.cs], cs
  mov [saved.ss], ss
  mov [saved.ds], ds
  mov [saved.es], es
  mov [saved.fs], fs
  mov [saved.gs], gs
  mov esp, STACK
  pushfq
  pop qword [saved.flags]
  mov byte [saved.kind], 2
  str [saved.tr]
  sldt [saved.ldt]
  sidt [wide_table]
  mov rax, [wide_table]
  mov [saved.idtr], eax
  shr rax, 32
  mov [saved.idtr + 4], ax
  sgdt [wide_table]
  mov rax, [wide_table]
  mov [saved.gdtr], eax
  shr rax, 32
  mov [saved.gdtr + 4], ax
  mov rax, cr2
  mov [saved.cr2], rax
  mov rax, cr0
  mov [saved.cr0], eax
  mov rax, cr3
  mov [saved.cr3], eax
  mov rax, cr4
  mov [saved.cr4], eax
  mov rax, dr6
  mov [saved.dr6], eax
  mov rax, dr7
  mov [saved.dr7], eax
  mov eax, 0
  mov ds, ax
  push CODE32
  push without_paging
  retfq
wide_table: dq 0, 0
bits 32

; Everything as `start` has it, from 32-bit code without paging in whatever segments the case's
; tables have. (DS may not be used before it is loaded.)
home:
  mov ax, DATA32
  mov ds, ax
  mov es, ax
  mov ss, ax
  mov esp, STACK
  xor eax, eax
  mov cr4, eax
  mov dr7, eax
  mov ecx, 0xc0000080
  rdmsr
  mov [saved.efer], eax
  xor eax, eax
  xor edx, edx
  wrmsr
  lgdt [home_gdtr]
  lidt [no_idt]
  jmp CODE32:.loaded
.loaded:
  mov ax, DATA32
  mov ds, ax
  mov es, ax
  mov fs, ax
  mov gs, ax
  mov ss, ax
  xor eax, eax
  lldt ax
  push eax                      ; NT above all
  popfd
  jmp report
low_end:

; What image.rs has to know.
section .end follows=low
  dd saved, home, real_handlers, protected_handlers, long_handlers
