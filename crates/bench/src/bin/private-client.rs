//! A KVM program that measures private memory and pre-faulting on the KVM it runs on.
//!
//! `twofold-bench` starts it as it starts `kvm-client`. Each line of its output is `name figure`;
//! figures are nanoseconds, a page or a call, the median of several rounds.
//!
//! UNSAFETY: mapping guest memory and handing it to KVM are unsafe operations of `kvm-ioctls` and
//! `rustix`, and pre-faulting is an ioctl that `kvm-ioctls` does not have.
#![expect(unsafe_code)]

use anyhow::{Context, Result, bail};
use example_parts::enter_long_mode;
use kvm_bindings::{
    KVM_MEMORY_ATTRIBUTE_PRIVATE, KVM_X86_SW_PROTECTED_VM, kvm_memory_attributes,
    kvm_pre_fault_memory, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use std::ffi::c_void;
use std::io;
use std::os::fd::AsRawFd;

const GIB: u64 = 1 << 30;
const PAGE: u64 = 4096;
const PAGES: f64 = (GIB / PAGE) as f64;
const ROUNDS: usize = 5;
/// Where the gigabyte is in the guest.
const DATA: u64 = 4 * GIB;
const LOW: usize = 1 << 20;
const CODE: u64 = 0x8000;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
/// Ranges that exist when one page is flipped.
const RANGES: u64 = 1_000_000;
const FLIPS: u64 = 20_000;

/// `KVM_PRE_FAULT_MEMORY`: `_IOWR(0xae, 0xd5, struct kvm_pre_fault_memory)`, 64 bytes.
const KVM_PRE_FAULT_MEMORY: libc::c_ulong = 0xc040_aed5;

fn main() -> Result<()> {
    let kvm = Kvm::new().context("opening /dev/kvm")?;
    let small = Mapping::new(Advice::LinuxNoHugepage)?;
    println!("zero_4k {:.2}", small.populate_ns / PAGES);
    println!("prefault_4k {:.2}", prefault(&kvm, &small)? / PAGES);
    println!("touch_4k {:.2}", touch(&kvm, &small)? / PAGES);
    println!("convert {:.0}", convert(&kvm, &small)?);
    drop(small);
    let large = Mapping::new(Advice::LinuxHugepage)?;
    println!("prefault_2m {:.2}", prefault(&kvm, &large)? / PAGES);
    println!("touch_2m {:.2}", touch(&kvm, &large)? / PAGES);
    drop(large);
    println!("flip {:.1}", flip(&kvm)?);
    Ok(())
}

/// Nanoseconds that this thread has been running, in the kernel too: all the work is its own, and the
/// machine may be busy with something else.
fn now() -> f64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: writes to the structure; the clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    time.tv_sec as f64 * 1e9 + time.tv_nsec as f64
}

fn median(mut round: impl FnMut() -> Result<f64>) -> Result<f64> {
    let mut figures = (0..ROUNDS).map(|_| round()).collect::<Result<Vec<_>>>()?;
    figures.sort_by(f64::total_cmp);
    Ok(figures[ROUNDS / 2])
}

/// A gigabyte of present memory of this program, at a multiple of 2M.
struct Mapping {
    start: *mut c_void,
    length: usize,
    first: *mut c_void,
    /// What the kernel took to zero it.
    populate_ns: f64,
}

impl Mapping {
    fn new(size: Advice) -> Result<Self> {
        let length = (GIB + (2 << 20)) as usize;
        // SAFETY: an anonymous mapping at an address of the kernel's choice aliases nothing.
        let start = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }
        .context("mapping guest memory")?;
        let first = start.map_addr(|address| address.next_multiple_of(2 << 20));
        let before = now();
        // SAFETY: our own new mapping.
        unsafe {
            // A kernel without huge pages refuses, and has only small ones.
            let _ = madvise(first, GIB as usize, size);
            madvise(first, GIB as usize, Advice::LinuxPopulateWrite).context("populating")?;
        }
        Ok(Self {
            start,
            length,
            first,
            populate_ns: now() - before,
        })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: our own mapping; the VMs that used it are gone.
        let _ = unsafe { munmap(self.start, self.length) };
    }
}

fn set_slot(vm: &VmFd, slot: u32, gpa: u64, bytes: u64, host: *mut c_void) -> Result<()> {
    let region = kvm_userspace_memory_region {
        slot,
        flags: 0,
        guest_phys_addr: gpa,
        memory_size: bytes,
        userspace_addr: host as u64,
    };
    // SAFETY: the mapping outlives the VM.
    unsafe { vm.set_user_memory_region(region) }.with_context(|| format!("slot {slot}"))
}

