//! MapGPA (SPEC 5.10; row 53).

use crate::guest::*;
use crate::stub::{INTERRUPT, Instruction};
use kvm_bindings::KVM_EXIT_HYPERCALL;

const MAP_GPA: u64 = 0x10001;
const ENCRYPTED: u64 = 1 << 4;
const M: u64 = 1 << 20;
const SVR: u64 = 0x80f;
const SELF_IPI: u64 = 0x83f;

#[test]
fn a_request_of_five_megabytes_leaves_three_times() {
    for shared_bit in [47, 51] {
        let td = Td::with(Options {
            shared_bit,
            ..Options::default()
        });
        for (start, attributes) in [(td.shared_gpa(RAM), 0), (RAM, ENCRYPTED)] {
            let mut stop = td.vmcall(MAP_GPA, &[start, 5 * M]);
            for (offset, pages) in [(0, 512), (2 * M, 512), (4 * M, 256)] {
                assert_eq!(stop, Ok(Stop::Exit(KVM_EXIT_HYPERCALL)));
                assert_eq!(td.hypercall(), (12, [RAM + offset, pages, attributes]));
                td.set_private(RAM + offset, pages * PAGE, attributes != 0);
                td.answer_hypercall(0);
                stop = td.resume();
            }
            assert_eq!(stop, Ok(Stop::Done));
            assert_eq!(td.vmcall_result().0, 0);
        }
    }
}

#[test]
fn converted_memory_is_shared_with_the_program_and_back_the_guests() {
    let td = Td::new();
    assert_eq!(td.accept(RAM), 0);
    assert_eq!(
        td.vmcall(MAP_GPA, &[td.shared_gpa(RAM), PAGE]),
        Ok(Stop::Exit(KVM_EXIT_HYPERCALL))
    );
    td.set_private(RAM, PAGE, false);
    td.answer_hypercall(0);
    assert_eq!(td.resume(), Ok(Stop::Done));
    td.ram.write(0, 0x77_u64);
    assert_eq!(td.loaded(Td::shared(RAM)), 0x77);
    assert_eq!(
        td.vmcall(MAP_GPA, &[RAM, PAGE]),
        Ok(Stop::Exit(KVM_EXIT_HYPERCALL))
    );
    td.set_private(RAM, PAGE, true);
    td.answer_hypercall(0);
    assert_eq!(td.resume(), Ok(Stop::Done));
    assert_eq!(td.accept(RAM), 0);
    assert_eq!(td.loaded(RAM), 0);
}

#[test]
fn an_interrupt_that_waits_ends_the_request_which_goes_on_where_it_was() {
    let td = Td::new();
    // The local APIC is switched on by KVM, and interrupts itself without it.
    assert_eq!(td.answered_vmcall(32, &[SVR, 0x1ff]).0, 0);
    let ipi = [(reg::RCX, SELF_IPI), (reg::RAX, INTERRUPT)];
    assert_eq!(td.execute(Instruction::Wrmsr, &ipi), Ok(Stop::Done));
    let start = td.shared_gpa(RAM);
    assert_eq!(
        td.vmcall(MAP_GPA, &[start, 5 * M]),
        Ok(Stop::Exit(KVM_EXIT_HYPERCALL))
    );
    td.answer_hypercall(0);
    assert_eq!(td.resume(), Ok(Stop::Done));
    assert_eq!(td.vmcall_result(), (RETRY, start + 2 * M));
    assert_eq!(td.interrupts(), 0);
    // The guest takes the interrupt and asks for the rest.
    assert_eq!(td.execute(Instruction::TakeInterrupts, &[]), Ok(Stop::Done));
    assert_eq!(td.interrupts(), 1);
    let mut stop = td.vmcall(MAP_GPA, &[start + 2 * M, 3 * M]);
    for (offset, pages) in [(2 * M, 512), (4 * M, 256)] {
        assert_eq!(stop, Ok(Stop::Exit(KVM_EXIT_HYPERCALL)));
        assert_eq!(td.hypercall().1, [RAM + offset, pages, 0]);
        stop = td.resume();
    }
    assert_eq!(stop, Ok(Stop::Done));
    assert_eq!(td.vmcall_result().0, 0);
}

#[test]
fn what_the_program_refuses_is_told_with_its_address() {
    const EAGAIN: u64 = 11;
    let td = Td::new();
    let start = td.shared_gpa(RAM);
    for (answer, status) in [
        (EAGAIN, RETRY),
        (22, INVALID_OPERAND),
        (u64::MAX, INVALID_OPERAND),
    ] {
        assert_eq!(
            td.vmcall(MAP_GPA, &[start, 4 * M]),
            Ok(Stop::Exit(KVM_EXIT_HYPERCALL))
        );
        td.answer_hypercall(0);
        assert_eq!(td.resume(), Ok(Stop::Exit(KVM_EXIT_HYPERCALL)));
        td.answer_hypercall(answer);
        assert_eq!(td.resume(), Ok(Stop::Done));
        assert_eq!(td.vmcall_result(), (status, start + 2 * M), "{answer}");
    }
}

#[test]
fn requests_that_make_no_sense_are_refused_with_their_address() {
    for shared_bit in [47, 51] {
        let td = Td::with(Options {
            shared_bit,
            ..Options::default()
        });
        let shared = 1_u64 << shared_bit;
        for (start, bytes, status) in [
            (RAM, 0, INVALID_OPERAND),
            (!0xfff, 0x2000, INVALID_OPERAND),
            (shared - 0x1000, 0x2000, INVALID_OPERAND),
            (2 * shared, 0x1000, INVALID_OPERAND),
            (RAM + 1, 0x1000, ALIGN_ERROR),
            (RAM, 0x1001, ALIGN_ERROR),
        ] {
            let answer = td.answered_vmcall(MAP_GPA, &[start, bytes]);
            assert_eq!(answer, (status, start), "{start:#x} {bytes:#x}");
        }
    }
    let td = Td::with(Options {
        map_gpa: false,
        ..Options::default()
    });
    assert_eq!(
        td.answered_vmcall(MAP_GPA, &[RAM, 0x1000]),
        (UNSUPPORTED, RAM)
    );
}
