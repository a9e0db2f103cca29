//! The second processor keeps no translation that the first has taken away.
//!
//! Its guest accesses one page for ever and never leaves by itself, so it lives on the translation
//! that it has until it is made to drop it.

use super::{Verdict, check, machine, private, sub_pages};
use crate::ensure;
use crate::guest;
use crate::processor::Virtualization;
use crate::second::{self, Running, wait_until};
use crate::vm::{DEVICE_VALUE, Failure, GuestCpu, Memory, Operation, Vm};
use alloc::format;
use alloc::sync::Arc;
use core::sync::atomic::Ordering;
use twofold_arch::sppt::AccessMap;
use twofold_arch::{Hpa, Level, PAGE_SIZE};
use twofold_mmu::{Config, RegionFlags};

/// How far the guest must get to count as running.
const STEPS: u64 = 100;
/// How often it is left while it cannot get on.
const EXITS: u64 = 20;
const ROUNDS: u64 = 20;

fn report(word: u64) -> Hpa {
    Hpa::new(guest::MEMORY + guest::REPORT + 8 * word)
}

/// A guest in the background.
struct Background<V: Virtualization> {
    vm: Arc<Vm<V>>,
    running: Running<Result<(), Failure>>,
}

impl<V: Virtualization> Background<V>
where
    Vm<V>: Send + Sync,
{
    fn start(vm: &Arc<Vm<V>>, operation: Operation) -> Result<Self, Failure> {
        guest::clear(report(0), 24);
        let there = Arc::clone(vm);
        let running = second::start(move || {
            let mut cpu = GuestCpu::new(&there)?;
            cpu.run(operation).map(|_| ())
        });
        let new = Self {
            vm: Arc::clone(vm),
            running,
        };
        new.goes_on()?;
        Ok(new)
    }

    /// Gives the guest time to do what it can: it gets on, or is left again and again.
    fn gets_time(&self) -> Result<(), Failure> {
        let steps = guest::load(report(1));
        let exits = self.vm.exits.load(Ordering::Relaxed);
        wait_until("the guest on the second processor does anything", || {
            guest::load(report(1)) >= steps + STEPS
                || self.vm.exits.load(Ordering::Relaxed) >= exits + EXITS
        })
    }

    /// Whether the word at `hpa` changes while the guest gets time.
    fn changes(&self, hpa: Hpa) -> Result<bool, Failure> {
        let before = guest::load(hpa);
        self.gets_time()?;
        Ok(guest::load(hpa) != before)
    }

    /// Waits until the guest has done some more.
    fn goes_on(&self) -> Result<(), Failure> {
        let before = guest::load(report(1));
        wait_until("the guest on the second processor gets on", || {
            guest::load(report(1)) >= before + STEPS || self.running.is_done()
        })?;
        ensure!(
            !self.running.is_done(),
            "the guest on the second processor has stopped"
        );
        Ok(())
    }

    fn stop(self) -> Result<(), Failure> {
        guest::store(report(2), 1);
        self.running.join()
    }
}

/// Moves the memory of the slot to `to`; returns whether the guest still wrote to the old page when
/// the MMU had said that it cannot.
fn move_memory<V: Virtualization>(
    background: &Background<V>,
    memory: &Memory,
    from: Hpa,
    to: Hpa,
) -> Result<bool, Failure>
where
    Vm<V>: Send + Sync,
{
    let hva = memory.hva();
    let change = background.vm.host_change(hva..hva + memory.size);
    let written = background.changes(from);
    let mut range = memory.host_range();
    range.hpa = to;
    background.vm.host().map(range);
    drop(change);
    written
}

/// The page moves back and forth under a guest that writes to it.
pub fn moved_memory<V: Virtualization>() -> Result<Verdict, Failure>
where
    Vm<V>: Send + Sync,
{
    let memory = Memory::default();
    let vm = Vm::<V>::with_memory(Config::default(), memory)?;
    let background = Background::start(&vm, Operation::WriteForever(memory.gpa))?;
    let (mut here, mut there) = (Hpa::new(memory.hpa), Hpa::new(memory.hpa + 0x1000));
    for round in 0..ROUNDS {
        let stale = move_memory(&background, &memory, here, there)?;
        background.goes_on()?;
        ensure!(!stale, "round {round}: the old page was still written");
        ensure!(
            !background.changes(here)?,
            "round {round}: the old page is written"
        );
        ensure!(
            background.changes(there)?,
            "round {round}: the new page is not written"
        );
        (here, there) = (there, here);
    }
    background.stop()?;
    check(&vm)?;
    Ok(Verdict::Shown(
        "20 moves, the old page is never written again",
    ))
}

