//! ioctls on `/dev/kvm`.

use super::number::*;
use super::{Reply, tables, unknown};
use crate::descriptor;
use crate::kvm::Kvm;
use crate::object::Object;
use crate::usercopy::{read, write};
use crate::vcpu::MACHINE_CHECK_SUPPORTED;
use kvm_bindings::{KVM_X86_XCOMP_GUEST_SUPP, kvm_device_attr};
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
        KVM_X86_GET_MCE_CAP_SUPPORTED => {
            write(argument, &MACHINE_CHECK_SUPPORTED)?;
            Ok(0)
        }
        KVM_HAS_DEVICE_ATTR | KVM_GET_DEVICE_ATTR => attribute(request, argument),
        _ => Err(unknown("/dev/kvm", request)),
    }
}

/// The only attribute of the system: the state components that a guest may have. `ENXIO` for
/// others.
fn attribute(request: u64, argument: usize) -> Reply {
    let attribute: kvm_device_attr = read(argument)?;
    if attribute.group != 0 || attribute.attr != u64::from(KVM_X86_XCOMP_GUEST_SUPP) {
        return Err(Errno::NXIO);
    }
    if request == KVM_GET_DEVICE_ATTR {
        write(attribute.addr as usize, &Kvm.guest_components())?;
    }
    Ok(0)
}

fn create_vm(kind: usize) -> Reply {
    let vm = Kvm.create_vm(kind as u64)?;
    let file = crate::shared::memfd("kvm-vm", 0)?;
    Ok(descriptor::install(file, Object::Vm(vm)))
}
