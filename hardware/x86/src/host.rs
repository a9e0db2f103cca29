//! What `twofold-mmu` asks of a hypervisor, on bare metal: the worked example of [`Host`].
//!
//! Table pages come from a static pool, guests' memory from a list of ranges, and both barriers
//! are an interrupt to the other processor.

// UNSAFETY: implements `Host`, which is unsafe to implement, and owns the pool of table pages.
#![expect(unsafe_code)]

use crate::smp;
use alloc::vec::Vec;
use core::cell::UnsafeCell;
use core::ops::Range;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use spin::Mutex;
use twofold_arch::{Hpa, Level, PAGE_SIZE};
use twofold_mmu::{Host, HostPage, PopulateError};

/// Table pages there are.
const TABLES: usize = 512;

#[repr(C, align(4096))]
struct TableMemory(UnsafeCell<[[u64; 512]; TABLES]>);

// SAFETY: a page is touched by whoever has taken it from the pool, and by the pool in between.
unsafe impl Sync for TableMemory {}

static TABLE_MEMORY: TableMemory = TableMemory(UnsafeCell::new([[0; 512]; TABLES]));

/// Numbers of the pages that are free: the first `len`.
struct Pool {
    free: [u16; TABLES],
    len: usize,
}

static POOL: Mutex<Pool> = Mutex::new(Pool {
    free: {
        let mut free = [0; TABLES];
        let mut page = 0;
        while page < TABLES {
            free[page] = page as u16;
            page += 1;
        }
        free
    },
    len: TABLES,
});

/// Table pages that are taken.
pub fn tables_in_use() -> usize {
    TABLES - POOL.lock().len
}

/// Memory that a hypervisor may give to guests, by the addresses it knows it by ("host-virtual").
#[derive(Clone, Debug)]
pub struct HostRange {
    /// The addresses.
    pub hva: Range<u64>,
    /// Where the first one is in physical memory.
    pub hpa: Hpa,
    /// Whether and when guests may write.
    pub writes: Writes,
    /// The largest page that may be built from it: memory is contiguous and aligned that far.
    pub level: Level,
}

/// Whether memory may be written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Writes {
    /// Yes.
    Allowed,
    /// Not until someone wants to: memory that is shared as long as it is only read.
    OnDemand,
    /// No.
    Forbidden,
}

/// The hypervisor below one VM's MMU.
#[derive(Default)]
pub struct Hypervisor {
    memory: Mutex<Vec<HostRange>>,
    /// Breaks the promise of `flush_tlbs`, so that a scenario can show what happens then.
    pub forget_to_flush: AtomicBool,
    /// Called after each barrier: lets a scenario decide what the other processor's guest has done
    /// between a barrier and the change that follows it.
    pub after_barrier: Mutex<Option<fn()>>,
    /// How often the MMU asked for a flush.
    pub flushes: AtomicU64,
}

impl Hypervisor {
    /// Puts `range` where something else may have been. The caller has announced the change to
    /// the MMU, unless no guest has used the addresses.
    pub fn map(&self, range: HostRange) {
        let mut memory = self.memory.lock();
        memory.retain(|other| other.hva.start != range.hva.start);
        memory.push(range);
    }

    /// Takes the range that begins at `hva` away. The caller has announced it to the MMU.
    pub fn unmap(&self, hva: u64) {
        self.memory.lock().retain(|range| range.hva.start != hva);
    }
}

// SAFETY: pages of the pool are 4096 bytes, aligned, identity mapped and static; one that is taken
// is touched by nobody else until it is given back. The interrupt handler executes a full barrier
// on the other processor, and the caller's own atomic operations are full barriers here.
unsafe impl Host for Hypervisor {
    fn alloc_table(&self) -> Option<Hpa> {
        let mut pool = POOL.lock();
        pool.len = pool.len.checked_sub(1)?;
        let page = pool.free[pool.len];
        Some(Hpa::new(
            TABLE_MEMORY.0.get() as u64 + u64::from(page) * PAGE_SIZE,
        ))
    }

    fn free_table(&self, page: Hpa) {
        // A processor that still walked here would find entries that are neither empty nor legal:
        // a flush that came too late shows.
        // SAFETY: the MMU has given the page up; nobody else knows it.
        unsafe { (page.get() as *mut [u64; 512]).write([0xdead_0000_0000_0fff; 512]) };
        let number = (page.get() - TABLE_MEMORY.0.get() as u64) / PAGE_SIZE;
        let mut pool = POOL.lock();
        let len = pool.len;
        pool.free[len] = number as u16;
        pool.len += 1;
    }

    fn table_ptr(&self, page: Hpa) -> NonNull<u64> {
        // The hypervisor's addresses are physical ones.
        NonNull::new(page.get() as *mut u64).unwrap_or(NonNull::dangling())
    }

    fn populate(&self, hva: u64, write: bool) -> Result<HostPage, PopulateError> {
        let memory = self.memory.lock();
        let range = memory
            .iter()
            .rev()
            .find(|range| range.hva.contains(&hva))
            .ok_or(PopulateError::Fault)?;
        if write && range.writes == Writes::Forbidden {
            return Err(PopulateError::Fault);
        }
        Ok(HostPage {
            hpa: Hpa::new(range.hpa.get() + (hva - range.hva.start)),
            // A read of memory that is shared must not make it private on the side.
            writable: write || range.writes == Writes::Allowed,
            level: range.level,
        })
    }

    fn mapping_level(&self, hva: u64) -> Level {
        // `populate` knows it already; asked where leaves were small for another reason.
        let memory = self.memory.lock();
        let range = memory.iter().rev().find(|range| range.hva.contains(&hva));
        range.map_or(Level::L4K, |range| range.level)
    }

    fn flush_tlbs(&self) {
        self.flushes.fetch_add(1, Ordering::Relaxed);
        if !self.forget_to_flush.load(Ordering::Relaxed) {
            smp::flush_everywhere();
        }
    }

    fn heavy_barrier(&self) {
        smp::interrupt_everywhere();
        let after = *self.after_barrier.lock();
        if let Some(after) = after {
            after();
        }
    }

    fn wait_hint(&self) {
        core::hint::spin_loop();
    }
}