/// The same with a hypervisor that breaks its promise to flush, once: the check above can fail.
pub fn omitted_flush<V: Virtualization>() -> Result<Verdict, Failure>
where
    Vm<V>: Send + Sync,
{
    let memory = Memory::default();
    let vm = Vm::<V>::with_memory(Config::default(), memory)?;
    let background = Background::start(&vm, Operation::WriteForever(memory.gpa))?;
    let (here, there) = (Hpa::new(memory.hpa), Hpa::new(memory.hpa + 0x1000));
    // The barrier makes the guest leave, too. It must have come back before the page goes.
    *vm.host().after_barrier.lock() = Some(|| {
        let before = guest::load(report(1));
        // If it does not get on the scenario fails by itself.
        let _ = wait_until("", || guest::load(report(1)) >= before + STEPS);
    });
    vm.host().forget_to_flush.store(true, Ordering::SeqCst);
    let stale = move_memory(&background, &memory, here, there)?;
    *vm.host().after_barrier.lock() = None;
    vm.host().forget_to_flush.store(false, Ordering::SeqCst);
    vm.zap_all();
    background.goes_on()?;
    let healed = !background.changes(here)?;
    background.stop()?;
    ensure!(
        stale,
        "the old page was not written although nothing was flushed"
    );
    ensure!(healed, "the old page is written even after a flush");
    Ok(Verdict::Shown("caught: the old page was still written"))
}

/// The page becomes private and shared again under a guest that writes to it.
pub fn converted_memory<V: Virtualization>() -> Result<Verdict, Failure>
where
    Vm<V>: Send + Sync,
{
    let (vm, memory) = private::machine::<V>(1)?;
    let background = Background::start(&vm, Operation::WriteForever(memory.gpa))?;
    let (shared, private) = (Hpa::new(memory.hpa), private::private_half(&memory));
    for round in 0..ROUNDS {
        let becomes_private = round % 2 == 0;
        private::convert(&vm, &memory, 0..1, becomes_private)?;
        let (gone, there) = if becomes_private {
            (shared, private)
        } else {
            (private, shared)
        };
        ensure!(
            !background.changes(gone)?,
            "round {round}: the other half was still written"
        );
        background.goes_on()?;
        ensure!(
            background.changes(there)?,
            "round {round}: the half that is there is not written"
        );
    }
    background.stop()?;
    check(&vm)?;
    Ok(Verdict::Shown(
        "20 conversions, the other half is never written",
    ))
}

/// Huge leaves are split and made again under a guest that writes through them.
pub fn split_and_recovered<V: Virtualization>() -> Result<Verdict, Failure>
where
    Vm<V>: Send + Sync,
{
    let memory = super::memory_at(Level::L2M);
    let plain = Memory {
        flags: RegionFlags::empty(),
        ..memory
    };
    let logged = Memory {
        flags: RegionFlags::LOG_DIRTY,
        ..memory
    };
    const PAGES: u64 = 512;
    const WRITTEN: u64 = 7;
    for page in 0..PAGES {
        guest::store(Hpa::new(memory.hpa + page * PAGE_SIZE), page);
    }
    let sum = PAGES * (PAGES - 1) / 2;
    let (vm, mut cpu) = machine::<V>(Config::default(), plain)?;
    // The guest writes beside the word that the other one reads.
    let background = Background::start(
        &vm,
        Operation::WriteForever(memory.gpa + WRITTEN * PAGE_SIZE + 8),
    )?;
    for round in 0..ROUNDS {
        let huge = vm.stats().pages_2m;
        ensure!(
            huge == 1,
            "round {round}: {huge} huge leaves before logging"
        );
        vm.change_region(logged)?;
        let stats = vm.stats();
        ensure!(
            stats.pages_2m == 0 && stats.pages_4k >= PAGES,
            "round {round}: not split: {stats:?}"
        );
        background.goes_on()?;
        let mut log = [0; PAGES as usize / 64];
        vm.take_dirty_log(&memory, &mut log)?;
        ensure!(
            log[0] == 1 << WRITTEN && log[1..].iter().all(|word| *word == 0),
            "round {round}: the log is {log:x?}"
        );
        let read = cpu.run(Operation::ReadPages(memory.gpa, PAGES))?;
        ensure!(
            read.value == sum,
            "round {round}: the guest reads {read:x?}"
        );
        vm.change_region(plain)?;
        background.goes_on()?;
        let read = cpu.run(Operation::ReadPages(memory.gpa, PAGES))?;
        ensure!(
            read.value == sum,
            "round {round}: the guest reads {read:x?}"
        );
        check(&vm)?;
    }
    background.stop()?;
    Ok(Verdict::Shown(
        "2M to 4K and back 20 times; the log and the data are right",
    ))
}

