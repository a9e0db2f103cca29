//! The state of one thread that resolves faults.

// UNSAFETY: opens read sections; `&mut Reader` makes sure that one thread does so, once.
#![expect(unsafe_code)]

use crate::dirty_ring::DirtyRing;
use crate::fault::Outcome;
use crate::region::ADDRESS_SPACES;
use crate::slots::{SlotHint, SlotInfo};
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::tables::{LeafTable, Pool};
use alloc::sync::Arc;
use spin::Mutex;
use twofold_arch::Level;
use twofold_table::{ReaderWord, Section};

/// One thread's registration with an MMU: its read section, what it remembers from the last fault,
/// and its counters. One per virtual processor; deregisters itself when dropped.
#[derive(Debug)]
pub struct Reader {
    state: Arc<ReaderState>,
    memory: Memory,
}

/// What a reader remembers.
#[derive(Debug)]
pub(crate) struct Memory {
    pub(crate) slots: [Option<KnownSlot>; ADDRESS_SPACES],
    pub(crate) leaf_table: Option<LeafTable>,
    pub(crate) pool: Pool,
}

/// Which memory of a slot a fault is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Half {
    /// The memory of the hypervisor's program.
    Shared,
    /// The guest memory file's, whose address stands in `info.hva` in the place of the slot's own,
    /// which is kept here.
    Private {
        /// The address of the shared half.
        shared: u64,
    },
}

/// A slot that was found, with a copy of what does not change.
#[derive(Clone, Copy)]
pub(crate) struct KnownSlot {
    pub(crate) info: SlotInfo,
    pub(crate) hint: SlotHint,
    pub(crate) half: Half,
    /// The mapping is only prepared, for an access that may come.
    pub(crate) prepared: bool,
}

impl core::fmt::Debug for KnownSlot {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.info.fmt(f)
    }
}

/// The part of a reader that writers look at. Aligned so that no two readers share a cache line.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct ReaderState {
    word: ReaderWord,
    counters: [AtomicU64; Counter::COUNT],
    /// Leaves mapped, by level.
    mapped: [AtomicU64; 3],
    mmu: u64,
    /// Where what this reader writes is recorded, if not in the slots' bitmaps.
    ring: Option<DirtyRing>,
    gone: AtomicBool,
    left: Mutex<Pool>,
}

/// What a reader counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Counter {
    Taken,
    Fixed,
    Emulate,
    Spurious,
    Fast,
    MmioCreated,
    Retry,
}

impl Counter {
    const COUNT: usize = 7;
}

/// Counters of one reader, as KVM publishes them for each virtual processor.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ReaderStats {
    /// Faults taken.
    pub pf_taken: u64,
    /// Faults resolved by a new or wider mapping.
    pub pf_fixed: u64,
    /// Faults that ended as MMIO.
    pub pf_emulate: u64,
    /// Faults that another processor had resolved.
    pub pf_spurious: u64,
    /// Faults resolved by restoring write permission without a lock or the host's help.
    pub pf_fast: u64,
    /// MMIO entries written.
    pub pf_mmio_spte_created: u64,
    /// Faults to be tried again.
    pub pf_retry: u64,
}

impl ReaderStats {
    pub(crate) fn add(&mut self, other: &Self) {
        self.pf_taken += other.pf_taken;
        self.pf_fixed += other.pf_fixed;
        self.pf_emulate += other.pf_emulate;
        self.pf_spurious += other.pf_spurious;
        self.pf_fast += other.pf_fast;
        self.pf_mmio_spte_created += other.pf_mmio_spte_created;
        self.pf_retry += other.pf_retry;
    }
}

/// Adds to a counter that only this thread writes.
#[inline(always)]
fn bump(counter: &AtomicU64) {
    counter.store(
        counter.load(Ordering::Relaxed).wrapping_add(1),
        Ordering::Relaxed,
    );
}

impl ReaderState {
    fn new(mmu: u64, ring: Option<DirtyRing>) -> Self {
        Self {
            word: ReaderWord::new(),
            counters: Default::default(),
            mapped: Default::default(),
            mmu,
            ring,
            gone: AtomicBool::new(false),
            left: Mutex::new(Pool::new()),
        }
    }

