//! Private memory: slots with two halves, and which of them an access means (SPEC 5.2, 5.4).
//!
//! The shared half of a slot is memory of the hypervisor's program; the private half is in a guest
//! memory file, to which a slot is bound when it is created. What such a file is, is the
//! hypervisor's business. It gives each byte of its files an address (of its own making, the same
//! for the whole life of the file), and the MMU asks it for pages at such addresses
//! ([`Host::populate_private`]). A hole in a file, and its release, are announced like changes of
//! other host memory, and take exactly those mappings that pointed there.
//!
//! Which half of a frame exists for the guest, its attribute says. A change stores the new
//! attributes, waits for the faults that may have seen the old ones, and then takes the mappings of
//! the other half. So a fault either sees the change inside its read section and looks again, or
//! its mapping is there to be taken.

use crate::fault::FaultError;
use crate::filter::{Conversion, RangeOperation};
use crate::format::MmuFormat;
use crate::host::Host;
use crate::mmu::Mmu;
use crate::reader::{Half, KnownSlot, Sections};
use crate::region::{ADDRESS_SPACES, RegionErrorKind, RegionFlags};
use crate::slots::{Slot, SlotInfo, SlotTree};
use core::ops::Range;
use twofold_arch::{Gfn, Level, Pferr};
use twofold_table::Section;

/// What private memory is like in a type of VM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PrivateMemory {
    /// Who says whether an access is private.
    pub access: AccessKind,
    /// What a change of attributes takes out of the tables.
    pub conversion: Conversion,
}

/// Who says whether an access is private.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AccessKind {
    /// The attribute of the frame, at the time of the fault: the guest's processor knows no
    /// difference. (Software-protected VMs.)
    ByAttribute,
    /// The processor, with [`Pferr::PRIVATE_ACCESS`].
    ByProcessor,
}

/// Why a slot cannot be bound to a guest memory file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum GuestMemoryError {
    /// There is no such file: `-EBADF`.
    #[error("no such descriptor")]
    BadDescriptor,
    /// Not a guest memory file of this VM, or not one of that size: `-EINVAL`.
    #[error("not a guest memory file of this VM that is large enough")]
    Unsuitable,
    /// Another slot is bound to a part of it: `-EEXIST`.
    #[error("another slot is bound to this part of it")]
    Overlap,
}

impl GuestMemoryError {
    /// Which errno KVM returns.
    pub const fn kind(self) -> RegionErrorKind {
        match self {
            Self::BadDescriptor => RegionErrorKind::BadDescriptor,
            Self::Unsuitable => RegionErrorKind::Invalid,
            Self::Overlap => RegionErrorKind::Exists,
        }
    }
}

/// Why attributes cannot be set. Nothing has changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum AttributeError {
    /// The VM has no private memory, or the range is empty or not one of guest-physical addresses.
    #[error("no frames that can have attributes")]
    Range,
    /// `-ENOMEM`.
    #[error("no memory for attributes")]
    OutOfMemory,
}

impl KnownSlot {
    /// The fault is about private memory.
    #[inline(always)]
    pub(crate) const fn is_private(&self) -> bool {
        matches!(self.half, Half::Private { .. })
    }

    /// The slot as the tree has it.
    pub(crate) const fn slot_info(&self) -> SlotInfo {
        let mut info = self.info;
        if let Half::Private { shared } = self.half {
            info.hva = shared;
        }
        info
    }

    /// Whether `slot` is the slot that was found, half and all.
    pub(crate) fn is_still(&self, slot: &Slot) -> bool {
        slot.info == self.slot_info()
            && !slot.is_invalid()
            && (!self.is_private() || slot.private == Some(self.info.hva))
    }
}

impl<F: MmuFormat, H: Host> Mmu<F, H> {
    /// Whether `gfn` is private.
    #[inline]
    pub fn is_private(&self, gfn: Gfn) -> bool {
        self.config.private_memory.is_some() && self.attributes.is_private(gfn)
    }

