//! Private memory of a TD: the MMU's mirror with the model of the TDX module behind it, without a
//! processor and without ioctls. What the model's work on a page costs, above all filling it with
//! zeros, is part of the figures.

// UNSAFETY: plays the machine's memory.
#![expect(unsafe_code)]

use crate::guest::tables;
use crate::host::{GUEST_MEMORY, PoolHost};
use crate::huge::Huge;
use crate::measure::{Contest, Meter, per_item};
use crate::pool;
use crate::report::{Reach, Row};
use anyhow::{Context, Result, anyhow, ensure};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};
use twofold_arch::{Gfn, Gpa, Hpa, Level, PAGE_SIZE, Pferr};
use twofold_mmu::{
    AccessKind, Config, Conversion, Ept, ExternalError, ExternalTables, Fault, MmioFault, Mmu,
    Outcome, PrivateMemory, Reader, Region, RegionFlags, Root, RootRole, TdRoots,
};
use twofold_tdx::{
    Accept, Entered, Failure, Module, Platform, Status, TD_PARAMS_BYTES, TDCX_PAGES, TDVPX_PAGES,
};

/// Memory of the guest in each round.
const BYTES: u64 = 64 << 20;
const PAGES: u64 = BYTES / PAGE_SIZE;
const SHARED_BIT: u8 = 47;
const KEY: u16 = 32;

/// The machine: every page of this process may be private.
struct Machine;

fn pointer(page: Hpa) -> *mut u64 {
    std::ptr::with_exposed_provenance_mut(page.get() as usize)
}

// SAFETY: table pages come from the pool, where they stay; nobody but the module touches them until
// it has given them back.
unsafe impl Platform for Machine {
    fn has_memory(&self, _page: Hpa, _bytes: u64) -> bool {
        true
    }

    fn table_ptr(&self, page: Hpa) -> NonNull<u64> {
        NonNull::new(pointer(page)).unwrap_or(NonNull::dangling())
    }

    fn copy_page(&self, _from: Hpa, _to: Hpa) -> bool {
        false
    }

    fn zero_page(&self, page: Hpa) {
        // SAFETY: a page of the guest's memory, which only this thread uses.
        unsafe { pointer(page).write_bytes(0, 512) };
    }

    fn read_page(&self, _page: Hpa, _offset: usize, _into: &mut [u8]) {}

    fn read(&self, from: Hpa, into: &mut [u8]) -> bool {
        // SAFETY: the parameters of the TD, on a page of the pool.
        unsafe {
            into.as_mut_ptr()
                .copy_from(pointer(from).cast(), into.len());
        }
        true
    }
}

/// A TD that runs, with one virtual processor, and nothing mapped.
struct Td {
    module: Module<Machine>,
    tdr: Hpa,
    tdvpr: Hpa,
    /// Control pages, which are the pool's again when the TD is gone.
    pages: Mutex<Vec<Hpa>>,
}

fn page() -> Result<Hpa> {
    pool::take().map(Hpa::new).context("the pool is empty")
}

fn failed(failure: Failure) -> anyhow::Error {
    anyhow!("the module refused: {failure:?}")
}

fn info(gfn: Gfn, level: Level) -> u64 {
    gfn.address().get() | u64::from(level.number() - 1)
}

