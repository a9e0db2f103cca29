//! Ageing: which pages were used, against what the guest used.

use super::{Verdict, check, machine};
use crate::ensure;
use crate::processor::Virtualization;
use crate::smp;
use crate::vm::{Failure, Memory, Operation, Vm};
use twofold_arch::PAGE_SIZE;
use twofold_mmu::Config;

const PAGES: u64 = 64;
const ROUNDS: u64 = 10;

fn agrees<V: Virtualization>(config: Config) -> Result<(), Failure> {
    let memory = Memory {
        size: PAGES * PAGE_SIZE,
        ..Memory::default()
    };
    let (vm, mut cpu) = machine::<V>(config, memory)?;
    cpu.run(Operation::ReadPages(memory.gpa, PAGES))?;
    let page_of = |page: u64| {
        let hva = memory.hva() + page * PAGE_SIZE;
        hva..hva + PAGE_SIZE
    };
    for round in 0..ROUNDS {
        for page in 0..PAGES {
            vm.clear_young(page_of(page));
        }
        // The MMU does not: a use through an old translation may go unnoticed. Here none shall.
        smp::flush_everywhere();
        let used = |page: u64| (page * 7 + round) % 5 < 2;
        for page in (0..PAGES).filter(|page| used(*page)) {
            let address = memory.gpa + page * PAGE_SIZE;
            let operation = if page % 2 == 0 {
                Operation::Read(address)
            } else {
                Operation::Write(address, round)
            };
            cpu.run(operation)?;
        }
        for page in 0..PAGES {
            let young = vm.test_young(page_of(page));
            ensure!(
                young == used(page),
                "round {round}, page {page}: young {young}"
            );
        }
        check(&vm)?;
    }
    Ok(())
}

/// By the accessed bits that the processor sets.
pub fn by_accessed_bits<V: Virtualization>() -> Result<Verdict, Failure> {
    agrees::<V>(Config::default())?;
    Ok(Verdict::Shown(
        "64 pages, 10 rounds, ages and accesses agree",
    ))
}

/// By taking every permission away, on processors that set no accessed bits.
pub fn by_access_tracking<V: Virtualization>() -> Result<Verdict, Failure> {
    let config = Config {
        accessed_dirty: false,
        ..Config::default()
    };
    if Vm::<V>::new(config)?.has_accessed_dirty() {
        return Ok(Verdict::NotHere("nested paging always has accessed bits"));
    }
    agrees::<V>(config)?;
    Ok(Verdict::Shown(
        "64 pages, 10 rounds, ages and accesses agree",
    ))
}
