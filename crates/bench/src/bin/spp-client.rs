//! A KVM program that measures sub-page write protection on the KVM it runs on.
//!
//! `twofold-bench` starts it as it starts `kvm-client`. Each line of its output is `name figure`;
//! figures are nanoseconds, the median of several rounds in which the contenders take turns.
//!
//! UNSAFETY: mapping guest memory and handing it to KVM are unsafe operations of `kvm-ioctls` and
//! `rustix`, and access maps are set by an ioctl that `kvm-ioctls` does not have.
#![expect(unsafe_code)]

use anyhow::{Context, Result, bail, ensure};
use example_parts::enter_long_mode;
use kvm_bindings::{kvm_enable_cap, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use std::ffi::c_void;
use std::io;
use std::os::fd::AsRawFd;
use twofold_abi::spp::{
    KVM_CAP_X86_SPP, KVM_EXIT_SPP, KVM_SUBPAGE_FULL_ACCESS, KVM_SUBPAGES_GET_ACCESS,
    KVM_SUBPAGES_SET_ACCESS, SubPages,
};

const ROUNDS: usize = 15;
const STORES: u64 = 200_000;
const EXITS: u64 = 20_000;
const CALLS: u64 = 200;
/// 4 MiB of guest memory: tables and code, then a region of 2M.
const LOW: usize = 4 << 20;
const CODE: u64 = 0x8000;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const DIRECTORY: u64 = 0x3000;
const REGION: u64 = 2 << 20;
const PAGE: u64 = 0x20_8000;
const FULL: u32 = KVM_SUBPAGE_FULL_ACCESS;

/// out 0x10, al; 1: mov [rdi], rcx; dec rcx; jnz 1b; out 0x10, al
const STORE: &[u8] = &[
    0xe6, 0x10, 0x48, 0x89, 0x0f, 0x48, 0xff, 0xc9, 0x75, 0xf8, 0xe6, 0x10,
];
/// nop; 1: out 0x10, al; jmp 1b. The exit that it ends in is completed where it came from, which must
/// not be where the next piece of code begins.
const OUT: &[u8] = &[0x90, 0xe6, 0x10, 0xeb, 0xfc];

fn main() -> Result<()> {
    let kvm = Kvm::new().context("opening /dev/kvm")?;
    let mut plain = Guest::new(&kvm, false)?;
    let mut guarded = Guest::new(&kvm, true)?;
    let [mut without, mut with, mut permitted, mut denied, mut out] = [const { Vec::new() }; 5];
    for _ in 0..ROUNDS {
        without.push(plain.stores()?);
        guarded.set_access(&[FULL])?;
        with.push(guarded.stores()?);
        out.push(guarded.exits(OUT, |exit| matches!(exit, VcpuExit::IoOut(..)))?);
        guarded.set_access(&[1])?;
        permitted.push(guarded.stores()?);
        guarded.set_access(&[!1])?;
        denied.push(guarded.exits(&STORE[2..], |exit| {
            matches!(exit, VcpuExit::Unsupported(KVM_EXIT_SPP))
        })?);
    }
    println!("store_without {:.3}", median(without));
    println!("store_with {:.3}", median(with));
    println!("store_permitted {:.3}", median(permitted));
    println!("denied {:.1}", median(denied));
    println!("out {:.1}", median(out));
    let [mut set, mut get] = [const { Vec::new() }; 2];
    guarded.set_access(&[FULL])?;
    for _ in 0..ROUNDS {
        set.push(guarded.set_region()?);
        get.push(guarded.get_region()?);
    }
    println!("set_512 {:.0}", median(set));
    println!("get_512 {:.0}", median(get));
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

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

/// A VM whose guest works on one page.
struct Guest {
    vcpu: VcpuFd,
    vm: VmFd,
    memory: *mut c_void,
}

impl Guest {
    fn new(kvm: &Kvm, protects: bool) -> Result<Self> {
        let vm = kvm.create_vm()?;
        if protects {
            vm.enable_cap(&kvm_enable_cap {
                cap: KVM_CAP_X86_SPP,
                ..Default::default()
            })
            .context("this KVM does not protect sub-pages")?;
        }
        // SAFETY: an anonymous mapping at an address of the kernel's choice aliases nothing.
        let memory = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                LOW,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: LOW as u64,
            userspace_addr: memory as u64,
        };
        // SAFETY: the mapping outlives the VM.
        unsafe { vm.set_user_memory_region(region) }?;
        let vcpu = vm.create_vcpu(0)?;
        let guest = Self { vcpu, vm, memory };
        for (address, entry) in [
            (PML4, PDPT | 7),
            (PDPT, DIRECTORY | 7),
            (DIRECTORY, 0x87),
            (DIRECTORY + 8, REGION | 0x87),
        ] {
            guest.write(address, &entry.to_le_bytes());
        }
        enter_long_mode(&guest.vcpu, PML4, CODE, 0)?;
        Ok(guest)
    }

    fn write(&self, gpa: u64, bytes: &[u8]) {
        // SAFETY: every address written to here lies in the mapping.
        unsafe {
            self.memory
                .cast::<u8>()
                .add(gpa as usize)
                .copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
        }
    }

    fn start(&self, code: &[u8]) -> Result<()> {
        self.write(CODE, code);
        let mut regs = self.vcpu.get_regs()?;
        (regs.rip, regs.rdi, regs.rcx) = (CODE, PAGE, STORES);
        Ok(self.vcpu.set_regs(&regs)?)
    }

    /// A store in a loop.
    fn stores(&mut self) -> Result<f64> {
        self.start(STORE)?;
        self.run_to_port()?;
        let start = now();
        self.run_to_port()?;
        Ok((now() - start) / STORES as f64)
    }

    fn run_to_port(&mut self) -> Result<()> {
        match self.vcpu.run()? {
            VcpuExit::IoOut(0x10, _) => Ok(()),
            exit => bail!("the guest left with {exit:?}"),
        }
    }

    /// Exits, and re-entries that end in the same exit.
    fn exits(&mut self, code: &[u8], expected: impl Fn(&VcpuExit<'_>) -> bool) -> Result<f64> {
        self.start(code)?;
        let exit = self.vcpu.run()?;
        ensure!(expected(&exit), "the guest left with {exit:?}");
        let start = now();
        for _ in 0..EXITS {
            self.vcpu.run()?;
        }
        let spent = now() - start;
        let exit = self.vcpu.run()?;
        ensure!(expected(&exit), "the guest left with {exit:?}");
        Ok(spent / EXITS as f64)
    }

    fn call<const N: usize>(&self, call: u32, request: &mut SubPages<N>) -> Result<()> {
        // SAFETY: the header says how many maps the request has room for.
        let done = unsafe { libc::ioctl(self.vm.as_raw_fd(), call.into(), &raw mut *request) };
        if done != N as i32 {
            return Err(io::Error::last_os_error()).context("access maps");
        }
        Ok(())
    }

    fn set_access<const N: usize>(&self, maps: &[u32; N]) -> Result<()> {
        let mut request = SubPages::new(PAGE >> 12, *maps);
        self.call(KVM_SUBPAGES_SET_ACCESS, &mut request)
    }

    /// Maps for 512 pages, always others.
    fn set_region(&mut self) -> Result<f64> {
        let start = now();
        for round in 0..CALLS {
            let map = if round % 2 == 0 { 1 } else { !1 };
            let mut request = SubPages::new(REGION >> 12, [map; 512]);
            self.call(KVM_SUBPAGES_SET_ACCESS, &mut request)?;
        }
        let spent = now() - start;
        let mut open = SubPages::new(REGION >> 12, [FULL; 512]);
        self.call(KVM_SUBPAGES_SET_ACCESS, &mut open)?;
        self.stores()?;
        Ok(spent / CALLS as f64)
    }

    fn get_region(&self) -> Result<f64> {
        let mut request = SubPages::new(REGION >> 12, [0; 512]);
        let start = now();
        for _ in 0..CALLS {
            self.call(KVM_SUBPAGES_GET_ACCESS, &mut request)?;
        }
        Ok((now() - start) / CALLS as f64)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which the guest, that is not running, is the last to use.
        let _ = unsafe { munmap(self.memory, LOW) };
    }
}
