//! The machine's memory: pages that know whether they are used, and the MMU's and the module's view
//! of them.

use crate::common::usual_frame;
use std::cell::UnsafeCell;
use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use twofold_arch::{Hpa, Level};
use twofold_mmu::{Host, HostPage, PopulateError};
use twofold_tdx::{Platform, Point, TD_PARAMS_BYTES};

pub const PAGE: u64 = 4096;
/// The machine's memory begins here: addresses are not offsets.
pub const BASE: u64 = 0x1_0000_0000;
pub const PAGES: u64 = if cfg!(shuttle) { 80 } else { 400 };
/// Where the slots' shared memory is in the program.
pub const HVA: u64 = 0x4000_0000;
/// Addresses of the guest memory file.
pub const FILE: u64 = 0x6000_0000_0000;

#[repr(C, align(4096))]
struct PageBytes(UnsafeCell<[u64; 512]>);

/// A lock that shall fail although it is free.
#[derive(Clone, Copy, Debug)]
pub struct Busy {
    pub point: Point,
    /// So many times it does not yet.
    pub skip: u32,
    pub times: u32,
}

/// The machine's memory.
pub struct Memory {
    pages: Vec<PageBytes>,
    free: Mutex<Vec<u64>>,
    /// The guest memory file's pages.
    pub file: Mutex<BTreeMap<u64, Hpa>>,
    busy: Mutex<Vec<Busy>>,
    /// The program has no memory for tables any more.
    pub out_of_memory: AtomicBool,
}

// SAFETY: tables are accessed atomically, other pages by one test at a time.
unsafe impl Sync for Memory {}

/// Where `shuttle` may go on with another thread.
pub fn switch_point() {
    #[cfg(shuttle)]
    shuttle::sync::atomic::AtomicBool::new(false).load(Ordering::SeqCst);
}

/// Lets the others go on.
pub fn give_way() {
    #[cfg(shuttle)]
    shuttle::thread::yield_now();
    #[cfg(not(shuttle))]
    std::thread::yield_now();
}

impl Memory {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            pages: (0..PAGES)
                .map(|_| PageBytes(UnsafeCell::new([0xcccc_cccc_cccc_cccc; 512])))
                .collect(),
            free: Mutex::new((0..PAGES).rev().collect()),
            file: Mutex::default(),
            busy: Mutex::default(),
            out_of_memory: AtomicBool::new(false),
        })
    }

    fn index(page: Hpa) -> u64 {
        page.get().wrapping_sub(BASE) / PAGE
    }

    fn bytes(&self, page: Hpa) -> *mut u64 {
        self.pages[Self::index(page) as usize].0.get().cast()
    }

    pub fn take(&self) -> Hpa {
        let index = self.free.lock().unwrap().pop().unwrap();
        Hpa::new(BASE + index * PAGE)
    }

    pub fn give_back(&self, page: Hpa) {
        let mut free = self.free.lock().unwrap();
        assert!(!free.contains(&Self::index(page)), "given back twice");
        free.push(Self::index(page));
    }

    pub fn is_free(&self, page: Hpa) -> bool {
        self.free.lock().unwrap().contains(&Self::index(page))
    }

    /// Pages that are in use.
    pub fn used(&self) -> u64 {
        PAGES - self.free.lock().unwrap().len() as u64
    }

    /// The first word of a page.
    pub fn word(&self, page: Hpa) -> u64 {
        // SAFETY: in bounds, and nobody writes meanwhile.
        unsafe { self.bytes(page).read() }
    }

    pub fn write_word(&self, page: Hpa, value: u64) {
        // SAFETY: in bounds, and nobody else accesses it meanwhile.
        unsafe { self.bytes(page).write(value) }
    }

    /// An entry of a table, which must be allocated.
    pub fn entry(&self, table: Hpa, index: usize) -> u64 {
        assert!(
            !self.is_free(table),
            "a table is walked that is not allocated"
        );
        // SAFETY: in bounds and aligned; entries are accessed atomically.
        unsafe { AtomicU64::from_ptr(self.bytes(table).add(index & 511)) }.load(Ordering::Acquire)
    }

    /// The page of the file at `address`, made if it is not there.
    fn file_page(&self, address: u64) -> Hpa {
        let mut file = self.file.lock().unwrap();
        *file.entry(address).or_insert_with(|| self.take())
    }

    /// The page that the file has for `gfn`, if it has one.
    pub fn page_of(&self, gfn: u64) -> Option<Hpa> {
        self.file.lock().unwrap().get(&(FILE + gfn * PAGE)).copied()
    }

    fn is_busy(&self, point: Point) -> bool {
        switch_point();
        let mut all = self.busy.lock().unwrap();
        let mut due = all.iter_mut();
        let Some(busy) = due.find(|busy| busy.point == point && busy.times > 0) else {
            return false;
        };
        let fails = busy.skip == 0;
        busy.times -= u32::from(fails);
        busy.skip -= u32::from(!fails);
        fails
    }

    /// A lock at `point` fails `times` times, after it has not for `skip` times.
    pub fn make_busy(&self, point: Point, skip: u32, times: u32) {
        let busy = Busy { point, skip, times };
        self.busy.lock().unwrap().push(busy);
    }

    /// How many failures are still to come.
    pub fn busy_left(&self) -> u32 {
        let busy = self.busy.lock().unwrap();
        busy.iter().map(|busy| busy.times).sum()
    }

    /// Runs `work` while nothing is busy.
    pub fn undisturbed<T>(&self, work: impl FnOnce() -> T) -> T {
        let busy = std::mem::take(&mut *self.busy.lock().unwrap());
        let result = work();
        *self.busy.lock().unwrap() = busy;
        result
    }
}

