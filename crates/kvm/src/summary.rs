//! What the process's VMs did, in a few lines for its user.

use crate::sync::ProcessMutex;
use crate::vcpu::VcpuCore;
use crate::vm::{self, Vm};
use std::fmt;
use std::time::{Duration, Instant};
use twofold_abi::spp::KVM_EXIT_SPP;

/// The names of `KVM_EXIT_*`, by number.
const EXIT_NAMES: &[(u32, &str)] = &[
    (0, "unknown"),
    (2, "io"),
    (3, "hypercall"),
    (4, "debug"),
    (5, "hlt"),
    (6, "mmio"),
    (7, "irq-window-open"),
    (8, "shutdown"),
    (9, "fail-entry"),
    (10, "intr"),
    (11, "set-tpr"),
    (17, "internal-error"),
    (29, "rdmsr"),
    (30, "wrmsr"),
    (39, "memory-fault"),
    (KVM_EXIT_SPP, "spp"),
];

/// Sums over every VM of the process, living and gone.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// VMs created.
    pub vms: u64,
    /// vCPUs created.
    pub vcpus: u64,
    /// Returns from `KVM_RUN`, by `KVM_EXIT_*` and its name.
    pub exits: Vec<(&'static str, u64)>,
    /// Second-stage faults by access: reads, writes, instruction fetches.
    pub faults: [u64; 3],
    /// Faults that mapped something; that were mapped already; that were emulated memory.
    pub outcomes: [u64; 3],
    /// Leaves that faults mapped: 4K, 2M, 1G.
    pub mapped: [u64; 3],
    /// TLB flushes of all vCPUs of a VM.
    pub tlb_flushes: u64,
    /// Guest instructions executed.
    pub instructions: u64,
    /// Since the first VM was created.
    pub time: Duration,
}

#[derive(Default)]
struct Past {
    sums: Option<Summary>,
    first: Option<Instant>,
}

static PAST: ProcessMutex<Past> = ProcessMutex::new(Past {
    sums: None,
    first: None,
});

impl Summary {
    fn add_vm(&mut self, vm: &Vm, vcpus: &[std::sync::Arc<VcpuCore>]) {
        let mmu = vm.tables().stats();
        self.vms += 1;
        self.vcpus += vcpus.len() as u64;
        self.tlb_flushes += mmu.remote_tlb_flush;
        for vcpu in vcpus {
            self.add_vcpu(vcpu);
        }
    }

    fn add_vcpu(&mut self, vcpu: &VcpuCore) {
        let counters = &vcpu.counters;
        self.instructions += counters.instructions.get();
        let faults = [
            &counters.read_faults,
            &counters.write_faults,
            &counters.fetch_faults,
        ];
        for (sum, counter) in self.faults.iter_mut().zip(faults) {
            *sum += counter.get();
        }
        let outcomes = [
            &counters.pf_fixed,
            &counters.pf_spurious,
            &counters.pf_emulate,
        ];
        for (sum, counter) in self.outcomes.iter_mut().zip(outcomes) {
            *sum += counter.get();
        }
        for (sum, counter) in self.mapped.iter_mut().zip(&counters.mapped) {
            *sum += counter.get();
        }
        for (reason, name) in EXIT_NAMES {
            let count = counters.returns.get(*reason);
            if count == 0 {
                continue;
            }
            match self.exits.iter_mut().find(|(known, _)| known == name) {
                Some((_, sum)) => *sum += count,
                None => self.exits.push((name, count)),
            }
        }
    }
}

/// A VM was created.
pub(crate) fn begin() {
    PAST.with(|past| {
        past.first.get_or_insert_with(Instant::now);
    });
}

/// Keeps what a VM did, which is about to go.
pub(crate) fn remember(vm: &Vm) {
    if !vm.is_ours() {
        return;
    }
    let vcpus = vm.vcpus();
    PAST.with(|past| past.sums.get_or_insert_default().add_vm(vm, &vcpus));
}

/// What the process's VMs did so far.
pub fn summary() -> Summary {
    let (mut sums, first) = PAST.with(|past| (past.sums.clone().unwrap_or_default(), past.first));
    for vm in vm::all() {
        sums.add_vm(&vm, &vm.vcpus());
    }
    sums.time = first.map(|first| first.elapsed()).unwrap_or_default();
    sums
}

/// Before `fork`.
pub(crate) fn lock_for_fork() {
    PAST.close_gate();
}

/// After `fork`.
pub(crate) fn unlock_after_fork() {
    PAST.open_gate();
}

/// In a forked child: the parent speaks for itself.
pub(crate) fn forget_parent() {
    PAST.with(|past| *past = Past::default());
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "twofold: {} VM(s), {} vCPU(s), {:.3} s",
            self.vms,
            self.vcpus,
            self.time.as_secs_f64()
        )?;
        write!(f, "  exits                ")?;
        if self.exits.is_empty() {
            write!(f, "none")?;
        }
        for (index, (name, count)) in self.exits.iter().enumerate() {
            write!(f, "{}{name} {count}", if index == 0 { "" } else { ", " })?;
        }
        let [reads, writes, fetches] = self.faults;
        let [fixed, spurious, emulated] = self.outcomes;
        writeln!(f)?;
        writeln!(
            f,
            "  second-stage faults  read {reads}, write {writes}, fetch {fetches} (fixed {fixed}, spurious {spurious}, emulated {emulated})"
        )?;
        let [small, large, huge] = self.mapped;
        writeln!(
            f,
            "  mappings made        4K {small}, 2M {large}, 1G {huge}"
        )?;
        writeln!(f, "  TLB flushes          {}", self.tlb_flushes)?;
        write!(f, "  instructions         {}", self.instructions)?;
        if !self.time.is_zero() && self.instructions != 0 {
            let rate = self.instructions as f64 / self.time.as_secs_f64() / 1e6;
            write!(f, " ({rate:.1} million a second)")?;
        }
        Ok(())
    }
}
