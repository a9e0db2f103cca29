//! `KVM_RUN`: the loop between the processor, the MMU, the devices and the program.
//!
//! The ordinary path (an exit that the program asked for, and re-entry) makes no system call,
//! allocates nothing and takes one uncontended mutex.

use super::exit::Answer;
use super::run_page::PIO_DATA_SIZE;
use super::signal::Running;
use super::{Vcpu, VcpuState};
use crate::bus::Space;
use crate::cpuid;
use crate::irqchip::Model;
use crate::td::Stage;
use kvm_bindings::{
    KVM_EXIT_DIRTY_RING_FULL, KVM_EXIT_INTR, KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_SET_TPR,
    KVM_EXIT_SHUTDOWN, KVM_EXIT_UNKNOWN, KVM_INTERNAL_ERROR_EMULATION, KVM_MP_STATE_RUNNABLE,
    KVM_SYNC_X86_EVENTS, KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS, KVM_SYNC_X86_VALID_FIELDS,
    kvm_sync_regs,
};
use rustix::io::Errno;
use std::mem::offset_of;
use std::sync::atomic::Ordering;
use twofold_arch::Gpa;
use twofold_cpu::state::efer;
use twofold_cpu::{Exit, Pml};

const SYNC_FIELDS: u64 = KVM_SYNC_X86_VALID_FIELDS as u64;

/// What the loop does next.
pub(super) enum Next {
    /// Runs the guest again.
    Enter,
    /// Returns to the program with this reason, which is in the run page already.
    Return(u32),
}

impl Vcpu {
    /// `KVM_RUN`: runs the guest until the program has to do something, which `struct kvm_run`
    /// describes.
    ///
    /// # Errors
    /// `EINTR` after a signal or with `immediate_exit` set; `EFAULT` when the guest needs host
    /// memory that is not there; `EINVAL` for registers in `struct kvm_run` that no processor can
    /// hold, or fields that are not known, and for a trust domain before `INIT_VCPU` and
    /// `FINALIZE_VM`; `ENOMEM` when there is no page for a table.
    pub fn run(&self) -> Result<(), Errno> {
        let mut state = self.core.state.lock();
        let state = &mut *state;
        if let Some(td) = self.vm.td()
            && (state.td.is_none() || td.stage() != Stage::Runnable)
        {
            return Err(Errno::INVAL);
        }
        let running = Running::start(&self.core, state.signal_mask);
        let result = self.run_locked(state);
        drop(running);
        result
    }

