//! TDCALL: the functions of the TDX module for guests (TDX Module ABI Reference, "Guest-Side
//! (TDCALL) Interface Functions").

use super::super::VcpuState;
use crate::td::ProcessPlatform;
use twofold_arch::qualification::Qualification;
use twofold_cpu::state::gpr;
use twofold_cpu::{Exception, Exit, SecondStageFault, vector};
use twofold_tdx::{Accept, Entered, Operand, Status};

/// Numbers of functions.
mod leaf {
    /// TDG.VP.VMCALL
    pub(super) const VP_VMCALL: u64 = 0;
    /// TDG.VP.INFO
    pub(super) const VP_INFO: u64 = 1;
    /// TDG.VP.VEINFO.GET
    pub(super) const VP_VEINFO_GET: u64 = 3;
    /// TDG.MR.REPORT
    pub(super) const MR_REPORT: u64 = 4;
    /// TDG.MEM.PAGE.ACCEPT
    pub(super) const MEM_PAGE_ACCEPT: u64 = 6;
    /// TDG.VM.RD
    pub(super) const VM_RD: u64 = 7;
}

/// Metadata of a TD that its guest may read (TDG.VM.RD). A field's number is its class, that it is
/// the TD's, the size of its elements, and its code.
mod field {
    /// What identifies a field: class, context, size of elements and code.
    pub(super) const IDENTITY: u64 = 0x7f70_0003_00ff_ffff;
    pub(super) const ATTRIBUTES: u64 = 0x1110_0003_0000_0000;
    pub(super) const MAX_VCPUS: u64 = 0x1110_0001_0000_0002;
    /// The first of six words of MRTD, the measurement.
    pub(super) const MRTD: u64 = 0x1310_0003_0000_0000;
    pub(super) const MRTD_WORDS: u64 = 6;
}

const R8: usize = 8;
const R9: usize = 9;
const R10: usize = 10;
const R11: usize = 11;

/// Bits of TDG.VP.VMCALL's RCX that may not be set: RAX, RCX and RSP, and those that are no register.
const NEVER_EXPOSED: u64 = 0xffff_ffff_0000_0000 | 1 << gpr::RAX | 1 << gpr::RCX | 1 << gpr::RSP;

/// What the module does about TDCALL. `None`: it is done, or to be executed again. Otherwise the
/// guest leaves with this exit.
pub(super) fn answer(state: &mut VcpuState, inside: &Entered<'_, ProcessPlatform>) -> Option<Exit> {
    if !state.is_long_mode() {
        state.cpu.queue_exception(Exception {
            vector: vector::GP,
            error_code: Some(0),
            payload: None,
        });
        return None;
    }
    let mut registers = state.cpu.registers().gpr;
    let rax = registers[gpr::RAX];
    let (number, version) = (rax & 0xffff, rax >> 16);
    let versions = u64::from(number == leaf::VM_RD);
    let status = match number {
        _ if version > versions => Status::OPERAND_INVALID.with(Operand::Rax),
        leaf::VP_VMCALL if registers[gpr::RCX] & NEVER_EXPOSED == 0 => return Some(Exit::Tdcall),
        leaf::VP_VMCALL => Status::OPERAND_INVALID.with(Operand::Rcx),
        leaf::VP_INFO => info(inside, &mut registers),
        leaf::VP_VEINFO_GET => take_ve(state, &mut registers),
        leaf::MEM_PAGE_ACCEPT => match inside.accept(registers[gpr::RCX]) {
            Accept::Returned(status) => status,
            // The instruction is executed again, after whatever interrupted it.
            Accept::Again => return None,
            Accept::Exit { gpa, .. } => {
                return Some(Exit::SecondStage(SecondStageFault::EptViolation {
                    gpa,
                    qualification: Qualification::WRITE.bits(),
                    gla: 0,
                }));
            }
        },
        leaf::VM_RD => read_metadata(inside, version, &mut registers),
        leaf::MR_REPORT => {
            tracing::warn!("the guest asks for a report, which only hardware can sign");
            Status::OPERAND_INVALID.with(Operand::Rax)
        }
        _ => {
            tracing::debug!(number, "the guest calls a function that is not modelled");
            Status::OPERAND_INVALID.with(Operand::Rax)
        }
    };
    registers[gpr::RAX] = status.raw();
    state.cpu.complete_tdcall(&registers);
    None
}

/// TDG.VP.INFO
fn info(inside: &Entered<'_, ProcessPlatform>, registers: &mut [u64; 16]) -> Status {
    let Some(info) = inside.info() else {
        return Status::OP_STATE_INCORRECT;
    };
    registers[gpr::RCX] = info.gpa_width.into();
    registers[gpr::RDX] = info.attributes;
    registers[R8] = u64::from(info.vcpus) | u64::from(info.max_vcpus) << 32;
    registers[R9] = info.index.into();
    // There is no TDG.SYS.RD.
    registers[R10] = 0;
    registers[R11] = 0;
    Status::SUCCESS
}

/// TDG.VP.VEINFO.GET: what the last #VE was about, once.
fn take_ve(state: &mut VcpuState, registers: &mut [u64; 16]) -> Status {
    let taken = state.cpu.take_ve();
    registers[gpr::RCX] = taken.map_or(0, |info| info.reason.into());
    registers[gpr::RDX] = taken.map_or(0, |info| info.qualification);
    registers[R8] = taken.map_or(0, |info| info.gla);
    registers[R9] = taken.map_or(0, |info| info.gpa.get());
    // The upper half is information about the instruction, which those that raise #VE have none of.
    registers[R10] = taken.map_or(0, |info| info.instruction_length.into());
    match taken {
        Some(_) => Status::SUCCESS,
        None => Status::NO_VALID_VE_INFO,
    }
}

/// TDG.VM.RD of the field in RDX, into R8. RCX names the TD: 0 is the caller's own.
fn read_metadata(
    inside: &Entered<'_, ProcessPlatform>,
    version: u64,
    registers: &mut [u64; 16],
) -> Status {
    registers[R8] = 0;
    if registers[gpr::RCX] != 0 {
        return Status::OPERAND_INVALID.with(Operand::Rcx);
    }
    let field = registers[gpr::RDX] & field::IDENTITY;
    let value = match field {
        field::ATTRIBUTES => inside.info().map(|info| info.attributes),
        field::MAX_VCPUS => inside.info().map(|info| info.max_vcpus.into()),
        _ => field
            .checked_sub(field::MRTD)
            .filter(|word| *word < field::MRTD_WORDS)
            .and_then(|word| {
                let digest = inside.measurement()?;
                let (words, _) = digest.as_chunks::<8>();
                words.get(word as usize).copied().map(u64::from_le_bytes)
            }),
    };
    if version > 0 {
        // The number of the next field; there is no list of fields here.
        registers[gpr::RDX] = u64::MAX;
    }
    let Some(value) = value else {
        return Status::METADATA_FIELD_ID_INCORRECT.with(Operand::Rdx);
    };
    registers[R8] = value;
    Status::SUCCESS
}
