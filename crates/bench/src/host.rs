//! A host for the MMU whose every service is as cheap as can be, so that what is measured is the
//! MMU: table pages come from an arena that is there already, guest pages are always present.
//!
//! UNSAFETY: the arena's pages are handed out as raw memory, as `twofold_mmu::Host` requires.
#![expect(unsafe_code)]

use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::atomic::{Ordering, fence};
use twofold_arch::{Hpa, Level, PAGE_SIZE};
use twofold_mmu::{Host, HostPage, PopulateError};

/// Host-virtual address of the benchmark's guest memory. Nothing is there: only its numbers are
/// used.
pub(crate) const GUEST_MEMORY: u64 = 0x1000_0000_0000;

#[repr(C, align(4096))]
struct Page([u64; 512]);

/// Hands out pages of one allocation, last given back first.
pub(crate) struct Arena {
    pages: Box<[Page]>,
    free: Mutex<Vec<u32>>,
}

impl Arena {
    /// An arena of `count` pages, all of them touched.
    pub(crate) fn new(count: u32) -> Self {
        let pages: Box<[Page]> = (0..count).map(|_| Page([1; 512])).collect();
        Self {
            pages,
            free: Mutex::new((0..count).rev().collect()),
        }
    }
}

// SAFETY: pages stay where they are while the arena lives, are aligned by their type, and only the
// MMU touches one between `alloc_table` and `free_table`. Barriers are full ones; the benchmark has
// no processors, and readers of other threads are not preempted inside a section without one,
// since the benchmark never invalidates while another thread faults.
unsafe impl Host for Arena {
    fn alloc_table(&self) -> Option<Hpa> {
        let index = self.free.lock().ok()?.pop()?;
        Some(Hpa::new(&raw const self.pages[index as usize] as u64))
    }

    fn free_table(&self, page: Hpa) {
        let index = (page.get() - self.pages.as_ptr() as u64) / PAGE_SIZE;
        if let Ok(mut free) = self.free.lock() {
            free.push(index as u32);
        }
    }

    fn table_ptr(&self, page: Hpa) -> NonNull<u64> {
        let pointer = std::ptr::with_exposed_provenance_mut(page.get() as usize);
        // SAFETY: the page comes from `alloc_table`, and no page of an allocation is at zero.
        unsafe { NonNull::new_unchecked(pointer) }
    }

    fn populate(&self, hva: u64, _write: bool) -> Result<HostPage, PopulateError> {
        Ok(HostPage {
            hpa: Hpa::new(hva),
            writable: true,
            level: Level::L4K,
        })
    }

    fn flush_tlbs(&self) {
        fence(Ordering::SeqCst);
    }

    fn heavy_barrier(&self) {
        fence(Ordering::SeqCst);
    }

    fn wait_hint(&self) {
        std::thread::yield_now();
    }
}
