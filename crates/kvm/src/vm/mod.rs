//! A virtual machine: `KVM_CREATE_VM` and the ioctls on its descriptor.

mod options;
mod registry;

use options::Options;

pub(crate) use options::HypercallExits;
pub(crate) use registry::{
    all, any, forget_inherited, lock_registry_for_fork, unlock_registry_after_fork,
};

use crate::bus::Buses;
use crate::capability;
use crate::clock::Clock;
use crate::fork;
use crate::guest_memory::Reservation;
use crate::irqchip::{Controllers, Model, Timers};
use crate::msr_filter::{MsrAccess, MsrFilter};
use crate::nx_recovery::Worker;
use crate::second_stage::{Kind, Tables};
use crate::summary;
use crate::sync::{Mutex, RwLock};
use crate::td::{Stage, Td};
use crate::vcpu::{Vcpu, VcpuCore};
use crate::vm_type::VmType;
use crate::{cpuid, tsc};
use kvm_bindings as kvm;
use kvm_bindings::{kvm_coalesced_mmio_zone, kvm_ioeventfd};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock, RwLockReadGuard};
use twofold_cpu::Machine;
use twofold_mmu::SlotInfo;

/// Fewest pages that `KVM_SET_NR_MMU_PAGES` takes (`KVM_MIN_ALLOC_MMU_PAGES`).
const MIN_MMU_PAGES: u64 = 64;
/// A virtual machine. It lives until the last descriptor, vCPU or statistics file that refers to
/// it is gone.
pub struct Vm {
    /// Before `tables`, so that the vCPUs' readers and roots go before the MMU.
    pub(crate) config: Mutex<Config>,
    tables: Tables,
    /// After `tables`, whose private pages are the module's: what a trust domain is besides.
    td: Option<Arc<Td>>,
    /// After `tables`: addresses that slots may refer to.
    reservations: Mutex<Vec<Arc<Reservation>>>,
    vm_type: VmType,
    machine: Arc<Machine>,
    buses: Buses,
    kind: Kind,
    generation: u32,
    process: u32,
    clock: Clock,
    /// Held while KVM itself uses the guest's memory: a slot that goes waits for that.
    guest_access: RwLock<()>,
    /// A copy of the configuration that running vCPUs look at.
    pub(crate) irqchip_model: AtomicU8,
    boot_cpu_id: AtomicU32,
    /// What the program has enabled.
    options: Options,
    msr_filter: RwLock<Option<MsrFilter>>,
    /// Whether there is one: a copy that running vCPUs look at.
    filters_msrs: AtomicBool,
    /// Keeps the vCPUs' time stamp counters in step.
    tsc_sync: tsc::Sync,
    /// The interrupt controllers beside the local APICs.
    pub(crate) controllers: Controllers,
    /// The vCPUs once more, for those that have interrupts for them.
    pub(crate) members: RwLock<Vec<Arc<VcpuCore>>>,
    /// The PICs have an interrupt.
    pub(crate) pic_output: AtomicBool,
    timers: Timers,
    /// 0 for the host's rate.
    tsc_khz: AtomicU32,
    /// Where huge pages are not executable.
    nx_recovery: OnceLock<Worker>,
    /// Sub-page permissions are enabled: a copy that running vCPUs look at.
    pub(crate) protects_sub_pages: AtomicBool,
}

/// What changes rarely, under one lock (KVM's `kvm->lock`).
#[derive(Default)]
pub(crate) struct Config {
    pub(crate) vcpus: Vec<Arc<VcpuCore>>,
    mmu_pages: u64,
    /// The limit of vCPU ids that the program set.
    max_vcpu_ids: Option<u32>,
}

