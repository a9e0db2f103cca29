//! A processor that runs a TD: TDCALL, and instructions that a TD does not execute by itself.

use crate::guest::Guest;
use twofold_cpu::{CpuidEntry, Exit, reason};

/// tdcall; hlt
const TDCALL: &[u8] = b"\x66\x0f\x01\xcc\xf4";

fn td(code: &[u8]) -> Guest {
    let mut guest = Guest::long(code);
    guest.cpu.set_td(true);
    guest
}

/// The RIP of an exception's frame on the stack of [`Guest::long`], which has an error code or not.
fn faulted(guest: &mut Guest, vector: u64) -> bool {
    guest.cpu.set_td(false);
    guest.cpu.run() == Exit::Halt && guest.cpu.rip() == 0x7001 + vector
}

#[test]
fn tdcall_is_undefined_outside_a_td_and_privileged_inside() {
    let mut guest = Guest::long(TDCALL);
    assert!(faulted(&mut guest, 6));
    let mut guest = Guest::user(TDCALL);
    guest.cpu.set_td(true);
    // The handler's HLT is intercepted.
    assert!(matches!(
        guest.cpu.run(),
        Exit::Intercepted {
            reason: reason::HLT,
            ..
        }
    ));
    assert_eq!(guest.cpu.rip(), 0x700d);
}

#[test]
fn an_answered_tdcall_has_the_answers_registers_and_goes_on_behind_it() {
    let mut guest = td(TDCALL);
    assert_eq!(guest.cpu.run(), Exit::Tdcall);
    assert_eq!(guest.cpu.rip(), 0x1000);
    let mut gpr = guest.cpu.registers().gpr;
    gpr[0] = 0x1234;
    gpr[15] = 0xffff_ffff_ffff_ffff;
    guest.cpu.complete_tdcall(&gpr);
    assert!(guest.cpu.has_pending_completion());
    // Completed even if somebody wants the processor.
    guest.cpu.line().kick();
    assert_eq!(guest.cpu.run(), Exit::Kicked);
    guest.cpu.line().cancel_kick();
    assert_eq!(guest.cpu.rip(), 0x1004);
    assert_eq!((guest.gpr(0), guest.gpr(15)), (0x1234, u64::MAX));
}

#[test]
fn a_tdcall_that_is_not_answered_is_executed_again_after_interrupts() {
    let mut guest = td(TDCALL);
    assert_eq!(guest.cpu.run(), Exit::Tdcall);
    assert!(!guest.cpu.has_pending_completion());
    assert_eq!(guest.cpu.run(), Exit::Tdcall);
    guest.cpu.line().kick();
    assert_eq!(guest.cpu.run(), Exit::Kicked);
    assert_eq!(guest.cpu.rip(), 0x1000);
    guest.cpu.line().cancel_kick();
    guest.cpu.inject_interrupt(0x30);
    let exit = guest.cpu.run();
    assert!(matches!(exit, Exit::Intercepted { .. }), "{exit:?}");
    assert_eq!(guest.cpu.rip(), 0x7030);
    assert_eq!(guest.read_u64(0x1_0000 - 5 * 8), 0x1000);
}

/// RCX is 3, RDX 0x3f8, RSI and RDI a page of memory.
fn intercepted(code: &[u8]) -> (u32, u64, u8) {
    let mut guest = td(code);
    guest.set(0x1000, |registers| {
        registers.gpr[1] = 3;
        registers.gpr[2] = 0x3f8;
        registers.gpr[4] = 0x1_0000;
        registers.gpr[6] = 0x1_8000;
        registers.gpr[7] = 0x1_8000;
    });
    let before = guest.cpu.registers();
    let exit = guest.cpu.run();
    assert_eq!(guest.cpu.registers(), before, "{code:x?}");
    match exit {
        Exit::Intercepted {
            reason,
            qualification,
            length,
        } => (reason, qualification, length),
        exit => panic!("{code:x?}: {exit:?}"),
    }
}

#[test]
fn instructions_that_a_td_does_not_execute_leave_with_reason_and_length() {
    for (code, reason) in [
        (&b"\xf4"[..], reason::HLT),
        (b"\x0f\x08", reason::INVD),
        (b"\x0f\x09", reason::WBINVD),
        (b"\xf3\x0f\x09", reason::WBINVD),
        (b"\x0f\x01\xc1", reason::VMCALL),
        (b"\x0f\x01\xc8", reason::MONITOR),
        (b"\x0f\x01\xc9", reason::MWAIT),
        // RCX is no register that the processor holds, and no leaf that it was told of.
        (b"\x0f\x32", reason::RDMSR),
        (b"\x0f\x30", reason::WRMSR),
        (b"\x0f\xa2", reason::CPUID),
    ] {
        assert_eq!(intercepted(code), (reason, 0, code.len() as u8));
    }
}

