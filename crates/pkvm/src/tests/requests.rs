//! What the host may have done about the instruction at which a guest stopped.

use super::setting::*;
use crate::error::Error;

use crate::request::Request;
use crate::run::{Exit, Reason};
use crate::shared::HostVcpu;
use crate::testing::Ram;
use crate::vm::{Handle, Registers, system};
use twofold_arch::Hpa;

const PLACE: Place = Place(100);
const PC: u64 = 0x8_0000;
const DEVICE: u64 = 0x900_0010;

const DATA_ABORT: u64 = 0x24 << 26 | 1 << 25;
const FETCH_ABORT: u64 = 0x20 << 26 | 1 << 25;
const TRAP: u64 = 0x18 << 26 | 1 << 25;
const NOT_MAPPED: u64 = 0b0111;

/// The syndrome of a load or store of `1 << size` bytes that is understood.
fn access(write: bool, size: u64, register: u64, signed: bool, wide: bool) -> u64 {
    DATA_ABORT
        | 1 << 24
        | size << 22
        | u64::from(signed) << 21
        | register << 16
        | u64::from(wide) << 15
        | u64::from(write) << 6
        | NOT_MAPPED
}

/// The guest runs to an exception with this syndrome; `set` says what its registers are.
fn stop(hyp: &Hyp<'_>, syndrome: u64, set: impl Fn(&mut Registers)) -> Result<Reason, Error> {
    hyp.vcpu_run(&mut |registers, _| {
        registers.pc = PC;
        set(registers);
        Exit::Exception {
            syndrome,
            far: DEVICE,
            hpfar: DEVICE >> 12 << 4,
        }
    })
}

/// What the guest's registers are when it runs again.
fn go_on(hyp: &Hyp<'_>) -> Result<Registers, Error> {
    let mut found = None;
    hyp.vcpu_run(&mut |registers, _| {
        found = Some(registers.clone());
        Exit::Interrupt
    })?;
    Ok(found.unwrap())
}

fn ask(hyp: &Hyp<'_>, request: u64, data: u64) {
    set_word(hyp, PLACE.host_vcpu(0), HostVcpu::DATA, data);
    set_word(hyp, PLACE.host_vcpu(0), HostVcpu::REQUEST, request);
}

fn pending(hyp: &Hyp<'_>) -> u64 {
    word(hyp, PLACE.host_vcpu(0), HostVcpu::REQUEST)
}

fn loaded(ram: &Ram, protected: bool) -> (Hyp<'_>, Handle) {
    let hyp = ram.boot();
    let handle = start(&hyp, PLACE, protected, &[]);
    hyp.vcpu_load(handle, 0).unwrap();
    (hyp, handle)
}

#[test]
fn the_host_emulates_an_ordinary_guests_loads_and_stores() {
    let ram = Ram::new(256, 64);
    let (hyp, _) = loaded(&ram, false);
    let data = || word(&hyp, PLACE.host_vcpu(0), HostVcpu::DATA);
    for (size, seen) in [
        (0, 0x88),
        (1, 0x7788),
        (2, 0x5566_7788),
        (3, 0x1122_3344_5566_7788),
    ] {
        stop(&hyp, access(true, size, 5, false, true), |registers| {
            registers.x[5] = 0x1122_3344_5566_7788;
        })
        .unwrap();
        assert_eq!(data(), seen);
        ask(&hyp, Request::Skip as u64, 0xbad);
        let registers = go_on(&hyp).unwrap();
        assert_eq!(
            (registers.pc, registers.x[5]),
            (PC + 4, 0x1122_3344_5566_7788)
        );
        assert_eq!(pending(&hyp), 0);
    }
    for (size, signed, wide, expected) in [
        (0, false, true, 0xf0),
        (0, true, true, 0xffff_ffff_ffff_fff0),
        (0, true, false, 0xffff_fff0),
        (1, true, true, 0xffff_ffff_ffff_e1f0),
        (2, false, false, 0xc3d2_e1f0),
        (2, true, true, 0xffff_ffff_c3d2_e1f0),
        (3, false, true, 0x8796_a5b4_c3d2_e1f0),
    ] {
        stop(&hyp, access(false, size, 30, signed, wide), |_| {}).unwrap();
        ask(&hyp, Request::Skip as u64, 0x8796_a5b4_c3d2_e1f0);
        let registers = go_on(&hyp).unwrap();
        assert_eq!((registers.pc, registers.x[30]), (PC + 4, expected));
    }
    // Register 31 is none.
    stop(&hyp, access(true, 3, 31, false, true), |_| {}).unwrap();
    assert_eq!(data(), 0);
    stop(&hyp, access(false, 3, 31, false, true), |_| {}).unwrap();
    ask(&hyp, Request::Skip as u64, 7);
    assert_eq!(go_on(&hyp).unwrap().pc, PC + 4);
}

