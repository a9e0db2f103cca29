//! #VE: violations that the processor gives to the guest instead of the hypervisor.

use super::{Verdict, check, machine};
use crate::ensure;
use crate::guest;
use crate::processor::{Exit, Features, Virtualization, VirtualizationException};
use crate::vm::{DEVICE_VALUE, Done, Failure, GuestCpu, Memory, Operation};
use alloc::format;
use twofold_arch::ept::Qualification;
use twofold_arch::{Gpa, Hpa, Pferr};
use twofold_mmu::{Config, MmioFault, Outcome};

/// With #VE allowed, whatever the MMU has not mapped still exits: each of its empty entries says so.
/// A table of zeros, which says nothing, makes a #VE, so it is not the processor that never does.
pub fn suppressed<V: Virtualization>() -> Result<Verdict, Failure> {
    if !V::available().contains(Features::EXCEPTIONS) {
        return Ok(Verdict::NotHere("no #VE"));
    }
    let memory = Memory::default();
    let (vm, mut cpu) = machine::<V>(Config::default(), memory)?;
    // Memory, nothing at all at every distance, and memory again after it was taken away. A #VE
    // would fail each of these.
    for distance in [0, 0x1000, 0x20_0000, 0x4000_0000, 0x20_0000_0000] {
        cpu.run(Operation::Read(memory.gpa + distance))?;
    }
    drop(vm.host_change_all());
    cpu.run(Operation::Write(memory.gpa, 1))?;
    let exception = cpu.processor.take_exception();
    ensure!(exception.is_none(), "{exception:x?}");
    check(&vm)?;

    let zeros = Hpa::new(guest::MEMORY + 0x20_0000);
    guest::clear(zeros, 0x1000);
    let mut cpu = GuestCpu::new(&vm)?;
    cpu.processor.set_root(zeros);
    let exit = cpu.enter_once();
    let exception = cpu.processor.take_exception();
    // The exception's own delivery meets the same zeros, and that is an exit.
    ensure!(
        matches!(exit, Exit::Fault(_))
            && exception.is_some_and(|exception| {
                exception.reason == 48 && exception.gpa.get() & !0xfff == guest::TABLES
            }),
        "zeros: {exit:x?}, {exception:x?}"
    );
    Ok(Verdict::Shown(
        "the MMU's empty entries exit, a table of zeros does not",
    ))
}

/// A VM whose entries for "no memory" ask for a #VE, as those of a trust domain do. The first access
/// to a page still exits, as the page's entry is empty; from then on the guest is told, and nobody
/// else.
pub fn mmio<V: Virtualization>() -> Result<Verdict, Failure> {
    if !V::available().contains(Features::EXCEPTIONS) {
        return Ok(Verdict::NotHere("no #VE"));
    }
    let memory = Memory::default();
    let config = Config {
        mmio: MmioFault::Violation,
        ..Config::default()
    };
    let (vm, mut cpu) = machine::<V>(config, memory)?;
    // Memory makes none.
    let done = cpu.run(Operation::Write(memory.gpa, 1))?;
    ensure!(done.exceptions.is_empty(), "memory: {:x?}", done.exceptions);
    // Two pages of one table, and one of another: each is empty at first.
    for page in [0x5000, 0x6000, 0x20_0000] {
        let address = memory.gpa + page + 0x18;
        for time in 0..3 {
            let (operation, access) = match time {
                1 => (Operation::Write(address, 2), Qualification::WRITE),
                _ => (Operation::Read(address), Qualification::READ),
            };
            let done = cpu.run(operation)?;
            let exits = done.faults.len();
            ensure!(
                exits == usize::from(time == 0)
                    && done.faults.iter().all(|taken| {
                        taken.outcome == Outcome::Mmio
                            && !taken.fault.misconfigured
                            && !taken.fault.fault.error.contains(Pferr::RSVD)
                    }),
                "access {time} at {address:#x} exits: {:x?}",
                done.faults
            );
            expect_exception(&done, address, access)?;
            ensure!(
                access == Qualification::WRITE || done.value == DEVICE_VALUE,
                "the guest read {:#x}",
                done.value
            );
        }
    }
    check(&vm)?;
    Ok(Verdict::Shown(
        "one exit for each page, then a #VE with the right page each time",
    ))
}

/// One #VE, about this access.
fn expect_exception(done: &Done, address: u64, access: Qualification) -> Result<(), Failure> {
    let [exception] = done.exceptions[..] else {
        return Err(format!("#VE at {address:#x}: {:x?}", done.exceptions));
    };
    let meant = VirtualizationException {
        reason: 48,
        // Nothing is allowed there; the address is linear, and the guest's own.
        qualification: (access | Qualification::LINEAR_VALID | Qualification::FINAL).bits(),
        linear: address,
        gpa: Gpa::new(address),
    };
    ensure!(exception == meant, "{exception:x?} instead of {meant:x?}");
    Ok(())
}
