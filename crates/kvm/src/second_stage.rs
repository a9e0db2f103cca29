//! The VM's second-stage tables, in whichever format its processors walk.

use crate::host::ProcessMemory;
use crate::parameter;
use crate::vm_type::VmType;
use std::ops::Range;
use std::sync::Arc;
use twofold_arch::eptp::Eptp;
use twofold_arch::sppt::AccessMap;
use twofold_arch::{Gfn, Gpa, Hpa, Level};
use twofold_cpu::{Machine, MachineConfig, SecondStage, SecondStageKind};
use twofold_mmu::{
    AttributeError, Config, DirtyLogError, DirtyRingError, Ept, ExternalTables, Fault, FaultError,
    GuestMemoryError, ManualProtect, MirrorError, MmioFault, Mmu, Npt, OutOfMemory, Outcome,
    PendingChange, PrefaultError, Reader, Region, RegionError, RingMemory, Root, RootRole,
    SlotInfo, Stats, SubPageError, TdRoots,
};

/// Bits of a host-physical address in the entries. They are this process's virtual addresses.
const HOST_ADDRESS_BITS: u8 = 51;
/// Bits of a guest-physical address that a table of four levels translates.
const FOUR_LEVEL_BITS: u32 = 48;

/// Which second-stage format a VM uses, and with it whose processor the guest sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Kind {
    /// Extended page tables: an Intel processor.
    #[default]
    Ept,
    /// Nested page tables: an AMD processor.
    Npt,
}

impl Kind {
    /// What the environment variable `TWOFOLD_SECOND_STAGE` asks for: `ept` (also when it is not
    /// set) or `npt`. Anything else is named in a log line and taken for `ept`.
    pub fn from_environment() -> Self {
        match std::env::var("TWOFOLD_SECOND_STAGE").as_deref() {
            Ok("npt") => Self::Npt,
            Ok("ept" | "") | Err(_) => Self::Ept,
            Ok(other) => {
                tracing::warn!(value = other, "TWOFOLD_SECOND_STAGE is neither ept nor npt");
                Self::Ept
            }
        }
    }

    pub(crate) fn machine_config(self) -> MachineConfig {
        MachineConfig {
            second_stage: match self {
                Self::Ept => SecondStageKind::Ept,
                Self::Npt => SecondStageKind::Npt,
            },
            maxphyaddr: HOST_ADDRESS_BITS,
            hpa_offset: 0,
        }
    }
}

/// The MMU of one VM.
pub(crate) enum Tables {
    Ept(Mmu<Ept, ProcessMemory>),
    Npt(Mmu<Npt, ProcessMemory>),
}

macro_rules! either {
    ($self:expr, $mmu:ident => $work:expr) => {
        match $self {
            Tables::Ept($mmu) => $work,
            Tables::Npt($mmu) => $work,
        }
    };
}

impl Tables {
    pub(crate) fn new(kind: Kind, vm_type: VmType, machine: Arc<Machine>) -> Self {
        let host = ProcessMemory::new(machine);
        // The module neither sets accessed and dirty bits nor logs; the half that is shared follows
        // the same control.
        let is_td = vm_type == VmType::TrustDomain;
        let config = Config {
            maxphyaddr: HOST_ADDRESS_BITS,
            private_memory: vm_type.private_memory(),
            // A full zap would take private mappings along.
            slot_zap_all: !vm_type.has_private_memory(),
            mmio: match is_td {
                true => MmioFault::Violation,
                false => MmioFault::Misconfiguration,
            },
            accessed_dirty: parameter::EPTAD.is_on() && !is_td,
            pml: parameter::PML.is_on() && !is_td,
            eager_split: parameter::EAGER_PAGE_SPLIT.is_on(),
            nx_huge_pages: parameter::NX_HUGE_PAGES.is_on(),
            ..Config::default()
        };
        match kind {
            Kind::Ept => Self::Ept(Mmu::new(host, config)),
            Kind::Npt => Self::Npt(Mmu::new(host, config)),
        }
    }

    /// What a processor needs to walk the tables below `root`.
    pub(crate) fn pointer(&self, root: &Root) -> SecondStage {
        let (hpa, level) = (root.hpa(), root.role().level);
        match self {
            Self::Ept(mmu) => SecondStage::Ept(Eptp::new(hpa, level, mmu.has_accessed_dirty())),
            Self::Npt(_) => SecondStage::Npt { root: hpa, level },
        }
    }

