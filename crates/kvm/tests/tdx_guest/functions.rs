//! Functions of the TDX module that a guest calls, and what KVM answers without the program.

use crate::common::td::SEPT_VE_DISABLE;
use crate::guest::*;
use crate::stub::Instruction;

/// OPERAND_INVALID, about RAX or RCX.
const INVALID_RAX: u64 = 0xc000_0100 << 32;
const INVALID_RCX: u64 = INVALID_RAX | 1;

#[test]
fn vp_info_tells_the_width_of_addresses_and_who_one_is() {
    for shared_bit in [47, 51] {
        let td = Td::with(Options {
            shared_bit,
            ..Options::default()
        });
        // What the program gave INIT_VCPU is in RCX and R8 at the start.
        assert_eq!(td.register(reg::RCX), 0xfeed);
        assert_eq!(td.register(reg::R8), 0xfeed);
        assert_eq!(td.register(reg::RBX), u64::from(shared_bit) + 1);
        assert_eq!(td.tdcall(&[(reg::RAX, 1)]), 0);
        assert_eq!(td.register(reg::RCX), u64::from(shared_bit) + 1);
        assert_eq!(td.register(reg::RDX), 0, "attributes");
        assert_eq!(td.register(reg::R8) as u32, 1, "one virtual processor");
        assert_eq!(td.register(reg::R9), 0);
    }
    let td = Td::with(Options {
        attributes: SEPT_VE_DISABLE,
        ..Options::default()
    });
    assert_eq!(td.tdcall(&[(reg::RAX, 1)]), 0);
    assert_eq!(td.register(reg::RDX), SEPT_VE_DISABLE);
}

#[test]
fn functions_and_versions_that_are_not_there_are_refused() {
    let td = Td::new();
    // RTMR.EXTEND, REPORT, CPUIDVE.SET, VM.WR, one beyond all; VP.INFO of version 1, reserved bits.
    for rax in [2, 4, 5, 8, 0x100, 1 | 1 << 16, 1 | 1 << 24, 1 | 1 << 32] {
        assert_eq!(td.tdcall(&[(reg::RAX, rax)]), INVALID_RAX, "{rax:#x}");
    }
    // VMCALL never exposes RAX, RCX or RSP, and there are no registers above bit 31.
    for mask in [1, 2, 0x10, 1 << 32, 1 << 63] {
        let registers = [
            (reg::RAX, 0),
            (reg::RCX, 0xfc00 | mask),
            (reg::R11, 0x10000),
        ];
        assert_eq!(td.tdcall(&registers), INVALID_RCX, "{mask:#x}");
        assert_eq!(td.register(reg::R11), 0x10000, "nothing was called");
    }
    // There is no information about a #VE.
    assert_eq!(
        td.tdcall(&[(reg::RAX, 3), (reg::RDX, 7)]),
        0xc000_0704 << 32
    );
    assert_eq!(td.register(reg::RDX), 0);
}

#[test]
fn the_measurement_is_what_was_measured_and_no_other_field_is_shown() {
    let td = Td::new();
    let field = |word: u64| [(reg::RAX, 7), (reg::RDX, 0x1310_0003_0000_0000 + word)];
    let words: Vec<u64> = (0..6)
        .map(|word| {
            assert_eq!(td.tdcall(&field(word)), 0);
            td.register(reg::R8)
        })
        .collect();
    assert!(words.iter().any(|word| *word != 0));
    // Another TD with the same content has the same, one with another shared bit has not: its tables
    // differ.
    let again = Td::new();
    let other = Td::with(Options {
        shared_bit: 51,
        ..Options::default()
    });
    for (word, expected) in (0..).zip(&words) {
        assert_eq!(again.tdcall(&field(word)), 0);
        assert_eq!(again.register(reg::R8), *expected);
    }
    assert_eq!(other.tdcall(&field(0)), 0);
    assert_ne!(other.register(reg::R8), words[0]);
    assert_eq!(td.tdcall(&field(6)) >> 32, 0xc000_0c00);
    assert_eq!(td.register(reg::R8), 0);
    let named = [(reg::RAX, 7), (reg::RCX, 0x1000), field(0)[1]];
    assert_eq!(td.tdcall(&named), INVALID_RCX);
}

