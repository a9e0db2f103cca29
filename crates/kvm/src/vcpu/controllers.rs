//! A vCPU between its guest and the interrupt controllers: what they have for it before it enters the
//! guest, and what the guest does with their registers.

use super::lapic::Lapic;
use super::run_page::PIO_DATA_SIZE;
use super::{Vcpu, VcpuState};
use kvm_bindings::{KVM_EXIT_IOAPIC_EOI, KVM_MP_STATE_RUNNABLE};
use rustix::io::Errno;

impl Vcpu {
    /// What a vCPU with a local APIC has to see to before it enters the guest: what others ask of it,
    /// and its interrupts. The reason, if the program has to know of something first.
    #[inline]
    pub(super) fn before_entry(&self, state: &mut VcpuState) -> Result<Option<u32>, Errno> {
        self.meet_requests(state);
        if state.mp_state != KVM_MP_STATE_RUNNABLE {
            self.wait_until_runnable(state)?;
        }
        if let Some(vector) = state.ended {
            if state.cpu.has_pending_completion() {
                // The instruction that ended the interrupt is finished first.
                self.core.line.kick();
            } else {
                state.ended = None;
                self.core.run.set_end_of_interrupt(vector);
                return Ok(Some(KVM_EXIT_IOAPIC_EOI));
            }
        }
        let program_waits = self.core.run.request_interrupt_window();
        if self.vm.has_external() && state.takes_external() && state.cpu.interrupt_window_open() {
            state.external = self.vm.acknowledge_external();
        }
        state.deliver_interrupt(program_waits, self.vm.has_external());
        Ok(None)
    }

    /// The port belongs to an interrupt controller or the interval timer of ours, which has bytes only.
    pub(super) fn access_controller_port(
        &self,
        state: &mut VcpuState,
        port: u16,
        size: u8,
        write: bool,
        count: u32,
    ) {
        let item = usize::from(size.max(1));
        if write {
            for item in state.cpu.io_data().chunks_exact(item) {
                self.vm.write_controller_port(port, item[0]);
            }
            return;
        }
        let mut data = [0; PIO_DATA_SIZE];
        let length = (item * count as usize).min(PIO_DATA_SIZE);
        for item in data[..length].chunks_exact_mut(item) {
            item[0] = self.vm.read_controller_port(port);
        }
        state.cpu.complete_io_in(&data[..length]);
    }

    /// A read of memory that belongs to an interrupt controller of ours; `None` if it does not.
    pub(super) fn read_controller(
        &self,
        state: &VcpuState,
        address: u64,
        length: usize,
    ) -> Option<[u8; 8]> {
        let lapic = state.lapic.as_ref()?;
        let mut data = [0; 8];
        if lapic.owns(address) {
            let offset = (address & 0xfff) as usize;
            data[..4].copy_from_slice(&lapic.read_memory(offset, length, state.cpu.cr8()));
            return Some(data);
        }
        if self.vm.ioapic_owns(address) {
            data[..4].copy_from_slice(&self.vm.read_ioapic(address).to_le_bytes());
            return Some(data);
        }
        None
    }

    /// A write to memory that may belong to an interrupt controller of ours. Whether it does.
    pub(super) fn write_controller(
        &self,
        state: &mut VcpuState,
        address: u64,
        data: &[u8],
    ) -> bool {
        let VcpuState { lapic, cpu, .. } = state;
        let Some(lapic) = lapic else { return false };
        if lapic.owns(address) {
            let effect = lapic.write_memory((address & 0xfff) as usize, data, cpu);
            self.carry_out(state, effect);
            return true;
        }
        if self.vm.ioapic_owns(address) {
            let mut word = [0; 4];
            let length = data.len().min(4);
            word[..length].copy_from_slice(&data[..length]);
            self.vm.write_ioapic(address, u32::from_le_bytes(word));
            return true;
        }
        false
    }
}

impl VcpuState {
    /// Whether this vCPU takes the PICs' interrupts, and has none of them.
    pub(super) fn takes_external(&self) -> bool {
        self.external.is_none() && self.lapic.as_ref().is_some_and(Lapic::takes_external)
    }

    /// Hands the processor the interrupt that waits for it, or asks to be told when it can take one.
    /// `external` if the PICs have another.
    #[inline]
    pub(super) fn deliver_interrupt(&mut self, program_waits: bool, external: bool) {
        let Some(lapic) = &mut self.lapic else { return };
        let blocked = self.cpu.debug_control().block_interrupts;
        let cr8 = self.cpu.cr8();
        if self.cpu.interrupt_window_open() && !blocked {
            if let Some(vector) = self.external.take() {
                self.cpu.inject_interrupt(vector);
            } else if let Some(vector) = lapic.pending(cr8) {
                lapic.accept(vector);
                self.cpu.inject_interrupt(vector);
            }
        }
        let waits = self.external.is_some()
            || lapic.pending(cr8).is_some()
            || external && lapic.takes_external();
        let below = lapic.wants_cr8_below(cr8);
        let wanted = program_waits || waits && !blocked || below.is_some();
        self.cpu.request_interrupt_window(wanted);
        let limit = below.filter(|_| !program_waits && !waits);
        self.cpu.limit_interrupt_window(limit);
    }
}
