//! The dirty ring: what each virtual processor writes goes to a ring of its own, which the program
//! maps (SPEC 6.9, KVM API "KVM_CAP_DIRTY_LOG_RING").
//!
//! An entry's flags say whose it is. 0: the MMU's, to be filled. [`DirtyGfn::DIRTY`]: the program's,
//! to be harvested. [`DirtyGfn::RESET`]: harvested; at the next
//! [`Mmu::reset_dirty_rings`] its page is protected again and the entry is the MMU's once more. Each
//! side releases an entry with its flags and acquires it with them.
//!
//! The program may write whatever it likes to the ring. That loses it entries; indices, addresses
//! and slots are the MMU's own or are checked.

use crate::format::MmuFormat;
use crate::host::Host;
use crate::mmu::{Mmu, Writer};
use crate::region::RegionFlags;
use crate::sync::atomic::{AtomicU32, Ordering};
use alloc::sync::Arc;
use core::sync::atomic::{AtomicU32 as SharedU32, AtomicU64 as SharedU64};
use twofold_table::Debt;

/// One entry, `struct kvm_dirty_gfn`.
#[repr(C)]
#[derive(Debug, Default)]
pub struct DirtyGfn {
    flags: SharedU32,
    /// Slot id in bits 15:0, address space in bits 31:16.
    slot: SharedU32,
    /// The page's number in the slot.
    offset: SharedU64,
}

impl DirtyGfn {
    /// The entry waits for the program.
    pub const DIRTY: u32 = 1;
    /// The program has taken the entry.
    pub const RESET: u32 = 2;

    /// Takes the entry, as the program does: slot (address space in bits 31:16) and page number, if
    /// it waits.
    pub fn harvest(&self) -> Option<(u32, u64)> {
        if self.flags.load(Ordering::Acquire) != Self::DIRTY {
            return None;
        }
        let taken = (
            self.slot.load(Ordering::Relaxed),
            self.offset.load(Ordering::Relaxed),
        );
        self.flags.store(Self::RESET, Ordering::Release);
        Some(taken)
    }
}

/// The memory of a ring. In a hypervisor it is mapped by the program as well.
pub trait RingMemory: Send + Sync {
    /// The entries: always the same, a power of two, zero at first.
    fn entries(&self) -> &[DirtyGfn];
}

impl RingMemory for alloc::boxed::Box<[DirtyGfn]> {
    fn entries(&self) -> &[DirtyGfn] {
        self
    }
}

/// Most entries that a ring may have (`KVM_DIRTY_RING_MAX_ENTRIES`).
pub const MAX_ENTRIES: u32 = 65536;
/// Entries kept for what is written between the moment a ring is found full and the moment the
/// virtual processor stops (`KVM_DIRTY_RING_RSVD_ENTRIES`).
const RESERVED: u32 = 64;
/// Entries that a processor's log may add at once.
const PML_ENTRIES: u32 = 512;

/// Why rings of this size cannot be had.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DirtyRingError {
    /// Not a power of two, smaller than a page or than the reserve, or asked for a second time:
    /// `-EINVAL`.
    #[error("the size is not a power of two above the reserve, or was set before")]
    Invalid,
    /// More than [`MAX_ENTRIES`]: `-E2BIG`.
    #[error("the ring has more than 65536 entries")]
    TooBig,
}

/// The ring of one reader.
pub(crate) struct DirtyRing {
    memory: Arc<dyn RingMemory>,
    size: u32,
    soft_limit: u32,
    /// Entries filled so far. Written by the reader's thread.
    filled: AtomicU32,
    /// Entries taken back so far. Written under the writers' lock.
    reset: AtomicU32,
    /// Entries found harvested, to be taken back. Used under the writers' lock.
    harvested: AtomicU32,
}

impl core::fmt::Debug for DirtyRing {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("DirtyRing")
            .field("size", &self.size)
            .field("used", &self.used())
            .finish_non_exhaustive()
    }
}

