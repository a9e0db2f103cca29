//! The calls of sub-page write protection, which `kvm-ioctls` does not have.

// UNSAFETY: makes ioctls, and reads the part of `struct kvm_run` that an exit fills.
#![expect(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result, ensure};
use kvm_bindings::kvm_enable_cap;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use twofold_abi::spp::{
    KVM_CAP_X86_SPP, KVM_SUBPAGE_SIZE, KVM_SUBPAGES_SET_ACCESS, SubPages, kvm_spp_exit,
};

/// Turns sub-page permissions on for a VM.
///
/// # Errors
/// This KVM has none.
pub(crate) fn enable(kvm: &Kvm, vm: &VmFd) -> Result<()> {
    let pages = kvm.check_extension_raw(KVM_CAP_X86_SPP.into());
    ensure!(
        pages > 0,
        "this KVM does not protect sub-pages (Twofold does, with --second-stage ept)"
    );
    vm.enable_cap(&kvm_enable_cap {
        cap: KVM_CAP_X86_SPP,
        ..Default::default()
    })
    .context("KVM does not enable sub-page permissions")
}

/// The access map that allows everything but the pieces that hold some of these bytes of the page.
pub(crate) fn all_but(bytes: impl Iterator<Item = u64>) -> u32 {
    bytes.fold(u32::MAX, |map, byte| {
        map & !(1 << (byte / u64::from(KVM_SUBPAGE_SIZE)))
    })
}

/// Gives the page at `address` an access map. When this returns, no vCPU writes what it forbids.
///
/// # Errors
/// KVM refuses it.
pub(crate) fn set_access(vm: &VmFd, address: u64, map: u32) -> Result<()> {
    let request = SubPages::new(address >> 12, [map]);
    // SAFETY: the call reads the request, whose header says how many maps it has.
    let done = unsafe {
        libc::ioctl(
            vm.as_raw_fd(),
            KVM_SUBPAGES_SET_ACCESS.into(),
            &raw const request,
        )
    };
    if done != 1 {
        let error = io::Error::last_os_error();
        return Err(error).with_context(|| format!("cannot protect the page at {address:#x}"));
    }
    Ok(())
}

/// What the guest wanted to write, after `KVM_RUN` has returned with `KVM_EXIT_SPP`.
pub(crate) fn denied_write(vcpu: &mut VcpuFd) -> kvm_spp_exit {
    let union = &raw const vcpu.get_kvm_run().__bindgen_anon_1;
    // SAFETY: the exit fills the union's first bytes with this structure; any bytes are one.
    unsafe { union.cast::<kvm_spp_exit>().read() }
}
