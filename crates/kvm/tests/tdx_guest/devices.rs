//! Emulated memory, ports and registers by TDG.VP.VMCALL (SPEC 4.8; row 40).

use crate::common::*;
use crate::guest::*;
use crate::stub::Instruction;
use kvm_bindings::*;

const CPUID: u64 = 10;
const HLT: u64 = 12;
const IO: u64 = 30;
const RDMSR: u64 = 31;
const WRMSR: u64 = 32;
const MMIO: u64 = 48;
const READ: u64 = 0;
const WRITE: u64 = 1;

/// Address, data, length and direction of an MMIO exit.
fn mmio(td: &Td) -> (u64, u64, u32, u8) {
    (td.exit(0), td.exit(8), td.exit(16), td.exit(20))
}

#[test]
fn mmio_goes_from_the_exception_to_the_program_and_back() {
    for shared_bit in [47, 51] {
        let td = Td::with(Options {
            shared_bit,
            ..Options::default()
        });
        // The guest's handler finds an access to emulated memory.
        td.skip(3);
        let Ok(Stop::Ve(ve)) = td.store(Td::shared(DEVICE + 8), 0x1122_3344) else {
            panic!("no #VE");
        };
        assert_eq!((ve.status, ve.reason, ve.length), (0, 48, 0));
        assert_eq!(ve.gpa, td.shared_gpa(DEVICE + 8));
        assert_eq!(ve.gla, Td::shared(DEVICE + 8));
        assert_eq!(ve.qualification & 7, 2, "a write");
        assert_eq!(td.resume(), Ok(Stop::Done));
        // What it then asks for.
        for size in [1, 2, 4, 8] {
            let mask = u64::MAX >> (64 - 8 * size);
            let value = 0x8877_6655_4433_2211;
            let arguments = [size, WRITE, ve.gpa, value];
            assert_eq!(td.vmcall(MMIO, &arguments), Ok(Stop::Exit(KVM_EXIT_MMIO)));
            assert_eq!(mmio(&td), (DEVICE + 8, value & mask, size as u32, 1));
            assert_eq!(td.resume(), Ok(Stop::Done));
            assert_eq!(td.vmcall_result().0, 0);

            let arguments = [size, READ, ve.gpa, 0];
            assert_eq!(td.vmcall(MMIO, &arguments), Ok(Stop::Exit(KVM_EXIT_MMIO)));
            assert_eq!(mmio(&td), (DEVICE + 8, 0, size as u32, 0));
            td.run.write(32 + 8, value);
            assert_eq!(td.resume(), Ok(Stop::Done));
            assert_eq!(td.vmcall_result(), (0, value & mask));
        }
    }
}

#[test]
fn a_wrong_size_direction_or_address_of_mmio_is_an_invalid_operand() {
    let td = Td::new();
    let device = td.shared_gpa(DEVICE);
    let end = td.shared_gpa((1 << 47) - 4);
    for (size, direction, address) in [
        (0, READ, device),
        (3, READ, device),
        (5, WRITE, device),
        (16, READ, device),
        (u64::MAX, WRITE, device),
        (4, 2, device),
        (4, u64::MAX, device),
        // Private, across the end of the shared half, and no address.
        (4, READ, DEVICE),
        (8, WRITE, end),
        (4, READ, 1 << 48),
        (8, READ, u64::MAX - 3),
    ] {
        let (status, _) = td.answered_vmcall(MMIO, &[size, direction, address, 0]);
        assert_eq!(status, INVALID_OPERAND, "{size} {direction} {address:#x}");
    }
}

#[test]
fn devices_of_the_vm_come_before_the_program() {
    let td = Td::new();
    let device = td.shared_gpa(DEVICE);
    // An eventfd for one value, and a coalesced zone behind it.
    let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap();
    let request = kvm_ioeventfd {
        datamatch: 7,
        addr: DEVICE,
        len: 4,
        fd: std::os::fd::AsRawFd::as_raw_fd(&event),
        flags: 1, // KVM_IOEVENTFD_FLAG_DATAMATCH
        ..Default::default()
    };
    assert_eq!(td.vm.set(KVM_IOEVENTFD, request), Ok(0));
    let zone = kvm_coalesced_mmio_zone {
        addr: DEVICE + 0x100,
        size: 0x10,
        ..Default::default()
    };
    assert_eq!(td.vm.set(KVM_REGISTER_COALESCED_MMIO, zone), Ok(0));
    assert_eq!(td.answered_vmcall(MMIO, &[4, WRITE, device, 7]).0, 0);
    let mut count = [0; 8];
    rustix::io::read(&event, &mut count).unwrap();
    assert_eq!(u64::from_ne_bytes(count), 1);
    // Another value is the program's.
    let stop = td.vmcall(MMIO, &[4, WRITE, device, 8]);
    assert_eq!(stop, Ok(Stop::Exit(KVM_EXIT_MMIO)));
    assert_eq!(td.resume(), Ok(Stop::Done));
    // Coalesced writes are in the ring: first, last, then 24 bytes an entry.
    assert_eq!(
        td.answered_vmcall(MMIO, &[2, WRITE, device + 0x104, 0xabcd])
            .0,
        0
    );
    let ring = 2 * PAGE as usize;
    assert_eq!(
        (td.run.read::<u32>(ring), td.run.read::<u32>(ring + 4)),
        (0, 1)
    );
    assert_eq!(td.run.read::<u64>(ring + 8), DEVICE + 0x104);
    assert_eq!(td.run.read::<u32>(ring + 16), 2);
    assert_eq!(td.run.read::<u16>(ring + 24), 0xabcd);
    // A read of either is the program's.
    let stop = td.vmcall(MMIO, &[4, READ, device, 0]);
    assert_eq!(stop, Ok(Stop::Exit(KVM_EXIT_MMIO)));
    assert_eq!(td.resume(), Ok(Stop::Done));
}