#[test]
fn an_abort_and_an_undefined_instruction_reach_the_guests_vectors() {
    for protected in [false, true] {
        let ram = Ram::new(256, 64);
        let (hyp, _) = loaded(&ram, protected);
        let vectors = |registers: &mut Registers| {
            registers.pstate = 0x3c5;
            registers.system[system::VBAR] = 0x4000;
        };
        for (syndrome, request, expected) in [
            (
                access(true, 3, 5, false, true),
                Request::Abort,
                0x25 << 26 | 1 << 25 | 0x10,
            ),
            (
                DATA_ABORT | NOT_MAPPED,
                Request::Abort,
                0x25 << 26 | 1 << 25 | 0x10,
            ),
            (
                FETCH_ABORT | NOT_MAPPED,
                Request::Abort,
                0x21 << 26 | 1 << 25 | 0x10,
            ),
            (TRAP, Request::Undefined, 1 << 25),
        ] {
            stop(&hyp, syndrome, vectors).unwrap();
            ask(&hyp, request as u64, 0);
            let registers = go_on(&hyp).unwrap();
            assert_eq!(registers.pc, 0x4200);
            assert_eq!(registers.system[system::ESR], expected);
            assert_eq!(registers.system[system::ELR], PC);
            assert_eq!(registers.system[system::SPSR], 0x3c5);
            if request == Request::Abort {
                assert_eq!(registers.system[system::FAR], DEVICE);
            }
        }
        // From EL0 the class says so.
        stop(&hyp, DATA_ABORT | NOT_MAPPED, |registers| {
            registers.pstate = 0
        })
        .unwrap();
        ask(&hyp, Request::Abort as u64, 0);
        let registers = go_on(&hyp).unwrap();
        assert_eq!(registers.pc, 0x4400);
        assert_eq!(registers.system[system::ESR] >> 26, 0x24);
    }
}

#[test]
fn of_a_protected_guest_no_instruction_is_passed_over_and_no_data_shown() {
    let ram = Ram::new(256, 64);
    let (hyp, _) = loaded(&ram, true);
    let secret = 0x5ec2_e75e_c2e7;
    set_word(&hyp, PLACE.host_vcpu(0), HostVcpu::DATA, 0);
    stop(&hyp, access(true, 3, 5, false, true), |registers| {
        registers.x[5] = secret;
    })
    .unwrap();
    let record = PLACE.host_vcpu(0);
    assert!((0..HostVcpu::WORDS).all(|number| word(&hyp, record, number) != secret));
    for syndrome in [access(false, 3, 5, false, true), DATA_ABORT | 1 << 8, TRAP] {
        stop(&hyp, syndrome, |_| {}).unwrap();
        ask(&hyp, Request::Skip as u64, 0xbad);
        assert_eq!(go_on(&hyp).err(), Some(Error::NotPermitted));
        // Until the host thinks better of it.
        ask(&hyp, 0, 0);
        let registers = go_on(&hyp).unwrap();
        assert_eq!((registers.pc, registers.x[5]), (PC, secret));
    }
}

#[test]
fn a_request_must_belong_to_what_the_guest_stopped_at_and_counts_once() {
    let ram = Ram::new(256, 64);
    let (hyp, _) = loaded(&ram, false);
    let [skip, abort, undefined] = [Request::Skip, Request::Abort, Request::Undefined];
    // Nothing has happened yet; an interrupt; a call.
    for request in [skip, abort, undefined] {
        ask(&hyp, request as u64, 0);
        assert_eq!(go_on(&hyp).err(), Some(Error::NotPermitted));
    }
    ask(&hyp, 0, 0);
    stop(&hyp, 0x16 << 26, |_| {}).unwrap();
    ask(&hyp, skip as u64, 0);
    assert_eq!(go_on(&hyp).err(), Some(Error::NotPermitted));
    // Two loads at once are not understood, maintenance is passed over.
    for (syndrome, request, expected) in [
        (DATA_ABORT | NOT_MAPPED, skip, Err(Error::NotPermitted)),
        (DATA_ABORT | NOT_MAPPED | 1 << 8, skip, Ok(())),
        (DATA_ABORT | NOT_MAPPED, undefined, Err(Error::NotPermitted)),
        (FETCH_ABORT | NOT_MAPPED, skip, Err(Error::NotPermitted)),
        (
            FETCH_ABORT | NOT_MAPPED,
            undefined,
            Err(Error::NotPermitted),
        ),
        (TRAP, abort, Err(Error::NotPermitted)),
        (TRAP, skip, Ok(())),
    ] {
        ask(&hyp, 0, 0);
        stop(&hyp, syndrome, |_| {}).unwrap();
        ask(&hyp, request as u64, 0);
        let result = hyp.adjust_pc(PLACE.host_vcpu(0));
        assert_eq!(result, expected, "{syndrome:#x} {request:?}");
        if expected.is_ok() {
            ask(&hyp, request as u64, 0);
            let again = hyp.adjust_pc(PLACE.host_vcpu(0));
            assert_eq!(again, Err(Error::NotPermitted), "a second time");
        }
    }
    for word in [4, 5, 1 << 32, u64::MAX] {
        ask(&hyp, word, 0);
        assert_eq!(go_on(&hyp).err(), Some(Error::Invalid), "{word}");
        assert_eq!(hyp.adjust_pc(PLACE.host_vcpu(0)), Err(Error::Invalid));
    }
}

#[test]
fn adjust_pc_acts_at_once_on_the_vcpu_that_is_loaded_and_no_other() {
    let ram = Ram::new(256, 64);
    let (hyp, _) = loaded(&ram, false);
    stop(&hyp, access(false, 2, 3, false, false), |_| {}).unwrap();
    ask(&hyp, Request::Skip as u64, 42);
    for wrong in [0, 8, PLACE.host_vcpu(1).get(), u64::MAX] {
        assert_eq!(hyp.adjust_pc(Hpa::new(wrong)), Err(Error::Invalid));
    }
    hyp.adjust_pc(PLACE.host_vcpu(0)).unwrap();
    assert_eq!(pending(&hyp), 0);
    // What the host writes afterwards comes too late.
    set_word(&hyp, PLACE.host_vcpu(0), HostVcpu::DATA, 43);
    let registers = go_on(&hyp).unwrap();
    assert_eq!((registers.pc, registers.x[3]), (PC + 4, 42));
    hyp.vcpu_put().unwrap();
    assert_eq!(hyp.adjust_pc(PLACE.host_vcpu(0)), Err(Error::Invalid));
}