#[derive(Clone)]
pub struct Machine(pub Arc<Memory>);

// SAFETY: pages are never moved while the machine lives.
unsafe impl Platform for Machine {
    fn has_memory(&self, page: Hpa, bytes: u64) -> bool {
        page.get() >= BASE && page.get() + bytes <= BASE + PAGES * PAGE
    }

    fn table_ptr(&self, page: Hpa) -> NonNull<u64> {
        switch_point();
        NonNull::new(self.0.bytes(page)).unwrap()
    }

    fn copy_page(&self, from: Hpa, to: Hpa) -> bool {
        // SAFETY: in bounds; two pages.
        unsafe { self.0.bytes(to).copy_from(self.0.bytes(from), 512) };
        true
    }

    fn zero_page(&self, page: Hpa) {
        // SAFETY: in bounds.
        unsafe { self.0.bytes(page).write_bytes(0, 512) };
    }

    fn read_page(&self, page: Hpa, offset: usize, into: &mut [u8]) {
        assert!(offset + into.len() <= PAGE as usize);
        // SAFETY: in bounds.
        unsafe {
            let from = self.0.bytes(page).cast::<u8>().add(offset);
            into.as_mut_ptr().copy_from(from, into.len());
        }
    }

    fn read(&self, from: Hpa, into: &mut [u8]) -> bool {
        let offset = from.get() % PAGE;
        self.read_page(Hpa::new(from.get() - offset), offset as usize, into);
        true
    }

    fn injects_busy(&self, point: Point) -> bool {
        self.0.is_busy(point)
    }
}

// SAFETY: pages are parts of one allocation that lives as long as the machine; a test that has
// several threads runs one at a time.
unsafe impl Host for Machine {
    fn alloc_table(&self) -> Option<Hpa> {
        let empty = self.0.out_of_memory.load(Ordering::Relaxed);
        (!empty).then(|| self.0.take())
    }

    fn free_table(&self, page: Hpa) {
        self.0.give_back(page);
    }

    fn table_ptr(&self, page: Hpa) -> NonNull<u64> {
        switch_point();
        assert!(!self.0.is_free(page), "a table is used after it was freed");
        NonNull::new(self.0.bytes(page)).unwrap()
    }

    fn populate(&self, hva: u64, _write: bool) -> Result<HostPage, PopulateError> {
        switch_point();
        Ok(HostPage {
            hpa: Hpa::new(usual_frame(hva) << 12),
            writable: true,
            level: Level::L4K,
        })
    }

    fn populate_private(&self, address: u64, _write: bool) -> Result<HostPage, PopulateError> {
        switch_point();
        let hpa = self.0.file_page(address);
        switch_point();
        Ok(HostPage {
            hpa,
            writable: true,
            level: Level::L4K,
        })
    }

    fn flush_tlbs(&self) {
        switch_point();
    }

    fn heavy_barrier(&self) {
        switch_point();
    }

    fn wait_hint(&self) {
        give_way();
    }
}

impl Memory {
    /// Fills a page with the parameters of a TD.
    pub fn write_params(&self, page: Hpa, wide: bool, attributes: u64) {
        let words = self.bytes(page);
        let levels = if wide { 5 } else { 4 };
        for index in 0..TD_PARAMS_BYTES / 8 {
            let word = match index {
                0 => attributes,
                // The most virtual processors.
                2 => 4,
                // EPTP: write-back, and the levels less one.
                3 => 6 | (levels - 1) << 3,
                4 => u64::from(wide),
                _ => 0,
            };
            // SAFETY: in bounds.
            unsafe { words.add(index).write(word) };
        }
    }
}
