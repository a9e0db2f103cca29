//! Code that changes, and accesses across pages.

use crate::guest::Guest;
use twofold_cpu::Exit;

#[test]
fn code_that_changes_itself_runs_as_new_code_at_once() {
    // mov byte [rip+1],0xff; mov eax,0x11 -> the immediate's first byte changes; hlt
    let mut guest = Guest::long(b"\xc6\x05\x01\x00\x00\x00\xff\xb8\x11\x00\x00\x00\xf4");
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.gpr(0), 0xff);
}

#[test]
fn code_that_the_program_changes_runs_as_new_code_from_the_next_run() {
    let mut guest = Guest::long(b"\xb8\x11\x00\x00\x00\xf4");
    assert_eq!(guest.cpu.run(), Exit::Halt);
    guest.write(0x1001, &[0x22]);
    guest.set(0x1000, |_| {});
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.gpr(0), 0x22);
}

#[test]
fn an_instruction_across_two_pages_is_executed_and_noticed_when_it_changes() {
    let mut guest = Guest::long(b"");
    for value in [0x1234u32, 0x5678] {
        let mut code = vec![0xb8];
        code.extend_from_slice(&value.to_le_bytes());
        code.push(0xf4);
        guest.write(0x1_4ffe, &code);
        guest.set(0x1_4ffe, |_| {});
        assert_eq!(guest.cpu.run(), Exit::Halt);
        assert_eq!(guest.gpr(0), u64::from(value));
    }
}

#[test]
fn a_store_across_pages_that_faults_on_the_second_changes_nothing() {
    // mov [0x14ffc],rax
    let mut guest = Guest::long(b"\x48\x89\x04\x25\xfc\x4f\x01\x00\xf4");
    guest.write_u64(0x8000 + 0x15 * 8, 0);
    guest.set(0x1000, |registers| {
        registers.gpr[0] = u64::MAX;
        registers.gpr[4] = 0x1_0000;
    });
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.cpu.registers().rip, 0x700f);
    assert_eq!(guest.cpu.system_registers().cr2, 0x1_5000);
    assert_eq!(guest.read_u64(0x1_4ff8), 0);
}

#[test]
fn a_block_that_another_displaced_from_the_table_still_faults_precisely() {
    // The two addresses have the same hash.
    const FIRST: usize = 0x1000;
    const SECOND: usize = 0x1_1002;
    // mov rax,[rbx]; jmp rcx
    let mut guest = Guest::long(b"\x48\x8b\x03\xff\xe1");
    // mov ebx,0x300000 (not mapped); jmp rdx
    guest.write(SECOND, b"\xbb\x00\x00\x30\x00\xff\xe2");
    // nop; jmp FIRST
    guest.write(0x1200, b"\x90\xe9\xfa\xfd\xff\xff");
    guest.set(0x1200, |registers| {
        registers.gpr[1] = SECOND as u64;
        registers.gpr[2] = 0x1200;
        registers.gpr[3] = 0x2000;
        registers.gpr[4] = 0x1_0000;
    });
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.cpu.registers().rip, 0x700f);
    let frame = guest.cpu.registers().gpr[4] as usize;
    assert_eq!(guest.read_u64(frame + 8), FIRST as u64);
}
