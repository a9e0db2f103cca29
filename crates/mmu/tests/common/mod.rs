//! A hypervisor to test the MMU with: host memory that is only numbers, table pages in an arena at
//! an offset from their host-physical addresses, and a processor that walks the tables knowing only
//! `twofold-arch`.

#![allow(clippy::unwrap_used, reason = "a test may fail")]
#![allow(unreachable_pub, reason = "a module of several tests")]
#![allow(dead_code, reason = "each test uses a part")]
#![allow(
    unsafe_code,
    reason = "UNSAFETY: implements the unsafe trait and reads raw tables"
)]

pub mod guarded;
pub mod td;
pub mod vm;

use std::collections::{HashMap, HashSet};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use twofold_arch::ept::{self, EptCaps, EptEntry, EptFlags};
use twofold_arch::npt::{self, NptCaps, NptEntry, NptFlags};
use twofold_arch::{Gpa, Hpa, Level, Pferr};
use twofold_mmu::{Ept, Host, HostPage, MmuFormat, Npt, PopulateError, Region};

pub const MAXPHYADDR: u8 = 51;
const PAGE: u64 = 4096;
/// More table pages than any test takes.
pub const PLENTY: i64 = 1 << 40;

/// The state of one page of host memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HostState {
    pub frame: u64,
    pub present: bool,
    pub writable: bool,
}

pub struct World {
    /// Host-physical less host-virtual address of table pages.
    pub offset: u64,
    free: Mutex<Vec<u64>>,
    chunks: Mutex<Vec<Box<[[u64; 1024]]>>>,
    pub live_tables: AtomicUsize,
    /// Table pages that may still be allocated.
    pub budget: AtomicI64,
    pub flushes: AtomicU64,
    pub barriers: AtomicU64,
    /// Pages that are not as usual; usual is present, writable, at a frame that follows from hva.
    pub memory: Mutex<HashMap<u64, HostState>>,
    pub level: Mutex<Level>,
    /// Regions of 2M (host-virtual addresses shifted by 21) that are not in one piece, whatever
    /// `level` and `level_if_asked` say.
    pub broken: Mutex<HashSet<u64>>,
    /// `populate` fails like this, once.
    pub refuse: Mutex<Option<PopulateError>>,
    /// What the host says about the size of a mapping only if it is asked.
    pub level_if_asked: Mutex<Level>,
    /// How often it was asked.
    pub asked: AtomicU64,
    /// Leaves that do not allow fetches are expected.
    pub no_execute: AtomicBool,
    /// Called for each table page that is given back.
    pub on_free: Mutex<Option<Arc<dyn Fn() + Send + Sync>>>,
    /// Every so many calls, `populate` takes its time after it has found a page.
    pub slow_populate: AtomicU64,
    populated: AtomicU64,
    pub on_flush: Mutex<Option<Arc<dyn Fn() + Send + Sync>>>,
    /// What happens elsewhere while the host is asked for a page, once.
    pub on_populate: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

/// The frame of a host page that nobody has changed. Congruent with hva up to 1G.
pub fn usual_frame(hva: u64) -> u64 {
    0x2_0000_0000 + (hva >> 12)
}

impl World {
    pub fn new(offset: u64) -> Arc<Self> {
        Arc::new(Self {
            offset,
            free: Mutex::default(),
            chunks: Mutex::default(),
            live_tables: AtomicUsize::new(0),
            budget: AtomicI64::new(PLENTY),
            flushes: AtomicU64::new(0),
            barriers: AtomicU64::new(0),
            memory: Mutex::default(),
            level: Mutex::new(Level::L4K),
            broken: Mutex::default(),
            refuse: Mutex::default(),
            level_if_asked: Mutex::new(Level::L4K),
            asked: AtomicU64::new(0),
            no_execute: AtomicBool::new(false),
            on_free: Mutex::default(),
            slow_populate: AtomicU64::new(u64::MAX),
            populated: AtomicU64::new(0),
            on_flush: Mutex::default(),
            on_populate: Mutex::default(),
        })
    }

    pub fn host_state(&self, hva: u64) -> HostState {
        self.memory
            .lock()
            .unwrap()
            .get(&(hva >> 12))
            .copied()
            .unwrap_or(HostState {
                frame: usual_frame(hva),
                present: true,
                writable: true,
            })
    }

    /// The size of the host page at `hva` where pages of `level` are usual.
    pub fn level_at(&self, hva: u64, level: Level) -> Level {
        let broken = self.broken.lock().unwrap();
        if broken.contains(&(hva >> 21)) {
            Level::L4K
        } else if level == Level::L1G && broken.iter().any(|large| large >> 9 == hva >> 30) {
            Level::L2M
        } else {
            level
        }
    }

