//! One bit a page: written since it was last asked.

use crate::sync::atomic::{AtomicU64, Ordering};
use alloc::boxed::Box;
use alloc::vec::Vec;

/// The dirty bitmap of a slot.
pub(crate) struct DirtyBitmap {
    words: Box<[AtomicU64]>,
    pages: u64,
}

impl core::fmt::Debug for DirtyBitmap {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("DirtyBitmap")
            .field("pages", &self.pages)
            .finish_non_exhaustive()
    }
}

impl DirtyBitmap {
    /// A clean bitmap, or `None` without memory for it.
    pub(crate) fn new(pages: u64) -> Option<Self> {
        let count = usize::try_from(pages.div_ceil(64)).ok()?;
        let mut words = Vec::new();
        words.try_reserve_exact(count).ok()?;
        words.resize_with(count, || AtomicU64::new(0));
        Some(Self {
            words: words.into_boxed_slice(),
            pages,
        })
    }

    /// Marks the page with this number in the slot. A page that is dirty already costs one load.
    #[inline]
    pub(crate) fn mark(&self, page: u64) {
        if let Some(word) = self.words.get((page / 64) as usize) {
            let bit = 1 << (page % 64);
            if word.load(Ordering::Relaxed) & bit == 0 {
                word.fetch_or(bit, Ordering::AcqRel);
            }
        }
    }

    /// Whether the page with this number is marked.
    pub(crate) fn is_marked(&self, page: u64) -> bool {
        self.words
            .get((page / 64) as usize)
            .is_some_and(|word| word.load(Ordering::Acquire) >> (page % 64) & 1 == 1)
    }

    /// Words of 64 pages, rounded up.
    pub(crate) fn words(&self) -> usize {
        self.words.len()
    }

    /// Takes the bits of one word and leaves it clean.
    #[inline]
    pub(crate) fn take(&self, word: usize) -> u64 {
        match self.words.get(word) {
            Some(bits) if bits.load(Ordering::Acquire) != 0 => bits.swap(0, Ordering::AcqRel),
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_stays_dirty_until_it_is_taken() {
        let bitmap = DirtyBitmap::new(130).unwrap();
        assert_eq!(bitmap.words(), 3);
        for page in [0, 63, 64, 129, 129] {
            bitmap.mark(page);
        }
        bitmap.mark(1 << 40);
        assert_eq!(
            [0, 1, 2, 3].map(|word| bitmap.take(word)),
            [1 << 63 | 1, 1, 2, 0]
        );
        assert_eq!([0, 1, 2].map(|word| bitmap.take(word)), [0, 0, 0]);
    }
}
