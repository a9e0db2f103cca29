//! Memory introspection with sub-page write protection: a small VMM that watches over structures in
//! the memory of its guest's kernel.
//!
//! [The guest](guest)'s credentials and its table of system calls share a page with data that changes
//! all the time. This program guards the two in pieces of 128 bytes, prints who tries to change them,
//! drops what is not the kernel's own to write, and lets the rest of the page be written as if nothing
//! were guarded. Then it does the same by protecting the whole page, as one has to without sub-pages,
//! and compares. `docs/spp.md` explains the calls.
//!
//! ```text
//! guest-physical 0x000000  page tables
//!                0x100000  the guest's code
//!                0x180000  the page:  0x300  credentials
//!                                     0xc00  table of system calls
//! ```

mod guest;
mod sub_pages;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use example_parts::{Memory, enter_long_mode};
use kvm_bindings::{
    KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_MAX_CPUID_ENTRIES, kvm_guest_debug,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use twofold_abi::spp::{KVM_EXIT_SPP, KVM_SUBPAGE_FULL_ACCESS, kvm_spp_exit};

const MEMORY_SIZE: usize = 2 << 20;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const DIRECTORY: u64 = 0x3000;
const PRESENT_WRITABLE: u64 = 0b11;
const LARGE: u64 = 1 << 7;

/// A structure of the guest's kernel that is not to be changed by just anybody.
struct Structure {
    name: &'static str,
    /// Where it is in the page, and how long it is.
    offset: u64,
    bytes: u64,
    /// The function of the kernel that may change it.
    owner: Option<&'static str>,
}

const GUARDED: [Structure; 2] = [
    Structure {
        name: "credentials",
        offset: guest::CREDENTIALS,
        bytes: 128,
        owner: Some("set_user"),
    },
    Structure {
        name: "system calls",
        offset: guest::CALLS,
        bytes: 256,
        owner: None,
    },
];

/// How the structures are guarded.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Method {
    /// Only the pieces of 128 bytes that hold them.
    Pieces,
    /// The page.
    WholePage,
}

impl Method {
    /// What of the page may be written without asking.
    fn map(self) -> u32 {
        match self {
            Self::Pieces => sub_pages::all_but(
                GUARDED
                    .iter()
                    .flat_map(|structure| structure.offset..structure.offset + structure.bytes),
            ),
            Self::WholePage => 0,
        }
    }
}

/// What a guest that was watched has cost.
struct Cost {
    exits: u64,
    time: Duration,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("spp: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    println!(
        "The guest's page at {:#x} is busy. It also holds",
        guest::PAGE
    );
    for Structure {
        name,
        offset,
        bytes,
        ..
    } in &GUARDED
    {
        println!("  {:#x}  {name}, {bytes} bytes", guest::PAGE + offset);
    }
    println!("\nWatching over them in pieces of 128 bytes:");
    let pieces = watch(Method::Pieces)?;
    println!("\nWatching over the whole page:");
    let page = watch(Method::WholePage)?;
    let writes = 2 * guest::ROUNDS * guest::WRITES;
    println!("\nFor the {writes} ordinary writes to that page, and the others,");
    for (method, cost) in [("pieces", &pieces), ("the page", &page)] {
        println!(
            "  guarding {method:<8} took {:6} exits and {:8.3} ms",
            cost.exits,
            cost.time.as_secs_f64() * 1e3
        );
    }
    Ok(())
}

