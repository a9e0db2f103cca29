//! Which host pages hold code that some vCPU has decoded, and how often such code was written.
//!
//! Decoded blocks are private to a vCPU and are compared with memory when something may have
//! changed. What has to be noticed here is a store by a vCPU of the machine into a page that code
//! was decoded from. Such stores must not cost anything elsewhere, so the question "does this page
//! hold code?" is asked when permission to write a page is cached, not when it is written: for a
//! page that holds code the permission is never cached, and each store goes a longer way.
//!
//! On that way lines of 64 bytes are told apart, so that data beside code may change without every
//! vCPU looking at all its code again: whoever uses code notes its lines *before* reading them, whoever
//! stores looks for the line *after* storing. One of the two sees the other.

use std::sync::atomic::{AtomicU64, Ordering, fence};
use twofold_arch::{Hpa, PAGE_SHIFT};

/// log2 of the number of bits. Two pages that share one cost a few slow stores, nothing else.
const BITS_SHIFT: u32 = 17;

/// log2 of the bytes in a line.
const LINE_SHIFT: u32 = 6;
/// log2 of the number of words that hold the lines of a page. Pages that share one, likewise.
const LINE_WORDS_SHIFT: u32 = 14;

/// A set of host pages, by hash: it may hold pages that were not put into it.
#[derive(Debug)]
struct Pages(Box<[AtomicU64]>);

/// The pages of a machine that code was decoded from.
#[derive(Debug)]
pub(crate) struct CodePages {
    /// Permission to write these is not cached any more.
    noted: Pages,
    /// And no vCPU has such a permission from earlier.
    settled: Pages,
    /// A word for each page, by hash, and in it a bit for each line that code is used from.
    lines: Box<[AtomicU64]>,
    generation: AtomicU64,
}

impl Pages {
    fn new() -> Self {
        Self(
            (0..1usize << (BITS_SHIFT - 6))
                .map(|_| AtomicU64::new(0))
                .collect(),
        )
    }

    fn place(page: Hpa) -> (usize, u64) {
        let frame = page.get() >> PAGE_SHIFT;
        // Neighbours stay neighbours: a guest that goes through its memory asks for one word again
        // and again.
        let bit = (frame ^ (frame >> BITS_SHIFT)) & ((1 << BITS_SHIFT) - 1);
        ((bit >> 6) as usize, 1 << (bit & 63))
    }

    fn contains(&self, page: Hpa) -> bool {
        let (word, bit) = Self::place(page);
        self.0[word].load(Ordering::Acquire) & bit != 0
    }

    fn insert(&self, page: Hpa) {
        let (word, bit) = Self::place(page);
        self.0[word].fetch_or(bit, Ordering::SeqCst);
    }
}

impl CodePages {
    pub(crate) fn new() -> Self {
        Self {
            noted: Pages::new(),
            settled: Pages::new(),
            lines: (0..1usize << LINE_WORDS_SHIFT)
                .map(|_| AtomicU64::new(0))
                .collect(),
            generation: AtomicU64::new(0),
        }
    }

    /// Whether stores to the page have to be announced: code was decoded from it, or is about to
    /// be.
    pub(crate) fn contains(&self, page: Hpa) -> bool {
        self.noted.contains(page)
    }

    /// Whether every store to the page is announced, so that code may be decoded from it.
    pub(crate) fn is_settled(&self, page: Hpa) -> bool {
        self.settled.contains(page)
    }

    /// Notes that code is about to be decoded from a page. Every vCPU of the machine has to drop
    /// its cached permissions to write before the page is [settled](CodePages::settle).
    pub(crate) fn note(&self, page: Hpa) {
        self.noted.insert(page);
    }

    /// No vCPU has a cached permission to write the page any more.
    pub(crate) fn settle(&self, page: Hpa) {
        self.settled.insert(page);
    }

    /// The word of a page's lines, and those that some bytes of the page lie in.
    fn lines_of(&self, first: Hpa, bytes: usize) -> (&AtomicU64, u64) {
        let frame = first.get() >> PAGE_SHIFT;
        let word = (frame ^ (frame >> LINE_WORDS_SHIFT)) & ((1 << LINE_WORDS_SHIFT) - 1);
        let line = |at: u64| (at.min((1 << PAGE_SHIFT) - 1) >> LINE_SHIFT) as u32;
        let offset = first.get() & ((1 << PAGE_SHIFT) - 1);
        let (low, high) = (line(offset), line(offset + bytes.max(1) as u64 - 1));
        let mask = u64::MAX >> (63 - (high - low)) << low;
        (&self.lines[word as usize], mask)
    }

    /// Notes that code is used from some bytes of a page: to be called before they are read.
    pub(crate) fn note_lines(&self, first: Hpa, bytes: usize) {
        let (word, mask) = self.lines_of(first, bytes);
        if word.load(Ordering::Acquire) & mask != mask {
            word.fetch_or(mask, Ordering::SeqCst);
        }
    }

    /// A store to some bytes of a page with code has happened. Returns whether they are code: then
    /// whoever sees the new count sees the store.
    pub(crate) fn written(&self, first: Hpa, bytes: usize) -> bool {
        let (word, mask) = self.lines_of(first, bytes);
        fence(Ordering::SeqCst);
        let is_code = word.load(Ordering::SeqCst) & mask != 0;
        if is_code {
            self.generation.fetch_add(1, Ordering::SeqCst);
        }
        is_code
    }

    /// How many stores into lines with code have happened. Blocks that were compared with memory
    /// at another count have to be compared again.
    #[inline(always)]
    pub(crate) fn generation(&self) -> u64 {
        // Acquire costs nothing on x86: the bytes are read after the count.
        self.generation.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_is_decoded_only_from_pages_that_nobody_writes_unnoticed() {
        let pages = CodePages::new();
        let page = Hpa::new(0x7f12_3456_7000);
        assert!(!pages.contains(page) && !pages.is_settled(page));
        pages.note(page);
        assert!(pages.contains(page) && !pages.is_settled(page));
        pages.settle(page);
        assert!(pages.contains(page) && pages.is_settled(page));
    }

    #[test]
    fn only_stores_to_lines_that_code_is_used_from_count() {
        let pages = CodePages::new();
        let at = |offset: u64| Hpa::new(0x7f12_3456_7000 + offset);
        assert!(!pages.written(at(0), 4096));
        // From the second line into the third, and the page's last byte.
        pages.note_lines(at(0x7f), 2);
        pages.note_lines(at(0xfff), 1);
        for (offset, bytes, is_code) in [
            (0x38, 8, false),
            (0x3c, 8, true),
            (0x40, 1, true),
            (0xbf, 1, true),
            (0xc0, 16, false),
            (0xfbf, 1, false),
            (0xfbf, 2, true),
            (0, 4096, true),
        ] {
            let before = pages.generation();
            assert_eq!(pages.written(at(offset), bytes), is_code, "{offset:#x}");
            assert_eq!(pages.generation(), before + u64::from(is_code));
        }
        assert!(
            !pages.written(Hpa::new(0x7f12_3456_8040), 8),
            "another page"
        );
    }

    #[test]
    fn neighbouring_pages_do_not_share_a_bit() {
        let pages = CodePages::new();
        for i in 0..64u64 {
            let page = Hpa::new(0x7f12_3450_0000 + i * 4096);
            assert!(!pages.contains(page), "page {i}");
            pages.note(page);
        }
    }
}