    /// An entry of a table.
    pub fn entry(&self, table: Hpa, index: usize) -> &AtomicU64 {
        let pointer = (table.get() - self.offset) as *mut u64;
        // SAFETY: the tests walk only tables that are linked, or whose pages are never unmapped:
        // the arena keeps its chunks.
        unsafe { AtomicU64::from_ptr(pointer.add(index)) }
    }

    pub fn read(&self, table: Hpa, index: usize) -> u64 {
        self.entry(table, index).load(Ordering::Acquire)
    }
}

#[derive(Clone)]
pub struct TestHost(pub Arc<World>);

/// A full barrier on every thread of the process.
pub fn membarrier() {
    const REGISTER: i32 = 1 << 4;
    const EXPEDITED: i32 = 1 << 3;
    static ONCE: std::sync::Once = std::sync::Once::new();
    // SAFETY: takes no pointers.
    let call = |command: i32| unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) };
    ONCE.call_once(|| assert_eq!(call(REGISTER), 0));
    assert_eq!(call(EXPEDITED), 0);
}

// SAFETY: pages are 4 KiB aligned parts of chunks that live as long as the world; membarrier is a
// barrier on every thread.
unsafe impl Host for TestHost {
    fn alloc_table(&self) -> Option<Hpa> {
        if self.0.budget.fetch_sub(1, Ordering::Relaxed) <= 0 {
            self.0.budget.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        let mut free = self.0.free.lock().unwrap();
        if free.is_empty() {
            let mut chunk = vec![[0xaaaa_aaaa_aaaa_aaaau64; 1024]; 32].into_boxed_slice();
            let start = (chunk.as_mut_ptr() as u64).next_multiple_of(PAGE);
            free.extend((0..60).map(|page| start + page * PAGE));
            self.0.chunks.lock().unwrap().push(chunk);
        }
        self.0.live_tables.fetch_add(1, Ordering::Relaxed);
        free.pop().map(|page| Hpa::new(page + self.0.offset))
    }

    fn free_table(&self, page: Hpa) {
        let address = page.get() - self.0.offset;
        // Whoever still walks here finds entries that lead nowhere.
        // SAFETY: the MMU has given the page up.
        unsafe { (address as *mut [u64; 512]).write([0xdead_0000_0000_0fff; 512]) };
        self.0.live_tables.fetch_sub(1, Ordering::Relaxed);
        self.0.budget.fetch_add(1, Ordering::Relaxed);
        self.0.free.lock().unwrap().push(address);
        let hook = self.0.on_free.lock().unwrap().clone();
        if let Some(hook) = hook {
            hook();
        }
    }

    fn table_ptr(&self, page: Hpa) -> NonNull<u64> {
        NonNull::new((page.get() - self.0.offset) as *mut u64).unwrap()
    }

    fn populate(&self, hva: u64, write: bool) -> Result<HostPage, PopulateError> {
        assert_eq!(hva % PAGE, 0);
        let meanwhile = self.0.on_populate.lock().unwrap().take();
        if let Some(meanwhile) = meanwhile {
            meanwhile();
        }
        if let Some(error) = self.0.refuse.lock().unwrap().take() {
            return Err(error);
        }
        let state = self.0.host_state(hva);
        if !state.present || write && !state.writable {
            return Err(PopulateError::Fault);
        }
        let count = self.0.populated.fetch_add(1, Ordering::Relaxed);
        if (count + 1).is_multiple_of(self.0.slow_populate.load(Ordering::Relaxed)) {
            std::thread::sleep(std::time::Duration::from_micros(200));
        }
        Ok(HostPage {
            hpa: Hpa::new(state.frame << 12),
            writable: state.writable,
            level: self.0.level_at(hva, *self.0.level.lock().unwrap()),
        })
    }

    fn mapping_level(&self, hva: u64) -> Level {
        assert!(self.0.host_state(hva).present);
        self.0.asked.fetch_add(1, Ordering::Relaxed);
        self.0.level_at(hva, *self.0.level_if_asked.lock().unwrap())
    }

    fn flush_tlbs(&self) {
        self.0.flushes.fetch_add(1, Ordering::Relaxed);
        membarrier();
        let hook = self.0.on_flush.lock().unwrap().clone();
        if let Some(hook) = hook {
            hook();
        }
    }

    fn heavy_barrier(&self) {
        self.0.barriers.fetch_add(1, Ordering::Relaxed);
        membarrier();
    }

    fn wait_hint(&self) {
        std::thread::yield_now();
    }
}

/// What a processor finds for an address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Found {
    Nothing,
    /// A misconfiguration or a reserved bit.
    Refused,
    Page {
        frame: u64,
        write: bool,
        level: Level,
    },
}

/// A processor's walk in each format.
pub trait Processor: MmuFormat {
    fn entry(entry: u64, level: Level) -> Step;
}

pub enum Step {
    Nothing,
    Refused,
    Table(Hpa),
    Leaf {
        hpa: Hpa,
        write: bool,
        execute: bool,
    },
}