    /// `KVM_SET_MEMORY_ATTRIBUTES`: makes `gfns` private or shared, all of them or none. What the
    /// guest had mapped of the other half is gone when this returns. Setting what is set already
    /// touches nothing.
    ///
    /// # Errors
    /// See [`AttributeError`].
    pub fn set_attributes(&self, gfns: Range<Gfn>, private: bool) -> Result<(), AttributeError> {
        let Some(policy) = self.config.private_memory else {
            return Err(AttributeError::Range);
        };
        if gfns.is_empty() || !self.attributes.covers(&gfns) {
            return Err(AttributeError::Range);
        }
        let _slots = self.lock_slots();
        if self.attributes.all(&gfns, private) {
            return Ok(());
        }
        self.attributes
            .reserve(&gfns)
            .map_err(|_| AttributeError::OutOfMemory)?;
        let nothing_mapped = {
            let mut writer = self.lock();
            self.attributes.set(&gfns, private);
            // Without a root there is no mapping, and a fault needs one.
            let nothing_mapped = writer.roots.is_empty();
            if !nothing_mapped {
                let _readers = self.synchronize(&mut writer);
            }
            nothing_mapped
        };
        if let Some(filter) = policy.conversion.filter(private)
            && !nothing_mapped
        {
            for as_id in 0..ADDRESS_SPACES as u16 {
                self.zap_range(&RangeOperation {
                    as_id,
                    gfns: gfns.clone(),
                    filter,
                    may_block: true,
                });
            }
        }
        Ok(())
    }

    /// What an access to a private frame in no slot ends with: where the processor knows, it said
    /// which kind of access it was.
    #[cold]
    pub(crate) fn private_without_slot(&self, error: Pferr) -> FaultError {
        let by_processor = |policy: PrivateMemory| policy.access == AccessKind::ByProcessor;
        FaultError::WrongKind {
            private: !self.config.private_memory.is_some_and(by_processor)
                || error.contains(Pferr::PRIVATE_ACCESS),
        }
    }

    /// Which half of the slot an access means: `None` if the slot has changed meanwhile.
    ///
    /// # Errors
    /// [`FaultError::WrongKind`] if the access is of the wrong kind, or the slot has no private half.
    #[cold]
    #[inline(never)]
    pub(crate) fn half_of(
        &self,
        policy: PrivateMemory,
        sections: &mut Sections<'_>,
        known: KnownSlot,
        gfn: Gfn,
        error: Pferr,
    ) -> Result<Option<KnownSlot>, FaultError> {
        let private = self.attributes.is_private(gfn);
        if policy.access == AccessKind::ByProcessor
            && error.contains(Pferr::PRIVATE_ACCESS) != private
        {
            return Err(FaultError::WrongKind { private: !private });
        }
        if !private {
            return Ok(Some(known));
        }
        if !known.info.flags.contains(RegionFlags::GUEST_MEMFD) {
            return Err(FaultError::WrongKind { private });
        }
        let section = sections.enter();
        let address = self
            .slot_of(&known, gfn, &section)
            .and_then(|slot| slot.private);
        Ok(address.map(|address| {
            let mut known = known;
            known.half = Half::Private {
                shared: known.info.hva,
            };
            known.info.hva = address;
            known
        }))
    }

    /// The slot that was found, if it still is what it was.
    #[inline(always)]
    pub(crate) fn slot_of<'s>(
        &'s self,
        known: &KnownSlot,
        gfn: Gfn,
        section: &'s Section<'_>,
    ) -> Option<&'s Slot> {
        let space = self.spaces.get(usize::from(known.info.as_id))?;
        match SlotTree::recall(known.hint, space.generation(), section) {
            Some(slot) => Some(slot),
            // The slots are changing, perhaps elsewhere.
            None => space
                .tree
                .find(gfn, section)
                .filter(|slot| known.is_still(slot)),
        }
    }

    /// Whether the page of this level around `gfn` still is of the kind that the fault is about.
    /// To be asked inside the read section that publishes the mapping.
    #[inline(always)]
    pub(crate) fn kind_stands(&self, known: &KnownSlot, gfn: Gfn, level: Level) -> bool {
        self.config.private_memory.is_none() || self.kind_is(known, gfn, level)
    }

    #[inline(never)]
    fn kind_is(&self, known: &KnownSlot, gfn: Gfn, level: Level) -> bool {
        self.attributes.is_private(gfn) == known.is_private()
            && self.attributes.is_uniform(gfn, level)
    }
}

/// Every interleaving of a fault, a hole in the file and a change of attributes:
/// `RUSTFLAGS="--cfg loom" cargo test -p twofold-mmu --lib interleavings`.
#[cfg(all(test, loom))]
#[expect(unsafe_code, reason = "UNSAFETY: each reader word has one thread")]
mod interleavings {
    use crate::invalidation::Invalidation;
    use alloc::vec::Vec;
    use loom::sync::{Arc, Mutex};
    use loom::thread;
    use twofold_table::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
    use twofold_table::{ReaderWord, wait_for_readers};

