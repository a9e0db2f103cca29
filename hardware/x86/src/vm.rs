//! A virtual machine: an MMU, and processors that run on it. This is how `twofold-mmu` is used.

use crate::guest;
use crate::host::{HostRange, Hypervisor, Writes};
use crate::instructions::{interrupts, physical_address_bits};
use crate::processor::{
    Exit, Features, Registers, SecondStageFault, SubPageEvent, Virtualization,
    VirtualizationException,
};
use crate::{ensure, smp};
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Deref;
use core::sync::atomic::{AtomicU64, Ordering};
use twofold_arch::sppt::SppQualification;
use twofold_arch::{Hpa, Level, PAGE_SIZE};
use twofold_mmu::{
    Config, MmioFault, Mmu, Outcome, Reader, ReaderStats, Region, RegionFlags, Root, RootRole,
};

/// Why a scenario fails.
pub type Failure = String;

/// One virtual machine.
pub struct Vm<V: Virtualization> {
    mmu: Mmu<V::Format, Hypervisor>,
    /// How often guests were left, for whatever reason.
    pub exits: AtomicU64,
}

impl<V: Virtualization> Deref for Vm<V> {
    type Target = Mmu<V::Format, Hypervisor>;

    fn deref(&self) -> &Self::Target {
        &self.mmu
    }
}

impl<V: Virtualization> Vm<V> {
    /// A machine with the guest of [`guest`](crate::guest) in its first slot, at the beginning of
    /// guests' memory.
    pub fn new(config: Config) -> Result<Arc<Self>, Failure> {
        let config = Config {
            maxphyaddr: physical_address_bits(),
            ..config
        };
        let vm = Self {
            mmu: Mmu::new(Hypervisor::default(), config),
            exits: AtomicU64::new(0),
        };
        guest::load_guest(Hpa::new(guest::MEMORY));
        vm.add_memory(Memory {
            slot: 0,
            gpa: 0,
            size: guest::SIZE,
            hpa: guest::MEMORY,
            ..Memory::default()
        })?;
        Ok(Arc::new(vm))
    }

    /// The same with one more slot.
    pub fn with_memory(config: Config, memory: Memory) -> Result<Arc<Self>, Failure> {
        let vm = Self::new(config)?;
        vm.add_memory(memory)?;
        Ok(vm)
    }

    /// Maps memory into the hypervisor's address space and makes a slot of it.
    pub fn add_memory(&self, memory: Memory) -> Result<(), Failure> {
        self.host().map(memory.host_range());
        self.change_region(memory)
    }

    /// Changes the slot: where it is, or its flags.
    pub fn change_region(&self, memory: Memory) -> Result<(), Failure> {
        self.set_region(memory.region())
            .map_err(|error| format!("slot {}: {error}", memory.slot))
    }

    /// What the MMU wants from its processors, as far as they have it.
    fn features(&self) -> Features {
        let mut wanted = Features::EXCEPTIONS;
        wanted.set(Features::ACCESSED_DIRTY, self.has_accessed_dirty());
        wanted.set(Features::WRITE_LOG, self.logs_by_pml());
        let sub_pages = self.sppt_root(RootRole::NORMAL);
        wanted.set(Features::SUB_PAGES, sub_pages.is_some());
        wanted & V::available()
    }

    /// Takes a slot's dirty log: bit n of word m is page 64 m + n.
    pub fn take_dirty_log(&self, memory: &Memory, bitmap: &mut [u64]) -> Result<(), Failure> {
        if self.logs_by_pml() {
            // What the other processor has logged is drained before it takes the interrupt.
            smp::interrupt_everywhere();
        }
        self.dirty_log_get(0, memory.slot as u16, bitmap)
            .map_err(|error| format!("dirty log: {error}"))
    }

    /// How often the MMU has asked for a flush.
    pub fn flushes(&self) -> u64 {
        self.host().flushes.load(Ordering::Relaxed)
    }
}

/// A slot of guest memory.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// The slot's id.
    pub slot: u32,
    /// First guest-physical address.
    pub gpa: u64,
    /// Bytes.
    pub size: u64,
    /// First physical address.
    pub hpa: u64,
    /// The largest page to use.
    pub level: Level,
    /// Whether the memory itself may be written.
    pub writes: Writes,
    /// How the slot is used.
    pub flags: RegionFlags,
}

impl Default for Memory {
    /// One 4K page of the guests' memory for scenarios.
    fn default() -> Self {
        Self {
            slot: 1,
            gpa: 0x8000_0000,
            size: PAGE_SIZE,
            hpa: guest::MEMORY + 0x20_0000,
            level: Level::L4K,
            writes: Writes::Allowed,
            flags: RegionFlags::empty(),
        }
    }
}

