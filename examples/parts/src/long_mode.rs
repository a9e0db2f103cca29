//! A vCPU that starts in 64-bit mode.

use anyhow::{Context, Result};
use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;

/// Puts the vCPU where a boot loader would leave it: flat 64-bit segments, paging on with the tables
/// below `page_tables`, at the instruction at `entry`, with the stack below `stack`.
///
/// # Errors
/// KVM refuses the registers.
pub fn enter_long_mode(vcpu: &VcpuFd, page_tables: u64, entry: u64, stack: u64) -> Result<()> {
    const CR0_PE_ET_NE_WP_PG: u64 = 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 31;
    const CR4_PAE: u64 = 1 << 5;
    const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;

    let code = kvm_segment {
        selector: 0x08,
        type_: 0b1011, // execute, read, accessed
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        limit: u32::MAX,
        ..Default::default()
    };
    let data = kvm_segment {
        selector: 0x10,
        type_: 0b0011, // read, write, accessed
        l: 0,
        db: 1,
        ..code
    };
    let mut sregs = vcpu.get_sregs()?;
    sregs.cs = code;
    for segment in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *segment = data;
    }
    sregs.cr0 = CR0_PE_ET_NE_WP_PG;
    sregs.cr3 = page_tables;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME_LMA;
    vcpu.set_sregs(&sregs)
        .context("KVM refuses the system registers")?;

    vcpu.set_regs(&kvm_regs {
        rip: entry,
        rsp: stack,
        rflags: 1 << 1, // always set
        ..Default::default()
    })?;
    Ok(())
}
