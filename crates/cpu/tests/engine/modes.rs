//! Real and protected mode, and calls between rings.

use crate::guest::Guest;
use twofold_cpu::Exit;

#[test]
fn syscall_and_sysret_go_to_the_kernel_and_back() {
    // user: syscall; int 0x80. kernel at 0x1100: mov rax,cs; sysretq
    let mut guest = Guest::user(b"\x0f\x05\xcd\x80");
    guest.write(0x1100, b"\x48\x8c\xc8\x48\x0f\x07");
    let mut msrs = guest.cpu.msrs();
    msrs.star = 0x13 << 48 | 8 << 32;
    msrs.lstar = 0x1100;
    msrs.sfmask = 0x200;
    guest.cpu.set_msrs(&msrs);
    guest.write_u64(0x5018, 0x00cf_f300_0000_ffff);
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.cpu.registers().rip, 0x7081);
    assert_eq!(guest.gpr(0), 8);
    assert_eq!(guest.gpr(1), 0x1002);
}

#[test]
fn real_mode_interrupts_go_through_the_vector_table() {
    // int 0x21; hlt
    let mut guest = Guest::real(b"\xcd\x21\xf4");
    // handler at 0:0x2000: mov ax,0x55; iret
    guest.write(0x21 * 4, &[0x00, 0x20, 0x00, 0x00]);
    guest.write(0x2000, b"\xb8\x55\x00\xcf");
    guest.set(0x1000, |registers| registers.gpr[4] = 0x4000);
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.gpr(0), 0x55);
    assert_eq!(guest.cpu.registers().rip, 0x1003);
    assert_eq!(guest.gpr(4), 0x4000);
}

#[test]
fn protected_mode_is_reached_from_real_mode() {
    // lgdt [0x500]; mov eax,cr0; or al,1; mov cr0,eax; jmp 8:0x1100
    let mut guest =
        Guest::real(b"\x0f\x01\x16\x00\x05\x0f\x20\xc0\x0c\x01\x0f\x22\xc0\xea\x00\x11\x08\x00");
    guest.write(0x500, &[0x17, 0, 0x00, 0x05, 0, 0]);
    guest.write_u64(0x508, 0x00cf_9b00_0000_ffff);
    guest.write_u64(0x510, 0x00cf_9300_0000_ffff);
    // 32-bit: mov ax,0x10; mov ds,ax; mov ss,ax; mov esp,0x10000; push 0x12345678; pop ebx; hlt
    guest.write(
        0x1100,
        b"\x66\xb8\x10\x00\x8e\xd8\x8e\xd0\xbc\x00\x00\x01\x00\x68\x78\x56\x34\x12\x5b\xf4",
    );
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.gpr(3), 0x1234_5678);
    assert_eq!(guest.gpr(4), 0x1_0000);
    assert!(guest.cpu.system_registers().cs.big);
}

/// A 32-bit code or data descriptor with base 0 and 4 GiB.
fn flat(kind: u64, dpl: u64) -> u64 {
    0x00cf_0000_0000_ffff | (0x90 | kind | dpl << 5) << 40
}

/// 32-bit protected mode at CPL 0 without paging: GDT at 0x5000 (8 and 0x10 for ring 0, 0x1b and
/// 0x23 for ring 3), TSS at 0x5800 with the ring-0 stack at 0x1f000, IDT of 32-bit gates at 0x6000
/// whose handlers are one HLT each at 0x7000 + vector.
fn protected(code: &[u8]) -> Guest {
    let mut guest = Guest::long(code);
    for (index, descriptor) in [flat(11, 0), flat(3, 0), flat(11, 3), flat(3, 3)]
        .into_iter()
        .enumerate()
    {
        guest.write_u64(0x5008 + index * 8, descriptor);
    }
    for vector in 0..256usize {
        let dpl = if vector == 0x80 { 3u64 } else { 0 };
        let gate = (0x7000 + vector as u64) | 8 << 16 | (0x8e00 | dpl << 13) << 32;
        guest.write_u64(0x6000 + vector * 8, gate);
    }
    guest.write_u64(0x5800, 0x1_f000 << 32);
    guest.write_u64(0x5808, 0x10);
    let mut system = guest.cpu.system_registers();
    system.cs.long = false;
    system.cs.big = true;
    system.ss.big = true;
    system.idt.limit = 0x7ff;
    system.gdt.limit = 0x3f;
    system.cr0 = 0x31;
    system.cr4 = 0x600;
    system.efer = 0;
    guest.cpu.set_system_registers(&system);
    guest
}

