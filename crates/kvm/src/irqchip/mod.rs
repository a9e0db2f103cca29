//! The interrupt controllers that a program may ask the kernel for.
//!
//! They are accepted, and their state can be set and read back, because programs create them for
//! guests that hardly use them. A local APIC in x2APIC mode delivers what its own vCPU sends to
//! itself; nothing else is delivered: a guest that halts to wait for an interrupt, or touches
//! another controller, ends in `KVM_EXIT_INTERNAL_ERROR` with a log line.

mod message;
mod timers;

pub(crate) use message::{Address, AddressMode, Delivery, Destination, Message};
pub(crate) use timers::{Timers, now};

use crate::capability::MAX_IRQ_ROUTES;
use crate::vm::Vm;
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQFD_FLAG_DEASSIGN,
    KVM_IRQFD_FLAG_RESAMPLE, kvm_irqchip, kvm_irqfd, kvm_pit_state2,
};
use rustix::io::Errno;
use std::sync::atomic::Ordering;

/// Which controllers the hypervisor has to provide.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) enum Model {
    /// None: the program injects interrupts itself.
    #[default]
    None,
    /// `KVM_CREATE_IRQCHIP`: two PICs, an I/O APIC, a local APIC for each vCPU.
    Kernel,
    /// `KVM_CAP_SPLIT_IRQCHIP`: only the local APICs.
    Split,
}

/// The controllers of one VM.
#[derive(Default)]
pub(crate) struct Irqchip {
    pub(crate) model: Model,
    chips: [kvm_irqchip; 3],
    pit: Option<kvm_pit_state2>,
}

impl Irqchip {
    /// `KVM_CREATE_IRQCHIP` and `KVM_CAP_SPLIT_IRQCHIP`: `EEXIST` if there is one; if there are
    /// vCPUs, `EINVAL` for the first and `EEXIST` for the second.
    pub(crate) fn create(&mut self, model: Model, has_vcpus: bool) -> Result<(), Errno> {
        if self.model != Model::None {
            return Err(Errno::EXIST);
        }
        if has_vcpus {
            return Err(if model == Model::Kernel {
                Errno::INVAL
            } else {
                Errno::EXIST
            });
        }
        self.model = model;
        for (chip, state) in self.chips.iter_mut().enumerate() {
            state.chip_id = chip as u32;
        }
        Ok(())
    }

    /// `KVM_GET_IRQCHIP`: `ENXIO` without in-kernel controllers, `EINVAL` for an unknown one.
    pub(crate) fn chip(&self, id: u32) -> Result<kvm_irqchip, Errno> {
        Ok(self.chips[self.index(id)?])
    }

    /// `KVM_SET_IRQCHIP`, with the same errors.
    pub(crate) fn set_chip(&mut self, chip: &kvm_irqchip) -> Result<(), Errno> {
        let index = self.index(chip.chip_id)?;
        self.chips[index] = *chip;
        Ok(())
    }

    fn index(&self, id: u32) -> Result<usize, Errno> {
        if self.model != Model::Kernel {
            return Err(Errno::NXIO);
        }
        match id {
            KVM_IRQCHIP_PIC_MASTER | KVM_IRQCHIP_PIC_SLAVE | KVM_IRQCHIP_IOAPIC => Ok(id as usize),
            _ => Err(Errno::INVAL),
        }
    }

    /// `KVM_CREATE_PIT2`: `EEXIST` if there is one, `ENOENT` without the PICs that it raises.
    pub(crate) fn create_pit(&mut self) -> Result<(), Errno> {
        if self.pit.is_some() {
            return Err(Errno::EXIST);
        }
        if self.model != Model::Kernel {
            return Err(Errno::NOENT);
        }
        self.pit = Some(kvm_pit_state2::default());
        Ok(())
    }

    /// `KVM_GET_PIT2`: `ENXIO` if there is none.
    pub(crate) fn pit(&self) -> Result<kvm_pit_state2, Errno> {
        self.pit.ok_or(Errno::NXIO)
    }

    /// `KVM_SET_PIT2`: `ENXIO` if there is none.
    pub(crate) fn set_pit(&mut self, state: &kvm_pit_state2) -> Result<(), Errno> {
        *self.pit.as_mut().ok_or(Errno::NXIO)? = *state;
        Ok(())
    }

    /// Whether a port belongs to a controller that the hypervisor should have emulated.
    pub(crate) fn owns_port(&self, port: u16) -> bool {
        self.model == Model::Kernel && matches!(port, 0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1)
            || self.pit.is_some() && matches!(port, 0x40..=0x43 | 0x61)
    }
}

