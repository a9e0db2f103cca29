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

    /// A bitmap in which every page is dirty, or `None` without memory for it.
    pub(crate) fn all_dirty(pages: u64) -> Option<Self> {
        let bitmap = Self::new(pages)?;
        for (number, word) in bitmap.words.iter().enumerate() {
            let rest = pages - 64 * number as u64;
            let bits = if rest < 64 { (1 << rest) - 1 } else { u64::MAX };
            word.store(bits, Ordering::Relaxed);
        }
        Some(bitmap)
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

    /// The bits of one word.
    #[inline]
    pub(crate) fn get(&self, word: usize) -> u64 {
        self.words
            .get(word)
            .map_or(0, |bits| bits.load(Ordering::Acquire))
    }

    /// Takes those bits of one word that are in `mask`.
    #[inline]
    pub(crate) fn take_masked(&self, word: usize, mask: u64) -> u64 {
        match self.words.get(word) {
            Some(bits) if bits.load(Ordering::Acquire) & mask != 0 => {
                bits.fetch_and(!mask, Ordering::AcqRel) & mask
            }
            _ => 0,
        }
    }

    /// Moves all bits to `bits`, which has as many words, and leaves every page clean. Returns
    /// whether there was any.
    pub(crate) fn take_all(&self, bits: &mut [u64]) -> bool {
        let (words, last_words) = self.words.as_chunks::<8>();
        let (bits, last_bits) = bits.as_chunks_mut::<8>();
        let mut any = false;
        // Most of a bitmap is clean most of the time: eight words are looked at together.
        for (words, bits) in words.iter().zip(bits) {
            any |= take_words(words, bits);
        }
        any | take_words(last_words, last_bits)
    }
}

#[inline(always)]
fn take_words(words: &[AtomicU64], bits: &mut [u64]) -> bool {
    let all = words
        .iter()
        .fold(0, |all, word| all | word.load(Ordering::Acquire));
    if all == 0 {
        bits.fill(0);
        return false;
    }
    for (word, bits) in words.iter().zip(bits) {
        *bits = match word.load(Ordering::Relaxed) {
            0 => 0,
            _ => word.swap(0, Ordering::AcqRel),
        };
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_stays_dirty_until_it_is_taken() {
        let bitmap = DirtyBitmap::new(16 * 64 + 130).unwrap();
        assert_eq!(bitmap.words(), 19);
        let pages = [0, 63, 64, 129, 129, 10 * 64 + 5, 16 * 64, 18 * 64 + 1];
        for page in pages {
            bitmap.mark(page);
        }
        bitmap.mark(1 << 40);
        let mut expected = [0; 19];
        for page in pages {
            expected[(page / 64) as usize] |= 1 << (page % 64);
        }
        let mut bits = [7; 19];
        assert!(bitmap.take_all(&mut bits));
        assert_eq!(bits, expected);
        assert!(!bitmap.take_all(&mut bits));
        assert_eq!(bits, [0; 19]);
    }

    #[test]
    fn a_bitmap_that_begins_dirty_has_a_bit_for_each_page_and_no_more() {
        for pages in [1, 63, 64, 65, 128, 130] {
            let bitmap = DirtyBitmap::all_dirty(pages).unwrap();
            let bits: u32 = (0..4).map(|word| bitmap.get(word).count_ones()).sum();
            assert_eq!(u64::from(bits), pages);
            let last = (pages - 1) as usize;
            assert_eq!(bitmap.get(last / 64) >> (last % 64), 1);
        }
    }

    #[test]
    fn only_bits_that_are_named_and_set_are_taken() {
        let bitmap = DirtyBitmap::new(64).unwrap();
        for page in [1, 2, 5] {
            bitmap.mark(page);
        }
        assert_eq!(bitmap.take_masked(0, 0b1100), 0b100);
        assert_eq!(bitmap.take_masked(0, 0b1100), 0);
        assert_eq!(bitmap.take_masked(1, u64::MAX), 0);
        assert_eq!(bitmap.get(0), 0b10_0010);
    }
}
