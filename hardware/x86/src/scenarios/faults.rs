//! Faults that the MMU fixes, and the guest goes on.

use super::{Verdict, machine, memory_at};
use crate::ensure;
use crate::guest;
use crate::host::Writes;
use crate::processor::Virtualization;
use crate::vm::{DEVICE_VALUE, Done, Failure, GuestCpu, Memory, Operation, Vm};
use alloc::format;
use alloc::sync::Arc;
use twofold_arch::{Hpa, Level, Pferr};
use twofold_mmu::{Config, Outcome, RegionFlags};

const VALUE: u64 = 0xfeed_beef_0000_0001;

type Machine<V> = (Arc<Vm<V>>, GuestCpu<V>, Memory);

/// A machine with memory of one page of this size, all of whose smaller pages are mapped at once.
fn one_page<V: Virtualization>(level: Level, writes: Writes) -> Result<Machine<V>, Failure> {
    let memory = Memory {
        writes,
        ..memory_at(level)
    };
    let (vm, cpu) = machine(Config::default(), memory)?;
    Ok((vm, cpu, memory))
}

/// One fault, of this kind, fixed by a leaf of this size.
fn expect_one(
    done: &Done,
    gpa: u64,
    level: Level,
    error: Pferr,
    absent: Pferr,
) -> Result<(), Failure> {
    let [taken] = done.faults[..] else {
        return Err(format!("faults at {level}: {:x?}", done.faults));
    };
    let fault = taken.fault.fault;
    ensure!(
        fault.gpa.get() == gpa
            && fault.error.contains(error)
            && !fault.error.intersects(absent | Pferr::RSVD)
            && taken.outcome == Outcome::Fixed { level },
        "at {level}: {taken:x?}"
    );
    Ok(())
}

/// Where the scenarios access memory: not at its beginning, so that the offset within large pages
/// matters, and where there is memory in a 1G page too.
fn target(memory: &Memory) -> (u64, Hpa) {
    let hpa = Memory::default().hpa + 0x18;
    (memory.gpa + (hpa - memory.hpa), Hpa::new(hpa))
}

/// Reads of memory that was never mapped.
pub fn not_present<V: Virtualization>() -> Result<Verdict, Failure> {
    for level in [Level::L4K, Level::L2M, Level::L1G] {
        let (vm, mut cpu, memory) = one_page::<V>(level, Writes::Allowed)?;
        let (gpa, hpa) = target(&memory);
        guest::store(hpa, VALUE);
        let done = cpu.run(Operation::Read(gpa))?;
        expect_one(
            &done,
            gpa,
            level,
            Pferr::empty(),
            Pferr::PRESENT | Pferr::WRITE | Pferr::FETCH,
        )?;
        ensure!(done.value == VALUE, "the guest read {:#x}", done.value);
        // The rest of the page came with it.
        let last = memory.gpa + memory.size.min(0x10_0000) - 8;
        let done = cpu.run(Operation::Read(last))?;
        ensure!(done.faults.is_empty(), "again: {:x?}", done.faults);
        super::check(&vm)?;
    }
    Ok(Verdict::Shown("one fault each for 4K, 2M and 1G"))
}

/// Writes to memory that was never mapped, and to memory that is mapped read-only.
pub fn write<V: Virtualization>() -> Result<Verdict, Failure> {
    for level in [Level::L4K, Level::L2M, Level::L1G] {
        let (vm, mut cpu, memory) = one_page::<V>(level, Writes::Allowed)?;
        let (gpa, hpa) = target(&memory);
        guest::store(hpa, 0);
        let done = cpu.run(Operation::Write(gpa, VALUE))?;
        expect_one(
            &done,
            gpa,
            level,
            Pferr::WRITE,
            Pferr::PRESENT | Pferr::FETCH,
        )?;
        ensure!(guest::load(hpa) == VALUE, "nothing was written");
        super::check(&vm)?;
        drop((cpu, vm));

        let (vm, mut cpu, memory) = one_page::<V>(level, Writes::OnDemand)?;
        let (gpa, hpa) = target(&memory);
        cpu.run(Operation::Read(gpa))?;
        let done = cpu.run(Operation::Write(gpa, VALUE + 1))?;
        expect_one(
            &done,
            gpa,
            level,
            Pferr::WRITE | Pferr::PRESENT,
            Pferr::FETCH,
        )?;
        ensure!(guest::load(hpa) == VALUE + 1, "nothing was written");
        super::check(&vm)?;
    }
    Ok(Verdict::Shown(
        "absent and read-only memory, at 4K, 2M and 1G",
    ))
}

fn fetch_as<V: Virtualization>(user: bool) -> Result<(), Failure> {
    for level in [Level::L4K, Level::L2M, Level::L1G] {
        let (vm, mut cpu, memory) = one_page::<V>(level, Writes::Allowed)?;
        let (gpa, hpa) = target(&memory);
        guest::store_return(hpa);
        cpu.processor.set_user(user);
        let done = cpu.run(Operation::Fetch(gpa))?;
        expect_one(
            &done,
            gpa,
            level,
            Pferr::FETCH,
            Pferr::PRESENT | Pferr::WRITE,
        )?;
        super::check(&vm)?;
    }
    Ok(())
}

/// Calls into memory that was never mapped.
pub fn execute<V: Virtualization>() -> Result<Verdict, Failure> {
    fetch_as::<V>(false)?;
    Ok(Verdict::Shown("at 4K, 2M and 1G"))
}

/// The same in user mode.
pub fn user_execute<V: Virtualization>() -> Result<Verdict, Failure> {
    fetch_as::<V>(true)?;
    Ok(Verdict::Shown("at 4K, 2M and 1G, from privilege level 3"))
}

