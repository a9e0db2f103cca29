//! VMs whose private memory is mapped by tables that somebody else keeps: TDs (SPEC 5.5).
//!
//! Such a VM has two roots. The processor walks the direct one for shared addresses, which carry the
//! shared bit there and nowhere else: slots, attributes and faults are about addresses without
//! it. For private addresses it walks the external tables; the MMU keeps a mirror of them, which no
//! processor walks, below the other root.
//!
//! ```text
//!  address ── shared bit set ───> direct root ──> leaves of the slots' memory, MMIO entries
//!         └── shared bit clear ─> external tables <── hooks ── mirror root
//! ```
//!
//! A mirror has leaves of 4K only, and an entry never changes from something present to something
//! else that is present. Tables stay until the VM ends.

use crate::external::{ExternalError, ExternalTables};
use crate::fault::{Fault, FaultError, Outcome};
use crate::format::MmuFormat;
use crate::guest_memory::AccessKind;
use crate::host::{Host, HostPage};
use crate::invalidation::Snapshot;
use crate::lock::Lock;
use crate::map::small_leaf;
use crate::mmu::{Mmu, OutOfMemory};
use crate::prefault::PrefaultError;
use crate::reader::{Counter, KnownSlot, Memory, Reader, ReaderState, Sections};
use crate::root::{Root, RootRole, RootState};
use crate::tables::{Pages, Pool};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;
use spin::Once;
use twofold_arch::{Gfn, Hpa, Level, PAGE_SIZE, Pferr};
use twofold_table::{Entry, Height, PageSource, Seen, Storage, Table};

/// What a VM with a mirror has besides.
pub(crate) struct Mirror {
    /// The bit that makes an address shared, as a number of bytes.
    pub(crate) shared: u64,
    pub(crate) tables: Arc<dyn ExternalTables>,
    /// Pages that are the external tables.
    pub(crate) pages: Lock<Vec<Hpa>>,
    /// The first status with which the owner of the external tables refused.
    bug: Once<u64>,
}

/// The roots of a VM whose private memory is mirrored. To be kept as a [`Root`] is.
#[derive(Clone, Debug)]
pub struct TdRoots {
    direct: Root,
    mirror: Root,
}

impl TdRoots {
    /// The root of the shared half, for the pointer of the shared EPT. Addresses find their entries
    /// in it with the shared bit.
    pub const fn shared(&self) -> &Root {
        &self.direct
    }

    /// The mirror of the tables that map the private half. Not for a processor.
    pub const fn mirror(&self) -> &Root {
        &self.mirror
    }

    /// Whether the MMU has dropped the root of the shared half; a virtual processor must then load
    /// roots again.
    pub fn is_obsolete(&self) -> bool {
        self.direct.is_obsolete()
    }
}

/// Why a VM cannot have a mirror.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MirrorError {
    /// The VM has no private memory of the kind that processors tell apart
    /// ([`AccessKind::ByProcessor`]).
    #[error("the VM has no private memory that its processors know")]
    NotPrivate,
    /// The shared bit is neither 47 nor 51.
    #[error("bit {0} cannot be the shared bit of an address: it is 47 or 51")]
    SharedBit(u8),
    /// It has a mirror, or a root was loaded already.
    #[error("the VM has roots already")]
    TooLate,
}

/// How often a fault looks again before it lets the guest try.
const ATTEMPTS: u32 = 8;
/// Pages that one call of [`Mmu::td_prefault`] maps at most, so that its caller can look for signals.
const PREFAULT_AT_ONCE: u64 = 64;

impl Mirror {
    /// Levels of both tables.
    pub(crate) fn level(&self) -> Level {
        match self.shared >> 47 {
            1 => Level::L512G,
            _ => Level::L256T,
        }
    }

    /// Takes note that the owner of the external tables has refused.
    #[cold]
    pub(crate) fn set_bug(&self, status: u64) {
        self.bug.call_once(|| status);
    }

    pub(crate) fn bug(&self) -> Option<u64> {
        self.bug.get().copied()
    }
}

