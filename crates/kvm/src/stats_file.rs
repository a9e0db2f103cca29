//! Statistics in binary form: `KVM_GET_STATS_FD`.
//!
//! The file starts with a header, the id of the object, and a descriptor of each statistic, all of
//! which never change; the values follow. The program reads it with `pread` through a descriptor
//! that keeps the VM alive. The values are refreshed before each read.

use crate::shared::{self, SharedMemory};
use crate::vcpu::VcpuCore;
use crate::vm::Vm;
use kvm_bindings::{
    KVM_STATS_BASE_POW10, KVM_STATS_TYPE_CUMULATIVE, KVM_STATS_TYPE_INSTANT, KVM_STATS_TYPE_PEAK,
    KVM_STATS_UNIT_BOOLEAN, KVM_STATS_UNIT_NONE,
};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use std::sync::Arc;

/// Bytes of a name, with its terminating zero (`KVM_STATS_NAME_SIZE`).
const NAME_SIZE: usize = 48;
/// Bytes in `struct kvm_stats_header`; the id follows.
const HEADER_SIZE: usize = 24;
/// Bytes in `struct kvm_stats_desc` with its name.
const DESCRIPTOR_SIZE: usize = 16 + NAME_SIZE;
const DESCRIPTORS: usize = HEADER_SIZE + NAME_SIZE;

/// One statistic: what it is called, what it is, where its value comes from.
struct Statistic<S> {
    name: &'static str,
    flags: u32,
    value: fn(&S) -> u64,
}

const COUNT: u32 = KVM_STATS_TYPE_CUMULATIVE | KVM_STATS_UNIT_NONE | KVM_STATS_BASE_POW10;
const NOW: u32 = KVM_STATS_TYPE_INSTANT | KVM_STATS_UNIT_NONE | KVM_STATS_BASE_POW10;
const PEAK: u32 = KVM_STATS_TYPE_PEAK | KVM_STATS_UNIT_NONE | KVM_STATS_BASE_POW10;
const FLAG: u32 = KVM_STATS_TYPE_INSTANT | KVM_STATS_UNIT_BOOLEAN | KVM_STATS_BASE_POW10;

macro_rules! statistics {
    ($source:ty: $($name:ident $flags:ident = $value:expr;)*) => {
        &[$(Statistic { name: stringify!($name), flags: $flags, value: $value },)*]
    };
}

/// The statistics of a VM, in the order of KVM's own.
static VM_STATISTICS: &[Statistic<twofold_mmu::Stats>] = statistics! { twofold_mmu::Stats:
    remote_tlb_flush COUNT = |mmu| mmu.remote_tlb_flush;
    remote_tlb_flush_requests COUNT = |mmu| mmu.remote_tlb_flush;
    mmu_shadow_zapped COUNT = |mmu| mmu.tables_zapped;
    pages_4k NOW = |mmu| mmu.pages_4k;
    pages_2m NOW = |mmu| mmu.pages_2m;
    pages_1g NOW = |mmu| mmu.pages_1g;
    nx_lpage_splits NOW = |mmu| mmu.nx_lpage_splits;
    // There is no hash without shadow paging.
    max_mmu_page_hash_collisions PEAK = |_| 0;
};

/// The statistics of a vCPU, in the order of KVM's own.
static VCPU_STATISTICS: &[Statistic<VcpuCore>] = statistics! { VcpuCore:
    pf_taken COUNT = |vcpu| vcpu.counters.pf_taken.get();
    pf_fixed COUNT = |vcpu| vcpu.counters.pf_fixed.get();
    pf_emulate COUNT = |vcpu| vcpu.counters.pf_emulate.get();
    pf_spurious COUNT = |vcpu| vcpu.counters.pf_spurious.get();
    pf_fast COUNT = |vcpu| vcpu.counters.pf_fast.get();
    pf_mmio_spte_created COUNT = |vcpu| vcpu.counters.pf_mmio_spte_created.get();
    tlb_flush COUNT = |vcpu| vcpu.counters.tlb_flush.get();
    exits COUNT = |vcpu| vcpu.counters.exits.get();
    io_exits COUNT = |vcpu| vcpu.counters.io_exits.get();
    mmio_exits COUNT = |vcpu| vcpu.counters.mmio_exits.get();
    signal_exits COUNT = |vcpu| vcpu.counters.signal_exits.get();
    irq_window_exits COUNT = |vcpu| vcpu.counters.irq_window_exits.get();
    halt_exits COUNT = |vcpu| vcpu.counters.halt_exits.get();
    request_irq_exits COUNT = |vcpu| vcpu.counters.request_irq_exits.get();
    insn_emulation_fail COUNT = |vcpu| vcpu.counters.insn_emulation_fail.get();
    hypercalls COUNT = |vcpu| vcpu.counters.hypercalls.get();
    irq_injections COUNT = |vcpu| vcpu.counters.irq_injections.get();
    nmi_injections COUNT = |vcpu| vcpu.counters.nmi_injections.get();
    guest_mode FLAG = |_| 0;
    // Not KVM's: what the processor has executed.
    instructions COUNT = |vcpu| vcpu.counters.instructions.get();
};