/// Runs the guest while its structures are guarded.
fn watch(method: Method) -> Result<Cost> {
    let kvm = Kvm::new().context("cannot open /dev/kvm (`twofold run` supplies one)")?;
    let memory = Memory::map(0, MEMORY_SIZE)?;
    for (address, entry) in [
        (PML4, PDPT | PRESENT_WRITABLE),
        (PDPT, DIRECTORY | PRESENT_WRITABLE),
        (DIRECTORY, LARGE | PRESENT_WRITABLE),
    ] {
        memory.write(address, &entry.to_le_bytes())?;
    }
    memory.write(guest::LOAD_ADDRESS, guest::image())?;
    let vm = kvm.create_vm().context("cannot create a VM")?;
    sub_pages::enable(&kvm, &vm)?;
    memory.add_to(&vm, 0)?;
    let mut vcpu = vm.create_vcpu(0).context("cannot create a vCPU")?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    enter_long_mode(&vcpu, PML4, guest::LOAD_ADDRESS, guest::PAGE)?;

    let begin = Instant::now();
    let exits = Watch {
        vm: &vm,
        method,
        exits: 0,
    }
    .run_until_halt(&mut vcpu)?;
    let time = begin.elapsed();

    let word = |offset| memory.read_u64(guest::PAGE + offset);
    let user = word(guest::CREDENTIALS)?;
    let (group, capabilities) = (
        word(guest::CREDENTIALS + 8)?,
        word(guest::CREDENTIALS + 16)?,
    );
    ensure!(
        (user, group, capabilities) == (guest::SECOND_USER, guest::FIRST_USER, 0),
        "the credentials are not what the kernel made them"
    );
    for number in 0..32 {
        let call = word(guest::CALLS + number * 8)?;
        ensure!(
            call == guest::FIRST_CALL + number,
            "system call {number} was hooked"
        );
    }
    println!(
        "  both are intact: user {user}, group {group}, no capabilities (after {} rounds of work)",
        word(0x10)?
    );
    Ok(Cost { exits, time })
}

/// The guest while it is watched.
struct Watch<'a> {
    vm: &'a VmFd,
    method: Method,
    exits: u64,
}

impl Watch<'_> {
    /// Runs the guest to its end. How often it came back.
    fn run_until_halt(mut self, vcpu: &mut VcpuFd) -> Result<u64> {
        loop {
            self.exits += 1;
            match vcpu.run().context("KVM_RUN failed")? {
                VcpuExit::IoOut(guest::BOOTED_PORT, _) => {
                    sub_pages::set_access(self.vm, guest::PAGE, self.method.map())?;
                }
                VcpuExit::Unsupported(KVM_EXIT_SPP) => {
                    let write = sub_pages::denied_write(vcpu);
                    self.decide(vcpu, write)?;
                }
                VcpuExit::Hlt => return Ok(self.exits),
                other => bail!("the guest ended in {other:x?}"),
            }
        }
    }

    /// The guest wants to write where it must not: who is it, and may it?
    fn decide(&mut self, vcpu: &mut VcpuFd, write: kvm_spp_exit) -> Result<()> {
        let rip = vcpu.get_regs()?.rip;
        let (function, distance) = guest::function_at(rip);
        let offset = write.addr - guest::PAGE;
        let structure = GUARDED.iter().find(|structure| {
            (structure.offset..structure.offset + structure.bytes).contains(&offset)
        });
        let Some(structure) = structure else {
            // Something else in the page: only whole pages ask about that.
            return self.let_through(vcpu);
        };
        let allowed = structure.owner == Some(function);
        println!(
            "  {function}+{distance:#x} wants to write {}+{:#x} (rip {rip:#x}, gpa {:#x}): {}",
            structure.name,
            offset - structure.offset,
            write.addr,
            if allowed { "let through" } else { "dropped" }
        );
        if allowed {
            return self.let_through(vcpu);
        }
        // Without the instruction there is no write.
        ensure!(write.insn_len != 0, "this write is not an instruction's");
        let mut regs = vcpu.get_regs()?;
        regs.rip += u64::from(write.insn_len);
        Ok(vcpu.set_regs(&regs)?)
    }

    /// Lets the guest execute one instruction with the page open.
    fn let_through(&mut self, vcpu: &mut VcpuFd) -> Result<()> {
        let step = |vcpu: &VcpuFd, control| {
            vcpu.set_guest_debug(&kvm_guest_debug {
                control,
                ..Default::default()
            })
        };
        sub_pages::set_access(self.vm, guest::PAGE, KVM_SUBPAGE_FULL_ACCESS)?;
        step(vcpu, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP)?;
        self.exits += 1;
        match vcpu.run().context("KVM_RUN failed")? {
            VcpuExit::Debug(_) => {}
            other => bail!("a single step ended in {other:x?}"),
        }
        step(vcpu, 0)?;
        sub_pages::set_access(self.vm, guest::PAGE, self.method.map())
    }
}