impl<F: MmuFormat, H: Host> Mmu<F, H> {
    /// Makes this the MMU of a TD: from now on private memory is mapped through `tables`, and what
    /// is shared below addresses with bit number `shared_bit` (47: four levels, 51: five). To be
    /// called once, before the first root is loaded; slots and attributes may be there.
    ///
    /// # Errors
    /// See [`MirrorError`].
    pub fn enable_mirror(
        &self,
        shared_bit: u8,
        tables: Arc<dyn ExternalTables>,
    ) -> Result<(), MirrorError> {
        let by_processor = |policy| policy == AccessKind::ByProcessor;
        let access = self.config.private_memory.map(|policy| policy.access);
        if !access.is_some_and(by_processor) {
            return Err(MirrorError::NotPrivate);
        }
        if !matches!(shared_bit, 47 | 51) {
            return Err(MirrorError::SharedBit(shared_bit));
        }
        let writer = self.lock();
        if self.mirror.is_completed() || !writer.roots.is_empty() {
            return Err(MirrorError::TooLate);
        }
        self.mirror.call_once(|| Mirror {
            shared: 1 << shared_bit,
            tables,
            pages: Lock::new(Vec::new()),
            bug: Once::new(),
        });
        Ok(())
    }

    /// Whether the owner of the external tables has refused something, and with which status: the
    /// mirror and the tables may differ, and the VM cannot go on.
    pub fn bug(&self) -> Option<u64> {
        self.mirror.get()?.bug()
    }

    /// The roots for a virtual processor of a VM with a mirror; `None` if it has none.
    ///
    /// # Errors
    /// [`OutOfMemory`] when a table page cannot be had.
    pub fn load_td_roots(&self) -> Result<Option<TdRoots>, OutOfMemory> {
        let Some(mirror) = self.mirror.get() else {
            return Ok(None);
        };
        let role = RootRole {
            level: mirror.level(),
            ..RootRole::NORMAL
        };
        Ok(Some(TdRoots {
            direct: self.load_root(role)?,
            mirror: self.load_root(RootRole {
                mirror: true,
                ..role
            })?,
        }))
    }

    /// [`fault`](Self::fault) of a VM with a mirror. `fault.gpa` is without the shared bit, which
    /// [`Pferr::PRIVATE_ACCESS`] says the opposite of. A private access counts as a write, whatever
    /// it is. An access without memory is [`Outcome::Mmio`] as elsewhere; there is nothing to
    /// emulate then: the entry that is there now makes the processor raise #VE in the guest.
    ///
    /// # Errors
    /// See [`FaultError`]; nothing has changed then.
    ///
    /// # Panics
    /// If `reader` belongs to another MMU.
    pub fn td_fault(
        &self,
        reader: &mut Reader,
        roots: &TdRoots,
        fault: Fault,
    ) -> Result<Outcome, FaultError> {
        if !fault.error.contains(Pferr::PRIVATE_ACCESS) {
            return self.fault(reader, &roots.direct, fault);
        }
        let (state, mut sections, memory) = reader.parts(self.id);
        state.count(Counter::Taken);
        let gfn = fault.gpa.frame();
        let root = &roots.mirror.state;
        let outcome = self.private_fault(state, &mut sections, memory, root, gfn, None)?;
        state.count_outcome(outcome);
        Ok(outcome)
    }

    /// Adds a page of a TD's initial memory: maps the private page `gfn` with the content of the page
    /// at `source`, which the owner of the external tables is handed as it is. [`Outcome::Fixed`] is
    /// what was asked for; with [`Outcome::Spurious`] a page was mapped there before, and nothing was
    /// added; on [`Outcome::Retry`] the same call may succeed.
    ///
    /// # Errors
    /// See [`FaultError`]; nothing has changed then.
    ///
    /// # Panics
    /// If `reader` belongs to another MMU.
    pub fn td_add(
        &self,
        reader: &mut Reader,
        roots: &TdRoots,
        gfn: Gfn,
        source: u64,
    ) -> Result<Outcome, FaultError> {
        let (state, mut sections, memory) = reader.parts(self.id);
        let root = &roots.mirror.state;
        self.private_fault(state, &mut sections, memory, root, gfn, Some(source))
    }

