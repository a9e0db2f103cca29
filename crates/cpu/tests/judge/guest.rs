//! The accused: one instruction on Twofold's processor, in a guest that looks to it as the host's
//! process looks to the same instruction.
//!
//! The guest runs user code in flat segments. Its kernel is an interrupt table whose gates lead to
//! one HLT each; what was pushed on the kernel's stack tells how the instruction ended. The
//! host-physical addresses in the tables are not the process's own, so that nothing comes to
//! depend on their being the same.

use crate::state::{
    CODE, CODE_BYTES, Case, DATA, DATA_BYTES, GS_BASE, Outcome, Registers, has_error_code,
};
use crate::support::{Arena, code64, flat_data, task_state};
use twofold_cpu::{
    Cpu, Exit, FpuState, Registers as CpuRegisters, Segment, SystemRegisters, TableRegister,
};

/// Bytes of guest-physical memory.
const MEMORY: usize = 1 << 20;

const KERNEL: u64 = 0xffff_8000_0000_0000;
/// Handlers are one byte each.
const HANDLERS: u64 = KERNEL + 0x800;
const TSS: u64 = KERNEL + 0x400;
const KERNEL_STACK: u64 = KERNEL + 0x2000;

const KERNEL_GPA: u64 = 0x1_0000;
const CODE_GPA: u64 = 0x2_0000;
const DATA_GPA: u64 = 0x3_0000;
const PAGE_TABLES_GPA: u64 = 0x4_0000;

const KERNEL_CODE: u16 = 0x10;
const USER_CODE32: u16 = 0x23;
const USER_DATA: u16 = 0x2b;
const USER_CODE64: u16 = 0x33;

/// A guest with one processor.
pub struct Guest {
    cpu: Cpu,
    arena: Arena,
    system: SystemRegisters,
    next_table: u64,
}

impl Guest {
    /// Builds memory, tables and a processor.
    pub fn new() -> Self {
        let arena = Arena::new(MEMORY);
        let mut guest = Self {
            cpu: arena.processor(46),
            arena,
            system: SystemRegisters::default(),
            next_table: PAGE_TABLES_GPA,
        };
        guest.build_kernel();
        // x87, SSE and AVX state are enabled.
        let mut msrs = guest.cpu.msrs();
        msrs.xcr0 = guest.cpu.xcr0_allowed() & 7;
        guest.cpu.set_msrs(&msrs);
        guest
    }

    /// Maps one page of the guest.
    fn map(&mut self, linear: u64, gpa: u64, flags: u64) {
        let mut table = PAGE_TABLES_GPA;
        for level in (1..4).rev() {
            let place = table as usize + (linear >> (12 + 9 * level) & 511) as usize * 8;
            let mut entry = self.arena.read_u64(place);
            if entry == 0 {
                self.next_table += 0x1000;
                entry = self.next_table | 7;
                self.arena.write_u64(place, entry);
            }
            table = entry & !0xfff;
        }
        let place = table as usize + (linear >> 12 & 511) as usize * 8;
        self.arena.write_u64(place, gpa | flags);
    }

