//! Private memory: two halves behind one range of guest addresses, each taken away without the
//! other.

use super::{Verdict, check};
use crate::ensure;
use crate::guest;
use crate::host::HostRange;
use crate::processor::Virtualization;
use crate::vm::{Failure, GuestCpu, Memory, Operation, Vm};
use alloc::format;
use alloc::sync::Arc;
use core::ops::Range;
use twofold_arch::{Gfn, Hpa, PAGE_SIZE};
use twofold_mmu::{AccessKind, Config, Conversion, PrivateMemory, RegionFlags};

const PAGES: u64 = 16;

/// Where the private half is, as the hypervisor names it.
const ADDRESS: u64 = 1 << 46;
/// And in physical memory, from the shared half on.
const DISTANCE: u64 = 0x10_0000;

/// A slot of so many pages with a private half.
pub fn machine<V: Virtualization>(pages: u64) -> Result<(Arc<Vm<V>>, Memory), Failure> {
    let vm = Vm::<V>::new(Config {
        slot_zap_all: false,
        private_memory: Some(PrivateMemory {
            access: AccessKind::ByAttribute,
            conversion: Conversion::ZapOpposite,
        }),
        ..Config::default()
    })?;
    let memory = Memory {
        size: pages * PAGE_SIZE,
        flags: RegionFlags::GUEST_MEMFD,
        ..Memory::default()
    };
    vm.host().map(memory.host_range());
    vm.host().map(HostRange {
        hva: private_addresses(&memory),
        hpa: private_half(&memory),
        ..memory.host_range()
    });
    vm.set_region_with_guest_memory(memory.region(), || Ok(ADDRESS))
        .map_err(|error| format!("{error}"))?;
    Ok((vm, memory))
}

/// Where the private half is in physical memory.
pub fn private_half(memory: &Memory) -> Hpa {
    Hpa::new(memory.hpa + DISTANCE)
}

fn private_addresses(memory: &Memory) -> Range<u64> {
    ADDRESS..ADDRESS + memory.size
}

/// Makes pages of the slot private or shared.
pub fn convert<V: Virtualization>(
    vm: &Vm<V>,
    memory: &Memory,
    pages: Range<u64>,
    private: bool,
) -> Result<(), Failure> {
    let gfn = |page| Gfn::new((memory.gpa >> 12) + page);
    vm.set_attributes(gfn(pages.start)..gfn(pages.end), private)
        .map_err(|error| format!("{error}"))
}

/// Each change takes out what it is about and leaves the rest mapped.
pub fn filter<V: Virtualization>() -> Result<Verdict, Failure> {
    let (vm, memory) = machine::<V>(PAGES)?;
    let shared_value = |page| 0x5000 + page;
    let private_value = |page| 0x9000 + page;
    for page in 0..PAGES {
        let place = Hpa::new(memory.hpa + page * PAGE_SIZE);
        guest::store(place, shared_value(page));
        let place = Hpa::new(private_half(&memory).get() + page * PAGE_SIZE);
        guest::store(place, private_value(page));
    }
    let mut cpu = GuestCpu::new(&vm)?;
    // Reads every page; the pages in `faulting` fault, the others do not.
    let mut read = |what: &str, private: Range<u64>, faulting: &dyn Fn(u64) -> bool| {
        for page in 0..PAGES {
            let done = cpu.run(Operation::Read(memory.gpa + page * PAGE_SIZE))?;
            let expected = if private.contains(&page) {
                private_value(page)
            } else {
                shared_value(page)
            };
            ensure!(
                done.value == expected,
                "{what}: page {page} reads {:#x} instead of {expected:#x}",
                done.value
            );
            ensure!(
                done.faults.is_empty() != faulting(page),
                "{what}: page {page} took {} faults",
                done.faults.len()
            );
        }
        check(&vm)
    };
    read("first", 0..0, &|_| true)?;
    convert(&vm, &memory, 4..8, true)?;
    read("made private", 4..8, &|page| (4..8).contains(&page))?;
    drop(vm.host_change(memory.hva()..memory.hva() + memory.size));
    read("shared memory changed", 4..8, &|page| {
        !(4..8).contains(&page)
    })?;
    vm.end_host_change(vm.begin_private_change(private_addresses(&memory)));
    read("private memory changed", 4..8, &|page| {
        (4..8).contains(&page)
    })?;
    convert(&vm, &memory, 4..6, false)?;
    read("made shared", 6..8, &|page| (4..6).contains(&page))?;
    Ok(Verdict::Shown(
        "conversions and changes of either half take out that half only",
    ))
}
