//! What the host asks to be forgotten: TLB maintenance for guests.
//!
//! The hypervisor does by itself whatever isolation needs. These calls are the host's own business
//! with an ordinary guest, after it has changed how the guest's memory is used. A VM is named by its
//! handle: a pointer, as upstream has it, would be nothing that the hypervisor may follow.

use crate::error::Error;
use crate::hypervisor::Hypervisor;
use crate::platform::Platform;
use crate::vm::{Handle, Vm};
use core::ops::Range;
use twofold_arch::{Gfn, Gpa, PAGE_SIZE};

/// Which processors forget.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reach {
    /// Every one.
    Everywhere,
    /// The calling one.
    Here,
}

impl<P: Platform> Hypervisor<'_, P> {
    /// Makes processors forget a VM's translation at `ipa`, whose leaf is at a level: 1 to 3, or 0
    /// if the host does not know.
    ///
    /// # Errors
    /// [`Error::NotFound`] if there is no such VM; [`Error::Invalid`] for another level, and for an
    /// address that is not that of a page of the VM.
    pub fn flush_guest_ipa(
        &self,
        handle: Handle,
        ipa: u64,
        level: u64,
        reach: Reach,
    ) -> Result<(), Error> {
        self.with_vm(handle, |vm| {
            let at = addresses(vm, ipa, 1)?.start.get();
            let size = match level {
                1..=3 => PAGE_SIZE << (9 * (3 - level)),
                0 => 0,
                _ => return Err(Error::Invalid),
            };
            let vmid = vm.handle.vmid();
            match (size, reach) {
                (0, _) => self.platform().invalidate_all(vmid),
                (size, Reach::Everywhere) => self.platform().invalidate(vmid, block(at, size)),
                (size, Reach::Here) => self.platform().invalidate_here(vmid, block(at, size)),
            }
            Ok(())
        })
    }

    /// Makes every processor forget a VM's translations of `pages` pages.
    ///
    /// # Errors
    /// [`Error::NotFound`] if there is no such VM; [`Error::Invalid`] for a range that is empty or
    /// not within the VM's addresses.
    pub fn flush_guest_range(&self, handle: Handle, ipa: u64, pages: u64) -> Result<(), Error> {
        self.with_vm(handle, |vm| {
            let range = addresses(vm, ipa, pages)?;
            self.platform().invalidate(vm.handle.vmid(), range);
            Ok(())
        })
    }

    /// Makes every processor forget a VM's translations.
    ///
    /// # Errors
    /// [`Error::NotFound`] if there is no such VM.
    pub fn flush_guest(&self, handle: Handle) -> Result<(), Error> {
        self.with_vm(handle, |vm| {
            self.platform().invalidate_all(vm.handle.vmid());
            Ok(())
        })
    }

    /// Makes this processor forget what it holds of a VM, before another vCPU of it runs here.
    ///
    /// # Errors
    /// [`Error::NotFound`] if there is no such VM.
    pub fn forget_guest_here(&self, handle: Handle) -> Result<(), Error> {
        self.with_vm(handle, |vm| {
            self.platform().forget_context(vm.handle.vmid());
            Ok(())
        })
    }

    /// Makes every processor forget everything below EL2.
    pub fn flush_everything(&self) {
        self.platform().invalidate_everything();
    }
}

/// The addresses of `pages` pages of a VM.
fn addresses(vm: &Vm, ipa: u64, pages: u64) -> Result<Range<Gpa>, Error> {
    if !ipa.is_multiple_of(PAGE_SIZE) || pages == 0 {
        return Err(Error::Invalid);
    }
    let start = vm.guest.lock().gpa(Gfn::new(ipa / PAGE_SIZE), pages)?;
    Ok(start..Gpa::new(start.get() + pages * PAGE_SIZE))
}

/// The aligned block of `size` bytes around an address.
fn block(at: u64, size: u64) -> Range<Gpa> {
    let start = at & !(size - 1);
    Gpa::new(start)..Gpa::new(start + size)
}
