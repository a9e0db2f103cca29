//! Faults that the MMU fixes, and the guest goes on.

use super::Verdict;
use crate::ensure;
use crate::guest;
use crate::processor::Virtualization;
use crate::vm::{Failure, GuestCpu, Memory, Operation, Vm};
use twofold_arch::{Hpa, Level};
use twofold_mmu::{Config, Outcome};

/// Guest-physical address of the memory that scenarios use.
const GPA: u64 = 0x8000_0000;
/// And where that is: 2 MiB aligned, above the guest's first slot.
const HPA: u64 = guest::MEMORY + 0x20_0000;

/// A read of a page that was never mapped.
pub fn not_present<V: Virtualization>() -> Result<Verdict, Failure> {
    let vm = Vm::<V>::new(Config::default())?;
    vm.add_memory(Memory {
        slot: 1,
        gpa: GPA,
        size: 0x20_0000,
        hpa: HPA,
        level: Level::L4K,
        writable: true,
        flags: 0,
    })?;
    let mut cpu = GuestCpu::new(&vm)?;
    guest::store(Hpa::new(HPA + 0x18), 0xfeed_beef);
    let done = cpu.run(Operation::Read(GPA + 0x18))?;
    ensure!(
        done.value == 0xfeed_beef,
        "the guest read {:#x}",
        done.value
    );
    ensure!(
        done.faults.len() == 1
            && done.faults[0].outcome == (Outcome::Fixed { level: Level::L4K })
            && done.faults[0].fault.fault.gpa.get() == GPA + 0x18,
        "faults: {:x?}",
        done.faults
    );
    Ok(Verdict::Shown("one fault, one 4K leaf, then the value"))
}