    fn run_locked(&self, state: &mut VcpuState) -> Result<(), Errno> {
        let result = match self.prepare(state) {
            Ok(None) => self.enter_guest(state),
            Ok(Some(reason)) => Ok(reason),
            Err(error) => Err(error),
        };
        let page = &self.core.run;
        if page.valid_regs() & SYNC_FIELDS != 0 && result != Err(Errno::INVAL) {
            self.store_sync_regs(state);
        }
        let open = state.cpu.interrupt_window_open();
        let interrupts = state.cpu.interrupts_enabled();
        let ready = match self.vm.irqchip_model() {
            Model::None => open,
            // Interrupts of the program's PICs come beside those of the local APIC.
            Model::Split => open && state.takes_external(),
            Model::Kernel => true,
        };
        match state.td {
            None => page.set_summary(ready, interrupts, state.cpu.cr8(), state.apic_base),
            // The flags and the task priority of a trust domain are its own.
            Some(_) => page.set_summary(ready, false, 0, state.apic_base),
        }
        self.core
            .counters
            .instructions
            .set(state.cpu.counters().instructions);
        self.core
            .counters
            .tlb_flush
            .set(state.cpu.counters().tlb_flushes);
        match result {
            Ok(reason) => {
                self.core.counters.returns.increment(reason);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// What KVM does before it enters the guest: blocked vCPUs wait, registers and answers that
    /// the program left in the run page are taken. The reason, if the program has to do more.
    fn prepare(&self, state: &mut VcpuState) -> Result<Option<u32>, Errno> {
        let page = &self.core.run;
        if state.mp_state != KVM_MP_STATE_RUNNABLE {
            self.wait_until_runnable(state)?;
        }
        let (valid, dirty) = (page.valid_regs(), page.dirty_regs());
        let known = if self.vm.td().is_some() {
            0
        } else {
            SYNC_FIELDS
        };
        if (valid | dirty) & !known != 0 {
            return Err(Errno::INVAL);
        }
        if dirty != 0 {
            self.load_sync_regs(state, dirty)?;
        }
        if self.vm.irqchip_model() == Model::None {
            let cr8 = page.cr8();
            if cr8 > 0xf {
                return Err(Errno::INVAL);
            }
            if cr8 != state.cpu.cr8() {
                state.cpu.set_cr8(cr8);
            }
        }
        if state.paravirt.is_used() {
            self.update_paravirt(state);
        }
        Ok(self.take_answer(state))
    }

    /// Hands the processor what the program supplied for the exit before. The reason, if the program
    /// has to do more.
    #[inline]
    fn take_answer(&self, state: &mut VcpuState) -> Option<u32> {
        let page = &self.core.run;
        match std::mem::take(&mut state.answer) {
            Answer::None => {}
            Answer::PortInput { bytes } => {
                let mut data = [0; PIO_DATA_SIZE];
                let data = &mut data[..bytes.min(PIO_DATA_SIZE)];
                page.read_io_data(data);
                state.cpu.complete_io_in(data);
            }
            Answer::Memory { length } => {
                state
                    .cpu
                    .complete_mmio_read(&page.mmio_data()[..length.min(8)]);
            }
            Answer::Rdmsr => state.cpu.complete_rdmsr(page.msr_answer()),
            Answer::Wrmsr => state.cpu.complete_wrmsr(page.msr_answer().is_some()),
            Answer::Hypercall => state.cpu.complete_hypercall(page.hypercall_result()),
            Answer::Shutdown => {
                page.set_exit_reason(KVM_EXIT_SHUTDOWN);
                return Some(KVM_EXIT_SHUTDOWN);
            }
            Answer::Vmcall(answered) => return self.continue_vmcall(state, answered),
        }
        None
    }

    /// Runs the guest until the program has to know: the exit reason. With `immediate_exit` set it
    /// only completes the instruction that waits for an answer, if there is one.
    fn enter_guest(&self, state: &mut VcpuState) -> Result<u32, Errno> {
        let page = &self.core.run;
        if page.immediate_exit() {
            if !state.cpu.has_pending_completion() {
                return Err(Errno::INTR);
            }
            // The processor completes what waits before it looks at a kick.
            self.core.line.kick();
            let result = self.run_guest(state, true);
            self.core.line.cancel_kick();
            return result;
        }
        page.set_exit_reason(KVM_EXIT_UNKNOWN);
        state
            .cpu
            .request_interrupt_window(page.request_interrupt_window());
        self.run_guest(state, false)
    }

    fn run_guest(&self, state: &mut VcpuState, immediate: bool) -> Result<u32, Errno> {
        let page = &self.core.run;
        state.has_run = true;
        loop {
            if !immediate && state.reader.is_dirty_ring_soft_full() {
                page.set_exit_reason(KVM_EXIT_DIRTY_RING_FULL);
                return Ok(KVM_EXIT_DIRTY_RING_FULL);
            }
            if state.lapic.is_some()
                && !immediate
                && let Some(reason) = self.before_entry(state)?
            {
                return Ok(reason);
            }
            self.load_root(state)?;
            state.cpu.set_msr_exits(self.vm.filters_msrs());
            state
                .cpu
                .set_cr8_exits(self.vm.irqchip_model() == Model::None);
            let exit = match self.vm.td() {
                None => self.run_processor(state),
                Some(td) => self.run_td(td, state)?,
            };
            self.core.counters.exits.increment();
            let next = match exit {
                // The log has been emptied.
                Exit::PmlFull => Next::Enter,
                Exit::Kicked if immediate => return Err(Errno::INTR),
                Exit::Kicked => self.kicked()?,
                Exit::Io {
                    port,
                    size,
                    write,
                    count,
                } => self.port_access(state, port, size, write, count),
                Exit::SecondStage(fault) => self.second_stage_fault(state, fault)?,
                Exit::MmioRead { gpa, len } => self.memory_read(state, gpa, len),
                Exit::MmioWrite { gpa, len, data } => self.memory_write(state, gpa, len, data),
                Exit::Halt => self.halt(state)?,
                // The program's local APIC may hold an interrupt that can be delivered now.
                Exit::TaskPriority => {
                    page.set_exit_reason(KVM_EXIT_SET_TPR);
                    Next::Return(KVM_EXIT_SET_TPR)
                }
                Exit::Rdmsr { index } => self.read_msr(state, index),
                Exit::Wrmsr { index, value } => self.write_msr(state, index, value),
                Exit::Hypercall { .. } => self.hypercall(state),
                Exit::Tdcall => self.td_vmcall(state)?,
                Exit::VirtualizationException(info) => {
                    return Err(self.unexpected_ve(state, &info));
                }
                // The local APIC's interrupt is delivered on the way back.
                Exit::InterruptWindow if !page.request_interrupt_window() => Next::Enter,
                Exit::InterruptWindow => {
                    self.core.counters.irq_window_exits.increment();
                    self.core.counters.request_irq_exits.increment();
                    page.set_exit_reason(KVM_EXIT_IRQ_WINDOW_OPEN);
                    Next::Return(KVM_EXIT_IRQ_WINDOW_OPEN)
                }
                Exit::Shutdown => {
                    tracing::debug!(vcpu = self.core.id, rip = state.rip(), "triple fault");
                    page.set_exit_reason(KVM_EXIT_SHUTDOWN);
                    Next::Return(KVM_EXIT_SHUTDOWN)
                }
                Exit::Debug {
                    exception,
                    pc,
                    dr6,
                    dr7,
                } => {
                    page.set_debug(exception.into(), pc, dr6, dr7);
                    Next::Return(kvm_bindings::KVM_EXIT_DEBUG)
                }
                Exit::Unknown(instruction) => {
                    // A trust domain's code is not the program's to see.
                    let shown = self.vm.td().is_none().then_some(instruction);
                    tracing::warn!(
                        vcpu = self.core.id,
                        rip = state.rip(),
                        instruction = ?shown,
                        "the guest executed an instruction that this processor does not have"
                    );
                    let bytes = shown.as_ref().map_or(&[][..], |shown| {
                        let length = usize::from(shown.len).min(shown.bytes.len());
                        &shown.bytes[..length]
                    });
                    self.emulation_failure(bytes)
                }
                Exit::HostFault { hva } => self.host_fault(state, hva)?,
                other => {
                    tracing::error!(exit = ?other, "an exit that nobody handles");
                    self.emulation_failure(&[])
                }
            };
            if let Next::Return(reason) = next {
                return Ok(reason);
            }
        }
    }

    /// Runs the guest until the processor stops. What it has written down about the guest's writes
    /// is then in the dirty log.
    #[inline]
    fn run_processor(&self, state: &mut VcpuState) -> Exit {
        let VcpuState {
            cpu,
            reader,
            write_log: Some(log),
            ..
        } = state
        else {
            return state.cpu.run();
        };
        self.core.log.begin();
        let exit = cpu.run();
        if let Some(next) = cpu.pml_index()
            && next != Pml::FIRST
        {
            self.vm.tables().drain_pml(reader, log.entries(next));
            cpu.set_pml(Some(Pml::empty(log.page())));
        }
        self.core.log.drained();
        exit
    }

    /// Another thread or a signal handler wanted the vCPU outside the guest.
    fn kicked(&self) -> Result<Next, Errno> {
        // In this order, so that a signal that comes in between kicks again.
        self.core.line.cancel_kick();
        if self.core.signalled.load(Ordering::Relaxed) {
            return Err(self.interrupted());
        }
        Ok(Next::Enter)
    }

    /// The run was interrupted by a signal.
    pub(super) fn interrupted(&self) -> Errno {
        self.core.run.set_exit_reason(KVM_EXIT_INTR);
        self.core.counters.signal_exits.increment();
        self.core.counters.returns.increment(KVM_EXIT_INTR);
        Errno::INTR
    }

    /// Makes sure that the processor walks tables that are still the VM's.
    #[inline]
    pub(crate) fn load_root(&self, state: &mut VcpuState) -> Result<(), Errno> {
        let sub_pages = self.vm.protects_sub_pages();
        match &state.root {
            Some(root) if !root.is_obsolete() && state.asks_sub_pages == sub_pages => Ok(()),
            _ => {
                if let Some(td) = self.vm.td() {
                    return self.load_td_roots(td, state);
                }
                let bits = cpuid::guest_address_bits(&state.cpuid);
                let tables = self.vm.tables();
                let root = tables.load_root(bits).map_err(|_| Errno::NOMEM)?;
                let sppt = tables.sppt(&root);
                state.root = Some(root);
                self.set_second_stage(state);
                if let Err(error) = state.cpu.set_sppt(sppt) {
                    // The MMU made the table for this processor.
                    tracing::error!(%error, "sub-page permissions do not work");
                }
                state.asks_sub_pages = sub_pages;
                Ok(())
            }
        }
    }

    /// Has the processor walk the tables that are loaded, and forget every translation.
    fn set_second_stage(&self, state: &mut VcpuState) {
        if let Some(root) = &state.root {
            state.cpu.set_second_stage(self.vm.tables().pointer(root));
        }
    }

    fn port_access(
        &self,
        state: &mut VcpuState,
        port: u16,
        size: u8,
        write: bool,
        count: u32,
    ) -> Next {
        self.core.counters.io_exits.increment();
        if self.vm.controller_owns_port(port) {
            self.access_controller_port(state, port, size, write, count);
            return Next::Enter;
        }
        let page = &self.core.run;
        if write {
            let data = state.cpu.io_data();
            if self.vm.buses().has_devices() && self.write_ports(port, size, data) {
                return Next::Enter;
            }
            page.write_io_data(&data[..data.len().min(PIO_DATA_SIZE)]);
        } else {
            state.answer = Answer::PortInput {
                bytes: usize::from(size) * count as usize,
            };
        }
        page.set_io(write, size, port, count);
        Next::Return(kvm_bindings::KVM_EXIT_IO)
    }

    /// Offers port output to the devices. Whether one took the first item; the others then do not
    /// reach the program either, as in KVM.
    fn write_ports(&self, port: u16, size: u8, data: &[u8]) -> bool {
        let mut items = data.chunks_exact(usize::from(size.max(1)));
        let taken = items
            .next()
            .is_some_and(|item| self.vm.buses().write(Space::Port, port.into(), item));
        if taken {
            for item in items {
                self.vm.buses().write(Space::Port, port.into(), item);
            }
        }
        taken
    }

    fn memory_read(&self, state: &mut VcpuState, gpa: Gpa, length: u8) -> Next {
        self.core.counters.mmio_exits.increment();
        if let Some(data) = self.read_controller(state, gpa.get(), length.into()) {
            state.cpu.complete_mmio_read(&data);
            return Next::Enter;
        }
        state.answer = Answer::Memory {
            length: length.into(),
        };
        self.core
            .run
            .set_mmio(gpa.get(), [0; 8], length.into(), false);
        Next::Return(kvm_bindings::KVM_EXIT_MMIO)
    }

    fn memory_write(&self, state: &mut VcpuState, gpa: Gpa, length: u8, data: [u8; 8]) -> Next {
        self.core.counters.mmio_exits.increment();
        let bytes = &data[..usize::from(length).min(8)];
        if self.write_controller(state, gpa.get(), bytes)
            || self.vm.buses().write(Space::Memory, gpa.get(), bytes)
        {
            return Next::Enter;
        }
        self.core.run.set_mmio(gpa.get(), data, length.into(), true);
        Next::Return(kvm_bindings::KVM_EXIT_MMIO)
    }

    /// `KVM_EXIT_INTERNAL_ERROR` with suberror "emulation".
    pub(super) fn emulation_failure(&self, instruction: &[u8]) -> Next {
        self.core.counters.insn_emulation_fail.increment();
        if instruction.is_empty() {
            self.core
                .run
                .set_internal_error(KVM_INTERNAL_ERROR_EMULATION, &[]);
        } else {
            self.core.run.set_emulation_failure(instruction);
        }
        Next::Return(kvm_bindings::KVM_EXIT_INTERNAL_ERROR)
    }

    fn load_sync_regs(&self, state: &mut VcpuState, dirty: u64) -> Result<(), Errno> {
        let page = &self.core.run;
        if dirty & u64::from(KVM_SYNC_X86_REGS) != 0 {
            state.set_regs(&page.sync_regs_part(offset_of!(kvm_sync_regs, regs)));
            page.clear_dirty_regs(KVM_SYNC_X86_REGS.into());
        }
        if dirty & u64::from(KVM_SYNC_X86_SREGS) != 0 {
            state.set_sregs(&page.sync_regs_part(offset_of!(kvm_sync_regs, sregs)))?;
            page.clear_dirty_regs(KVM_SYNC_X86_SREGS.into());
        }
        if dirty & u64::from(KVM_SYNC_X86_EVENTS) != 0 {
            let events = page.sync_regs_part(offset_of!(kvm_sync_regs, events));
            state.set_events(&events, self.vm.exception_payload())?;
            page.clear_dirty_regs(KVM_SYNC_X86_EVENTS.into());
        }
        Ok(())
    }

    fn store_sync_regs(&self, state: &VcpuState) {
        let page = &self.core.run;
        let valid = page.valid_regs();
        if valid & u64::from(KVM_SYNC_X86_REGS) != 0 {
            page.set_sync_regs_part(offset_of!(kvm_sync_regs, regs), state.regs());
        }
        if valid & u64::from(KVM_SYNC_X86_SREGS) != 0 {
            page.set_sync_regs_part(offset_of!(kvm_sync_regs, sregs), state.sregs());
        }
        if valid & u64::from(KVM_SYNC_X86_EVENTS) != 0 {
            let events = state.events(self.vm.exception_payload());
            page.set_sync_regs_part(offset_of!(kvm_sync_regs, events), events);
        }
    }
}

impl VcpuState {
    pub(super) fn rip(&self) -> u64 {
        self.cpu.rip()
    }

    pub(super) fn is_user(&self) -> bool {
        self.cpu.privilege_level() == 3
    }

    pub(super) fn is_long_mode(&self) -> bool {
        let system = self.cpu.system_registers();
        system.efer & efer::LMA != 0 && system.cs.long
    }
}
