//! Exits to the hypervisor and what completes them.

use crate::guest::{Guest, run_with_mmio};
use twofold_arch::Gpa;
use twofold_cpu::Exit;

#[test]
fn real_mode_adds_prints_and_halts() {
    // add al,bl; mov dx,0x3f8; add al,'0'; out dx,al; hlt
    let mut guest = Guest::real(b"\x00\xd8\xba\xf8\x03\x04\x30\xee\xf4");
    guest.set(0x1000, |registers| {
        registers.gpr[0] = 2;
        registers.gpr[3] = 3;
    });
    assert_eq!(
        guest.cpu.run(),
        Exit::Io {
            port: 0x3f8,
            size: 1,
            write: true,
            count: 1
        }
    );
    assert_eq!(guest.cpu.io_data(), b"5");
    assert_eq!(guest.cpu.registers().rip, 0x1007);
    assert!(guest.cpu.has_pending_completion());
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.cpu.registers().rip, 0x1009);
}

#[test]
fn a_port_read_is_completed_before_a_kick_is_answered() {
    // in al,dx; inc rbx; hlt
    let mut guest = Guest::long(b"\xec\x48\xff\xc3\xf4");
    assert_eq!(
        guest.cpu.run(),
        Exit::Io {
            port: 0,
            size: 1,
            write: false,
            count: 1
        }
    );
    assert_eq!(guest.cpu.registers().rip, 0x1000);
    guest.cpu.complete_io_in(&[0xab]);
    guest.cpu.line().kick();
    assert_eq!(guest.cpu.run(), Exit::Kicked);
    assert_eq!(guest.cpu.registers().rip, 0x1001);
    assert_eq!(guest.gpr(0), 0xab);
    assert_eq!(guest.gpr(3), 0);
    guest.cpu.line().cancel_kick();
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.gpr(3), 1);
}

#[test]
fn a_port_read_is_not_completed_if_rip_was_moved() {
    let mut guest = Guest::long(b"\xec\xf4\x90\xf4");
    assert!(matches!(guest.cpu.run(), Exit::Io { .. }));
    guest.cpu.complete_io_in(&[0xab]);
    guest.set(0x1002, |_| {});
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.cpu.registers().rip, 0x1004);
    assert_eq!(guest.gpr(0), 0);
}

#[test]
fn string_input_stores_as_many_items_as_the_registers_say_on_reentry() {
    // cld; rep insb; hlt
    let mut guest = Guest::long(b"\xfc\xf3\x6c\xf4");
    guest.set(0x1000, |registers| {
        registers.gpr[1] = 3;
        registers.gpr[2] = 0x80;
        registers.gpr[7] = 0x1_0ffe;
    });
    // Two bytes to the end of the page.
    assert_eq!(
        guest.cpu.run(),
        Exit::Io {
            port: 0x80,
            size: 1,
            write: false,
            count: 2
        }
    );
    assert_eq!(guest.gpr(1), 3);
    guest.cpu.complete_io_in(&[1, 2]);
    assert_eq!(
        guest.cpu.run(),
        Exit::Io {
            port: 0x80,
            size: 1,
            write: false,
            count: 1
        }
    );
    assert_eq!((guest.gpr(1), guest.gpr(7)), (1, 0x1_1000));
    guest.cpu.complete_io_in(&[3]);
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.read_u64(0x1_0ffe) & 0xff_ffff, 0x03_0201);
    // The program makes it one.
    guest.set(0x1000, |registers| {
        registers.gpr[1] = 2;
        registers.gpr[7] = 0x1_0000;
    });
    assert!(matches!(guest.cpu.run(), Exit::Io { count: 2, .. }));
    guest.cpu.complete_io_in(&[7, 8]);
    let mut registers = guest.cpu.registers();
    registers.gpr[1] = 1;
    guest.cpu.set_registers(&registers);
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!((guest.gpr(1), guest.gpr(7)), (0, 0x1_0001));
}

#[test]
fn string_output_reads_its_batch_first_and_advances_on_reentry() {
    // rep outsw; hlt
    let mut guest = Guest::long(b"\x66\xf3\x6f\xf4");
    guest.write(0x1_0000, b"abcdef");
    guest.set(0x1000, |registers| {
        registers.gpr[1] = 3;
        registers.gpr[2] = 0x99;
        registers.gpr[6] = 0x1_0000;
    });
    assert_eq!(
        guest.cpu.run(),
        Exit::Io {
            port: 0x99,
            size: 2,
            write: true,
            count: 3
        }
    );
    assert_eq!(guest.cpu.io_data(), b"abcdef");
    assert_eq!(guest.gpr(1), 3);
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!((guest.gpr(1), guest.gpr(6)), (0, 0x1_0006));
}

