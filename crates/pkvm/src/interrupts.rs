//! A guest's interrupts: the list registers of GICv3, through which the host delivers them.
//!
//! The hypervisor decides nothing about interrupts. What a guest runs with comes from the words of
//! the host's record, each read once, and goes back there when the guest stops. The control and the
//! active priorities stay in the processor as long as the vCPU is loaded; they are the hypervisor's
//! to load and save, so that no guest finds another's.

use crate::error::Error;
use crate::hypervisor::Hypervisor;
use crate::platform::Platform;
use crate::shared::HostVcpu;
use twofold_arch::Hpa;

/// The most list registers that the architecture has.
pub const LIST_REGISTERS: usize = 16;

/// Bits of ICH_HCR_EL2 that the host may set: the enable, which conditions raise a maintenance
/// interrupt, and the count of ends without a list register. Not the traps: nobody serves those.
const CONTROL: u64 = 0xff | 0x1f << 27;

/// What the list registers hold while a guest runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Interrupts {
    /// ICH_HCR_EL2.
    pub control: u64,
    /// How many list registers count. The others are empty.
    pub used: usize,
    /// ICH_LR_EL2.
    pub list: [u64; LIST_REGISTERS],
}

/// A virtual CPU interface: what a guest reaches through the ICC registers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Interface {
    /// ICH_VMCR_EL2: priority mask, binary points, group enables.
    pub control: u64,
    /// ICH_AP0R_EL2: active priorities of group 0.
    pub active0: [u64; 4],
    /// ICH_AP1R_EL2: the same of group 1.
    pub active1: [u64; 4],
}

/// The virtual side of a processor's GICv3 interface. All of it acts on the calling processor.
pub trait VirtualGic {
    /// ICH_VTR_EL2, with bit 63 set if the host could use the memory-mapped interface of GICv2.
    fn config(&self) -> u64;

    /// How many list registers there are, at most [`LIST_REGISTERS`].
    fn list_registers(&self) -> usize;

    /// Empties every list register.
    fn clear(&self);

    /// Loads a guest's interface.
    fn load(&self, interface: &Interface);

    /// The interface as the guest has left it.
    fn save(&self) -> Interface;
}

impl<P: Platform> Hypervisor<'_, P> {
    /// What the processor's GICv3 has, by ICH_VTR_EL2; 0 without one.
    pub fn gic_config(&self) -> u64 {
        self.platform().virtual_gic().map_or(0, |gic| gic.config())
    }

    /// Empties this processor's list registers.
    pub fn clear_list_registers(&self) {
        if let Some(gic) = self.platform().virtual_gic() {
            gic.clear();
        }
    }

    /// What the host's record wants a guest to run with.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it names more list registers than there are, or bits that are not the
    /// host's to set.
    pub(crate) fn interrupts_from(&self, record: HostVcpu) -> Result<Interrupts, Error> {
        let available = self
            .platform()
            .virtual_gic()
            .map_or(0, |gic| gic.list_registers().min(LIST_REGISTERS));
        let control = record.word(self.platform(), HostVcpu::GIC_CONTROL);
        let used = record.word(self.platform(), HostVcpu::LISTS_USED);
        let used = usize::try_from(used).map_err(|_| Error::Invalid)?;
        if used > available || control & !CONTROL != 0 {
            return Err(Error::Invalid);
        }
        let mut interrupts = Interrupts {
            control,
            used,
            ..Interrupts::default()
        };
        for (number, list) in interrupts.list[..used].iter_mut().enumerate() {
            *list = record.word(self.platform(), HostVcpu::LISTS + number);
        }
        Ok(interrupts)
    }

    /// Tells the host what the guest has made of them.
    pub(crate) fn interrupts_to(&self, record: HostVcpu, interrupts: &Interrupts) {
        let platform = self.platform();
        record.set_word(platform, HostVcpu::GIC_CONTROL, interrupts.control);
        let used = interrupts.used.min(LIST_REGISTERS);
        for (number, list) in interrupts.list[..used].iter().enumerate() {
            record.set_word(platform, HostVcpu::LISTS + number, *list);
        }
    }

    /// Copies the loaded vCPU's interface to the host's record, whose address is `host_vcpu`.
    ///
    /// # Errors
    /// [`Error::Invalid`] unless the record is that of the vCPU that this processor has loaded.
    pub fn save_interface(&self, host_vcpu: Hpa) -> Result<(), Error> {
        self.with_named(host_vcpu, |_, vcpu, record| {
            let Some(gic) = self.platform().virtual_gic() else {
                return Err(Error::NoDevice);
            };
            let interface = gic.save();
            vcpu.inner.lock().interface = interface;
            record.set_interface(self.platform(), &interface);
            Ok(())
        })
    }

    /// Gives the loaded vCPU the interface that the host's record has.
    ///
    /// # Errors
    /// As [`save_interface`](Self::save_interface).
    pub fn restore_interface(&self, host_vcpu: Hpa) -> Result<(), Error> {
        self.with_named(host_vcpu, |_, vcpu, record| {
            let Some(gic) = self.platform().virtual_gic() else {
                return Err(Error::NoDevice);
            };
            let interface = record.interface(self.platform());
            vcpu.inner.lock().interface = interface;
            gic.load(&interface);
            Ok(())
        })
    }
}
