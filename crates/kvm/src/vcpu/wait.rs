//! A vCPU that does not run: halted, or not started yet. Its thread sleeps in `KVM_RUN` until there
//! is an interrupt, a message of another vCPU, or a signal.

use super::inbox::NEVER;
use super::lapic::{Effect, Ended};
use super::run::Next;
use super::{Ask, Vcpu, VcpuState};
use crate::irqchip::{self, Model};
use kvm_bindings::{
    KVM_EXIT_HLT, KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED,
};
use rustix::io::Errno;
use std::sync::atomic::Ordering;
use std::time::Duration;

impl Vcpu {
    /// The guest halts. It is the program that waits, unless the local APIC is ours.
    pub(super) fn halt(&self, state: &mut VcpuState) -> Result<Next, Errno> {
        self.core.counters.halt_exits.increment();
        if self.vm.irqchip_model() == Model::None && !self.vm.halts_in_guest() {
            self.core.run.set_exit_reason(KVM_EXIT_HLT);
            return Ok(Next::Return(KVM_EXIT_HLT));
        }
        state.mp_state = KVM_MP_STATE_HALTED;
        self.wait_until_runnable(state)?;
        Ok(Next::Enter)
    }

    /// Waits until the vCPU may run.
    ///
    /// # Errors
    /// `EINTR` after a signal, or with `immediate_exit` set; `EAGAIN` when a vCPU that nobody had
    /// started has been told to wait for a start-up message: KVM has its program call again.
    pub(super) fn wait_until_runnable(&self, state: &mut VcpuState) -> Result<(), Errno> {
        // This thread keeps the time now.
        self.core.inbox.set_alarm(NEVER);
        let result = self.wait(state);
        self.set_alarm(state);
        result
    }

    fn wait(&self, state: &mut VcpuState) -> Result<(), Errno> {
        let was_unknown = state.mp_state == KVM_MP_STATE_UNINITIALIZED;
        loop {
            self.take_requests(state);
            let VcpuState { lapic, cpu, .. } = state;
            if let Some(lapic) = lapic {
                lapic.settle_timer(cpu);
            }
            if state.mp_state == KVM_MP_STATE_HALTED && state.has_event(self.vm.has_external()) {
                state.mp_state = KVM_MP_STATE_RUNNABLE;
                state.unhalted = false;
            }
            if was_unknown && state.mp_state != KVM_MP_STATE_UNINITIALIZED {
                return Err(Errno::AGAIN);
            }
            if state.mp_state == KVM_MP_STATE_RUNNABLE {
                return Ok(());
            }
            if self.core.run.immediate_exit() {
                return Err(Errno::INTR);
            }
            if self.is_signalled() {
                return Err(self.interrupted());
            }
            let alarm = state
                .lapic
                .as_ref()
                .and_then(|lapic| lapic.alarm(&state.cpu));
            let timeout = alarm.map(|at| Duration::from_nanos(at.saturating_sub(irqchip::now())));
            self.core.inbox.sleep(timeout, || self.is_signalled());
        }
    }

    fn is_signalled(&self) -> bool {
        self.core.signalled.load(Ordering::Relaxed)
    }

    /// Meets what others have asked of the vCPU since it looked last.
    #[inline]
    pub(super) fn meet_requests(&self, state: &mut VcpuState) {
        if !self.core.inbox.is_asked() {
            return;
        }
        let asked = self.take_requests(state);
        if asked.contains(Ask::ALARM) {
            self.set_alarm(state);
        }
        if asked.intersects(Ask::ALARM | Ask::CLOCK) && state.paravirt.is_used() {
            self.update_paravirt(state);
        }
    }

    /// Meets what others have asked, but for setting the alarm anew: what was asked.
    fn take_requests(&self, state: &mut VcpuState) -> Ask {
        let inbox = &self.core.inbox;
        if !inbox.is_asked() {
            return Ask::empty();
        }
        let asked = inbox.take();
        if let Some(lapic) = &mut state.lapic {
            lapic.collect();
            if asked.contains(Ask::ALARM) {
                lapic.settle_timer(&state.cpu);
            }
        }
        if asked.contains(Ask::NMI) {
            state.cpu.inject_nmi();
            self.core.counters.nmi_injections.increment();
        }
        if asked.contains(Ask::UNHALT) {
            state.unhalted = true;
        }
        // A trust domain's processors are the module's to start.
        if self.vm.td().is_none() {
            if asked.contains(Ask::INIT) {
                state.init();
            }
            if asked.contains(Ask::START) {
                state.start_up(inbox.start_vector());
            }
        }
        asked
    }

    /// Has the vCPU woken when its timer expires.
    pub(super) fn set_alarm(&self, state: &VcpuState) {
        let alarm = state
            .lapic
            .as_ref()
            .and_then(|lapic| lapic.alarm(&state.cpu));
        let at = alarm.unwrap_or(NEVER);
        self.core.inbox.set_alarm(at);
        self.vm.timers().note(&self.vm, at);
    }

    /// Does what a write of the local APIC asks of others.
    pub(super) fn carry_out(&self, state: &mut VcpuState, effect: Effect) {
        match effect {
            Effect::None => {}
            Effect::Timer => self.set_alarm(state),
            Effect::Send(message) => {
                self.vm.deliver(&message, Some(&self.core));
            }
            Effect::Ended(Ended { vector, level }) => match self.vm.irqchip_model() {
                Model::Split if self.vm.wants_end_of(vector) => state.ended = Some(vector),
                Model::Kernel => self.vm.end_interrupt(vector, level),
                Model::None | Model::Split => {}
            },
        }
    }
}

impl VcpuState {
    /// Whether a halted vCPU has something to go on for; `external` if the PICs have an interrupt.
    fn has_event(&self, external: bool) -> bool {
        let events = self.cpu.events();
        events.exception.is_some()
            || events.nmi_injected
            || events.nmi_pending && !events.nmi_masked
            || events.interrupt.is_some()
            || self.unhalted
            || self.cpu.interrupts_enabled() && self.has_interrupt(external)
    }

    /// Whether the local APIC, the PICs (`external`) or the program have an interrupt for the guest.
    pub(super) fn has_interrupt(&self, external: bool) -> bool {
        self.cpu.events().interrupt.is_some()
            || self.external.is_some()
            || self.lapic.as_ref().is_some_and(|lapic| {
                lapic.pending(self.cpu.cr8()).is_some() || external && lapic.takes_external()
            })
    }
}
