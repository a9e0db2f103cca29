//! The system: what `/dev/kvm` itself answers.

use crate::second_stage::Kind;
use crate::vcpu::{FEATURE_MSRS, SAVED_MSRS, VCPU_MMAP_SIZE, feature_msr};
use crate::vm::Vm;
use crate::{capability, cpuid};
use kvm_bindings::{KVM_API_VERSION, kvm_cpuid_entry2, kvm_msr_entry};
use rustix::io::Errno;
use std::sync::Arc;

/// The KVM system, stateless: what a descriptor of `/dev/kvm` refers to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kvm;

impl Kvm {
    /// `KVM_GET_API_VERSION`: 12.
    pub fn api_version(self) -> u32 {
        KVM_API_VERSION
    }

    /// `KVM_CHECK_EXTENSION`: 0 for what is not there.
    pub fn check_extension(self, capability: u64) -> u32 {
        capability::check(capability)
    }

    /// `KVM_GET_VCPU_MMAP_SIZE`, in bytes.
    pub fn vcpu_mmap_size(self) -> usize {
        VCPU_MMAP_SIZE
    }

    /// `KVM_CREATE_VM`
    ///
    /// # Errors
    /// `EINVAL` for a type that there is not; `ENOMEM`.
    pub fn create_vm(self, kind: u64) -> Result<Arc<Vm>, Errno> {
        Vm::new(kind)
    }

    /// `KVM_GET_SUPPORTED_CPUID`
    pub fn supported_cpuid(self) -> Vec<kvm_cpuid_entry2> {
        cpuid::offered(Kind::from_environment())
    }

    /// `KVM_GET_DEVICE_ATTR` of `KVM_X86_XCOMP_GUEST_SUPP`: the bits of XCR0 that a guest may set.
    pub fn guest_components(self) -> u64 {
        cpuid::offered_components()
    }

    /// `KVM_GET_EMULATED_CPUID`
    pub fn emulated_cpuid(self) -> Vec<kvm_cpuid_entry2> {
        cpuid::emulated()
    }

    /// `KVM_GET_MSR_INDEX_LIST`
    pub fn msr_index_list(self) -> &'static [u32] {
        SAVED_MSRS
    }

    /// `KVM_GET_MSR_FEATURE_INDEX_LIST`
    pub fn msr_feature_index_list(self) -> &'static [u32] {
        FEATURE_MSRS
    }

    /// `KVM_GET_MSRS` on the system: fills in feature registers up to the first that is none. How
    /// many that were.
    pub fn get_msrs(self, entries: &mut [kvm_msr_entry]) -> usize {
        let mut done = 0;
        for entry in entries {
            let Some(value) = feature_msr(entry.index) else {
                break;
            };
            entry.data = value;
            done += 1;
        }
        done
    }
}
