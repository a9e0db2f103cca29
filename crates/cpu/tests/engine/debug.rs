//! Debug registers: what stops a guest, when, and what DR6 and the saved flags say.

use crate::guest::Guest;
use twofold_cpu::{DebugControl, DebugRegisters, Exit};

/// RFLAGS.RF.
const RF: u64 = 1 << 16;

/// DR7 that arms breakpoint `i` with the given R/W and LEN fields.
fn arm(i: u32, kind: u64, length: u64) -> u64 {
    0x400 | 1 << (2 * i) | kind << (16 + 4 * i) | length << (18 + 4 * i)
}

fn set(guest: &mut Guest, db: [u64; 4], dr7: u64) {
    guest.cpu.set_debug_registers(&DebugRegisters {
        db,
        dr7,
        ..DebugRegisters::default()
    });
}

fn from_outside(guest: &mut Guest, db: [u64; 4], dr7: u64) {
    guest.cpu.set_debug_control(&DebugControl {
        hardware_breakpoints: Some((db, dr7)),
        ..DebugControl::default()
    });
}

/// Runs into the handler of #DB: saved RIP, saved RFLAGS, DR6.
fn debug_exception(guest: &mut Guest) -> (u64, u64, u64) {
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.cpu.registers().rip, 0x7002, "the handler of #DB");
    let frame = guest.gpr(4) as usize;
    let dr6 = guest.cpu.debug_registers().dr6;
    (guest.read_u64(frame), guest.read_u64(frame + 16), dr6)
}

#[test]
fn a_breakpoint_on_an_instruction_is_a_fault_before_it_and_iret_with_rf_goes_on() {
    // inc eax; inc eax; inc eax; ud2
    let mut guest = Guest::long(b"\xff\xc0\xff\xc0\xff\xc0\x0f\x0b");
    set(&mut guest, [0, 0x1002, 0, 0], arm(1, 0, 0));
    let (rip, flags, dr6) = debug_exception(&mut guest);
    assert_eq!((rip, flags & RF, dr6), (0x1002, 0, 0xffff_0ff2));
    assert_eq!(guest.gpr(0), 1);
    // The handler goes on at 0x7060: or dword [rsp+18],1 (RF); iretq
    guest.write(0x7002, b"\xeb\x5c");
    guest.write(0x7060, b"\x83\x4c\x24\x12\x01\x48\xcf");
    assert_eq!(guest.cpu.run(), Exit::Halt);
    // #UD at the end, without a second stop.
    assert_eq!(guest.cpu.registers().rip, 0x7007);
    assert_eq!(guest.gpr(0), 3);
    let frame = guest.gpr(4) as usize;
    assert_eq!(guest.read_u64(frame), 0x1006);
    assert_eq!(guest.read_u64(frame + 16) & RF, RF, "a fault saves RF set");
}

#[test]
fn rf_counts_for_one_instruction_only() {
    // loop: inc eax; jmp loop
    let mut guest = Guest::long(b"\xff\xc0\xeb\xfc");
    set(&mut guest, [0x1000, 0, 0, 0], arm(0, 0, 0));
    guest.set(0x1000, |registers| {
        registers.gpr[4] = 0x1_0000;
        registers.rflags |= RF;
    });
    let (rip, flags, _) = debug_exception(&mut guest);
    assert_eq!((rip, flags & RF), (0x1000, 0));
    assert_eq!(guest.gpr(0), 1);
}

