//! Exceptions, interrupts, stepping.

use crate::guest::Guest;
use twofold_cpu::{DebugControl, Exception, Exit};

#[test]
fn a_page_fault_pushes_its_error_code_and_sets_cr2() {
    // mov [0x300000],rax (not mapped)
    let mut guest = Guest::long(b"\x48\x89\x04\x25\x00\x00\x30\x00\xf4");
    assert_eq!(guest.cpu.run(), Exit::Halt);
    let registers = guest.cpu.registers();
    assert_eq!(registers.rip, 0x700f);
    assert_eq!(registers.gpr[4], 0xffd0);
    assert_eq!(guest.cpu.system_registers().cr2, 0x30_0000);
    // Error code, RIP, CS, RFLAGS, RSP, SS.
    assert_eq!(guest.read_u64(0xffd0), 2);
    assert_eq!(guest.read_u64(0xffd8), 0x1000);
    assert_eq!(guest.read_u64(0xffe0), 8);
    assert_eq!(guest.read_u64(0xfff0), 0x1_0000);
    assert_eq!(guest.read_u64(0xfff8), 0x10);
}

#[test]
fn an_exception_in_user_code_switches_to_the_stack_of_the_tss_and_returns() {
    // ud2; hlt-in-user is #GP, so: ud2 then int 0x80
    let mut guest = Guest::user(b"\x0f\x0b\xcd\x80");
    guest.write(0x7006, b"\x83\x04\x24\x02\x48\xcf");
    guest.write(0x7000 + 6, b"\x48\x83\x04\x24\x02\x48\xcf");
    assert_eq!(guest.cpu.run(), Exit::Halt);
    let registers = guest.cpu.registers();
    assert_eq!(registers.rip, 0x7081);
    assert_eq!(registers.gpr[4], 0x1_f000 - 40);
    let system = guest.cpu.system_registers();
    assert_eq!(
        (system.cs.selector, system.ss.selector, system.ss.dpl),
        (8, 0, 0)
    );
    assert_eq!(guest.read_u64(0x1_f000 - 40), 0x1004);
    assert_eq!(guest.read_u64(0x1_f000 - 32), 0x23);
    assert_eq!(guest.read_u64(0x1_f000 - 8), 0x1b);
}

#[test]
fn without_an_idt_an_exception_is_a_shutdown() {
    let mut guest = Guest::long(b"\x0f\x0b");
    let mut system = guest.cpu.system_registers();
    system.idt.limit = 0;
    guest.cpu.set_system_registers(&system);
    assert_eq!(guest.cpu.run(), Exit::Shutdown);
    assert_eq!(guest.cpu.registers().rip, 0x1000);
}

#[test]
fn a_fault_while_delivering_a_page_fault_is_a_double_fault() {
    let mut guest = Guest::long(b"\x48\x8b\x04\x25\x00\x00\x30\x00\xf4");
    // The gate of #PF is not present.
    guest.write_u64(0x6000 + 14 * 16, 0);
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.cpu.registers().rip, 0x7009);
    assert_eq!(guest.read_u64(guest.gpr(4) as usize), 0);
}

#[test]
fn single_steps_leave_after_each_instruction() {
    // mov eax,1; inc eax; nop; hlt
    let mut guest = Guest::long(b"\xb8\x01\x00\x00\x00\xff\xc0\x90\xf4");
    guest.cpu.set_debug_control(&DebugControl {
        single_step: true,
        ..DebugControl::default()
    });
    for pc in [0x1005, 0x1007, 0x1008] {
        match guest.cpu.run() {
            Exit::Debug {
                exception: 1,
                pc: found,
                dr6,
                dr7: 0x400,
            } => {
                assert_eq!(found, pc);
                assert_eq!(dr6 & 0xffff, 0x4ff0);
            }
            exit => panic!("{exit:?}"),
        }
        assert_eq!(guest.cpu.registers().rip, pc);
    }
    guest.cpu.set_debug_control(&DebugControl::default());
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.gpr(0), 2);
}

