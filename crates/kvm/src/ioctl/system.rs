//! ioctls on `/dev/kvm`.

use super::number::*;
use super::{Reply, tables, unknown};
use crate::descriptor;
use crate::kvm::Kvm;
use crate::object::Object;
use rustix::io::Errno;

pub(super) fn ioctl(request: u64, argument: usize) -> Reply {
    match request {
        KVM_GET_API_VERSION if argument == 0 => Ok(Kvm.api_version() as i32),
        KVM_GET_VCPU_MMAP_SIZE if argument == 0 => Ok(Kvm.vcpu_mmap_size() as i32),
        KVM_GET_API_VERSION | KVM_GET_VCPU_MMAP_SIZE => Err(Errno::INVAL),
        KVM_CREATE_VM => create_vm(argument),
        KVM_CHECK_EXTENSION => Ok(Kvm.check_extension(argument as u64) as i32),
        KVM_GET_SUPPORTED_CPUID => tables::write_supported_cpuid(argument, &Kvm.supported_cpuid()),
        KVM_GET_EMULATED_CPUID => tables::write_emulated_cpuid(argument, &Kvm.emulated_cpuid()),
        KVM_GET_MSR_INDEX_LIST => tables::write_msr_list(argument, Kvm.msr_index_list()),
        KVM_GET_MSR_FEATURE_INDEX_LIST => {
            tables::write_msr_list(argument, Kvm.msr_feature_index_list())
        }
        KVM_GET_MSRS => tables::get_msrs(argument, |entries| Kvm.get_msrs(entries)),
        _ => Err(unknown("/dev/kvm", request)),
    }
}

fn create_vm(kind: usize) -> Reply {
    let vm = Kvm.create_vm(kind as u64)?;
    let file = crate::shared::memfd("kvm-vm", 0)?;
    Ok(descriptor::install(file, Object::Vm(vm)))
}
