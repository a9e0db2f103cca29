//! A machine with a few thousand pages, and a TD on it.

#![allow(clippy::unwrap_used, reason = "a test may fail")]
#![allow(dead_code, reason = "each test uses a part")]
#![expect(
    unsafe_code,
    reason = "UNSAFETY: implements the platform's promises over one allocation"
)]

use std::cell::UnsafeCell;
use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use twofold_arch::{Gpa, Hpa};
use twofold_tdx::{
    Entered, Failure, Module, Platform, Point, SeptEntry, Status, TD_PARAMS_BYTES, TDCX_PAGES,
    TDVPX_PAGES,
};

pub(crate) const PAGE: u64 = 4096;
/// The machine's memory begins here: addresses are not offsets.
pub(crate) const BASE: u64 = 0x1_0000_0000;
/// And ends with three blocks of 2 MiB for large pages, after the small ones.
const SMALL_PAGES: u64 = 1024;
const PAGES: u64 = SMALL_PAGES + 3 * 512;

#[repr(C, align(4096))]
struct PageBytes(UnsafeCell<[u8; 4096]>);

/// The machine.
pub(crate) struct Machine {
    pages: Vec<PageBytes>,
    next: AtomicU64,
    /// Points at which locks fail, each so many times.
    pub(crate) busy: Mutex<Vec<(Point, u32)>>,
    /// So many pieces until an interrupt, or never.
    pub(crate) interrupt_after: AtomicU32,
}

// SAFETY: bytes are accessed by the module under its rules, and by tests in turn.
unsafe impl Sync for Machine {}

impl Machine {
    pub(crate) fn new() -> Self {
        let page = || PageBytes(UnsafeCell::new([0xcc; 4096]));
        Self {
            pages: (0..PAGES).map(|_| page()).collect(),
            next: AtomicU64::new(0),
            busy: Mutex::new(Vec::new()),
            interrupt_after: AtomicU32::new(u32::MAX),
        }
    }

    fn page(&self, page: Hpa) -> Option<*mut u8> {
        let index = page.get().checked_sub(BASE)? / PAGE;
        Some(self.pages.get(index as usize)?.0.get().cast())
    }

    /// A page that was never handed out.
    pub(crate) fn fresh(&self) -> Hpa {
        let index = self.next.fetch_add(1, Ordering::Relaxed);
        assert!(index < SMALL_PAGES, "the machine is out of pages");
        Hpa::new(BASE + index * PAGE)
    }

    /// How many pages were handed out.
    pub(crate) fn handed_out(&self) -> u64 {
        self.next.load(Ordering::Relaxed)
    }

    /// The address of every page.
    pub(crate) fn all_pages(&self) -> impl Iterator<Item = Hpa> {
        (0..PAGES).map(|index| Hpa::new(BASE + index * PAGE))
    }

    /// One of three aligned blocks of 2 MiB.
    pub(crate) fn large(&self, number: u64) -> Hpa {
        Hpa::new(BASE + (SMALL_PAGES + 512 * number) * PAGE)
    }

    pub(crate) fn bytes(&self, page: Hpa) -> [u8; 4096] {
        // SAFETY: in bounds; tests read when nobody writes.
        unsafe { self.page(page).unwrap().cast::<[u8; 4096]>().read() }
    }

    pub(crate) fn write(&self, page: Hpa, bytes: &[u8]) {
        let at = self.page(page).unwrap();
        assert!(bytes.len() <= 4096);
        // SAFETY: in bounds; tests write when nobody reads.
        unsafe { at.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) }
    }

    /// The entry with this index in a table.
    pub(crate) fn entry(&self, table: Hpa, index: usize) -> &AtomicU64 {
        // SAFETY: in bounds and aligned; entries are accessed atomically only.
        unsafe { AtomicU64::from_ptr(self.table_ptr(table).as_ptr().add(index & 511)) }
    }
}

// SAFETY: pages are never moved or freed while the machine lives.
unsafe impl Platform for Machine {
    fn has_memory(&self, page: Hpa, bytes: u64) -> bool {
        let end = BASE + PAGES * PAGE;
        page.get() >= BASE && page.get().saturating_add(bytes) <= end
    }

    fn table_ptr(&self, page: Hpa) -> NonNull<u64> {
        NonNull::new(self.page(page).unwrap().cast()).unwrap()
    }

    fn copy_page(&self, from: Hpa, to: Hpa) -> bool {
        if self.page(from).is_none() {
            return false;
        }
        let bytes = self.bytes(from);
        self.write(to, &bytes);
        true
    }

    fn zero_page(&self, page: Hpa) {
        self.write(page, &[0; 4096]);
    }

    fn read_page(&self, page: Hpa, offset: usize, into: &mut [u8]) {
        into.copy_from_slice(&self.bytes(page)[offset..offset + into.len()]);
    }

    fn read(&self, from: Hpa, into: &mut [u8]) -> bool {
        let offset = (from.get() % PAGE) as usize;
        let page = Hpa::new(from.get() - offset as u64);
        if self.page(page).is_none() || offset + into.len() > 4096 {
            return false;
        }
        into.copy_from_slice(&self.bytes(page)[offset..offset + into.len()]);
        true
    }