impl DirtyRing {
    /// A ring of as many entries as the memory has, of which `reserved` are beyond the limit.
    pub(crate) fn new(memory: Arc<dyn RingMemory>, reserved: u32) -> Self {
        let entries = u32::try_from(memory.entries().len()).unwrap_or(MAX_ENTRIES);
        // A power of two at most as large.
        let size = entries.checked_ilog2().map_or(0, |log| 1 << log);
        Self {
            memory,
            size,
            soft_limit: size.saturating_sub(reserved),
            filled: AtomicU32::new(0),
            reset: AtomicU32::new(0),
            harvested: AtomicU32::new(0),
        }
    }

    /// Entries that were filled and not taken back.
    pub(crate) fn used(&self) -> u32 {
        let filled = self.filled.load(Ordering::Relaxed);
        filled.wrapping_sub(self.reset.load(Ordering::Acquire))
    }

    /// Whether the virtual processor has to stop until entries were taken back.
    #[inline]
    pub(crate) fn is_soft_full(&self) -> bool {
        self.used() >= self.soft_limit
    }

    fn entry(&self, number: u32) -> Option<&DirtyGfn> {
        let index = number & self.size.wrapping_sub(1);
        self.memory.entries().get(index as usize)
    }

    /// Fills an entry. Whether there was one; only the ring's reader may call this.
    pub(crate) fn push(&self, slot: u32, offset: u64) -> bool {
        if self.used() >= self.size {
            return false;
        }
        let number = self.filled.load(Ordering::Relaxed);
        let Some(entry) = self.entry(number) else {
            return false;
        };
        entry.slot.store(slot, Ordering::Relaxed);
        entry.offset.store(offset, Ordering::Relaxed);
        // Counted first: what the program finds and takes, the next reset must not miss.
        self.filled.store(number.wrapping_add(1), Ordering::Release);
        entry.flags.store(DirtyGfn::DIRTY, Ordering::Release);
        true
    }

    /// Counts the entries that the program has taken since the last reset, in order up to the first
    /// that it has not. Under the writers' lock.
    fn count_harvested(&self) -> u32 {
        let first = self.reset.load(Ordering::Relaxed);
        let filled = self.filled.load(Ordering::Acquire).wrapping_sub(first);
        let mut count = 0;
        while count < filled.min(self.size)
            && self
                .entry(first.wrapping_add(count))
                .is_some_and(|entry| entry.flags.load(Ordering::Acquire) & DirtyGfn::RESET != 0)
        {
            count += 1;
        }
        self.harvested.store(count, Ordering::Relaxed);
        count
    }

    /// Takes the counted entries back, giving each run of pages near each other to `pages`: slot,
    /// first page, and a bit for each of 64 pages from there.
    fn take_back(&self, mut pages: impl FnMut(u32, u64, u64)) {
        let first = self.reset.load(Ordering::Relaxed);
        let mut run: Option<(u32, u64, u64)> = None;
        for count in 0..self.harvested.load(Ordering::Relaxed) {
            let Some(entry) = self.entry(first.wrapping_add(count)) else {
                break;
            };
            let slot = entry.slot.load(Ordering::Relaxed);
            let offset = entry.offset.load(Ordering::Relaxed);
            entry.flags.store(0, Ordering::Release);
            run = Some(match run {
                Some((old, start, mask)) if old == slot => match joined(start, mask, offset) {
                    Some((start, mask)) => (slot, start, mask),
                    None => {
                        pages(old, start, mask);
                        (slot, offset, 1)
                    }
                },
                Some((old, start, mask)) => {
                    pages(old, start, mask);
                    (slot, offset, 1)
                }
                None => (slot, offset, 1),
            });
        }
        if let Some((slot, start, mask)) = run {
            pages(slot, start, mask);
        }
        let taken = self.harvested.swap(0, Ordering::Relaxed);
        self.reset
            .store(first.wrapping_add(taken), Ordering::Release);
    }
}

