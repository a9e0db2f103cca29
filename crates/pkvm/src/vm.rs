//! VMs and vCPUs, and the table that finds them.
//!
//! ```text
//!            reserve          init_vm               complete
//!     free ───────────> reserved ────────> claimed ──────────> ready
//!      ^ ^  unreserve      │ ^  failed        │                  │ start_teardown
//!      │ └─────────────────┘ └────────────────┘                  v
//!      └───────────────────── claimed <──────────────────────── dying
//!         everything is back            finalize_teardown
//! ```

// UNSAFETY: the table hands out references to objects that live until their slot is emptied.
#![expect(unsafe_code)]

use crate::error::Error;
use crate::guest::Guest;
use crate::interrupts::Interface;
use crate::lock::Lock;
use crate::place::Placed;
use crate::platform::Vmid;
use crate::request::Stopped;
use crate::stack::Stack;
use core::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use twofold_arch::{Gfn, Hfn, Hpa};

/// The most VMs at a time.
pub const MAX_VMS: usize = 255;
/// The handle of the first slot. A handle shares no value with an error: see [`Handle`].
pub const HANDLE_OFFSET: u32 = 0x1000;
/// Bits of the narrowest VMID that a processor may have.
pub const VMID_BITS: u32 = 8;
/// The most vCPUs of a VM.
pub const MAX_VCPUS: usize = 128;

// Every VM has a VMID of its own, and the host has number 0.
const _: () = assert!(MAX_VMS < 1 << VMID_BITS);
// Handles fit into the annotation of a donated page.
const _: () = assert!(HANDLE_OFFSET as usize + MAX_VMS <= 1 << 16);

/// A VM's name: an index into the table, offset so that it is never mistaken for one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Handle(u32);

impl Handle {
    /// The handle with this number, if it can be one.
    pub const fn new(number: u64) -> Option<Self> {
        if number >= HANDLE_OFFSET as u64 && number < HANDLE_OFFSET as u64 + MAX_VMS as u64 {
            Some(Self(number as u32))
        } else {
            None
        }
    }

    /// The number, 0x1000 or more.
    pub const fn get(self) -> u32 {
        self.0
    }

    pub(crate) const fn index(self) -> usize {
        (self.0 - HANDLE_OFFSET) as usize
    }

    const fn of_index(index: usize) -> Self {
        Self(HANDLE_OFFSET + index as u32)
    }

    /// The VMID that goes with the slot: never the host's, never another VM's.
    pub(crate) const fn vmid(self) -> Vmid {
        Vmid(self.index() as u16 + 1)
    }
}

/// A VM, complete from the moment it can be found. It fills the page that the host gave for it.
pub(crate) struct Vm {
    pub(crate) handle: Handle,
    pub(crate) protected: bool,
    pub(crate) created_vcpus: usize,
    /// Where the host has its own record of the VM, in a pinned page.
    pub(crate) host_vm: Hpa,
    /// The page of this object.
    pub(crate) area: Hfn,
    pub(crate) guest: Lock<Guest>,
    /// Null until the vCPU is complete.
    vcpus: [AtomicPtr<Vcpu>; MAX_VCPUS],
}

impl Vm {
    pub(crate) fn new(
        handle: Handle,
        protected: bool,
        created_vcpus: usize,
        host_vm: Hpa,
        area: Hfn,
        guest: Guest,
    ) -> Self {
        Self {
            handle,
            protected,
            created_vcpus,
            host_vm,
            area,
            guest: Lock::new(guest),
            vcpus: [const { AtomicPtr::new(core::ptr::null_mut()) }; MAX_VCPUS],
        }
    }

    /// The slot of a vCPU that may exist.
    fn slot(&self, index: usize) -> Option<&AtomicPtr<Vcpu>> {
        self.vcpus.get(..self.created_vcpus)?.get(index)
    }

    /// A vCPU that is complete.
    pub(crate) fn vcpu(&self, index: usize) -> Option<&Vcpu> {
        let vcpu = self.placed_vcpu(index)?;
        // SAFETY: a vCPU in a slot is complete and lives as long as its VM, which `self` borrows.
        Some(unsafe { vcpu.get() })
    }

    /// The same, to be kept by whoever keeps the VM from ending.
    pub(crate) fn placed_vcpu(&self, index: usize) -> Option<Placed<Vcpu>> {
        Placed::from_ptr(self.slot(index)?.load(Ordering::Acquire))
    }

    pub(crate) fn vcpus(&self) -> impl Iterator<Item = &Vcpu> {
        (0..self.created_vcpus).filter_map(|index| self.vcpu(index))
    }

