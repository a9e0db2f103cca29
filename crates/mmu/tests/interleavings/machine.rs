//! A machine of virtual processors with TLBs, host memory that comes and goes, and table pages that
//! know whether they are allocated. Each access to a table, by the MMU or by a processor's walk, is
//! a point where another thread may go on; what happens between two such points is one step.

use crate::common::{Processor, Step, region};
use shuttle::sync::atomic::{AtomicBool, Ordering};
use shuttle::thread;
use std::collections::HashMap;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64 as AtomicEntry;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};
use twofold_arch::sppt::{AccessMap, SpptEntry, WriteVector};
use twofold_arch::{Gfn, Hpa, Level, Pferr};
use twofold_mmu::{
    Config, DirtyGfn, Fault, FaultError, Host, HostPage, ManualProtect, Mmu, Outcome,
    PopulateError, Reader, RingMemory, Root, RootRole,
};

const PAGE: u64 = 4096;
/// Table pages of a machine.
const TABLES: usize = 48;
/// Host-physical address of the first.
const TABLES_AT: u64 = 0x40_0000_0000;
/// Accesses to one table in a row that are points of their own: whoever reads a whole table need
/// not be interrupted at each entry.
const POINTS_PER_TABLE: u32 = 6;

/// Where another thread may go on.
fn switch_point() {
    AtomicBool::new(false).load(Ordering::SeqCst);
}

/// One page of host memory that a slot uses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Memory {
    /// Moves on whenever the page is taken away.
    pub(crate) frame: u64,
    pub(crate) there: bool,
    /// Guest writes.
    pub(crate) written: u64,
}

/// Host memory by page. A page that nobody has touched is there, at its first frame.
#[derive(Default)]
struct HostMemory(HashMap<u64, Memory>);

impl HostMemory {
    fn page(&mut self, page: u64) -> &mut Memory {
        self.0.entry(page).or_insert(Memory {
            frame: FRAMES + page,
            there: true,
            written: 0,
        })
    }

    /// The page that is at `frame`, if it still is.
    fn at(&mut self, frame: u64) -> Option<&mut Memory> {
        let page = self.page((frame - FRAMES) % NEXT_FRAME);
        (page.there && page.frame == frame).then_some(page)
    }
}

#[derive(Clone, Copy, Debug)]
struct Translation {
    frame: u64,
    write: bool,
    /// The sub-page permission table has allowed a write, which the processor remembers.
    sub_page: bool,
    /// Finding it has put the page into the processor's log.
    logged: bool,
}

#[derive(Default)]
struct Tlb {
    translations: HashMap<(u64, u64), Translation>,
    /// Raised by each flush: a walk that began before is void.
    flushed: u64,
}

/// What all threads share besides the MMU. Every lock is held within one step.
pub(crate) struct World {
    tables: Mutex<Vec<bool>>,
    bytes: Box<[[u64; 512]]>,
    last: Mutex<(usize, u64, u32)>,
    memory: Mutex<HostMemory>,
    tlbs: Mutex<Vec<Tlb>>,
    level: Level,
}

#[derive(Clone)]
pub(crate) struct TestHost(Arc<World>);

impl World {
    /// A table page must be allocated when it is touched.
    fn touch(&self, page: Hpa) -> *mut u64 {
        let me = usize::from(shuttle::current::me());
        let in_a_row = {
            let mut last = self.last.lock().unwrap();
            let again = (last.0, last.1) == (me, page.get());
            let count = if again { last.2 + 1 } else { 0 };
            *last = (me, page.get(), count);
            count
        };
        if in_a_row < POINTS_PER_TABLE {
            switch_point();
        }
        let number = ((page.get() - TABLES_AT) / PAGE) as usize;
        assert!(
            self.tables.lock().unwrap()[number],
            "table {number} is touched and is not allocated"
        );
        self.bytes[number].as_ptr().cast_mut()
    }

    fn live_tables(&self) -> usize {
        self.tables.lock().unwrap().iter().filter(|&&t| t).count()
    }
}

// SAFETY: table pages are parts of one allocation that lives as long as the world; only one thread
// runs at a time, so that every operation is a barrier.
unsafe impl Host for TestHost {
    fn alloc_table(&self) -> Option<Hpa> {
        let mut tables = self.0.tables.lock().unwrap();
        let number = tables.iter().position(|allocated| !allocated)?;
        tables[number] = true;
        Some(Hpa::new(TABLES_AT + number as u64 * PAGE))
    }

