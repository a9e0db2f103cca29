//! #VE: violations that the processor gives to the guest instead of the hypervisor.

use super::{Verdict, check};
use crate::ensure;
use crate::guest;
use crate::processor::{Exit, Features, Virtualization};
use crate::vm::{Failure, GuestCpu, Memory, Operation, Vm};
use twofold_arch::Hpa;
use twofold_mmu::Config;

/// With #VE allowed, whatever the MMU has not mapped still exits: each of its empty entries says so.
/// A table of zeros, which says nothing, makes a #VE, so it is not the processor that never does.
pub fn suppressed<V: Virtualization>() -> Result<Verdict, Failure> {
    if !V::available().contains(Features::EXCEPTIONS) {
        return Ok(Verdict::NotHere("no #VE"));
    }
    let vm = Vm::<V>::new(Config::default())?;
    let memory = Memory::default();
    vm.add_memory(memory)?;
    let mut cpu = GuestCpu::new(&vm)?;
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
