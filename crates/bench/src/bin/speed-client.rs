//! A KVM program that times the kernels of `hardware/speed`.
//!
//! `speed-client IMAGE` runs the image and prints lines of `name figure`: for each kernel its
//! nanoseconds and, after `.instructions`, the instructions that the guest executed. Then all kernels
//! run once more, on one processor (`one`) and on two at a time (`two`); and the one of loads and
//! stores in turns with a second VM whose guest-physical memory lies at equal host addresses (`hits`,
//! `hits.identity`).
//!
//! UNSAFETY: mapping guest memory and handing it to KVM are unsafe operations of `kvm-ioctls` and
//! `rustix`, and statistics are an ioctl that `kvm-ioctls` does not have.
#![expect(unsafe_code)]

use anyhow::{Context, Result, bail, ensure};
use example_parts::enter_flat_mode;
use kvm_bindings::{kvm_regs, kvm_sregs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::time::Instant;
use twofold_kernels::KERNELS;

/// `KVM_GET_STATS_FD`: `_IO(0xae, 0xce)`.
const KVM_GET_STATS_FD: libc::c_ulong = 0xaece;

/// See `hardware/speed` for what is where.
const MEMORY_END: usize = 0x6000_0000;
const IMAGE: usize = 0x10_0000;
const IMAGE_ENTRY: usize = 0x20;
const STRIDE: usize = 0x1000_0000;
const STRIDE_END: usize = 0x2000_0000;
const STACKS: u64 = 0x1e0_0000;

const MARK: u16 = 0xe9;
const THREAD: u16 = 0xe8;
const OFF: u16 = 0xf4;

/// Every kernel.
const ALL: u64 = (1 << KERNELS.len()) - 1;

/// How often two VMs take turns.
const TURNS: usize = 7;

/// What the image announces, in its order.
const NAMES: [&str; KERNELS.len() + 3] = {
    let mut names = ["tight", "stride", "copy", "", "", "", "", "", ""];
    let mut at = 0;
    while at < 3 {
        names[KERNELS.len() + at] = names[at];
        at += 1;
    }
    at = 0;
    while at < KERNELS.len() {
        names[at] = KERNELS[at].0;
        at += 1;
    }
    names
};

fn main() -> Result<()> {
    let image = std::env::args()
        .nth(1)
        .context("usage: speed-client IMAGE")?;
    let image = std::fs::read(&image).with_context(|| format!("reading {image}"))?;
    ensure!(image.len() < STRIDE - IMAGE, "the image is too large");

    let kvm = Kvm::new().context("opening /dev/kvm")?;
    let memory = GuestMemory::map(0, None)?;
    // SAFETY: memory of the VM, which nobody else has yet; the image fits.
    unsafe {
        memory
            .at(IMAGE)
            .copy_from_nonoverlapping(image.as_ptr(), image.len());
    }
    let vm = memory.vm(&kvm)?;
    let mut vcpu = vm.create_vcpu(0)?;
    let statistics = Statistics::of(&vcpu)?;
    let entry = image
        .get(IMAGE_ENTRY..)
        .and_then(|rest| rest.first_chunk())
        .context("the image has no entry point")?;
    enter_flat_mode(&vcpu, u32::from_le_bytes(*entry).into())?;
    let thread = loop {
        let (port, value) = output(&mut vcpu)?;
        if port == THREAD {
            break u64::from(value);
        }
        let begin = (Instant::now(), statistics.instructions()?);
        let (end, _) = output(&mut vcpu)?;
        ensure!(
            port == MARK && end == MARK,
            "the image writes to port {port:#x}"
        );
        let nanoseconds = begin.0.elapsed().as_nanos();
        let name = NAMES
            .get(usize::from(value as u8 - b'A') / 2)
            .with_context(|| format!("the image announces {value:#x}"))?;
        println!("{name} {nanoseconds}");
        println!(
            "{name}.instructions {}",
            statistics.instructions()? - begin.1
        );
    };

    let sregs = vcpu.get_sregs()?;
    let mut other = vm.create_vcpu(1)?;
    // Once so that all memory is there, then what counts.
    for _ in 0..2 {
        start(&vcpu, &sregs, thread, 0, ALL)?;
        start(&other, &sregs, thread, 1, ALL)?;
        finish(&mut other)?;
        finish(&mut vcpu)?;
    }
    start(&vcpu, &sregs, thread, 0, ALL)?;
    println!("one {}", finish(&mut vcpu)?);
    start(&vcpu, &sregs, thread, 0, ALL)?;
    start(&other, &sregs, thread, 1, ALL)?;
    let both = Instant::now();
    std::thread::scope(|scope| {
        let second = scope.spawn(|| finish(&mut other));
        finish(&mut vcpu)?;
        match second.join() {
            Ok(result) => result,
            Err(_) => bail!("the second processor's thread has panicked"),
        }
    })?;
    println!("two {}", both.elapsed().as_nanos());

    let equal = GuestMemory::map(IMAGE, Some(IMAGE))?;
    // SAFETY: both are mapped so far; no vCPU runs.
    unsafe {
        equal
            .at(IMAGE)
            .copy_from_nonoverlapping(memory.at(IMAGE), STRIDE - IMAGE);
    }
    let equal = equal.vm(&kvm)?;
    let mut identity = equal.create_vcpu(0)?;
    let loads = KERNELS.iter().position(|(name, ..)| *name == "memory");
    let loads = 1 << loads.context("there is no kernel of loads and stores")?;
    let (mut hits, mut same) = (Vec::new(), Vec::new());
    for _ in 0..TURNS {
        for (vcpu, times) in [(&mut vcpu, &mut hits), (&mut identity, &mut same)] {
            start(vcpu, &sregs, thread, 0, loads)?;
            times.push(finish(vcpu)?);
        }
    }
    // What disturbs a turn makes it longer.
    println!("hits {}", hits.iter().min().context("no turns")?);
    println!("hits.identity {}", same.iter().min().context("no turns")?);
    Ok(())
}

/// Memory for a VM, from a guest-physical address to [`MEMORY_END`].
struct GuestMemory {
    first: usize,
    host: *mut u8,
}

impl GuestMemory {
    /// Maps it: at a host address, or where the kernel likes.
    fn map(first: usize, at: Option<usize>) -> Result<Self> {
        let bytes = MEMORY_END - first;
        let fixed = match at {
            Some(_) => MapFlags::FIXED_NOREPLACE,
            None => MapFlags::empty(),
        };
        // SAFETY: an anonymous mapping where nothing is mapped.
        let host = unsafe {
            mmap_anonymous(
                at.unwrap_or(0) as *mut _,
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE | fixed,
            )
        }
        .context("mapping guest memory")?;
        let memory = Self {
            first,
            host: host.cast(),
        };
        // SAFETY: parts of the mapping above.
        unsafe {
            // As QEMU does with its guests' memory; but each page that is strided over is one of 4 KiB.
            madvise(host, bytes, Advice::LinuxHugepage)?;
            madvise(
                memory.at(STRIDE).cast(),
                STRIDE_END - STRIDE,
                Advice::LinuxNoHugepage,
            )?;
        }
        Ok(memory)
    }

    /// Where the memory at a guest-physical address is.
    fn at(&self, gpa: usize) -> *mut u8 {
        self.host.wrapping_add(gpa - self.first)
    }

    /// A VM that has this memory.
    fn vm(&self, kvm: &Kvm) -> Result<VmFd> {
        let vm = kvm.create_vm()?;
        // SAFETY: the mapping stays until the process ends.
        unsafe {
            vm.set_user_memory_region(kvm_userspace_memory_region {
                slot: 0,
                flags: 0,
                guest_phys_addr: self.first as u64,
                memory_size: (MEMORY_END - self.first) as u64,
                userspace_addr: self.host as u64,
            })?;
        }
        Ok(vm)
    }
}

/// What the guest writes to a port next.
fn output(vcpu: &mut VcpuFd) -> Result<(u16, u32)> {
    match vcpu.run()? {
        VcpuExit::IoOut(port, data) => {
            let mut value = [0; 4];
            let length = data.len().min(4);
            value[..length].copy_from_slice(&data[..length]);
            Ok((port, u32::from_le_bytes(value)))
        }
        exit => bail!("the guest left with {exit:?}"),
    }
}

/// Lets a processor run the kernels whose bits are set in `which`, in the state of the first.
fn start(vcpu: &VcpuFd, sregs: &kvm_sregs, thread: u64, processor: u64, which: u64) -> Result<()> {
    vcpu.set_sregs(sregs)?;
    vcpu.set_regs(&kvm_regs {
        rip: thread,
        rdi: processor,
        rsi: which,
        // As after a call: not aligned.
        rsp: STACKS + (processor << 16) + 0x8000 - 8,
        rflags: 2,
        ..Default::default()
    })?;
    Ok(())
}

/// Nanoseconds from mark to mark, until the machine is switched off.
fn finish(vcpu: &mut VcpuFd) -> Result<u128> {
    let (begin, _) = output(vcpu)?;
    let start = Instant::now();
    let (end, _) = output(vcpu)?;
    let elapsed = start.elapsed();
    let (off, value) = output(vcpu)?;
    ensure!(
        (begin, end, off) == (MARK, MARK, OFF),
        "the image writes to other ports"
    );
    ensure!(value == 16, "the image has failed");
    Ok(elapsed.as_nanos())
}

/// The statistics of a vCPU.
struct Statistics {
    file: File,
    instructions: u64,
}

impl Statistics {
    fn of(vcpu: &VcpuFd) -> Result<Self> {
        // SAFETY: has no argument; gives a new descriptor.
        let file = unsafe {
            match libc::ioctl(vcpu.as_raw_fd(), KVM_GET_STATS_FD) {
                -1 => bail!("KVM_GET_STATS_FD: {}", std::io::Error::last_os_error()),
                descriptor => File::from_raw_fd(descriptor),
            }
        };
        // struct kvm_stats_header: flags, name size, count, three offsets.
        let word = |at: u64| -> Result<u64> {
            let mut bytes = [0; 4];
            file.read_exact_at(&mut bytes, at)?;
            Ok(u32::from_le_bytes(bytes).into())
        };
        let (name_size, count, descriptors, data) = (word(4)?, word(8)?, word(16)?, word(20)?);
        for number in 0..count {
            let at = descriptors + number * (16 + name_size);
            let mut name = vec![0; name_size as usize];
            file.read_exact_at(&mut name, at + 16)?;
            if name.starts_with(b"instructions\0") {
                let instructions = data + word(at + 8)?;
                return Ok(Self { file, instructions });
            }
        }
        bail!("this KVM does not count its guests' instructions")
    }

    fn instructions(&self) -> Result<u64> {
        let mut bytes = [0; 8];
        self.file.read_exact_at(&mut bytes, self.instructions)?;
        Ok(u64::from_le_bytes(bytes))
    }
}
