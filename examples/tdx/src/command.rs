//! The commands of `KVM_MEMORY_ENCRYPT_OP` that build a TDX guest (Linux, "Intel Trust Domain
//! Extensions"). `kvm-bindings` does not have their structures.

// UNSAFETY: an ioctl with pointers to structures of this program.
#![expect(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result, bail};
use kvm_bindings::kvm_cpuid_entry2;

/// `KVM_MEMORY_ENCRYPT_OP`: `_IOWR(KVMIO, 0xba, unsigned long)`
const KVM_MEMORY_ENCRYPT_OP: libc::c_ulong = 0xc008_aeba;

const KVM_TDX_INIT_VM: u32 = 1;
const KVM_TDX_INIT_VCPU: u32 = 2;
const KVM_TDX_INIT_MEM_REGION: u32 = 3;
const KVM_TDX_FINALIZE_VM: u32 = 4;
/// Flag of `KVM_TDX_INIT_MEM_REGION`: what is in the pages is measured, too.
const KVM_TDX_MEASURE_MEMORY_REGION: u32 = 1 << 0;

/// `struct kvm_tdx_cmd`
#[derive(Default)]
#[repr(C)]
struct Command {
    id: u32,
    flags: u32,
    data: u64,
    hw_error: u64,
}

/// `struct kvm_tdx_init_vm` with one CPUID entry.
#[repr(C)]
struct InitVm {
    attributes: u64,
    xfam: u64,
    /// MRCONFIGID, MROWNER, MROWNERCONFIG: for the guest's owner to fill in.
    digests: [[u8; 48]; 3],
    reserved: [u64; 12],
    nent: u32,
    padding: u32,
    entries: [kvm_cpuid_entry2; 1],
}

/// `struct kvm_tdx_init_mem_region`
#[repr(C)]
struct MemoryRegion {
    source_addr: u64,
    gpa: u64,
    nr_pages: u64,
}

/// Makes a VM a TDX guest: with x87 and SSE state, and with guest-physical addresses of `width`
/// bits, the highest of which makes an address shared.
///
/// # Errors
/// KVM or the TDX module refuses.
pub(crate) fn init_vm(vm: &impl AsRawFd, width: u32) -> Result<()> {
    const X87_AND_SSE: u64 = 0b11;
    let mut request = InitVm {
        attributes: 0,
        xfam: X87_AND_SSE,
        digests: [[0; 48]; 3],
        reserved: [0; 12],
        nent: 1,
        padding: 0,
        // The one leaf of CPUID that must be configured: how wide addresses are.
        entries: [kvm_cpuid_entry2 {
            function: 0x8000_0008,
            eax: width << 16,
            ..Default::default()
        }],
    };
    command(vm, KVM_TDX_INIT_VM, 0, address(&mut request)).context("KVM_TDX_INIT_VM")
}

/// Makes a vCPU known to the TDX module. The guest finds `rcx` in that register.
///
/// # Errors
/// KVM or the TDX module refuses.
pub(crate) fn init_vcpu(vcpu: &impl AsRawFd, rcx: u64) -> Result<()> {
    command(vcpu, KVM_TDX_INIT_VCPU, 0, rcx).context("KVM_TDX_INIT_VCPU")
}

/// Whole pages at addresses that KVM takes.
#[repr(C, align(4096))]
#[derive(Clone)]
struct Page([u8; 4096]);

/// Copies pages into the guest's private memory. Their addresses become part of the measurement, and
/// with `measured` their content too.
///
/// # Errors
/// KVM or the TDX module refuses.
pub(crate) fn add_memory(
    vcpu: &impl AsRawFd,
    gpa: u64,
    content: &[u8],
    measured: bool,
) -> Result<()> {
    let mut pages: Vec<Page> = content
        .chunks(4096)
        .map(|chunk| {
            let mut page = Page([0; 4096]);
            page.0[..chunk.len()].copy_from_slice(chunk);
            page
        })
        .collect();
    let mut region = MemoryRegion {
        source_addr: pages.as_mut_ptr().expose_provenance() as u64,
        gpa,
        nr_pages: pages.len() as u64,
    };
    let flags = if measured {
        KVM_TDX_MEASURE_MEMORY_REGION
    } else {
        0
    };
    command(vcpu, KVM_TDX_INIT_MEM_REGION, flags, address(&mut region))
        .with_context(|| format!("KVM_TDX_INIT_MEM_REGION ended at {:#x}", region.gpa))
}

/// Ends measuring; from now on the guest can run. Repeated while the TDX module is busy.
///
/// # Errors
/// KVM or the TDX module refuses.
pub(crate) fn finalize(vm: &impl AsRawFd) -> Result<()> {
    loop {
        match command(vm, KVM_TDX_FINALIZE_VM, 0, 0) {
            Err(error) if is_busy(&error) => {}
            result => return result.context("KVM_TDX_FINALIZE_VM"),
        }
    }
}

fn is_busy(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<io::Error>();
    error.is_some_and(|error| error.raw_os_error() == Some(libc::EBUSY))
}

fn address<T>(structure: &mut T) -> u64 {
    std::ptr::from_mut(structure).expose_provenance() as u64
}

fn command(fd: &impl AsRawFd, id: u32, flags: u32, data: u64) -> Result<()> {
    let mut command = Command {
        id,
        flags,
        data,
        ..Default::default()
    };
    // SAFETY: the structure is one that KVM expects there; what `data` points to, for the commands
    // that take a pointer, is the caller's own and lives longer than this call.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), KVM_MEMORY_ENCRYPT_OP, &raw mut command) };
    if result == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    if command.hw_error == 0 {
        return Err(error.into());
    }
    match error.raw_os_error() {
        Some(libc::EBUSY) => Err(error.into()),
        _ => bail!("{error}; the TDX module says {:#x}", command.hw_error),
    }
}