    /// [`prefault`](Self::prefault) of a VM with a mirror: each page as its attribute says. Fewer
    /// pages than asked for may be done.
    ///
    /// # Errors
    /// See [`PrefaultError`]; for the first frame, and nothing is done then.
    ///
    /// # Panics
    /// If `reader` belongs to another MMU.
    pub fn td_prefault(
        &self,
        reader: &mut Reader,
        roots: &TdRoots,
        gfns: Range<Gfn>,
    ) -> Result<u64, PrefaultError> {
        if !self.is_private(gfns.start) {
            return self.prefault(reader, &roots.direct, gfns);
        }
        let (state, mut sections, memory) = reader.parts(self.id);
        let root = &roots.mirror.state;
        let end = gfns.end.get().min(gfns.start.get() + PREFAULT_AT_ONCE);
        let mut gfn = gfns.start;
        while gfn.get() < end && self.is_private(gfn) {
            let result = match self.private_fault(state, &mut sections, memory, root, gfn, None) {
                Ok(Outcome::Fixed { .. } | Outcome::Spurious) => Ok(()),
                Ok(_) if self.slot_is_changing(&mut sections, gfn) => {
                    Err(PrefaultError::SlotChanges)
                }
                // The attribute has changed, and may change again.
                Ok(_) | Err(FaultError::WrongKind { private: false }) => Err(PrefaultError::Retry),
                Err(error) => Err(error.into()),
            };
            match result {
                Ok(()) => gfn = Gfn::new(gfn.get() + 1),
                Err(_) if gfn > gfns.start => break,
                Err(error) => return Err(error),
            }
        }
        match gfn.get() - gfns.start.get() {
            0 => Err(PrefaultError::Retry),
            done => Ok(done),
        }
    }

    fn slot_is_changing(&self, sections: &mut Sections<'_>, gfn: Gfn) -> bool {
        let section = sections.enter();
        let tree = &self.spaces[usize::from(RootRole::NORMAL.as_id())].tree;
        tree.find(gfn, &section)
            .is_some_and(|slot| slot.is_invalid())
    }

    /// Resolves an access to private memory in the mirror and the external tables.
    fn private_fault(
        &self,
        state: &ReaderState,
        sections: &mut Sections<'_>,
        memory: &mut Memory,
        root: &RootState,
        gfn: Gfn,
        source: Option<u64>,
    ) -> Result<Outcome, FaultError> {
        let (Some(mirror), Some(policy)) = (self.mirror.get(), self.config.private_memory) else {
            return Err(FaultError::WrongKind { private: true });
        };
        for _ in 0..ATTEMPTS {
            if mirror.bug().is_some() {
                return Err(FaultError::Bugged);
            }
            let snapshot = self.invalidation.snapshot();
            let Some(known) = self.find_slot(sections, memory, root.role.as_id(), gfn) else {
                return Err(FaultError::WrongKind { private: true });
            };
            let half = self.half_of(policy, sections, known, gfn, Pferr::PRIVATE_ACCESS)?;
            let Some(known) = half else {
                return Ok(Outcome::Retry);
            };
            let page = match self.host().populate_private(known.info.hva_of(gfn), true) {
                Ok(page) => page,
                Err(error) => return self.not_populated(&known, snapshot, error),
            };
            let pool = &mut memory.pool;
            let new = NewLeaf { gfn, page, source };
            match self.map_in_mirror(mirror, sections, pool, root, &known, snapshot, &new) {
                Ok(Mapped::New) => {
                    state.count_mapped(Level::L4K);
                    return Ok(Outcome::Fixed { level: Level::L4K });
                }
                Ok(Mapped::Already) => return Ok(Outcome::Spurious),
                Err(NotMapped::Raced) => {}
                Err(NotMapped::Changing | NotMapped::External(ExternalError::Busy)) => {
                    return Ok(Outcome::Retry);
                }
                Err(NotMapped::OutOfPages) => return Err(FaultError::OutOfMemory),
                Err(NotMapped::External(ExternalError::Refused(status))) => {
                    mirror.set_bug(status);
                    return Err(FaultError::Bugged);
                }
            }
        }
        Ok(Outcome::Retry)
    }

