//! INIT and the start-up message: how one processor of a guest starts another (SDM Vol. 3,
//! "Processor State After Reset" and "Multiple-Processor Initialization").

use super::{APIC_BASE_BSP, VcpuState};
use crate::cpuid;
use kvm_bindings::{KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE};
use twofold_cpu::state::gpr;
use twofold_cpu::{DebugRegisters, Events, Registers, SystemRegisters};

/// CR0.NW and CR0.CD, which INIT leaves alone, and CR0.ET.
const CR0_CACHES: u64 = 3 << 29;
const CR0_ET: u64 = 1 << 4;
/// EDX after reset without a CPUID table: a processor of family 6.
const SIGNATURE: u32 = 0x600;

impl VcpuState {
    /// INIT: the registers are those after reset, but for what INIT leaves alone: MSRs, vector
    /// registers, caches. The bootstrap processor then runs its firmware; others wait for a start-up
    /// message.
    pub(super) fn init(&mut self) {
        let cr0 = self.cpu.system_registers().cr0 & CR0_CACHES | CR0_ET;
        self.cpu.set_system_registers(&SystemRegisters {
            cr0,
            ..SystemRegisters::reset()
        });
        let signature = cpuid::find(&self.cpuid, 1, 0).map_or(SIGNATURE, |leaf| leaf.eax);
        let mut registers = Registers {
            rip: 0xfff0,
            rflags: 2,
            ..Registers::default()
        };
        registers.gpr[gpr::RDX] = signature.into();
        self.cpu.set_registers(&registers);
        self.cpu.set_debug_registers(&DebugRegisters {
            db: [0; 4],
            dr6: 0xffff_0ff0,
            dr7: 0x400,
        });
        self.cpu.set_events(&Events::default());
        self.paravirt.forget_clock();
        self.external = None;
        self.unhalted = false;
        if let Some(lapic) = &mut self.lapic {
            lapic.reset();
        }
        self.mp_state = if self.apic_base & APIC_BASE_BSP != 0 {
            KVM_MP_STATE_RUNNABLE
        } else {
            KVM_MP_STATE_INIT_RECEIVED
        };
    }

    /// A start-up message: a processor that waits for one begins at the page that it names.
    pub(super) fn start_up(&mut self, vector: u8) {
        if self.mp_state != KVM_MP_STATE_INIT_RECEIVED {
            return;
        }
        let mut system = self.cpu.system_registers();
        system.cs.selector = u16::from(vector) << 8;
        system.cs.base = u64::from(vector) << 12;
        self.cpu.set_system_registers(&system);
        let registers = self.cpu.registers();
        self.cpu.set_registers(&Registers {
            rip: 0,
            ..registers
        });
        self.mp_state = KVM_MP_STATE_RUNNABLE;
    }
}
