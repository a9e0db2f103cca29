//! A guest with one processor and 256 KiB of memory.
#![allow(unsafe_code)]
// UNSAFETY: builds a guest's memory.

use std::sync::Arc;
use twofold_arch::ept::Eptp;
use twofold_arch::{Hpa, Level};
use twofold_cpu::{
    Cpu, Exit, Machine, MachineConfig, Registers, SecondStage, SecondStageFault, Segment,
    SystemRegisters, TableRegister,
};

/// Guest-physical memory: 256 KiB from 0.
const MEMORY: usize = 0x4_0000;
const TABLES: usize = 0x4000;
const HPA: u64 = 0x55_0000_0000;

pub(crate) struct Guest {
    pub(crate) cpu: Cpu,
    arena: *mut u8,
}

impl Drop for Guest {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`; the processor is not running.
        unsafe { libc::munmap(self.arena.cast(), TABLES + MEMORY) };
    }
}

impl Guest {
    fn new() -> Self {
        // SAFETY: the kernel chooses the address.
        let arena = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                TABLES + MEMORY,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(arena, libc::MAP_FAILED);
        let machine = Machine::new(MachineConfig {
            hpa_offset: (arena as usize).wrapping_sub(HPA as usize),
            ..MachineConfig::default()
        });
        let mut cpu = Cpu::new(Arc::clone(&machine), 0);
        let pointer = Eptp::new(Hpa::new(HPA), Level::L512G, true);
        let mut guest = {
            cpu.set_second_stage(SecondStage::Ept(pointer));
            Self {
                cpu,
                arena: arena.cast(),
            }
        };
        for level in 0..3u64 {
            guest.put_table(level as usize * 0x1000, (HPA + (level + 1) * 0x1000) | 7);
        }
        for page in 0..MEMORY / 0x1000 {
            guest.map(page as u64, true);
        }
        guest
    }

    fn put_table(&mut self, offset: usize, value: u64) {
        // SAFETY: within the arena.
        unsafe { self.arena.add(offset).cast::<u64>().write(value) }
    }

    /// Maps a frame of the guest in the second stage, or takes it away.
    pub(crate) fn map(&mut self, frame: u64, present: bool) {
        let hpa = HPA + TABLES as u64 + frame * 0x1000;
        self.put_table(
            0x3000 + frame as usize * 8,
            if present { hpa | 7 | 6 << 3 } else { 0 },
        );
    }

    pub(crate) fn write(&mut self, gpa: usize, bytes: &[u8]) {
        assert!(gpa + bytes.len() <= MEMORY);
        // SAFETY: within the arena.
        unsafe {
            std::ptr::copy_nonoverlapping(
                bytes.as_ptr(),
                self.arena.add(TABLES + gpa),
                bytes.len(),
            );
        }
    }

    pub(crate) fn write_u64(&mut self, gpa: usize, value: u64) {
        self.write(gpa, &value.to_le_bytes());
    }

    pub(crate) fn read_u64(&self, gpa: usize) -> u64 {
        assert!(gpa + 8 <= MEMORY);
        // SAFETY: within the arena.
        unsafe { self.arena.add(TABLES + gpa).cast::<u64>().read_unaligned() }
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
        let data = Segment {
            selector: 0x10,
            limit: u32::MAX,
            kind: 3,
            code_or_data: true,
            present: true,
            granular: true,
            ..Segment::default()
        };
        guest.cpu.set_system_registers(&SystemRegisters {
            cs: Segment {
                selector: 8,
                kind: 11,
                long: true,
                ..data
            },
            ds: data,
            es: data,
            fs: data,
            gs: data,
            ss: data,
            tr: Segment {
                base: 0x5800,
                limit: 0x67,
                kind: 11,
                present: true,
                ..Segment::default()
            },
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
