//! A small virtual machine monitor with a guest that does not trust it.
//!
//! The VM is a TDX guest (a trust domain, TD). Its memory is private unless it says otherwise, its
//! registers are nobody's business, and what it was started with is measured by the TDX module. This
//! program builds it, works out by itself what the measurement must be, and hears from the guest what
//! it is. While the guest runs it plays a device, shares and takes back memory as the guest asks for
//! it, and looks at the guest's memory from outside after every step: it must never see the secret.
//! [The guest](guest) says what the steps are.
//!
//! Nothing here knows about Twofold; `docs/tdx.md` explains the calls.
//!
//! ```text
//! guest-physical      0  the guest's page tables and stack            added as zeros
//!                16 MiB  memory that the guest has to accept
//!           0xd0000000  a device
//!           0xffff0000  the guest's code, up to 4 GiB                 added and measured
//! ```

mod command;
mod guest;
mod measurement;

use std::fmt::Write as _;
use std::os::fd::RawFd;
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use example_parts::{Memory, punch_hole};
use kvm_bindings::{
    KVM_CAP_EXIT_HYPERCALL, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_VM_TYPES, KVM_MAX_CPUID_ENTRIES,
    KVM_MEMORY_ATTRIBUTE_PRIVATE, KVM_X86_TDX_VM, kvm_create_guest_memfd, kvm_enable_cap,
    kvm_memory_attributes,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

use crate::measurement::Measurement;

const PAGE: u64 = 4096;
/// Bits of the guest's physical addresses. The highest makes an address shared.
const ADDRESS_WIDTH: u32 = 48;
/// Pins of the interrupt controller that stays with this program, although it has none.
const IOAPIC_PINS: u64 = 24;
/// `KVM_HC_MAP_GPA_RANGE`, and the bit of its third argument that says "private".
const MAP_GPA_RANGE: u64 = 12;
const ENCRYPTED: u64 = 1 << 4;
/// What the device says when it is read.
const DEVICE_VALUE: u32 = 0x0b5e_55ed;

fn main() -> ExitCode {
    match run() {
        Ok(()) => {
            println!("the guest is what was measured, and nothing of it was seen outside");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("tdx: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// What the program looks at and works with while the guest runs.
struct Machine {
    vm: VmFd,
    ram: Memory,
    ram_file: RawFd,
    expected: [u8; measurement::BYTES],
    /// What the guest has said of its measurement so far.
    reported: Vec<u8>,
    conversions: u32,
    device_writes: u32,
}

fn run() -> Result<()> {
    let kvm = Kvm::new().context("cannot open /dev/kvm (`twofold run` supplies one)")?;
    let types = kvm.check_extension_raw(KVM_CAP_VM_TYPES.into());
    ensure!(
        types >> KVM_X86_TDX_VM & 1 != 0,
        "this KVM has no TDX guests"
    );
    let image = guest::image();
    let low = Memory::map(guest::LOW, guest::LOW_SIZE as usize)?;
    let ram = Memory::map(guest::RAM, guest::RAM_SIZE as usize)?;
    let code = Memory::map(guest::LOAD_ADDRESS, image.len())?;

    let vm = kvm
        .create_vm_with_type(KVM_X86_TDX_VM.into())
        .context("cannot create a TDX guest")?;
    // The TDX module delivers interrupts, so the local APICs have to be KVM's. And the guest's
    // wish to convert memory shall reach this program.
    enable(&vm, KVM_CAP_SPLIT_IRQCHIP, IOAPIC_PINS)?;
    enable(&vm, KVM_CAP_EXIT_HYPERCALL, 1 << MAP_GPA_RANGE)?;
    command::init_vm(&vm, ADDRESS_WIDTH)?;
    let add_slot = |memory: &Memory, slot, size| -> Result<RawFd> {
        let file = vm
            .create_guest_memfd(kvm_create_guest_memfd {
                size,
                ..Default::default()
            })
            .context("cannot create a guest memory file")?;
        memory.add_with_private_half(&vm, slot, file)?;
        Ok(file)
    };
    add_slot(&low, 0, guest::LOW_SIZE)?;
    let ram_file = add_slot(&ram, 1, guest::RAM_SIZE)?;
    add_slot(&code, 2, image.len() as u64)?;
    let mut vcpu = vm.create_vcpu(0).context("cannot create a vCPU")?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    command::init_vcpu(&vcpu, 0)?;

    let mut machine = Machine {
        vm,
        ram,
        ram_file,
        expected: [0; measurement::BYTES],
        reported: Vec::new(),
        conversions: 0,
        device_writes: 0,
    };
    machine.set_private(guest::LOW, guest::LOW_SIZE, true)?;
    machine.set_private(guest::RAM, guest::RAM_SIZE, true)?;
    machine.set_private(guest::LOAD_ADDRESS, image.len() as u64, true)?;
    machine.expected = build(&vcpu, image)?;
    command::finalize(&machine.vm)?;
    println!("built and measured: {}", hex(&machine.expected));
    match vcpu.get_regs() {
        Err(error) => println!("the guest's registers cannot be read: {error}"),
        Ok(_) => bail!("the guest's registers can be read"),
    }
    machine.run_until_done(&mut vcpu)
}

fn enable(vm: &VmFd, cap: u32, argument: u64) -> Result<()> {
    vm.enable_cap(&kvm_enable_cap {
        cap,
        args: [argument, 0, 0, 0],
        ..Default::default()
    })
    .with_context(|| format!("KVM refuses capability {cap}"))
}

/// Adds the guest's initial memory. Returns what its measurement must be.
fn build(vcpu: &VcpuFd, image: &[u8]) -> Result<[u8; measurement::BYTES]> {
    let mut measurement = Measurement::default();
    let zeros = vec![0; guest::LOW_SIZE as usize];
    for (gpa, content, measured) in [
        (guest::LOW, zeros.as_slice(), false),
        (guest::LOAD_ADDRESS, image, true),
    ] {
        command::add_memory(vcpu, gpa, content, measured)?;
        measurement.add(gpa, content, measured);
    }
    Ok(measurement.finish())
}

impl Machine {
    /// Runs the guest until it says that it is done.
    fn run_until_done(&mut self, vcpu: &mut VcpuFd) -> Result<()> {
        loop {
            match vcpu.run().context("KVM_RUN failed")? {
                VcpuExit::IoOut(guest::STEP_PORT, &[guest::DONE]) => return self.judge(),
                VcpuExit::IoOut(guest::STEP_PORT, &[step]) => self.look(step)?,
                VcpuExit::IoOut(guest::MRTD_PORT, data) => self.reported.extend_from_slice(data),
                VcpuExit::Hypercall(call) if call.nr == MAP_GPA_RANGE => {
                    let [address, pages, kind, ..] = call.args;
                    self.convert(address, pages * PAGE, kind & ENCRYPTED != 0)?;
                    *call.ret = 0;
                }
                VcpuExit::MmioRead(guest::DEVICE, data) if data.len() == 4 => {
                    data.copy_from_slice(&DEVICE_VALUE.to_le_bytes());
                    println!("the guest reads the device: {DEVICE_VALUE:#x}");
                }
                VcpuExit::MmioWrite(address, data) if address == guest::DEVICE + 4 => {
                    let expected = (DEVICE_VALUE + 1).to_le_bytes();
                    ensure!(data == expected, "the guest wrote {data:x?} to the device");
                    println!("and writes one more back");
                    self.device_writes += 1;
                }
                other => bail!("the guest ended in {other:x?}"),
            }
        }
    }

    /// Converts memory. First KVM is told, so that no vCPU reaches the old half any more; only then
    /// is that half given back to the system.
    fn convert(&mut self, address: u64, size: u64, private: bool) -> Result<()> {
        self.conversions += 1;
        let kind = if private { "private" } else { "shared" };
        println!(
            "the guest asks for {} KiB at {address:#x} to be {kind}",
            size >> 10
        );
        self.set_private(address, size, private)?;
        match private {
            true => self.ram.discard(address, size),
            false => punch_hole(self.ram_file, address - guest::RAM, size),
        }
    }

    fn set_private(&self, address: u64, size: u64, private: bool) -> Result<()> {
        let attributes = match private {
            true => u64::from(KVM_MEMORY_ATTRIBUTE_PRIVATE),
            false => 0,
        };
        self.vm
            .set_memory_attributes(kvm_memory_attributes {
                address,
                size,
                attributes,
                flags: 0,
            })
            .with_context(|| format!("cannot convert {size:#x} bytes at {address:#x}"))
    }

    /// Looks at the guest's memory from outside.
    fn look(&self, step: u8) -> Result<()> {
        let secret = guest::SECRET.to_le_bytes();
        let greeting = guest::GREETING.to_le_bytes();
        let (mut greetings, mut others) = (0, 0);
        for page in (guest::RAM..guest::RAM + guest::RAM_SIZE).step_by(PAGE as usize) {
            let content = self.ram.page(page)?;
            // At any distance, not only where the guest has put it.
            ensure!(
                !content.windows(secret.len()).any(|bytes| bytes == secret),
                "after step {step} the page at {page:#x} shows the guest's secret"
            );
            if content.starts_with(&greeting) {
                greetings += 1;
            } else if content.iter().any(|byte| *byte != 0) {
                others += 1;
            }
        }
        println!(
            "step {step}: from outside, {greetings} pages greet and {others} say anything else"
        );
        Ok(())
    }

    /// Whether the guest did what it was there for.
    fn judge(&self) -> Result<()> {
        println!("the guest was told:  {}", hex(&self.reported));
        ensure!(
            self.reported == self.expected,
            "the guest's measurement is not that of what was put there"
        );
        ensure!(self.device_writes == 1, "the guest did not use the device");
        ensure!(self.conversions > 1, "the guest did not share memory");
        Ok(())
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
