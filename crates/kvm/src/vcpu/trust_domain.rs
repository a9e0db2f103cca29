//! A vCPU that the TDX module knows: how it starts, and what its program may still ask of it.

use super::{VcpuState, lapic};
use crate::td::TdVcpu;
use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_cpuid_entry2};
use twofold_cpu::{Registers, SystemRegisters};

impl VcpuState {
    /// What the vCPU is to the module, once it has been made known there.
    pub(crate) fn td(&self) -> Option<&TdVcpu> {
        self.td.as_ref()
    }

    /// The CPUID table that the program has set.
    pub(crate) fn cpuid(&self) -> &[kvm_cpuid_entry2] {
        &self.cpuid
    }

    /// Makes the vCPU one of the module's: with these registers, and with its local APIC in x2APIC mode.
    pub(crate) fn start_td(&mut self, td: TdVcpu, registers: &Registers, system: &SystemRegisters) {
        self.td = Some(td);
        self.cpu.set_system_registers(system);
        self.cpu.set_registers(registers);
        self.mp_state = KVM_MP_STATE_RUNNABLE;
        let base = self.apic_base | lapic::base::X2APIC;
        if let Some(lapic) = &mut self.lapic {
            lapic.set_base(self.apic_base, base);
        }
        self.apic_base = base;
    }
}