    fn free_table(&self, page: Hpa) {
        let number = ((page.get() - TABLES_AT) / PAGE) as usize;
        let was = std::mem::replace(&mut self.0.tables.lock().unwrap()[number], false);
        assert!(was, "table {number} is freed twice");
    }

    fn table_ptr(&self, page: Hpa) -> NonNull<u64> {
        NonNull::new(self.0.touch(page)).unwrap()
    }

    fn populate(&self, hva: u64, _write: bool) -> Result<HostPage, PopulateError> {
        switch_point();
        let page = *self.0.memory.lock().unwrap().page(hva / PAGE);
        switch_point();
        if !page.there {
            return Err(PopulateError::Fault);
        }
        Ok(HostPage {
            hpa: Hpa::new(page.frame << 12),
            writable: true,
            level: self.0.level,
        })
    }

    fn mapping_level(&self, _hva: u64) -> Level {
        switch_point();
        self.0.level
    }

    fn flush_tlbs(&self) {
        switch_point();
        for tlb in self.0.tlbs.lock().unwrap().iter_mut() {
            tlb.translations.clear();
            tlb.flushed += 1;
        }
    }

    fn heavy_barrier(&self) {
        switch_point();
    }

    fn wait_hint(&self) {
        thread::yield_now();
    }
}

/// The machine. Slot 0 logs writes unless it is told otherwise.
pub(crate) struct Machine<F: Processor> {
    pub(crate) mmu: Mmu<F, TestHost>,
    pub(crate) world: Arc<World>,
    /// The dirty rings of the processors, if the machine has such.
    rings: Mutex<Vec<Arc<Ring>>>,
}

/// A processor's dirty ring, and the entry that the program looks at next.
struct Ring {
    entries: Box<[DirtyGfn]>,
    next: Mutex<usize>,
}

impl RingMemory for Ring {
    fn entries(&self) -> &[DirtyGfn] {
        &self.entries
    }
}

/// A virtual processor.
pub(crate) struct Cpu {
    number: usize,
    reader: Reader,
    root: Root,
    /// Faults taken.
    pub(crate) faults: u64,
}

/// What became of a guest access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Access {
    Made,
    Mmio,
    /// The host has no page there.
    Lost,
    /// Something kept changing.
    GaveUp,
    /// The access map forbids it.
    Denied,
}

/// Why a processor leaves the guest.
enum Exit {
    Fault(Pferr),
    /// The sub-page permission table has no vector.
    Miss,
}

/// Slots: first frame, pages, host page. The second fills a table.
pub(crate) const SLOTS: [(u64, u64, u64); 2] = [(0, 4, 0x1000), (0x200, 0x200, 0x3000)];
const FRAMES: u64 = 0x100_0000;
/// From a host page to the one that replaces it.
const NEXT_FRAME: u64 = 0x1_0000;

impl<F: Processor> Machine<F> {
    /// A machine whose host memory comes in pages of `level`, with all slots of [`SLOTS`].
    pub(crate) fn new(cpus: usize, flags: u32, level: Level, config: Config) -> Arc<Self> {
        Self::with(cpus, flags, level, config, ManualProtect::empty())
    }

    /// The same, with a choice of how dirty logs are read and cleared.
    pub(crate) fn with(
        cpus: usize,
        flags: u32,
        level: Level,
        config: Config,
        protect: ManualProtect,
    ) -> Arc<Self> {
        let world = Arc::new(World {
            tables: Mutex::new(vec![false; TABLES]),
            bytes: vec![[0xaaaa_aaaa_aaaa_aaaa; 512]; TABLES].into_boxed_slice(),
            last: Mutex::default(),
            memory: Mutex::default(),
            tlbs: Mutex::new((0..cpus).map(|_| Tlb::default()).collect()),
            level,
        });
        let mmu = Mmu::new(TestHost(Arc::clone(&world)), config);
        mmu.set_manual_protect(protect);
        let machine = Arc::new(Self {
            mmu,
            world,
            rings: Mutex::default(),
        });
        for id in 0..SLOTS.len() {
            machine.set_slot(id, flags);
        }
        machine
    }