#[test]
fn a_breakpoint_on_data_is_a_trap_after_the_access_and_knows_its_kind_and_size() {
    // mov eax,[0x20004]; mov [0x20008],al; mov [0x20003],al; hlt
    let code =
        b"\x8b\x04\x25\x04\x00\x02\x00\x88\x04\x25\x08\x00\x02\x00\x88\x04\x25\x03\x00\x02\x00\xf4";
    let stops = |kind: u64, length: u64, address: u64| {
        let mut guest = Guest::long(code);
        set(&mut guest, [0, 0, 0, address], arm(3, kind, length));
        assert_eq!(guest.cpu.run(), Exit::Halt);
        if guest.cpu.registers().rip == 0x1016 {
            return None;
        }
        let frame = guest.gpr(4) as usize;
        assert_eq!(guest.cpu.debug_registers().dr6, 0xffff_0ff8);
        Some(guest.read_u64(frame))
    };
    const WRITE: u64 = 1;
    const ACCESS: u64 = 3;
    const ONE: u64 = 0;
    const TWO: u64 = 1;
    const EIGHT: u64 = 2;
    const FOUR: u64 = 3;
    assert_eq!(stops(ACCESS, ONE, 0x2_0007), Some(0x1007));
    assert_eq!(stops(WRITE, ONE, 0x2_0007), None);
    assert_eq!(stops(WRITE, FOUR, 0x2_0004), None);
    assert_eq!(stops(WRITE, ONE, 0x2_0008), Some(0x100e));
    assert_eq!(stops(WRITE, EIGHT, 0x2_0008), Some(0x100e));
    assert_eq!(stops(WRITE, EIGHT, 0x2_0000), Some(0x1015));
    assert_eq!(stops(WRITE, TWO, 0x2_0002), Some(0x1015));
    assert_eq!(stops(WRITE, TWO, 0x2_0000), None);
    // The low bits of the address are ignored.
    assert_eq!(stops(WRITE, FOUR, 0x2_000b), Some(0x100e));
}

#[test]
fn a_page_that_was_cached_before_is_watched_from_the_next_instruction_on() {
    // mov [0x20000],eax; mov rax,0x20000; mov dr0,rax; mov eax,0x90401; mov dr7,rax;
    // mov [0x20000],eax; hlt
    let code: &[u8] = b"\x89\x04\x25\x00\x00\x02\x00\x48\xc7\xc0\x00\x00\x02\x00\x0f\x23\xc0\
        \xb8\x01\x04\x0d\x00\x0f\x23\xf8\x89\x04\x25\x00\x00\x02\x00\xf4";
    let mut guest = Guest::long(code);
    let (rip, _, dr6) = debug_exception(&mut guest);
    assert_eq!((rip, dr6), (0x1020, 0xffff_0ff1));
}

#[test]
fn a_repeated_instruction_stops_behind_the_iteration_that_matched() {
    // rep movsb; hlt
    let mut guest = Guest::long(b"\xf3\xa4\xf4");
    guest.set(0x1000, |registers| {
        registers.gpr[4] = 0x1_0000;
        registers.gpr[1] = 0x100;
        registers.gpr[6] = 0x2_0000;
        registers.gpr[7] = 0x2_1000;
    });
    set(&mut guest, [0x2_1020, 0, 0, 0], arm(0, 1, 0));
    let (rip, flags, _) = debug_exception(&mut guest);
    assert_eq!(rip, 0x1000);
    assert_eq!(flags & RF, RF, "between iterations RF is saved set");
    assert_eq!((guest.gpr(1), guest.gpr(7)), (0x100 - 0x21, 0x2_1021));
    guest.write(0x7002, b"\x48\xcf");
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.cpu.registers().rip, 0x1003);
    assert_eq!(guest.gpr(1), 0);
}

#[test]
fn mov_ss_puts_a_trap_off_by_one_instruction() {
    // mov ss,[0x20000]; inc eax; inc eax; hlt
    let mut guest = Guest::long(b"\x8e\x14\x25\x00\x00\x02\x00\xff\xc0\xff\xc0\xf4");
    guest.write(0x2_0000, &[0x10, 0]);
    set(&mut guest, [0x2_0000, 0, 0, 0], arm(0, 3, 0));
    let (rip, ..) = debug_exception(&mut guest);
    assert_eq!((rip, guest.gpr(0)), (0x1009, 1));
}

#[test]
fn general_detect_stops_before_a_debug_register_is_touched() {
    // mov rax,dr0; hlt
    let mut guest = Guest::long(b"\x0f\x21\xc0\xf4");
    set(&mut guest, [0x1234, 0, 0, 0], 0x400 | 1 << 13);
    let (rip, _, dr6) = debug_exception(&mut guest);
    assert_eq!((rip, dr6, guest.gpr(0)), (0x1000, 0xffff_2ff0, 0));
    assert_eq!(
        guest.cpu.debug_registers().dr7,
        0x400,
        "off for the handler"
    );
}