    /// Publishes a vCPU that is complete.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is no such slot, or it is taken.
    pub(crate) fn publish(&self, index: usize, vcpu: Placed<Vcpu>) -> Result<(), Error> {
        let slot = self.slot(index).ok_or(Error::Invalid)?;
        slot.compare_exchange(
            core::ptr::null_mut(),
            vcpu.as_ptr(),
            Ordering::AcqRel,
            Ordering::Relaxed,
        )
        .map(|_| ())
        .map_err(|_| Error::Invalid)
    }
}

/// The registers of a processor that does not run, a guest's or the host's. The order is what the
/// code that switches them relies on.
#[derive(Clone, Debug)]
#[repr(C, align(16))]
pub struct Registers {
    /// v0 to v31.
    pub vector: [[u64; 2]; 32],
    /// x0 to x30.
    pub x: [u64; 31],
    /// Where it goes on.
    pub pc: u64,
    /// PSTATE, as SPSR_EL2 holds it.
    pub pstate: u64,
    /// FPCR.
    pub fpcr: u64,
    /// FPSR.
    pub fpsr: u64,
    /// EL1's and EL0's system registers, in the order of [`SYSTEM`].
    pub system: [u64; SYSTEM_REGISTERS],
}

/// System registers that a vCPU keeps, in the order of [`Registers::system`].
pub const SYSTEM: [&str; SYSTEM_REGISTERS] = [
    "sctlr_el1",
    "sp_el0",
    "sp_el1",
    "elr_el1",
    "spsr_el1",
    "vbar_el1",
    "cpacr_el1",
    "ttbr0_el1",
    "ttbr1_el1",
    "tcr_el1",
    "mair_el1",
    "amair_el1",
    "esr_el1",
    "far_el1",
    "afsr0_el1",
    "afsr1_el1",
    "contextidr_el1",
    "tpidr_el0",
    "tpidrro_el0",
    "tpidr_el1",
    "par_el1",
    "cntkctl_el1",
    "csselr_el1",
    "mdscr_el1",
    "cntv_cval_el0",
    "cntv_ctl_el0",
];

/// How many there are.
pub const SYSTEM_REGISTERS: usize = 26;

/// Where those system registers stand that the hypervisor itself reads or changes.
pub mod system {
    /// SCTLR_EL1.
    pub const SCTLR: usize = 0;
    /// ELR_EL1.
    pub const ELR: usize = 3;
    /// SPSR_EL1.
    pub const SPSR: usize = 4;
    /// VBAR_EL1.
    pub const VBAR: usize = 5;
    /// ESR_EL1.
    pub const ESR: usize = 12;
    /// FAR_EL1.
    pub const FAR: usize = 13;
    /// CNTV_CVAL_EL0: when the virtual timer fires.
    pub const TIMER_COMPARE: usize = 24;
    /// CNTV_CTL_EL0: enable, mask, and whether it has fired.
    pub const TIMER_CONTROL: usize = 25;
}

impl Registers {
    /// EL1 with interrupts masked, at `pc`, with `argument` in x0.
    pub const fn entry(pc: u64, argument: u64) -> Self {
        let mut x = [0; 31];
        x[0] = argument;
        Self {
            vector: [[0; 2]; 32],
            x,
            pc,
            pstate: 0x3c5,
            fpcr: 0,
            fpsr: 0,
            system: [0; SYSTEM_REGISTERS],
        }
    }
}

/// What the hypervisor keeps of a vCPU, and nothing else. It fills the page given for it.
pub(crate) struct Vcpu {
    /// Where the host has its own record of the vCPU, in a pinned page.
    pub(crate) host_vcpu: Hpa,
    /// The page of this object.
    pub(crate) area: Hfn,
    /// Whether a processor has it loaded; changed under the table's lock.
    pub(crate) loaded: AtomicBool,
    pub(crate) inner: Lock<VcpuInner>,
}

/// What the processor that has the vCPU loaded changes.
pub(crate) struct VcpuInner {
    pub(crate) registers: Registers,
    /// Pages for the guest's tables.
    pub(crate) tables: Stack,
    /// The frame of the last fault that went to the host.
    pub(crate) fault: Option<Gfn>,
    /// What the guest stopped at: what the host may ask to be done about it.
    pub(crate) stopped: Stopped,
    /// Its virtual CPU interface, while it is not loaded.
    pub(crate) interface: Interface,
    /// The host answers a call of the guest: its x0 to x3 are to be taken at the next entry.
    pub(crate) awaits_answer: bool,
}