    /// [`new`](Self::new), with dirty rings.
    pub(crate) fn with_rings(cpus: usize, flags: u32, level: Level, config: Config) -> Arc<Self> {
        let machine = Self::new(cpus, 0, level, config);
        machine.mmu.enable_dirty_ring(PAGE).unwrap();
        for id in 0..SLOTS.len() {
            machine.set_slot(id, flags);
        }
        machine
    }

    /// Creates or changes a slot.
    pub(crate) fn set_slot(&self, id: usize, flags: u32) {
        let (base, pages, host) = SLOTS[id];
        let request = region(id as u32, base, pages, host, flags);
        self.mmu.set_region(request).unwrap();
    }

    pub(crate) fn delete_slot(&self, id: usize) {
        self.mmu.set_region(region(id as u32, 0, 0, 0, 0)).unwrap();
        // Its memory is given to someone else.
        let (_, pages, host) = SLOTS[id];
        for page in host..host + pages {
            self.world.memory.lock().unwrap().page(page).there = false;
        }
    }

    pub(crate) fn cpu(&self, number: usize) -> Cpu {
        let reader = match self.mmu.ring_entries() {
            0 => self.mmu.reader(),
            entries => {
                let ring = Arc::new(Ring {
                    entries: (0..entries).map(|_| DirtyGfn::default()).collect(),
                    next: Mutex::default(),
                });
                self.rings.lock().unwrap().push(Arc::clone(&ring));
                self.mmu.ring_reader(ring)
            }
        };
        Cpu {
            number,
            reader,
            root: self.mmu.load_root(RootRole::NORMAL).unwrap(),
            faults: 0,
        }
    }

    /// Host pages are replaced by others: what is written to the old ones is lost.
    pub(crate) fn change_host(&self, hva_pages: Range<u64>) {
        let change = self
            .mmu
            .host_change(hva_pages.start * PAGE..hva_pages.end * PAGE);
        for page in hva_pages.clone() {
            self.world.memory.lock().unwrap().page(page).there = false;
        }
        switch_point();
        for page in hva_pages {
            let mut memory = self.world.memory.lock().unwrap();
            let page = memory.page(page);
            page.frame += NEXT_FRAME;
            page.there = true;
        }
        drop(change);
    }

    /// Empties the rings: a bit for each page of slot 0 that they name.
    fn harvest_rings(&self) -> u64 {
        let mut bits = 0;
        for ring in self.rings.lock().unwrap().iter() {
            let mut next = ring.next.lock().unwrap();
            while let Some((slot, page)) = ring.entries[*next % ring.entries.len()].harvest() {
                bits |= u64::from(slot == 0) << page;
                *next += 1;
            }
        }
        switch_point();
        self.mmu.reset_dirty_rings();
        bits
    }

    /// Reads the bitmap of a slot, or (for slot 0) the rings, and notes of each page that is named
    /// its writes until now.
    pub(crate) fn harvest(&self, id: usize, reported: &mut HashMap<u64, u64>) {
        let mut bits = [0; 8];
        match self.mmu.ring_entries() {
            0 => self.mmu.dirty_log_get(0, id as u16, &mut bits).unwrap(),
            _ => bits[0] = self.harvest_rings(),
        }
        self.report(id, &bits, reported);
    }

    /// The same in two steps: reads, and clears what it has read.
    pub(crate) fn harvest_and_clear(&self, id: usize, reported: &mut HashMap<u64, u64>) {
        let mut bits = [0; 8];
        self.mmu.dirty_log_get(0, id as u16, &mut bits).unwrap();
        let pages = SLOTS[id].1 as u32;
        let answer = self.mmu.dirty_log_clear(0, id as u16, 0, pages, &mut bits);
        answer.unwrap();
        self.report(id, &bits, reported);
    }

    fn report(&self, id: usize, bits: &[u64], reported: &mut HashMap<u64, u64>) {
        let (_, pages, host) = SLOTS[id];
        let mut memory = self.world.memory.lock().unwrap();
        for page in 0..pages {
            if bits[page as usize / 64] >> (page % 64) & 1 == 1 {
                reported.insert(page, memory.page(host + page).written);
            }
        }
    }