#[test]
fn port_accesses_leave_with_their_qualification() {
    for (code, qualification) in [
        // in al,dx; in ax,dx; in eax,dx
        (&b"\xec"[..], 0x3f8_0008),
        (b"\x66\xed", 0x3f8_0009),
        (b"\xed", 0x3f8_000b),
        // out dx,al; out dx,eax
        (b"\xee", 0x3f8_0000),
        (b"\xef", 0x3f8_0003),
        // in al,0x70; out 0x71,ax
        (b"\xe4\x70", 0x70_0048),
        (b"\x66\xe7\x71", 0x71_0041),
        // insb; outsd; rep insw; rep outsb
        (b"\x6c", 0x3f8_0018),
        (b"\x6f", 0x3f8_0013),
        (b"\xf3\x66\x6d", 0x3f8_0039),
        (b"\xf3\x6e", 0x3f8_0030),
    ] {
        let expected = (reason::IO, qualification, code.len() as u8);
        assert_eq!(intercepted(code), expected, "{code:x?}");
    }
}

#[test]
fn a_string_instruction_that_does_nothing_is_not_port_io() {
    // rep insb with RCX 0; tdcall
    let mut guest = td(b"\xf3\x6c\x66\x0f\x01\xcc");
    assert_eq!(guest.cpu.run(), Exit::Tdcall);
}

#[test]
fn privilege_is_checked_before_anything_leaves() {
    for (code, vector) in [
        (&b"\xf4"[..], 13u64),
        (b"\x0f\x09", 13),
        (b"\x0f\x32", 13),
        (b"\xec", 13),
        (b"\x0f\x01\xc8", 6),
        // vmmcall, which Intel's processors do not have
        (b"\x0f\x01\xd9", 6),
    ] {
        let mut guest = Guest::user(code);
        guest.cpu.set_td(true);
        // There is no bitmap of ports.
        guest.write(0x5866, &[0xff, 0xff]);
        // The handler's HLT leaves: the exception was delivered.
        let exit = guest.cpu.run();
        assert!(
            matches!(
                exit,
                Exit::Intercepted {
                    reason: reason::HLT,
                    ..
                }
            ),
            "{exit:?}"
        );
        assert_eq!(guest.cpu.rip(), 0x7000 + vector, "{code:x?}");
    }
    // VMCALL asks nobody.
    let mut guest = Guest::user(b"\x0f\x01\xc1");
    guest.cpu.set_td(true);
    assert!(matches!(
        guest.cpu.run(),
        Exit::Intercepted {
            reason: reason::VMCALL,
            ..
        }
    ));
}

#[test]
fn registers_and_leaves_that_the_processor_answers_do_not_leave() {
    // rdmsr of FS base, EFER and the time stamp counter; wrmsr of KERNEL_GS_BASE; cpuid; tdcall
    let code = b"\xb9\x00\x01\x00\xc0\x0f\x32\xb9\x80\x00\x00\xc0\x0f\x32\
                 \xb9\x10\x00\x00\x00\x0f\x32\xb9\x02\x01\x00\xc0\x31\xd2\x31\xc0\x0f\x30\
                 \xb8\x01\x00\x00\x00\x0f\xa2\x66\x0f\x01\xcc";
    let mut guest = td(code);
    guest.cpu.set_cpuid(vec![CpuidEntry {
        leaf: 1,
        eax: 0x1234,
        ..CpuidEntry::default()
    }]);
    assert_eq!(guest.cpu.run(), Exit::Tdcall);
    assert_eq!(guest.gpr(0), 0x1234);
    // The local APIC's registers that processors virtualise are the hypervisor's as ever, others
    // and the time leave.
    for (index, write, expected) in [
        (0x808, false, None),
        (0x80b, true, None),
        (0x83f, true, None),
        (0x830, true, Some(reason::WRMSR)),
        (0x10, true, Some(reason::WRMSR)),
        (0x3b, false, Some(reason::RDMSR)),
    ] {
        let mut guest = td(if write { b"\x0f\x30" } else { b"\x0f\x32" });
        guest.set(0x1000, |registers| registers.gpr[1] = index);
        let found = match guest.cpu.run() {
            Exit::Intercepted { reason, .. } => Some(reason),
            Exit::Rdmsr { .. } | Exit::Wrmsr { .. } => None,
            exit => panic!("{exit:?}"),
        };
        assert_eq!(found, expected, "{index:#x}");
    }
}

#[test]
fn outside_a_td_nothing_is_intercepted() {
    for code in [
        &b"\x0f\x09\xf4"[..],
        b"\x0f\xa2\xf4",
        b"\x0f\x01\xc8\xf4",
        b"\xf4",
    ] {
        let mut guest = Guest::long(code);
        assert_eq!(guest.cpu.run(), Exit::Halt, "{code:x?}");
    }
}