impl Td {
    fn new() -> Result<Arc<Self>> {
        let module = Module::new(Machine, KEY..=KEY);
        let mut pages = Vec::new();
        let mut take = || -> Result<Hpa> {
            let page = page()?;
            pages.push(page);
            Ok(page)
        };
        let tdr = take()?;
        module.mng_create(tdr, KEY).map_err(failed)?;
        module.mng_key_config(tdr).map_err(failed)?;
        for _ in 0..TDCX_PAGES {
            module.mng_add_cx(take()?, tdr).map_err(failed)?;
        }
        let params = page()?;
        for index in 0..TD_PARAMS_BYTES / 8 {
            let word = match index {
                // One virtual processor; four levels, write-back.
                2 => 1,
                3 => 6 | 3 << 3,
                _ => 0,
            };
            // SAFETY: inside a page that was taken.
            unsafe { pointer(params).add(index).write(word) };
        }
        module.mng_init(tdr, params).map_err(failed)?;
        pool::give_back(params.get());
        let tdvpr = take()?;
        module.vp_create(tdvpr, tdr).map_err(failed)?;
        for _ in 0..TDVPX_PAGES {
            module.vp_add_cx(take()?, tdvpr).map_err(failed)?;
        }
        module.vp_init(tdvpr, 0).map_err(failed)?;
        module.mr_finalize(tdr).map_err(failed)?;
        Ok(Arc::new(Self {
            module,
            tdr,
            tdvpr,
            pages: Mutex::new(pages),
        }))
    }

    fn enter(&self) -> Result<Entered<'_, Machine>> {
        self.module.vp_enter(self.tdvpr).map_err(failed)
    }
}

fn external(failure: Failure) -> ExternalError {
    match failure.status.may_be_retried() {
        true => ExternalError::Busy,
        false => ExternalError::Refused(failure.status.raw()),
    }
}

impl ExternalTables for Td {
    fn link_table(&self, gfn: Gfn, level: Level, page: Hpa) -> Result<(), ExternalError> {
        self.module
            .sept_add(info(gfn, level), self.tdr, page)
            .map_err(external)
    }

    fn map_leaf(
        &self,
        gfn: Gfn,
        level: Level,
        hpa: Hpa,
        _source: Option<u64>,
    ) -> Result<(), ExternalError> {
        self.module
            .page_aug(info(gfn, level), self.tdr, hpa)
            .map_err(external)
    }

    fn block_leaf(&self, gfn: Gfn, level: Level) -> Result<(), ExternalError> {
        self.module
            .range_block(info(gfn, level), self.tdr)
            .map_err(external)
    }

    fn track(&self) -> Result<(), ExternalError> {
        // The only virtual processor is outside whenever something is taken away.
        self.module.track(self.tdr).map_err(external)
    }

    fn remove_leaf(&self, gfn: Gfn, level: Level, _hpa: Hpa) -> Result<(), ExternalError> {
        let removed = self.module.page_remove(info(gfn, level), self.tdr);
        removed.map(|_| ()).map_err(external)
    }

    fn hold_vcpus(&self) {}

    fn release_vcpus(&self) {}

    fn end(&self) {
        // Failures would show themselves as pages that cannot be reclaimed.
        let _ = self.module.vp_flush(self.tdvpr);
        let _ = self.module.mng_vp_flush_done(self.tdr);
        let _ = self.module.mng_key_free_id(self.tdr);
        if let Ok(mut pages) = self.pages.lock() {
            for page in pages.drain(..) {
                pool::give_back(page.get());
            }
        }
    }

    fn reclaim_leaf(&self, hpa: Hpa, _level: Level) {
        let _ = self.module.page_reclaim(hpa);
    }

    fn reclaim_table(&self, page: Hpa) {
        let _ = self.module.page_reclaim(page);
    }
}

/// How a contender takes a private fault.
enum Kind {
    /// A TD: the mirror and the module.
    Td(Arc<Td>, TdRoots),
    /// A software-protected VM: both halves below one root.
    Software(Root),
}

/// A guest whose memory is all private.
struct Guest<'m> {
    mmu: Mmu<Ept, PoolHost>,
    kind: Kind,
    reader: Reader,
    _memory: &'m Huge,
}

fn all() -> std::ops::Range<Gfn> {
    Gfn::new(0)..Gfn::new(PAGES)
}

