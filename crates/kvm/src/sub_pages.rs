//! Sub-page write protection of a VM: the capability and its two ioctls (`docs/spp.md`).

use crate::capability;
use crate::vcpu::VcpuCore;
use crate::vm::Vm;
use rustix::io::Errno;
use std::sync::atomic::Ordering;
use twofold_abi::spp::{KVM_CAP_X86_SPP, KVM_SUBPAGE_MAX_PAGES, kvm_subpage};
use twofold_arch::Gfn;
use twofold_arch::sppt::AccessMap;
use twofold_mmu::SubPageError;

impl Vm {
    /// `KVM_ENABLE_CAP(KVM_CAP_X86_SPP)`: the VM's pages can be protected from now on. Once is
    /// enough, there is no way back. vCPUs may exist, and run.
    ///
    /// # Errors
    /// `ENODEV` where processors have no sub-page permissions, and for a trust domain; `EINVAL` for an argument; `EPERM` if
    /// the CPUID table of one of this VM's vCPUs offers nested virtualization; `ENOMEM`.
    pub(crate) fn enable_sub_pages(&self, arguments: &[u64]) -> Result<(), Errno> {
        let capability = u64::from(KVM_CAP_X86_SPP);
        if capability::check_vm(self.vm_type(), self.second_stage(), capability) == 0 {
            return Err(Errno::NODEV);
        }
        if arguments.iter().any(|argument| *argument != 0) {
            return Err(Errno::INVAL);
        }
        let config = self.config.lock();
        let is_nested = |vcpu: &VcpuCore| vcpu.is_nested.load(Ordering::Relaxed);
        if config.vcpus.iter().any(|vcpu| is_nested(vcpu)) {
            return Err(Errno::PERM);
        }
        self.tables().enable_sub_pages().map_err(errno)?;
        self.protects_sub_pages.store(true, Ordering::Release);
        Ok(())
    }

    /// Whether sub-page permissions are enabled.
    #[inline]
    pub(crate) fn protects_sub_pages(&self) -> bool {
        self.protects_sub_pages.load(Ordering::Acquire)
    }

    /// A vCPU's CPUID table, which is about to be set, offers the guest nested virtualization or does
    /// not. Nested guests have addresses that no access map is about, so a VM has either.
    ///
    /// # Errors
    /// `EPERM` if it does and sub-page permissions are enabled.
    pub(crate) fn offer_nesting(&self, vcpu: &VcpuCore, nested: bool) -> Result<(), Errno> {
        let _config = self.config.lock();
        if nested && self.protects_sub_pages() {
            return Err(Errno::PERM);
        }
        vcpu.is_nested.store(nested, Ordering::Relaxed);
        Ok(())
    }

    /// `KVM_SUBPAGES_SET_ACCESS`: gives pages these access maps, all of them or none. When it
    /// returns, no vCPU writes what they forbid. `maps` copies in so many maps, once the request
    /// has been found to make sense.
    ///
    /// # Errors
    /// `ENODEV` before sub-page permissions are enabled; `EINVAL` for flags, more than 512 pages,
    /// a range that wraps or ends beyond what can be protected, and private memory; `EFAULT` for a
    /// page without a slot; `ENOMEM`; whatever `maps` answers.
    pub fn set_sub_page_access(
        &self,
        request: &kvm_subpage,
        maps: impl FnOnce(usize) -> Result<Vec<u32>, Errno>,
    ) -> Result<(), Errno> {
        let count = self.check_sub_pages(request)?;
        if count == 0 {
            return Ok(());
        }
        let maps: Vec<_> = maps(count)?.into_iter().map(AccessMap).collect();
        self.tables()
            .set_sub_page_access(Gfn::new(request.gfn_base), &maps)
            .map_err(|error| {
                tracing::debug!(?request, %error, "access maps refused");
                errno(error)
            })
    }

    /// `KVM_SUBPAGES_GET_ACCESS`: the access maps of pages, as they are at one moment.
    ///
    /// # Errors
    /// As [`set_sub_page_access`](Self::set_sub_page_access), but private memory has maps to read.
    pub fn get_sub_page_access(&self, request: &kvm_subpage) -> Result<Vec<u32>, Errno> {
        let count = self.check_sub_pages(request)?;
        let mut maps = vec![AccessMap::FULL; count];
        if count != 0 {
            self.tables()
                .get_sub_page_access(Gfn::new(request.gfn_base), &mut maps)
                .map_err(errno)?;
        }
        Ok(maps.into_iter().map(|map| map.0).collect())
    }

    /// How many pages a request is about, if it can be about any.
    fn check_sub_pages(&self, request: &kvm_subpage) -> Result<usize, Errno> {
        if !self.protects_sub_pages() {
            return Err(Errno::NODEV);
        }
        if request.flags != 0 || request.npages > KVM_SUBPAGE_MAX_PAGES {
            return Err(Errno::INVAL);
        }
        Ok(request.npages as usize)
    }
}

fn errno(error: SubPageError) -> Errno {
    match error {
        SubPageError::NotEnabled => Errno::NODEV,
        SubPageError::TooManyPages(_) | SubPageError::Range | SubPageError::Private(_) => {
            Errno::INVAL
        }
        SubPageError::NoSlot(_) => Errno::FAULT,
        SubPageError::OutOfMemory => Errno::NOMEM,
    }
}