impl Memory {
    /// The first address by which the hypervisor and the MMU know the memory. Nothing is there: the
    /// hypervisor reaches memory by its physical address, and only names it in this way. Each slot
    /// has addresses of its own.
    pub fn hva(&self) -> u64 {
        (u64::from(self.slot) + 1) << 40 | self.hpa
    }

    /// The memory as the hypervisor knows it.
    pub fn host_range(&self) -> HostRange {
        let hva = self.hva();
        HostRange {
            hva: hva..hva + self.size,
            hpa: Hpa::new(self.hpa),
            writes: self.writes,
            level: self.level,
        }
    }

    /// The slot as the MMU is asked for it.
    pub fn region(&self) -> Region {
        Region {
            slot: self.slot,
            flags: self.flags.bits(),
            gpa: self.gpa,
            size: self.size,
            hva: self.hva(),
        }
    }
}

/// What the guest is asked to do; see guest.s.
#[derive(Clone, Copy, Debug)]
pub enum Operation {
    /// Reads a word.
    Read(u64),
    /// Writes a word.
    Write(u64, u64),
    /// Calls code.
    Fetch(u64),
    /// Writes a value to so many pages, from an address on.
    WritePages(u64, u64, u64),
    /// Reads and counts in the report page until told to stop.
    ReadForever(u64),
    /// Writes and counts in the report page until told to stop.
    WriteForever(u64),
    /// The sum of a word in so many pages, from an address on.
    ReadPages(u64, u64),
}

impl Operation {
    /// Answers the guest's request with this operation.
    pub fn put(self, registers: &mut Registers) {
        let (number, address, value, count) = match self {
            Self::Read(address) => (1, address, 0, 0),
            Self::Write(address, value) => (2, address, value, 0),
            Self::Fetch(address) => (3, address, 0, 0),
            Self::WritePages(address, value, count) => (4, address, value, count),
            Self::ReadForever(address) => (5, address, guest::REPORT, 0),
            Self::WriteForever(address) => (6, address, guest::REPORT, 0),
            Self::ReadPages(address, count) => (7, address, 0, count),
        };
        registers.rax = number;
        registers.rdi = address;
        registers.rsi = value;
        registers.rcx = count;
    }
}

/// A fault that was taken, and what the MMU made of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Taken {
    /// What the processor reported.
    pub fault: SecondStageFault,
    /// What the MMU answered.
    pub outcome: Outcome,
}

/// What an operation came to.
#[derive(Clone, Debug, Default)]
pub struct Done {
    /// What was read.
    pub value: u64,
    /// The first faults on the way, without those on the guest's own first slot.
    pub faults: Vec<Taken>,
    /// How often the processor missed a part of the sub-page permission table.
    pub sub_page_misses: u32,
    /// What the guest was told by the processor and asked the hypervisor about.
    pub exceptions: Vec<VirtualizationException>,
}

/// What a device answers to every read.
pub const DEVICE_VALUE: u64 = 0x5eed_de71_ce00_0001;
/// Length of the guest's instructions that access devices.
const ACCESS_LENGTH: u64 = 3;
/// Faults and exceptions of one operation that are remembered: more than any should take. A guest that
/// does not get on must not fill the heap with them.
const KEPT: usize = 64;
/// More exits than any operation needs: the guest does not get on.
const TOO_MANY_EXITS: u32 = 100_000;

/// A virtual processor with what it needs to use the MMU. Belongs to the physical processor that made
/// it.
pub struct GuestCpu<V: Virtualization> {
    vm: Arc<Vm<V>>,
    /// The processor's state.
    pub processor: V,
    reader: Reader,
    root: Root,
    /// Whether the guest has asked for an operation.
    waits: bool,
}

impl<V: Virtualization> GuestCpu<V> {
    /// A processor that waits for its first operation.
    pub fn new(vm: &Arc<Vm<V>>) -> Result<Self, Failure> {
        let root = Self::load_root(vm)?;
        let mut processor = V::new(vm.features());
        processor.set_root(root.hpa());
        if let Some(table) = vm.sppt_root(root.role()) {
            processor.set_sub_pages(table);
        }
        Ok(Self {
            vm: Arc::clone(vm),
            processor,
            reader: vm.reader(),
            root,
            waits: false,
        })
    }

    fn load_root(vm: &Vm<V>) -> Result<Root, Failure> {
        vm.load_root(RootRole::NORMAL)
            .map_err(|error| format!("no root: {error}"))
    }