/// Huge pages that are not executable: a fetch makes small ones.
pub fn execute_huge<V: Virtualization>() -> Result<Verdict, Failure> {
    let memory = memory_at(Level::L2M);
    let config = Config {
        nx_huge_pages: true,
        ..Config::default()
    };
    let (vm, mut cpu) = machine::<V>(config, memory)?;
    let (gpa, hpa) = target(&memory);
    guest::store_return(hpa);
    let done = cpu.run(Operation::Read(gpa))?;
    expect_one(&done, gpa, Level::L2M, Pferr::empty(), Pferr::PRESENT)?;
    let done = cpu.run(Operation::Fetch(gpa))?;
    // As in KVM the fault finds nothing left to do once the page is split.
    ensure!(
        matches!(done.faults[..], [taken] if taken.outcome == Outcome::Spurious
            && taken.fault.fault.error.contains(Pferr::FETCH | Pferr::PRESENT)),
        "the fetch: {:x?}",
        done.faults
    );
    let stats = vm.stats();
    ensure!(
        stats.pages_2m == 0 && stats.pages_4k >= 512,
        "not split: {stats:?}"
    );
    // What was readable stays so without a fault.
    let done = cpu.run(Operation::ReadPages(memory.gpa, 512))?;
    ensure!(done.faults.is_empty(), "reads fault: {:x?}", done.faults);
    super::check(&vm)?;
    Ok(Verdict::Shown(
        "a fetch from a present 2M page faults and goes on in a 4K page",
    ))
}

/// Accesses where there is no memory: the second is told apart by the processor alone. Then there is
/// memory.
pub fn mmio<V: Virtualization>() -> Result<Verdict, Failure> {
    let vm = Vm::<V>::new(Config::default())?;
    let mut cpu = GuestCpu::new(&vm)?;
    let memory = Memory::default();
    let (gpa, hpa) = target(&memory);
    guest::store(hpa, VALUE);
    for time in 0..3 {
        let done = cpu.run(Operation::Read(gpa))?;
        ensure!(
            done.value == DEVICE_VALUE,
            "the guest read {:#x}",
            done.value
        );
        let [taken] = done.faults[..] else {
            return Err(format!("access {time}: {:x?}", done.faults));
        };
        ensure!(
            taken.outcome == Outcome::Mmio
                && taken.fault.fault.error.contains(Pferr::RSVD) == (time > 0)
                && (time == 0 || taken.fault.misconfigured == V::MISCONFIGURES),
            "access {time}: {taken:x?}"
        );
    }
    ensure!(cpu.stats().pf_mmio_spte_created == 1, "{:?}", cpu.stats());
    vm.add_memory(memory)?;
    let done = cpu.run(Operation::Read(gpa))?;
    ensure!(
        done.value == VALUE,
        "the old entry survived a new slot: {:#x}, {:x?}",
        done.value,
        done.faults
    );
    super::check(&vm)?;
    Ok(Verdict::Shown(if V::MISCONFIGURES {
        "EPT misconfiguration from the second access on; stale after a new slot"
    } else {
        "reserved-bit fault from the second access on; stale after a new slot"
    }))
}

/// Writes to a read-only slot are for a device; reads are not.
pub fn read_only_slot<V: Virtualization>() -> Result<Verdict, Failure> {
    let memory = Memory {
        flags: RegionFlags::READONLY,
        ..Memory::default()
    };
    let (vm, mut cpu) = machine::<V>(Config::default(), memory)?;
    let (gpa, hpa) = target(&memory);
    guest::store(hpa, VALUE);
    for _ in 0..2 {
        let done = cpu.run(Operation::Read(gpa))?;
        ensure!(done.value == VALUE, "the guest read {:#x}", done.value);
        let done = cpu.run(Operation::Write(gpa, 0))?;
        ensure!(
            done.faults
                .iter()
                .map(|taken| taken.outcome)
                .eq([Outcome::Mmio]),
            "{:x?}",
            done.faults
        );
        ensure!(guest::load(hpa) == VALUE, "the memory was written");
    }
    super::check(&vm)?;
    Ok(Verdict::Shown(
        "reads see memory, writes exit, nothing is written",
    ))
}

/// Memory is taken away and put somewhere else; the guest's next access finds it there.
pub fn zap<V: Virtualization>() -> Result<Verdict, Failure> {
    for level in [Level::L4K, Level::L2M] {
        let (vm, mut cpu, memory) = one_page::<V>(level, Writes::Allowed)?;
        let (gpa, hpa) = target(&memory);
        guest::store(hpa, VALUE);
        cpu.run(Operation::Read(gpa))?;
        let flushes = vm.flushes();
        let moved = Memory {
            hpa: memory.hpa + 0x100_0000,
            ..memory
        };
        {
            let hva = memory.hva();
            let _change = vm.host_change(hva..hva + memory.size);
            ensure!(vm.flushes() > flushes, "nothing was flushed");
            let mut range = moved.host_range();
            range.hva = hva..hva + memory.size;
            vm.host().map(range);
        }
        guest::store(Hpa::new(hpa.get() + 0x100_0000), VALUE + 1);
        let done = cpu.run(Operation::Read(gpa))?;
        expect_one(
            &done,
            gpa,
            level,
            Pferr::empty(),
            Pferr::PRESENT | Pferr::WRITE | Pferr::FETCH,
        )?;
        ensure!(done.value == VALUE + 1, "the guest read {:#x}", done.value);
        // All at once, too.
        vm.zap_all();
        let done = cpu.run(Operation::Read(gpa))?;
        ensure!(
            done.value == VALUE + 1 && !done.faults.is_empty(),
            "after everything was dropped: {done:x?}"
        );
        super::check(&vm)?;
    }
    Ok(Verdict::Shown(
        "memory moved, then everything dropped, at 4K and 2M",
    ))
}