    /// Maps a page of 4K in the external tables and in the mirror, with the tables that are missing.
    #[expect(clippy::too_many_arguments, reason = "the state of one fault")]
    fn map_in_mirror(
        &self,
        mirror: &Mirror,
        sections: &mut Sections<'_>,
        pool: &mut Pool,
        root: &RootState,
        known: &KnownSlot,
        snapshot: Snapshot,
        new: &NewLeaf,
    ) -> Result<Mapped, NotMapped> {
        let &NewLeaf { gfn, page, source } = new;
        loop {
            let missing = {
                let section = sections.enter();
                let hva = known.info.hva_of(gfn);
                // What this fault relied on must still stand, now that a change would wait for us.
                let stands = self.invalidation.allows(snapshot, hva..hva + PAGE_SIZE)
                    && self.slot_of(known, gfn, &section).is_some()
                    && self.kind_stands(known, gfn, Level::L4K);
                let table = self.table_in(root, &section);
                if !stands || gfn.address().get() >= mirror.shared {
                    return Err(NotMapped::Changing);
                }
                loop {
                    let seen = table.lookup(gfn.address(), Height::LEAF);
                    match seen.entry::<F>() {
                        Entry::Empty => {}
                        Entry::Leaf => return Ok(Mapped::Already),
                        Entry::Frozen | Entry::Table(_) | Entry::Special => {
                            return Err(NotMapped::Changing);
                        }
                    }
                    if seen.place().height() == Height::LEAF {
                        let leaf = small_leaf(known, &page, root.ad, false).encode::<F>();
                        let frozen = table.freeze(seen).map_err(|_| NotMapped::Raced)?;
                        mirror.tables.map_leaf(gfn, Level::L4K, page.hpa, source)?;
                        frozen.publish(leaf);
                        return Ok(Mapped::New);
                    }
                    // One for the mirror, one for the owner of the external tables.
                    let missing = 2 * usize::from(seen.place().height().get() - 1);
                    if pool.len() < missing {
                        break missing;
                    }
                    self.link_in_mirror(mirror, &table, seen, pool)?;
                }
            };
            if !pool.fill(self.host(), missing) {
                return Err(NotMapped::OutOfPages);
            }
        }
    }

    /// Puts a table into an empty entry of the external tables and of the mirror.
    fn link_in_mirror(
        &self,
        mirror: &Mirror,
        table: &Table<'_, F, Pages<H>>,
        seen: Seen,
        pool: &mut Pool,
    ) -> Result<(), NotMapped> {
        let place = seen.place();
        let level = Level::from_number(place.height().get()).ok_or(NotMapped::Changing)?;
        let mut pages = mirror.pages.lock(self.host());
        pages.try_reserve(1).map_err(|_| NotMapped::OutOfPages)?;
        drop(pages);
        let (Some(ours), Some(theirs)) = (pool.take(), pool.take()) else {
            return Err(NotMapped::OutOfPages);
        };
        let result = table
            .freeze(seen)
            .map_err(|_| NotMapped::Raced)
            .and_then(|frozen| {
                let gfn = place.gpa().frame();
                mirror.tables.link_table(gfn, level, theirs.hpa())?;
                self.pages.fill(ours, F::ENTRIES, F::EMPTY);
                frozen.publish(F::table_entry(ours.hpa()));
                Ok(())
            });
        match result {
            Ok(()) => mirror.pages.lock(self.host()).push(theirs.hpa()),
            Err(_) => {
                pool.give_back(ours);
                pool.give_back(theirs);
            }
        }
        result
    }
}

/// What a mirror shall map.
struct NewLeaf {
    gfn: Gfn,
    page: HostPage,
    /// Where the page's content is, if it has any.
    source: Option<u64>,
}

/// A private page is mapped.
enum Mapped {
    New,
    Already,
}

/// Why a private page could not be mapped.
#[derive(Clone, Copy)]
enum NotMapped {
    /// Somebody else has changed the entry.
    Raced,
    /// Something that the fault relied on changes.
    Changing,
    OutOfPages,
    External(ExternalError),
}

impl From<ExternalError> for NotMapped {
    fn from(error: ExternalError) -> Self {
        Self::External(error)
    }
}
