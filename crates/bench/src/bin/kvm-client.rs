//! A KVM program that measures the KVM it runs on.
//!
//! `twofold-bench` starts it twice: under `twofold run`, and as it is where the machine has a
//! `/dev/kvm` of its own. It knows the KVM API alone, so both runs execute the same code. Each line of its output is `name nanoseconds`, a median over several rounds.
//!
//! UNSAFETY: mapping guest memory and handing it to KVM are unsafe operations of `kvm-ioctls` and
//! `rustix`.
#![expect(unsafe_code)]

use anyhow::{Context, Result, bail};
use example_parts::enter_long_mode;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
use std::time::Instant;

const PAGE: usize = 4096;
const ROUNDS: usize = 7;
/// Page tables and code live in the first MiB; the pages that are touched lie above.
const TOUCHED: u64 = 16 << 20;
const TOUCHED_PAGES: usize = 8192;
const CODE: u64 = 0x8000;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const DIRECTORY: u64 = 0x3000;

fn main() -> Result<()> {
    let kvm = Kvm::new().context("opening /dev/kvm")?;
    println!("out_exit {:.1}", median(|| out_exit(&kvm))?);
    println!("fault_4k {:.1}", median(|| fault_4k(&kvm))?);
    println!("slot_add_delete {:.1}", slot_add_delete(&kvm)?);
    Ok(())
}

fn median(mut round: impl FnMut() -> Result<f64>) -> Result<f64> {
    let mut figures = (0..ROUNDS).map(|_| round()).collect::<Result<Vec<_>>>()?;
    figures.sort_by(f64::total_cmp);
    Ok(figures[ROUNDS / 2])
}

/// Memory of the program, mapped for as long as the process lives.
fn memory(bytes: usize) -> Result<*mut u8> {
    // SAFETY: an anonymous mapping at an address of the kernel's choice aliases nothing.
    let address = unsafe {
        mmap_anonymous(
            std::ptr::null_mut(),
            bytes,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::POPULATE,
        )
    };
    Ok(address.context("mapping guest memory")?.cast())
}

fn set_slot(vm: &VmFd, slot: u32, gpa: u64, bytes: usize, host: *mut u8) -> Result<()> {
    let region = kvm_userspace_memory_region {
        slot,
        flags: 0,
        guest_phys_addr: gpa,
        memory_size: bytes as u64,
        userspace_addr: host as u64,
    };
    // SAFETY: `host` comes from `memory` and stays mapped for as long as the process lives.
    unsafe { vm.set_user_memory_region(region) }.with_context(|| format!("slot {slot}"))
}

fn run_until_port(vcpu: &mut VcpuFd, port: u16) -> Result<()> {
    match vcpu.run()? {
        VcpuExit::IoOut(p, _) if p == port => Ok(()),
        exit => bail!("the guest left with {exit:?} instead of a write to port {port:#x}"),
    }
}

/// One `out` of a real-mode guest, seen by the program, and the way back.
fn out_exit(kvm: &Kvm) -> Result<f64> {
    const EXITS: u32 = 20_000;
    let vm = kvm.create_vm()?;
    let host = memory(PAGE)?;
    // out 0x10, al; jmp back
    let code = [0xe6, 0x10, 0xeb, 0xfc];
    // SAFETY: the page is ours and larger than the code.
    unsafe { host.copy_from_nonoverlapping(code.as_ptr(), code.len()) };
    set_slot(&vm, 0, CODE, PAGE, host)?;
    let mut vcpu = vm.create_vcpu(0)?;
    let mut sregs = vcpu.get_sregs()?;
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    regs.rip = CODE;
    regs.rflags = 2;
    vcpu.set_regs(&regs)?;
    for _ in 0..100 {
        run_until_port(&mut vcpu, 0x10)?;
    }
    let start = Instant::now();
    for _ in 0..EXITS {
        run_until_port(&mut vcpu, 0x10)?;
    }
    Ok(start.elapsed().as_nanos() as f64 / f64::from(EXITS))
}

/// The first store of a 64-bit guest to a page that the host already has, until the store is done.
fn fault_4k(kvm: &Kvm) -> Result<f64> {
    let vm = kvm.create_vm()?;
    let bytes = TOUCHED as usize + TOUCHED_PAGES * PAGE;
    let host = memory(bytes)?;
    let store = |gpa: u64, value: u64| {
        // SAFETY: every address stored to below lies within the first MiB of the mapping.
        unsafe { host.add(gpa as usize).cast::<u64>().write(value) }
    };
    store(PML4, PDPT | 7);
    store(PDPT, DIRECTORY | 7);
    for i in 0..512 {
        store(DIRECTORY + 8 * i, (i << 21) | 0x87);
    }
    // out 0x10, al; 1: mov [rdi], rax; add rdi, 4096; dec rcx; jnz 1b; out 0x10, al
    let code = [
        0xe6, 0x10, 0x48, 0x89, 0x07, 0x48, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, 0x48, 0xff, 0xc9,
        0x75, 0xf1, 0xe6, 0x10,
    ];
    // SAFETY: the code page lies within the first MiB of the mapping.
    unsafe {
        host.add(CODE as usize)
            .copy_from_nonoverlapping(code.as_ptr(), code.len())
    };
    set_slot(&vm, 0, 0, bytes, host)?;
    let mut vcpu = vm.create_vcpu(0)?;
    // The guest uses no stack.
    enter_long_mode(&vcpu, PML4, CODE, 0)?;
    let mut regs = vcpu.get_regs()?;
    regs.rdi = TOUCHED;
    regs.rcx = TOUCHED_PAGES as u64;
    vcpu.set_regs(&regs)?;
    run_until_port(&mut vcpu, 0x10)?;
    let start = Instant::now();
    run_until_port(&mut vcpu, 0x10)?;
    let per_page = start.elapsed().as_nanos() as f64 / TOUCHED_PAGES as f64;
    drop((vcpu, vm));
    // SAFETY: no VM refers to the mapping any more.
    unsafe { rustix::mm::munmap(host.cast(), bytes)? };
    Ok(per_page)
}

/// Adding and deleting one slot while all others are in use.
fn slot_add_delete(kvm: &Kvm) -> Result<f64> {
    let vm = kvm.create_vm()?;
    let slots = kvm.get_nr_memslots() as u32;
    let host = memory(2 * PAGE)?;
    for slot in 0..slots - 1 {
        set_slot(
            &vm,
            slot,
            (1 << 32) + u64::from(slot) * 2 * PAGE as u64,
            PAGE,
            host,
        )?;
    }
    let rounds = 2000;
    let start = Instant::now();
    for _ in 0..rounds {
        set_slot(&vm, slots - 1, 0x10_0000, PAGE, host)?;
        set_slot(&vm, slots - 1, 0x10_0000, 0, host)?;
    }
    Ok(start.elapsed().as_nanos() as f64 / f64::from(rounds))
}