/// The 64 pages from `start` on, of which `mask` are taken, with `page` as one of them, or `None` if
/// they do not fit.
fn joined(start: u64, mask: u64, page: u64) -> Option<(u64, u64)> {
    if let Some(above) = page.checked_sub(start) {
        return (above < 64).then(|| (start, mask | 1 << above));
    }
    let below = start - page;
    (below < 64 && mask.leading_zeros() >= below as u32).then(|| (page, mask << below | 1))
}

impl<F: MmuFormat, H: Host> Mmu<F, H> {
    /// `KVM_CAP_DIRTY_LOG_RING`: from now on each reader has a ring of `bytes` bytes
    /// ([`ring_reader`](Self::ring_reader)), and slots that log have no bitmap. Before there are
    /// readers, once. Returns the number of entries.
    ///
    /// # Errors
    /// See [`DirtyRingError`]; in KVM's order.
    pub fn enable_dirty_ring(&self, bytes: u64) -> Result<u32, DirtyRingError> {
        const ENTRY: u64 = size_of::<DirtyGfn>() as u64;
        let least = (u64::from(self.reserved_ring_entries()) * ENTRY).max(twofold_arch::PAGE_SIZE);
        if !bytes.is_power_of_two() || bytes < least {
            return Err(DirtyRingError::Invalid);
        }
        if bytes > u64::from(MAX_ENTRIES) * ENTRY {
            return Err(DirtyRingError::TooBig);
        }
        let entries = (bytes / ENTRY) as u32;
        let _writer = self.lock();
        if self.ring_entries.load(Ordering::Relaxed) != 0 {
            return Err(DirtyRingError::Invalid);
        }
        self.ring_entries.store(entries, Ordering::Relaxed);
        Ok(entries)
    }

    /// Entries of each dirty ring, 0 without rings.
    pub fn ring_entries(&self) -> u32 {
        self.ring_entries.load(Ordering::Relaxed)
    }

    /// Entries beyond the limit at which a virtual processor stops.
    pub(crate) fn reserved_ring_entries(&self) -> u32 {
        RESERVED + if self.logs_by_pml() { PML_ENTRIES } else { 0 }
    }

