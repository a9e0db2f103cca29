//! `KVM_SET_USER_MEMORY_REGION`: what is refused in which order, and how a change is carried out
//! under running guests (SPEC 6.10).

use crate::filter::{RangeFilter, RangeOperation};
use crate::format::MmuFormat;
use crate::guest_memory::GuestMemoryError;
use crate::host::Host;
use crate::mmio::MmioFault;
use crate::mmu::{Mmu, Writer};
use crate::region::{ADDRESS_SPACES, MAX_SLOT_PAGES, Region, RegionError, RegionFlags, USER_SLOTS};
use crate::slots::{DirtyBitmap, Slot, SlotInfo};
use crate::sync::atomic::Ordering;
use alloc::sync::Arc;
use twofold_arch::{Gfn, PAGE_SHIFT, PAGE_SIZE};
use twofold_table::Debt;

/// Pages whose leaves are changed under one hold of the writers' lock: about a millisecond.
const PAGES_AT_ONCE: u64 = 1 << 17;

/// A request that makes sense by itself.
struct Checked {
    /// What the slot shall be. `pages` 0: nothing.
    info: SlotInfo,
}

impl Checked {
    /// The checks that need no look at the slots, in KVM's order.
    fn new(region: &Region, hva_end: u64, private: bool) -> Result<Self, RegionError> {
        let flags = RegionFlags::from_bits(region.flags).ok_or(RegionError::Flags(region.flags))?;
        if flags.contains(RegionFlags::GUEST_MEMFD)
            && (!private || flags.intersects(RegionFlags::LOG_DIRTY | RegionFlags::READONLY))
        {
            return Err(RegionError::Flags(region.flags));
        }
        if !region.size.is_multiple_of(PAGE_SIZE) {
            return Err(RegionError::Size);
        }
        if !region.gpa.is_multiple_of(PAGE_SIZE) {
            return Err(RegionError::GpaAlignment);
        }
        let in_user_space = region
            .hva
            .checked_add(region.size)
            .is_some_and(|end| end <= hva_end);
        if !region.hva.is_multiple_of(PAGE_SIZE) || !in_user_space {
            return Err(RegionError::Hva);
        }
        let (id, as_id) = (region.slot as u16, (region.slot >> 16) as u16);
        if usize::from(as_id) >= ADDRESS_SPACES || usize::from(id) >= USER_SLOTS {
            return Err(RegionError::Id);
        }
        if region.gpa.checked_add(region.size).is_none() {
            return Err(RegionError::Wraps);
        }
        let pages = region.size >> PAGE_SHIFT;
        if pages > MAX_SLOT_PAGES {
            return Err(RegionError::TooManyPages);
        }
        let base = Gfn::new(region.gpa >> PAGE_SHIFT);
        Ok(Self {
            info: SlotInfo {
                id,
                as_id,
                base,
                pages,
                hva: region.hva,
                flags,
            },
        })
    }
}

/// What a request means, given the slots there are.
enum Change {
    Nothing,
    Create,
    Delete(SlotInfo),
    Move(SlotInfo),
    Flags,
}

