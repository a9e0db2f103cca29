//! What is shown, one line each.

mod age;
mod dirty;
mod exceptions;
mod faults;
mod private;
mod shootdown;
mod sub_pages;

use crate::host::tables_in_use;
use crate::processor::Virtualization;
use crate::vm::{Failure, GuestCpu, Memory, Vm};
use crate::{heap, println};
use alloc::sync::Arc;
use twofold_arch::Level;
use twofold_mmu::Config;

/// What a scenario came to.
pub enum Verdict {
    /// Everything was as it should be; what was seen, in a few words.
    Shown(&'static str),
    /// The processor cannot do that.
    NotHere(&'static str),
}

type Scenario = fn() -> Result<Verdict, Failure>;

/// Fails a scenario unless a condition holds.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($explanation:tt)+) => {
        if !$condition {
            return Err(alloc::format!($($explanation)+));
        }
    };
}

/// Fails a scenario if the MMU's tables or slots are not as they must always be.
fn check<V: Virtualization>(vm: &Vm<V>) -> Result<(), Failure> {
    let report = vm.check();
    ensure!(report.violations.is_empty(), "{report}");
    Ok(())
}

/// How most begin: a machine with memory, and a processor that waits for its first operation.
fn machine<V: Virtualization>(
    config: Config,
    memory: Memory,
) -> Result<(Arc<Vm<V>>, GuestCpu<V>), Failure> {
    let vm = Vm::with_memory(config, memory)?;
    let cpu = GuestCpu::new(&vm)?;
    Ok((vm, cpu))
}

/// Memory for one mapping of this size. The 1G page begins at physical address 0 and holds the
/// hypervisor too; its guest stays within the guests' memory.
fn memory_at(level: Level) -> Memory {
    let memory = Memory {
        size: level.bytes(),
        level,
        ..Memory::default()
    };
    match level {
        Level::L1G => Memory { hpa: 0, ..memory },
        _ => memory,
    }
}

/// Runs every scenario and prints a line for each. Returns whether none failed.
pub fn run<V: Virtualization>() -> bool
where
    Vm<V>: Send + Sync,
{
    let scenarios: &[(&str, Scenario)] = &[
        ("not-present fault", faults::not_present::<V>),
        ("write fault", faults::write::<V>),
        ("execute fault", faults::execute::<V>),
        ("user execute fault", faults::user_execute::<V>),
        ("execute fault on a huge page", faults::execute_huge::<V>),
        ("MMIO entries", faults::mmio::<V>),
        ("read-only slot", faults::read_only_slot::<V>),
        ("zap and fault again", faults::zap::<V>),
        (
            "dirty log by write protection",
            dirty::by_write_protection::<V>,
        ),
        (
            "dirty log without dirty bits",
            dirty::without_dirty_bits::<V>,
        ),
        (
            "dirty log by the processor's log",
            dirty::by_processor_log::<V>,
        ),
        ("ageing by accessed bits", age::by_accessed_bits::<V>),
        ("ageing by access tracking", age::by_access_tracking::<V>),
        ("empty entries suppress #VE", exceptions::suppressed::<V>),
        ("MMIO entries that make a #VE", exceptions::mmio::<V>),
        ("sub-pages permitted and denied", sub_pages::judged::<V>),
        (
            "sub-page table filled lazily",
            sub_pages::filled_lazily::<V>,
        ),
        ("private and shared filter", private::filter::<V>),
        (
            "second processor: moved memory",
            shootdown::moved_memory::<V>,
        ),
        (
            "second processor: omitted flush",
            shootdown::omitted_flush::<V>,
        ),
        (
            "second processor: converted memory",
            shootdown::converted_memory::<V>,
        ),
        (
            "second processor: deleted slot",
            shootdown::deleted_slot::<V>,
        ),
        ("second processor: dirty log", shootdown::dirty_log::<V>),
        (
            "second processor: denied sub-page",
            shootdown::denied_sub_page::<V>,
        ),
        (
            "second processor: split and recovery",
            shootdown::split_and_recovered::<V>,
        ),
    ];
    let (mut shown, mut failed, mut not_here) = (0, 0, 0);
    for (name, scenario) in scenarios {
        let heap_before = heap::used();
        let result = scenario().and_then(|verdict| {
            let (tables, heap) = (tables_in_use(), heap::used());
            ensure!(tables == 0, "{tables} table pages were not given back");
            ensure!(
                heap == heap_before,
                "{heap} bytes in use, {heap_before} before"
            );
            Ok(verdict)
        });
        match result {
            Ok(Verdict::Shown(what)) => {
                shown += 1;
                println!("= {name} | ok | {what}");
            }
            Ok(Verdict::NotHere(why)) => {
                not_here += 1;
                println!("= {name} | - | {why}");
            }
            Err(why) => {
                failed += 1;
                println!("= {name} | FAILED | {why}");
            }
        }
    }
    println!("{shown} shown, {failed} failed, {not_here} not on this processor");
    failed == 0
}
