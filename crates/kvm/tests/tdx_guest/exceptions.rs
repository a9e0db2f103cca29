//! #VE for what a TD does not execute (SPEC 4.7, 4.8; row 39).

use crate::common::*;
use crate::guest::*;
use crate::stub::{self, Instruction};
use twofold_cpu::reason;

/// About an instruction: reason, qualification, length.
fn about(reason: u32, qualification: u64, length: u64) -> Ve {
    Ve {
        status: 0,
        reason: reason.into(),
        qualification,
        gla: 0,
        gpa: 0,
        length,
    }
}

#[test]
fn instructions_that_a_td_does_not_execute_are_told_to_the_guest() {
    let td = Td::new();
    for (instruction, registers, expected) in [
        (Instruction::Hlt, &[][..], about(reason::HLT, 0, 1)),
        (
            Instruction::In,
            &[(reg::RDX, 0x3f8)],
            about(reason::IO, 0x3f8_0008, 1),
        ),
        (
            Instruction::Out,
            &[(reg::RDX, 0x80)],
            about(reason::IO, 0x80_0003, 1),
        ),
        (
            Instruction::RepInsb,
            &[(reg::RDX, 0x60), (reg::RCX, 4), (reg::RDI, RAM)],
            about(reason::IO, 0x60_0038, 2),
        ),
        // MTRR capabilities, which KVM emulates.
        (
            Instruction::Rdmsr,
            &[(reg::RCX, 0xfe)],
            about(reason::RDMSR, 0, 2),
        ),
        (
            Instruction::Wrmsr,
            &[(reg::RCX, 0x10)],
            about(reason::WRMSR, 0, 2),
        ),
        // A leaf that describes the hypervisor.
        (
            Instruction::Cpuid,
            &[(reg::RAX, 0x4000_0000)],
            about(reason::CPUID, 0, 2),
        ),
        (Instruction::Vmcall, &[], about(reason::VMCALL, 0, 3)),
    ] {
        td.skip(expected.length);
        let stop = td.execute(instruction, registers);
        assert_eq!(stop, Ok(Stop::Ve(expected)), "{instruction:?}");
        assert_eq!(td.resume(), Ok(Stop::Done));
        for (register, value) in registers {
            assert_eq!(td.register(*register), *value, "{instruction:?}");
        }
    }
    // What the module answers by itself.
    assert_eq!(
        td.execute(Instruction::Cpuid, &[(reg::RAX, 0x8000_0008)]),
        Ok(Stop::Done)
    );
    assert_eq!(td.register(reg::RAX) >> 16 & 0xff, 48);
    let efer = td.execute(Instruction::Rdmsr, &[(reg::RCX, 0xc000_0080)]);
    assert_eq!(efer, Ok(Stop::Done));
    assert_ne!(td.register(reg::RAX) & 1 << 10, 0, "long mode is active");
}

#[test]
fn an_access_without_memory_is_mmio_for_a_normal_guest_and_an_exception_for_a_td() {
    // Row 39: the same frame, each guest twice.
    #[rustfmt::skip]
    let normal = Guest::new(&[
        0xa0, 0x00, 0x80, 0xa0, 0x00, 0x80, 0xf4, // mov al, [0x8000] twice; hlt
    ]);
    for _ in 0..2 {
        assert_eq!(normal.run(), Ok(kvm_bindings::KVM_EXIT_MMIO));
        assert_eq!(normal.exit::<u64>(0), 0x8000);
    }
    for shared_bit in [47, 51] {
        let td = Td::with(Options {
            shared_bit,
            ..Options::default()
        });
        for _ in 0..2 {
            td.skip(3);
            let linear = Td::shared(0x8010);
            let Ok(Stop::Ve(ve)) = td.load(linear) else {
                panic!("no #VE");
            };
            assert_eq!((ve.status, ve.reason, ve.gla), (0, 48, linear));
            assert_eq!(ve.gpa, td.shared_gpa(0x8010));
            assert_eq!(ve.qualification & 7, 1, "a read");
            assert_eq!(td.resume(), Ok(Stop::Done));
        }
        // Other frames of the same table are not affected.
        assert_eq!(
            td.store(Td::shared(crate::stub::MAILBOX + 0xf00), 7),
            Ok(Stop::Done)
        );
    }
}

