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
fn whatever_writes_the_next_instruction_it_runs_as_it_was_written() {
    // Each makes `mov eax,0x22` of the `mov eax,0x11` that it runs into.
    for (name, code) in [
        (
            "a store that ends in the next instruction",
            &b"\x48\xb9\x00\x00\x00\x00\x00\x00\xb8\x22\x48\x89\x0d\xfa\xff\xff\xff\xb8\x11\x00\x00\x00\xf4"[..],
        ),
        (
            "rep stosb",
            b"\x48\x8d\x3d\x0a\x00\x00\x00\xb0\x22\xb9\x01\x00\x00\x00\xf3\xaa\xb8\x11\x00\x00\x00\xf4",
        ),
        (
            "rep movsb",
            b"\x48\x8d\x3d\x0f\x00\x00\x00\x48\x8d\x35\x0d\x00\x00\x00\xb9\x01\x00\x00\x00\xf3\xa4\xb8\x11\x00\
            \x00\x00\xf4\x22",
        ),
        (
            "push",
            b"\x48\x8d\x25\x13\x00\x00\x00\x48\xb9\xb8\x22\x00\x00\x00\xf4\x90\x90\x51\xb8\x11\x00\x00\x00\xf4\
            \x90\x90",
        ),
        (
            "movups",
            b"\x0f\x10\x05\x17\x00\x00\x00\x0f\x11\x05\x00\x00\x00\x00\xb8\x11\x00\x00\x00\xf4\x90\x90\x90\x90\
            \x90\x90\x90\x90\x90\x90\xb8\x22\x00\x00\x00\xf4\x90\x90\x90\x90\x90\x90\x90\x90\x90\x90",
        ),
        (
            "maskmovdqu",
            b"\x48\x8d\x3d\x17\x00\x00\x00\xb8\x80\x00\x00\x00\x66\x0f\x6e\xc8\xb8\x22\x00\x00\x00\x66\x0f\x6e\
            \xc0\x66\x0f\xf7\xc1\xb8\x11\x00\x00\x00\xf4",
        ),
        (
            "xchg",
            b"\xb1\x22\x86\x0d\x01\x00\x00\x00\xb8\x11\x00\x00\x00\xf4",
        ),
        (
            "lock cmpxchg16b",
            b"\x48\x8d\x3d\x19\x00\x00\x00\x48\x8b\x07\x48\x8b\x57\x08\x48\xbb\xb8\x22\x00\x00\x00\xf4\x90\x90\
            \x48\x89\xd1\xf0\x48\x0f\xc7\x0f\xb8\x11\x00\x00\x00\xf4\x90\x90\x90\x90\x90\x90\x90\x90\x90\x90",
        ),
        (
            "fstp",
            b"\xd9\x05\x0c\x00\x00\x00\xd9\x1d\x01\x00\x00\x00\xb8\x11\x00\x00\x00\xf4\x22\x00\x80\x3f",
        ),
    ] {
        let mut guest = Guest::long(code);
        assert_eq!(guest.cpu.run(), Exit::Halt, "{name}");
        assert_eq!(guest.gpr(0) & 0xffff, 0x22, "{name}");
    }
}

#[test]
fn a_loop_that_counts_in_its_own_code_counts_right() {
    // xor ebx,ebx; l: inc byte [n+1]; n: mov eax,0; add ebx,eax; cmp eax,100; jne l; hlt
    let mut guest = Guest::long(
        b"\x31\xdb\xfe\x05\x01\x00\x00\x00\xb8\x00\x00\x00\x00\x01\xc3\x83\xf8\x64\x75\xee\xf4",
    );
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.gpr(3), 5050);
}

#[test]
fn code_that_is_written_at_another_address_runs_as_new_code_at_once() {
    // mov byte [0x21009],0x22; mov eax,0x11; hlt
    let code = b"\xc6\x04\x25\x09\x10\x02\x00\x22\xb8\x11\x00\x00\x00\xf4";
    // The guest's tables lead to the same frame.
    let mut guest = Guest::long(code);
    guest.write_u64(0x8000 + 0x21 * 8, 0x1000 | 7);
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.gpr(0), 0x22, "another linear address");
    // Another frame's memory is the same.
    let mut guest = Guest::long(code);
    guest.arena.alias(0x21, 1);
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.gpr(0), 0x22, "another physical address");
}

#[test]
fn data_beside_code_is_written_without_looking_at_the_code_again() {
    // l: mov [rdi],ecx; lock inc dword [rdi+8]; dec ecx; jnz l; hlt
    let mut guest = Guest::long(b"\x89\x0f\xf0\xff\x47\x08\xff\xc9\x75\xf6\xf4");
    for (place, in_code) in [(0x1040, false), (0x1020, true)] {
        guest.set(0x1000, |registers| {
            (registers.gpr[1], registers.gpr[7]) = (10_000, place)
        });
        let before = guest.cpu.counters();
        assert_eq!(guest.cpu.run(), Exit::Halt);
        let after = guest.cpu.counters();
        assert!(
            after.tlb_misses - before.tlb_misses < 10,
            "no walk for each"
        );
        // A block ends early where code may have changed.
        let blocks = after.blocks - before.blocks;
        assert_eq!(blocks > 15_000, in_code, "{blocks} blocks");
        assert_eq!(guest.read_u64(place as usize) as u32, 1);
        assert_eq!(guest.read_u64(place as usize + 8) as u32, 10_000);
    }
}

#[test]
fn code_changes_with_the_page_that_an_address_means() {
    // call 0x14000; mov ebx,eax; mov qword [0x80a0],0x15007; invlpg [0x14000]; call 0x14000; hlt
    let mut guest = Guest::long(
        b"\xe8\xfb\x2f\x01\x00\x89\xc3\x48\xc7\x04\x25\xa0\x80\x00\x00\x07\x50\x01\x00\x0f\x01\x3c\x25\
        \x00\x40\x01\x00\xe8\xe0\x2f\x01\x00\xf4",
    );
    // mov eax,0x11; ret
    guest.write(0x1_4000, b"\xb8\x11\x00\x00\x00\xc3");
    guest.write(0x1_5000, b"\xb8\x22\x00\x00\x00\xc3");
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!((guest.gpr(3), guest.gpr(0)), (0x11, 0x22));
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
