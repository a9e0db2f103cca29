//! Sub-page write protection: which 128-byte pieces of a page the guest may write (SPEC 1).
//!
//! A program gives each frame an [`AccessMap`]. A frame whose map is full is not protected, and
//! nothing here concerns it. The leaf of a protected frame never has W. It has the bit that tells
//! the processor to ask the sub-page permission table (SPPT), wherever an unprotected frame's leaf
//! would have W; so whatever is done by taking W away and giving it back (dirty logging, access
//! tracking, copy on write) is done to that bit.
//!
//! Each address space has its maps and its table. The table is filled lazily: the first write that
//! the processor has to look up in a region of 2M is a miss, which fills the whole region from
//! the maps.
//!
//! What takes permissions away goes in this order: store the maps; wait for the faults that may
//! have read the old ones; cut the path through the table; weaken the leaves; flush once; return.

mod invariants;
mod maps;
mod table;

use crate::fault::Fault;
use crate::format::MmuFormat;
use crate::guest_memory::AccessKind;
use crate::host::Host;
use crate::mmu::{Mmu, Writer};
use crate::region::ADDRESS_SPACES;
use crate::spte::{self, AdBits, PRIVATE};
use crate::sync::atomic::{AtomicBool, Ordering};
use core::ops::Range;
use maps::AccessMaps;
use spin::Once;
use twofold_arch::sppt::{self, AccessMap};
use twofold_arch::{Gfn, Gpa, Level, PAGE_SIZE, Pferr};
use twofold_table::{Cursor, Debt, Entry, Height, RootTable};

/// The most pages that one call sets or gets maps of, so that none holds locks for long.
pub const SUB_PAGE_MAX_PAGES: usize = 512;

/// Why sub-page permissions cannot be enabled, set or read. Nothing has changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SubPageError {
    /// Processors of this format cannot protect sub-pages, or [`Mmu::enable_sub_pages`] was not
    /// called: `-ENODEV`.
    #[error("sub-page write protection is not enabled, or the processor has none")]
    NotEnabled,
    /// More than [`SUB_PAGE_MAX_PAGES`]: `-EINVAL`.
    #[error("{0} pages at once; at most 512 are possible")]
    TooManyPages(usize),
    /// The range wraps, or ends beyond 2^48 or the guest-physical addresses that the table can
    /// describe; or there is no such address space: `-EINVAL`.
    #[error("the range leaves the guest-physical addresses that can be protected")]
    Range,
    /// No slot has this frame: `-EFAULT`.
    #[error("no memory slot at gfn {:#x}", .0.get())]
    NoSlot(Gfn),
    /// The frame is private memory, which the hypervisor cannot protect: `-EINVAL`.
    #[error("gfn {:#x} is private memory", .0.get())]
    Private(Gfn),
    /// `-ENOMEM`.
    #[error("no memory for access maps or tables")]
    OutOfMemory,
}

/// What a VM knows of sub-pages.
pub(crate) struct SubPages {
    /// The sub-page permission tables, once they are enabled.
    roots: Once<[RootTable; ADDRESS_SPACES]>,
    maps: [AccessMaps; ADDRESS_SPACES],
    /// Whether any frame of any address space is protected: all that a fault looks at where none is.
    any: AtomicBool,
}

impl SubPages {
    /// For guest-physical addresses of so many bits.
    pub(crate) fn new(address_bits: u8) -> Self {
        let bits = address_bits.min(sppt::END.trailing_zeros() as u8);
        Self {
            roots: Once::new(),
            maps: core::array::from_fn(|_| AccessMaps::new(bits)),
            any: AtomicBool::new(false),
        }
    }

    pub(crate) fn root(&self, as_id: u16) -> Option<RootTable> {
        self.roots.get()?.get(usize::from(as_id)).copied()
    }

    /// The tables, for whoever gives them back.
    pub(crate) fn take_roots(&mut self) -> Option<[RootTable; ADDRESS_SPACES]> {
        core::mem::take(&mut self.roots).try_into_inner()
    }