    /// The writes to each page of a slot until now.
    pub(crate) fn written(&self, id: usize) -> HashMap<u64, u64> {
        let (_, pages, host) = SLOTS[id];
        let mut memory = self.world.memory.lock().unwrap();
        (0..pages)
            .map(|page| (page, memory.page(host + page).written))
            .collect()
    }

    /// Every write to a slot has been reported.
    pub(crate) fn check_reported(&self, id: usize, reported: &HashMap<u64, u64>) {
        for (page, written) in self.written(id) {
            let reported = reported.get(&page).copied().unwrap_or(0);
            assert_eq!(reported, written, "writes to page {page} were not reported");
        }
    }

    /// Nobody runs any more: everything is as it must be, and all tables come back.
    pub(crate) fn finish(self: Arc<Self>) {
        let report = self.mmu.check();
        assert!(report.violations.is_empty(), "{report}");
        let stats = self.mmu.stats();
        let counted = [stats.pages_4k, stats.pages_2m, stats.pages_1g];
        assert_eq!(counted, report.leaves, "leaves are miscounted");
        let world = Arc::clone(&self.world);
        drop(Arc::into_inner(self).unwrap());
        assert_eq!(world.live_tables(), 0, "tables leaked");
    }

    /// Protects a page: writes to its beginning are allowed or not. Returns the number of its writes
    /// until then.
    pub(crate) fn protect(&self, gfn: u64, allowed: bool) -> u64 {
        let map = AccessMap(0xff00 | u32::from(allowed));
        self.mmu.set_access(0, Gfn::new(gfn), &[map]).unwrap();
        self.writes_to(gfn)
    }

    /// The number of writes to a page until now.
    pub(crate) fn writes_to(&self, gfn: u64) -> u64 {
        let mut slots = SLOTS.iter();
        let (base, _, host) = slots.rfind(|(base, ..)| *base <= gfn).unwrap();
        let mut memory = self.world.memory.lock().unwrap();
        memory.page(host + gfn - base).written
    }

    /// An entry of a table, as a processor reads it. `None` if a flush has come since there were
    /// `flushed`: what the walk has read is forgotten. The switch to others comes first, so that
    /// it is seen before the table is touched.
    fn read(&self, cpu: &Cpu, flushed: u64, table: Hpa, index: usize) -> Option<&AtomicEntry> {
        switch_point();
        if self.world.tlbs.lock().unwrap()[cpu.number].flushed != flushed {
            return None;
        }
        let number = ((table.get() - TABLES_AT) / PAGE) as usize;
        assert!(
            self.world.tables.lock().unwrap()[number],
            "a processor walks a table that is not allocated"
        );
        let entry = self.world.bytes[number][index..].as_ptr();
        // SAFETY: an entry of a table page; one thread runs at a time.
        Some(unsafe { AtomicEntry::from_ptr(entry.cast_mut()) })
    }

    /// What the sub-page permission table says of a write to the beginning of a page. `None` as for
    /// [`read`](Self::read).
    fn look_up(&self, cpu: &Cpu, flushed: u64, gfn: Gfn) -> Option<Result<bool, Exit>> {
        let mut table = self.mmu.sppt_root(RootRole::NORMAL).unwrap();
        for level in [Level::L512G, Level::L1G, Level::L2M] {
            let entry = self.read(cpu, flushed, table, level.index(gfn))?;
            table = match SpptEntry::decode(entry.load(SeqCst), 52) {
                SpptEntry::NotPresent => return Some(Err(Exit::Miss)),
                SpptEntry::Reserved => panic!("a misconfigured table"),
                SpptEntry::Table(next) => next,
            };
        }
        let vector = self.read(cpu, flushed, table, Level::L4K.index(gfn))?;
        let map = WriteVector(vector.load(SeqCst)).access_map();
        Some(Ok(map.expect("a misconfigured vector").allows(0, 1)))
    }

