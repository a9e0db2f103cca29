//! The walks of `twofold-cpu`.

// UNSAFETY: owns the memory that the processor takes for physical memory.
#![expect(unsafe_code)]

use std::io;
use std::ptr;
use std::sync::Arc;
use twofold_arch::ept::Eptp;
use twofold_arch::sppt::SppQualification;
use twofold_arch::{Hpa, Level};
use twofold_cpu::state::gpr;
use twofold_cpu::{
    Cpu, Exit, Machine, MachineConfig, Registers, SecondStage, SecondStageFault, SecondStageKind,
    Segment, SystemRegisters, VeControl, reason,
};
use twofold_walks::{
    Case, End, GPA, Kind, Operation, PHYSICAL_ADDRESS_BITS, SUB_PAGE_TABLES, TABLES, TARGET,
    TARGET_VALUE, WRITTEN_VALUE, Walked,
};

/// Physical memory: as much as the tables and the guest need.
const MEMORY: u64 = 0x0200_0000;
const SIZE: usize = 0x0200_0000;

/// The guest's own memory: code, page tables, stack.
const CODE: u64 = 0;
const READ: u64 = CODE;
const WRITE: u64 = CODE + 0x10;
const FETCH: u64 = CODE + 0x20;
const STACK_TOP: u64 = 0x2000;
const GUEST_TABLES: u64 = 0x2000;

/// The information page of #VE.
const INFORMATION: Hpa = Hpa::new(0x0311_0000);

/// A processor with the guest's own memory in place.
pub(crate) struct Processor {
    kind: Kind,
    cpu: Cpu,
    memory: *mut u8,
}