/// The words on the stack from its top.
fn stack(guest: &Guest, words: usize) -> Vec<u32> {
    let top = guest.gpr(4) as usize;
    (0..words)
        .map(|i| guest.read_u64(top + 4 * i) as u32)
        .collect()
}

/// Pushes of 32-bit immediates.
fn pushes(values: &[u32]) -> Vec<u8> {
    let mut code = Vec::new();
    for value in values {
        code.push(0x68);
        code.extend(value.to_le_bytes());
    }
    code
}

const VM: u32 = 1 << 17;

#[test]
fn virtual_8086_mode_is_entered_by_iret_and_left_by_a_fault() {
    // gs, fs, ds, es, ss, esp, eflags, cs, eip
    let mut code = pushes(&[
        0x50,
        0x40,
        0x2000,
        0x20,
        0x100,
        0x800,
        VM | 0x3002,
        0x110,
        0x10,
    ]);
    code.push(0xcf);
    let mut guest = protected(&code);
    // In virtual-8086 mode at 0110:0010: mov ax,ds; mov [4],ax; hlt, which is #GP there.
    guest.write(0x1110, b"\x8c\xd8\xa3\x04\x00\xf4");
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.cpu.registers().rip, 0x700e);
    assert_eq!(guest.read_u64(0x2_0004) as u16, 0x2000);
    assert_eq!(guest.gpr(4), 0x1_f000 - 40);
    let frame = stack(&guest, 10);
    assert_eq!(frame[..3], [0, 0x15, 0x110]);
    assert_eq!(frame[3] & (VM | 0x3000), VM | 0x3000);
    assert_eq!(frame[4..], [0x800, 0x100, 0x20, 0x2000, 0x40, 0x50]);
    let system = guest.cpu.system_registers();
    assert!(system.ds.unusable && system.gs.unusable);
    assert_eq!((system.cs.selector, system.ss.selector), (8, 0x10));
    assert_eq!(guest.cpu.registers().rflags as u32 & VM, 0);
}

#[test]
fn in_virtual_8086_mode_iopl_decides_about_flags_and_int() {
    // At IOPL 3: int 0x80 goes through the gate. At IOPL 0: #GP.
    for (iopl, handler) in [(3, 0x7081), (0, 0x700e)] {
        let mut code = pushes(&[0, 0, 0, 0, 0x100, 0x800, VM | iopl << 12 | 2, 0x110, 0x10]);
        code.push(0xcf);
        let mut guest = protected(&code);
        guest.write(0x1110, b"\xcd\x80");
        assert_eq!(guest.cpu.run(), Exit::Halt);
        assert_eq!(guest.cpu.registers().rip, handler);
    }
    // iret within: pushf; push cs; push 0x20; iret; at 0x20: int 0x80
    let mut code = pushes(&[0, 0, 0, 0, 0x100, 0x800, VM | 0x3002, 0x110, 0x10]);
    code.push(0xcf);
    let mut guest = protected(&code);
    guest.write(0x1110, b"\x9c\x0e\x6a\x20\xcf");
    guest.write(0x1120, b"\xcd\x80");
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.cpu.registers().rip, 0x7081);
    assert_eq!(stack(&guest, 2), [0x22, 0x110]);
}

#[test]
fn a_call_gate_leads_to_ring_0_with_parameters_and_retf_back() {
    // Ring 3 at 0x1100: push 0x11; push 0x22; call 0x2b:0; int 0x80
    let mut code = pushes(&[0x23, 0x1_8000, 0x202, 0x1b, 0x1100]);
    code.push(0xcf);
    let mut guest = protected(&code);
    guest.write(
        0x1100,
        b"\x6a\x11\x6a\x22\x9a\x00\x00\x00\x00\x2b\x00\xcd\x80",
    );
    // The gate: 32 bits, DPL 3, two parameters, to 8:0x1200.
    guest.write_u64(0x5028, 0x1200 | 8 << 16 | (0xec00 | 2) << 32);
    // mov eax,[esp+8]; mov ebx,[esp+12]; mov ecx,[esp+16]; mov dx,cs; retf 8
    guest.write(
        0x1200,
        b"\x8b\x44\x24\x08\x8b\x5c\x24\x0c\x8b\x4c\x24\x10\x8c\xca\xca\x08\x00",
    );
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.cpu.registers().rip, 0x7081);
    assert_eq!((guest.gpr(0), guest.gpr(3)), (0x22, 0x11));
    assert_eq!(guest.gpr(1), 0x1_7ff8, "the caller's stack pointer");
    assert_eq!(guest.gpr(2) & 0xffff, 8);
    // EIP, CS, EFLAGS, ESP, SS of the INT: the parameters are gone.
    let frame = stack(&guest, 5);
    assert_eq!(
        (frame[0], frame[1], frame[3], frame[4]),
        (0x110d, 0x1b, 0x1_8000, 0x23)
    );
}