    fn build_kernel(&mut self) {
        const SUPERVISOR: u64 = 3;
        const USER: u64 = 7;
        const NO_EXECUTE: u64 = 1 << 63;
        for page in (0..CODE_BYTES as u64).step_by(0x1000) {
            self.map(CODE + page, CODE_GPA + page, USER);
        }
        for page in (0..DATA_BYTES as u64).step_by(0x1000) {
            self.map(DATA + page, DATA_GPA + page, USER | NO_EXECUTE);
        }
        self.map(KERNEL, KERNEL_GPA, SUPERVISOR);
        self.map(
            KERNEL + 0x1000,
            KERNEL_GPA + 0x1000,
            SUPERVISOR | NO_EXECUTE,
        );

        let kernel = KERNEL_GPA as usize;
        // The interrupt table: a 64-bit interrupt gate for every exception; user code may use
        // that of INT3.
        for vector in 0..32u64 {
            let handler = HANDLERS + vector;
            let dpl = if vector == 3 { 3 } else { 0 };
            let low = handler & 0xffff
                | u64::from(KERNEL_CODE) << 16
                | (0x8e00 | dpl << 13) << 32
                | (handler >> 16 & 0xffff) << 48;
            self.arena.write_u64(kernel + vector as usize * 16, low);
            self.arena
                .write_u64(kernel + vector as usize * 16 + 8, handler >> 32);
        }
        self.arena.memory(KERNEL_GPA + 0x800, 32).fill(0xf4);
        let gdt = kernel + 0x300;
        self.arena.write_u64(gdt + 0x10, 0x00af_9b00_0000_ffff);
        self.arena.write_u64(gdt + 0x18, 0x00cf_9300_0000_ffff);
        self.arena.write_u64(gdt + 0x20, 0x00cf_fb00_0000_ffff);
        self.arena.write_u64(gdt + 0x28, 0x00cf_f300_0000_ffff);
        self.arena.write_u64(gdt + 0x30, 0x00af_fb00_0000_ffff);
        let tss = kernel + 0x400;
        self.arena.write_u64(tss + 4, KERNEL_STACK);
        // No I/O permission bitmap: it would begin behind the end of the segment.
        self.arena.write_u64(tss + 0x60, 0x68 << 48);

        let data = flat_data(USER_DATA, 3);
        self.system = SystemRegisters {
            cs: code64(USER_CODE64, 3),
            ds: data,
            es: data,
            ss: data,
            fs: Segment {
                selector: 0,
                ..data
            },
            gs: Segment {
                selector: 0,
                base: GS_BASE,
                ..data
            },
            tr: task_state(0x40, TSS),
            ldt: Segment {
                unusable: true,
                ..Segment::default()
            },
            gdt: TableRegister {
                base: KERNEL + 0x300,
                limit: 0x37,
            },
            idt: TableRegister {
                base: KERNEL,
                limit: 0x1ff,
            },
            // PE, MP, ET, NE, WP, AM, PG.
            cr0: 0x8005_0033,
            cr2: 0,
            cr3: PAGE_TABLES_GPA,
            // PAE, OSFXSR, OSXMMEXCPT, FSGSBASE, OSXSAVE.
            cr4: 0x5_0620,
            cr8: 0,
            // SCE, LME, LMA, NXE.
            efer: 0xd01,
        };
    }

    /// The data pages.
    pub fn data(&mut self) -> &mut [u8] {
        self.arena.memory(DATA_GPA, DATA_BYTES)
    }

    /// The code pages.
    pub fn code(&mut self) -> &mut [u8] {
        self.arena.memory(CODE_GPA, CODE_BYTES)
    }

    /// Executes the instruction at the case's RIP, whose bytes are in place.
    ///
    /// # Errors
    /// The processor left in a way that has no counterpart on the host.
    pub fn run(&mut self, case: &Case) -> Result<Outcome, String> {
        let mut system = self.system;
        if case.bitness == 32 {
            system.cs.selector = USER_CODE32;
            system.cs.long = false;
            system.cs.big = true;
            // As in the host's process: null selectors.
            let null = Segment {
                unusable: true,
                ..Segment::default()
            };
            system.fs = null;
            system.gs = null;
        }
        self.cpu.set_system_registers(&system);
        let before = &case.registers;
        self.cpu.set_registers(&CpuRegisters {
            gpr: before.gpr,
            rip: before.rip,
            rflags: before.rflags | 0x202,
        });
        self.cpu.set_fpu(&FpuState {
            fcw: before.fcw,
            fsw: before.fsw,
            ftw: before.ftw,
            fop: before.fop,
            fip: before.fip,
            fdp: before.fdp,
            st: before.st,
            mxcsr: before.mxcsr,
            xmm: before.xmm,
            ymm_high: before.ymm_high,
        });
        match self.cpu.run() {
            Exit::Halt => {}
            exit => return Err(format!("left with {exit:?}")),
        }
        let after = self.cpu.registers();
        let fpu = self.cpu.fpu();
        let vector = after.rip.wrapping_sub(HANDLERS).wrapping_sub(1);
        if vector >= 32 {
            return Err(format!("halted at {:#x}", after.rip));
        }
        let vector = vector as u8;
        let top = (KERNEL_GPA + KERNEL_STACK - KERNEL) as usize;
        let mut gpr = after.gpr;
        gpr[crate::state::RSP] = self.arena.read_u64(top - 16);
        let error = has_error_code(vector).then(|| self.arena.read_u64(top - 48) as u32);
        Ok(Outcome {
            registers: Registers {
                gpr,
                rip: self.arena.read_u64(top - 40),
                rflags: self.arena.read_u64(top - 24),
                xmm: fpu.xmm,
                ymm_high: fpu.ymm_high,
                mxcsr: fpu.mxcsr,
                st: fpu.st,
                fcw: fpu.fcw,
                fsw: fpu.fsw,
                ftw: fpu.ftw,
                fop: fpu.fop,
                fip: fpu.fip,
                fdp: fpu.fdp,
            },
            vector,
            error: error.unwrap_or(0),
            address: if vector == 14 {
                self.cpu.system_registers().cr2
            } else {
                0
            },
        })
    }
}
