//! A vCPU that the TDX module knows: how it starts, which tables it walks, and how its guest runs.

use super::signal::Running;
use super::{Vcpu, VcpuState, lapic, processor_table, tdcall};
use crate::cpuid;
use crate::memory_key::Open;
use crate::td::{Td, TdVcpu};
use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_cpuid_entry2};
use rustix::io::Errno;
use std::sync::atomic::Ordering;
use twofold_arch::eptp::Eptp;
use twofold_arch::{Gpa, Level, Pferr};
use twofold_cpu::{Exit, Registers, SecondStage, SystemRegisters, VeControl};
use twofold_mmu::{Reader, TdRoots};

impl Vcpu {
    /// Runs the guest of a trust domain until it leaves for KVM. What the TDX module does by itself
    /// is done inside; whatever KVM does comes after the virtual processor has left, since it may
    /// have to wait until all of them have.
    pub(super) fn run_td(&self, td: &Td, state: &mut VcpuState) -> Result<Exit, Errno> {
        let vcpu = state.td.ok_or(Errno::INVAL)?;
        let wanted = || self.core.signalled.load(Ordering::Relaxed);
        let Some(inside) = td.enter(vcpu, wanted)? else {
            return Ok(Exit::Kicked);
        };
        if inside.must_flush() {
            self.walk_td_tables(td, state);
        }
        let _open = Open::new();
        loop {
            let exit = state.cpu.run();
            if let Some(exit) = tdcall::inside(self, state, &inside, exit)? {
                return Ok(exit);
            }
        }
    }

    /// Makes sure that there are the roots of both halves.
    pub(super) fn load_td_roots(&self, td: &Td, state: &mut VcpuState) -> Result<(), Errno> {
        if let Some(roots) = &state.td_roots
            && !roots.is_obsolete()
        {
            return Ok(());
        }
        let roots = self.vm.tables().load_td_roots();
        state.td_roots = Some(roots.map_err(|_| Errno::NOMEM)?.ok_or(Errno::INVAL)?);
        self.walk_td_tables(td, state);
        Ok(())
    }

    /// Has the processor walk the tables of both halves, and forget every translation.
    fn walk_td_tables(&self, td: &Td, state: &mut VcpuState) {
        let root = td.tdr().ok().and_then(|tdr| td.module().sept_root(tdr));
        let (Some((secure, levels)), Some(params), Some(roots)) =
            (root, td.params(), &state.td_roots)
        else {
            return;
        };
        let level = Level::from_number(levels).unwrap_or(Level::L512G);
        state.cpu.set_second_stage(SecondStage::Td {
            secure: Eptp::new(secure, level, false),
            shared: Eptp::new(roots.shared().hpa(), level, false),
            shared_bit: params.shared_bit() as u8,
        });
    }

    /// `KVM_SET_CPUID2` of a vCPU of a trust domain: what the guest is told when it asks KVM. Its
    /// processor is described by what the module virtualises.
    ///
    /// # Errors
    /// As [`set_cpuid2`](Self::set_cpuid2).
    pub(super) fn set_td_cpuid(&self, table: &[kvm_cpuid_entry2]) -> Result<(), Errno> {
        let mut state = self.state();
        if state.has_run && state.cpuid != table || !cpuid::is_possible(table) {
            return Err(Errno::INVAL);
        }
        state.cpuid = table.to_vec();
        Ok(())
    }

    /// Does something that a signal may interrupt: `work` is told how to find out.
    pub(crate) fn interruptible<R>(
        &self,
        state: &mut VcpuState,
        work: impl FnOnce(&mut VcpuState, &dyn Fn() -> bool) -> R,
    ) -> R {
        let running = Running::start(&self.core, state.signal_mask);
        let result = work(state, &|| self.core.signalled.load(Ordering::Relaxed));
        drop(running);
        result
    }
}

/// An address of a trust domain without its shared bit, and the access, which says by
/// [`Pferr::PRIVATE_ACCESS`] whether it was clear.
pub(super) fn without_shared_bit(td: &Td, gpa: Gpa, error: Pferr) -> (Gpa, Pferr) {
    let shared = td.shared_bit().unwrap_or(0);
    if gpa.get() & shared != 0 {
        (Gpa::new(gpa.get() & !shared), error)
    } else {
        (gpa, error | Pferr::PRIVATE_ACCESS)
    }
}

impl VcpuState {
    /// What the vCPU is to the module, once it has been made known there.
    pub(crate) fn td(&self) -> Option<&TdVcpu> {
        self.td.as_ref()
    }

    /// What the MMU needs to map something for this vCPU, once the roots are loaded.
    pub(crate) fn td_parts(&mut self) -> Option<(&mut Reader, &TdRoots)> {
        Some((&mut self.reader, self.td_roots.as_ref()?))
    }

    /// The roots are no longer those of the VM.
    pub(crate) fn forget_td_roots(&mut self) {
        self.td_roots = None;
    }

    pub(crate) fn reader(&mut self) -> &mut Reader {
        &mut self.reader
    }

    /// The CPUID table that the program has set.
    pub(crate) fn cpuid(&self) -> &[kvm_cpuid_entry2] {
        &self.cpuid
    }

    /// Makes the vCPU one of the module's: with these registers, with a processor that `table`
    /// describes, and with its local APIC in x2APIC mode.
    pub(crate) fn start_td(
        &mut self,
        td: TdVcpu,
        registers: &Registers,
        system: &SystemRegisters,
        table: &[kvm_cpuid_entry2],
    ) {
        self.td = Some(td);
        self.cpu.set_td(true);
        self.cpu.set_cpuid(processor_table(table));
        self.cpu.set_ve(Some(VeControl {
            page: td.ve_info,
            intercept: false,
        }));
        self.cpu.set_system_registers(system);
        self.cpu.set_registers(registers);
        self.mp_state = KVM_MP_STATE_RUNNABLE;
        let base = self.apic_base | lapic::base::X2APIC;
        self.set_base(base);
    }
}