    /// The addresses of the frame's private half.
    const FILE: core::ops::Range<u64> = 0x1000..0x2000;
    /// The shared half's page. Those of the file are numbered from 1 on.
    const SHARED: u64 = 100;

    struct World {
        invalidation: Invalidation,
        reader: ReaderWord,
        /// The writers' lock.
        lock: Mutex<()>,
        /// The frame's attribute.
        private: AtomicBool,
        /// The page that the file has: another after each hole.
        file: AtomicU64,
        /// What the guest's table maps, or 0.
        entry: AtomicU64,
    }

    impl World {
        fn new(private: bool) -> Arc<Self> {
            Arc::new(Self {
                invalidation: Invalidation::new(),
                reader: ReaderWord::new(),
                lock: Mutex::new(()),
                private: AtomicBool::new(private),
                file: AtomicU64::new(1),
                entry: AtomicU64::new(0),
            })
        }

        /// As `resolve` and `map`.
        fn fault(&self) {
            let snapshot = self.invalidation.snapshot();
            let private = self.private.load(Ordering::Acquire);
            let page = match private {
                true => self.file.load(Ordering::Acquire),
                false => SHARED,
            };
            // SAFETY: only the faulting thread uses the word.
            let _section = unsafe { self.reader.enter() };
            let address = if private { FILE } else { 0x8000..0x9000 };
            if self.invalidation.allows(snapshot, address)
                && self.private.load(Ordering::Acquire) == private
            {
                let _ = self
                    .entry
                    .compare_exchange(0, page, Ordering::AcqRel, Ordering::Acquire);
            }
        }

        fn synchronize(&self) {
            fence(Ordering::SeqCst);
            let _readers = wait_for_readers([&self.reader].into_iter(), thread::yield_now);
        }

        /// Takes the mapping if it is of this half.
        fn zap(&self, private: bool) {
            let entry = self.entry.load(Ordering::Acquire);
            if entry != 0 && (entry != SHARED) == private {
                let _ = self
                    .entry
                    .compare_exchange(entry, 0, Ordering::AcqRel, Ordering::Acquire);
            }
        }

        /// As `begin_private_change`, and what the hypervisor does then.
        fn punch(&self) {
            {
                let _writer = self.lock.lock().unwrap();
                self.invalidation.begin(FILE);
                self.synchronize();
                self.zap(true);
            }
            // The page belongs to nobody.
            assert!([0, SHARED].contains(&self.entry.load(Ordering::Acquire)));
            self.file.fetch_add(1, Ordering::AcqRel);
            assert!([0, SHARED].contains(&self.entry.load(Ordering::Acquire)));
            self.invalidation.end();
        }

        /// As `set_attributes`, whose parts take the lock one after the other.
        fn convert(&self, private: bool) {
            {
                let _writer = self.lock.lock().unwrap();
                self.private.store(private, Ordering::Release);
                self.synchronize();
            }
            {
                let _writer = self.lock.lock().unwrap();
                self.zap(!private);
            }
            self.check_kind(private);
        }

        fn check_kind(&self, private: bool) {
            let entry = self.entry.load(Ordering::Acquire);
            assert!(
                entry == 0 || (entry != SHARED) == private,
                "the other half is mapped"
            );
        }

        fn check(&self) {
            self.check_kind(self.private.load(Ordering::Acquire));
            let entry = self.entry.load(Ordering::Acquire);
            assert!(
                [0, SHARED, self.file.load(Ordering::Acquire)].contains(&entry),
                "a page that the file has given back is mapped"
            );
        }
    }

    fn explore(private: bool, bound: usize, threads: &'static [fn(&World)]) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(bound);
        model.check(move || {
            let world = World::new(private);
            let others: Vec<_> = threads
                .iter()
                .map(|work| {
                    let world = Arc::clone(&world);
                    thread::spawn(move || work(&world))
                })
                .collect();
            world.fault();
            for other in others {
                other.join().unwrap();
            }
            world.check();
        });
    }

    #[test]
    fn a_fault_never_maps_the_half_that_a_conversion_has_ended() {
        explore(false, 3, &[|world| world.convert(true)]);
        explore(true, 3, &[|world| world.convert(false)]);
    }

    #[test]
    fn a_fault_never_maps_a_page_that_a_hole_has_taken() {
        explore(true, 3, &[World::punch]);
    }

    #[test]
    fn a_fault_survives_a_hole_and_a_conversion_at_once() {
        explore(true, 2, &[World::punch, |world| world.convert(false)]);
        explore(false, 2, &[World::punch, |world| world.convert(true)]);
    }
}
