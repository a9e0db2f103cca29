//! ioctls on a vCPU.

use super::number::*;
use super::{Reply, tables, unknown};
use crate::descriptor;
use crate::object::Object;
use crate::stats_file::StatsFile;
use crate::td;
use crate::usercopy::{Plain, read, read_slice, write};
use crate::vcpu::{Vcpu, XSAVE_WORDS};
use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, kvm_cpuid_entry, kvm_cpuid_entry2, kvm_device_attr,
    kvm_interrupt, kvm_pre_fault_memory, kvm_tpr_access_ctl, kvm_translation, kvm_vapic_addr,
};
use rustix::io::Errno;
use std::sync::Arc;

/// Bytes of a signal set.
const SIGSET_BYTES: u32 = 8;

#[inline]
pub(super) fn ioctl(vcpu: &Vcpu, request: u64, argument: usize) -> Reply {
    if !vcpu.vm().is_ours() || vcpu.vm().is_bugged() {
        return Err(Errno::IO);
    }
    if request == KVM_RUN {
        if argument != 0 {
            return Err(Errno::INVAL);
        }
        return done(vcpu.run());
    }
    other(vcpu, request, argument)
}

fn other(vcpu: &Vcpu, request: u64, argument: usize) -> Reply {
    if vcpu.vm().td().is_some() && td::refuses(request) {
        return Err(Errno::INVAL);
    }
    match request {
        KVM_GET_REGS => reply(argument, Ok(vcpu.get_regs())),
        KVM_SET_REGS => {
            vcpu.set_regs(&read(argument)?);
            Ok(0)
        }
        KVM_GET_SREGS => reply(argument, Ok(vcpu.get_sregs())),
        KVM_SET_SREGS => done(vcpu.set_sregs(&read(argument)?)),
        KVM_GET_SREGS2 => reply(argument, Ok(vcpu.get_sregs2())),
        KVM_SET_SREGS2 => done(vcpu.set_sregs2(&read(argument)?)),
        KVM_GET_FPU => reply(argument, Ok(vcpu.get_fpu())),
        KVM_SET_FPU => {
            vcpu.set_fpu(&read(argument)?);
            Ok(0)
        }
        KVM_GET_XSAVE | KVM_GET_XSAVE2 => reply(argument, Ok(vcpu.get_xsave())),
        KVM_SET_XSAVE => done(vcpu.set_xsave(&read::<[u32; XSAVE_WORDS]>(argument)?)),
        KVM_GET_XCRS => reply(argument, Ok(vcpu.get_xcrs())),
        KVM_SET_XCRS => done(vcpu.set_xcrs(&read(argument)?)),
        KVM_GET_DEBUGREGS => reply(argument, Ok(vcpu.get_debugregs())),
        KVM_SET_DEBUGREGS => done(vcpu.set_debugregs(&read(argument)?)),
        KVM_GET_VCPU_EVENTS => reply(argument, Ok(vcpu.get_vcpu_events())),
        KVM_SET_VCPU_EVENTS => done(vcpu.set_vcpu_events(&read(argument)?)),
        KVM_GET_MP_STATE => reply(argument, Ok(vcpu.get_mp_state())),
        KVM_SET_MP_STATE => done(vcpu.set_mp_state(&read(argument)?)),
        KVM_SET_CPUID2 => done(vcpu.set_cpuid2(&tables::read_cpuid(argument)?)),
        KVM_GET_CPUID2 => tables::write_cpuid(argument, &vcpu.get_cpuid2()),
        KVM_SET_CPUID => done(vcpu.set_cpuid2(&read_old_cpuid(argument)?)),
        KVM_GET_MSRS => tables::get_msrs(argument, |entries| vcpu.get_msrs(entries)),
        KVM_SET_MSRS => tables::set_msrs(argument, |entries| vcpu.set_msrs(entries)),
        KVM_GET_LAPIC => reply(argument, vcpu.get_lapic()),
        KVM_SET_LAPIC => done(vcpu.set_lapic(&read(argument)?)),
        KVM_INTERRUPT => done(vcpu.interrupt(read::<kvm_interrupt>(argument)?.irq)),
        KVM_NMI => {
            vcpu.nmi();
            Ok(0)
        }
        KVM_X86_SETUP_MCE => done(vcpu.set_up_machine_check(read(argument)?)),
        KVM_X86_SET_MCE => done(vcpu.report_machine_check(&read(argument)?)),
        KVM_TPR_ACCESS_REPORTING => {
            let control: kvm_tpr_access_ctl = read(argument)?;
            reply(
                argument,
                vcpu.report_task_priority(&control).map(|()| control),
            )
        }
        KVM_SET_VAPIC_ADDR => {
            let address: kvm_vapic_addr = read(argument)?;
            done(vcpu.set_vapic_address(address.vapic_addr))
        }
        KVM_SET_GUEST_DEBUG => done(vcpu.set_guest_debug(&read(argument)?)),
        KVM_TRANSLATE => {
            let translation: kvm_translation = read(argument)?;
            reply(argument, Ok(vcpu.translate(translation.linear_address)))
        }
        KVM_GET_TSC_KHZ => Ok(vcpu.get_tsc_khz() as i32),
        KVM_SET_TSC_KHZ => done(vcpu.set_tsc_khz(argument as u32)),
        KVM_PRE_FAULT_MEMORY => {
            let mut request: kvm_pre_fault_memory = read(argument)?;
            let result = vcpu.pre_fault_memory(&mut request);
            // What is left, whether it ended well or not.
            write(argument, &request)?;
            done(result)
        }
        KVM_MEMORY_ENCRYPT_OP => done(vcpu.memory_encrypt_op(argument)),
        KVM_SET_SIGNAL_MASK => set_signal_mask(vcpu, argument),
        KVM_ENABLE_CAP => done(vcpu.enable_cap(&read(argument)?)),
        KVM_KVMCLOCK_CTRL => done(vcpu.note_stopped()),
        KVM_HAS_DEVICE_ATTR | KVM_GET_DEVICE_ATTR | KVM_SET_DEVICE_ATTR => {
            attribute(vcpu, request, argument)
        }
        KVM_GET_STATS_FD => {
            let (stats, file) = StatsFile::of_vcpu(vcpu.vm(), vcpu.core())?;
            Ok(descriptor::install(file, Object::Stats(Arc::new(stats))))
        }
        _ if request >> 8 & 0xff != KVMIO => Err(Errno::INVAL),
        _ => Err(unknown("vCPU", request)),
    }
}