#[test]
fn a_guest_that_does_not_take_the_information_gets_a_double_fault() {
    const VE: u64 = 20;
    const DF: u64 = 8;
    let td = Td::new();
    // The guest lets another handler have the vector, which takes nothing.
    let [low, high] = stub::plain_gate(VE);
    assert_eq!(td.store(stub::gate_at(VE), low), Ok(Stop::Done));
    assert_eq!(td.store(stub::gate_at(VE) + 8, high), Ok(Stop::Done));
    let vector = |stop| match stop {
        Ok(Stop::Exception(vector, _)) => vector,
        other => panic!("{other:?}"),
    };
    assert_eq!(vector(td.execute(Instruction::Hlt, &[])), VE);
    assert_eq!(vector(td.execute(Instruction::Hlt, &[])), DF);
    assert_eq!(
        vector(td.execute(Instruction::Cpuid, &[(0, 0x4000_0000)])),
        DF
    );
    // The information is still that about the first.
    assert_eq!(td.tdcall(&[(reg::RAX, 3)]), 0);
    assert_eq!(td.register(reg::RCX), u64::from(reason::HLT));
    assert_eq!(vector(td.execute(Instruction::Hlt, &[])), VE);
}

#[test]
fn addresses_above_the_shared_bit_are_a_page_fault() {
    const PF: u64 = 14;
    /// Present, and a reserved bit.
    const RESERVED: u64 = 9;
    /// Present, writable, a page of 1 GiB.
    const LARGE_PAGE: u64 = 0x83;
    let linear = 8 << 30;
    for (shared_bit, address, expected) in [
        (47, 1 << 48, Some(PF)),
        (47, 1 << 51 | 1 << 47, Some(PF)),
        // GPAW 52 has addresses of so many bits, where there is no memory.
        (51, 1 << 48, None),
    ] {
        let td = Td::with(Options {
            shared_bit,
            ..Options::default()
        });
        let entry = stub::PAGES_AT + 0x1000 + 8 * 8;
        assert_eq!(td.store(entry, address | LARGE_PAGE), Ok(Stop::Done));
        let stop = td.load(linear + 0x1238);
        match expected {
            Some(vector) => {
                let Ok(Stop::Exception(found, [error, _])) = stop else {
                    panic!("{stop:?}");
                };
                assert_eq!((found, error), (vector, RESERVED), "{address:#x}");
                assert_eq!(td.cr2(), linear + 0x1238);
            }
            None => assert_eq!(stop, Err(Errno::FAULT)),
        }
    }
}

#[test]
fn code_in_shared_memory_is_a_page_fault() {
    const PF: u64 = 14;
    /// Present, a reserved bit, a fetch.
    const ERROR: u64 = 0x19;
    let td = Td::new();
    // ret, where guest and program both can write.
    let linear = Td::shared(stub::MAILBOX + 0xe00);
    assert_eq!(td.store(linear, 0xc3), Ok(Stop::Done));
    let Ok(Stop::Exception(vector, [error, rip])) =
        td.execute(Instruction::Call, &[(reg::RDI, linear)])
    else {
        panic!("no exception");
    };
    assert_eq!((vector, error, rip), (PF, ERROR, linear));
    // Private, it runs.
    assert_eq!(td.accept(RAM), 0);
    assert_eq!(td.store(RAM, 0xc3), Ok(Stop::Done));
    let call = td.execute(Instruction::Call, &[(reg::RDI, RAM)]);
    assert_eq!(call, Ok(Stop::Done));
}