impl<F: MmuFormat, H: Host> Mmu<F, H> {
    /// The slot with this id. `as_id` and `id` may be anything.
    pub(crate) fn slot_by_id<'s>(
        &'s self,
        writer: &'s Writer<F>,
        as_id: u16,
        id: u16,
    ) -> Option<&'s Slot> {
        let base = (*writer.ids.get(usize::from(as_id))?.get(usize::from(id))?)?;
        self.spaces.get(usize::from(as_id))?.tree.find_locked(base)
    }

    /// `KVM_SET_USER_MEMORY_REGION`: creates, moves, changes or deletes a slot.
    ///
    /// When it returns, no virtual processor uses a translation that the old slot allowed.
    ///
    /// # Errors
    /// In the order of SPEC 6.10; nothing has changed then.
    pub fn set_region(&self, region: Region) -> Result<(), RegionError> {
        self.set_region_with_guest_memory(region, || Err(GuestMemoryError::BadDescriptor))
    }

    /// [`set_region`](Self::set_region) of a slot that may have a private half
    /// ([`RegionFlags::GUEST_MEMFD`]). `bind` says where that is: the address of the slot's first
    /// private byte, in the host's addresses for guest memory files, which stays valid until the slot is
    /// gone. It is called at most once, after everything else has been checked, and with locks
    /// of the MMU held.
    ///
    /// # Errors
    /// As [`set_region`](Self::set_region); of the file last.
    pub fn set_region_with_guest_memory(
        &self,
        region: Region,
        bind: impl FnOnce() -> Result<u64, GuestMemoryError>,
    ) -> Result<(), RegionError> {
        let private = self.config.private_memory.is_some();
        let wanted = Checked::new(&region, self.config.hva_end, private)?.info;
        let _slots = self.lock_slots();
        let mut writer = self.lock();
        let change = self.classify(&writer, &wanted)?;
        let flags_change = matches!(change, Change::Flags);
        match change {
            Change::Nothing => return Ok(()),
            Change::Create => {
                let slot = self.new_slot(wanted, None)?;
                let slot = slot.with_private(self.bind(&writer, &wanted, bind)?);
                self.enter_slot(&mut writer, slot);
            }
            Change::Flags => self.change_flags(&mut writer, wanted)?,
            Change::Move(old) => {
                let dirty = self.dirty_of(&writer, &old);
                let slot = self.new_slot(wanted, dirty)?;
                self.retire_slot(&mut writer, &old);
                self.enter_slot(&mut writer, slot);
            }
            Change::Delete(old) => self.retire_slot(&mut writer, &old),
        }
        if self.space(&wanted).end_update() {
            // Entries that remember the absence of memory under a generation of long ago would
            // look fresh again.
            self.zap_all_locked(&mut writer);
        }
        // Slots that are only ever added would pile up garbage.
        if writer.garbage.len() > 4096 {
            let _readers = self.synchronize(&mut writer);
        }
        drop(writer);
        if flags_change {
            self.follow_flags(&wanted);
        }
        Ok(())
    }

    fn classify(&self, writer: &Writer<F>, wanted: &SlotInfo) -> Result<Change, RegionError> {
        let old = self
            .slot_by_id(writer, wanted.as_id, wanted.id)
            .map(|slot| slot.info);
        if wanted.pages == 0 {
            return old.map(Change::Delete).ok_or(RegionError::NoSuchSlot);
        }
        let change = match old {
            None => {
                if writer.slot_pages.checked_add(wanted.pages).is_none() {
                    return Err(RegionError::TooManyPages);
                }
                Change::Create
            }
            Some(old) => {
                let changed = old.flags ^ wanted.flags;
                if wanted.flags.contains(RegionFlags::GUEST_MEMFD)
                    || old.hva != wanted.hva
                    || old.pages != wanted.pages
                    || changed.intersects(RegionFlags::READONLY | RegionFlags::GUEST_MEMFD)
                {
                    return Err(RegionError::Immutable);
                }
                if old.base != wanted.base {
                    Change::Move(old)
                } else if changed.is_empty() {
                    return Ok(Change::Nothing);
                } else {
                    return Ok(Change::Flags);
                }
            }
        };
        let except = old.map(|old| old.base);
        if self
            .space(wanted)
            .tree
            .overlaps(wanted.base, wanted.pages, except)
        {
            return Err(RegionError::Overlap);
        }
        let max_gfn = 1u64 << (u32::from(self.config.maxphyaddr.clamp(32, 52)) - PAGE_SHIFT);
        if wanted.end().get() > max_gfn {
            return Err(RegionError::BeyondTables);
        }
        Ok(change)
    }

    fn space(&self, slot: &SlotInfo) -> &crate::slots::AddressSpace {
        &self.spaces[usize::from(slot.as_id) % ADDRESS_SPACES]
    }

    fn dirty_of(&self, writer: &Writer<F>, slot: &SlotInfo) -> Option<Arc<DirtyBitmap>> {
        self.slot_by_id(writer, slot.as_id, slot.id)?.dirty.clone()
    }

    /// A slot with its bitmap: `dirty` if it goes on, a new one if it logs and had none. Without one
    /// where dirty rings are used.
    fn new_slot(
        &self,
        info: SlotInfo,
        dirty: Option<Arc<DirtyBitmap>>,
    ) -> Result<Slot, RegionError> {
        let dirty = if !info.flags.contains(RegionFlags::LOG_DIRTY) {
            None
        } else if dirty.is_some() || self.ring_entries() != 0 {
            dirty
        } else {
            let new = if self.begins_all_dirty() {
                DirtyBitmap::all_dirty
            } else {
                DirtyBitmap::new
            };
            Some(Arc::new(new(info.pages).ok_or(RegionError::OutOfMemory)?))
        };
        Ok(Slot::new(info, dirty))
    }

    /// Where the private half of a new slot is.
    fn bind(
        &self,
        writer: &Writer<F>,
        wanted: &SlotInfo,
        bind: impl FnOnce() -> Result<u64, GuestMemoryError>,
    ) -> Result<Option<u64>, RegionError> {
        if !wanted.flags.contains(RegionFlags::GUEST_MEMFD) {
            return Ok(None);
        }
        let address = bind().map_err(RegionError::GuestMemory)?;
        let mut bound = false;
        let end = address.saturating_add(wanted.pages << PAGE_SHIFT);
        writer
            .by_private
            .overlapping(address..end, |_, _| bound = true);
        if bound {
            return Err(RegionError::GuestMemory(GuestMemoryError::Overlap));
        }
        Ok(Some(address))
    }

    /// Publishes a new slot and enters it in the writers' indices. The update is announced here
    /// and ended by the caller.
    fn enter_slot(&self, writer: &mut Writer<F>, slot: Slot) {
        let info = slot.info;
        let ids = &mut writer.ids[usize::from(info.as_id) % ADDRESS_SPACES];
        let id = usize::from(info.id);
        if ids.len() <= id {
            ids.resize(id + 1, None);
        }
        ids[id] = Some(info.base);
        writer
            .by_hva
            .insert(info.hva, info.pages, info.as_id, info.id);
        if let Some(address) = slot.private {
            writer
                .by_private
                .insert(address, info.pages, info.as_id, info.id);
        }
        writer.slot_pages += info.pages;
        let space = self.space(&info);
        space.begin_update();
        space.insert(slot, &mut writer.garbage);
        if self.config.mmio == MmioFault::Violation {
            // The guest itself is told of such an access, so nobody would find out that the entry
            // is stale.
            let _readers = self.synchronize(writer);
            self.zap_mmio(writer, &info);
        }
    }

    /// Takes a slot away: faults on it retry from now on, its mappings go, then it goes.
    fn retire_slot(&self, writer: &mut Writer<F>, old: &SlotInfo) {
        let space = self.space(old);
        space.begin_update();
        let mut private = None;
        if let Some(slot) = self.slot_by_id(writer, old.as_id, old.id) {
            slot.invalidate();
            private = slot.private;
        }
        if self.slot_zap_all.load(Ordering::Relaxed) {
            self.zap_all_locked(writer);
        } else {
            let _readers = self.synchronize(writer);
            let mut debt = Debt::none();
            let operation = RangeOperation {
                as_id: old.as_id,
                gfns: old.base..old.end(),
                filter: RangeFilter::Both,
                may_block: false,
            };
            self.zap_gfns(writer, &operation, &mut debt);
            self.pay(writer, debt);
        }
        self.forget_sub_pages(writer, old.as_id, &(old.base..old.end()));
        space.tree.remove(old.base, &mut writer.garbage);
        if let Some(id) =
            writer.ids[usize::from(old.as_id) % ADDRESS_SPACES].get_mut(usize::from(old.id))
        {
            *id = None;
        }
        writer.by_hva.remove(old.hva, old.pages, old.as_id, old.id);
        if let Some(address) = private {
            writer
                .by_private
                .remove(address, old.pages, old.as_id, old.id);
        }
        writer.slot_pages -= old.pages;
    }

    /// Dirty logging begins or ends: publishes the slot with its new flags. The mappings follow in
    /// [`follow_flags`](Self::follow_flags).
    fn change_flags(&self, writer: &mut Writer<F>, wanted: SlotInfo) -> Result<(), RegionError> {
        let slot = self.new_slot(wanted, None)?;
        let space = self.space(&wanted);
        space.begin_update();
        space.insert(slot, &mut writer.garbage);
        if wanted.flags.contains(RegionFlags::LOG_DIRTY) {
            writer.begins_to_log = Some((wanted.as_id, wanted.id));
            // Faults that know the old slot map without marking; after them nobody does.
            let _readers = self.synchronize(writer);
        }
        Ok(())
    }

    /// What the change of a slot's flags means for what is mapped. Without the writers' lock,
    /// which is taken for a part of the slot at a time.
    fn follow_flags(&self, slot: &SlotInfo) {
        let gfns = slot.base..slot.end();
        if !slot.flags.contains(RegionFlags::LOG_DIRTY) {
            return self.recover_range(slot, gfns);
        }
        // Where every page counts as dirty there is nothing to notice yet.
        if !self.begins_all_dirty() {
            if self.config.eager_split {
                self.split_range(slot.as_id, gfns.clone());
            }
            let mut start = gfns.start.get();
            while start < gfns.end.get() {
                let end = start.saturating_add(PAGES_AT_ONCE).min(gfns.end.get());
                let writer = self.lock();
                let mut debt = Debt::none();
                self.notice_writes(&writer, slot, Gfn::new(start)..Gfn::new(end), &mut debt);
                self.pay(&writer, debt);
                start = end;
            }
        }
        self.lock().begins_to_log = None;
    }
}
