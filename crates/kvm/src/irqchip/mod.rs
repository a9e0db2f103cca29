//! The interrupt controllers that a program may ask the kernel for: local APICs alone, or with them
//! two PICs, an I/O APIC and an interval timer.
//!
//! A line of the program's goes to pins of the controllers, or to local APICs, by routes that the
//! program may set. What reaches a local APIC is a [`Message`]; the vCPU finds it in its inbox.

mod chips;
mod ioapic;
mod irqfd;
mod message;
mod pic;
mod pit;
mod routing;
mod timers;

pub(crate) use message::{Address, AddressMode, Delivery, Destination, Message};
pub(crate) use timers::{Timers, now};

use crate::capability::MAX_IRQ_ROUTES;
use crate::sync::{Mutex, RwLock};
use crate::vm::Vm;
use chips::Chips;
use irqfd::IrqFds;
use kvm_bindings::{
    KVM_PIT_SPEAKER_DUMMY, kvm_irq_routing_entry, kvm_irqchip, kvm_msi, kvm_pit_config,
    kvm_pit_state2,
};
use pit::Pit;
use routing::{Route, Routes};
use rustix::io::Errno;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

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

/// Who holds a line up. A pin is up while anybody does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// `KVM_IRQ_LINE`, and eventfds that only give a pulse.
    Program,
    /// Eventfds that wait for the guest to have served the line.
    Resampled,
    Timer,
}

