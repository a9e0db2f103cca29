//! A VM with one vCPU, whose every use is announced.

// UNSAFETY: gives memory to KVM, and calls that kvm-ioctls does not have.
#![expect(unsafe_code)]

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd as _, RawFd};

use anyhow::{Context, Result, bail, ensure};
use example_parts::enter_flat_mode;
use kvm_bindings::{
    KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_enable_cap, kvm_regs,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

use crate::backing::Backing;
use crate::guest::{self, Access};

/// A VM, its memory slots, and where it says what it does.
pub struct Vm<'a> {
    // Before the memory, which the VM must not outlive.
    vcpu: VcpuFd,
    vm: VmFd,
    marks: &'a File,
    _low: Backing,
}

/// How a slot is set.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Slot {
    Plain,
    Logging,
    ReadOnly,
}

/// `KVM_CLEAR_DIRTY_LOG`: `_IOWR(KVMIO, 0xc0, 24 bytes)`.
const CLEAR_DIRTY_LOG: u64 = 0xc018_aec0;
/// `KVM_RESET_DIRTY_RINGS`: `_IO(KVMIO, 0xc7)`.
const RESET_DIRTY_RINGS: u64 = 0xaec7;
/// `KVM_PRE_FAULT_MEMORY`: `_IOWR(KVMIO, 0xd5, 64 bytes)`.
const PRE_FAULT_MEMORY: u64 = 0xc040_aed5;

#[repr(C)]
struct ClearDirtyLog {
    slot: u32,
    num_pages: u32,
    first_page: u64,
    bitmap: u64,
}

#[repr(C)]
struct PreFaultMemory {
    gpa: u64,
    size: u64,
    flags: u64,
    padding: [u64; 5],
}

impl<'a> Vm<'a> {
    /// A VM with these capabilities enabled and the guest's code in slot 0.
    pub fn new(marks: &'a File, name: &str, capabilities: &[(u32, u64)]) -> Result<Self> {
        mark(marks, &format!("call: make a VM, {name}"))?;
        let kvm = Kvm::new().context("cannot open /dev/kvm")?;
        let vm = kvm.create_vm().context("cannot create a VM")?;
        for &(cap, argument) in capabilities {
            vm.enable_cap(&kvm_enable_cap {
                cap,
                args: [argument, 0, 0, 0],
                ..Default::default()
            })
            .with_context(|| format!("cannot enable capability {cap}"))?;
        }
        let low = Backing::new(guest::LOW_SIZE as usize, false)?;
        low.write(guest::CODE as usize, &guest::IMAGE)?;
        let vcpu = vm.create_vcpu(0).context("cannot create a vCPU")?;
        // Where it begins is said with each access.
        enter_flat_mode(&vcpu, 0)?;
        let vm = Self {
            vcpu,
            vm,
            marks,
            _low: low,
        };
        vm.set_slot(0, 0, &vm._low, Slot::Plain)?;
        Ok(vm)
    }

    /// Says what the following is about.
    pub fn mark(&self, text: &str) -> Result<()> {
        mark(self.marks, text)
    }

    /// Has the guest make one access, and says what came of it.
    pub fn access(&mut self, access: Access) -> Result<()> {
        match access {
            Access::Read(gpa) => self.mark(&format!("guest: read {gpa:#x}"))?,
            Access::Write(gpa, _) => self.mark(&format!("guest: write {gpa:#x}"))?,
            Access::Execute(gpa) => self.mark(&format!("guest: execute {gpa:#x}"))?,
        }
        let (rax, rbx) = access.registers();
        self.vcpu.set_regs(&kvm_regs {
            rip: access.entry(),
            rax,
            rbx,
            rflags: 1 << 1, // always set
            ..Default::default()
        })?;
        loop {
            let (text, done) = match self.vcpu.run() {
                Ok(VcpuExit::Hlt) => ("halted".to_owned(), true),
                Ok(VcpuExit::MmioRead(gpa, data)) => {
                    data.fill(0x5a);
                    (format!("mmio read {gpa:#x}"), false)
                }
                Ok(VcpuExit::MmioWrite(gpa, data)) => {
                    (format!("mmio write {gpa:#x} {data:x?}"), false)
                }
                // As the call failed, it says where.
                Ok(VcpuExit::MemoryFault { gpa, .. }) => (
                    format!("errno {}, memory fault at {gpa:#x}", libc::EFAULT),
                    true,
                ),
                Ok(other) => (format!("{other:?}"), true),
                Err(error) => (format!("errno {}", error.errno()), true),
            };
            self.mark(&format!("exit: {text}"))?;
            if done {
                break;
            }
        }
        if let Access::Read(_) = access {
            let value = self.vcpu.get_regs()?.rax;
            self.mark(&format!("exit: eax is {value:#x}"))?;
        }
        Ok(())
    }