impl<'m> Guest<'m> {
    fn new(memory: &'m Huge, td: bool) -> Result<Self> {
        let config = Config {
            slot_zap_all: false,
            private_memory: Some(PrivateMemory {
                access: match td {
                    true => AccessKind::ByProcessor,
                    false => AccessKind::ByAttribute,
                },
                conversion: Conversion::ZapOpposite,
            }),
            mmio: match td {
                true => MmioFault::Violation,
                false => MmioFault::Misconfiguration,
            },
            ..Config::default()
        };
        let mmu = Mmu::new(PoolHost::default(), config);
        let kind = if td {
            let td = Td::new()?;
            let tables: Arc<Td> = Arc::clone(&td);
            mmu.enable_mirror(SHARED_BIT, tables)?;
            Kind::Td(td, mmu.load_td_roots()?.context("there is a mirror")?)
        } else {
            Kind::Software(mmu.load_root(RootRole::NORMAL)?)
        };
        let region = Region {
            slot: 0,
            flags: RegionFlags::GUEST_MEMFD.bits(),
            gpa: 0,
            size: BYTES,
            hva: GUEST_MEMORY,
        };
        mmu.set_region_with_guest_memory(region, || Ok(memory.address()))?;
        mmu.set_attributes(all(), true)?;
        let reader = mmu.reader();
        Ok(Self {
            mmu,
            kind,
            reader,
            _memory: memory,
        })
    }

    /// A fault on every page. The faults must all end in a new mapping.
    fn fill(&mut self) -> Result<()> {
        let fixed = Ok(Outcome::Fixed { level: Level::L4K });
        let mut wrong = 0;
        for number in 0..PAGES {
            let fault = Fault {
                gpa: Gpa::new(number * PAGE_SIZE),
                error: Pferr::WRITE | Pferr::PRIVATE_ACCESS,
            };
            let outcome = match &self.kind {
                Kind::Td(_, roots) => self.mmu.td_fault(&mut self.reader, roots, fault),
                Kind::Software(root) => self.mmu.fault(&mut self.reader, root, fault),
            };
            wrong += u64::from(outcome != fixed);
        }
        ensure!(wrong == 0, "{wrong} faults did not end in a new 4K mapping");
        Ok(())
    }

    /// Takes every page away.
    fn empty(&self) -> Result<()> {
        self.mmu.set_attributes(all(), false)?;
        self.mmu.set_attributes(all(), true)?;
        Ok(())
    }

    fn timed_fill(&mut self) -> Result<f64> {
        self.empty()?;
        let mut result = Ok(());
        let figure = per_item(PAGES, || result = self.fill());
        result?;
        Ok(figure)
    }

    /// To shared and back to private, every page mapped again.
    fn timed_conversion(&mut self) -> Result<f64> {
        self.empty()?;
        self.fill()?;
        let mut result = Ok(());
        let figure = per_item(PAGES, || {
            result = self.empty().and_then(|()| self.fill());
        });
        result?;
        Ok(figure)
    }

    /// ACCEPT of every page, one by one, by a guest that is inside.
    fn timed_accept(&mut self) -> Result<f64> {
        self.empty()?;
        self.fill()?;
        let Kind::Td(td, _) = &self.kind else {
            return Err(anyhow!("only a TD accepts"));
        };
        let entered = td.enter()?;
        let mut accepted = 0;
        let figure = per_item(PAGES, || {
            for number in 0..PAGES {
                let rcx = info(Gfn::new(number), Level::L4K);
                let done = entered.accept(rcx) == Accept::Returned(Status::SUCCESS);
                accepted += u64::from(done);
            }
        });
        ensure!(accepted == PAGES, "{accepted} of {PAGES} pages accepted");
        Ok(figure)
    }
}

/// Fills the memory page by page, as the module does.
fn timed_zeros(memory: &Huge) -> f64 {
    per_item(PAGES, || {
        for number in 0..PAGES {
            Machine.zero_page(Hpa::new(memory.address() + number * PAGE_SIZE));
        }
    })
}

/// A TD's 2M pages, without an MMU, whose mirrors have small pages only.
struct LargePages<'m> {
    td: Arc<Td>,
    memory: &'m Huge,
    /// Tables of the Secure EPT.
    tables: Vec<Hpa>,
}