#[test]
fn kvm_sees_and_changes_registers_in_the_mask_only() {
    let td = Td::new();
    // CPUID of the leaf that KVM_SET_CPUID2 has: R12 is leaf and EAX, R13 EBX.
    let call = |mask: u64| {
        let registers = [
            (reg::RCX, mask),
            (reg::R11, 10),
            (reg::R12, 0x4000_0000),
            (reg::R14, 0xaaaa),
            (reg::R15, 0xbbbb),
        ];
        assert_eq!(td.tdcall(&registers), 0);
        (reg::R10..=reg::R15)
            .map(|register| td.register(register))
            .collect::<Vec<_>>()
    };
    assert_eq!(call(0xfc00), [0, 10, 0x4000_0001, 0x1234_5678, 0, 0]);
    // Without R14 and R15 those stay; without R12 leaf 0 is asked, of which there is nothing.
    assert_eq!(
        call(0x3c00),
        [0, 10, 0x4000_0001, 0x1234_5678, 0xaaaa, 0xbbbb]
    );
    assert_eq!(call(0xec00), [0, 10, 0x4000_0000, 0, 0, 0]);
    // Without R11 nothing is known; without R10 not even that is told.
    assert_eq!(call(0xf400)[0], UNSUPPORTED);
    assert_eq!(call(0xf000)[0], 0);
    assert_eq!(td.register(reg::RCX), 0xf000, "RCX stays");
}

#[test]
fn what_only_hardware_can_do_is_refused_clearly() {
    let td = Td::new();
    // GetQuote, SetupEventNotifyInterrupt, and subfunctions that nobody has.
    for subfunction in [0x10002, 0x10004, 0x10005, 0x12345] {
        let (status, _) = td.answered_vmcall(subfunction, &[0; 4]);
        assert_eq!(status, UNSUPPORTED, "{subfunction:#x}");
    }
    assert_eq!(td.answered_vmcall(0x10000, &[0]).0, 0);
    assert_eq!(td.answered_vmcall(0x10000, &[1]), (0, 0));
    assert_eq!(td.answered_vmcall(0x10000, &[2]).0, INVALID_OPERAND);
}

#[test]
fn a_fatal_error_is_the_programs_to_hear() {
    let td = Td::new();
    let stop = td.vmcall(0x10003, &[0x1234, 0x5678]);
    assert_eq!(stop, Ok(Stop::Exit(kvm_bindings::KVM_EXIT_SYSTEM_EVENT)));
    assert_eq!((td.exit::<u32>(0), td.exit::<u32>(4)), (7, 16));
    let word = |register: usize| td.exit::<u64>(8 + 8 * register);
    assert_eq!((word(reg::RCX), word(reg::R11)), (0xfc00, 0x10003));
    assert_eq!((word(reg::R12), word(reg::R13)), (0x1234, 0x5678));
    assert_eq!((word(reg::RDI), word(reg::R9)), (0, 0), "not in the mask");
}

#[test]
fn hypercalls_of_kvms_own_have_their_number_in_r10() {
    let td = Td::new();
    let call = |number: u64, arguments: [u64; 3]| {
        let mut registers = vec![(reg::RCX, 0xfc00), (reg::R10, number)];
        registers.extend((reg::R11..).zip(arguments));
        td.execute(Instruction::Tdcall, &registers)
    };
    assert_eq!(call(1, [0; 3]), Ok(Stop::Done));
    assert_eq!(td.vmcall_result().0, 0);
    assert_eq!(call(99, [0; 3]), Ok(Stop::Done));
    assert_eq!(td.vmcall_result().0, 1000_u64.wrapping_neg());
    let stop = call(12, [RAM, 2, 1 << 4]);
    assert_eq!(stop, Ok(Stop::Exit(kvm_bindings::KVM_EXIT_HYPERCALL)));
    assert_eq!(td.hypercall(), (12, [RAM, 2, 1 << 4]));
    td.answer_hypercall(77);
    assert_eq!(td.resume(), Ok(Stop::Done));
    assert_eq!(td.vmcall_result().0, 77);
}
