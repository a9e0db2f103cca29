//! Copies between the program's memory and ours.
//!
//! A pointer that comes with an ioctl may point anywhere. The copies survive that: by the landing
//! places of the processor's own accesses where a handler of SIGSEGV is installed, else through
//! `process_vm_readv` and `process_vm_writev` on this very process. Both answer `EFAULT` where a
//! plain access would fault, as the kernel's own copies do. A struct is copied in once, before
//! anything of it is looked at, so that a program that changes it meanwhile changes nothing.
// UNSAFETY: vouches for which types are plain bytes, and calls process_vm_readv and _writev.
#![expect(unsafe_code)]

use crate::td::abi as td;
use crate::vanishing;
use kvm_bindings as kvm;
use rustix::io::Errno;
use std::mem::{MaybeUninit, size_of};

/// A type that any bytes make a value of, and whose bytes may all be shown to the program.
///
/// # Safety
/// Every bit pattern is a valid value. There may be padding only where the value was zeroed
/// before it was filled.
pub(crate) unsafe trait Plain: Copy {
    /// The value whose bytes are all zero.
    fn zeroed() -> Self {
        // SAFETY: every bit pattern is a valid value of a plain type.
        unsafe { MaybeUninit::zeroed().assume_init() }
    }
}

macro_rules! plain {
    ($($name:ty),* $(,)?) => {
        // SAFETY: integers, and structs of the KVM API, which consist of integers, arrays and
        // unions of integers and are laid out without implicit padding.
        $(unsafe impl Plain for $name {})*
    };
}

plain!(
    u8,
    u32,
    u64,
    i64,
    kvm::kvm_clear_dirty_log,
    kvm::kvm_clock_data,
    kvm::kvm_coalesced_mmio_zone,
    kvm::kvm_cpuid_entry,
    kvm::kvm_create_guest_memfd,
    kvm::kvm_cpuid_entry2,
    kvm::kvm_debugregs,
    kvm::kvm_device_attr,
    kvm::kvm_dirty_log,
    kvm::kvm_enable_cap,
    kvm::kvm_fpu,
    kvm::kvm_guest_debug,
    kvm::kvm_interrupt,
    kvm::kvm_ioeventfd,
    kvm::kvm_irq_level,
    kvm::kvm_irq_routing_entry,
    kvm::kvm_irqchip,
    kvm::kvm_irqfd,
    kvm::kvm_lapic_state,
    kvm::kvm_memory_attributes,
    kvm::kvm_mp_state,
    kvm::kvm_msi,
    kvm::kvm_msr_entry,
    kvm::kvm_pit_config,
    kvm::kvm_pit_state2,
    kvm::kvm_pre_fault_memory,
    kvm::kvm_regs,
    kvm::kvm_sregs,
    kvm::kvm_sregs2,
    kvm::kvm_sync_regs,
    kvm::kvm_tpr_access_ctl,
    kvm::kvm_translation,
    kvm::kvm_userspace_memory_region,
    kvm::kvm_userspace_memory_region2,
    kvm::kvm_vapic_addr,
    kvm::kvm_x86_mce,
    kvm::kvm_vcpu_events,
    kvm::kvm_xcrs,
    td::InitVm,
    td::MemoryRegion,
    td::TdxCommand,
    twofold_abi::spp::kvm_subpage,
    [u32; 1024],
    [u32; 2],
);

/// Copies a value in from the program's memory.
pub(crate) fn read<T: Plain>(address: usize) -> Result<T, Errno> {
    let mut value = MaybeUninit::<T>::uninit();
    // SAFETY: a value has room for its own bytes.
    unsafe { copy_in(address, value.as_mut_ptr().cast(), size_of::<T>()) }?;
    // SAFETY: all bytes were written, and any bytes are a value.
    Ok(unsafe { value.assume_init() })
}

