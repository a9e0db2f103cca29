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