    /// The maps of an address space in which some frame is protected.
    #[inline(always)]
    fn in_use(&self, as_id: u16) -> Option<&AccessMaps> {
        self.maps
            .get(usize::from(as_id))
            .filter(|maps| maps.protect_any())
    }

    /// Whether any frame of any address space is protected.
    #[inline(always)]
    fn any(&self) -> bool {
        self.any.load(Ordering::Acquire)
    }

    /// Maps have changed. The caller holds the writers' lock.
    fn changed(&self) {
        let any = self.maps.iter().any(AccessMaps::protect_any);
        self.any.store(any, Ordering::Release);
    }
}

fn frames(gfns: &Range<Gfn>) -> impl Iterator<Item = Gfn> + use<> {
    (gfns.start.get()..gfns.end.get()).map(Gfn::new)
}

impl<F: MmuFormat, H: Host> Mmu<F, H> {
    /// Makes sub-page permissions possible: from now on each address space has a table, which
    /// processors load with the root ([`sppt_root`](Self::sppt_root)). Once is enough; there is no
    /// way back. Slots may come before or after.
    ///
    /// # Errors
    /// [`SubPageError::NotEnabled`] where the format has no such permissions or processors tell
    /// private memory by its address, which has no room for them; [`SubPageError::OutOfMemory`].
    pub fn enable_sub_pages(&self) -> Result<(), SubPageError> {
        let by_processor = |access| access == AccessKind::ByProcessor;
        let access = self.config.private_memory.map(|policy| policy.access);
        if F::SUB_PAGE_WRITE == 0 || access.is_some_and(by_processor) {
            return Err(SubPageError::NotEnabled);
        }
        let _slots = self.lock_slots();
        if !self.sub_pages.roots.is_completed() {
            let roots = self.new_sppt_roots()?;
            self.sub_pages.roots.call_once(|| roots);
        }
        Ok(())
    }

    /// Whether any frame of the page of this level around `gfn` is protected: then it has a leaf of
    /// 4K, and that never has W. The only place where this is decided, for everything that makes
    /// or changes leaves; to be asked inside the read section that publishes the leaf, or with the
    /// writers' lock. Nothing of this concerns private memory.
    #[inline(always)]
    pub(crate) fn guards(&self, as_id: u16, gfn: Gfn, level: Level) -> bool {
        self.sub_pages.any() && self.guards_there(as_id, gfn, level)
    }

    /// Apart, so that faults where nothing is protected stay small.
    #[cold]
    #[inline(never)]
    fn guards_there(&self, as_id: u16, gfn: Gfn, level: Level) -> bool {
        let maps = self.sub_pages.in_use(as_id);
        maps.is_some_and(|maps| maps.may_protect(gfn, level) && maps.protect(gfn, level))
    }

    /// The access map of a frame, which means nothing while the frame is private.
    pub(crate) fn access_map(&self, as_id: u16, gfn: Gfn) -> AccessMap {
        let maps = self.sub_pages.in_use(as_id);
        maps.map_or(AccessMap::FULL, |maps| maps.get(gfn))
    }

    /// Whether the processor's report is about a write that the frame's access map forbids.
    #[inline(always)]
    pub(crate) fn denies(&self, as_id: u16, fault: Fault) -> bool {
        fault.error.is_write() && self.sub_pages.any() && self.judge(as_id, fault)
    }

    #[cold]
    #[inline(never)]
    fn judge(&self, as_id: u16, fault: Fault) -> bool {
        let gfn = fault.gpa.frame();
        let maps = self.sub_pages.in_use(as_id);
        let Some(maps) = maps.filter(|maps| maps.may_protect(gfn, Level::L4K)) else {
            return false;
        };
        let map = maps.get(gfn);
        if map == AccessMap::FULL || self.is_private(gfn) {
            return false;
        }
        // Sub-page permissions never rescue what the processor writes into the guest's page tables.
        fault.error.contains(Pferr::GUEST_PAGE) || !map.allows(fault.gpa.get() % PAGE_SIZE, 1)
    }