    pub(crate) fn word(&self) -> &ReaderWord {
        &self.word
    }

    #[inline(always)]
    pub(crate) fn ring(&self) -> Option<&DirtyRing> {
        self.ring.as_ref()
    }

    #[inline(always)]
    pub(crate) fn count(&self, counter: Counter) {
        bump(&self.counters[counter as usize]);
    }

    /// Counts what became of a fault.
    #[inline(always)]
    pub(crate) fn count_outcome(&self, outcome: Outcome) {
        match outcome {
            Outcome::Fixed { .. } => self.count(Counter::Fixed),
            Outcome::Spurious => self.count(Counter::Spurious),
            Outcome::Mmio => self.count(Counter::Emulate),
            Outcome::SubPageDenied => {}
            Outcome::Retry | Outcome::ObsoleteRoot => self.count(Counter::Retry),
        }
    }

    #[inline(always)]
    pub(crate) fn count_mapped(&self, level: Level) {
        if let Some(count) = self.mapped.get(usize::from(level.number()) - 1) {
            bump(count);
        }
    }

    pub(crate) fn mapped(&self) -> [u64; 3] {
        self.mapped
            .each_ref()
            .map(|count| count.load(Ordering::Relaxed))
    }

    pub(crate) fn stats(&self) -> ReaderStats {
        let get = |counter: Counter| self.counters[counter as usize].load(Ordering::Relaxed);
        ReaderStats {
            pf_taken: get(Counter::Taken),
            pf_fixed: get(Counter::Fixed),
            pf_emulate: get(Counter::Emulate),
            pf_spurious: get(Counter::Spurious),
            pf_fast: get(Counter::Fast),
            pf_mmio_spte_created: get(Counter::MmioCreated),
            pf_retry: get(Counter::Retry),
        }
    }

    /// Whether the reader has been dropped, and nothing that it has recorded is needed any more.
    pub(crate) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire) && self.ring().is_none_or(|ring| ring.used() == 0)
    }

    /// The pages that a dropped reader left behind.
    pub(crate) fn left(&self) -> &Mutex<Pool> {
        &self.left
    }
}

/// The right to open read sections, one at a time.
pub(crate) struct Sections<'a> {
    state: &'a ReaderState,
}

impl Sections<'_> {
    /// Opens a read section.
    #[inline(always)]
    pub(crate) fn enter(&mut self) -> Section<'_> {
        // SAFETY: the only `Sections` of this reader is borrowed, and came from its `&mut`.
        unsafe { self.state.word.enter() }
    }
}

impl Reader {
    /// A reader of the MMU with the number `mmu`, and the part for the MMU to keep.
    pub(crate) fn new(mmu: u64, ring: Option<DirtyRing>) -> (Self, Arc<ReaderState>) {
        let state = Arc::new(ReaderState::new(mmu, ring));
        let memory = Memory {
            slots: [None; ADDRESS_SPACES],
            leaf_table: None,
            pool: Pool::new(),
        };
        (
            Self {
                state: Arc::clone(&state),
                memory,
            },
            state,
        )
    }

    /// The reader's parts, for the MMU with the number `mmu`.
    ///
    /// # Panics
    /// If the reader belongs to another MMU.
    #[inline(always)]
    pub(crate) fn parts(&mut self, mmu: u64) -> (&ReaderState, Sections<'_>, &mut Memory) {
        assert!(
            self.state.mmu == mmu,
            "a reader was used with an MMU that is not its own"
        );
        (
            &self.state,
            Sections { state: &self.state },
            &mut self.memory,
        )
    }

    /// Whether so much of the reader's dirty ring is filled that its virtual processor must not run
    /// before entries were reset (`KVM_EXIT_DIRTY_RING_FULL`).
    #[inline]
    pub fn is_dirty_ring_soft_full(&self) -> bool {
        self.state.ring().is_some_and(DirtyRing::is_soft_full)
    }

    /// This reader's counters.
    pub fn stats(&self) -> ReaderStats {
        self.state.stats()
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        core::mem::swap(&mut *self.state.left.lock(), &mut self.memory.pool);
        self.state.gone.store(true, Ordering::Release);
    }
}
