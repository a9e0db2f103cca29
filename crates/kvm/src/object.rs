//! What a descriptor refers to.

use crate::guest_memory::GuestMemory;
use crate::stats_file::StatsFile;
use crate::vcpu::Vcpu;
use crate::vm::Vm;
use std::sync::Arc;

/// One of KVM's objects behind a descriptor.
pub(crate) enum Object {
    /// `/dev/kvm`
    System,
    Vm(Arc<Vm>),
    Vcpu(Vcpu),
    Stats(Arc<StatsFile>),
    GuestMemory(Arc<GuestMemory>),
}

impl Object {
    /// The same object for another descriptor.
    pub(crate) fn duplicate(&self) -> Self {
        match self {
            Self::System => Self::System,
            Self::Vm(vm) => Self::Vm(Arc::clone(vm)),
            Self::Vcpu(vcpu) => Self::Vcpu(vcpu.clone()),
            Self::Stats(stats) => Self::Stats(Arc::clone(stats)),
            Self::GuestMemory(file) => Self::GuestMemory(Arc::clone(file)),
        }
    }

    /// The last user of a descriptor is gone.
    ///
    /// In a forked child the parent's objects are left alone: their locks may be held by threads
    /// that the child does not have.
    pub(crate) fn close(self) {
        let inherited = match &self {
            Self::System => false,
            Self::Vm(vm) => !vm.is_ours(),
            Self::Vcpu(vcpu) => !vcpu.vm().is_ours(),
            Self::Stats(stats) => !stats.vm().is_ours(),
            Self::GuestMemory(file) => !file.vm().is_ours(),
        };
        if inherited {
            std::mem::forget(self);
        }
    }
}