/// The statistics of a VM or a vCPU: what a statistics descriptor refers to.
pub struct StatsFile {
    vm: Arc<Vm>,
    vcpu: Option<Arc<VcpuCore>>,
    memory: SharedMemory,
}

impl StatsFile {
    /// `KVM_GET_STATS_FD` on a VM: the statistics and the file to read them from.
    ///
    /// # Errors
    /// Whatever making a file gives: `EMFILE`, `ENFILE`, `ENOMEM`.
    pub fn of_vm(vm: &Arc<Vm>) -> Result<(Self, OwnedFd), Errno> {
        let id = format!("kvm-{}", vm.process());
        Self::new(Arc::clone(vm), None, &id, VM_STATISTICS)
    }

    pub(crate) fn of_vcpu(vm: &Arc<Vm>, vcpu: &Arc<VcpuCore>) -> Result<(Self, OwnedFd), Errno> {
        let id = format!("kvm-{}/vcpu-{}", vm.process(), vcpu.id);
        Self::new(Arc::clone(vm), Some(Arc::clone(vcpu)), &id, VCPU_STATISTICS)
    }

    fn new<S>(
        vm: Arc<Vm>,
        vcpu: Option<Arc<VcpuCore>>,
        id: &str,
        statistics: &[Statistic<S>],
    ) -> Result<(Self, OwnedFd), Errno> {
        let size = data_offset(statistics) + 8 * statistics.len();
        let (memory, file) = SharedMemory::with_file("kvm-stats", size)?;
        let header = [
            0,
            NAME_SIZE as u32,
            statistics.len() as u32,
            HEADER_SIZE as u32,
            DESCRIPTORS as u32,
            data_offset(statistics) as u32,
        ];
        for (index, word) in header.into_iter().enumerate() {
            memory.write(4 * index, word);
        }
        let id = &id.as_bytes()[..id.len().min(NAME_SIZE - 1)];
        memory.write_bytes(HEADER_SIZE, id);
        for (index, statistic) in statistics.iter().enumerate() {
            // Flags, then exponent 0 and size 1, then the value's offset, then bucket size 0.
            let at = DESCRIPTORS + index * DESCRIPTOR_SIZE;
            memory.write(at, statistic.flags);
            memory.write(at + 4, 1_u32 << 16);
            memory.write(at + 8, 8 * index as u32);
            memory.write_bytes(at + 16, statistic.name.as_bytes());
        }
        let stats = Self { vm, vcpu, memory };
        stats.refresh();
        Ok((stats, shared::read_only(file)))
    }

    pub(crate) fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    /// Writes the current values into the file.
    pub fn refresh(&self) {
        match &self.vcpu {
            Some(vcpu) => self.write_values(VCPU_STATISTICS, vcpu),
            None => self.write_values(VM_STATISTICS, &self.vm.tables().stats()),
        }
    }

    fn write_values<S>(&self, statistics: &[Statistic<S>], source: &S) {
        let data = data_offset(statistics);
        for (index, statistic) in statistics.iter().enumerate() {
            self.memory
                .write(data + 8 * index, (statistic.value)(source));
        }
    }
}

fn data_offset<S>(statistics: &[Statistic<S>]) -> usize {
    DESCRIPTORS + statistics.len() * DESCRIPTOR_SIZE
}
