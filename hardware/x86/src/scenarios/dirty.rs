//! Dirty tracking: what the log says against what the guest wrote.

use super::{Verdict, check};
use crate::ensure;
use crate::processor::Virtualization;
use crate::vm::{Failure, GuestCpu, Memory, Operation, Vm};
use alloc::sync::Arc;
use twofold_arch::{Level, PAGE_SIZE};
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
        vm.dirty_log_get(0, memory.slot as u16, &mut log)
            .map_err(|error| alloc::format!("{error}"))?;
        ensure!(
            log == wanted,
            "round {round}: wrote {wanted:x?}, the log says {log:x?}"
        );
        check(vm)?;
    }
    Ok(())
}

/// Every write to a protected page is noticed, each time the log was read.
pub fn by_write_protection<V: Virtualization>() -> Result<Verdict, Failure> {
    let vm = Vm::<V>::new(Config {
        pml: false,
        ..Config::default()
    })?;
    let memory = Memory {
        size: PAGES * PAGE_SIZE,
        level: Level::L2M,
        ..Memory::default()
    };
    vm.add_memory(memory)?;
    let mut cpu = GuestCpu::new(&vm)?;
    // Everything is mapped and writable before logging begins.
    cpu.run(Operation::WritePages(memory.gpa, 1, PAGES))?;
    vm.change_region(Memory {
        flags: RegionFlags::LOG_DIRTY,
        ..memory
    })?;
    rounds(&vm, &mut cpu, &memory)?;
    Ok(Verdict::Shown("192 pages, 20 rounds, log and writes agree"))
}
