//! Structures with a count and an array behind it: CPUID tables and lists of MSRs.

use super::Reply;
use crate::cpuid::MAX_ENTRIES;
use crate::usercopy;
use kvm_bindings::{kvm_cpuid_entry2, kvm_msr_entry};
use rustix::io::Errno;

/// Bytes of `struct kvm_cpuid2` and of `struct kvm_msrs` before their arrays.
const HEADER: usize = 8;
/// Bytes of `struct kvm_msr_list` before its array.
const LIST_HEADER: usize = 4;
/// Registers that one `KVM_GET_MSRS` or `KVM_SET_MSRS` may name (`MAX_IO_MSRS`).
const MAX_IO_MSRS: usize = 256;

fn after(address: usize, bytes: usize) -> Result<usize, Errno> {
    address.checked_add(bytes).ok_or(Errno::FAULT)
}

/// `KVM_GET_SUPPORTED_CPUID`: the table, if the program has room for it, else `E2BIG`.
pub(super) fn write_supported_cpuid(address: usize, table: &[kvm_cpuid_entry2]) -> Reply {
    let [room, _]: [u32; 2] = usercopy::read(address)?;
    if (room as usize).min(MAX_ENTRIES) < table.len() {
        return Err(Errno::TOOBIG);
    }
    usercopy::write_slice(after(address, HEADER)?, table)?;
    usercopy::write(address, &(table.len() as u32))?;
    Ok(0)
}

/// `KVM_GET_EMULATED_CPUID`: as [`write_supported_cpuid`]; `EINVAL` if the padding of the program's
/// entries is not zero.
pub(super) fn write_emulated_cpuid(address: usize, table: &[kvm_cpuid_entry2]) -> Reply {
    let [room, _]: [u32; 2] = usercopy::read(address)?;
    if room == 0 {
        return Err(Errno::TOOBIG);
    }
    let room = (room as usize).min(MAX_ENTRIES);
    let given: Vec<kvm_cpuid_entry2> = usercopy::read_slice(after(address, HEADER)?, room)?;
    if given.iter().any(|entry| entry.padding != [0; 3]) {
        return Err(Errno::INVAL);
    }
    write_supported_cpuid(address, table)
}

/// `KVM_GET_CPUID2`: `E2BIG` if the program has no room for the table.
pub(super) fn write_cpuid(address: usize, table: &[kvm_cpuid_entry2]) -> Reply {
    let [room, _]: [u32; 2] = usercopy::read(address)?;
    if (room as usize) < table.len() {
        return Err(Errno::TOOBIG);
    }
    usercopy::write_slice(after(address, HEADER)?, table)?;
    usercopy::write(address, &(table.len() as u32))?;
    Ok(0)
}

/// The table of `KVM_SET_CPUID2`: `E2BIG` if it has more than 256 entries.
pub(super) fn read_cpuid(address: usize) -> Result<Vec<kvm_cpuid_entry2>, Errno> {
    let [count, _]: [u32; 2] = usercopy::read(address)?;
    if count as usize > MAX_ENTRIES {
        return Err(Errno::TOOBIG);
    }
    usercopy::read_slice(after(address, HEADER)?, count as usize)
}

/// `KVM_GET_MSR_INDEX_LIST`: the count always, the list if there is room for it, else `E2BIG`.
pub(super) fn write_msr_list(address: usize, list: &[u32]) -> Reply {
    let room: u32 = usercopy::read(address)?;
    usercopy::write(address, &(list.len() as u32))?;
    if (room as usize) < list.len() {
        return Err(Errno::TOOBIG);
    }
    usercopy::write_slice(after(address, LIST_HEADER)?, list)?;
    Ok(0)
}

/// The registers of `KVM_GET_MSRS` and `KVM_SET_MSRS`: `E2BIG` for 256 and more.
fn read_msrs(address: usize) -> Result<Vec<kvm_msr_entry>, Errno> {
    let [count, _]: [u32; 2] = usercopy::read(address)?;
    if count as usize >= MAX_IO_MSRS {
        return Err(Errno::TOOBIG);
    }
    usercopy::read_slice(after(address, HEADER)?, count as usize)
}

/// `KVM_GET_MSRS`: answers how many registers could be read.
pub(super) fn get_msrs(address: usize, get: impl FnOnce(&mut [kvm_msr_entry]) -> usize) -> Reply {
    let mut entries = read_msrs(address)?;
    let done = get(&mut entries);
    usercopy::write_slice(after(address, HEADER)?, &entries)?;
    Ok(done as i32)
}

/// `KVM_SET_MSRS`: answers how many registers took their values.
pub(super) fn set_msrs(address: usize, set: impl FnOnce(&[kvm_msr_entry]) -> usize) -> Reply {
    Ok(set(&read_msrs(address)?) as i32)
}
