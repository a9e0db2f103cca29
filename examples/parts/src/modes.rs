//! A vCPU that starts in a protected mode, without firmware.

use anyhow::{Context, Result};
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;

const CR0_PE_ET_NE: u64 = 1 | 1 << 4 | 1 << 5;
const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;

/// Puts the vCPU where a boot loader would leave it: flat 64-bit segments, paging on with the tables
/// below `page_tables`, at the instruction at `entry`, with the stack below `stack`.
///
/// # Errors
/// KVM refuses the registers.
pub fn enter_long_mode(vcpu: &VcpuFd, page_tables: u64, entry: u64, stack: u64) -> Result<()> {
    const CR4_PAE: u64 = 1 << 5;
    const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;

    let mut sregs = vcpu.get_sregs()?;
    set_flat_segments(&mut sregs, true);
    sregs.cr0 = CR0_PE_ET_NE | CR0_WP | CR0_PG;
    sregs.cr3 = page_tables;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME_LMA;
    start(vcpu, &sregs, entry, stack)
}

/// Puts the vCPU where a multiboot loader would leave it: flat 32-bit segments and no paging, so that
/// what the guest addresses is guest-physical, at the instruction at `entry`, without a stack.
///
/// # Errors
/// KVM refuses the registers.
pub fn enter_flat_mode(vcpu: &VcpuFd, entry: u64) -> Result<()> {
    let mut sregs = vcpu.get_sregs()?;
    set_flat_segments(&mut sregs, false);
    sregs.cr0 = CR0_PE_ET_NE;
    start(vcpu, &sregs, entry, 0)
}

/// Code at selector 8, of 64 or of 32 bits, and data at selector 16, from 0 to the end.
fn set_flat_segments(sregs: &mut kvm_sregs, long: bool) {
    sregs.cs = kvm_segment {
        selector: 0x08,
        type_: 0b1011, // execute, read, accessed
        present: 1,
        s: 1,
        l: long.into(),
        db: (!long).into(),
        g: 1,
        limit: u32::MAX,
        ..Default::default()
    };
    let data = kvm_segment {
        selector: 0x10,
        type_: 0b0011, // read, write, accessed
        l: 0,
        db: 1,
        ..sregs.cs
    };
    for segment in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *segment = data;
    }
}

fn start(vcpu: &VcpuFd, sregs: &kvm_sregs, entry: u64, stack: u64) -> Result<()> {
    vcpu.set_sregs(sregs)
        .context("KVM refuses the system registers")?;
    vcpu.set_regs(&kvm_regs {
        rip: entry,
        rsp: stack,
        rflags: 1 << 1, // always set
        ..Default::default()
    })?;
    Ok(())
}