impl Vm {
    /// `KVM_CREATE_VM`
    ///
    /// # Errors
    /// `EINVAL` for a type that there is not; `ENOMEM`.
    pub(crate) fn new(kind: u64) -> Result<Arc<Self>, Errno> {
        let second_stage = Kind::from_environment();
        let vm_type = VmType::new(kind, second_stage)?;
        let kind = second_stage;
        let machine = Machine::new(kind.machine_config());
        let td = (vm_type == VmType::TrustDomain).then(|| Arc::new(Td::new(Arc::clone(&machine))));
        let vm = Arc::new(Self {
            config: Mutex::new(Config::default()),
            tables: Tables::new(kind, vm_type, Arc::clone(&machine)),
            td,
            reservations: Mutex::default(),
            vm_type,
            machine,
            buses: Buses::new()?,
            kind,
            generation: fork::generation(),
            process: std::process::id(),
            clock: Clock::new(),
            guest_access: RwLock::default(),
            irqchip_model: AtomicU8::new(0),
            boot_cpu_id: AtomicU32::new(0),
            options: Options::default(),
            msr_filter: RwLock::new(None),
            filters_msrs: AtomicBool::new(false),
            tsc_sync: tsc::Sync::default(),
            controllers: Controllers::default(),
            members: RwLock::default(),
            pic_output: AtomicBool::new(false),
            timers: Timers::default(),
            tsc_khz: AtomicU32::new(0),
            nx_recovery: OnceLock::new(),
            protects_sub_pages: AtomicBool::new(false),
        });
        if let Some(worker) = Worker::start(&vm)? {
            let _ = vm.nx_recovery.set(worker);
        }
        summary::begin();
        registry::register(&vm);
        Ok(vm)
    }

    pub(crate) fn tables(&self) -> &Tables {
        &self.tables
    }

    pub(crate) fn vm_type(&self) -> VmType {
        self.vm_type
    }

    /// What the VM is as a trust domain, if it is one.
    #[inline]
    pub(crate) fn td(&self) -> Option<&Td> {
        self.td.as_deref()
    }

    /// Has the trust domain's private memory mapped through the module.
    ///
    /// # Errors
    /// `EIO`; it cannot go on then.
    pub(crate) fn enable_mirror(&self) -> Result<(), Errno> {
        let td = self.td.as_ref().ok_or(Errno::IO)?;
        let params = td.params().ok_or(Errno::IO)?;
        let tables = Arc::clone(td);
        self.tables
            .enable_mirror(params.shared_bit() as u8, tables)
            .map_err(|error| {
                td.bug(&error.to_string(), None);
                Errno::IO
            })
    }

    /// Whether something went wrong in the VM that should be impossible: nothing works any more.
    #[inline]
    pub(crate) fn is_bugged(&self) -> bool {
        self.td()
            .is_some_and(|td| td.is_bugged() || self.tables.bug().is_some())
    }

    /// How many vCPUs the VM may have.
    pub(crate) fn max_vcpus(&self) -> u32 {
        capability::max_vcpus(self.vm_type)
    }

    pub(crate) fn reservations(&self) -> &Mutex<Vec<Arc<Reservation>>> {
        &self.reservations
    }

    pub(crate) fn machine(&self) -> &Arc<Machine> {
        &self.machine
    }

    pub(crate) fn buses(&self) -> &Buses {
        &self.buses
    }

    /// Which second-stage format the VM uses.
    pub fn second_stage(&self) -> Kind {
        self.kind
    }

    /// Whether the VM was created by this process, rather than by the one that forked it.
    #[inline]
    pub(crate) fn is_ours(&self) -> bool {
        self.generation == fork::generation()
    }

    /// The process that created the VM.
    pub(crate) fn process(&self) -> u32 {
        self.process
    }

    #[inline]
    pub(crate) fn irqchip_model(&self) -> Model {
        match self.irqchip_model.load(Ordering::Relaxed) {
            0 => Model::None,
            1 => Model::Kernel,
            _ => Model::Split,
        }
    }

    pub(crate) fn clock(&self) -> &Clock {
        &self.clock
    }