    /// `KVM_RESET_DIRTY_RINGS`: protects the pages of every entry that was harvested, so that the
    /// next write is seen, and takes the entries back. Returns how many there were.
    ///
    /// An entry is filled before the mapping that lets its page be written is published, in one
    /// read section; so this waits for the open sections before it protects.
    pub fn reset_dirty_rings(&self) -> u32 {
        let _slots = self.lock_slots();
        let mut writer = self.lock();
        let rings = |writer: &Writer<F>| {
            let mut count = 0_u32;
            for ring in writer.readers.iter().filter_map(|reader| reader.ring()) {
                count = count.saturating_add(ring.count_harvested());
            }
            count
        };
        let count = rings(&writer);
        if count == 0 {
            return 0;
        }
        let _readers = self.synchronize(&mut writer);
        let writer: &Writer<F> = &writer;
        let mut debt = Debt::none();
        for ring in writer.readers.iter().filter_map(|reader| reader.ring()) {
            ring.take_back(|slot, first, mask| {
                // What the program left in the entry may be anything.
                let Some(slot) = self.slot_by_id(writer, (slot >> 16) as u16, slot as u16) else {
                    return;
                };
                let last = u64::from(63 - mask.leading_zeros());
                let inside = first
                    .checked_add(last)
                    .is_some_and(|last| last < slot.info.pages);
                if inside && slot.info.flags.contains(RegionFlags::LOG_DIRTY) {
                    self.notice_writes_of(writer, &slot.info, first, &[mask], &mut debt);
                }
            });
        }
        self.pay(writer, debt);
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::boxed::Box;
    use alloc::vec::Vec;

    fn ring(entries: usize) -> (Arc<Box<[DirtyGfn]>>, DirtyRing) {
        let memory: Arc<Box<[DirtyGfn]>> =
            Arc::new((0..entries).map(|_| DirtyGfn::default()).collect());
        let shared: Arc<dyn RingMemory> = memory.clone();
        (memory, DirtyRing::new(shared, 3))
    }

    fn reset(ring: &DirtyRing) -> Vec<(u32, u64, u64)> {
        let mut runs = Vec::new();
        ring.count_harvested();
        ring.take_back(|slot, first, mask| runs.push((slot, first, mask)));
        runs
    }

    #[test]
    fn an_entry_goes_round_from_filled_to_harvested_to_reset() {
        let (memory, ring) = ring(8);
        for round in 0..20_u64 {
            assert!(ring.push(1 << 16 | 5, round));
            assert_eq!(reset(&ring), [], "not harvested yet");
            let entry = &memory[round as usize % 8];
            assert_eq!(entry.harvest(), Some((1 << 16 | 5, round)));
            assert_eq!(entry.harvest(), None);
            assert_eq!(ring.used(), 1);
            assert_eq!(reset(&ring), [(1 << 16 | 5, round, 1)]);
            assert_eq!(ring.used(), 0);
        }
    }

    #[test]
    fn a_ring_is_soft_full_before_it_is_full_and_never_overruns() {
        let (memory, ring) = ring(8);
        for page in 0..8 {
            assert_eq!(ring.is_soft_full(), page >= 5);
            assert!(ring.push(0, page));
        }
        assert!(!ring.push(0, 99));
        assert_eq!(memory[0].harvest(), Some((0, 0)));
        assert!(!ring.push(0, 99), "harvested is not reset");
        assert_eq!(reset(&ring), [(0, 0, 1)]);
        assert!(ring.push(0, 99));
        assert!(!ring.push(0, 100));
    }

    #[test]
    fn neighbours_are_reset_together_in_both_directions() {
        let (memory, ring) = ring(16);
        for page in [100, 101, 163, 99, 100, 300, 299, 236, 235] {
            assert!(ring.push(2, page));
        }
        assert!(ring.push(3, 236));
        assert_eq!(memory.iter().filter_map(DirtyGfn::harvest).count(), 10);
        let runs = reset(&ring);
        assert_eq!(
            runs,
            [
                (2, 100, 1 | 2 | 1 << 63),
                (2, 99, 3),
                (2, 299, 3),
                (2, 235, 3),
                (3, 236, 1),
            ]
        );
    }

    #[test]
    fn a_program_that_scribbles_on_the_ring_only_loses_entries() {
        let (memory, ring) = ring(8);
        for entry in memory.iter() {
            entry.flags.store(DirtyGfn::RESET, Ordering::Relaxed);
            entry.offset.store(u64::MAX, Ordering::Relaxed);
        }
        assert_eq!(reset(&ring), [], "nothing was filled");
        assert!(ring.push(0, 7));
        memory[0].flags.store(u32::MAX, Ordering::Relaxed);
        memory[0].slot.store(u32::MAX, Ordering::Relaxed);
        memory[0].offset.store(u64::MAX, Ordering::Relaxed);
        assert_eq!(reset(&ring), [(u32::MAX, u64::MAX, 1)]);
        assert_eq!(ring.used(), 0);
    }

    #[test]
    fn indices_wrap() {
        let (memory, ring) = ring(8);
        ring.filled.store(u32::MAX, Ordering::Relaxed);
        ring.reset.store(u32::MAX, Ordering::Relaxed);
        assert!(ring.push(0, 1) && ring.push(0, 2));
        assert_eq!(memory[7].harvest(), Some((0, 1)));
        assert_eq!(memory[0].harvest(), Some((0, 2)));
        assert_eq!(reset(&ring), [(0, 1, 3)]);
        assert_eq!(ring.used(), 0);
    }
}
