//! What the program does, part by part.

use std::fs::File;

use anyhow::{Result, bail};
use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DISABLE_QUIRKS2, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
};

use crate::backing::{Backing, Change};
use crate::guest::{Access, HALT};
use crate::ring::Ring;
use crate::vm::{Slot, Vm};

const PAGE: u64 = 4096;
/// Where a slot of small pages is.
const SMALL: u64 = 0x1000_0000;
const SMALL_SIZE: u64 = 64 * PAGE;
/// Where another is, or where the first is moved to.
const ELSEWHERE: u64 = 0x1800_0000;
/// Where a slot of huge pages is.
const HUGE: u64 = 0x4000_0000;
const HUGE_SIZE: u64 = 4 << 20;
/// Where there is nothing.
const NOTHING: u64 = 0x8000_0000;
/// `KVM_X86_QUIRK_SLOT_ZAP_ALL`: a slot that goes takes every mapping along.
const ZAP_ALL: u64 = 1 << 7;

/// Does one part.
///
/// # Errors
/// KVM refuses something, or there is no such part.
pub fn run(part: &str, marks: &File) -> Result<()> {
    match part {
        // With the module's parameters as they are.
        "usual" => {
            small_pages(marks)?;
            host_changes(marks)?;
            huge_pages(marks)?;
            manual_logging(marks)?;
            rings(marks)
        }
        // With nx_huge_pages on and eager_page_split off.
        "careful" => executed_huge_pages(marks),
        other => bail!("there is no part called {other}; there are usual and careful"),
    }
}

const fn page(number: u64) -> u64 {
    SMALL + number * PAGE
}

const fn read(number: u64) -> Access {
    Access::Read(page(number))
}

const fn write(number: u64) -> Access {
    Access::Write(page(number), 0x600d)
}

const fn execute(number: u64) -> Access {
    Access::Execute(page(number))
}

/// Memory of small pages; pages 1 to 3 and 5 are present, and hold an instruction.
fn small_backing() -> Result<Backing> {
    let backing = Backing::new(SMALL_SIZE as usize, false)?;
    for page in [1, 2, 3, 5] {
        backing.write(page * PAGE as usize, &[HALT])?;
    }
    Ok(backing)
}

/// Memory of huge pages, all of which are present. Page 5 of each holds an instruction.
fn huge_backing() -> Result<Backing> {
    let backing = Backing::new(HUGE_SIZE as usize, true)?;
    for start in [0, 2 << 20] {
        backing.write(start + 5 * PAGE as usize, &[HALT])?;
    }
    Ok(backing)
}

/// Faults of each kind, MMIO, logging, and slots that come, change, move and go.
fn small_pages(marks: &File) -> Result<()> {
    let backing = small_backing()?;
    let mut vm = Vm::new(marks, "as usual", &[])?;
    vm.set_slot(1, SMALL, &backing, Slot::Plain)?;
    vm.accesses(&[read(1), write(2), execute(3), read(1), write(1), write(4)])?;

    vm.set_slot(1, SMALL, &backing, Slot::Logging)?;
    vm.accesses(&[write(1), write(5), read(2)])?;
    vm.dirty_log(1, SMALL_SIZE)?;
    vm.accesses(&[write(5), execute(3), write(2)])?;
    vm.dirty_log(1, SMALL_SIZE)?;
    vm.set_slot(1, SMALL, &backing, Slot::Plain)?;
    vm.access(write(4))?;

    vm.accesses(&[
        Access::Read(NOTHING),
        Access::Read(NOTHING + 8),
        Access::Write(NOTHING, 7),
        Access::Write(NOTHING + PAGE, 8),
    ])?;
    let other = small_backing()?;
    vm.set_slot(2, ELSEWHERE, &other, Slot::ReadOnly)?;
    vm.accesses(&[
        Access::Read(NOTHING),
        Access::Read(ELSEWHERE + PAGE),
        Access::Write(ELSEWHERE + PAGE, 9),
        Access::Execute(ELSEWHERE + 3 * PAGE),
    ])?;
    vm.pre_fault(page(16), 4 * PAGE)?;
    vm.accesses(&[read(16), write(17)])?;

    vm.delete_slot(2)?;
    vm.accesses(&[
        Access::Read(ELSEWHERE + PAGE),
        Access::Read(NOTHING),
        write(2),
    ])?;
    vm.delete_slot(1)?;
    vm.set_slot(1, ELSEWHERE, &backing, Slot::Plain)?;
    vm.accesses(&[Access::Read(ELSEWHERE + PAGE), read(1)])?;
    vm.set_slot(1, SMALL, &backing, Slot::Plain)?;
    vm.accesses(&[Access::Read(ELSEWHERE + PAGE), read(1)])?;
    vm.end()
}