/// The controllers of one VM, beside the local APICs.
#[derive(Debug, Default)]
pub(crate) struct Controllers {
    chips: Mutex<Chips>,
    pit: Mutex<Option<Pit>>,
    has_pit: AtomicBool,
    routes: RwLock<Arc<Routes>>,
    /// Lines that stand for the pins of the program's I/O APIC.
    reserved_pins: AtomicU32,
    /// Vectors whose end that I/O APIC wants to hear of.
    level_vectors: [AtomicU64; 4],
    irqfds: IrqFds,
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
        self.create_irqchip_model(Model::Kernel, Errno::INVAL)?;
        *self.controllers.routes.write() = Arc::new(Routes::pc());
        Ok(())
    }

    /// `KVM_CAP_SPLIT_IRQCHIP`, with so many lines for the pins of the program's I/O APIC: `EEXIST`
    /// if there is a controller, and once there are vCPUs.
    pub(crate) fn create_split_irqchip(&self, pins: u32) -> Result<(), Errno> {
        self.create_irqchip_model(Model::Split, Errno::EXIST)?;
        self.controllers
            .reserved_pins
            .store(pins, Ordering::Relaxed);
        Ok(())
    }

    fn create_irqchip_model(&self, model: Model, too_late: Errno) -> Result<(), Errno> {
        let config = self.config.lock();
        if self.irqchip_model() != Model::None {
            return Err(Errno::EXIST);
        }
        if !config.vcpus.is_empty() {
            return Err(too_late);
        }
        let number = if model == Model::Kernel { 1 } else { 2 };
        self.irqchip_model.store(number, Ordering::Relaxed);
        Ok(())
    }

    /// `KVM_GET_IRQCHIP`
    ///
    /// # Errors
    /// `ENXIO` without in-kernel controllers, `EINVAL` for an unknown one.
    pub fn get_irqchip(&self, id: u32) -> Result<kvm_irqchip, Errno> {
        if self.irqchip_model() != Model::Kernel {
            return Err(Errno::NXIO);
        }
        self.controllers.chips.lock().state(id)
    }

    /// `KVM_SET_IRQCHIP`
    ///
    /// # Errors
    /// As [`Self::get_irqchip`].
    pub fn set_irqchip(&self, chip: &kvm_irqchip) -> Result<(), Errno> {
        if self.irqchip_model() != Model::Kernel {
            return Err(Errno::NXIO);
        }
        self.with_chips(|chips| chips.set_state(chip, |message| self.deliver(message, None) != 0))
    }

    /// `KVM_CREATE_PIT2`
    ///
    /// # Errors
    /// `EEXIST` if there is one, `ENOENT` without in-kernel PICs.
    pub fn create_pit(&self, config: &kvm_pit_config) -> Result<(), Errno> {
        let mut pit = self.controllers.pit.lock();
        if pit.is_some() {
            return Err(Errno::EXIST);
        }
        if self.irqchip_model() != Model::Kernel {
            return Err(Errno::NOENT);
        }
        let has_speaker = config.flags & KVM_PIT_SPEAKER_DUMMY != 0;
        *pit = Some(Pit::new(has_speaker, now()));
        self.controllers.has_pit.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// `KVM_GET_PIT2`
    ///
    /// # Errors
    /// `ENXIO` if there is none.
    pub fn get_pit(&self) -> Result<kvm_pit_state2, Errno> {
        let pit = self.controllers.pit.lock();
        pit.as_ref().map(Pit::state).ok_or(Errno::NXIO)
    }

    /// `KVM_SET_PIT2`
    ///
    /// # Errors
    /// `ENXIO` if there is none.
    pub fn set_pit(self: &Arc<Self>, state: &kvm_pit_state2) -> Result<(), Errno> {
        self.with_pit(|pit| pit.set_state(state, now()))
            .ok_or(Errno::NXIO)
    }

    /// Does something with the interval timer, if there is one, and has the time kept that it then
    /// waits for.
    fn with_pit<R>(self: &Arc<Self>, work: impl FnOnce(&mut Pit) -> R) -> Option<R> {
        let mut pit = self.controllers.pit.lock();
        let pit = pit.as_mut()?;
        let before = pit.next();
        let result = work(pit);
        if let Some(next) = pit.next()
            && before != Some(next)
        {
            self.timers().note(self, next);
        }
        Some(result)
    }

    /// Raises the interval timer's line if its time has come. When it comes next, in nanoseconds.
    pub(super) fn serve_pit(&self, now: u64) -> Option<u64> {
        if !self.controllers.has_pit.load(Ordering::Relaxed) {
            return None;
        }
        let (expired, next) = {
            let mut pit = self.controllers.pit.lock();
            let pit = pit.as_mut()?;
            (pit.expire(now), pit.next())
        };
        if expired {
            self.set_line(Source::Timer, 0, true);
            self.set_line(Source::Timer, 0, false);
        }
        next
    }

    /// `KVM_IRQ_LINE` and `KVM_IRQ_LINE_STATUS`: what became of it, as the latter reports it: how
    /// many controllers took it, 0 if it changed nothing, −1 if nobody did.
    ///
    /// # Errors
    /// `ENXIO` without an in-kernel controller.
    pub fn irq_line(&self, line: u32, level: bool) -> Result<i32, Errno> {
        if self.irqchip_model() == Model::None {
            return Err(Errno::NXIO);
        }
        Ok(self.set_line(Source::Program, line, level))
    }

    /// Sets a line. What became of it: see [`Self::irq_line`].
    pub(super) fn set_line(&self, source: Source, line: u32, level: bool) -> i32 {
        let routes = Arc::clone(&self.controllers.routes.read());
        let mut result: Option<i32> = None;
        for route in routes.of(line) {
            let taken = match route {
                // A message has no level to fall back to.
                Route::Message(_) if !level => continue,
                Route::Message(message) => self.send(message),
                Route::Pic(pin) => self
                    .with_chips(|chips| chips.set_pic_line(source, *pin, level))
                    .map(i32::from),
                Route::IoApic(pin) => Some(i32::from(self.with_chips(|chips| {
                    chips.set_pin(source, *pin, level, |message| {
                        self.deliver(message, None) != 0
                    })
                }))),
            };
            if let Some(taken) = taken {
                result = Some(result.unwrap_or(0) + taken);
            }
        }
        result.unwrap_or(-1)
    }

    /// Delivers a message from a bus. How many took it, if anybody is there to.
    fn send(&self, message: &Message) -> Option<i32> {
        match self.deliver(message, None) {
            0 => None,
            count => Some(i32::try_from(count).unwrap_or(i32::MAX)),
        }
    }

    /// `KVM_SIGNAL_MSI`: how many local APICs took it.
    ///
    /// # Errors
    /// `EINVAL` without an in-kernel controller, and for flags; `EPERM` if nobody took it.
    pub fn signal_msi(&self, msi: &kvm_msi) -> Result<i32, Errno> {
        if self.irqchip_model() == Model::None || msi.flags != 0 {
            return Err(Errno::INVAL);
        }
        let wide = self.wide_apic_ids();
        if wide && msi.address_hi & 0xff != 0 {
            return Err(Errno::INVAL);
        }
        let message = routing::message(msi.address_lo, msi.address_hi, msi.data, wide);
        self.send(&message).ok_or(Errno::PERM)
    }

    /// Checks the header of `KVM_SET_GSI_ROUTING`.
    ///
    /// # Errors
    /// `EINVAL` without an in-kernel controller, for more than 4096 routes, and for flags.
    pub(crate) fn check_gsi_routing(&self, count: u32, flags: u32) -> Result<(), Errno> {
        if self.irqchip_model() == Model::None || count > MAX_IRQ_ROUTES || flags != 0 {
            return Err(Errno::INVAL);
        }
        Ok(())
    }

    /// `KVM_SET_GSI_ROUTING`: these routes instead of all others.
    ///
    /// # Errors
    /// `EINVAL` for what [`Self::check_gsi_routing`] refuses, and for routes that cannot be.
    pub fn set_gsi_routing(&self, entries: &[kvm_irq_routing_entry]) -> Result<(), Errno> {
        let count = u32::try_from(entries.len()).map_err(|_| Errno::INVAL)?;
        self.check_gsi_routing(count, 0)?;
        let has_pins = self.irqchip_model() == Model::Kernel;
        let routes = Routes::from_user(entries, has_pins, self.wide_apic_ids())?;
        let controllers = &self.controllers;
        let pins = controllers.reserved_pins.load(Ordering::Relaxed);
        let vectors = controllers.level_vectors.iter();
        for (word, wanted) in vectors.zip(routes.level_vectors(pins)) {
            word.store(wanted, Ordering::Relaxed);
        }
        *controllers.routes.write() = Arc::new(routes);
        Ok(())
    }

    /// Whether the program's I/O APIC wants to hear of the end of an interrupt.
    pub(crate) fn wants_end_of(&self, vector: u8) -> bool {
        let word = &self.controllers.level_vectors[usize::from(vector / 64)];
        word.load(Ordering::Relaxed) >> (vector % 64) & 1 != 0
    }

    /// A local APIC has ended an interrupt: the I/O APIC's pins that sent it may send it again.
    pub(crate) fn end_interrupt(&self, vector: u8, level: bool) {
        if !level {
            return;
        }
        let pins = self.controllers.chips.lock().end(vector);
        if pins == 0 {
            return;
        }
        // Whoever holds the line up may let it go first.
        self.served(|route| matches!(route, Route::IoApic(pin) if pins & 1 << *pin != 0));
        self.with_chips(|chips| {
            chips.serve_again(pins, |message| self.deliver(message, None) != 0);
        });
    }

    /// The guest has served the lines that go to these pins.
    fn served(&self, is_one: impl Fn(&Route) -> bool) {
        let routes = Arc::clone(&self.controllers.routes.read());
        for line in routes.lines_to(is_one) {
            self.resample(line);
        }
    }

    /// A vCPU acknowledges an interrupt of the PICs: its vector, if there still is one.
    pub(crate) fn acknowledge_external(&self) -> Option<u8> {
        self.with_chips(Chips::acknowledge)
    }

    /// Does something with the chips, and then tells those who have to know what it did.
    fn with_chips<R>(&self, work: impl FnOnce(&mut Chips) -> R) -> R {
        let mut chips = self.controllers.chips.lock();
        let result = work(&mut chips);
        let output = chips.pic_output();
        let before = self.pic_output.swap(output, Ordering::SeqCst);
        let ended = chips.take_ended_lines();
        drop(chips);
        if output && !before {
            self.notify_external();
        }
        if ended != 0 {
            self.served(|route| matches!(route, Route::Pic(line) if ended & 1 << *line != 0));
        }
        result
    }

    /// Whether a port belongs to a controller of ours.
    #[inline]
    pub(crate) fn controller_owns_port(&self, port: u16) -> bool {
        if self.irqchip_model() != Model::Kernel {
            return false;
        }
        match port {
            0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1 => true,
            pit::FIRST_PORT..=0x43 | pit::SPEAKER_PORT => {
                let pit = self.controllers.pit.lock();
                pit.as_ref().is_some_and(|pit| pit.owns(port))
            }
            _ => false,
        }
    }

    /// A byte from a port that belongs to a controller.
    pub(crate) fn read_controller_port(self: &Arc<Self>, port: u16) -> u8 {
        match port {
            pit::FIRST_PORT..=0x43 | pit::SPEAKER_PORT => {
                self.with_pit(|pit| pit.read(port, now())).unwrap_or(0)
            }
            _ => self.with_chips(|chips| chips.read_pic(port)),
        }
    }

    /// A byte for a port that belongs to a controller.
    pub(crate) fn write_controller_port(self: &Arc<Self>, port: u16, value: u8) {
        match port {
            pit::FIRST_PORT..=0x43 | pit::SPEAKER_PORT => {
                self.with_pit(|pit| pit.write(port, value, now()));
            }
            _ => self.with_chips(|chips| chips.write_pic(port, value)),
        }
    }

    /// Whether memory at an address is the I/O APIC's.
    #[inline]
    pub(crate) fn ioapic_owns(&self, address: u64) -> bool {
        self.irqchip_model() == Model::Kernel
            && (ioapic::ADDRESS..ioapic::ADDRESS + ioapic::LENGTH).contains(&address)
    }

    /// A read of the I/O APIC's memory.
    pub(crate) fn read_ioapic(&self, address: u64) -> u32 {
        self.controllers
            .chips
            .lock()
            .read_ioapic(address - ioapic::ADDRESS)
    }

    /// A write of the I/O APIC's memory.
    pub(crate) fn write_ioapic(&self, address: u64, value: u32) {
        self.with_chips(|chips| {
            chips.write_ioapic(address - ioapic::ADDRESS, value, |message| {
                self.deliver(message, None) != 0
            });
        });
    }
}
