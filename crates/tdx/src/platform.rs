//! What a machine supplies to the module.

use core::ptr::NonNull;
use twofold_arch::Hpa;

/// Points at which a platform may make the module fail on purpose, so that its callers' retries
/// can be tested.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Point {
    /// Locking the TD.
    Td,
    /// Locking the Secure EPT.
    SeptTree,
    /// Locking a Secure EPT entry.
    SeptEntry,
    /// Locking the TLB epoch, to begin a new one or to enter.
    TdEpoch,
}

/// The machine below the module: its memory.
///
/// # Safety
/// For a page that the module was given as a table and that [`has_memory`](Self::has_memory)
/// accepted, [`table_ptr`](Self::table_ptr) must stay the same and be valid for atomic reads and
/// writes of 4096 bytes, 4 KiB aligned, until the module has given the page back; nothing but the
/// module writes there, and only processors that walk the table read it.
// UNSAFETY: the declaration; the duties of an implementation are above.
#[expect(unsafe_code)]
pub unsafe trait Platform: Send + Sync {
    /// Whether the `bytes` from `page` on are memory that may become private: inside one of the
    /// module's memory regions (TDMR).
    fn has_memory(&self, page: Hpa, bytes: u64) -> bool;

    /// How the entries of a table page are reached.
    fn table_ptr(&self, page: Hpa) -> NonNull<u64>;

    /// Copies a page of ordinary memory into a private page. `false` if the source is not there.
    fn copy_page(&self, from: Hpa, to: Hpa) -> bool;

    /// Fills a private page with zeros.
    fn zero_page(&self, page: Hpa);

    /// Reads from a private page, from `offset` on.
    fn read_page(&self, page: Hpa, offset: usize, into: &mut [u8]);

    /// Reads ordinary memory. `false` if it is not there.
    fn read(&self, from: Hpa, into: &mut [u8]) -> bool;

    /// Whether a lock at this point shall be found busy although it is free.
    fn injects_busy(&self, _point: Point) -> bool {
        false
    }

    /// Whether an interrupt is pending for the processor on which a long function runs.
    fn is_interrupted(&self) -> bool {
        false
    }
}