/// Host memory that changes below the guest.
fn host_changes(marks: &File) -> Result<()> {
    let backing = small_backing()?;
    let mut vm = Vm::new(marks, "over memory that changes", &[])?;
    vm.set_slot(1, SMALL, &backing, Slot::Plain)?;
    let change = |vm: &Vm<'_>, number: usize, change: Change| -> Result<()> {
        vm.mark(&format!("call: {change:?} page {number}"))?;
        backing.change(number * PAGE as usize, PAGE as usize, change)
    };
    vm.accesses(&[write(1), write(2), write(3)])?;
    change(&vm, 1, Change::Discard)?;
    vm.access(write(1))?;
    change(&vm, 2, Change::ReadOnly)?;
    vm.accesses(&[read(2), write(2)])?;
    change(&vm, 2, Change::Writable)?;
    vm.access(write(2))?;
    change(&vm, 3, Change::Unmap)?;
    vm.access(read(3))?;
    // Never touched: the system's page of zeros, and a copy of it when it is written.
    vm.accesses(&[read(8), write(8), read(8)])?;
    vm.end()
}

/// Huge leaves, their split when logging begins, and their return.
fn huge_pages(marks: &File) -> Result<()> {
    let backing = huge_backing()?;
    let mut vm = Vm::new(marks, "with huge pages", &[])?;
    vm.set_slot(1, HUGE, &backing, Slot::Plain)?;
    vm.accesses(&[
        Access::Read(HUGE),
        Access::Write(HUGE + 3 * PAGE, 1),
        Access::Execute(HUGE + 5 * PAGE),
        Access::Write(HUGE + (2 << 20), 2),
    ])?;
    vm.set_slot(1, HUGE, &backing, Slot::Logging)?;
    vm.accesses(&[
        Access::Read(HUGE),
        Access::Write(HUGE + 7 * PAGE, 3),
        Access::Write(HUGE + (2 << 20) + PAGE, 4),
    ])?;
    vm.dirty_log(1, HUGE_SIZE)?;
    vm.access(Access::Write(HUGE + 7 * PAGE, 5))?;
    vm.set_slot(1, HUGE, &backing, Slot::Plain)?;
    vm.accesses(&[
        Access::Read(HUGE + PAGE),
        Access::Write(HUGE + 8 * PAGE, 6),
        Access::Write(HUGE + (2 << 20) + 2 * PAGE, 7),
    ])?;
    // A slot that logs from the start is mapped with small pages.
    vm.delete_slot(1)?;
    vm.set_slot(1, HUGE, &backing, Slot::Logging)?;
    vm.accesses(&[
        Access::Read(HUGE),
        Access::Write(HUGE, 8),
        Access::Write(HUGE + PAGE, 9),
    ])?;
    vm.set_slot(1, HUGE, &backing, Slot::Plain)?;
    vm.access(Access::Write(HUGE, 10))?;
    vm.mark("call: discard a small page of a huge one")?;
    backing.change(9 * PAGE as usize, PAGE as usize, Change::Discard)?;
    vm.accesses(&[Access::Read(HUGE), Access::Write(HUGE + 9 * PAGE, 11)])?;
    vm.end()
}