/// Copies `count` values in from the program's memory.
///
/// The caller has bounded `count`.
pub(crate) fn read_slice<T: Plain>(address: usize, count: usize) -> Result<Vec<T>, Errno> {
    let mut values = vec![T::zeroed(); count];
    // SAFETY: the vector has room for `count` values.
    unsafe { copy_in(address, values.as_mut_ptr().cast(), count * size_of::<T>()) }?;
    Ok(values)
}

/// Copies a value out to the program's memory.
pub(crate) fn write<T: Plain>(address: usize, value: &T) -> Result<(), Errno> {
    write_slice(address, std::slice::from_ref(value))
}

/// Copies values out to the program's memory.
pub(crate) fn write_slice<T: Plain>(address: usize, values: &[T]) -> Result<(), Errno> {
    let length = size_of_val(values);
    if length == 0 {
        return Ok(());
    }
    if vanishing::is_survived() {
        // SAFETY: the handler is installed; the program asked to have these bytes written there.
        let copied =
            unsafe { twofold_cpu::process::copy_out(address, values.as_ptr().cast(), length) };
        return copied.map_err(|_| Errno::FAULT);
    }
    let local = libc::iovec {
        iov_base: values.as_ptr().cast_mut().cast(),
        iov_len: length,
    };
    let remote = libc::iovec {
        iov_base: std::ptr::without_provenance_mut(address),
        iov_len: length,
    };
    // SAFETY: the kernel only reads from `values` and writes where the program asked for it.
    let copied = unsafe { libc::process_vm_writev(own_process(), &local, 1, &remote, 1, 0) };
    complete(copied, length)
}

/// Copies bytes in from the program's memory.
///
/// # Errors
/// `EFAULT` where they are not there; some may have been copied.
///
/// # Safety
/// `to` has room for `length` bytes, which nobody refers to.
pub(crate) unsafe fn copy_in(address: usize, to: *mut u8, length: usize) -> Result<(), Errno> {
    if length == 0 {
        return Ok(());
    }
    if vanishing::is_survived() {
        // SAFETY: the handler is installed; `to` has room for `length` bytes, as promised.
        let copied = unsafe { twofold_cpu::process::copy_in(to, address, length) };
        return copied.map_err(|_| Errno::FAULT);
    }
    let local = libc::iovec {
        iov_base: to.cast(),
        iov_len: length,
    };
    let remote = libc::iovec {
        iov_base: std::ptr::without_provenance_mut(address),
        iov_len: length,
    };
    // SAFETY: `to` has room for `length` bytes, as promised.
    let copied = unsafe { libc::process_vm_readv(own_process(), &local, 1, &remote, 1, 0) };
    complete(copied, length)
}

fn own_process() -> libc::pid_t {
    rustix::process::getpid().as_raw_pid()
}

fn complete(copied: isize, length: usize) -> Result<(), Errno> {
    if usize::try_from(copied) == Ok(length) {
        Ok(())
    } else {
        Err(Errno::FAULT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_survive_the_way_there_and_back() {
        let mut here = 0_u64;
        write(&raw mut here as usize, &0x1234_5678_9abc_def0_u64).unwrap();
        assert_eq!(
            read::<u64>(&raw const here as usize),
            Ok(0x1234_5678_9abc_def0)
        );
        assert_eq!(here, 0x1234_5678_9abc_def0);
    }

    #[test]
    fn bad_pointers_answer_efault() {
        assert_eq!(read::<u64>(0), Err(Errno::FAULT));
        assert_eq!(read::<u64>(usize::MAX - 3), Err(Errno::FAULT));
        assert_eq!(write(8, &1_u64), Err(Errno::FAULT));
        assert_eq!(write(1 << 63, &1_u64), Err(Errno::FAULT));
        static READ_ONLY: u64 = 5;
        assert_eq!(
            write(&raw const READ_ONLY as usize, &1_u64),
            Err(Errno::FAULT)
        );
    }
}