#[test]
fn emulated_memory_is_read_and_written_around_the_hypervisor() {
    // mov rax,[rbx]; add rax,1; mov [rbx+8],rax; add dword [rbx],5; hlt
    let mut guest = Guest::long(b"\x48\x8b\x03\x48\x83\xc0\x01\x48\x89\x43\x08\x83\x03\x05\xf4");
    guest.map(0x30, false);
    guest.set(0x1000, |registers| registers.gpr[3] = 0x3_0010);
    assert_eq!(
        run_with_mmio(&mut guest),
        Exit::MmioRead {
            gpa: Gpa::new(0x3_0010),
            len: 8
        }
    );
    assert_eq!(guest.cpu.registers().rip, 0x1000);
    guest.cpu.complete_mmio_read(&41u64.to_le_bytes());
    let data = 42u64.to_le_bytes();
    assert_eq!(
        run_with_mmio(&mut guest),
        Exit::MmioWrite {
            gpa: Gpa::new(0x3_0018),
            len: 8,
            data
        }
    );
    assert_eq!(guest.cpu.registers().rip, 0x100b);
    assert_eq!(
        run_with_mmio(&mut guest),
        Exit::MmioRead {
            gpa: Gpa::new(0x3_0010),
            len: 4
        }
    );
    guest.cpu.complete_mmio_read(&7u32.to_le_bytes());
    match run_with_mmio(&mut guest) {
        Exit::MmioWrite { gpa, len: 4, data } => {
            assert_eq!(gpa, Gpa::new(0x3_0010));
            assert_eq!(data[..4], 12u32.to_le_bytes());
        }
        exit => panic!("{exit:?}"),
    }
    assert_eq!(run_with_mmio(&mut guest), Exit::Halt);
}

#[test]
fn a_read_of_emulated_memory_completes_before_a_kick_is_answered() {
    let mut guest = Guest::long(b"\x48\x8b\x03\x48\xff\xc0\xf4");
    guest.map(0x30, false);
    guest.set(0x1000, |registers| registers.gpr[3] = 0x3_0010);
    assert!(matches!(run_with_mmio(&mut guest), Exit::MmioRead { .. }));
    guest.cpu.complete_mmio_read(&41u64.to_le_bytes());
    guest.cpu.line().kick();
    assert_eq!(guest.cpu.run(), Exit::Kicked);
    assert_eq!(guest.gpr(0), 41);
    assert_eq!(guest.cpu.registers().rip, 0x1003);
}

#[test]
fn msrs_of_the_hypervisor_are_asked_for() {
    // rdmsr; wrmsr; hlt
    let mut guest = Guest::long(b"\x0f\x32\x0f\x30\xf4");
    guest.set(0x1000, |registers| {
        registers.gpr[1] = 0x1b;
        registers.gpr[4] = 0x1_0000;
    });
    assert_eq!(guest.cpu.run(), Exit::Rdmsr { index: 0x1b });
    guest.cpu.complete_rdmsr(Some(0x1_fee0_0900));
    assert_eq!(
        guest.cpu.run(),
        Exit::Wrmsr {
            index: 0x1b,
            value: 0x1_fee0_0900
        }
    );
    guest.cpu.complete_wrmsr(false);
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.cpu.registers().rip, 0x700e);
}

#[test]
fn repeated_strings_stop_for_a_kick_and_go_on() {
    // rep stosb over 64 KiB; hlt
    let mut guest = Guest::long(b"\xf3\xaa\xf4");
    guest.set(0x1000, |registers| {
        registers.gpr[0] = 0x5a;
        registers.gpr[1] = 0x1_0000;
        registers.gpr[7] = 0x2_0000;
    });
    guest.cpu.line().kick();
    assert_eq!(guest.cpu.run(), Exit::Kicked);
    guest.cpu.line().cancel_kick();
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!((guest.gpr(1), guest.gpr(7)), (0, 0x3_0000));
    assert_eq!(guest.read_u64(0x2_fff8), 0x5a5a_5a5a_5a5a_5a5a);
}

#[test]
fn a_refused_wrmsr_is_a_general_protection_fault_and_the_handler_may_skip_it() {
    // mov ecx,0x123; wrmsr; rdmsr; hlt
    let mut guest = Guest::long(b"\xb9\x23\x01\x00\x00\x0f\x30\x0f\x32\xf4");
    // #GP: add qword [rsp+8],2; add rsp,8; iretq
    guest.write(0x700d, b"\x48\x83\x44\x24\x08\x02\x48\x83\xc4\x08\x48\xcf");
    for all in [false, true] {
        guest.set(0x1000, |registers| registers.gpr[4] = 0x1_0000);
        guest.cpu.set_msr_exits(all);
        let write = Exit::Wrmsr {
            index: 0x123,
            value: 0,
        };
        assert_eq!(guest.cpu.run(), write);
        guest.cpu.complete_wrmsr(false);
        // The handler's stack is not mapped at first: the answer is not forgotten meanwhile.
        guest.map(0xf, false);
        guest.cpu.machine().flush_tlbs();
        assert!(matches!(guest.cpu.run(), Exit::SecondStage(_)));
        guest.map(0xf, true);
        assert_eq!(guest.cpu.run(), Exit::Rdmsr { index: 0x123 });
        guest.cpu.complete_rdmsr(Some(5 << 32 | 6));
        assert_eq!(guest.cpu.run(), Exit::Halt);
        assert_eq!((guest.gpr(0), guest.gpr(2)), (6, 5));
    }
}
