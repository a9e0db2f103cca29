//! A small virtual machine monitor with a guest that keeps secrets.
//!
//! [The guest](guest) makes pages of its memory private, writes a secret into them, and shares them
//! again. After each of its steps this program looks at every page from outside and prints what it
//! finds: `.` for what the guest wrote for all to see, `0` for zeros. It never finds the secret, or
//! it fails. Nothing here knows about Twofold; `docs/private-memory.md` explains the calls.
//!
//! ```text
//! guest-physical      0  page tables, the guest's code, its stack     2 MiB
//!                 1 GiB  16 pages with a shared and a private half
//!         1 GiB + 2 MiB  a page without a private half
//! ```

mod guest;

use std::os::fd::RawFd;
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use example_parts::{Memory, cannot_map, enter_long_mode, punch_hole};
use kvm_bindings::{
    KVM_CAP_EXIT_HYPERCALL, KVM_CAP_VM_TYPES, KVM_MAX_CPUID_ENTRIES, KVM_MEMORY_ATTRIBUTE_PRIVATE,
    KVM_MEMORY_EXIT_FLAG_PRIVATE, KVM_X86_SW_PROTECTED_VM, kvm_create_guest_memfd, kvm_enable_cap,
    kvm_memory_attributes,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

const LOW_MEMORY_SIZE: usize = 2 << 20;
const PAGE: u64 = 4096;
const DATA_SIZE: u64 = guest::PAGES * PAGE;

const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const LOW_DIRECTORY: u64 = 0x3000;
const DATA_DIRECTORY: u64 = 0x4000;
const PRESENT_WRITABLE: u64 = 0b11;
const LARGE: u64 = 1 << 7;

fn main() -> ExitCode {
    match run() {
        Ok(()) => {
            println!("guest finished; no private byte was seen outside");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("private: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// What the program looks at and works with while the guest runs.
struct Machine {
    vm: VmFd,
    data: Memory,
    guest_memfd: RawFd,
}

fn run() -> Result<()> {
    let kvm = Kvm::new().context("cannot open /dev/kvm (`twofold run` supplies one)")?;
    let types = kvm.check_extension_raw(KVM_CAP_VM_TYPES.into());
    ensure!(
        types >> KVM_X86_SW_PROTECTED_VM & 1 != 0,
        "this KVM has no software-protected VMs (it was built without them)"
    );

    let low = Memory::map(0, LOW_MEMORY_SIZE)?;
    let foreign = Memory::map(guest::FOREIGN, PAGE as usize)?;
    let data = Memory::map(guest::DATA, DATA_SIZE as usize)?;
    write_page_tables(&low)?;
    low.write(guest::LOAD_ADDRESS, guest::image())?;

    let vm = kvm
        .create_vm_with_type(KVM_X86_SW_PROTECTED_VM.into())
        .context("cannot create a software-protected VM")?;
    // The guest's wish to convert pages shall reach this program.
    vm.enable_cap(&kvm_enable_cap {
        cap: KVM_CAP_EXIT_HYPERCALL,
        args: [1 << guest::MAP_GPA_RANGE, 0, 0, 0],
        ..Default::default()
    })
    .context("KVM does not pass conversions on")?;
    // First the file, then the slots that are bound to it.
    let guest_memfd = vm
        .create_guest_memfd(kvm_create_guest_memfd {
            size: DATA_SIZE,
            ..Default::default()
        })
        .context("cannot create a guest memory file")?;
    low.add_to(&vm, 0)?;
    data.add_with_private_half(&vm, 1, guest_memfd)?;
    foreign.add_to(&vm, 2)?;
    match cannot_map(guest_memfd) {
        Some(reason) => println!("the guest memory file cannot be mapped: {reason}"),
        None => bail!("the guest memory file can be mapped"),
    }

    let machine = Machine {
        vm,
        data,
        guest_memfd,
    };
    machine.set_private(guest::FOREIGN, 1, true)?;
    let mut vcpu = machine.vm.create_vcpu(0).context("cannot create a vCPU")?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    enter_long_mode(&vcpu, PML4, guest::LOAD_ADDRESS, LOW_MEMORY_SIZE as u64)?;
    machine.run_until_halt(&mut vcpu)?;
    let verdict = vcpu.get_regs()?.rax;
    ensure!(verdict == 0, "the guest stopped at its step {verdict}");
    Ok(())
}

impl Machine {
    /// Runs the guest until it halts, converts what it asks for, and looks at its memory after
    /// every step.
    fn run_until_halt(&self, vcpu: &mut VcpuFd) -> Result<()> {
        loop {
            match vcpu.run().context("KVM_RUN failed")? {
                VcpuExit::IoOut(guest::STEP_PORT, &[step]) => self.look(step)?,
                VcpuExit::Hypercall(call) if call.nr == guest::MAP_GPA_RANGE => {
                    let [address, pages, kind, ..] = call.args;
                    self.convert(address, pages, kind & guest::ENCRYPTED != 0)?;
                    *call.ret = 0;
                }
                VcpuExit::MemoryFault { flags, gpa, .. } => {
                    let private = flags & u64::from(KVM_MEMORY_EXIT_FLAG_PRIVATE) != 0;
                    let kind = if private { "private" } else { "shared" };
                    println!("a {kind} access to {gpa:#x}, where there is no such memory");
                    self.set_private(gpa, 1, !private)?;
                }
                VcpuExit::Hlt => return Ok(()),
                other => bail!("the guest ended in {other:x?}"),
            }
        }
    }

    /// Converts pages. First KVM is told, so that no vCPU reaches the old half any more; only then
    /// is that half given back to the system.
    fn convert(&self, address: u64, pages: u64, private: bool) -> Result<()> {
        self.set_private(address, pages, private)?;
        match private {
            true => self.data.discard(address, pages * PAGE),
            false => punch_hole(self.guest_memfd, address - guest::DATA, pages * PAGE),
        }
    }

    fn set_private(&self, address: u64, pages: u64, private: bool) -> Result<()> {
        let attributes = match private {
            true => u64::from(KVM_MEMORY_ATTRIBUTE_PRIVATE),
            false => 0,
        };
        self.vm
            .set_memory_attributes(kvm_memory_attributes {
                address,
                size: pages * PAGE,
                attributes,
                flags: 0,
            })
            .with_context(|| format!("cannot convert {pages} pages at {address:#x}"))
    }

    /// Looks at every page from outside.
    fn look(&self, step: u8) -> Result<()> {
        let mut line = String::new();
        for number in 0..guest::PAGES {
            let page = self.data.page(guest::DATA + number * PAGE)?;
            let (words, _) = page.as_chunks::<8>();
            let holds = |word: u64| words.iter().all(|found| u64::from_le_bytes(*found) == word);
            // At any distance, not only where the guest has put it.
            let secret = guest::SECRET.to_le_bytes();
            ensure!(
                !page.windows(secret.len()).any(|bytes| bytes == secret),
                "after step {step} page {number} shows the guest's secret"
            );
            line.push(match (holds(guest::GREETING), holds(0)) {
                (true, _) => '.',
                (_, true) => '0',
                _ => '?',
            });
        }
        println!("step {step}: from outside the pages look like {line}");
        Ok(())
    }
}

/// Maps the first 2 MiB of linear addresses and the data to themselves.
fn write_page_tables(memory: &Memory) -> Result<()> {
    for (address, entry) in [
        (PML4, PDPT | PRESENT_WRITABLE),
        (PDPT, LOW_DIRECTORY | PRESENT_WRITABLE),
        (PDPT + 8, DATA_DIRECTORY | PRESENT_WRITABLE),
        (LOW_DIRECTORY, LARGE | PRESENT_WRITABLE),
        (DATA_DIRECTORY, guest::DATA | LARGE | PRESENT_WRITABLE),
        (
            DATA_DIRECTORY + 8,
            guest::FOREIGN | LARGE | PRESENT_WRITABLE,
        ),
    ] {
        memory.write(address, &entry.to_le_bytes())?;
    }
    Ok(())
}