/// The only attribute of a vCPU: the offset of its time stamp counter. `ENXIO` for others.
fn attribute(vcpu: &Vcpu, request: u64, argument: usize) -> Reply {
    let attribute: kvm_device_attr = read(argument)?;
    if attribute.group != KVM_VCPU_TSC_CTRL || attribute.attr != u64::from(KVM_VCPU_TSC_OFFSET) {
        return Err(Errno::NXIO);
    }
    let place = attribute.addr as usize;
    match request {
        KVM_GET_DEVICE_ATTR => write(place, &vcpu.get_tsc_offset())?,
        KVM_SET_DEVICE_ATTR => vcpu.set_tsc_offset(read(place)?),
        _ => {}
    }
    Ok(0)
}

fn done(result: Result<(), Errno>) -> Reply {
    result.map(|()| 0)
}

fn reply<T: Plain>(address: usize, value: Result<T, Errno>) -> Reply {
    write(address, &value?)?;
    Ok(0)
}

/// The table of `KVM_SET_CPUID`, which has no subleaves.
fn read_old_cpuid(argument: usize) -> Result<Vec<kvm_cpuid_entry2>, Errno> {
    let [count, _]: [u32; 2] = read(argument)?;
    if count as usize > crate::cpuid::MAX_ENTRIES {
        return Err(Errno::TOOBIG);
    }
    let entries = argument.checked_add(8).ok_or(Errno::FAULT)?;
    let entries: Vec<kvm_cpuid_entry> = read_slice(entries, count as usize)?;
    Ok(entries
        .iter()
        .map(|entry| kvm_cpuid_entry2 {
            function: entry.function,
            eax: entry.eax,
            ebx: entry.ebx,
            ecx: entry.ecx,
            edx: entry.edx,
            ..Default::default()
        })
        .collect())
}

fn set_signal_mask(vcpu: &Vcpu, argument: usize) -> Reply {
    if argument == 0 {
        vcpu.set_signal_mask(None);
        return Ok(0);
    }
    let length: u32 = read(argument)?;
    if length != SIGSET_BYTES {
        return Err(Errno::INVAL);
    }
    let mask: u64 = read(argument.checked_add(4).ok_or(Errno::FAULT)?)?;
    vcpu.set_signal_mask(Some(mask));
    Ok(0)
}