    /// The first byte that a write of `bytes` bytes at `gpa` must not write, if there is one before
    /// the end of the page: for whoever writes guest memory in the guest's name without its
    /// processor.
    pub fn first_denied(&self, as_id: u16, gpa: Gpa, bytes: u64) -> Option<Gpa> {
        let (gfn, offset) = (gpa.frame(), gpa.get() % PAGE_SIZE);
        let denied = self
            .sub_pages
            .in_use(as_id)?
            .get(gfn)
            .first_denied(offset, bytes)?;
        (!self.is_private(gfn)).then(|| Gpa::new(gfn.address().get() + denied))
    }

    /// The frames that a call is about, if sub-pages are enabled and they can have maps.
    fn sub_page_range(
        &self,
        as_id: u16,
        first: Gfn,
        pages: usize,
    ) -> Result<Range<Gfn>, SubPageError> {
        if !self.sub_pages.roots.is_completed() {
            return Err(SubPageError::NotEnabled);
        }
        if pages > SUB_PAGE_MAX_PAGES {
            return Err(SubPageError::TooManyPages(pages));
        }
        if pages == 0 {
            return Ok(first..first);
        }
        let end = first.get().checked_add(pages as u64);
        let gfns = first..Gfn::new(end.ok_or(SubPageError::Range)?);
        match self.sub_pages.maps.get(usize::from(as_id)) {
            Some(maps) if maps.covers(&gfns) => Ok(gfns),
            _ => Err(SubPageError::Range),
        }
    }

    /// Whether every frame has a slot. The caller holds the slots' lock.
    fn check_slots_of(&self, as_id: u16, gfns: &Range<Gfn>) -> Result<(), SubPageError> {
        let _writer = self.lock();
        let space = self
            .spaces
            .get(usize::from(as_id))
            .ok_or(SubPageError::Range)?;
        let mut gfn = gfns.start;
        while gfn < gfns.end {
            let slot = space.tree.find_locked(gfn);
            gfn = slot.ok_or(SubPageError::NoSlot(gfn))?.info.end();
        }
        Ok(())
    }

    /// Gives the frames of address space `as_id` from `first` on these access maps, all of them or
    /// none. When this returns, no write that the new maps forbid succeeds any more.
    ///
    /// Where the last protected frame of a region of 2M becomes unprotected, huge leaves come back
    /// as when dirty logging ends.
    ///
    /// # Errors
    /// See [`SubPageError`]; checked in the order in which they are listed there.
    pub fn set_access(
        &self,
        as_id: u16,
        first: Gfn,
        maps: &[AccessMap],
    ) -> Result<(), SubPageError> {
        let gfns = self.sub_page_range(as_id, first, maps.len())?;
        let _slots = self.lock_slots();
        self.check_slots_of(as_id, &gfns)?;
        let Some(space) = self.sub_pages.maps.get(usize::from(as_id)) else {
            return Err(SubPageError::Range);
        };
        let frames = || frames(&gfns).zip(maps.iter().copied());
        if let Some((private, _)) = frames().find(|(gfn, _)| self.is_private(*gfn)) {
            return Err(SubPageError::Private(private));
        }
        if frames().all(|(gfn, map)| space.get(gfn) == map) {
            return Ok(());
        }
        let protected = || frames().filter(|(_, map)| *map != AccessMap::FULL);
        let mut reserved = None;
        for (gfn, _) in protected() {
            let region = Some(gfn.align_down(Level::L2M.frames()));
            if reserved != region {
                space.reserve(gfn).map_err(|_| SubPageError::OutOfMemory)?;
                reserved = region;
            }
        }
        // Nothing can fail any more: huge leaves that cannot be split go as a whole.
        if let (Some((from, _)), Some((to, _))) = (protected().next(), protected().last()) {
            self.split_range(as_id, from..Gfn::new(to.get() + 1));
        }
        let regions = [gfns.start, Gfn::new(gfns.end.get() - 1)]
            .map(|gfn| gfn.align_down(Level::L2M.frames()));
        let guarded = regions.map(|gfn| self.guards(as_id, gfn, Level::L2M));
        {
            let mut writer = self.lock();
            for (gfn, map) in frames() {
                space.set(gfn, map);
            }
            self.sub_pages.changed();
            // Faults that have read the old maps publish what those allow; after them nobody does.
            let _readers = self.synchronize(&mut writer);
            let cut = self.cut_vectors(&writer, as_id, &gfns);
            let mut debt = Debt::none();
            self.guard_leaves(&writer, as_id, &gfns, &mut debt);
            match (debt.is_none(), cut) {
                (false, _) => self.pay(&writer, debt),
                (true, true) => self.flush(gfns.start.address()..gfns.end.address()),
                (true, false) => {}
            }
            if cut {
                self.remove_cut_vectors(&writer, as_id, &gfns);
            }
        }
        let different = if regions[0] == regions[1] { 1 } else { 2 };
        for (gfn, guarded) in regions.into_iter().zip(guarded).take(different) {
            let end = Gfn::new(gfn.get() + Level::L2M.frames());
            if guarded
                && !self.guards(as_id, gfn, Level::L2M)
                && let Some(slot) = self.slot_at(as_id, gfn)
                && end <= slot.end()
            {
                self.recover_range(&slot, gfn..end);
            }
        }
        Ok(())
    }

