//! What the host does with the memory of a guest: with that of the vCPU that it has loaded, or of a
//! VM that it names.

use crate::error::Error;
use crate::guest::{Access, GuestPage};
use crate::hypervisor::Hypervisor;
use crate::page::{Pages, State};
use crate::platform::Platform;
use crate::vm::{Handle, Vm};
use twofold_arch::{Gfn, Hfn};

impl<P: Platform> Hypervisor<'_, P> {
    /// Gives a page to the protected guest whose vCPU is loaded. Tables come from the host's stack
    /// in the vCPU's record.
    ///
    /// # Errors
    /// [`Error::Invalid`] with no vCPU loaded; otherwise as the transition (SPEC 2.5).
    pub fn donate_guest(&self, page: Hfn, gfn: Gfn) -> Result<(), Error> {
        self.with_loaded(|vm, vcpu| {
            let mut inner = vcpu.inner.lock();
            self.refill(vm, vcpu, &mut inner.tables)?;
            self.host_donate_guest(vm, &mut inner.tables, page, gfn)
        })
    }

    /// Lends pages to the ordinary guest whose vCPU is loaded.
    ///
    /// # Errors
    /// [`Error::Invalid`] with no vCPU loaded or for access that makes no sense; otherwise as the
    /// transition (SPEC 2.5).
    pub fn share_guest(&self, pages: Pages, gfn: Gfn, access: u64) -> Result<(), Error> {
        let access = Access::from_host(access)?;
        self.with_loaded(|vm, vcpu| {
            let mut inner = vcpu.inner.lock();
            self.refill(vm, vcpu, &mut inner.tables)?;
            self.host_share_guest(vm, &mut inner.tables, pages, gfn, access)
        })
    }

    /// Takes a page or block back from an ordinary guest.
    ///
    /// # Errors
    /// [`Error::NotFound`] if there is no such VM; otherwise as the transition (SPEC 2.5).
    pub fn unshare_guest(&self, handle: Handle, gfn: Gfn, pages: u64) -> Result<(), Error> {
        self.with_vm(handle, |vm| self.host_unshare_guest(vm, gfn, pages))
    }

    /// Gives the ordinary guest whose vCPU is loaded more access to what it has at a frame.
    ///
    /// # Errors
    /// [`Error::NotPermitted`] for a protected guest; [`Error::Again`] if nothing is there.
    pub fn relax_perms_guest(&self, gfn: Gfn, access: u64) -> Result<(), Error> {
        let access = Access::from_host(access)?;
        self.with_loaded(|vm, _| {
            ordinary(vm)?;
            vm.guest.lock().relax(&self.storage, gfn, access)
        })
    }

    /// Marks what the loaded ordinary guest has at a frame as used.
    ///
    /// # Errors
    /// As [`relax_perms_guest`](Self::relax_perms_guest).
    pub fn make_young_guest(&self, gfn: Gfn) -> Result<(), Error> {
        self.with_loaded(|vm, _| {
            ordinary(vm)?;
            vm.guest.lock().make_young(&self.storage, gfn)
        })
    }

    /// Takes write access to some frames from an ordinary guest.
    ///
    /// # Errors
    /// [`Error::NotFound`] if there is no such VM, [`Error::NotPermitted`] for a protected one,
    /// [`Error::Invalid`] for frames beyond its addresses.
    pub fn wrprotect_guest(&self, handle: Handle, gfn: Gfn, pages: u64) -> Result<(), Error> {
        self.with_vm(handle, |vm| {
            ordinary(vm)?;
            vm.guest.lock().write_protect(&self.storage, gfn, pages)
        })
    }

    /// Whether an ordinary guest used some frames since this was last asked with `clear`.
    ///
    /// # Errors
    /// As [`wrprotect_guest`](Self::wrprotect_guest).
    pub fn test_clear_young_guest(
        &self,
        handle: Handle,
        gfn: Gfn,
        pages: u64,
        clear: bool,
    ) -> Result<bool, Error> {
        self.with_vm(handle, |vm| {
            ordinary(vm)?;
            let mut guest = vm.guest.lock();
            guest.test_clear_young(&self.storage, gfn, pages, clear)
        })
    }

    /// Whether the last fault of the loaded vCPU met a page that was taken by force, so that the
    /// host need not try to serve it.
    ///
    /// # Errors
    /// [`Error::Invalid`] with no vCPU loaded.
    pub fn vcpu_in_poison_fault(&self) -> Result<bool, Error> {
        self.with_loaded(|vm, vcpu| {
            let Some(gfn) = vcpu.inner.lock().fault else {
                return Ok(false);
            };
            let page = vm.guest.lock().look(&self.storage, gfn)?;
            Ok(page == GuestPage::Poisoned)
        })
    }

    /// What a guest has at a frame.
    ///
    /// # Errors
    /// [`Error::NotFound`] if there is no such VM, [`Error::Invalid`] beyond its addresses.
    pub fn guest_page(&self, handle: Handle, gfn: Gfn) -> Result<GuestPage, Error> {
        self.with_vm(handle, |vm| vm.guest.lock().look(&self.storage, gfn))
    }

    /// Calls `visit` with every page that a guest has or borrows.
    ///
    /// # Errors
    /// [`Error::NotFound`] if there is no such VM.
    pub fn guest_pages(
        &self,
        handle: Handle,
        visit: impl FnMut(Gfn, Hfn, State),
    ) -> Result<(), Error> {
        self.with_vm(handle, |vm| {
            vm.guest.lock().for_each_page(&self.storage, visit);
            Ok(())
        })
    }

    pub(crate) fn with_vm<T>(
        &self,
        handle: Handle,
        body: impl FnOnce(&Vm) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let vms = self.vms.lock();
        body(vms.find(handle).ok_or(Error::NotFound)?)
    }
}

fn ordinary(vm: &Vm) -> Result<(), Error> {
    if vm.protected {
        Err(Error::NotPermitted)
    } else {
        Ok(())
    }
}
