//! A guest with one processor and 256 KiB of memory.

use crate::support::{Arena, code64, flat_data, task_state};
use twofold_cpu::{
    Cpu, Exit, Registers, SecondStageFault, SystemRegisters, TableRegister, VeControl,
};

/// Guest-physical memory: 256 KiB from 0.
const MEMORY: usize = 0x4_0000;

pub(crate) struct Guest {
    pub(crate) cpu: Cpu,
    pub(crate) arena: Arena,
}

impl Guest {
    fn new() -> Self {
        let arena = Arena::new(MEMORY);
        Self {
            cpu: arena.processor(51),
            arena,
        }
    }

    /// Maps a frame of the guest in the second stage, or takes it away.
    pub(crate) fn map(&mut self, frame: u64, present: bool) {
        self.arena.map(frame, present);
    }

    /// Has violations become #VE, described in the page at `gpa`.
    pub(crate) fn enable_ve(&mut self, gpa: u64) {
        let page = self.arena.hpa(gpa >> 12);
        self.cpu.set_ve(Some(VeControl {
            page,
            intercept: false,
        }));
    }

    pub(crate) fn write(&mut self, gpa: usize, bytes: &[u8]) {
        self.arena.write(gpa, bytes);
    }

    pub(crate) fn write_u64(&mut self, gpa: usize, value: u64) {
        self.arena.write_u64(gpa, value);
    }

    pub(crate) fn read_u64(&self, gpa: usize) -> u64 {
        self.arena.read_u64(gpa)
    }

    /// Real mode with all segments at 0.
    pub(crate) fn real(code: &[u8]) -> Self {
        let mut guest = Self::new();
        let mut system = SystemRegisters::reset();
        system.cs.base = 0;
        system.cs.selector = 0;
        guest.cpu.set_system_registers(&system);
        guest.write(0x1000, code);
        guest.set(0x1000, |_| {});
        guest
    }

    /// 64-bit mode at CPL 0 with memory mapped one to one, an IDT at 0x6000 whose handlers are one
    /// HLT each at 0x7000 + vector, a GDT at 0x5000 and a TSS at 0x5800.
    pub(crate) fn long(code: &[u8]) -> Self {
        let mut guest = Self::new();
        guest.write_u64(0x2000, 0x3007);
        guest.write_u64(0x3000, 0x4007);
        // The first 2 MiB by 4 KiB pages at 0x8000.
        guest.write_u64(0x4000, 0x8007);
        for page in 0..512 {
            guest.write_u64(0x8000 + page * 8, (page as u64) << 12 | 7);
        }
        for vector in 0..256usize {
            let handler = 0x7000 + vector as u64;
            let dpl = if vector == 0x80 { 3u64 } else { 0 };
            let low = handler & 0xffff | 8 << 16 | (0x8e00 | dpl << 13) << 32;
            guest.write_u64(0x6000 + vector * 16, low);
            guest.write_u64(0x6008 + vector * 16, 0);
        }
        guest.write(0x7000, &[0xf4; 256]);
        guest.write_u64(0x5008, 0x00af_9b00_0000_ffff);
        guest.write_u64(0x5010, 0x00cf_9300_0000_ffff);
        guest.write_u64(0x5018, 0x00cf_f300_0000_ffff);
        guest.write_u64(0x5020, 0x00af_fb00_0000_ffff);
        guest.write_u64(0x5804, 0x1_f000);
        let data = flat_data(0x10, 0);
        guest.cpu.set_system_registers(&SystemRegisters {
            cs: code64(8, 0),
            ds: data,
            es: data,
            fs: data,
            gs: data,
            ss: data,
            tr: task_state(0, 0x5800),
            gdt: TableRegister {
                base: 0x5000,
                limit: 0x27,
            },
            idt: TableRegister {
                base: 0x6000,
                limit: 0xfff,
            },
            cr0: 0x8005_0033,
            cr3: 0x2000,
            cr4: 0x620,
            efer: 0xd01,
            ..SystemRegisters::reset()
        });
        guest.write(0x1000, code);
        guest.set(0x1000, |registers| registers.gpr[4] = 0x1_0000);
        guest
    }

    /// The same at CPL 3.
    pub(crate) fn user(code: &[u8]) -> Self {
        let mut guest = Self::long(code);
        let mut system = guest.cpu.system_registers();
        system.cs.selector = 0x23;
        system.cs.dpl = 3;
        system.ss.selector = 0x1b;
        system.ss.dpl = 3;
        guest.cpu.set_system_registers(&system);
        guest
    }

    pub(crate) fn set(&mut self, rip: u64, change: impl Fn(&mut Registers)) {
        let mut registers = Registers {
            rip,
            rflags: 2,
            ..Registers::default()
        };
        change(&mut registers);
        self.cpu.set_registers(&registers);
    }

    pub(crate) fn gpr(&self, register: usize) -> u64 {
        self.cpu.registers().gpr[register]
    }
}

/// Runs until the exit is about emulated memory, allowing each page that is asked for.
pub(crate) fn run_with_mmio(guest: &mut Guest) -> Exit {
    loop {
        match guest.cpu.run() {
            Exit::SecondStage(
                SecondStageFault::EptViolation { gpa, .. }
                | SecondStageFault::EptMisconfiguration { gpa },
            ) => guest.cpu.allow_mmio(gpa),
            exit => return exit,
        }
    }
}
