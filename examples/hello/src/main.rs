//! A small virtual machine monitor, written in the ordinary calls of the KVM API.
//!
//! It starts [a guest](guest) in 64-bit mode, prints what the guest says, and plays the one device
//! that the guest has. Nothing here knows about Twofold: the program runs on any `/dev/kvm`. Only
//! its first line looks at which one it was given.
//!
//! ```text
//! guest-physical          0  page tables, the guest's code, its stack      2 MiB
//!                  0xd0000000  the device: no memory, every access is an exit
//!                     4 GiB  memory                                         1 GiB
//!                     6 GiB  memory                                         1 GiB
//! linear           0..7 GiB  the same addresses
//!                     7 GiB  nothing, until the guest's page-fault handler maps it to 6 GiB
//! ```

mod guest;

use std::fs;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use example_parts::{Memory, enter_long_mode};
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};

const LOW_MEMORY_SIZE: usize = 2 << 20;
const GIB: usize = 1 << 30;

const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
/// Eight page directories follow one another: one for each gigabyte of linear addresses. The last
/// one is [`guest::WINDOW_DIRECTORY`].
const FIRST_DIRECTORY: u64 = 0x3000;

const PRESENT_WRITABLE: u64 = 0b11;
const LARGE: u64 = 1 << 7;

fn main() -> ExitCode {
    match run() {
        Ok(()) => {
            println!("guest finished");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("hello: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let kvm = Kvm::new().context("cannot open /dev/kvm (`twofold run` supplies one)")?;
    println!("running on {}", name_of(&kvm)?);

    let low = Memory::map(0, LOW_MEMORY_SIZE)?;
    let high = Memory::map(guest::HIGH_MEMORY.0, GIB)?;
    let behind_window = Memory::map(guest::BEHIND_WINDOW, GIB)?;
    write_page_tables(&low)?;
    low.write(guest::LOAD_ADDRESS, guest::image())?;

    let vm = kvm.create_vm().context("cannot create a VM")?;
    for (memory, slot) in [&low, &high, &behind_window].into_iter().zip(0..) {
        memory.add_to(&vm, slot)?;
    }

    let mut vcpu = vm.create_vcpu(0).context("cannot create a vCPU")?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    enter_long_mode(&vcpu, PML4, guest::LOAD_ADDRESS, LOW_MEMORY_SIZE as u64)?;
    run_until_halt(&mut vcpu)?;

    let verdict = vcpu.get_regs()?.rax;
    ensure!(verdict == 0, "the guest stopped at its step {verdict}");
    // The guest's 6 GiB are memory of this process. See whether its greeting has arrived.
    let greeting = behind_window.read_u64(guest::BEHIND_WINDOW + 0x12_3458)?;
    ensure!(
        greeting == guest::GREETING,
        "the guest's memory holds {greeting:#x} instead"
    );
    Ok(())
}

/// Tells Twofold's `/dev/kvm` from the kernel's: only the latter is a device.
fn name_of(kvm: &Kvm) -> Result<&'static str> {
    let link = fs::read_link(format!("/proc/self/fd/{}", kvm.as_raw_fd()))?;
    Ok(if link.as_os_str() == "/dev/kvm" {
        "this machine's own /dev/kvm"
    } else {
        "Twofold"
    })
}

/// Maps the first 7 GiB of linear addresses to themselves, and the eighth to nothing yet.
fn write_page_tables(memory: &Memory) -> Result<()> {
    memory.write(PML4, &(PDPT | PRESENT_WRITABLE).to_le_bytes())?;
    for gigabyte in 0..8 {
        let directory = FIRST_DIRECTORY + gigabyte * 0x1000;
        memory.write(
            PDPT + gigabyte * 8,
            &(directory | PRESENT_WRITABLE).to_le_bytes(),
        )?;
        if directory == guest::WINDOW_DIRECTORY {
            continue;
        }
        for index in 0..512 {
            let page = (gigabyte << 30) | (index << 21);
            memory.write(
                directory + index * 8,
                &(page | LARGE | PRESENT_WRITABLE).to_le_bytes(),
            )?;
        }
    }
    Ok(())
}

/// Runs the guest until it halts, and answers its exits.
fn run_until_halt(vcpu: &mut VcpuFd) -> Result<()> {
    let mut console = io::stdout().lock();
    let mut number = 0_u64;
    loop {
        match vcpu.run().context("KVM_RUN failed")? {
            VcpuExit::IoOut(guest::CONSOLE_PORT, text) => console.write_all(text)?,
            VcpuExit::MmioWrite(guest::SQUARER, data) => number = from_bytes(data),
            VcpuExit::MmioRead(address, data) if address == guest::SQUARER + 8 => {
                let square = number.wrapping_mul(number).to_le_bytes();
                let len = data.len().min(square.len());
                data[..len].copy_from_slice(&square[..len]);
            }
            VcpuExit::Hlt => return Ok(()),
            other => bail!("the guest ended in {other:x?}"),
        }
    }
}

/// The number that a device access of up to 8 bytes carries.
fn from_bytes(data: &[u8]) -> u64 {
    data.iter()
        .rev()
        .fold(0, |number, byte| number << 8 | u64::from(*byte))
}