/// A slot goes away under a guest that reads it.
pub fn deleted_slot<V: Virtualization>() -> Result<Verdict, Failure>
where
    Vm<V>: Send + Sync,
{
    const OLD: u64 = 0x01d;
    const POISON: u64 = 0xbad;
    for zap_all in [true, false] {
        let memory = Memory::default();
        let config = Config {
            slot_zap_all: zap_all,
            ..Config::default()
        };
        let vm = Vm::<V>::with_memory(config, memory)?;
        guest::store(Hpa::new(memory.hpa), OLD);
        let background = Background::start(&vm, Operation::ReadForever(memory.gpa))?;
        ensure!(
            guest::load(report(0)) == OLD,
            "the guest reads something else"
        );
        vm.change_region(Memory { size: 0, ..memory })?;
        // Whoever reads this reads memory that is no longer the guest's.
        guest::store(Hpa::new(memory.hpa), POISON);
        let mut poisoned = false;
        for _ in 0..ROUNDS {
            background.goes_on()?;
            poisoned |= guest::load(report(0)) == POISON;
        }
        let seen = guest::load(report(0));
        background.stop()?;
        ensure!(!poisoned, "the guest read memory of a slot that was gone");
        ensure!(seen == DEVICE_VALUE, "the guest reads {seen:#x}");
        check(&vm)?;
    }
    Ok(Verdict::Shown(
        "with all mappings dropped, and with the slot's only",
    ))
}

/// The dirty log of a page that is written all the time never misses it.
pub fn dirty_log<V: Virtualization>() -> Result<Verdict, Failure>
where
    Vm<V>: Send + Sync,
{
    for pml in [false, true] {
        let config = Config {
            pml,
            ..Config::default()
        };
        let memory = Memory {
            flags: RegionFlags::LOG_DIRTY,
            ..Memory::default()
        };
        let vm = Vm::<V>::with_memory(config, memory)?;
        let background = Background::start(&vm, Operation::WriteForever(memory.gpa))?;
        let mut missed = None;
        for round in 0..2 * ROUNDS {
            background.goes_on()?;
            let mut log = [0];
            vm.take_dirty_log(&memory, &mut log)?;
            if log != [1] {
                missed = Some(round);
                break;
            }
        }
        background.stop()?;
        if let Some(round) = missed {
            return Err(format!(
                "round {round} (log of the processor: {pml}): a page that is written is not in the log"
            ));
        }
        check(&vm)?;
    }
    Ok(Verdict::Shown("40 reads of the log, each has the page"))
}

/// A piece of a page that is written all the time may not be any more, and then may be again.
pub fn denied_sub_page<V: Virtualization>() -> Result<Verdict, Failure>
where
    Vm<V>: Send + Sync,
{
    let memory = Memory::default();
    let Some(vm) = sub_pages::machine::<V>(memory)? else {
        return Ok(Verdict::NotHere("no sub-page permissions"));
    };
    let place = Hpa::new(memory.hpa);
    // Only the piece that is written changes its permission at first, then the whole page does.
    let others = AccessMap(!1);
    let background = Background::start(&vm, Operation::WriteForever(memory.gpa))?;
    let mut wrong = None;
    for round in 0..ROUNDS {
        let (before, denied) = match round % 2 {
            0 => (AccessMap(1), others),
            _ => (AccessMap::FULL, AccessMap(0)),
        };
        sub_pages::protect(&vm, &memory, 0, &[before])?;
        background.goes_on()?;
        let written = background.changes(place)?;
        sub_pages::protect(&vm, &memory, 0, &[denied])?;
        let stale = background.changes(place)?;
        if stale || !written {
            let what = if stale { "through" } else { "not through" };
            wrong = Some(format!("round {round}: the write gets {what}"));
            break;
        }
    }
    background.stop()?;
    if let Some(wrong) = wrong {
        return Err(wrong);
    }
    check(&vm)?;
    Ok(Verdict::Shown(
        "20 changes, no write after its permission is gone",
    ))
}