    /// Reads the access maps of the frames of address space `as_id` from `first` on, as they are at
    /// one moment.
    ///
    /// # Errors
    /// As [`set_access`](Self::set_access), but private frames have maps to read, and nothing
    /// needs memory. `maps` is left as it is then.
    pub fn get_access(
        &self,
        as_id: u16,
        first: Gfn,
        maps: &mut [AccessMap],
    ) -> Result<(), SubPageError> {
        let gfns = self.sub_page_range(as_id, first, maps.len())?;
        let _slots = self.lock_slots();
        self.check_slots_of(as_id, &gfns)?;
        let Some(space) = self.sub_pages.maps.get(usize::from(as_id)) else {
            return Err(SubPageError::Range);
        };
        for (gfn, map) in frames(&gfns).zip(maps) {
            *map = space.get(gfn);
        }
        Ok(())
    }

    /// Makes every leaf of `gfns` obey the access maps, in every root of the address space.
    fn guard_leaves(&self, writer: &Writer<F>, as_id: u16, gfns: &Range<Gfn>, debt: &mut Debt<F>) {
        let range = gfns.start.address()..gfns.end.address();
        for root in writer.direct_roots(as_id) {
            let mut cursor = Cursor::new(self.table_locked(root, writer), range.clone());
            while let Some(seen) = cursor.next() {
                let (entry, place) = (seen.value(), *seen.place());
                let Some(level) = Level::from_number(place.height().get()) else {
                    continue;
                };
                if seen.entry::<F>() != Entry::Leaf || entry & PRIVATE != 0 {
                    continue;
                }
                let guarded = self.guards(as_id, place.gpa().frame(), level);
                let result = if place.height() > Height::LEAF {
                    match guarded {
                        true => cursor.table().remove(seen, debt),
                        false => Ok(()),
                    }
                } else {
                    let new = spte::guarded::<F>(entry, guarded);
                    // Ageing takes W without a flush; see `notice_leaf`.
                    let unflushed = guarded && spte::ad_bits(entry) == AdBits::Off;
                    match new != entry || unflushed {
                        true => cursor.table().shrink(seen, new, debt),
                        false => Ok(()),
                    }
                };
                if result.is_err() {
                    cursor.again();
                }
            }
        }
    }

    /// The slot that had `gfns` is gone, and its access maps with it. No leaf of theirs is left.
    pub(crate) fn forget_sub_pages(&self, writer: &Writer<F>, as_id: u16, gfns: &Range<Gfn>) {
        if let Some(maps) = self.sub_pages.maps.get(usize::from(as_id)) {
            maps.clear(gfns);
        }
        self.sub_pages.changed();
        if self.cut_vectors(writer, as_id, gfns) {
            self.flush(gfns.start.address()..gfns.end.address());
            self.remove_cut_vectors(writer, as_id, gfns);
        }
    }
}
