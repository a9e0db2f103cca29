//! What the protected hypervisor's calls cost, on memory of this process: its own work, without the
//! exception that brings the call there and without TLB maintenance. `hardware/arm64` counts
//! instructions with both on a machine model.

// UNSAFETY: plays physical memory.
#![expect(unsafe_code)]

use crate::huge::Huge;
use crate::measure::{Comparison, Contest, Meter, per_item};
use crate::report::{Reach, Row};
use anyhow::{Result, ensure};
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use twofold_arch::stage2::Stage2Caps;
use twofold_arch::{Gfn, Gpa, Hfn, Hpa, PAGE_SIZE};
use twofold_pkvm::hypercall::{Call, REGISTERS};
use twofold_pkvm::run::Exit;
use twofold_pkvm::{
    Config, Handle, HostFault, HostVm, Hypervisor, PageMap, PageRecord, Pages, Platform, Region,
    Vmid,
};
use twofold_table::PageAccess;

/// The first page of memory.
const BASE: u64 = 0x4_0000;
const PA_BITS: u32 = 36;
const WORDS: usize = 512;
/// The hypervisor's own pages, those of a guest's records and tables, and those that are measured.
const OWN: u64 = 4096;
const TABLES: Range<u64> = OWN + 8..OWN + 72;
const MEASURED: Range<u64> = OWN + 512..OWN + 512 + 4096;
/// 256 MiB.
const PAGES: u64 = 1 << 16;
/// One root page.
const IPA_BITS: u64 = 35;

const fn page(number: u64) -> Hfn {
    Hfn::new(BASE + number)
}

/// The machine: its memory. Nothing caches translations.
struct Machine<'m>(&'m Huge);

// SAFETY: the memory is there as long as it is borrowed, and `word` stays inside.
unsafe impl PageAccess for Machine<'_> {
    fn table_ptr(&self, page: Hpa) -> NonNull<u64> {
        NonNull::from(self.word(page.frame(), 0)).cast()
    }
}

// SAFETY: as above; one thread plays the only processor.
unsafe impl Platform for Machine<'_> {
    fn invalidate(&self, _vmid: Vmid, _range: Range<Gpa>) {}
    fn invalidate_all(&self, _vmid: Vmid) {}
    fn invalidate_here(&self, _vmid: Vmid, _range: Range<Gpa>) {}
    fn forget_context(&self, _vmid: Vmid) {}
    fn invalidate_everything(&self) {}
    fn map(&self, _page: Hfn) {}
    fn unmap(&self, _page: Hfn) {}
    fn sync_instructions(&self, _page: Hfn) {}

    fn wipe(&self, page: Hfn) {
        for index in 0..WORDS {
            self.word(page, index).store(0, Ordering::Relaxed);
        }
    }

    fn processor(&self) -> usize {
        0
    }

    fn counter(&self) -> u64 {
        0
    }
}

impl Machine<'_> {
    fn word(&self, page: Hfn, index: usize) -> &AtomicU64 {
        let number = page.get().wrapping_sub(BASE);
        assert!(number < PAGES, "page {page} is not memory");
        let address = self.0.address() + number * PAGE_SIZE + (index % WORDS) as u64 * 8;
        let word = std::ptr::with_exposed_provenance_mut(address as usize);
        // SAFETY: inside the memory, aligned, and accessed atomically only.
        unsafe { AtomicU64::from_ptr(word) }
    }

    /// The host writes words from `index` on.
    fn write(&self, page: Hfn, index: usize, words: &[u64]) {
        for (number, value) in words.iter().enumerate() {
            self.word(page, index + number)
                .store(*value, Ordering::Relaxed);
        }
    }
}

type Hyp<'m> = Hypervisor<'m, Machine<'m>>;

/// A protected guest with one vCPU, which is loaded.
fn start(hyp: &Hyp<'_>) -> Result<Handle> {
    let machine = hyp.platform();
    let record = page(OWN);
    hyp.host_share_hyp(record)?;
    let handle = hyp.reserve_vm(record.address())?;
    let kind = HostVm::PROTECTED | IPA_BITS << HostVm::IPA_SHIFT;
    let words = [u64::from(handle.get()), 1, kind, 0, 0, 0, 0, 0];
    machine.write(record, 0, &words);
    hyp.init_vm(record.address(), page(OWN + 1), page(OWN + 2))?;
    let mut head = 0;
    for table in TABLES.map(page) {
        machine.write(table, 0, &[head]);
        head = table.address().get();
    }
    let count = TABLES.end - TABLES.start;
    machine.write(record, 32, &[0, 0x1000, 0x2000, head, count]);
    let vcpu = Hpa::new(record.address().get() + 256);
    hyp.init_vcpu(handle, vcpu, page(OWN + 3))?;
    hyp.vcpu_load(handle, 0)?;
    Ok(handle)
}

fn measured() -> impl Iterator<Item = (Gfn, Hfn)> {
    (0..).map(Gfn::new).zip(MEASURED.map(page))
}

/// What is measured of the work that a round has to do.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Share,
    Unshare,
    Donate,
    Reclaim,
}

/// A round, of which one part is measured.
struct Round {
    part: Part,
    /// Nanoseconds a page.
    figure: f64,
}

impl Round {
    const fn measuring(part: Part) -> Self {
        Self {
            part,
            figure: f64::NAN,
        }
    }