    fn walk(&self, cpu: &Cpu, gfn: Gfn, write: bool) -> Result<Translation, Exit> {
        let key = (cpu.root.hpa().get(), gfn.get());
        let error = if write { Pferr::WRITE } else { Pferr::USER };
        'again: loop {
            switch_point();
            let flushed = {
                let tlbs = self.world.tlbs.lock().unwrap();
                let tlb = &tlbs[cpu.number];
                if let Some(known) = tlb.translations.get(&key)
                    && (known.write || known.sub_page || !write)
                {
                    return Ok(Translation {
                        logged: false,
                        ..*known
                    });
                }
                tlb.flushed
            };
            let (mut table, mut level) = (cpu.root.hpa(), Level::L512G);
            loop {
                let Some(entry) = self.read(cpu, flushed, table, level.index(gfn)) else {
                    continue 'again;
                };
                let value = entry.load(SeqCst);
                match F::entry(value, level) {
                    Step::Nothing => return Err(Exit::Fault(error)),
                    Step::Refused => return Err(Exit::Fault(error | Pferr::RSVD)),
                    Step::Table(next) => {
                        table = next;
                        level = level.below().unwrap();
                    }
                    Step::Leaf {
                        hpa,
                        write: has_write,
                        ..
                    } => {
                        let mut sub_page = false;
                        if write && !has_write {
                            let asks = level == Level::L4K && value & F::SUB_PAGE_WRITE != 0;
                            if asks {
                                let Some(answer) = self.look_up(cpu, flushed, gfn) else {
                                    continue 'again;
                                };
                                sub_page = answer?;
                            }
                            if !sub_page {
                                return Err(Exit::Fault(error | Pferr::PRESENT));
                            }
                        }
                        // Accessed, and dirty if it is written, in the same step; a processor
                        // without such bits writes as soon as it may.
                        let flags = self.mmu.has_accessed_dirty();
                        let dirty = if error.is_write() { F::DIRTY } else { 0 };
                        if flags {
                            // The table was asked meanwhile: a leaf that has changed is not used.
                            let used = value | F::ACCESSED | dirty;
                            if entry.compare_exchange(value, used, SeqCst, SeqCst).is_err() {
                                continue 'again;
                            }
                        }
                        let offset = gfn.get() & (level.frames() - 1);
                        let found = Translation {
                            frame: (hpa.get() >> 12) + offset,
                            write: has_write
                                && (!flags || error.is_write() || value & F::DIRTY != 0),
                            sub_page,
                            logged: flags
                                && error.is_write()
                                && value & F::DIRTY == 0
                                && self.mmu.logs_by_pml(),
                        };
                        let mut tlbs = self.world.tlbs.lock().unwrap();
                        tlbs[cpu.number].translations.insert(key, found);
                        return Ok(found);
                    }
                }
            }
        }
    }

    /// A guest access, made by running the guest and resolving its faults.
    pub(crate) fn access(&self, cpu: &mut Cpu, gfn: u64, write: bool) -> Access {
        let gfn = Gfn::new(gfn);
        for _ in 0..12 {
            let exit = match self.walk(cpu, gfn, write) {
                Ok(found) => {
                    let mut memory = self.world.memory.lock().unwrap();
                    let page = memory.at(found.frame);
                    let page = page.unwrap_or_else(|| panic!("{gfn:?} reaches a lost page"));
                    page.written += u64::from(write);
                    drop(memory);
                    if found.logged {
                        let log = [gfn.address()].into_iter();
                        self.mmu.drain_pml(&mut cpu.reader, 0, log);
                    }
                    return Access::Made;
                }
                Err(exit) => exit,
            };
            cpu.faults += 1;
            let gpa = gfn.address();
            let outcome = match exit {
                Exit::Fault(error) => {
                    let fault = Fault { gpa, error };
                    self.mmu.fault(&mut cpu.reader, &cpu.root, fault)
                }
                Exit::Miss => self.mmu.sppt_miss(&mut cpu.reader, &cpu.root, gpa),
            };
            match outcome {
                Ok(Outcome::SubPageDenied) => return Access::Denied,
                Ok(Outcome::Fixed { .. } | Outcome::Spurious) => {}
                Ok(Outcome::Mmio) => return Access::Mmio,
                Ok(Outcome::Retry) => thread::yield_now(),
                Ok(Outcome::ObsoleteRoot) => {
                    cpu.root = self.mmu.load_root(RootRole::NORMAL).unwrap();
                }
                Err(FaultError::BadHostMemory) => return Access::Lost,
                Err(error) => panic!("{error}"),
            }
        }
        Access::GaveUp
    }
}
