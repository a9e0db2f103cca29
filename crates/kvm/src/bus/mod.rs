//! Devices that live in the hypervisor: coalesced zones and ioeventfds, on ports and in memory.
//!
//! Most VMs have none, so the vCPU looks at one counter before anything else.

mod coalesced;
mod ioeventfd;

use crate::eventfd::identity;
use crate::sync::{Mutex, RwLock};
use coalesced::{Ring, Zone};
use ioeventfd::IoEvent;
use kvm_bindings::{kvm_coalesced_mmio_zone, kvm_ioeventfd};
use rustix::io::Errno;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Devices that one bus holds at most (`NR_IOBUS_DEVS`).
const MAX_DEVICES: usize = 1000;

/// Which of a VM's two buses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Space {
    /// Guest-physical memory.
    Memory,
    /// Ports.
    Port,
}

#[derive(Debug)]
enum Device {
    Zone(Zone),
    Event(IoEvent),
}

/// Both buses of a VM.
#[derive(Debug)]
pub(crate) struct Buses {
    /// Devices in `devices`, for a look without the lock.
    count: AtomicUsize,
    devices: RwLock<Vec<(Space, Device)>>,
    ring: Mutex<Ring>,
}

impl Buses {
    pub(crate) fn new() -> Result<Self, Errno> {
        Ok(Self {
            count: AtomicUsize::new(0),
            devices: RwLock::new(Vec::new()),
            ring: Mutex::new(Ring::new()?),
        })
    }

    /// Whether there is any device: one load.
    #[inline]
    pub(crate) fn has_devices(&self) -> bool {
        self.count.load(Ordering::Relaxed) != 0
    }

    /// Offers a write to the devices. Whether one took it.
    #[inline]
    pub(crate) fn write(&self, space: Space, address: u64, data: &[u8]) -> bool {
        self.has_devices() && self.write_to_devices(space, address, data)
    }

    fn write_to_devices(&self, space: Space, address: u64, data: &[u8]) -> bool {
        self.devices.read().iter().any(|(device_space, device)| {
            *device_space == space
                && match device {
                    Device::Zone(zone) => {
                        zone.holds(address, data.len())
                            && self.ring.lock().push(space, address, data)
                    }
                    Device::Event(event) => event.signal(address, data),
                }
        })
    }

    /// Shows the coalesced ring at `address` in the program's memory.
    pub(crate) fn map_ring(
        &self,
        address: usize,
        protection: rustix::mm::ProtFlags,
    ) -> Result<(), Errno> {
        self.ring.lock().memory().map_over(address, protection)
    }

    /// `KVM_REGISTER_COALESCED_MMIO`: `EINVAL` for an unknown space, `ENOSPC` when the bus is full.
    pub(crate) fn register_zone(&self, zone: &kvm_coalesced_mmio_zone) -> Result<(), Errno> {
        let (space, zone) = Zone::from_user(zone)?;
        let mut devices = self.devices.write();
        self.add(&mut devices, space, Device::Zone(zone))
    }

    /// `KVM_UNREGISTER_COALESCED_MMIO`: removes every zone that holds the given one. It is no
    /// error if there is none.
    pub(crate) fn unregister_zone(&self, zone: &kvm_coalesced_mmio_zone) -> Result<(), Errno> {
        let (space, gone) = Zone::from_user(zone)?;
        let mut devices = self.devices.write();
        devices.retain(|(device_space, device)| match device {
            Device::Zone(zone) => *device_space != space || !zone.holds_zone(&gone),
            Device::Event(_) => true,
        });
        self.count.store(devices.len(), Ordering::Relaxed);
        Ok(())
    }

    /// `KVM_IOEVENTFD`, with the errors that [`ioeventfd`] lists.
    pub(crate) fn ioeventfd(&self, request: &kvm_ioeventfd) -> Result<(), Errno> {
        if ioeventfd::is_deassign(request) {
            self.remove_event(request)
        } else {
            self.add_event(request)
        }
    }

    fn add_event(&self, request: &kvm_ioeventfd) -> Result<(), Errno> {
        let (space, event) = IoEvent::from_user(request)?;
        let mut devices = self.devices.write();
        let collides = devices.iter().any(|(device_space, device)| match device {
            Device::Event(other) => *device_space == space && other.collides(&event),
            Device::Zone(_) => false,
        });
        if collides {
            return Err(Errno::EXIST);
        }
        self.add(&mut devices, space, Device::Event(event))
    }

    fn remove_event(&self, request: &kvm_ioeventfd) -> Result<(), Errno> {
        let space = ioeventfd::space(request);
        let wanted = identity(request.fd)?;
        let mut devices = self.devices.write();
        let found = devices
            .iter()
            .position(|(device_space, device)| match device {
                Device::Event(event) => *device_space == space && event.is(request, wanted),
                Device::Zone(_) => false,
            });
        devices.remove(found.ok_or(Errno::NOENT)?);
        self.count.store(devices.len(), Ordering::Relaxed);
        Ok(())
    }

    fn add(
        &self,
        devices: &mut Vec<(Space, Device)>,
        space: Space,
        device: Device,
    ) -> Result<(), Errno> {
        if devices.iter().filter(|(other, _)| *other == space).count() >= MAX_DEVICES {
            return Err(Errno::NOSPC);
        }
        devices.push((space, device));
        self.count.store(devices.len(), Ordering::Relaxed);
        Ok(())
    }
}