    fn injects_busy(&self, point: Point) -> bool {
        let mut busy = self.busy.lock().unwrap();
        match busy.iter_mut().find(|(at, left)| *at == point && *left > 0) {
            Some((_, left)) => {
                *left -= 1;
                true
            }
            None => false,
        }
    }

    fn is_interrupted(&self) -> bool {
        let left = self.interrupt_after.load(Ordering::Relaxed);
        if left == u32::MAX {
            return false;
        }
        self.interrupt_after
            .store(left.saturating_sub(1), Ordering::Relaxed);
        left == 0
    }
}

/// A module with one TD.
pub(crate) struct World {
    pub(crate) module: Module<Machine>,
    pub(crate) tdr: Hpa,
    pub(crate) vcpus: Vec<Hpa>,
}

impl World {
    /// A module without a TD.
    pub(crate) fn empty() -> Self {
        Self {
            module: Module::new(Machine::new(), 32..=63),
            tdr: Hpa::new(0),
            vcpus: Vec::new(),
        }
    }

    pub(crate) fn machine(&self) -> &Machine {
        self.module.platform()
    }

    pub(crate) fn fresh(&self) -> Hpa {
        self.machine().fresh()
    }

    /// A page with TD_PARAMS for a TD with four levels and the shared bit at 47.
    pub(crate) fn params(&self, attributes: u64) -> Hpa {
        let mut bytes = [0; TD_PARAMS_BYTES];
        bytes[..8].copy_from_slice(&attributes.to_le_bytes());
        bytes[16..18].copy_from_slice(&4u16.to_le_bytes());
        bytes[24..32].copy_from_slice(&(6u64 | 3 << 3).to_le_bytes());
        let page = self.fresh();
        self.machine().write(page, &[0; 4096]);
        self.machine().write(page, &bytes);
        page
    }

    /// A TD with a key and nothing else.
    pub(crate) fn uninitialized() -> Self {
        let mut world = Self::empty();
        let tdr = world.fresh();
        world.module.mng_create(tdr, 32).unwrap();
        world.module.mng_key_config(tdr).unwrap();
        world.tdr = tdr;
        world
    }

    /// A TD whose initial memory can be added, with `vcpus` virtual processors.
    pub(crate) fn initialized(attributes: u64, vcpus: usize) -> Self {
        let mut world = Self::uninitialized();
        let module = &world.module;
        let tdr = world.tdr;
        for _ in 0..TDCX_PAGES {
            module.mng_add_cx(world.fresh(), tdr).unwrap();
        }
        module.mng_init(tdr, world.params(attributes)).unwrap();
        let mut created = Vec::new();
        for number in 0..vcpus {
            let tdvpr = world.fresh();
            module.vp_create(tdvpr, tdr).unwrap();
            for _ in 0..TDVPX_PAGES {
                module.vp_add_cx(world.fresh(), tdvpr).unwrap();
            }
            module.vp_init(tdvpr, number as u64).unwrap();
            created.push(tdvpr);
        }
        world.vcpus = created;
        world
    }

    /// A TD that may run, with one virtual processor and tables down to level 0 at address 0.
    pub(crate) fn runnable() -> Self {
        let world = Self::initialized(0, 1);
        world.tables(Gpa::new(0), 0);
        world.module.mr_finalize(world.tdr).unwrap();
        world
    }

    /// Adds the tables that are missing above the entry for `gpa` at `level`; returns the last.
    pub(crate) fn tables(&self, gpa: Gpa, level: u8) -> Vec<Hpa> {
        let mut added = Vec::new();
        for at in (level + 1..=3).rev() {
            let page = self.fresh();
            match self.module.sept_add(info(gpa, at), self.tdr, page) {
                Ok(()) => added.push(page),
                Err(failure) => {
                    assert!(
                        failure.status.is(Status::EPT_ENTRY_STATE_INCORRECT),
                        "{failure:?}"
                    );
                }
            }
        }
        added
    }

    pub(crate) fn enter(&self, vcpu: usize) -> Entered<'_, Machine> {
        self.module.vp_enter(self.vcpus[vcpu]).unwrap()
    }

    /// Blocks, tracks and removes; nobody is inside.
    pub(crate) fn remove(&self, gpa: Gpa, level: u8) -> Hpa {
        self.module.range_block(info(gpa, level), self.tdr).unwrap();
        self.module.track(self.tdr).unwrap();
        self.module.page_remove(info(gpa, level), self.tdr).unwrap()
    }

    pub(crate) fn entry(&self, gpa: Gpa, level: u8) -> SeptEntry {
        self.module.sept_read(info(gpa, level), self.tdr).unwrap().0
    }
}

/// Address and level, as RCX has them.
pub(crate) fn info(gpa: Gpa, level: u8) -> u64 {
    let bytes = PAGE << (9 * u32::from(level));
    gpa.get() & !(bytes - 1) | u64::from(level)
}

/// Whether a result is this failure, whatever the detail.
#[track_caller]
pub(crate) fn refused<T: std::fmt::Debug>(result: Result<T, Failure>, status: Status) {
    match result {
        Err(failure) if failure.status.is(status) => {}
        other => panic!("{other:?} instead of {status}"),
    }
}