    /// Makes the VM a trust domain.
    pub(crate) fn enable_mirror(
        &self,
        shared_bit: u8,
        tables: Arc<dyn ExternalTables>,
    ) -> Result<(), MirrorError> {
        either!(self, mmu => mmu.enable_mirror(shared_bit, tables))
    }

    /// With which status the TDX module refused what it should not have refused.
    #[inline]
    pub(crate) fn bug(&self) -> Option<u64> {
        either!(self, mmu => mmu.bug())
    }

    /// The roots for a vCPU of a trust domain; `None` if it is none yet.
    pub(crate) fn load_td_roots(&self) -> Result<Option<TdRoots>, OutOfMemory> {
        either!(self, mmu => mmu.load_td_roots())
    }

    /// Adds a page of a trust domain's initial memory.
    pub(crate) fn td_add(
        &self,
        reader: &mut Reader,
        roots: &TdRoots,
        gfn: Gfn,
        source: u64,
    ) -> Result<Outcome, FaultError> {
        either!(self, mmu => mmu.td_add(reader, roots, gfn, source))
    }

    /// [`fault`](Self::fault) of a trust domain.
    pub(crate) fn td_fault(
        &self,
        reader: &mut Reader,
        roots: &TdRoots,
        fault: Fault,
    ) -> Result<Outcome, FaultError> {
        either!(self, mmu => mmu.td_fault(reader, roots, fault))
    }

    /// [`prefault`](Self::prefault) of a trust domain.
    pub(crate) fn td_prefault(
        &self,
        reader: &mut Reader,
        roots: &TdRoots,
        gfns: Range<Gfn>,
    ) -> Result<u64, PrefaultError> {
        either!(self, mmu => mmu.td_prefault(reader, roots, gfns))
    }

    /// Whether `gfn` is private.
    pub(crate) fn is_private(&self, gfn: Gfn) -> bool {
        either!(self, mmu => mmu.is_private(gfn))
    }

    pub(crate) fn set_region(
        &self,
        region: Region,
        bind: impl FnOnce() -> Result<u64, GuestMemoryError>,
    ) -> Result<(), RegionError> {
        either!(self, mmu => mmu.set_region_with_guest_memory(region, bind))
    }

    pub(crate) fn set_attributes(
        &self,
        gfns: Range<Gfn>,
        private: bool,
    ) -> Result<(), AttributeError> {
        either!(self, mmu => mmu.set_attributes(gfns, private))
    }

    /// Maps the first of `gfns`; how many.
    pub(crate) fn prefault(
        &self,
        reader: &mut Reader,
        root: &Root,
        gfns: Range<Gfn>,
    ) -> Result<u64, PrefaultError> {
        either!(self, mmu => mmu.prefault(reader, root, gfns))
    }

    /// Makes sub-page permissions possible.
    pub(crate) fn enable_sub_pages(&self) -> Result<(), SubPageError> {
        either!(self, mmu => mmu.enable_sub_pages())
    }

    pub(crate) fn set_sub_page_access(
        &self,
        first: Gfn,
        maps: &[AccessMap],
    ) -> Result<(), SubPageError> {
        either!(self, mmu => mmu.set_access(RootRole::NORMAL.as_id(), first, maps))
    }

    pub(crate) fn get_sub_page_access(
        &self,
        first: Gfn,
        maps: &mut [AccessMap],
    ) -> Result<(), SubPageError> {
        either!(self, mmu => mmu.get_access(RootRole::NORMAL.as_id(), first, maps))
    }

    /// The sub-page permission table that belongs to `root`, once they are enabled.
    pub(crate) fn sppt(&self, root: &Root) -> Option<Hpa> {
        either!(self, mmu => mmu.sppt_root(root.role()))
    }

    /// Answers a miss in that table.
    pub(crate) fn sppt_miss(
        &self,
        reader: &mut Reader,
        root: &Root,
        gpa: Gpa,
    ) -> Result<Outcome, FaultError> {
        either!(self, mmu => mmu.sppt_miss(reader, root, gpa))
    }

    pub(crate) fn begin_private_change(&self, addresses: Range<u64>) -> PendingChange {
        either!(self, mmu => mmu.begin_private_change(addresses))
    }

    pub(crate) fn is_bound(&self, addresses: Range<u64>) -> bool {
        either!(self, mmu => mmu.is_bound(addresses))
    }

    pub(crate) fn set_slot_zap_all(&self, all: bool) {
        either!(self, mmu => mmu.set_slot_zap_all(all));
    }

    pub(crate) fn reader(&self) -> Reader {
        either!(self, mmu => mmu.reader())
    }

