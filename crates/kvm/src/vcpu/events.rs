//! Events and run state: `KVM_GET_VCPU_EVENTS`, `KVM_INTERRUPT`, `KVM_GET_MP_STATE`, debug
//! registers and `KVM_SET_GUEST_DEBUG`.

use super::inbox::Inbox;
use super::{Ask, VcpuState};
use crate::irqchip::Model;
use kvm_bindings::{
    KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_INJECT_BP, KVM_GUESTDBG_INJECT_DB,
    KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, KVM_GUESTDBG_USE_SW_BP,
    KVM_MP_STATE_AP_RESET_HOLD, KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED,
    KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_SIPI_RECEIVED, KVM_MP_STATE_UNINITIALIZED,
    KVM_NR_INTERRUPTS, KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_PAYLOAD,
    KVM_VCPUEVENT_VALID_SHADOW, KVM_VCPUEVENT_VALID_SIPI_VECTOR, KVM_VCPUEVENT_VALID_SMM,
    KVM_VCPUEVENT_VALID_TRIPLE_FAULT, kvm_debugregs, kvm_guest_debug, kvm_mp_state,
    kvm_vcpu_events,
};
use rustix::io::Errno;
use twofold_cpu::{DebugControl, DebugRegisters, Events, Exception, vector};

/// Flags that `KVM_SET_VCPU_EVENTS` knows. The last needs a capability that is not offered.
const KNOWN_FLAGS: u32 = KVM_VCPUEVENT_VALID_NMI_PENDING
    | KVM_VCPUEVENT_VALID_SIPI_VECTOR
    | KVM_VCPUEVENT_VALID_SHADOW
    | KVM_VCPUEVENT_VALID_SMM
    | KVM_VCPUEVENT_VALID_PAYLOAD
    | KVM_VCPUEVENT_VALID_TRIPLE_FAULT;

/// Bits of `interrupt.shadow`.
const SHADOW_MOV_SS: u8 = 1;
const SHADOW_STI: u8 = 2;

impl VcpuState {
    /// `KVM_GET_VCPU_EVENTS`. Whether an exception is still pending or already injected is told
    /// apart only with `KVM_CAP_EXCEPTION_PAYLOAD`.
    pub(super) fn events(&self, payload_enabled: bool) -> kvm_vcpu_events {
        let now = self.cpu.events();
        let mut events = kvm_vcpu_events::default();
        if let Some(exception) = now.exception {
            let injected = self.exception_injected || !payload_enabled;
            events.exception.injected = injected.into();
            events.exception.pending = (!injected).into();
            events.exception.nr = exception.vector;
            events.exception.has_error_code = exception.error_code.is_some().into();
            events.exception.error_code = exception.error_code.unwrap_or(0);
            if let (Some(payload), true) = (exception.payload, payload_enabled) {
                events.exception_has_payload = 1;
                events.exception_payload = payload;
            }
        }
        if let Some(vector) = now.interrupt {
            events.interrupt.injected = 1;
            events.interrupt.nr = vector;
        }
        events.interrupt.shadow = if now.mov_ss_shadow { SHADOW_MOV_SS } else { 0 }
            | if now.sti_shadow { SHADOW_STI } else { 0 };
        events.nmi.injected = now.nmi_injected.into();
        events.nmi.pending = now.nmi_pending.into();
        events.nmi.masked = now.nmi_masked.into();
        events.flags = KVM_VCPUEVENT_VALID_NMI_PENDING
            | KVM_VCPUEVENT_VALID_SHADOW
            | KVM_VCPUEVENT_VALID_SMM
            | if payload_enabled {
                KVM_VCPUEVENT_VALID_PAYLOAD
            } else {
                0
            };
        events
    }

    /// `KVM_SET_VCPU_EVENTS`: `EINVAL` for unknown flags, flags whose capability is not enabled,
    /// and vectors that are no exception.
    pub(super) fn set_events(
        &mut self,
        events: &kvm_vcpu_events,
        payload_enabled: bool,
    ) -> Result<(), Errno> {
        if events.flags & !KNOWN_FLAGS != 0 {
            return Err(Errno::INVAL);
        }
        let mut injected = events.exception.injected != 0;
        let mut pending = false;
        let mut payload = None;
        if events.flags & KVM_VCPUEVENT_VALID_PAYLOAD != 0 {
            if !payload_enabled {
                return Err(Errno::INVAL);
            }
            pending = events.exception.pending != 0;
            if pending {
                injected = false;
                payload = (events.exception_has_payload != 0).then_some(events.exception_payload);
            }
        }
        if (injected || pending) && (events.exception.nr > 31 || events.exception.nr == vector::NMI)
        {
            return Err(Errno::INVAL);
        }
        if events.flags & KVM_VCPUEVENT_VALID_TRIPLE_FAULT != 0 {
            return Err(Errno::INVAL);
        }
        let now = self.cpu.events();
        let mut next = Events {
            exception: (injected || pending).then(|| Exception {
                vector: events.exception.nr,
                error_code: (events.exception.has_error_code != 0)
                    .then_some(events.exception.error_code),
                payload,
            }),
            interrupt: (events.interrupt.injected != 0).then_some(events.interrupt.nr),
            nmi_injected: events.nmi.injected != 0,
            nmi_pending: now.nmi_pending,
            nmi_masked: events.nmi.masked != 0,
            sti_shadow: now.sti_shadow,
            mov_ss_shadow: now.mov_ss_shadow,
        };
        if events.flags & KVM_VCPUEVENT_VALID_SHADOW != 0 {
            next.sti_shadow = events.interrupt.shadow & SHADOW_STI != 0;
            next.mov_ss_shadow = events.interrupt.shadow & SHADOW_MOV_SS != 0;
        }
        if events.flags & KVM_VCPUEVENT_VALID_NMI_PENDING != 0 {
            next.nmi_pending = events.nmi.pending != 0;
        }
        self.exception_injected = injected;
        self.cpu.set_events(&next);
        Ok(())
    }

