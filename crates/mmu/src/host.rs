//! What a hypervisor supplies.

use core::ptr::NonNull;
use twofold_arch::{Hpa, Level};
use twofold_table::Tracer;

/// The hypervisor below the MMU: pages for tables, pages for the guest, and other processors.
///
/// # Safety
/// The MMU dereferences what [`table_ptr`](Self::table_ptr) returns. For a page from
/// [`alloc_table`](Self::alloc_table), until it is given to [`free_table`](Self::free_table), the
/// pointer must stay the same and be valid for reads and writes of 4096 bytes, 4 KiB aligned, and
/// nothing but the MMU and the processors that walk the tables (both with atomic accesses) may
/// touch those bytes.
/// [`heavy_barrier`](Self::heavy_barrier) and [`flush_tlbs`](Self::flush_tlbs) must order as they
/// say: pages are freed on the strength of it.
// UNSAFETY: the declaration; the duties of an implementation are above.
#[expect(unsafe_code)]
pub unsafe trait Host: Send + Sync {
    /// Takes one 4 KiB page for a table, 4 KiB aligned, with any content. `None` when there is none.
    ///
    /// Never called in a read section; it may block or make a system call.
    fn alloc_table(&self) -> Option<Hpa>;

    /// Gives back a page from [`alloc_table`](Self::alloc_table); nothing refers to it any more.
    fn free_table(&self, page: Hpa);

    /// How a table page is reached. Called on the hot path: should be an addition at most.
    fn table_ptr(&self, page: Hpa) -> NonNull<u64>;

    /// Makes the page at the host-virtual address `hva` (4 KiB aligned) present, writable if
    /// `write`, and says what is there. May block; never called in a read section.
    ///
    /// For a read of memory that is not writable now (a private file mapping before its copy on
    /// write, for instance) it must not be made writable on the side: `writable` says what the page
    /// allows without changing it.
    ///
    /// # Errors
    /// See [`PopulateError`].
    fn populate(&self, hva: u64, write: bool) -> Result<HostPage, PopulateError>;

    /// [`populate`](Self::populate) for the private half of a slot: `address` is one that the
    /// hypervisor gave when the slot was bound to a guest memory file
    /// ([`set_region_with_guest_memory`](crate::Mmu::set_region_with_guest_memory)). Makes the page
    /// present, zeroed if it was not there before.
    ///
    /// # Errors
    /// See [`PopulateError`]; [`Fault`](PopulateError::Fault) once the file is gone.
    fn populate_private(&self, address: u64, write: bool) -> Result<HostPage, PopulateError> {
        self.populate(address, write)
    }

    /// [`populate`](Self::populate) for reading, or [`populate_private`](Self::populate_private),
    /// of consecutive pages from `address` on, as many as `pages` has room for. How many were made
    /// present, and why it ended if not all were.
    fn populate_range(
        &self,
        address: u64,
        private: bool,
        pages: &mut [HostPage],
    ) -> (usize, Option<PopulateError>) {
        for (number, page) in pages.iter_mut().enumerate() {
            let address = address + ((number as u64) << twofold_arch::PAGE_SHIFT);
            let result = match private {
                true => self.populate_private(address, false),
                false => self.populate(address, false),
            };
            match result {
                Ok(found) => *page = found,
                Err(error) => return (number, Some(error)),
            }
        }
        (pages.len(), None)
    }

    /// The largest host mapping that holds the page at `hva`, which was made present a moment ago:
    /// asked where a larger leaf could be built, when [`populate`](Self::populate) did not say so
    /// by itself. May make a system call; never called in a read section or with a lock.
    fn mapping_level(&self, hva: u64) -> Level {
        let _ = hva;
        Level::L4K
    }

    /// Makes every virtual processor of the VM drop every second-stage translation it holds, and
    /// returns when none uses an older one. Also orders as [`heavy_barrier`](Self::heavy_barrier)
    /// does: it must execute a full barrier on every thread that has a [`Reader`](crate::Reader).
    fn flush_tlbs(&self);

    /// The expensive half of an asymmetric barrier: a full memory barrier on every thread that has a
    /// [`Reader`](crate::Reader), whose own half is a compiler fence. In Linux user space
    /// `membarrier(MEMBARRIER_CMD_PRIVATE_EXPEDITED)`, on bare metal an interprocessor interrupt.
    fn heavy_barrier(&self);

    /// Called while waiting for another thread to leave a short section: yield, or just pause.
    fn wait_hint(&self);

    /// Who is told of every change of an entry, if somebody is. Asked at each change, so it should
    /// be a comparison at most; where it is not implemented nothing is left of it.
    #[inline(always)]
    fn tracer(&self) -> Option<&dyn Tracer> {
        None
    }
}

/// A page of host memory that may be mapped into a guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HostPage {
    /// Host-physical address of the 4 KiB page.
    pub hpa: Hpa,
    /// Whether the page may be mapped writable.
    pub writable: bool,
    /// The largest host mapping that is known to hold the page: a leaf of up to this level may be
    /// built around it, since host memory is contiguous and aligned that far. A host that would
    /// have to ask somebody says 4K here and answers [`Host::mapping_level`], which is called
    /// seldom.
    pub level: Level,
}

/// Why host memory could not be made present.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PopulateError {
    /// Nothing is mapped there, or not with the permission asked for: `-EFAULT`.
    #[error("host memory is not there or forbids the access")]
    Fault,
    /// A signal came first: `-EINTR`.
    #[error("interrupted by a signal")]
    Interrupted,
    /// Cannot be told now; the fault is tried again.
    #[error("host memory is changing")]
    Again,
    /// The page is known to be bad: `-EHWPOISON`.
    #[error("host memory is poisoned")]
    Poisoned,
}
