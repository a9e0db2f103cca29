//! The commands of `KVM_MEMORY_ENCRYPT_OP` for trust domains (KVM API, "Intel Trust Domain
//! Extensions"), and what every program that builds one does.

use super::{Errno, Fd};
use crate::common::KVM_ENABLE_CAP;
use crate::common::KVM_MEMORY_ENCRYPT_OP;
use kvm_bindings::{KVM_CAP_SPLIT_IRQCHIP, kvm_cpuid_entry2, kvm_enable_cap};

pub const CAPABILITIES: u32 = 0;
pub const INIT_VM: u32 = 1;
pub const INIT_VCPU: u32 = 2;
pub const INIT_MEM_REGION: u32 = 3;
pub const FINALIZE_VM: u32 = 4;
pub const GET_CPUID: u32 = 5;
pub const MEASURE: u32 = 1;
pub const SEPT_VE_DISABLE: u64 = 1 << 28;

/// `struct kvm_tdx_cmd`
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Command {
    pub id: u32,
    pub flags: u32,
    pub data: u64,
    pub hw_error: u64,
}

/// `struct kvm_tdx_init_mem_region`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Region {
    pub source: u64,
    pub gpa: u64,
    pub pages: u64,
}

/// `struct kvm_tdx_init_vm` with room for a few CPUID entries.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct InitVm {
    pub attributes: u64,
    pub xfam: u64,
    pub digests: [u64; 18],
    pub reserved: [u64; 12],
    pub count: u32,
    pub padding: u32,
    pub entries: [kvm_cpuid_entry2; 4],
}

impl InitVm {
    pub fn new(width: u32) -> Self {
        let mut entries = [kvm_cpuid_entry2::default(); 4];
        entries[0].function = 0x8000_0008;
        entries[0].eax = width << 16;
        Self {
            attributes: 0,
            xfam: 3,
            digests: [0; 18],
            reserved: [0; 12],
            count: 1,
            padding: 0,
            entries,
        }
    }
}

pub fn address<T>(value: &T) -> u64 {
    std::ptr::from_ref(value).expose_provenance() as u64
}

/// A command without anything special about it.
pub fn command(fd: &Fd, id: u32, flags: u32, data: u64) -> Result<i32, Errno> {
    let mut command = Command {
        id,
        flags,
        data,
        hw_error: 0,
    };
    fd.with(KVM_MEMORY_ENCRYPT_OP, &mut command)
}

pub fn init_vm(vm: &Fd, request: &InitVm) -> Result<i32, Errno> {
    command(vm, INIT_VM, 0, address(request))
}

/// Ends the building of a TD, however often the module is busy.
pub fn finalize(vm: &Fd) -> Result<i32, Errno> {
    loop {
        match command(vm, FINALIZE_VM, 0, 0) {
            Err(Errno::BUSY) => {}
            result => return result,
        }
    }
}

pub fn split_irqchip(vm: &Fd) {
    let mut cap = kvm_enable_cap {
        cap: KVM_CAP_SPLIT_IRQCHIP,
        ..Default::default()
    };
    cap.args[0] = 24;
    assert_eq!(vm.set(KVM_ENABLE_CAP, cap), Ok(0));
}
