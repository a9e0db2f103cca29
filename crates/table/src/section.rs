//! Read sections: how a walker without a lock is waited for.
//!
//! Every thread that walks tables without the writers' lock owns a [`ReaderWord`]. Entering and
//! leaving a section are plain stores. A writer makes its change visible (raises a sequence,
//! unlinks a table), runs the host's heavy barrier, which is a full barrier on every reader's
//! thread, and then waits for the sections that are open: a section that opened later has seen
//! the change. [`Quiesced`] is the proof that this was done.

// UNSAFETY: `ReaderWord::enter` has a duty that types cannot express without allocation.
#![expect(unsafe_code)]

use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::light_barrier;
use core::marker::PhantomData;

/// One thread's state: odd while it is in a section.
#[derive(Debug)]
pub struct ReaderWord(AtomicU64);

impl Default for ReaderWord {
    fn default() -> Self {
        Self::new()
    }
}

impl ReaderWord {
    /// A reader outside any section.
    pub fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Opens a section.
    ///
    /// A section must be short and must not block: writers wait for it.
    ///
    /// # Safety
    /// Only one thread at a time may use the word, and sections do not nest.
    #[inline(always)]
    pub unsafe fn enter(&self) -> Section<'_> {
        let count = self.0.load(Ordering::Relaxed).wrapping_add(1);
        debug_assert!(count & 1 == 1, "read sections do not nest");
        self.0.store(count, Ordering::Relaxed);
        light_barrier();
        Section {
            word: self,
            next: count.wrapping_add(1),
            not_send: PhantomData,
        }
    }

    /// Waits until the section that is open now, if any, is closed. `hint` is called between looks.
    fn wait(&self, mut hint: impl FnMut()) {
        let seen = self.0.load(Ordering::Acquire);
        if seen & 1 == 1 {
            while self.0.load(Ordering::Acquire) == seen {
                hint();
            }
        }
    }
}

/// An open read section. What the reader finds in it stays allocated until it is dropped.
#[must_use = "the section ends when this is dropped"]
#[derive(Debug)]
pub struct Section<'a> {
    word: &'a ReaderWord,
    next: u64,
    not_send: PhantomData<*const ()>,
}

impl Drop for Section<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        self.word.0.store(self.next, Ordering::Release);
    }
}

/// Proof that every section that could have missed a change has ended.
#[must_use]
#[derive(Debug)]
pub struct Quiesced(());

/// Waits for every section that is open. The caller has made its change visible and then executed
/// the heavy barrier; `words` is every reader's. `hint` is called while waiting.
pub fn wait_for_readers<'a>(
    words: impl Iterator<Item = &'a ReaderWord>,
    mut hint: impl FnMut(),
) -> Quiesced {
    for word in words {
        word.wait(&mut hint);
    }
    Quiesced(())
}

impl Quiesced {
    /// For an owner that has no readers: `&mut` access to the whole, or before anything was shared.
    ///
    /// # Safety
    /// No thread may be in a section that could reach what is about to be freed.
    pub const unsafe fn exclusive() -> Self {
        Self(())
    }
}
