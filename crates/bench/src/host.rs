//! A host for the MMU whose every service is as cheap as can be, so that what is measured is the
//! MMU: table pages come from the warm pool, guest pages are always present.
//!
//! UNSAFETY: pages are handed out as raw memory, as `twofold_mmu::Host` requires.
#![expect(unsafe_code)]

use crate::pool;
use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::atomic::{Ordering, fence};
use std::time::Instant;
use twofold_arch::{Hpa, Level};
use twofold_mmu::{Host, HostPage, PopulateError};

/// Host-virtual address of the benchmark's guest memory. Nothing is there: only its numbers are
/// used.
pub(crate) const GUEST_MEMORY: u64 = 0x1000_0000_0000;

/// The host of one MMU.
#[derive(Default)]
pub(crate) struct PoolHost {
    /// When the last flush of the TLBs was done.
    flushed: Mutex<Option<Instant>>,
}

impl PoolHost {
    /// When the last flush of the TLBs was done.
    pub(crate) fn flushed(&self) -> Option<Instant> {
        *self.flushed.lock().ok()?
    }
}

// SAFETY: pages of the pool stay where they are, are aligned, and only who has taken one touches
// it. Barriers are full ones; the benchmark has no processors, and readers of other threads are
// not preempted inside a section without one, since the benchmark never invalidates while another
// thread faults.
unsafe impl Host for PoolHost {
    fn alloc_table(&self) -> Option<Hpa> {
        pool::take().map(Hpa::new)
    }

    fn free_table(&self, page: Hpa) {
        pool::give_back(page.get());
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
        if let Ok(mut flushed) = self.flushed.lock() {
            *flushed = Some(Instant::now());
        }
    }

    fn heavy_barrier(&self) {
        fence(Ordering::SeqCst);
    }

    fn wait_hint(&self) {
        std::thread::yield_now();
    }
}