    /// Does the work of `part` with all pages.
    fn step(
        &mut self,
        part: Part,
        work: impl FnOnce() -> Result<(), twofold_pkvm::Error>,
    ) -> Result<(), twofold_pkvm::Error> {
        if part != self.part {
            return work();
        }
        let mut result = Ok(());
        self.figure = per_item(MEASURED.end - MEASURED.start, || result = work());
        result
    }
}

/// Donates pages to a new guest, ends it and takes them back. Returns what `part` takes a page.
fn give_and_take(hyp: &Hyp<'_>, part: Part) -> Result<f64> {
    let mut round = Round::measuring(part);
    let handle = start(hyp)?;
    round.step(Part::Donate, || {
        measured().try_for_each(|(gfn, page)| hyp.donate_guest(page, gfn))
    })?;
    hyp.vcpu_put()?;
    hyp.start_teardown_vm(handle)?;
    round.step(Part::Reclaim, || {
        measured().try_for_each(|(gfn, _)| hyp.reclaim_dying_guest_page(handle, gfn))
    })?;
    hyp.finalize_teardown_vm(handle)?;
    hyp.host_unshare_hyp(page(OWN))?;
    Ok(round.figure)
}

/// Lends pages to the hypervisor and takes them back. Returns what `part` takes a page.
fn lend_and_take_back(hyp: &Hyp<'_>, part: Part) -> Result<f64> {
    let mut round = Round::measuring(part);
    round.step(Part::Share, || {
        measured().try_for_each(|(_, page)| hyp.host_share_hyp(page))
    })?;
    round.step(Part::Unshare, || {
        measured().try_for_each(|(_, page)| hyp.host_unshare_hyp(page))
    })?;
    Ok(round.figure)
}

fn row(what: &'static str, figures: Comparison) -> Row {
    Row {
        what,
        unit: "ns",
        reach: Reach::Anything,
        figures,
        obstacle: "".into(),
    }
}

/// Starts the hypervisor on a machine that was never used, and the host below it.
fn boot<'m>(memory: &'m Huge, regions: &'m [Region], records: &'m [PageRecord]) -> Result<Hyp<'m>> {
    let own = Pages {
        start: page(0),
        count: OWN,
    };
    let config = Config {
        pages: PageMap::new(regions, records, PA_BITS)?,
        caps: Stage2Caps {
            pa_bits: PA_BITS,
            vmid16: false,
            hardware_access_flag: false,
            hardware_dirty: false,
        },
        own,
        pool: own,
    };
    let hyp = Hypervisor::new(Machine(memory), config)?;
    hyp.finalise()?;
    Ok(hyp)
}

fn records() -> Vec<PageRecord> {
    (0..PAGES).map(|_| PageRecord::new()).collect()
}

/// The rows about the protected hypervisor.
pub(crate) fn rows(meter: Meter) -> Result<Vec<Row>> {
    let memory = Huge::new(PAGES * PAGE_SIZE)?;
    let regions = [Region {
        start: page(0),
        pages: PAGES,
        no_map: false,
    }];
    let count = MEASURED.end - MEASURED.start;
    let mut rows = Vec::new();

    let what = "pkvm: a fault of the host, a block of 2M mapped";
    let blocks = (PAGES - OWN) / 512;
    let figures = Contest::new(what).ours(|| {
        // Each round begins with an empty table.
        let records = records();
        let hyp = boot(&memory, &regions, &records)?;
        let mut served = 0;
        let figure = per_item(blocks, || {
            let address = |block| page(OWN + 512 * block).address();
            let is_served = |block: &u64| hyp.host_fault(address(*block)) != HostFault::Denied;
            served = (0..blocks).filter(is_served).count() as u64;
        });
        ensure!(served == blocks, "the host is denied its own memory");
        Ok(figure)
    });
    rows.push(row(what, figures.run(meter)?));

    let records = records();
    let hyp = boot(&memory, &regions, &records)?;
    let what = "pkvm: a call that is answered at once";
    let figures = Contest::new(what).ours(|| {
        let mut refused = 0;
        let figure = per_item(count, || {
            for _ in 0..count {
                let mut registers = [0; REGISTERS];
                registers[0] = Call::VcpuPut.function();
                hyp.hypercall(&mut registers, &mut |_, _| Exit::Interrupt);
                refused += u64::from(registers[1] != 0);
            }
        });
        ensure!(refused == count, "a vCPU was put that nobody had loaded");
        Ok(figure)
    });
    rows.push(row(what, figures.run(meter)?));

    for (what, measured_part) in [
        ("pkvm: share a page with the hypervisor", Part::Share),
        ("pkvm: unshare it", Part::Unshare),
    ] {
        let figures = Contest::new(what).ours(|| lend_and_take_back(&hyp, measured_part));
        rows.push(row(what, figures.run(meter)?));
    }

    let what = "pkvm: donate a page to a guest";
    let figures = Contest::new(what).ours(|| give_and_take(&hyp, Part::Donate));
    rows.push(row(what, figures.run(meter)?));

    let what = "pkvm: reclaim a page of a guest that ends, wiped";
    let figures = Contest::new(what)
        .ours(|| give_and_take(&hyp, Part::Reclaim))
        .floor("wipe", || {
            Ok(per_item(count, || {
                measured().for_each(|(_, page)| hyp.platform().wipe(page));
            }))
        });
    rows.push(row(what, figures.run(meter)?));
    Ok(rows)
}
