//! The MMU of one VM.

use crate::fault::{Fault, FaultError, Outcome};
use crate::format::MmuFormat;
use crate::host::Host;
use crate::reader::Reader;
use crate::region::{Region, RegionError};
use crate::root::{Root, RootRole};
use crate::slots::SlotInfo;
use crate::stats::Stats;
use core::marker::PhantomData;
use core::ops::Range;
use twofold_arch::{Gfn, Gpa};

/// What the MMU has to know about the machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Config {
    /// Width of host-physical addresses in bits, at most 52.
    pub maxphyaddr: u8,
    /// First host-virtual address that is no longer user memory.
    pub hva_end: u64,
    /// Whether deleting or moving a slot drops every mapping of the VM
    /// (`KVM_X86_QUIRK_SLOT_ZAP_ALL`, on by default) or only the slot's.
    pub slot_zap_all: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            maxphyaddr: 51,
            hva_end: 0x7fff_ffff_f000,
            slot_zap_all: true,
        }
    }
}

/// No page for a table could be had: `-ENOMEM`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("no memory for a table page")]
pub struct OutOfMemory;

/// Why a dirty bitmap cannot be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DirtyLogError {
    /// No such slot id or address space can exist: `-EINVAL`.
    #[error("slot id or address space out of range")]
    Id,
    /// No such slot, or it does not log: `-ENOENT`.
    #[error("no slot with dirty logging has this id")]
    NotLogged,
    /// The buffer has fewer bits than the slot has pages.
    #[error("the buffer is smaller than the slot's bitmap")]
    Buffer,
}

/// The second-stage MMU of one VM: its slots, its tables, its dirty bitmaps.
///
/// Every method takes `&self`; any number of threads may call any of them. [`fault`](Self::fault)
/// takes no lock.
pub struct Mmu<F: MmuFormat, H: Host> {
    host: H,
    config: Config,
    format: PhantomData<F>,
}

/// A change of host memory in progress: from [`Mmu::begin_host_change`] to
/// [`Mmu::end_host_change`]. No guest can reach the range in between.
#[must_use = "the range stays unreachable for the guest until the change is ended"]
#[derive(Debug)]
pub struct PendingChange {
    _private: (),
}

/// [`PendingChange`] that ends itself when dropped.
#[must_use = "the change ends when this is dropped"]
pub struct HostChange<'a, F: MmuFormat, H: Host> {
    mmu: &'a Mmu<F, H>,
    change: Option<PendingChange>,
}

impl<F: MmuFormat, H: Host> Drop for HostChange<'_, F, H> {
    fn drop(&mut self) {
        if let Some(change) = self.change.take() {
            self.mmu.end_host_change(change);
        }
    }
}

impl<F: MmuFormat, H: Host> Mmu<F, H> {
    /// An MMU without slots.
    pub fn new(host: H, config: Config) -> Self {
        Self {
            host,
            config,
            format: PhantomData,
        }
    }

    /// What the hypervisor supplied.
    pub fn host(&self) -> &H {
        &self.host
    }

    /// What it was made with.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// `KVM_SET_USER_MEMORY_REGION`: creates, moves, changes or deletes a slot.
    ///
    /// When it returns, no virtual processor uses a translation that the old slot allowed.
    ///
    /// # Errors
    /// In the order of SPEC 6.10; nothing has changed then.
    pub fn set_region(&self, _region: Region) -> Result<(), RegionError> {
        unimplemented!()
    }

    /// Switches between the two ways of [`Config::slot_zap_all`].
    pub fn set_slot_zap_all(&self, _all: bool) {
        unimplemented!()
    }

    /// Registers a thread of the VM, one per virtual processor.
    pub fn reader(&self) -> Reader {
        unimplemented!()
    }

    /// The valid root for `role`, made if there is none. Counted: it lives until its last
    /// [`Root`] is dropped.
    ///
    /// # Errors
    /// [`OutOfMemory`] when a table page cannot be had.
    pub fn load_root(&self, _role: RootRole) -> Result<Root, OutOfMemory> {
        unimplemented!()
    }

    /// Resolves a second-stage fault.
    ///
    /// # Errors
    /// See [`FaultError`]; nothing has changed then.
    ///
    /// # Panics
    /// If `reader` belongs to another MMU.
    pub fn fault(
        &self,
        _reader: &mut Reader,
        _root: &Root,
        _fault: Fault,
    ) -> Result<Outcome, FaultError> {
        unimplemented!()
    }

    /// Announces a change of host memory in `hva` (a range of addresses) and takes it away from
    /// the guest; when this returns, no virtual processor can reach it until the guard is dropped.
    pub fn host_change(&self, hva: Range<u64>) -> HostChange<'_, F, H> {
        HostChange {
            mmu: self,
            change: Some(self.begin_host_change(hva)),
        }
    }

    /// [`host_change`](Self::host_change) without a guard that borrows the MMU: the caller owes
    /// one [`end_host_change`](Self::end_host_change).
    pub fn begin_host_change(&self, _hva: Range<u64>) -> PendingChange {
        unimplemented!()
    }

    /// Ends a change. Faults on its range, which were told to retry, go on.
    pub fn end_host_change(&self, _change: PendingChange) {
        unimplemented!()
    }

    /// [`host_change`](Self::host_change) of all host memory (a file behind some slot shrinks,
    /// for instance).
    pub fn host_change_all(&self) -> HostChange<'_, F, H> {
        self.host_change(0..u64::MAX)
    }

    /// Drops every mapping by making every root obsolete. Virtual processors have to load a new root.
    pub fn zap_all(&self) {
        unimplemented!()
    }

    /// `KVM_GET_DIRTY_LOG`: moves the slot's dirty bits to `bitmap` (bit n of word m is page
    /// `64 * m + n` of the slot) and protects those pages again, so that the next write is seen.
    ///
    /// # Errors
    /// See [`DirtyLogError`].
    pub fn dirty_log_get(
        &self,
        _as_id: u16,
        _slot: u16,
        _bitmap: &mut [u64],
    ) -> Result<(), DirtyLogError> {
        unimplemented!()
    }

    /// The slot with this id.
    pub fn slot(&self, _as_id: u16, _slot: u16) -> Option<SlotInfo> {
        unimplemented!()
    }

    /// The slot that holds `gfn`, for threads without a reader. Takes the writers' lock.
    pub fn slot_at(&self, _as_id: u16, _gfn: Gfn) -> Option<SlotInfo> {
        unimplemented!()
    }

    /// The slot that holds `gpa`, without a lock: where a guest-physical address is in host-virtual
    /// memory, for the hypervisor's own guest accesses.
    ///
    /// # Panics
    /// If `reader` belongs to another MMU.
    pub fn lookup(&self, _reader: &mut Reader, _as_id: u16, _gpa: Gpa) -> Option<SlotInfo> {
        unimplemented!()
    }

    /// Marks the page dirty in the slot that holds it, if that slot logs: the hypervisor wrote there.
    ///
    /// # Panics
    /// If `reader` belongs to another MMU.
    pub fn mark_dirty(&self, _reader: &mut Reader, _as_id: u16, _gfn: Gfn) {
        unimplemented!()
    }

    /// Counters, summed over every reader.
    pub fn stats(&self) -> Stats {
        unimplemented!()
    }
}
