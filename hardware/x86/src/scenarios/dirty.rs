//! Dirty tracking: what the log says against what the guest wrote.

use super::{Verdict, check, machine};
use crate::ensure;
use crate::processor::{Features, Virtualization};
use crate::vm::{Failure, GuestCpu, Memory, Operation, Vm};
use alloc::sync::Arc;
use twofold_arch::PAGE_SIZE;
use twofold_mmu::{Config, RegionFlags};

/// Pages that log.
const PAGES: u64 = 192;
const WORDS: usize = (PAGES / 64) as usize;
const ROUNDS: u64 = 20;

/// Bits by a simple generator: which pages the guest writes in a round.
fn choice(round: u64) -> [u64; WORDS] {
    let mut state = 0x9e37_79b9_7f4a_7c15u64.wrapping_mul(round + 1);
    core::array::from_fn(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // About one page in four.
        state & state.rotate_left(21)
    })
}

fn writes_of<V: Virtualization>(
    cpu: &mut GuestCpu<V>,
    memory: &Memory,
    pages: &[u64; WORDS],
    value: u64,
) -> Result<(), Failure> {
    for page in (0..PAGES).filter(|page| pages[*page as usize / 64] >> (page % 64) & 1 == 1) {
        cpu.run(Operation::Write(memory.gpa + page * PAGE_SIZE + 8, value))?;
    }
    Ok(())
}

fn rounds<V: Virtualization>(
    vm: &Arc<Vm<V>>,
    cpu: &mut GuestCpu<V>,
    memory: &Memory,
) -> Result<(), Failure> {
    for round in 0..ROUNDS {
        let wanted = choice(round);
        writes_of(cpu, memory, &wanted, round)?;
        // Reading is not writing.
        cpu.run(Operation::ReadPages(memory.gpa, PAGES))?;
        let mut log = [0; WORDS];
        vm.take_dirty_log(memory, &mut log)?;
        ensure!(
            log == wanted,
            "round {round}: wrote {wanted:x?}, the log says {log:x?}"
        );
        check(vm)?;
    }
    Ok(())
}

/// Logs a slot that was mapped and writable before, in a machine made like this.
fn agrees<V: Virtualization>(config: Config) -> Result<(), Failure> {
    let memory = Memory {
        size: PAGES * PAGE_SIZE,
        ..Memory::default()
    };
    let (vm, mut cpu) = machine::<V>(config, memory)?;
    cpu.run(Operation::WritePages(memory.gpa, 1, PAGES))?;
    vm.change_region(Memory {
        flags: RegionFlags::LOG_DIRTY,
        ..memory
    })?;
    rounds(&vm, &mut cpu, &memory)
}

/// Every write to a protected page is noticed, each time the log was read.
pub fn by_write_protection<V: Virtualization>() -> Result<Verdict, Failure> {
    agrees::<V>(Config::default())?;
    Ok(Verdict::Shown("192 pages, 20 rounds, log and writes agree"))
}

/// The same where the processor does not set dirty bits either.
pub fn without_dirty_bits<V: Virtualization>() -> Result<Verdict, Failure> {
    let config = Config {
        accessed_dirty: false,
        ..Config::default()
    };
    if Vm::<V>::new(config)?.has_accessed_dirty() {
        return Ok(Verdict::NotHere("nested paging always has dirty bits"));
    }
    agrees::<V>(config)?;
    Ok(Verdict::Shown("192 pages, 20 rounds, log and writes agree"))
}

/// The processor sets dirty bits and writes down where; no write faults.
pub fn by_processor_log<V: Virtualization>() -> Result<Verdict, Failure> {
    if !V::available().contains(Features::WRITE_LOG) {
        return Ok(Verdict::NotHere("no page-modification log"));
    }
    let config = Config {
        pml: true,
        ..Config::default()
    };
    agrees::<V>(config)?;
    // More pages than the log holds, none of which was mapped before.
    const MANY: u64 = 1280;
    let memory = Memory {
        size: MANY * PAGE_SIZE,
        flags: RegionFlags::LOG_DIRTY,
        ..Memory::default()
    };
    let (vm, mut cpu) = machine::<V>(config, memory)?;
    cpu.run(Operation::WritePages(memory.gpa, 1, MANY))?;
    for round in 0..2 {
        let mut log = [0; MANY as usize / 64];
        vm.take_dirty_log(&memory, &mut log)?;
        ensure!(
            log.iter().all(|word| *word == !0),
            "round {round}: {log:x?}"
        );
        let taken = cpu.stats().pf_taken;
        cpu.run(Operation::WritePages(memory.gpa, 2, MANY))?;
        ensure!(
            cpu.stats().pf_taken == taken,
            "writes to mapped pages faulted"
        );
    }
    check(&vm)?;
    Ok(Verdict::Shown(
        "20 rounds, then more than a full log without a fault",
    ))
}
