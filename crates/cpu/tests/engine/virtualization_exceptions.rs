//! #VE delivered to a guest's handler.

use crate::guest::Guest;
use twofold_arch::Gpa;
use twofold_cpu::{Exit, SecondStageFault, VeInfo, reason};

/// The page that describes a #VE.
const INFO: u64 = 0x3_f000;
/// A page of data.
const DATA: u64 = 0x1_8000;
/// The handler of vector 20, which is HLT.
const HANDLER: u64 = 0x7014;

/// mov [rax],bl; hlt
const STORE: &[u8] = b"\x88\x18\xf4";

fn storing(code: &[u8]) -> Guest {
    let mut guest = Guest::long(code);
    guest.enable_ve(INFO);
    guest.set(0x1000, |registers| {
        registers.gpr[0] = DATA;
        registers.gpr[3] = 0x5a;
        registers.gpr[4] = 0x1_0000;
    });
    guest.map(DATA >> 12, false);
    guest
}

#[test]
fn the_handler_runs_as_for_a_fault_without_error_code_and_may_try_again() {
    let mut guest = storing(STORE);
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.cpu.rip(), HANDLER + 1);
    // SS, RSP, RFLAGS, CS and RIP: five words.
    assert_eq!(guest.gpr(4), 0x1_0000 - 5 * 8);
    assert_eq!(guest.read_u64(0x1_0000 - 5 * 8), 0x1000);
    assert_eq!(guest.cpu.system_registers().cr2, 0);
    let info = guest.cpu.take_ve().unwrap();
    assert_eq!((info.reason, info.gpa.get(), info.gla), (48, DATA, DATA));
    // What the handler mapped can be accessed.
    guest.map(DATA >> 12, true);
    guest.write(HANDLER as usize + 1, b"\x48\xcf");
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.cpu.rip(), 0x1003);
    assert_eq!(guest.read_u64(DATA as usize) & 0xff, 0x5a);
}

#[test]
fn a_violation_before_the_information_is_taken_leaves_the_guest() {
    let mut guest = storing(STORE);
    guest.write(HANDLER as usize, STORE);
    let exit = guest.cpu.run();
    assert!(
        matches!(
            exit,
            Exit::SecondStage(SecondStageFault::EptViolation { gpa, .. }) if gpa == Gpa::new(DATA)
        ),
        "{exit:?}"
    );
    assert_eq!(guest.cpu.rip(), HANDLER, "the handler's first instruction");
}

#[test]
fn while_an_event_is_delivered_there_is_no_exception() {
    // An interrupt by software, a fault, and an interrupt from outside meet a stack, an IDT, a GDT
    // or a handler without memory.
    for (code, event) in [(&b"\xcd\x80\xf4"[..], "int"), (b"\x0f\x0b\xf4", "ud2")] {
        for (frame, what) in [(0xf, "stack"), (6, "idt"), (5, "gdt")] {
            let mut guest = storing(code);
            guest.map(frame, false);
            let exit = guest.cpu.run();
            assert!(
                matches!(
                    exit,
                    Exit::SecondStage(SecondStageFault::EptViolation { .. })
                ),
                "{event} {what}: {exit:?}"
            );
            assert_eq!(guest.cpu.take_ve(), None);
            // With memory there the event is delivered.
            guest.map(frame, true);
            assert_eq!(guest.cpu.run(), Exit::Halt, "{event} {what}");
        }
    }
    let mut guest = storing(STORE);
    guest.map(0xf, false);
    guest.cpu.inject_interrupt(0x30);
    assert!(matches!(guest.cpu.run(), Exit::SecondStage(_)));
    assert_eq!(guest.cpu.take_ve(), None);
}

#[test]
fn the_handlers_code_may_itself_be_without_memory_after_the_delivery() {
    // The event has been delivered when the first instruction is fetched.
    let mut guest = storing(b"\x0f\x0b\xf4");
    // #UD is handled in a page of its own.
    guest.write_u64(0x6000 + 6 * 16, 0x1_9000 | 8 << 16 | 0x8e00 << 32);
    guest.write_u64(0x6000 + 6 * 16, {
        let handler = 0x1_9000u64;
        handler & 0xffff | 8 << 16 | 0x8e00 << 32 | handler >> 16 << 48
    });
    guest.map(0x19, false);
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.cpu.rip(), HANDLER + 1);
    let info = guest.cpu.take_ve().unwrap();
    assert_eq!(info.gpa.get(), 0x1_9000);
}

#[test]
fn real_mode_never_sees_one() {
    // mov [0x8000],al; hlt
    let mut guest = Guest::real(b"\xa2\x00\x80\xf4");
    guest.enable_ve(INFO);
    guest.map(8, false);
    assert!(matches!(guest.cpu.run(), Exit::SecondStage(_)));
}

#[test]
fn an_injected_one_is_delivered_at_the_instruction_it_is_about() {
    let mut guest = storing(STORE);
    let info = VeInfo::of_instruction(reason::HLT, 0, 1);
    guest.cpu.inject_ve(&info).unwrap();
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.cpu.rip(), HANDLER + 1);
    assert_eq!(guest.read_u64(0x1_0000 - 5 * 8), 0x1000);
    assert_eq!(guest.cpu.take_ve(), Some(info));
}