#[test]
fn the_trap_flag_raises_a_debug_exception_after_the_next_instruction() {
    // pushf; or word [rsp],0x100; popf; nop; nop
    let mut guest = Guest::long(b"\x9c\x66\x81\x0c\x24\x00\x01\x9d\x90\x90\xf4");
    assert_eq!(guest.cpu.run(), Exit::Halt);
    let registers = guest.cpu.registers();
    assert_eq!(registers.rip, 0x7002);
    assert_eq!(guest.read_u64(registers.gpr[4] as usize), 0x1009);
    assert_eq!(guest.cpu.debug_registers().dr6 & 0x4000, 0x4000);
    assert_eq!(registers.rflags & 0x100, 0);
}

#[test]
fn lowering_cr8_is_told_to_who_asked_for_it() {
    // mov eax,7; mov cr8,rax; mov cr8,rax; mov eax,5; mov cr8,rax; hlt
    let mut guest = Guest::long(
        b"\xb8\x07\x00\x00\x00\x44\x0f\x22\xc0\x44\x0f\x22\xc0\
          \xb8\x05\x00\x00\x00\x44\x0f\x22\xc0\xf4",
    );
    guest.cpu.set_cr8_exits(true);
    assert_eq!(guest.cpu.run(), Exit::TaskPriority);
    assert_eq!((guest.cpu.registers().rip, guest.cpu.cr8()), (0x1016, 5));
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.cpu.counters().instructions, 6);
}

#[test]
fn an_interrupt_that_cr8_holds_back_is_asked_for_when_cr8_has_fallen() {
    // sti; nop; xor eax,eax; mov cr8,rax; nop; hlt
    let code = b"\xfb\x90\x31\xc0\x44\x0f\x22\xc0\x90\xf4";
    for (limit, rip) in [(None, 0x1002), (Some(5), 0x1008)] {
        let mut guest = Guest::long(code);
        guest.cpu.set_cr8(5);
        guest.cpu.request_interrupt_window(true);
        guest.cpu.limit_interrupt_window(limit);
        assert_eq!(guest.cpu.run(), Exit::InterruptWindow);
        assert_eq!(guest.cpu.registers().rip, rip);
    }
}

#[test]
fn an_interrupt_waits_for_the_instruction_after_sti() {
    // cli; sti; inc rax; inc rax; hlt
    let mut guest = Guest::long(b"\xfa\xfb\x48\xff\xc0\x48\xff\xc0\xf4");
    guest.cpu.request_interrupt_window(true);
    assert!(!guest.cpu.interrupt_window_open());
    assert_eq!(guest.cpu.run(), Exit::InterruptWindow);
    assert_eq!(guest.cpu.registers().rip, 0x1005);
    assert_eq!(guest.gpr(0), 1);
    assert!(guest.cpu.interrupt_window_open());
    guest.cpu.request_interrupt_window(false);
    guest.cpu.inject_interrupt(0x40);
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.cpu.registers().rip, 0x7041);
    assert_eq!(guest.read_u64(guest.gpr(4) as usize), 0x1005);
}

#[test]
fn a_second_nmi_waits_for_iret() {
    // nop; hlt; handler: inc rax; iretq
    let mut guest = Guest::long(b"\x90\xf4");
    guest.write(
        0x7002,
        b"\x48\xff\xc0\x48\x83\xf8\x02\x74\x02\xf4\x90\x48\xcf",
    );
    guest.cpu.inject_nmi();
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!((guest.gpr(0), guest.cpu.registers().rip), (1, 0x700c));
    guest.cpu.inject_nmi();
    assert!(guest.cpu.events().nmi_masked);
    // nop; iretq of the first; the second is delivered at once and returns to where the first did.
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!((guest.gpr(0), guest.cpu.registers().rip), (2, 0x1002));
    assert!(!guest.cpu.events().nmi_masked);
}

#[test]
fn a_queued_exception_is_delivered_first() {
    let mut guest = Guest::long(b"\x90\xf4");
    guest.cpu.queue_exception(Exception {
        vector: 6,
        error_code: None,
        payload: None,
    });
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.cpu.registers().rip, 0x7007);
}