/// Whether memory belongs to a controller: the local APIC's page, or the I/O APIC's.
pub(crate) fn owns_memory(model: Model, apic_base: u64, address: u64) -> bool {
    const ENABLED: u64 = 1 << 11;
    let page = address & !0xfff;
    match model {
        Model::None => false,
        Model::Split => apic_base & ENABLED != 0 && page == apic_base & !0xfff,
        Model::Kernel => {
            page == 0xfec0_0000 || apic_base & ENABLED != 0 && page == apic_base & !0xfff
        }
    }
}

impl Vm {
    /// `KVM_CREATE_IRQCHIP`
    ///
    /// # Errors
    /// `EEXIST` if there is one, `EINVAL` once there are vCPUs, and for a trust domain: an I/O APIC
    /// would have to see the end of interrupts.
    pub fn create_irqchip(&self) -> Result<(), Errno> {
        if self.td().is_some() {
            return Err(Errno::INVAL);
        }
        self.create_irqchip_model(Model::Kernel)
    }

    pub(crate) fn create_irqchip_model(&self, model: Model) -> Result<(), Errno> {
        let mut config = self.config.lock();
        let has_vcpus = !config.vcpus.is_empty();
        config.irqchip.create(model, has_vcpus)?;
        let number = if model == Model::Kernel { 1 } else { 2 };
        self.irqchip_model.store(number, Ordering::Relaxed);
        Ok(())
    }

    /// `KVM_GET_IRQCHIP`
    ///
    /// # Errors
    /// `ENXIO` without in-kernel controllers, `EINVAL` for an unknown one.
    pub fn get_irqchip(&self, id: u32) -> Result<kvm_irqchip, Errno> {
        self.config.lock().irqchip.chip(id)
    }

    /// `KVM_SET_IRQCHIP`
    ///
    /// # Errors
    /// As [`Self::get_irqchip`].
    pub fn set_irqchip(&self, chip: &kvm_irqchip) -> Result<(), Errno> {
        self.config.lock().irqchip.set_chip(chip)
    }

    /// `KVM_CREATE_PIT2`
    ///
    /// # Errors
    /// `EEXIST` if there is one, `ENOENT` without in-kernel PICs.
    pub fn create_pit(&self) -> Result<(), Errno> {
        self.config.lock().irqchip.create_pit()?;
        self.pit.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// `KVM_GET_PIT2`
    ///
    /// # Errors
    /// `ENXIO` if there is none.
    pub fn get_pit(&self) -> Result<kvm_pit_state2, Errno> {
        self.config.lock().irqchip.pit()
    }

    /// `KVM_SET_PIT2`
    ///
    /// # Errors
    /// `ENXIO` if there is none.
    pub fn set_pit(&self, state: &kvm_pit_state2) -> Result<(), Errno> {
        self.config.lock().irqchip.set_pit(state)
    }

    /// `KVM_IRQ_LINE`: the level of a line of an in-kernel controller, which delivers nothing.
    ///
    /// # Errors
    /// `ENXIO` without an in-kernel controller.
    pub fn irq_line(&self, irq: u32, level: bool) -> Result<(), Errno> {
        if self.irqchip_model() == Model::None {
            return Err(Errno::NXIO);
        }
        if level {
            tracing::warn!(
                irq,
                "an interrupt for the in-kernel controller is not delivered"
            );
        }
        Ok(())
    }

    /// `KVM_SET_GSI_ROUTING`: checked; there is nothing to route.
    ///
    /// # Errors
    /// `EINVAL` without an in-kernel controller, for more than 4096 routes, and for flags.
    pub fn set_gsi_routing(&self, routes: u32, flags: u32) -> Result<(), Errno> {
        if self.irqchip_model() == Model::None || routes > MAX_IRQ_ROUTES || flags != 0 {
            return Err(Errno::INVAL);
        }
        Ok(())
    }

    /// `KVM_IRQFD`: interrupts from eventfds need an interrupt controller that delivers them.
    ///
    /// # Errors
    /// `EINVAL` for unknown flags, and for every attempt to attach one: without an in-kernel
    /// controller as in KVM, with it since it delivers none. There is never one to detach, which is
    /// no error.
    pub fn irqfd(&self, request: &kvm_irqfd) -> Result<(), Errno> {
        if request.flags & !(KVM_IRQFD_FLAG_DEASSIGN | KVM_IRQFD_FLAG_RESAMPLE) != 0 {
            return Err(Errno::INVAL);
        }
        if request.flags & KVM_IRQFD_FLAG_DEASSIGN != 0 {
            return Ok(());
        }
        tracing::warn!(
            gsi = request.gsi,
            "irqfd needs an interrupt controller that is not emulated"
        );
        Err(Errno::INVAL)
    }
}

impl Vm {
    pub(crate) fn acknowledge_external(&self) -> Option<u8> {
        None
    }
    pub(crate) fn wants_end_of(&self, _vector: u8) -> bool {
        false
    }
    pub(crate) fn end_interrupt(&self, _vector: u8, _level: bool) {}
}
