//! Pages for second-stage tables.
// UNSAFETY: maps memory and hands out raw pages of it.
#![expect(unsafe_code)]

use crate::sync::Mutex;
use rustix::mm::{MapFlags, ProtFlags};
use std::ptr::{self, NonNull};
use twofold_arch::PAGE_SIZE;

/// Pages in one mapping: 2 MiB. Pages that were never handed out cost no memory.
const CHUNK_PAGES: usize = 512;
const CHUNK_BYTES: usize = CHUNK_PAGES * PAGE_SIZE as usize;

/// The table pages of one VM. Dropping it gives all of them back to the system.
#[derive(Debug, Default)]
pub(crate) struct TablePool(Mutex<Pages>);

#[derive(Debug, Default)]
struct Pages {
    chunks: Vec<NonNull<u8>>,
    free: Vec<NonNull<u64>>,
    /// Pages of the last chunk that were never handed out.
    untouched: usize,
}

// SAFETY: the pointers are to memory that the pool alone owns.
unsafe impl Send for Pages {}

impl TablePool {
    /// One page, with any content, or `None` when the system has no memory.
    pub(crate) fn take(&self) -> Option<NonNull<u64>> {
        let mut pages = self.0.lock();
        if let Some(page) = pages.free.pop() {
            return Some(page);
        }
        if pages.untouched == 0 {
            // SAFETY: a new private mapping at an address that the kernel chooses.
            let chunk = unsafe {
                rustix::mm::mmap_anonymous(
                    ptr::null_mut(),
                    CHUNK_BYTES,
                    ProtFlags::READ | ProtFlags::WRITE,
                    MapFlags::PRIVATE | MapFlags::NORESERVE,
                )
            };
            let chunk = chunk
                .ok()
                .and_then(|chunk| NonNull::new(chunk.cast::<u8>()))?;
            pages.chunks.push(chunk);
            pages.untouched = CHUNK_PAGES;
        }
        let chunk = *pages.chunks.last()?;
        let index = CHUNK_PAGES - pages.untouched;
        pages.untouched -= 1;
        // SAFETY: `index` is below CHUNK_PAGES.
        Some(unsafe { chunk.add(index * PAGE_SIZE as usize) }.cast())
    }

    /// Takes back a page from [`Self::take`].
    pub(crate) fn give_back(&self, page: NonNull<u64>) {
        self.0.lock().free.push(page);
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        for chunk in &self.chunks {
            // SAFETY: the pool's own mapping; the MMU that used its pages is gone.
            let result = unsafe { rustix::mm::munmap(chunk.as_ptr().cast(), CHUNK_BYTES) };
            if let Err(error) = result {
                tracing::error!(%error, "unmapping table pages failed");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn pages_are_aligned_distinct_and_come_again() {
        let pool = TablePool::default();
        let pages: HashSet<_> = (0..2 * CHUNK_PAGES).map(|_| pool.take().unwrap()).collect();
        assert_eq!(pages.len(), 2 * CHUNK_PAGES);
        assert!(
            pages
                .iter()
                .all(|page| (page.as_ptr() as u64).is_multiple_of(PAGE_SIZE))
        );
        let first = *pages.iter().next().unwrap();
        pool.give_back(first);
        assert_eq!(pool.take(), Some(first));
    }
}