    /// KVM itself uses the guest's memory, by the slots as they are, until this is dropped.
    pub(crate) fn begin_guest_access(&self) -> RwLockReadGuard<'_, ()> {
        self.guest_access.read()
    }

    /// Waits until KVM does not use what it found in slots that are gone.
    pub(crate) fn wait_for_guest_accesses(&self) {
        drop(self.guest_access.write());
    }

    pub(crate) fn timers(&self) -> &Timers {
        &self.timers
    }

    pub(crate) fn boot_cpu_id(&self) -> u32 {
        self.boot_cpu_id.load(Ordering::Relaxed)
    }

    /// Whether some accesses to registers are the program's.
    #[inline]
    pub(crate) fn filters_msrs(&self) -> bool {
        self.filters_msrs.load(Ordering::Relaxed)
    }

    /// Whether the guest may access a register without the program.
    pub(crate) fn allows_msr(&self, index: u32, access: MsrAccess) -> bool {
        !self.filters_msrs()
            || self
                .msr_filter
                .read()
                .as_ref()
                .is_none_or(|filter| filter.allows(index, access))
    }

    /// `KVM_X86_SET_MSR_FILTER`. When it returns, no vCPU goes by the filter before.
    ///
    /// # Errors
    /// `EINVAL` for unknown flags and for ranges that KVM refuses; `EFAULT` for a bitmap that cannot
    /// be read.
    pub fn set_msr_filter(&self, filter: &kvm::kvm_msr_filter) -> Result<(), Errno> {
        let filter = MsrFilter::read(filter)?;
        *self.msr_filter.write() = Some(filter);
        self.filters_msrs.store(true, Ordering::Relaxed);
        self.machine.kick_all();
        Ok(())
    }

    pub(crate) fn tsc_sync(&self) -> &tsc::Sync {
        &self.tsc_sync
    }

    /// The vCPUs created so far.
    pub(crate) fn vcpus(&self) -> Vec<Arc<VcpuCore>> {
        self.config.lock().vcpus.clone()
    }

    /// `KVM_CREATE_VCPU`: the vCPU and the file that its program maps.
    ///
    /// # Errors
    /// `EINVAL` for an id of 4096 and above (or of the lower limit that the program set), and for
    /// more vCPUs than the VM may have; `EEXIST` for an id that has been given away, even if its
    /// descriptor is closed; for a trust domain, `EIO` before `INIT_VM` and after `FINALIZE_VM`, and
    /// `EINVAL` without a local APIC; whatever making the file gives.
    pub fn create_vcpu(self: &Arc<Self>, id: u64) -> Result<(Vcpu, OwnedFd), Errno> {
        let id = u32::try_from(id).map_err(|_| Errno::INVAL)?;
        if id >= capability::MAX_VCPU_ID {
            return Err(Errno::INVAL);
        }
        let index = {
            let config = self.config.lock();
            if config.vcpus.len() >= self.max_vcpus() as usize
                || config.max_vcpu_ids.is_some_and(|limit| id >= limit)
            {
                return Err(Errno::INVAL);
            }
            config.vcpus.len()
        };
        if let Some(td) = self.td() {
            if td.stage() != Stage::Initialized {
                return Err(Errno::IO);
            }
            // The module needs a local APIC to deliver interrupts.
            if self.irqchip_model() == Model::None {
                return Err(Errno::INVAL);
            }
        }
        let (core, file) = VcpuCore::new(self, id, index as u32)?;
        let mut config = self.config.lock();
        if config.vcpus.len() >= self.max_vcpus() as usize {
            return Err(Errno::INVAL);
        }
        if config.vcpus.iter().any(|other| other.id == id) {
            return Err(Errno::EXIST);
        }
        config.vcpus.push(Arc::clone(&core));
        self.members.write().push(Arc::clone(&core));
        drop(config);
        Ok((Vcpu::new(Arc::clone(self), core), file))
    }

    /// Does what only a VM without vCPUs allows; `EINVAL` once there are any.
    pub(crate) fn before_vcpus<R>(&self, work: impl FnOnce() -> R) -> Result<R, Errno> {
        let config = self.config.lock();
        if config.vcpus.is_empty() {
            Ok(work())
        } else {
            Err(Errno::INVAL)
        }
    }

    fn has_vcpus(&self) -> bool {
        !self.config.lock().vcpus.is_empty()
    }

    /// The slot with this id (address space in bits 31:16), for `KVM_GET_DIRTY_LOG`.
    pub(crate) fn slot(&self, slot: u32) -> Option<SlotInfo> {
        self.tables.slot((slot >> 16) as u16, slot as u16)
    }

    /// `KVM_SET_NR_MMU_PAGES`: kept and given back; the tables need no limit.
    ///
    /// # Errors
    /// `EINVAL` below 64.
    pub fn set_nr_mmu_pages(&self, pages: u64) -> Result<(), Errno> {
        if pages < MIN_MMU_PAGES {
            return Err(Errno::INVAL);
        }
        self.config.lock().mmu_pages = pages;
        Ok(())
    }

    /// `KVM_GET_NR_MMU_PAGES`
    pub fn get_nr_mmu_pages(&self) -> u64 {
        self.config.lock().mmu_pages
    }

    /// `KVM_SET_TSS_ADDR`. This processor needs no pages in the guest's memory for its task state.
    ///
    /// # Errors
    /// `EINVAL` if three pages do not fit below 4 GiB.
    pub fn set_tss_addr(&self, address: u64) -> Result<(), Errno> {
        if address > 0u32.wrapping_sub(3 * 4096).into() {
            Err(Errno::INVAL)
        } else {
            Ok(())
        }
    }

    /// `KVM_SET_IDENTITY_MAP_ADDR`. This processor needs no identity map in the guest's memory, so
    /// the address is not kept.
    ///
    /// # Errors
    /// `EINVAL` once there are vCPUs.
    pub fn set_identity_map_addr(&self) -> Result<(), Errno> {
        if self.has_vcpus() {
            Err(Errno::INVAL)
        } else {
            Ok(())
        }
    }

    /// `KVM_SET_BOOT_CPU_ID`
    ///
    /// # Errors
    /// `EBUSY` once there are vCPUs; `EINVAL` for an id beyond the limit.
    pub fn set_boot_cpu_id(&self, id: u64) -> Result<(), Errno> {
        let config = self.config.lock();
        if !config.vcpus.is_empty() {
            return Err(Errno::BUSY);
        }
        let limit = config.max_vcpu_ids.unwrap_or(capability::MAX_VCPU_ID);
        let id = u32::try_from(id)
            .ok()
            .filter(|id| *id <= limit)
            .ok_or(Errno::INVAL)?;
        self.boot_cpu_id.store(id, Ordering::Relaxed);
        Ok(())
    }

    /// `KVM_REGISTER_COALESCED_MMIO`
    ///
    /// # Errors
    /// `EINVAL` for an unknown space, `ENOSPC` when the bus is full.
    pub fn register_coalesced_mmio(&self, zone: &kvm_coalesced_mmio_zone) -> Result<(), Errno> {
        self.buses.register_zone(zone)
    }

    /// `KVM_UNREGISTER_COALESCED_MMIO`
    ///
    /// # Errors
    /// `EINVAL` for an unknown space.
    pub fn unregister_coalesced_mmio(&self, zone: &kvm_coalesced_mmio_zone) -> Result<(), Errno> {
        self.buses.unregister_zone(zone)
    }

    /// `KVM_IOEVENTFD`
    ///
    /// # Errors
    /// `EINVAL`, `EBADF`, `EEXIST`, `ENOENT` and `ENOSPC` as KVM gives them.
    pub fn ioeventfd(&self, request: &kvm_ioeventfd) -> Result<(), Errno> {
        self.buses.ioeventfd(request)
    }

    /// `KVM_GET_TSC_KHZ` on a VM: the rate of the vCPUs that will be created.
    pub fn get_tsc_khz(&self) -> u32 {
        match self.tsc_khz.load(Ordering::Relaxed) {
            0 => tsc::khz(),
            khz => khz,
        }
    }

    /// `KVM_SET_TSC_KHZ` on a VM.
    ///
    /// # Errors
    /// `EINVAL` once there are vCPUs, and for a rate that the multiplier cannot express.
    pub fn set_tsc_khz(&self, khz: u32) -> Result<(), Errno> {
        if self.has_vcpus() {
            return Err(Errno::INVAL);
        }
        if khz != 0 && tsc::multiplier(khz).is_none() {
            return Err(Errno::INVAL);
        }
        self.tsc_khz.store(khz, Ordering::Relaxed);
        Ok(())
    }

    /// The CPUID table that fits the VM's second stage.
    pub fn supported_cpuid(&self) -> Vec<kvm::kvm_cpuid_entry2> {
        cpuid::offered(self.kind)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        registry::unregister();
        summary::remember(self);
    }
}