    /// Has the guest make one access after the other.
    pub fn accesses(&mut self, accesses: &[Access]) -> Result<()> {
        accesses.iter().try_for_each(|access| self.access(*access))
    }

    /// Makes a slot of all of `backing`, or changes it.
    pub fn set_slot(&self, slot: u32, gpa: u64, backing: &Backing, kind: Slot) -> Result<()> {
        self.mark(&format!("call: slot {slot} at {gpa:#x}, {kind:?}"))?;
        let flags = match kind {
            Slot::Plain => 0,
            Slot::Logging => KVM_MEM_LOG_DIRTY_PAGES,
            Slot::ReadOnly => KVM_MEM_READONLY,
        };
        self.set_region(slot, gpa, backing.address(), backing.size(), flags)
    }

    /// Deletes a slot.
    pub fn delete_slot(&self, slot: u32) -> Result<()> {
        self.mark(&format!("call: delete slot {slot}"))?;
        self.set_region(slot, 0, 0, 0, 0)
    }

    fn set_region(&self, slot: u32, gpa: u64, hva: u64, size: u64, flags: u32) -> Result<()> {
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: gpa,
            memory_size: size,
            userspace_addr: hva,
        };
        // SAFETY: the memory is the guest's; nothing in this process relies on its content.
        unsafe { self.vm.set_user_memory_region(region) }
            .with_context(|| format!("KVM refuses slot {slot} at {gpa:#x}"))
    }

    /// Reads the dirty log of a slot of `size` bytes, and says what is in it.
    pub fn dirty_log(&self, slot: u32, size: u64) -> Result<Vec<u64>> {
        self.mark(&format!("call: get the dirty log of slot {slot}"))?;
        let words = self.vm.get_dirty_log(slot, size as usize)?;
        let pages: Vec<_> = (0..words.len() * 64)
            .filter(|page| words[page / 64] >> (page % 64) & 1 != 0)
            .collect();
        let dirty = match pages.len() {
            0..=40 => format!("{pages:?}"),
            count => format!("{count} pages"),
        };
        self.mark(&format!("exit: dirty {dirty}"))?;
        Ok(words)
    }

    /// Clears pages of the dirty log of a slot: those in `mask`, of the 64 from `first` on.
    pub fn clear_dirty_log(&self, slot: u32, first: u64, mask: u64) -> Result<()> {
        self.mark(&format!(
            "call: clear {mask:#x} from page {first} on in the dirty log of slot {slot}"
        ))?;
        let bitmap = [mask];
        let argument = ClearDirtyLog {
            slot,
            num_pages: 64,
            first_page: first,
            bitmap: bitmap.as_ptr() as u64,
        };
        self.ioctl(
            self.vm.as_raw_fd(),
            CLEAR_DIRTY_LOG,
            &raw const argument as u64,
        )?;
        Ok(())
    }

    /// Has KVM take back what was harvested from the dirty rings.
    pub fn reset_dirty_rings(&self) -> Result<()> {
        self.mark("call: reset the dirty rings")?;
        let count = self.ioctl(self.vm.as_raw_fd(), RESET_DIRTY_RINGS, 0)?;
        self.mark(&format!("exit: {count} entries"))
    }

    /// Maps memory before it is used.
    pub fn pre_fault(&self, gpa: u64, size: u64) -> Result<()> {
        self.mark(&format!("call: pre-fault {size:#x} bytes at {gpa:#x}"))?;
        let mut argument = PreFaultMemory {
            gpa,
            size,
            flags: 0,
            padding: [0; 5],
        };
        self.ioctl(
            self.vcpu.as_raw_fd(),
            PRE_FAULT_MEMORY,
            &raw mut argument as u64,
        )?;
        ensure!(argument.size == 0, "{:#x} bytes are left", argument.size);
        Ok(())
    }

    fn ioctl(&self, fd: RawFd, number: u64, argument: u64) -> Result<i32> {
        // SAFETY: the argument is what the call wants, by this function's callers.
        let result = unsafe { libc::ioctl(fd, number, argument) };
        if result < 0 {
            bail!("ioctl {number:#x}: {}", io::Error::last_os_error());
        }
        Ok(result)
    }

    /// The vCPU.
    pub const fn vcpu(&self) -> &VcpuFd {
        &self.vcpu
    }

    /// Ends the VM.
    pub fn end(self) -> Result<()> {
        self.mark("call: end the VM")
    }
}

/// One line, in one piece.
pub fn mark(mut marks: &File, text: &str) -> Result<()> {
    marks
        .write_all(format!("{text}\n").as_bytes())
        .context("cannot say what is next")
}
