//! The MMU of one VM.

use crate::attributes::Attributes;
use crate::dirty_ring::{DirtyRing, RingMemory};
use crate::format::MmuFormat;
use crate::garbage::Garbage;
use crate::guest_memory::PrivateMemory;
use crate::host::Host;
use crate::invalidation::Invalidation;
use crate::invariants::Locked;
use crate::lock::Lock;
use crate::mirror::Mirror;
use crate::mmio::{MmioEncoding, MmioFault};
use crate::nx_huge_pages::Marked;
use crate::reader::{Reader, ReaderState, ReaderStats};
use crate::region::ADDRESS_SPACES;
use crate::root::{Root, RootRole, RootState};
use crate::slots::{AddressSpace, HvaIndex, SlotInfo, UPDATE_IN_PROGRESS};
use crate::stats::Stats;
use crate::sub_pages::SubPages;
use crate::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use crate::tables::{Access, Pages};
use crate::zap::Retired;
use alloc::sync::Arc;
use alloc::vec::Vec;
use spin::{MutexGuard, Once};
use twofold_arch::{Gfn, Gpa};
use twofold_table::{Debt, Height, RawPages, Storage};

/// What the MMU has to know about the machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Config {
    /// Width of host-physical addresses in bits, at most 52. Guest-physical addresses are not
    /// wider either.
    pub maxphyaddr: u8,
    /// First host-virtual address that is no longer user memory.
    pub hva_end: u64,
    /// Whether deleting or moving a slot drops every mapping of the VM
    /// (`KVM_X86_QUIRK_SLOT_ZAP_ALL`, on by default) or only the slot's.
    pub slot_zap_all: bool,
    /// Whether processors set the accessed and dirty bits of second-stage entries. Without, leaves
    /// lose their permissions to find out whether they are used.
    pub accessed_dirty: bool,
    /// Whether processors record the frames that they write (page-modification logging). Needs
    /// [`accessed_dirty`](Self::accessed_dirty).
    pub pml: bool,
    /// Whether huge leaves are split when dirty logging begins (KVM's `eager_page_split`), or one
    /// by one when they are written.
    pub eager_split: bool,
    /// Whether executable memory is mapped with the smallest pages only (KVM's `nx_huge_pages`):
    /// processors with the erratum "machine check on page size change" need it.
    pub nx_huge_pages: bool,
    /// What private memory is like in this type of VM, if there is any.
    pub private_memory: Option<PrivateMemory>,
    /// How accesses without memory are told from others.
    pub mmio: MmioFault,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            maxphyaddr: 51,
            hva_end: 0x7fff_ffff_f000,
            slot_zap_all: true,
            accessed_dirty: true,
            pml: false,
            eager_split: true,
            nx_huge_pages: false,
            private_memory: None,
            mmio: MmioFault::Misconfiguration,
        }
    }
}

/// No page for a table could be had: `-ENOMEM`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("no memory for a table page")]
pub struct OutOfMemory;