#[test]
fn ports_are_read_and_written_by_the_program() {
    let td = Td::new();
    for size in [1, 2, 4] {
        let mask = u64::MAX >> (64 - 8 * size);
        let stop = td.vmcall(IO, &[size, WRITE, 0x3f8, 0x8877_6655_4433_2211]);
        assert_eq!(stop, Ok(Stop::Exit(KVM_EXIT_IO)));
        let access = |td: &Td| {
            let [direction, bytes] = td.exit::<[u8; 2]>(0);
            (
                direction,
                u64::from(bytes),
                td.exit::<u16>(2),
                td.exit::<u32>(4),
            )
        };
        assert_eq!(access(&td), (1, size, 0x3f8, 1));
        assert_eq!(td.run.read::<u64>(4096) & mask, 0x4433_2211 & mask);
        assert_eq!(td.resume(), Ok(Stop::Done));

        let stop = td.vmcall(IO, &[size, READ, 0x60, 0]);
        assert_eq!(stop, Ok(Stop::Exit(KVM_EXIT_IO)));
        assert_eq!(access(&td), (0, size, 0x60, 1));
        td.run.write(4096, 0xa8a7_a6a5_a4a3_a2a1_u64);
        assert_eq!(td.resume(), Ok(Stop::Done));
        assert_eq!(td.vmcall_result(), (0, 0xa8a7_a6a5_a4a3_a2a1 & mask));
    }
    for (size, direction, port) in [(0, 0, 1), (3, 0, 1), (8, 1, 1), (1, 2, 1), (1, 1, 0x1_0000)] {
        let (status, _) = td.answered_vmcall(IO, &[size, direction, port, 0]);
        assert_eq!(status, INVALID_OPERAND, "{size} {direction} {port:#x}");
    }
}

#[test]
fn registers_that_kvm_emulates_are_read_and_written() {
    const MISC_ENABLE: u64 = 0x1a0;
    let td = Td::new();
    let (status, value) = td.answered_vmcall(RDMSR, &[MISC_ENABLE]);
    assert_eq!(status, 0);
    assert_eq!(td.answered_vmcall(WRMSR, &[MISC_ENABLE, value]).0, 0);
    // The guest's own, one that nobody has, and one that is not written.
    assert_eq!(td.answered_vmcall(RDMSR, &[0xc000_0100]).0, INVALID_OPERAND);
    assert_eq!(td.answered_vmcall(RDMSR, &[0x1234_5678]).0, INVALID_OPERAND);
    assert_eq!(
        td.answered_vmcall(WRMSR, &[0xc000_0080, 0]).0,
        INVALID_OPERAND
    );
}

#[test]
fn registers_that_kvm_refuses_may_be_the_programs() {
    let td = Td::new();
    let mut request = kvm_enable_cap {
        cap: KVM_CAP_X86_USER_SPACE_MSR,
        ..Default::default()
    };
    request.args[0] = u64::from(KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_INVAL);
    assert_eq!(td.vm.set(KVM_ENABLE_CAP, request), Ok(0));
    // error at 0, reason at 8, index at 12, data at 16
    assert_eq!(
        td.vmcall(RDMSR, &[0x1234]),
        Ok(Stop::Exit(KVM_EXIT_X86_RDMSR))
    );
    assert_eq!(td.exit::<u32>(12), 0x1234);
    td.run.write(32 + 16, 0x99_u64);
    assert_eq!(td.resume(), Ok(Stop::Done));
    assert_eq!(td.vmcall_result(), (0, 0x99));
    assert_eq!(
        td.vmcall(WRMSR, &[0x1234, 5]),
        Ok(Stop::Exit(KVM_EXIT_X86_WRMSR))
    );
    assert_eq!((td.exit::<u32>(12), td.exit::<u64>(16)), (0x1234, 5));
    td.run.write(32, 1_u8);
    assert_eq!(td.resume(), Ok(Stop::Done));
    assert_eq!(td.vmcall_result().0, INVALID_OPERAND);
}

#[test]
fn cpuid_by_hypercall_is_what_the_program_has_set() {
    let td = Td::new();
    let (status, _) = td.answered_vmcall(CPUID, &[0x4000_0000, 0]);
    assert_eq!(status, 0);
    assert_eq!(td.register(reg::R12), 0x4000_0001);
    assert_eq!(td.register(reg::R13), 0x1234_5678);
    assert_eq!((td.register(reg::R14), td.register(reg::R15)), (0, 0));
}

#[test]
fn an_interrupt_that_waits_ends_a_halt_at_once() {
    let td = Td::new();
    assert_eq!(td.answered_vmcall(WRMSR, &[0x80f, 0x1ff]).0, 0);
    let ipi = [(reg::RCX, 0x83f), (reg::RAX, crate::stub::INTERRUPT)];
    assert_eq!(td.execute(Instruction::Wrmsr, &ipi), Ok(Stop::Done));
    assert_eq!(td.answered_vmcall(HLT, &[0]).0, 0);
}