/// A slot of the table.
#[derive(Clone, Copy, Default)]
pub(crate) enum Slot {
    #[default]
    Free,
    /// The host with this VM may build a VM here.
    Reserved { host_vm: Hpa },
    /// A VM is being built here, or taken apart: it cannot be found, and nobody else gets the slot.
    Claimed { host_vm: Hpa },
    Ready {
        vm: Placed<Vm>,
        /// Loaded vCPUs.
        users: u32,
        dying: bool,
    },
}

/// The table of VMs; behind its lock.
pub(crate) struct VmTable {
    slots: [Slot; MAX_VMS],
}

impl VmTable {
    pub(crate) const fn new() -> Self {
        Self {
            slots: [Slot::Free; MAX_VMS],
        }
    }

    /// Reserves a slot. One scan finds a VM of the same host VM and the first free slot.
    ///
    /// # Errors
    /// [`Error::Exists`] if there is a VM for `host_vm`, or a reservation; [`Error::NoMemory`] if
    /// every slot is taken.
    pub(crate) fn reserve(&mut self, host_vm: Hpa) -> Result<Handle, Error> {
        let mut free = None;
        for (index, slot) in self.slots.iter().enumerate() {
            let other = match slot {
                Slot::Free => {
                    free = free.or(Some(index));
                    continue;
                }
                Slot::Reserved { host_vm } | Slot::Claimed { host_vm } => *host_vm,
                // SAFETY: the slot is under the lock, so the VM stays.
                Slot::Ready { vm, .. } => unsafe { vm.get() }.host_vm,
            };
            if other == host_vm {
                return Err(Error::Exists);
            }
        }
        let index = free.ok_or(Error::NoMemory)?;
        self.slots[index] = Slot::Reserved { host_vm };
        Ok(Handle::of_index(index))
    }

    /// Gives a reservation up.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the slot holds anything else.
    pub(crate) fn unreserve(&mut self, handle: Handle) -> Result<(), Error> {
        match self.slots[handle.index()] {
            Slot::Reserved { .. } => {
                self.slots[handle.index()] = Slot::Free;
                Ok(())
            }
            _ => Err(Error::Invalid),
        }
    }

    /// Claims a reservation for the building of its VM.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the slot is not reserved for this host VM; [`Error::Exists`] if the
    /// host VM has one already.
    pub(crate) fn claim(&mut self, handle: Handle, host_vm: Hpa) -> Result<(), Error> {
        match self.slots[handle.index()] {
            Slot::Reserved { host_vm: reserved } if reserved == host_vm => {
                self.slots[handle.index()] = Slot::Claimed { host_vm };
                Ok(())
            }
            Slot::Claimed { host_vm: other } if other == host_vm => Err(Error::Exists),
            // SAFETY: the slot is under the lock, so the VM stays.
            Slot::Ready { vm, .. } if unsafe { vm.get() }.host_vm == host_vm => Err(Error::Exists),
            _ => Err(Error::Invalid),
        }
    }

    /// The VM could not be built: the slot is reserved as before.
    pub(crate) fn unclaim(&mut self, handle: Handle) {
        if let Slot::Claimed { host_vm } = self.slots[handle.index()] {
            self.slots[handle.index()] = Slot::Reserved { host_vm };
        }
    }

    /// The VM is complete: from now on it can be found.
    pub(crate) fn publish(&mut self, handle: Handle, vm: Placed<Vm>) {
        self.slots[handle.index()] = Slot::Ready {
            vm,
            users: 0,
            dying: false,
        };
    }

    /// A VM that is complete, dying or not. The reference is good while the table is locked.
    pub(crate) fn find(&self, handle: Handle) -> Option<&Vm> {
        match &self.slots[handle.index()] {
            // SAFETY: as long as the table is borrowed nobody removes the VM.
            Slot::Ready { vm, .. } => Some(unsafe { vm.get() }),
            _ => None,
        }
    }

    /// Whether a VM is dying.
    pub(crate) fn is_dying(&self, handle: Handle) -> bool {
        matches!(self.slots[handle.index()], Slot::Ready { dying: true, .. })
    }

    pub(crate) fn slot(&mut self, handle: Handle) -> &mut Slot {
        &mut self.slots[handle.index()]
    }

    /// Every VM.
    pub(crate) fn vms(&self) -> impl Iterator<Item = &Vm> {
        (0..MAX_VMS).filter_map(|index| self.find(Handle::of_index(index)))
    }
}
