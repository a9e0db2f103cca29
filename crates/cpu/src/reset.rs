//! The state after reset (SDM Vol. 3, "Processor State After Reset").

use crate::breakpoints::Breakpoints;
use crate::core_state::{Core, Pending, Window, slot};
use crate::cpu::IO_BATCH_BYTES;
use crate::flags::Flags;
use crate::machine::Machine;
use crate::memory::Memory;
use crate::mode::Mode;
use crate::state::{
    Counters, DebugControl, DebugRegisters, Events, FpuState, Msrs, Segment, SystemRegisters,
    TableRegister,
};
use crate::trap::{Exception, Exit};
use std::sync::Arc;

impl Core {
    /// A processor of `machine`, attached to it, before its [segments and control
    /// registers](SystemRegisters::reset) are there.
    pub(crate) fn after_reset(machine: Arc<Machine>, index: u32) -> Self {
        let line = machine.attach(index);
        let mem = Memory::new(&machine);
        let mut regs = [0; slot::COUNT];
        // EDX holds the processor's signature after reset (SDM Vol. 3, "Processor State After
        // Reset").
        regs[crate::state::gpr::RDX] = 0x600;
        Self {
            regs,
            rip: 0xfff0,
            flags: Flags::from_image(2),
            stop: false,
            mode: Mode::default(),
            epoch: 1,
            context: 0,
            attention: true,
            code_generation: 0,
            completing: false,
            alone: false,
            single_once: false,
            shadow_running: false,
            step_trap: false,
            resume_running: false,
            iterating: false,
            user: false,
            seg_base: [0; 8],
            readable: [Window {
                low: 0,
                high: 0xffff,
            }; 8],
            writable: [Window {
                low: 0,
                high: 0xffff,
            }; 8],
            vectors: FpuState {
                fcw: 0x40,
                ..FpuState::default()
            },
            float: crate::simd::FloatUnit::default(),
            mem,
            cpl: 0,
            segment: [Segment::default(); 6],
            tr: Segment::default(),
            ldt: Segment::default(),
            gdt: TableRegister {
                base: 0,
                limit: 0xffff,
            },
            idt: TableRegister {
                base: 0,
                limit: 0xffff,
            },
            cr0: 0x6000_0010,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            cr8: 0,
            cr8_leaves: false,
            efer: 0,
            debug: DebugRegisters::default(),
            msrs: Msrs::default(),
            msrs_leave: false,
            td: false,
            delivering: false,
            events: Events::default(),
            window_requested: false,
            window_limit: 16,
            breakpoints: Breakpoints::default(),
            debug_control: DebugControl::default(),
            pending: Pending::None,
            pending_rip: 0,
            io_string: false,
            io_buffer: Vec::with_capacity(IO_BATCH_BYTES),
            cpuid: Vec::new(),
            physical_bits: machine.config().maxphyaddr,
            cr4_allowed: crate::control_registers::CR4_BITS,
            xcr0_allowed: crate::xsave::components(),
            fault: Exception {
                vector: 0,
                error_code: None,
                payload: None,
            },
            exit: Exit::Kicked,
            exit_length: None,
            counters: Counters::default(),
            line,
            machine,
        }
    }
}

impl SystemRegisters {
    /// The values after reset.
    pub fn reset() -> Self {
        let data = Segment {
            selector: 0,
            base: 0,
            limit: 0xffff,
            kind: 3,
            code_or_data: true,
            present: true,
            ..Segment::default()
        };
        Self {
            cs: Segment {
                selector: 0xf000,
                base: 0xffff_0000,
                kind: 11,
                ..data
            },
            ds: data,
            es: data,
            fs: data,
            gs: data,
            ss: data,
            tr: Segment {
                limit: 0xffff,
                kind: 11,
                present: true,
                ..Segment::default()
            },
            ldt: Segment {
                limit: 0xffff,
                kind: 2,
                present: true,
                ..Segment::default()
            },
            gdt: TableRegister {
                base: 0,
                limit: 0xffff,
            },
            idt: TableRegister {
                base: 0,
                limit: 0xffff,
            },
            cr0: 0x6000_0010,
            ..Self::default()
        }
    }
}