/// The second-stage MMU of one VM: its slots, its tables, its dirty bitmaps.
///
/// Every method takes `&self`; any number of threads may call any of them. [`fault`](Self::fault)
/// takes no lock.
pub struct Mmu<F: MmuFormat, H: Host> {
    pub(crate) pages: Pages<H>,
    pub(crate) config: Config,
    /// Distinguishes MMUs, so that a reader cannot be used with another.
    pub(crate) id: u64,
    pub(crate) spaces: [AddressSpace; ADDRESS_SPACES],
    pub(crate) invalidation: Invalidation,
    pub(crate) attributes: Attributes,
    pub(crate) sub_pages: SubPages,
    /// Raised whenever tables have been unlinked.
    pub(crate) unlinked: AtomicU64,
    pub(crate) mmio: Option<MmioEncoding>,
    /// What a TD has besides.
    pub(crate) mirror: Once<Mirror>,
    pub(crate) slot_zap_all: AtomicBool,
    /// Huge leaves are not executable now.
    pub(crate) nx_huge_pages: AtomicBool,
    pub(crate) nx_marked: Lock<Marked>,
    /// [`ManualProtect`](crate::ManualProtect), as bits.
    pub(crate) manual_protect: AtomicU32,
    /// Entries of each reader's dirty ring; 0: what is dirty stands in the slots' bitmaps.
    pub(crate) ring_entries: AtomicU32,
    /// Taken before the writers' lock by whoever changes slots, or works on one for longer than
    /// the writers' lock may be held (KVM's `slots_lock`).
    slots_lock: Lock<()>,
    writer: Lock<Writer<F>>,
    /// Leaves made by nobody's fault, by level.
    pub(crate) mapped: [AtomicU64; 3],
    /// Leaves taken out, by level.
    pub(crate) unmapped: [AtomicU64; 3],
    pub(crate) remote_tlb_flush: AtomicU64,
    pub(crate) tables_zapped: AtomicU64,
}

/// What only the holder of the writers' lock sees and changes.
pub(crate) struct Writer<F: MmuFormat> {
    /// Valid roots, and obsolete ones that someone has loaded.
    pub(crate) roots: Vec<Arc<RootState>>,
    pub(crate) readers: Vec<Arc<ReaderState>>,
    pub(crate) garbage: Garbage,
    /// The first frame of each slot, by id.
    pub(crate) ids: [Vec<Option<Gfn>>; ADDRESS_SPACES],
    pub(crate) by_hva: HvaIndex,
    /// Slots by the addresses of their private halves.
    pub(crate) by_private: HvaIndex,
    /// Pages in all slots.
    pub(crate) slot_pages: u64,
    /// The slot whose leaves are being changed so that writes are noticed, part by part.
    pub(crate) begins_to_log: Option<(u16, u16)>,
    /// Counters of readers that are gone.
    departed: ReaderStats,
    departed_mapped: [u64; 3],
    /// The slots' generations at the last check.
    pub(crate) last_generation: [u64; ADDRESS_SPACES],
    /// Releases of the lock until the next check, in debug builds.
    pub(crate) releases_to_check: u64,
    /// Tables that nobody sees any more, to be taken apart when the lock is released.
    pub(crate) retired: Retired<F>,
}

impl<F: MmuFormat> Writer<F> {
    /// The roots of an address space that processors walk: all but mirrors.
    pub(crate) fn direct_roots(&self, as_id: u16) -> impl Iterator<Item = &Arc<RootState>> {
        let roots = self.roots.iter();
        roots.filter(move |root| root.role.as_id() == as_id && !root.role.mirror)
    }
}

impl<F: MmuFormat, H: Host> Mmu<F, H> {
    /// An MMU without slots.
    pub fn new(host: H, config: Config) -> Self {
        // Lives longer than one exploration, and orders nothing.
        static NEXT: core::sync::atomic::AtomicU64 = core::sync::atomic::AtomicU64::new(1);
        Self {
            pages: RawPages(Access(host)),
            config,
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            spaces: core::array::from_fn(AddressSpace::new),
            invalidation: Invalidation::new(),
            attributes: Attributes::new(config.maxphyaddr),
            sub_pages: SubPages::new(config.maxphyaddr),
            unlinked: AtomicU64::new(0),
            mmio: MmioEncoding::new::<F>(config.maxphyaddr, config.mmio),
            mirror: Once::new(),
            slot_zap_all: AtomicBool::new(config.slot_zap_all),
            nx_huge_pages: AtomicBool::new(config.nx_huge_pages),
            nx_marked: Lock::new(Marked::default()),
            manual_protect: AtomicU32::new(0),
            ring_entries: AtomicU32::new(0),
            writer: Lock::new(Writer {
                roots: Vec::new(),
                readers: Vec::new(),
                garbage: Garbage::default(),
                ids: [const { Vec::new() }; ADDRESS_SPACES],
                by_hva: HvaIndex::new(),
                by_private: HvaIndex::new(),
                slot_pages: 0,
                begins_to_log: None,
                departed: ReaderStats::default(),
                departed_mapped: [0; 3],
                last_generation: [0; ADDRESS_SPACES],
                releases_to_check: 0,
                retired: Retired::default(),
            }),
            slots_lock: Lock::new(()),
            mapped: Default::default(),
            unmapped: Default::default(),
            remote_tlb_flush: AtomicU64::new(0),
            tables_zapped: AtomicU64::new(0),
        }
    }