    /// A reader with a dirty ring of its own.
    pub(crate) fn ring_reader(&self, memory: Arc<dyn RingMemory>) -> Reader {
        either!(self, mmu => mmu.ring_reader(memory))
    }

    /// The root for a vCPU whose guest-physical addresses have so many bits.
    pub(crate) fn load_root(&self, guest_address_bits: u32) -> Result<Root, OutOfMemory> {
        let role = RootRole {
            level: if guest_address_bits > FOUR_LEVEL_BITS {
                Level::L256T
            } else {
                Level::L512G
            },
            ..RootRole::NORMAL
        };
        either!(self, mmu => mmu.load_root(role))
    }

    pub(crate) fn nx_huge_pages(&self) -> bool {
        either!(self, mmu => mmu.nx_huge_pages())
    }

    pub(crate) fn disable_nx_huge_pages(&self) {
        either!(self, mmu => mmu.set_nx_huge_pages(false));
    }

    pub(crate) fn recover_nx_huge_pages(&self, ratio: u32) -> u64 {
        either!(self, mmu => mmu.recover_nx_huge_pages(ratio))
    }

    #[inline]
    pub(crate) fn fault(
        &self,
        reader: &mut Reader,
        root: &Root,
        fault: Fault,
    ) -> Result<Outcome, FaultError> {
        either!(self, mmu => mmu.fault(reader, root, fault))
    }

    /// The slot of the normal address space that holds `gpa`.
    pub(crate) fn lookup(&self, reader: &mut Reader, gpa: Gpa) -> Option<SlotInfo> {
        either!(self, mmu => mmu.lookup(reader, RootRole::NORMAL.as_id(), gpa))
    }

    pub(crate) fn begin_host_change(&self, hva: Range<u64>) -> PendingChange {
        either!(self, mmu => mmu.begin_host_change(hva))
    }

    pub(crate) fn end_host_change(&self, change: PendingChange) {
        either!(self, mmu => mmu.end_host_change(change));
    }

    pub(crate) fn dirty_log_words(
        &self,
        as_id: u16,
        slot: u16,
        first: u64,
        pages: u32,
    ) -> Result<usize, DirtyLogError> {
        either!(self, mmu => mmu.dirty_log_words(as_id, slot, first, pages))
    }

    pub(crate) fn dirty_log_clear(
        &self,
        as_id: u16,
        slot: u16,
        first: u64,
        pages: u32,
        bitmap: &mut [u64],
    ) -> Result<(), DirtyLogError> {
        either!(self, mmu => mmu.dirty_log_clear(as_id, slot, first, pages, bitmap))
    }

    pub(crate) fn set_manual_protect(&self, protect: ManualProtect) {
        either!(self, mmu => mmu.set_manual_protect(protect));
    }

    pub(crate) fn enable_dirty_ring(&self, bytes: u64) -> Result<u32, DirtyRingError> {
        either!(self, mmu => mmu.enable_dirty_ring(bytes))
    }

    pub(crate) fn ring_entries(&self) -> u32 {
        either!(self, mmu => mmu.ring_entries())
    }

    pub(crate) fn reset_dirty_rings(&self) -> u32 {
        either!(self, mmu => mmu.reset_dirty_rings())
    }

    /// Whether the vCPUs' processors keep logs of what they write.
    pub(crate) fn logs_by_pml(&self) -> bool {
        either!(self, mmu => mmu.logs_by_pml())
    }

    pub(crate) fn drain_pml(&self, reader: &mut Reader, log: impl Iterator<Item = Gpa>) {
        either!(self, mmu => mmu.drain_pml(reader, RootRole::NORMAL.as_id(), log));
    }

    /// Marks the page of `gpa` in the normal address space dirty.
    pub(crate) fn mark_dirty(&self, reader: &mut Reader, gpa: Gpa) {
        self.drain_pml(reader, std::iter::once(gpa));
    }

    pub(crate) fn dirty_log_get(
        &self,
        as_id: u16,
        slot: u16,
        bitmap: &mut [u64],
    ) -> Result<(), DirtyLogError> {
        either!(self, mmu => mmu.dirty_log_get(as_id, slot, bitmap))
    }

    pub(crate) fn slot(&self, as_id: u16, slot: u16) -> Option<SlotInfo> {
        either!(self, mmu => mmu.slot(as_id, slot))
    }

    pub(crate) fn stats(&self) -> Stats {
        either!(self, mmu => mmu.stats())
    }
}