    /// What was counted for this processor.
    pub fn stats(&self) -> ReaderStats {
        self.reader.stats()
    }

    /// Has the guest do something, resolving faults until it is done.
    pub fn run(&mut self, operation: Operation) -> Result<Done, Failure> {
        let mut done = Done::default();
        if !self.waits {
            // It has just been started and makes its first request.
            self.until_request(&mut done)?;
            self.waits = true;
        }
        operation.put(self.processor.registers());
        self.until_request(&mut done)?;
        done.value = self.processor.registers().rbx;
        Ok(done)
    }

    /// Runs the guest until it asks for something. It stays there: the request is answered by the
    /// registers that the next call enters it with.
    fn until_request(&mut self, done: &mut Done) -> Result<(), Failure> {
        for _ in 0..TOO_MANY_EXITS {
            match self.enter()? {
                Exit::Interrupt | Exit::LogFull => {}
                Exit::Request if self.processor.registers().rax == guest::REQUEST_VE => {
                    self.answer_exception(done)?;
                }
                Exit::Request => return Ok(()),
                Exit::Fault(fault) => self.resolve(fault, done)?,
                Exit::SubPages(event) => self.fill_sub_pages(event, done)?,
                Exit::Other(number, detail) => {
                    return Err(format!("unexpected exit {number:#x} ({detail:#x})"));
                }
            }
        }
        Err(format!(
            "the guest does not get on; faults: {:x?}",
            done.faults.last()
        ))
    }

    /// Enters the guest once, with the tables that the processor was given last.
    pub fn enter_once(&mut self) -> Exit {
        interrupts(false);
        let exit = self.processor.enter(true);
        interrupts(true);
        exit
    }

    /// Enters the guest once.
    fn enter(&mut self) -> Result<Exit, Failure> {
        if self.root.is_obsolete() {
            self.root = Self::load_root(&self.vm)?;
            self.processor.set_root(self.root.hpa());
        }
        interrupts(false);
        // An interrupt that comes after this question leaves the guest at once.
        let flush = smp::take_flush();
        let exit = self.processor.enter(flush);
        // Before an interrupt is acknowledged: who sent it may ask for the dirty log next.
        self.vm
            .drain_pml(&mut self.reader, 0, self.processor.take_write_log());
        interrupts(true);
        self.vm.exits.fetch_add(1, Ordering::Relaxed);
        Ok(exit)
    }

    fn resolve(&mut self, fault: SecondStageFault, done: &mut Done) -> Result<(), Failure> {
        let outcome = self
            .vm
            .fault(&mut self.reader, &self.root, fault.fault)
            .map_err(|error| format!("fault at {}: {error}", fault.fault.gpa))?;
        let own = fault.fault.gpa.get() < guest::SIZE;
        if !own && done.faults.len() < KEPT {
            done.faults.push(Taken { fault, outcome });
        }
        match outcome {
            Outcome::Mmio if own => {
                return Err(format!("no memory below the guest: {fault:x?}"));
            }
            // The guest is told when it tries again, and asks.
            Outcome::Mmio if self.vm.config().mmio == MmioFault::Violation => {}
            Outcome::Mmio => {
                self.processor.registers().rbx = DEVICE_VALUE;
                self.processor.skip(ACCESS_LENGTH);
            }
            // The write is dropped.
            Outcome::SubPageDenied => self.processor.skip(ACCESS_LENGTH),
            _ => {}
        }
        Ok(())
    }

    /// The guest has got a #VE and asks what the access does.
    fn answer_exception(&mut self, done: &mut Done) -> Result<(), Failure> {
        let exception = self.processor.take_exception();
        let (Some(exception), MmioFault::Violation) = (exception, self.vm.config().mmio) else {
            return Err(format!(
                "a #VE ({exception:x?}) after {:x?}",
                done.faults.last()
            ));
        };
        if done.exceptions.len() < KEPT {
            done.exceptions.push(exception);
        }
        let registers = self.processor.registers();
        registers.rax = ACCESS_LENGTH;
        registers.rbx = DEVICE_VALUE;
        Ok(())
    }

    /// The processor needs a part of the sub-page permission table that is not there.
    fn fill_sub_pages(&mut self, event: SubPageEvent, done: &mut Done) -> Result<(), Failure> {
        ensure!(
            event.qualification.contains(SppQualification::MISS),
            "the processor refuses the sub-page permission table: {event:x?}"
        );
        done.sub_page_misses += 1;
        self.vm
            .sppt_miss(&mut self.reader, &self.root, event.gpa)
            .map_err(|error| format!("sub-pages at {}: {error}", event.gpa))?;
        Ok(())
    }
}
