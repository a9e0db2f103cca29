//! The dirty bitmaps of slots: enabling, reading, clearing, and noticing writes again (SPEC 6.9).
//!
//! A page is marked before the mapping that lets it be written is published, in one read section.
//! So whoever takes a mark waits for the open sections and then finds every mapping that allows a
//! write which the mark stood for.

use crate::format::MmuFormat;
use crate::host::Host;
use crate::invariants::Locked;
use crate::mmu::{Mmu, Writer};
use crate::region::{ADDRESS_SPACES, USER_SLOTS};
use crate::slots::{DirtyBitmap, SlotInfo};
use crate::spte::{self, AdBits, Writable};
use crate::sync::atomic::Ordering;
use alloc::sync::Arc;
use core::ops::Range;
use twofold_arch::{Gfn, Level};
use twofold_table::{Cursor, Debt, Entry, Height, Raced, Seen, Storage, Table};

bitflags::bitflags! {
    /// `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`: how reading and clearing a dirty log are told apart.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct ManualProtect: u32 {
        /// `KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE`: reading a log leaves it as it is;
        /// [`Mmu::dirty_log_clear`] clears pages and notices their next write.
        const ENABLE = 1 << 0;
        /// `KVM_DIRTY_LOG_INITIALLY_SET`: every page of a slot that begins to log counts as dirty,
        /// and nothing is protected before it is cleared. Needs `ENABLE`.
        const INITIALLY_SET = 1 << 1;
    }
}

/// Words of a bitmap whose pages are protected without giving others a turn: 512 MiB of memory.
const WORDS_AT_ONCE: usize = 2048;

/// Why a dirty bitmap cannot be read or cleared.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DirtyLogError {
    /// What is dirty is in rings: `-ENXIO`.
    #[error("what is dirty is recorded in rings; there is no bitmap")]
    RingOnly,
    /// No such slot id or address space can exist: `-EINVAL`.
    #[error("slot id or address space out of range")]
    Id,
    /// The first page is not a multiple of 64, or the range leaves the slot, or ends inside it
    /// without being a multiple of 64 pages: `-EINVAL`.
    #[error("the range is not aligned to 64 pages or leaves the slot")]
    Range,
    /// No such slot, or it does not log: `-ENOENT`.
    #[error("no slot with dirty logging has this id")]
    NotLogged,
    /// The buffer has fewer bits than the range has pages.
    #[error("the buffer is smaller than the bitmap")]
    Buffer,
}

impl<F: MmuFormat, H: Host> Mmu<F, H> {
    /// Chooses how dirty logs are read and cleared; for slots that begin to log from now on.
    ///
    /// Whoever offers the choice refuses `INITIALLY_SET` alone, which does nothing here.
    pub fn set_manual_protect(&self, protect: ManualProtect) {
        self.manual_protect.store(protect.bits(), Ordering::Relaxed);
    }

    fn manual_protect(&self) -> ManualProtect {
        ManualProtect::from_bits_truncate(self.manual_protect.load(Ordering::Relaxed))
    }

    /// Whether every page of a slot counts as dirty when it begins to log. Rings cannot say so.
    pub(crate) fn begins_all_dirty(&self) -> bool {
        self.manual_protect() == ManualProtect::all() && self.ring_entries() == 0
    }

    /// The slot with this id and its bitmap.
    fn logged_slot(
        &self,
        writer: &Writer<F>,
        as_id: u16,
        slot: u16,
    ) -> Result<(SlotInfo, Arc<DirtyBitmap>), DirtyLogError> {
        self.slot_by_id(writer, as_id, slot)
            .and_then(|slot| Some((slot.info, Arc::clone(slot.dirty.as_ref()?))))
            .ok_or(DirtyLogError::NotLogged)
    }

    /// The checks that come before the slot is looked at.
    fn check_log_id(&self, as_id: u16, slot: u16) -> Result<(), DirtyLogError> {
        if self.ring_entries() != 0 {
            return Err(DirtyLogError::RingOnly);
        }
        if usize::from(as_id) >= ADDRESS_SPACES || usize::from(slot) >= USER_SLOTS {
            return Err(DirtyLogError::Id);
        }
        Ok(())
    }