    /// `KVM_INTERRUPT`: `EINVAL` for a vector above 255; `ENXIO` where an in-kernel interrupt
    /// controller delivers interrupts; `EEXIST` where a split one still holds one.
    pub(super) fn interrupt(&mut self, irq: u32, irqchip: Model) -> Result<(), Errno> {
        let vector = u8::try_from(irq).map_err(|_| Errno::INVAL)?;
        debug_assert!(irq < KVM_NR_INTERRUPTS);
        match irqchip {
            Model::Kernel => return Err(Errno::NXIO),
            Model::Split if self.external.is_some() => return Err(Errno::EXIST),
            // It is the vCPU's to take, as one of the PICs' would be.
            Model::Split => self.external = Some(vector),
            Model::None => self.cpu.inject_interrupt(vector),
        }
        Ok(())
    }

    /// `KVM_GET_MP_STATE`
    pub(super) fn mp_state(&self) -> kvm_mp_state {
        kvm_mp_state {
            mp_state: self.mp_state,
        }
    }

    /// `KVM_SET_MP_STATE`: `EINVAL` for unknown states, and for all but "runnable" without an
    /// in-kernel local APIC.
    pub(super) fn set_mp_state(
        &mut self,
        state: &kvm_mp_state,
        irqchip: Model,
        inbox: &Inbox,
    ) -> Result<(), Errno> {
        match state.mp_state {
            KVM_MP_STATE_RUNNABLE => {}
            KVM_MP_STATE_UNINITIALIZED
            | KVM_MP_STATE_HALTED
            | KVM_MP_STATE_AP_RESET_HOLD
            | KVM_MP_STATE_INIT_RECEIVED
            | KVM_MP_STATE_SIPI_RECEIVED
                if irqchip != Model::None => {}
            _ => return Err(Errno::INVAL),
        }
        self.mp_state = state.mp_state;
        if state.mp_state == KVM_MP_STATE_SIPI_RECEIVED {
            // The message is to be taken yet.
            self.mp_state = KVM_MP_STATE_INIT_RECEIVED;
            inbox.ask(Ask::START);
        }
        Ok(())
    }

    /// `KVM_GET_DEBUGREGS`
    pub(super) fn debugregs(&self) -> kvm_debugregs {
        let DebugRegisters { db, dr6, dr7 } = self.cpu.debug_registers();
        kvm_debugregs {
            db,
            dr6,
            dr7,
            flags: 0,
            reserved: [0; 9],
        }
    }

    /// `KVM_SET_DEBUGREGS`: `EINVAL` for flags and for upper halves of DR6 and DR7.
    pub(super) fn set_debugregs(&mut self, debug: &kvm_debugregs) -> Result<(), Errno> {
        if debug.flags != 0 || debug.dr6 >> 32 != 0 || debug.dr7 >> 32 != 0 {
            return Err(Errno::INVAL);
        }
        let kvm_debugregs { db, dr6, dr7, .. } = *debug;
        self.cpu
            .set_debug_registers(&DebugRegisters { db, dr6, dr7 });
        Ok(())
    }

    /// `KVM_SET_GUEST_DEBUG`: `EBUSY` if an exception is to be injected while one waits.
    pub(super) fn set_guest_debug(&mut self, debug: &kvm_guest_debug) -> Result<(), Errno> {
        let control = debug.control;
        if control & (KVM_GUESTDBG_INJECT_DB | KVM_GUESTDBG_INJECT_BP) != 0 {
            if self.cpu.events().exception.is_some() {
                return Err(Errno::BUSY);
            }
            let vector = if control & KVM_GUESTDBG_INJECT_DB != 0 {
                vector::DB
            } else {
                vector::BP
            };
            self.cpu.queue_exception(Exception {
                vector,
                error_code: None,
                payload: None,
            });
            self.exception_injected = false;
        }
        let enabled = control & KVM_GUESTDBG_ENABLE != 0;
        let wants = |bit: u32| enabled && control & bit != 0;
        let [db0, db1, db2, db3, _, _, _, dr7] = debug.arch.debugreg;
        self.cpu.set_debug_control(&DebugControl {
            single_step: wants(KVM_GUESTDBG_SINGLESTEP),
            software_breakpoints: wants(KVM_GUESTDBG_USE_SW_BP),
            hardware_breakpoints: wants(KVM_GUESTDBG_USE_HW_BP)
                .then_some(([db0, db1, db2, db3], dr7)),
            block_interrupts: wants(KVM_GUESTDBG_BLOCKIRQ),
        });
        Ok(())
    }
}