/// Pre-faults the gigabyte. How often the call had to be repeated is part of the time.
fn prefault_all(vcpu: &VcpuFd) -> Result<()> {
    let mut range = kvm_pre_fault_memory {
        gpa: DATA,
        size: GIB,
        ..Default::default()
    };
    while range.size != 0 {
        // Through libc, which is where Twofold listens.
        // SAFETY: the request takes this structure.
        let result = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_PRE_FAULT_MEMORY, &raw mut range) };
        if result != 0 {
            return Err(io::Error::last_os_error()).context("KVM_PRE_FAULT_MEMORY");
        }
    }
    Ok(())
}

fn prefault(kvm: &Kvm, memory: &Mapping) -> Result<f64> {
    median(|| {
        let vm = kvm.create_vm()?;
        set_slot(&vm, 0, DATA, GIB, memory.first)?;
        let vcpu = vm.create_vcpu(0)?;
        let start = now();
        prefault_all(&vcpu)?;
        Ok(now() - start)
    })
}

/// A guest that reads one word of every page.
fn touch(kvm: &Kvm, memory: &Mapping) -> Result<f64> {
    median(|| {
        let vm = kvm.create_vm()?;
        // SAFETY: an anonymous mapping at an address of the kernel's choice aliases nothing.
        let low = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                LOW,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }?;
        let store = |gpa: u64, value: u64| {
            // SAFETY: every address stored to below lies in the mapping.
            unsafe {
                low.cast::<u8>()
                    .add(gpa as usize)
                    .cast::<u64>()
                    .write(value)
            }
        };
        store(PML4, PDPT | 7);
        store(PDPT, 0x87);
        store(PDPT + 4 * 8, DATA | 0x87);
        // out 0x10, al; 1: mov rax, [rdi]; add rdi, 4096; dec rcx; jnz 1b; out 0x10, al
        let code = [
            0xe6, 0x10, 0x48, 0x8b, 0x07, 0x48, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, 0x48, 0xff,
            0xc9, 0x75, 0xf1, 0xe6, 0x10,
        ];
        // SAFETY: the code page lies in the mapping.
        unsafe {
            low.cast::<u8>()
                .add(CODE as usize)
                .copy_from_nonoverlapping(code.as_ptr(), code.len());
        }
        set_slot(&vm, 0, 0, LOW as u64, low)?;
        set_slot(&vm, 1, DATA, GIB, memory.first)?;
        let mut vcpu = vm.create_vcpu(0)?;
        // The guest uses no stack.
        enter_long_mode(&vcpu, PML4, CODE, 0)?;
        let mut regs = vcpu.get_regs()?;
        regs.rdi = DATA;
        regs.rcx = GIB / PAGE;
        vcpu.set_regs(&regs)?;
        run_until_port(&mut vcpu)?;
        let start = now();
        run_until_port(&mut vcpu)?;
        let spent = now() - start;
        drop((vcpu, vm));
        // SAFETY: no VM refers to the mapping any more.
        unsafe { munmap(low, LOW)? };
        Ok(spent)
    })
}

fn run_until_port(vcpu: &mut VcpuFd) -> Result<()> {
    match vcpu.run()? {
        VcpuExit::IoOut(0x10, _) => Ok(()),
        exit => bail!("the guest left with {exit:?}"),
    }
}

fn set_attributes(vm: &VmFd, address: u64, size: u64, private: bool) -> Result<()> {
    let attributes = u64::from(private) * u64::from(KVM_MEMORY_ATTRIBUTE_PRIVATE);
    vm.set_memory_attributes(kvm_memory_attributes {
        address,
        size,
        attributes,
        flags: 0,
    })
    .context("KVM_SET_MEMORY_ATTRIBUTES")
}

fn protected_vm(kvm: &Kvm) -> Result<VmFd> {
    kvm.create_vm_with_type(KVM_X86_SW_PROTECTED_VM.into())
        .context("creating a software-protected VM")
}

/// A gigabyte that the guest has mapped, to private and back.
fn convert(kvm: &Kvm, memory: &Mapping) -> Result<f64> {
    median(|| {
        let vm = protected_vm(kvm)?;
        set_slot(&vm, 0, DATA, GIB, memory.first)?;
        let vcpu = vm.create_vcpu(0)?;
        prefault_all(&vcpu)?;
        let start = now();
        set_attributes(&vm, DATA, GIB, true)?;
        set_attributes(&vm, DATA, GIB, false)?;
        Ok(now() - start)
    })
}

/// One page among a million ranges.
fn flip(kvm: &Kvm) -> Result<f64> {
    let vm = protected_vm(kvm)?;
    for range in 0..RANGES {
        set_attributes(&vm, 2 * range * PAGE, PAGE, true)?;
    }
    median(|| {
        let start = now();
        for number in 0..FLIPS / 2 {
            let page = (number * 977) % RANGES * 2 + 1;
            set_attributes(&vm, page * PAGE, PAGE, true)?;
            set_attributes(&vm, page * PAGE, PAGE, false)?;
        }
        let spent = now() - start;
        Ok(spent / FLIPS as f64)
    })
}