#[test]
fn a_call_gate_of_64_bits_switches_to_the_stack_of_the_tss() {
    // Ring 3: call far [0x1080]; int 0x80
    let mut guest = Guest::user(b"\xff\x1c\x25\x80\x10\x00\x00\xcd\x80");
    let mut system = guest.cpu.system_registers();
    system.gdt.limit = 0x3f;
    guest.cpu.set_system_registers(&system);
    guest.write(0x1080, &[0, 0, 0, 0, 0x2b, 0]);
    guest.write_u64(0x5028, 0x1200 | 8 << 16 | 0xec00 << 32);
    guest.write_u64(0x5030, 0);
    // mov rax,[rsp]; mov rbx,rsp; mov cx,ss; retfq
    guest.write(0x1200, b"\x48\x8b\x04\x24\x48\x89\xe3\x8c\xd1\x48\xcb");
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.cpu.registers().rip, 0x7081);
    assert_eq!((guest.gpr(0), guest.gpr(3)), (0x1007, 0x1_f000 - 32));
    assert_eq!(guest.gpr(1) & 0xffff, 0);
    // A gate of lower privilege than the caller's refuses.
    guest.write_u64(0x5028, 0x1200 | 8 << 16 | 0x8c00 << 32);
    let mut guest2 = guest;
    let mut system = guest2.cpu.system_registers();
    system.cs.selector = 0x23;
    system.cs.dpl = 3;
    system.ss.selector = 0x1b;
    system.ss.dpl = 3;
    guest2.cpu.set_system_registers(&system);
    guest2.set(0x1000, |registers| registers.gpr[4] = 0x1_0000);
    assert_eq!(guest2.cpu.run(), Exit::Halt);
    assert_eq!(guest2.cpu.registers().rip, 0x700e);
    assert_eq!(guest2.read_u64(guest2.gpr(4) as usize), 0x28);
}

#[test]
fn task_switches_end_in_an_error_that_names_the_instruction() {
    // jmp 0x28:0, where a TSS is
    let mut guest = protected(b"\xea\x00\x00\x00\x00\x28\x00");
    guest.write_u64(0x5028, 0x67 | 0x5900 << 16 | 0x8900 << 32);
    match guest.cpu.run() {
        Exit::Unknown(unknown) => assert_eq!(unknown.bytes[..7], *b"\xea\x00\x00\x00\x00\x28\x00"),
        exit => panic!("{exit:?}"),
    }
    assert_eq!(guest.cpu.registers().rip, 0x1000);
    // A task gate in the IDT.
    let mut guest = protected(b"\x0f\x0b");
    guest.write_u64(0x6000 + 6 * 8, 0x28 << 16 | 0x8500 << 32);
    assert!(matches!(guest.cpu.run(), Exit::Unknown(_)));
    assert_eq!(guest.cpu.registers().rip, 0x1000);
}

#[test]
fn sysenter_and_sysexit_go_to_the_kernel_and_back() {
    // user: sysenter; at 0x1010: int 0x80. kernel at 0x1100: mov edx,0x1010; mov ecx,0x1800;
    // sysexitq
    let mut guest = Guest::user(b"\x0f\x34");
    guest.write(0x1010, b"\xcd\x80");
    guest.write(
        0x1100,
        b"\xba\x10\x10\x00\x00\xb9\x00\x18\x00\x00\x48\x0f\x35",
    );
    let mut msrs = guest.cpu.msrs();
    msrs.sysenter_cs = 8;
    msrs.sysenter_eip = 0x1100;
    msrs.sysenter_esp = 0x1_e000;
    guest.cpu.set_msrs(&msrs);
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.cpu.registers().rip, 0x7081);
    // RIP, CS, RFLAGS, RSP, SS of the INT.
    let frame = guest.gpr(4) as usize;
    assert_eq!(guest.read_u64(frame), 0x1012);
    assert_eq!(guest.read_u64(frame + 8), 8 + 32 + 3);
    assert_eq!(guest.read_u64(frame + 24), 0x1800);
    assert_eq!(guest.read_u64(frame + 32), 8 + 40 + 3);
}
