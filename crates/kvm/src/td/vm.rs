//! `KVM_MEMORY_ENCRYPT_OP` on a TD's descriptor.

use super::abi::{CAPABILITIES_WORDS, InitVm, TdxCommand, command};
use super::cpuid::{self, Refused};
use super::life::{ControlError, ParamsPage, Stage};
use crate::cpuid::MAX_ENTRIES;
use crate::usercopy;
use crate::vm::Vm;
use kvm_bindings::kvm_cpuid_entry2;
use rustix::io::Errno;
use twofold_tdx::{Operand, SEPT_VE_DISABLE, Status, TD_PARAMS_BYTES};

/// Bytes of `struct kvm_tdx_capabilities` before the entries of its CPUID table.
const CAPABILITIES_BYTES: usize = CAPABILITIES_WORDS * 8 + 8;
/// ATTRIBUTES that a program may set.
const SUPPORTED_ATTRIBUTES: u64 = SEPT_VE_DISABLE;
/// XFAM bits that every TD has: x87 and SSE state.
const FIXED_XFAM: u64 = 0b11;
/// The leaf whose EAX and EDX say which states XSAVE knows.
const XSAVE_LEAF: u32 = 0xd;

impl Vm {
    /// `KVM_MEMORY_ENCRYPT_OP` on the VM: the command at `argument`.
    ///
    /// # Errors
    /// `ENOTTY` for a VM that is no TD; `EFAULT`; `EINVAL` if `hw_error` is not 0 or there is no such
    /// command; then those of the command.
    pub(crate) fn memory_encrypt_op(&self, argument: usize) -> Result<(), Errno> {
        if self.td().is_none() {
            return Err(Errno::NOTTY);
        }
        let mut request: TdxCommand = usercopy::read(argument)?;
        if request.hw_error != 0 {
            return Err(Errno::INVAL);
        }
        let result = match request.id {
            command::CAPABILITIES => return capabilities(&request),
            command::INIT_VM => self.td_init_vm(&mut request),
            command::FINALIZE_VM => self.td_finalize(&mut request),
            _ => return Err(Errno::INVAL),
        };
        usercopy::write(argument, &request)?;
        result
    }

    /// `KVM_TDX_INIT_VM` (SPEC 3.4).
    fn td_init_vm(&self, request: &mut TdxCommand) -> Result<(), Errno> {
        let td = self.td().ok_or(Errno::NOTTY)?;
        let config = self.config.lock();
        if td.stage() != Stage::Uninitialized || request.flags != 0 {
            return Err(Errno::INVAL);
        }
        let address = usize::try_from(request.data).map_err(|_| Errno::FAULT)?;
        let init: InitVm = usercopy::read(address)?;
        let count = init.cpuid_count as usize;
        if count > MAX_ENTRIES {
            return Err(Errno::TOOBIG);
        }
        let entries = address
            .checked_add(size_of::<InitVm>())
            .ok_or(Errno::FAULT)?;
        let entries: Vec<kvm_cpuid_entry2> = usercopy::read_slice(entries, count)?;
        if init.reserved.iter().any(|&word| word != 0) || init.cpuid_padding != 0 {
            return Err(Errno::INVAL);
        }
        if !config.vcpus.is_empty() {
            return Err(Errno::BUSY);
        }
        if init.attributes & !SUPPORTED_ATTRIBUTES != 0 || init.xfam & !supported_xfam() != 0 {
            return Err(Errno::INVAL);
        }
        let width = cpuid::address_width(&entries).ok_or(Errno::INVAL)?;
        let table = match cpuid::table(&entries, width) {
            Ok(table) => table,
            Err(Refused::Leaf) => return Err(Errno::INVAL),
            Err(Refused::Bit) => {
                request.hw_error = Status::OPERAND_INVALID.with(Operand::Rdx).raw();
                return Err(Errno::INVAL);
            }
        };
        let params = td_params(&init, width, self.max_vcpus() as u16);
        match td.create(&params, table) {
            Ok(()) => {}
            Err(ControlError::Host(error)) => return Err(error),
            Err(ControlError::Module(status)) if status.is(Status::OPERAND_INVALID) => {
                request.hw_error = status.raw();
                return Err(Errno::INVAL);
            }
            Err(ControlError::Module(status)) => {
                request.hw_error = status.raw();
                return Err(Errno::IO);
            }
        }
        self.enable_mirror()?;
        td.set_stage(Stage::Initialized);
        Ok(())
    }

    /// `KVM_TDX_FINALIZE_VM`
    fn td_finalize(&self, request: &mut TdxCommand) -> Result<(), Errno> {
        let td = self.td().ok_or(Errno::NOTTY)?;
        let _building = td.building.lock();
        if !td.has_key() || td.stage() == Stage::Runnable {
            return Err(Errno::INVAL);
        }
        match td.module().mr_finalize(td.tdr()?) {
            Ok(()) => {
                td.set_stage(Stage::Runnable);
                Ok(())
            }
            Err(failure) => {
                request.hw_error = failure.status.raw();
                if failure.status.may_be_retried() {
                    return Err(Errno::BUSY);
                }
                td.bug("its measurement cannot be ended", Some(failure.status));
                Err(Errno::IO)
            }
        }
    }
}

fn supported_xfam() -> u64 {
    let table = crate::cpuid::supported(crate::second_stage::Kind::Ept);
    let leaf = crate::cpuid::find(&table, XSAVE_LEAF, 0);
    FIXED_XFAM | leaf.map_or(0, |leaf| u64::from(leaf.edx) << 32 | u64::from(leaf.eax))
}

/// `KVM_TDX_CAPABILITIES`
fn capabilities(request: &TdxCommand) -> Result<(), Errno> {
    if request.flags != 0 {
        return Err(Errno::INVAL);
    }
    let address = usize::try_from(request.data).map_err(|_| Errno::FAULT)?;
    let after = |bytes| address.checked_add(bytes).ok_or(Errno::FAULT);
    let room: u32 = usercopy::read(after(CAPABILITIES_WORDS * 8)?)?;
    let table = cpuid::configurable();
    if (room as usize) < table.len() {
        return Err(Errno::TOOBIG);
    }
    let mut words = [0_u64; CAPABILITIES_WORDS + 1];
    words[0] = SUPPORTED_ATTRIBUTES;
    words[1] = supported_xfam();
    words[CAPABILITIES_WORDS] = table.len() as u64;
    usercopy::write_slice(address, &words)?;
    usercopy::write_slice(after(CAPABILITIES_BYTES)?, &table)
}

/// TD_PARAMS, as the module reads it: ATTRIBUTES, XFAM, MAX_VCPUS, EPTP_CONTROLS, CONFIG_FLAGS, and
/// the three digests that the program chose.
fn td_params(init: &InitVm, width: u8, max_vcpus: u16) -> ParamsPage {
    const WRITE_BACK: u64 = 6;
    const DIGESTS: usize = 80;
    let mut page = ParamsPage([0; TD_PARAMS_BYTES]);
    let mut put = |at: usize, value: u64| {
        page.0[at..at + 8].copy_from_slice(&value.to_le_bytes());
    };
    let (levels, wide) = if width == 52 { (5, 1) } else { (4, 0) };
    put(0, init.attributes);
    put(8, init.xfam | FIXED_XFAM);
    put(16, max_vcpus.into());
    put(24, WRITE_BACK | (levels - 1) << 3);
    put(32, wide);
    for (index, word) in init.digests.iter().flatten().enumerate() {
        put(DIGESTS + 8 * index, *word);
    }
    page
}