    /// What the hypervisor supplied.
    #[inline(always)]
    pub fn host(&self) -> &H {
        &self.pages.0.0
    }

    /// What it was made with.
    pub fn config(&self) -> &Config {
        &self.config
    }

    pub(crate) fn lock(&self) -> Locked<'_, F, H> {
        Locked::new(self, self.writer.lock(self.host()))
    }

    /// The slots stand still while this is held. Never taken with the writers' lock held.
    pub(crate) fn lock_slots(&self) -> MutexGuard<'_, ()> {
        self.slots_lock.lock(self.host())
    }

    /// Switches between the two ways of [`Config::slot_zap_all`].
    pub fn set_slot_zap_all(&self, all: bool) {
        self.slot_zap_all.store(all, Ordering::Relaxed);
    }

    /// Registers a thread of the VM, one per virtual processor. A reader keeps a few pages for
    /// tables; they go back to the host only if it is dropped before the MMU is.
    pub fn reader(&self) -> Reader {
        self.new_reader(None)
    }

    /// [`reader`](Self::reader) whose writes are recorded in a dirty ring, after
    /// [`enable_dirty_ring`](Self::enable_dirty_ring): `memory` has as many entries as that returned.
    pub fn ring_reader(&self, memory: Arc<dyn RingMemory>) -> Reader {
        self.new_reader(Some(DirtyRing::new(memory, self.reserved_ring_entries())))
    }

    fn new_reader(&self, ring: Option<DirtyRing>) -> Reader {
        let (reader, state) = Reader::new(self.id, ring);
        let mut writer = self.lock();
        self.sweep_readers(&mut writer);
        writer.readers.push(state);
        reader
    }

    /// Takes leave of readers that were dropped.
    fn sweep_readers(&self, writer: &mut Writer<F>) {
        let gone = |state: &mut Arc<ReaderState>| state.is_gone();
        for state in writer.readers.extract_if(.., gone) {
            writer.departed.add(&state.stats());
            for (sum, count) in writer.departed_mapped.iter_mut().zip(state.mapped()) {
                *sum += count;
            }
            state.left().lock().drain(self.host());
        }
    }

    /// The valid root for `role`, made if there is none. Counted: it lives until its last
    /// [`Root`] is dropped.
    ///
    /// The roots of a VM with a mirror come from [`load_td_roots`](Self::load_td_roots).
    ///
    /// # Errors
    /// [`OutOfMemory`] when a table page cannot be had.
    pub fn load_root(&self, role: RootRole) -> Result<Root, OutOfMemory> {
        let mut writer = self.lock();
        self.sweep_roots(&mut writer);
        let mut roots = writer.roots.iter();
        if let Some(state) = roots.find(|root| root.role == role && !root.is_obsolete()) {
            return Ok(Root {
                state: Arc::clone(state),
            });
        }
        let page = self.host().alloc_table().ok_or(OutOfMemory)?;
        let table = self.root_table(page, Height::from(role.level));
        self.pages.fill(table.page, F::ENTRIES, F::EMPTY);
        let base = match self.mirror.get() {
            Some(mirror) if !role.mirror && role.level == mirror.level() => mirror.shared,
            _ => 0,
        };
        let state = Arc::new(RootState::new(table, role, base, self.ad_bits(role)));
        writer.roots.push(Arc::clone(&state));
        Ok(Root { state })
    }

    /// Drops every mapping by making every root obsolete. Virtual processors have to load a new root.
    pub fn zap_all(&self) {
        self.zap_all_locked(&mut self.lock());
    }

    /// The slot with this id.
    pub fn slot(&self, as_id: u16, slot: u16) -> Option<SlotInfo> {
        let writer = self.lock();
        let base = (*writer.ids.get(usize::from(as_id))?.get(usize::from(slot))?)?;
        self.spaces
            .get(usize::from(as_id))?
            .tree
            .find_locked(base)
            .map(|slot| slot.info)
    }

    /// The slot that holds `gfn`, for threads without a reader. Takes the writers' lock.
    pub fn slot_at(&self, as_id: u16, gfn: Gfn) -> Option<SlotInfo> {
        let _writer = self.lock();
        self.spaces
            .get(usize::from(as_id))?
            .tree
            .find_locked(gfn)
            .map(|slot| slot.info)
    }

    /// The slot that holds `gpa`, without a lock: where a guest-physical address is in host-virtual
    /// memory, for the hypervisor's own guest accesses.
    ///
    /// # Panics
    /// If `reader` belongs to another MMU.
    pub fn lookup(&self, reader: &mut Reader, as_id: u16, gpa: Gpa) -> Option<SlotInfo> {
        let (_, mut sections, memory) = reader.parts(self.id);
        let gfn = gpa.frame();
        let known = match self.remembered_slot(memory, as_id, gfn) {
            Some(known) => known,
            // Part of this function: unlike in a fault, a search is nothing unusual here.
            None => self.search_slot(&mut sections, memory, as_id, gfn)?,
        };
        Some(known.info)
    }

    /// Counters, summed over every reader.
    pub fn stats(&self) -> Stats {
        let nx_lpage_splits = self.count_marked();
        let mut writer = self.lock();
        self.sweep_readers(&mut writer);
        let mut faults = writer.departed;
        let mut mapped = writer.departed_mapped;
        for reader in &writer.readers {
            faults.add(&reader.stats());
            for (sum, count) in mapped.iter_mut().zip(reader.mapped()) {
                *sum += count;
            }
        }
        for (sum, count) in mapped.iter_mut().zip(&self.mapped) {
            *sum += count.load(Ordering::Relaxed);
        }
        for (sum, count) in mapped.iter_mut().zip(&self.unmapped) {
            *sum = sum.saturating_sub(count.load(Ordering::Relaxed));
        }
        Stats {
            pages_4k: mapped[0],
            pages_2m: mapped[1],
            pages_1g: mapped[2],
            nx_lpage_splits,
            remote_tlb_flush: self.remote_tlb_flush.load(Ordering::Relaxed),
            tables_zapped: self.tables_zapped.load(Ordering::Relaxed),
            faults,
            slots_generation: self
                .spaces
                .each_ref()
                .map(|space| space.generation() & !UPDATE_IN_PROGRESS),
        }
    }
}

impl<F: MmuFormat, H: Host> Drop for Mmu<F, H> {
    fn drop(&mut self) {
        // Nobody calls any more, so nothing has to be waited for; but virtual processors may still
        // hold translations until the flush that the debt asks for.
        let sppts = self.sub_pages.take_roots();
        let mut writer = self.lock();
        self.sweep_readers(&mut writer);
        let mut debt = Debt::none();
        let roots = core::mem::take(&mut writer.roots);
        self.end_mirror(&writer, &roots);
        for root in &roots {
            self.table_locked(root, &writer).retire_root(&mut debt);
        }
        self.pay(&writer, debt);
        self.give_back_sppts(&writer, sppts);
        let _readers = self.synchronize(&mut writer);
        for reader in writer.readers.drain(..) {
            reader.left().lock().drain(self.host());
        }
    }
}
