//! How a TD's virtual processor starts: in protected mode, with flat 32-bit segments and without
//! paging, 16 bytes below 4 GiB (TDX module, "Initial State of TD Guest GPRs" and "CRs").

use crate::cpuid;
use kvm_bindings::kvm_cpuid_entry2;
use twofold_cpu::state::{cr0, cr4, efer, gpr};
use twofold_cpu::{Registers, Segment, SystemRegisters, TableRegister};
use twofold_tdx::TdParams;

/// The first instruction.
const RESET_VECTOR: u64 = 0xffff_fff0;
/// Index of R8.
const R8: usize = 8;

/// RBX: the width of guest-physical addresses. RCX and R8: what the program chose. RDX: family, model
/// and stepping. RSI: the vCPU's number.
pub(super) fn registers(
    params: &TdParams,
    table: &[kvm_cpuid_entry2],
    initial: u64,
    index: u32,
) -> Registers {
    let mut registers = Registers {
        rip: RESET_VECTOR,
        rflags: 1 << 1,
        ..Default::default()
    };
    registers.gpr[gpr::RBX] = u64::from(params.shared_bit()) + 1;
    registers.gpr[gpr::RCX] = initial;
    registers.gpr[R8] = initial;
    registers.gpr[gpr::RDX] = cpuid::find(table, 1, 0).map_or(0, |leaf| leaf.eax.into());
    registers.gpr[gpr::RSI] = index.into();
    registers
}

pub(super) fn system_registers() -> SystemRegisters {
    /// Types of segment descriptors.
    const READ_WRITE_ACCESSED: u8 = 0b0011;
    const EXECUTE_READ_ACCESSED: u8 = 0b1011;
    const LDT: u8 = 0b0010;
    const BUSY_TSS: u8 = 0b1011;
    let flat = |kind| Segment {
        limit: u32::MAX,
        kind,
        code_or_data: true,
        present: true,
        big: true,
        granular: true,
        ..Default::default()
    };
    let data = flat(READ_WRITE_ACCESSED);
    SystemRegisters {
        cs: flat(EXECUTE_READ_ACCESSED),
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: Segment {
            limit: 0xffff,
            kind: BUSY_TSS,
            present: true,
            ..Default::default()
        },
        ldt: Segment {
            limit: 0xffff,
            kind: LDT,
            present: true,
            unusable: true,
            ..Default::default()
        },
        gdt: TableRegister {
            base: 0,
            limit: 0xffff,
        },
        idt: TableRegister { base: 0, limit: 0 },
        cr0: cr0::PE | cr0::ET | cr0::NE,
        cr4: cr4::MCE,
        efer: efer::SCE | efer::LME | efer::NXE,
        ..Default::default()
    }
}