impl Processor for Ept {
    fn entry(entry: u64, level: Level) -> Step {
        match ept::decode(entry, level, EptCaps::full(MAXPHYADDR)) {
            EptEntry::NotPresent { flags } => {
                assert!(
                    flags.contains(EptFlags::SUPPRESS_VE),
                    "{entry:#x} would be a #VE"
                );
                Step::Nothing
            }
            EptEntry::Misconfig(_) => Step::Refused,
            EptEntry::Table { hpa, flags } => {
                assert!(flags.contains(EptFlags::RWX));
                Step::Table(hpa)
            }
            EptEntry::Leaf { hpa, flags, .. } => {
                assert!(flags.contains(EptFlags::READ));
                Step::Leaf {
                    hpa,
                    write: flags.contains(EptFlags::WRITE),
                    execute: flags.contains(EptFlags::EXECUTE),
                }
            }
        }
    }
}

impl Processor for Npt {
    fn entry(entry: u64, level: Level) -> Step {
        match npt::decode(entry, level, NptCaps::full(MAXPHYADDR)) {
            NptEntry::NotPresent => Step::Nothing,
            NptEntry::Reserved(_) => Step::Refused,
            NptEntry::Table { hpa, flags } => {
                assert!(flags.contains(NptFlags::WRITE | NptFlags::USER));
                Step::Table(hpa)
            }
            NptEntry::Leaf { hpa, flags } => {
                assert!(flags.contains(NptFlags::USER));
                Step::Leaf {
                    hpa,
                    write: flags.contains(NptFlags::WRITE),
                    execute: !flags.contains(NptFlags::NO_EXECUTE),
                }
            }
        }
    }
}

/// Walks from `root` at `level` as a processor does.
pub fn walk<F: Processor>(world: &World, root: Hpa, level: Level, gpa: Gpa) -> Found {
    let (found, execute) = walk_to_fetch::<F>(world, root, level, gpa);
    assert!(execute || world.no_execute.load(Ordering::Relaxed));
    found
}

/// [`walk`], and whether the page may be executed; true if there is none.
pub fn walk_to_fetch<F: Processor>(
    world: &World,
    root: Hpa,
    level: Level,
    gpa: Gpa,
) -> (Found, bool) {
    let (mut table, mut level) = (root, level);
    loop {
        match F::entry(world.read(table, level.index(gpa.frame())), level) {
            Step::Nothing => return (Found::Nothing, true),
            Step::Refused => return (Found::Refused, true),
            Step::Table(next) => {
                table = next;
                level = level.below().unwrap();
            }
            Step::Leaf {
                hpa,
                write,
                execute,
            } => {
                let offset = gpa.frame().get() & (level.frames() - 1);
                let found = Found::Page {
                    frame: (hpa.get() >> 12) + offset,
                    write,
                    level,
                };
                return (found, execute);
            }
        }
    }
}

/// A request in pages.
pub fn region(slot: u32, gfn: u64, pages: u64, hva_page: u64, flags: u32) -> Region {
    Region {
        slot,
        flags,
        gpa: gfn << 12,
        size: pages << 12,
        hva: hva_page << 12,
    }
}

/// An access by a processor that has no translation yet: walks from `root`, and sets accessed and
/// dirty bits if it has such (`flags`). Returns whether it set a dirty bit, or the error code of the
/// fault.
pub fn touch<F: Processor>(
    world: &World,
    root: Hpa,
    level: Level,
    gpa: Gpa,
    write: bool,
    flags: bool,
) -> Result<bool, Pferr> {
    let access = if write { Pferr::WRITE } else { Pferr::USER };
    let (mut table, mut at) = (root, level);
    loop {
        let index = at.index(gpa.frame());
        let value = world.read(table, index);
        match F::entry(value, at) {
            Step::Nothing => return Err(access | Pferr::GUEST_FINAL),
            Step::Refused => return Err(access | Pferr::GUEST_FINAL | Pferr::RSVD),
            Step::Table(next) => {
                table = next;
                at = at.below().unwrap();
            }
            Step::Leaf { write: false, .. } if write => {
                return Err(access | Pferr::GUEST_FINAL | Pferr::PRESENT);
            }
            Step::Leaf { .. } if !flags => return Ok(false),
            Step::Leaf { .. } => {
                let bits = F::ACCESSED | if write { F::DIRTY } else { 0 };
                let pointer = (table.get() - world.offset) as *mut u64;
                // SAFETY: as for `World::read`.
                let entry = unsafe { AtomicU64::from_ptr(pointer.add(index)) };
                let set = entry.compare_exchange(
                    value,
                    value | bits,
                    Ordering::AcqRel,
                    Ordering::Relaxed,
                );
                if set.is_ok() {
                    return Ok(write && value & F::DIRTY == 0);
                }
                // Someone has changed the entry: the walk begins anew.
                (table, at) = (root, level);
            }
        }
    }
}
