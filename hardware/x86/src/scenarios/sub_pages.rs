//! Sub-page permissions: which pieces of 128 bytes of a page may be written.

use super::{Verdict, check};
use crate::ensure;
use crate::guest;
use crate::processor::{Features, Virtualization};
use crate::vm::{Failure, GuestCpu, Memory, Operation, Vm};
use alloc::format;
use alloc::sync::Arc;
use twofold_arch::sppt::{AccessMap, SUB_PAGE_BYTES, SUB_PAGES};
use twofold_arch::{Gpa, Hpa, PAGE_SIZE};
use twofold_mmu::{Config, Outcome};

const NOT_HERE: Verdict = Verdict::NotHere("no sub-page permissions");

/// A machine with this memory that can protect sub-pages; `None` where the processor cannot.
pub fn machine<V: Virtualization>(memory: Memory) -> Result<Option<Arc<Vm<V>>>, Failure> {
    if !V::available().contains(Features::SUB_PAGES) {
        return Ok(None);
    }
    let vm = Vm::<V>::with_memory(Config::default(), memory)?;
    vm.enable_sub_pages().map_err(|error| format!("{error}"))?;
    Ok(Some(vm))
}

/// Gives pages of the memory, from `page` on, these access maps.
pub fn protect<V: Virtualization>(
    vm: &Vm<V>,
    memory: &Memory,
    page: u64,
    maps: &[AccessMap],
) -> Result<(), Failure> {
    let first = Gpa::new(memory.gpa + page * PAGE_SIZE).frame();
    vm.set_access(0, first, maps)
        .map_err(|error| format!("access maps: {error}"))
}

/// Writes to the first and the last word of each sub-page of a page; what is permitted gets into
/// memory, and what is not comes to the hypervisor. Returns the misses of the table.
fn write_everywhere<V: Virtualization>(
    cpu: &mut GuestCpu<V>,
    memory: &Memory,
    page: u64,
    map: AccessMap,
    value: u64,
) -> Result<u32, Failure> {
    let mut misses = 0;
    for sub_page in 0..u64::from(SUB_PAGES) {
        for word in [0, SUB_PAGE_BYTES - 8] {
            let offset = page * PAGE_SIZE + sub_page * SUB_PAGE_BYTES + word;
            let (gpa, hpa) = (memory.gpa + offset, Hpa::new(memory.hpa + offset));
            let before = guest::load(hpa);
            let done = cpu.run(Operation::Write(gpa, value + offset))?;
            misses += done.sub_page_misses;
            let denied = done.faults.iter().any(|taken| {
                taken.outcome == Outcome::SubPageDenied && taken.fault.fault.gpa.get() == gpa
            });
            let permitted = map.allows(offset % PAGE_SIZE, 8);
            let expected = if permitted { value + offset } else { before };
            ensure!(
                denied != permitted && guest::load(hpa) == expected,
                "{map:x?}: a write at {offset:#x} was {}, and {:#x} is there: {:x?}",
                if denied { "denied" } else { "permitted" },
                guest::load(hpa),
                done.faults
            );
        }
    }
    // The first read may have to map the page.
    let read = Operation::Read(memory.gpa + page * PAGE_SIZE);
    cpu.run(read)?;
    let done = cpu.run(read)?;
    ensure!(done.faults.is_empty(), "a read: {:x?}", done.faults);
    Ok(misses)
}

/// Every piece of 128 bytes of a page is judged by its own bit, whichever map the page had before.
pub fn judged<V: Virtualization>() -> Result<Verdict, Failure> {
    let memory = Memory {
        size: 2 * PAGE_SIZE,
        ..Memory::default()
    };
    let Some(vm) = machine::<V>(memory)? else {
        return Ok(NOT_HERE);
    };
    let mut cpu = GuestCpu::new(&vm)?;
    let maps = [
        AccessMap(0),
        AccessMap(0x5555_5555),
        AccessMap(1 << 31 | 1),
        AccessMap(0xffff_fffe),
        AccessMap::FULL,
        AccessMap(0x0ff0_f00f),
    ];
    for (round, map) in maps.into_iter().enumerate() {
        // The page beside it has other permissions.
        let beside = AccessMap(!map.0);
        protect(&vm, &memory, 0, &[map, beside])?;
        let value = (round as u64 + 1) << 32;
        write_everywhere(&mut cpu, &memory, 0, map, value)?;
        write_everywhere(&mut cpu, &memory, 1, beside, value)?;
        check(&vm)?;
    }
    Ok(Verdict::Shown(
        "12 maps, the first and last word of each of 32 sub-pages",
    ))
}

/// The table is empty until a write needs it. A miss fills 2M of it, and a change of the maps empties
/// that again.
pub fn filled_lazily<V: Virtualization>() -> Result<Verdict, Failure> {
    const PAGES: u64 = 1024;
    const MAP: AccessMap = AccessMap(0x0000_ffff);
    let memory = Memory {
        size: PAGES * PAGE_SIZE,
        ..Memory::default()
    };
    let Some(vm) = machine::<V>(memory)? else {
        return Ok(NOT_HERE);
    };
    let mut cpu = GuestCpu::new(&vm)?;
    // Two pages of the first 2M, and one of the second.
    let pages = [3, 500, 600];
    for page in pages {
        protect(&vm, &memory, page, &[MAP])?;
    }
    let writes = |cpu: &mut GuestCpu<V>, what: &str, expected: [u32; 3]| {
        for (page, expected) in pages.into_iter().zip(expected) {
            let misses = write_everywhere(cpu, &memory, page, MAP, 1 << 40)?;
            ensure!(
                misses == expected,
                "{what}, page {page}: {misses} misses instead of {expected}"
            );
        }
        check(&vm)
    };
    // Reads and pages that are not protected have no use for it.
    for operation in [
        Operation::ReadPages(memory.gpa, PAGES),
        Operation::Write(memory.gpa, 1),
    ] {
        let misses = cpu.run(operation)?.sub_page_misses;
        ensure!(misses == 0, "{operation:x?}: {misses} misses");
    }
    writes(&mut cpu, "first", [1, 0, 1])?;
    writes(&mut cpu, "again", [0, 0, 0])?;
    protect(&vm, &memory, 7, &[AccessMap(1)])?;
    writes(&mut cpu, "after a change", [1, 0, 0])?;
    Ok(Verdict::Shown(
        "one miss for each 2M, none again, one after a change",
    ))
}