    /// `KVM_GET_DIRTY_LOG`: writes the slot's dirty bits to `bitmap` (bit n of word m is page
    /// `64 * m + n` of the slot). Without [`ManualProtect::ENABLE`] the bits are taken and the pages
    /// protected again, so that the next write is seen. Words of `bitmap` beyond the slot are left
    /// as they are.
    ///
    /// What processors have logged is drained by the caller before.
    ///
    /// # Errors
    /// See [`DirtyLogError`], in KVM's order.
    pub fn dirty_log_get(
        &self,
        as_id: u16,
        slot: u16,
        bitmap: &mut [u64],
    ) -> Result<(), DirtyLogError> {
        self.check_log_id(as_id, slot)?;
        let _slots = self.lock_slots();
        let writer = self.lock();
        let (info, dirty) = self.logged_slot(&writer, as_id, slot)?;
        let bitmap = bitmap
            .get_mut(..dirty.words())
            .ok_or(DirtyLogError::Buffer)?;
        if self.manual_protect().contains(ManualProtect::ENABLE) {
            for (number, word) in bitmap.iter_mut().enumerate() {
                *word = dirty.get(number);
            }
            return Ok(());
        }
        if dirty.take_all(bitmap) {
            self.notice_taken(writer, &info, 0, bitmap);
        }
        Ok(())
    }

    /// How many words `KVM_CLEAR_DIRTY_LOG` of `pages` pages from `first` on reads, if it would not
    /// be refused.
    ///
    /// # Errors
    /// See [`DirtyLogError`], in KVM's order.
    pub fn dirty_log_words(
        &self,
        as_id: u16,
        slot: u16,
        first: u64,
        pages: u32,
    ) -> Result<usize, DirtyLogError> {
        self.check_log_id(as_id, slot)?;
        if !first.is_multiple_of(64) {
            return Err(DirtyLogError::Range);
        }
        let writer = self.lock();
        let (info, _) = self.logged_slot(&writer, as_id, slot)?;
        let pages = u64::from(pages);
        let rest = info.pages.checked_sub(first).ok_or(DirtyLogError::Range)?;
        if pages > rest || pages < rest && !pages.is_multiple_of(64) {
            return Err(DirtyLogError::Range);
        }
        Ok(pages.div_ceil(64) as usize)
    }

    /// `KVM_CLEAR_DIRTY_LOG`: of the `pages` pages from `first` on, those whose bit is set in
    /// `bitmap` and that are dirty become clean, and their next write is noticed. `bitmap` is left
    /// with the bits of exactly those pages.
    ///
    /// # Errors
    /// See [`DirtyLogError`], in KVM's order; nothing has changed then.
    pub fn dirty_log_clear(
        &self,
        as_id: u16,
        slot: u16,
        first: u64,
        pages: u32,
        bitmap: &mut [u64],
    ) -> Result<(), DirtyLogError> {
        let _slots = self.lock_slots();
        let words = self.dirty_log_words(as_id, slot, first, pages)?;
        let bitmap = bitmap.get_mut(..words).ok_or(DirtyLogError::Buffer)?;
        if self.config.eager_split && self.begins_all_dirty() {
            self.split_named(as_id, slot, first, bitmap);
        }
        let writer = self.lock();
        let (info, dirty) = self.logged_slot(&writer, as_id, slot)?;
        let mut any = 0;
        for (number, word) in bitmap.iter_mut().enumerate() {
            *word = dirty.take_masked((first / 64) as usize + number, *word);
            any |= *word;
        }
        if any != 0 {
            self.notice_taken(writer, &info, first, bitmap);
        }
        Ok(())
    }

    /// Splits the large leaves around the pages named in `bitmap`, from the page `first` of the slot
    /// on: they were left as they are when logging began. The caller holds the slots' lock.
    fn split_named(&self, as_id: u16, slot: u16, first: u64, bitmap: &[u64]) {
        let Some(info) = self.slot(as_id, slot) else {
            return;
        };
        let gfn_of = |word: usize| {
            let page = first.saturating_add(64 * word as u64).min(info.pages);
            Gfn::new(info.base.get() + page)
        };
        let mut start = 0;
        for run in bitmap.chunk_by(|a, b| (*a == 0) == (*b == 0)) {
            let end = start + run.len();
            if run.first().is_some_and(|word| *word != 0) {
                self.split_range(as_id, gfn_of(start)..gfn_of(end));
            }
            start = end;
        }
    }