/// Logs that are cleared on request, and slots that go alone.
fn manual_logging(marks: &File) -> Result<()> {
    let small = small_backing()?;
    let huge = huge_backing()?;
    let manual = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
    let capabilities = [
        (KVM_CAP_DISABLE_QUIRKS2, ZAP_ALL),
        (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, u64::from(manual)),
    ];
    let mut vm = Vm::new(marks, "with manual clearing", &capabilities)?;
    vm.set_slot(1, SMALL, &small, Slot::Plain)?;
    vm.set_slot(2, HUGE, &huge, Slot::Plain)?;
    vm.accesses(&[write(1), write(2), Access::Write(HUGE, 1)])?;
    vm.set_slot(1, SMALL, &small, Slot::Logging)?;
    vm.set_slot(2, HUGE, &huge, Slot::Logging)?;
    vm.accesses(&[write(1), Access::Write(HUGE + PAGE, 2)])?;
    vm.dirty_log(1, SMALL_SIZE)?;
    vm.clear_dirty_log(1, 0, 0b110)?;
    vm.accesses(&[write(2), read(1)])?;
    vm.clear_dirty_log(1, 0, u64::MAX)?;
    vm.dirty_log(1, SMALL_SIZE)?;
    vm.access(write(1))?;
    vm.clear_dirty_log(2, 64, 0b11)?;
    vm.accesses(&[
        Access::Write(HUGE + 64 * PAGE, 3),
        Access::Write(HUGE + 66 * PAGE, 4),
    ])?;
    vm.delete_slot(1)?;
    vm.accesses(&[read(1), Access::Write(HUGE + 64 * PAGE, 5)])?;
    vm.set_slot(2, HUGE, &huge, Slot::Plain)?;
    vm.access(Access::Write(HUGE + 65 * PAGE, 6))?;
    vm.delete_slot(2)?;
    vm.access(Access::Read(HUGE))?;
    vm.end()
}

/// Writes that are noted in a ring.
fn rings(marks: &File) -> Result<()> {
    let backing = small_backing()?;
    let capabilities = [(KVM_CAP_DIRTY_LOG_RING, Ring::BYTES)];
    let mut vm = Vm::new(marks, "with dirty rings", &capabilities)?;
    let mut ring = Ring::of(vm.vcpu())?;
    vm.set_slot(1, SMALL, &backing, Slot::Logging)?;
    vm.accesses(&[write(1), read(2), write(2), write(3)])?;
    vm.mark(&format!("exit: dirty {:x?}", ring.harvest()))?;
    vm.reset_dirty_rings()?;
    vm.accesses(&[write(3), write(3), write(1)])?;
    vm.mark(&format!("exit: dirty {:x?}", ring.harvest()))?;
    vm.reset_dirty_rings()?;
    vm.end()
}

/// Huge pages that are split one by one, and may not be executed as a whole.
fn executed_huge_pages(marks: &File) -> Result<()> {
    let backing = huge_backing()?;
    let mut vm = Vm::new(marks, "with huge pages that are not executable", &[])?;
    vm.set_slot(1, HUGE, &backing, Slot::Plain)?;
    vm.accesses(&[
        Access::Read(HUGE),
        Access::Execute(HUGE + 5 * PAGE),
        Access::Write(HUGE + 6 * PAGE, 1),
        // Executed first.
        Access::Execute(HUGE + (2 << 20) + 5 * PAGE),
        Access::Write(HUGE + (2 << 20), 2),
    ])?;
    vm.delete_slot(1)?;
    vm.set_slot(1, HUGE, &backing, Slot::Plain)?;
    vm.access(Access::Write(HUGE, 3))?;
    vm.set_slot(1, HUGE, &backing, Slot::Logging)?;
    vm.accesses(&[
        Access::Read(HUGE),
        Access::Write(HUGE + PAGE, 4),
        Access::Write(HUGE + 2 * PAGE, 5),
    ])?;
    vm.dirty_log(1, HUGE_SIZE)?;
    vm.access(Access::Write(HUGE + PAGE, 6))?;
    vm.set_slot(1, HUGE, &backing, Slot::Plain)?;
    vm.access(Access::Write(HUGE + 3 * PAGE, 7))?;
    vm.end()
}