impl Drop for Processor {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`; the processor is not running.
        unsafe { libc::munmap(self.memory.cast(), SIZE) };
    }
}

impl Processor {
    /// A processor that walks tables of this kind.
    pub(crate) fn new(kind: Kind) -> io::Result<Self> {
        // SAFETY: the kernel chooses the address.
        let memory = unsafe {
            libc::mmap(
                ptr::null_mut(),
                SIZE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if memory == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let machine = Machine::new(MachineConfig {
            second_stage: match kind {
                Kind::Npt => SecondStageKind::Npt,
                _ => SecondStageKind::Ept,
            },
            maxphyaddr: PHYSICAL_ADDRESS_BITS,
            hpa_offset: (memory as usize).wrapping_sub(MEMORY as usize),
        });
        let mut cpu = Cpu::new(Arc::clone(&machine), 0);
        let second_stage = match kind {
            Kind::Npt => SecondStage::Npt {
                root: TABLES,
                level: Level::L512G,
            },
            _ => SecondStage::Ept(Eptp::new(
                TABLES,
                Level::L512G,
                kind != Kind::EptWithoutFlags,
            )),
        };
        cpu.set_second_stage(second_stage);
        if kind == Kind::EptWithSubPages {
            cpu.set_sppt(Some(SUB_PAGE_TABLES))
                .map_err(io::Error::other)?;
        }
        if kind == Kind::EptWithExceptions {
            cpu.set_ve(Some(VeControl {
                page: INFORMATION,
                intercept: true,
            }));
        }
        let mut new = Self {
            kind,
            cpu,
            memory: memory.cast(),
        };
        for (place, value) in kind.own_words(Hpa::new(MEMORY)) {
            new.store(place, value);
        }
        new.put_guest();
        Ok(new)
    }

    fn word(&self, hpa: Hpa) -> *mut u64 {
        let offset = (hpa.get() - MEMORY) as usize;
        assert!(offset + 8 <= SIZE, "{hpa} is outside the memory");
        self.memory.wrapping_add(offset).cast()
    }

    fn load(&self, hpa: Hpa) -> u64 {
        // SAFETY: inside the mapping; the processor is not running.
        unsafe { self.word(hpa).read_unaligned() }
    }

    fn store(&mut self, hpa: Hpa, value: u64) {
        // SAFETY: as for `load`.
        unsafe { self.word(hpa).write_unaligned(value) }
    }

    /// 64-bit code at guest-physical 0 in linear addresses that are guest-physical ones, up to 1 TiB.
    fn put_guest(&mut self) {
        let at = |gpa: u64| Hpa::new(MEMORY + gpa);
        // mov rbx, [rdi]; hlt
        self.store(at(READ), 0xf41f_8b48);
        // mov [rdi], rsi; hlt
        self.store(at(WRITE), 0xf437_8948);
        // call rdi; hlt
        self.store(at(FETCH), 0x00f4_d7ff);
        // Present, writable, user, accessed, dirty.
        for half in 0..2 {
            let table = GUEST_TABLES + 0x1000 * (half + 1);
            self.store(at(GUEST_TABLES + 8 * half), table | 0x27);
            for number in 0..512 {
                let page = (512 * half + number) << 30;
                self.store(at(table + 8 * number), page | 0xe7);
            }
        }
        let data = Segment {
            selector: 0x10,
            limit: u32::MAX,
            kind: 3,
            code_or_data: true,
            present: true,
            big: true,
            granular: true,
            ..Segment::default()
        };
        let system = SystemRegisters {
            cs: Segment {
                selector: 8,
                kind: 11,
                long: true,
                big: false,
                ..data
            },
            ds: data,
            es: data,
            fs: data,
            gs: data,
            ss: data,
            cr0: 0x8001_0033,
            cr3: GUEST_TABLES,
            cr4: 0x6a0,
            efer: 0xd00,
            ..SystemRegisters::reset()
        };
        self.cpu.set_system_registers(&system);
    }

    /// What the processor has written about a #VE. It may write there again afterwards.
    fn take_exception(&mut self) -> (End, u64) {
        let [first, qualification, linear, gpa] =
            [0, 8, 16, 24].map(|offset| self.load(Hpa::new(INFORMATION.get() + offset)));
        self.store(INFORMATION, 0);
        match first as u32 == reason::EPT_VIOLATION && linear == GPA.get() {
            true => (End::Exception(qualification), gpa),
            false => (End::Strange(first), 0),
        }
    }

    /// Walks.
    pub(crate) fn walk(&mut self, number: u64, case: Case) -> Walked {
        for (place, entry) in case.words() {
            self.store(place, entry);
        }
        self.store(TARGET, TARGET_VALUE);
        // The tables and the code have changed.
        self.cpu.machine().flush_tlbs();
        let mut registers = Registers {
            rip: match case.operation {
                Operation::Read => READ,
                Operation::Write => WRITE,
                Operation::Fetch => FETCH,
            },
            rflags: 2,
            ..Registers::default()
        };
        registers.gpr[gpr::RDI] = GPA.get();
        registers.gpr[gpr::RSI] = WRITTEN_VALUE;
        registers.gpr[gpr::RSP] = STACK_TOP;
        self.cpu.set_registers(&registers);
        let (end, gpa) = match self.cpu.run() {
            Exit::Halt if case.operation == Operation::Read => {
                let read = self.cpu.registers().gpr[gpr::RBX];
                (End::Done(read), 0)
            }
            Exit::Halt => (End::Done(self.load(TARGET)), 0),
            Exit::VirtualizationException(_) => self.take_exception(),
            Exit::SecondStage(SecondStageFault::EptViolation {
                gpa, qualification, ..
            }) => (End::Violation(qualification), gpa.get()),
            Exit::SecondStage(SecondStageFault::EptMisconfiguration { gpa }) => {
                (End::Misconfiguration, gpa.get())
            }
            Exit::SecondStage(SecondStageFault::SpptMiss { gpa, .. }) => {
                (End::SubPages(SppQualification::MISS.bits()), gpa.get())
            }
            Exit::SecondStage(SecondStageFault::SpptMisconfiguration { gpa, .. }) => {
                (End::SubPages(0), gpa.get())
            }
            Exit::SecondStage(SecondStageFault::NestedPageFault { gpa, error }) => {
                (End::NestedFault(error), gpa.get())
            }
            other => {
                eprintln!("walk {number}: {other:x?}");
                (End::Strange(0), 0)
            }
        };
        Walked {
            kind: self.kind,
            number,
            end,
            gpa,
            entries: twofold_walks::places().map(|place| self.load(place)),
        }
    }
}