    /// Notices the next write to each page whose mark was taken: `bitmap` from the page `first` of
    /// the slot on. The caller holds the slots' lock; the writers' is given up now and then.
    fn notice_taken<'m>(
        &'m self,
        mut writer: Locked<'m, F, H>,
        slot: &SlotInfo,
        first: u64,
        bitmap: &[u64],
    ) {
        // Until the last page is done there are some that may be written and are not marked.
        writer.begins_to_log = Some((slot.as_id, slot.id));
        let _readers = self.synchronize(&mut writer);
        for (number, batch) in bitmap.chunks(WORDS_AT_ONCE).enumerate() {
            if number > 0 {
                drop(writer);
                writer = self.lock();
            }
            let first = first + 64 * (number * WORDS_AT_ONCE) as u64;
            let mut debt = Debt::none();
            self.notice_writes_of(&writer, slot, first, batch, &mut debt);
            self.pay(&writer, debt);
        }
        writer.begins_to_log = None;
    }

    /// [`notice_writes`](Self::notice_writes) for those pages of the slot, from the page `first` on,
    /// whose bits are set in `bitmap`.
    pub(crate) fn notice_writes_of(
        &self,
        writer: &Writer<F>,
        slot: &SlotInfo,
        first: u64,
        bitmap: &[u64],
        debt: &mut Debt<F>,
    ) {
        let first = slot.base.get() + first;
        for run in runs(bitmap) {
            let gfns = Gfn::new(first + run.start)..Gfn::new(first + run.end);
            self.notice_writes(writer, slot, gfns, debt);
        }
    }

    /// Changes every leaf of `gfns`, which are in the slot, in every root of its address space, so
    /// that the next write to each page is noticed: by the processor's log or by a fault.
    pub(crate) fn notice_writes(
        &self,
        writer: &Writer<F>,
        slot: &SlotInfo,
        gfns: Range<Gfn>,
        debt: &mut Debt<F>,
    ) {
        let range = gfns.start.address()..gfns.end.address();
        let pml = self.logs_by_pml();
        for root in writer.direct_roots(slot.as_id) {
            let mut cursor = Cursor::new(self.table_locked(root, writer), range.clone());
            while let Some(seen) = cursor.next() {
                if seen.entry::<F>() == Entry::Leaf
                    && notice_leaf(&cursor.table(), seen, pml, debt).is_err()
                {
                    cursor.again();
                }
            }
        }
    }
}

/// Changes a leaf so that the next write to its page is noticed, if it may be written.
#[inline(always)]
fn notice_leaf<F: MmuFormat, S: Storage>(
    table: &Table<'_, F, S>,
    seen: Seen,
    pml: bool,
    debt: &mut Debt<F>,
) -> Result<(), Raced> {
    let entry = seen.value();
    // A large leaf loses W whatever the processor logs, and is split when it is written.
    let Some(level) = (match seen.place().height() {
        Height::LEAF => Some(Level::L4K),
        height => Level::from_number(height.get()),
    }) else {
        return Ok(());
    };
    let new = match spte::writable::<F>(entry) {
        Some(Writable::Yes | Writable::SubPages) => {
            let new = spte::noticing_writes::<F>(entry, level, pml);
            if new == entry {
                return Ok(());
            }
            new
        }
        // A processor may still write through a translation from before its page aged: ageing
        // takes W, and nobody has flushed, even if reading was allowed again since.
        Some(Writable::Logged) if spte::ad_bits(entry) == AdBits::Off => entry,
        _ => return Ok(()),
    };
    table.shrink(seen, new, debt)
}

/// Runs of set bits, numbered from bit 0 of the first word on.
fn runs(words: &[u64]) -> impl Iterator<Item = Range<u64>> {
    let mut position = 0;
    core::iter::from_fn(move || {
        let start = next_bit(words, position, true)?;
        position = next_bit(words, start, false).unwrap_or(64 * words.len() as u64);
        Some(start..position)
    })
}

/// The first bit from `from` on that is `set`, or not.
fn next_bit(words: &[u64], from: u64, set: bool) -> Option<u64> {
    let flip = if set { 0 } else { u64::MAX };
    let mut number = (from / 64) as usize;
    let mut word = (words.get(number)? ^ flip) & (u64::MAX << (from % 64));
    while word == 0 {
        number += 1;
        word = words.get(number)? ^ flip;
    }
    Some(64 * number as u64 + u64::from(word.trailing_zeros()))
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    #[test]
    fn runs_of_bits_go_on_from_word_to_word() {
        let found = |words: &[u64]| {
            runs(words)
                .map(|run| (run.start, run.end))
                .collect::<Vec<_>>()
        };
        assert_eq!(found(&[]), []);
        assert_eq!(found(&[0, 0]), []);
        assert_eq!(found(&[u64::MAX, u64::MAX]), [(0, 128)]);
        assert_eq!(found(&[1, 0, 1 << 63, 3]), [(0, 1), (191, 194)]);
        assert_eq!(found(&[0b1011_0000, 1 << 63]), [(4, 6), (7, 8), (127, 128)]);
    }
}