impl<'m> LargePages<'m> {
    fn new(memory: &'m Huge) -> Result<Self> {
        let td = Td::new()?;
        let tables = [Level::L512G, Level::L1G]
            .into_iter()
            .map(|level| {
                let table = page()?;
                let rcx = info(Gfn::new(0), level);
                td.module.sept_add(rcx, td.tdr, table).map_err(failed)?;
                Ok(table)
            })
            .collect::<Result<_>>()?;
        Ok(Self { td, memory, tables })
    }

    fn gfns() -> impl Iterator<Item = Gfn> {
        (0..PAGES)
            .step_by(Level::L2M.frames() as usize)
            .map(Gfn::new)
    }

    fn timed_accept(&self) -> Result<f64> {
        let (module, tdr) = (&self.td.module, self.td.tdr);
        for gfn in Self::gfns() {
            let page = Hpa::new(self.memory.address() + gfn.address().get());
            module
                .page_aug(info(gfn, Level::L2M), tdr, page)
                .map_err(failed)?;
        }
        let entered = self.td.enter()?;
        let mut accepted = 0;
        let figure = per_item(PAGES, || {
            for gfn in Self::gfns() {
                let done =
                    entered.accept(info(gfn, Level::L2M)) == Accept::Returned(Status::SUCCESS);
                accepted += u64::from(done) * Level::L2M.frames();
            }
        });
        ensure!(accepted == PAGES, "{accepted} of {PAGES} pages accepted");
        drop(entered);
        for gfn in Self::gfns() {
            let rcx = info(gfn, Level::L2M);
            module.range_block(rcx, tdr).map_err(failed)?;
        }
        module.track(tdr).map_err(failed)?;
        for gfn in Self::gfns() {
            let rcx = info(gfn, Level::L2M);
            module.page_remove(rcx, tdr).map_err(failed)?;
        }
        Ok(figure)
    }
}

impl Drop for LargePages<'_> {
    fn drop(&mut self) {
        self.td.end();
        for &table in &self.tables {
            self.td.reclaim_table(table);
            pool::give_back(table.get());
        }
    }
}

/// The rows about TDs.
pub(crate) fn rows(meter: Meter) -> Result<Vec<Row>> {
    // Mirror, Secure EPT, and the tables of the software-protected VM; control pages.
    pool::reserve(4 * tables(BYTES) + 128)?;
    let memory = Huge::new(BYTES)?;
    let (mut td, mut software) = (Guest::new(&memory, true)?, Guest::new(&memory, false)?);
    let row = |what, figures, obstacle: &'static str| Row {
        what,
        unit: "ns",
        reach: Reach::Anything,
        figures,
        obstacle: obstacle.into(),
    };
    let what = "TD: fault in a private page, Secure EPT and all";
    let fault = Contest::new(what)
        .ours(|| td.timed_fill())
        .peer("a software-protected VM", || software.timed_fill())
        .run(meter)?;
    let fault = row(what, fault, "the module's locks and page metadata");

    let what = "TD: ACCEPT 4K";
    let accept = Contest::new(what)
        .ours(|| td.timed_accept())
        .floor("zeros alone", || Ok(timed_zeros(&memory)))
        .run(meter)?;
    let accept = row(what, accept, "a walk and two exchanges for each page");

    let what = "TD: ACCEPT 2M, a 4K page's share";
    let large = LargePages::new(&memory)?;
    let accept_large = Contest::new(what)
        .ours(|| large.timed_accept())
        .floor("zeros alone", || Ok(timed_zeros(&memory)))
        .run(meter)?;
    let accept_large = row(what, accept_large, "zeros");
    drop(large);

    let what = "TD: convert a mapped page to shared and back, and fault it in";
    let convert = Contest::new(what)
        .ours(|| td.timed_conversion())
        .peer("a software-protected VM", || software.timed_conversion())
        .run(meter)?;
    let convert = row(
        what,
        convert,
        "BLOCK and REMOVE of each page, a TRACK for 64",
    );
    Ok(vec![fault, accept, accept_large, convert])
}
