; What Bochs finds at the reset vector instead of a BIOS: 64 KiB of ROM that enter 32-bit mode and
; jump to the image, which Bochs has put at 1 MiB.
bits 16
org 0
start:
  cli
  o32 cs lgdt [gdt_pointer]
  mov eax, cr0
  or al, 1
  mov cr0, eax
  jmp dword 0x08:(0xffff0000 + protected)

bits 32
protected:
  mov ax, 0x10
  mov ds, ax
  mov es, ax
  mov ss, ax
  mov fs, ax
  mov gs, ax
  in al, 0x92                   ; A20 on, no reset
  or al, 2
  and al, 0xfe
  out 0x92, al
  ; Bochs 2.7 loads the image into one piece of its own memory, but gives guest memory out in
  ; pieces of 128 KiB in the order of first use. So the image is used in order, here.
  mov esi, 0x100000
touch:
  mov al, [esi]
  add esi, 0x20000
  cmp esi, [0x100014]           ; where the image ends
  jb touch
  cmp dword [0x100000], 0x1badb002
  jne missing
  jmp dword [0x100020]
missing:
  mov esi, 0xffff0000 + message
  mov ecx, message_length
  mov dx, 0xe9
  cld
  rep outsb
  hlt
message: db "no image at 1 MiB", 10
message_length equ $ - message

align 8
gdt: dq 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
gdt_pointer: dw gdt_pointer - gdt - 1
  dd 0xffff0000 + gdt

times 0xfff0 - ($ - $$) db 0xff
bits 16
  jmp start                     ; the reset vector
times 0x10000 - ($ - $$) db 0