#[test]
fn a_breakpoint_on_a_port_needs_debugging_extensions() {
    for extensions in [false, true] {
        // out 0x22,al; nop; hlt
        let mut guest = Guest::long(b"\xe6\x22\x90\xf4");
        let mut system = guest.cpu.system_registers();
        system.cr4 |= u64::from(extensions) << 3;
        guest.cpu.set_system_registers(&system);
        set(&mut guest, [0x20, 0, 0, 0], arm(0, 2, 3));
        assert!(matches!(guest.cpu.run(), Exit::Io { port: 0x22, .. }));
        if extensions {
            assert_eq!(debug_exception(&mut guest).0, 0x1002);
        } else {
            assert_eq!(guest.cpu.run(), Exit::Halt);
            assert_eq!(guest.cpu.registers().rip, 0x1004);
        }
    }
}

#[test]
fn the_hypervisors_breakpoints_take_the_place_of_the_guests() {
    // inc eax; inc eax; mov [0x20000],eax; hlt
    let mut guest = Guest::long(b"\xff\xc0\xff\xc0\x89\x04\x25\x00\x00\x02\x00\xf4");
    set(&mut guest, [0x1000, 0, 0, 0], arm(0, 0, 0));
    let dr7 = arm(2, 0, 0) | arm(0, 1, 3);
    from_outside(&mut guest, [0x2_0000, 0, 0x1002, 0], dr7);
    let stopped = |pc: u64, dr6: u64| Exit::Debug {
        exception: 1,
        pc,
        dr6,
        dr7,
    };
    assert_eq!(guest.cpu.run(), stopped(0x1002, 0xffff_0ff4));
    assert_eq!(guest.cpu.run(), stopped(0x1002, 0xffff_0ff4), "still there");
    let mut registers = guest.cpu.registers();
    registers.rflags |= RF;
    guest.cpu.set_registers(&registers);
    assert_eq!(guest.cpu.run(), stopped(0x100b, 0xffff_0ff1));
    assert_eq!(guest.cpu.registers().rflags & RF, 0);
    assert_eq!(guest.gpr(0), 2);
    assert_eq!(
        guest.cpu.debug_registers().db[0],
        0x1000,
        "the guest's registers are its own"
    );
    guest.cpu.set_debug_control(&DebugControl::default());
    assert_eq!(guest.cpu.run(), Exit::Halt);
}

#[test]
fn a_step_over_an_instruction_that_the_hypervisor_completes_is_reported_once() {
    // out 0x22,al; nop; hlt
    let mut guest = Guest::long(b"\xe6\x22\x90\xf4");
    guest.cpu.set_debug_control(&DebugControl {
        single_step: true,
        ..DebugControl::default()
    });
    assert!(matches!(guest.cpu.run(), Exit::Io { .. }));
    for pc in [0x1002, 0x1003] {
        assert!(matches!(guest.cpu.run(), Exit::Debug { pc: found, .. } if found == pc));
    }
}

#[test]
fn a_software_interrupt_takes_the_place_of_the_step_trap() {
    // int 0x40, with TF set; the handler is a HLT
    let mut guest = Guest::long(b"\xcd\x40");
    guest.set(0x1000, |registers| {
        registers.gpr[4] = 0x1_0000;
        registers.rflags |= 0x100;
    });
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.cpu.registers().rip, 0x7041);
}

#[test]
fn an_nmi_that_waits_is_not_delivered_while_interrupts_are_blocked() {
    let mut guest = Guest::long(b"\x90\x90\xf4");
    guest.cpu.inject_nmi();
    let mut control = DebugControl {
        single_step: true,
        block_interrupts: true,
        ..DebugControl::default()
    };
    guest.cpu.set_debug_control(&control);
    assert!(matches!(guest.cpu.run(), Exit::Debug { pc: 0x1001, .. }));
    control.block_interrupts = false;
    guest.cpu.set_debug_control(&control);
    assert!(matches!(guest.cpu.run(), Exit::Halt));
    assert_eq!(guest.cpu.registers().rip, 0x7003);
}

#[test]
fn icebp_raises_a_debug_exception_or_stops_for_a_debugger() {
    let mut guest = Guest::long(b"\xf1\xf4");
    assert_eq!(debug_exception(&mut guest).0, 0x1001);
    let mut guest = Guest::long(b"\xf1\xf4");
    from_outside(&mut guest, [0; 4], 0x400);
    let stopped = Exit::Debug {
        exception: 1,
        pc: 0x1000,
        dr6: 0xffff_0ff0,
        dr7: 0x400,
    };
    assert_eq!(guest.cpu.run(), stopped);
}
