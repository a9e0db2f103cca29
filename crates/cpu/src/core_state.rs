//! What an instruction can touch: registers, segments, flags, pending events and memory.
//!
//! [`Core`] is the processor without its block cache. The two are apart so that a block can be
//! executed while it is borrowed from the cache.

use crate::breakpoints::Breakpoints;
use crate::flags::Flags;
use crate::line::Line;
use crate::machine::Machine;
use crate::memory::Memory;
use crate::mode::Mode;
use crate::state::{
    Counters, CpuidEntry, DebugControl, DebugRegisters, Events, FpuState, Msrs, Segment,
    TableRegister, rflags,
};
use crate::trap::{Exception, Exit, Trap, vector};
use std::sync::Arc;

/// Index of a segment register in [`Core::segment`], in the order of its encoding.
pub(crate) mod seg {
    pub(crate) const ES: u8 = 0;
    pub(crate) const CS: u8 = 1;
    pub(crate) const SS: u8 = 2;
    pub(crate) const DS: u8 = 3;
    pub(crate) const FS: u8 = 4;
    pub(crate) const GS: u8 = 5;
}

/// Slots of [`Core::regs`] beyond the sixteen general registers.
pub(crate) mod slot {
    /// Always zero: the base or index of an address that has none.
    pub(crate) const ZERO: u8 = 16;
    /// Number of slots: a power of two, so that an index is masked instead of checked.
    pub(crate) const COUNT: usize = 32;
}

/// The offsets of a segment that data accesses may use, worked out when the segment is loaded.
/// An access to bytes `first..=last` is allowed when `low <= first` and `last <= high` (and
/// `first <= last`: it does not wrap). An empty window has `low > high`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Window {
    pub(crate) low: u64,
    pub(crate) high: u64,
}

/// An instruction that waits for the hypervisor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Pending {
    /// Nothing waits.
    None,
    /// OUT or OUTS of `count` items: the next run goes on after them.
    Out { count: u32, next: u64 },
    /// IN or INS that has not been answered.
    In { size: u8, count: u32, next: u64 },
    /// IN or INS whose data is in `io_buffer`.
    InReady { size: u8, count: u32, next: u64 },
    /// RDMSR, and the answer once it is there (`None` in it: #GP).
    Rdmsr {
        index: u32,
        answer: Option<Option<u64>>,
    },
    /// WRMSR, and the answer once it is there (`false`: #GP).
    Wrmsr { index: u32, answer: Option<bool> },
    /// VMCALL, and what goes to RAX once that is known.
    Hypercall { answer: Option<u64> },
    /// TDCALL, whose results are in the registers.
    Tdcall,
}

/// Everything that an instruction can touch.
pub(crate) struct Core {
    /// General registers in the order of their encoding, then [`slot::ZERO`].
    pub(crate) regs: [u64; slot::COUNT],
    /// The instruction pointer. Only valid between blocks and after a trap: inside a block each
    /// operation carries its own.
    pub(crate) rip: u64,
    /// RFLAGS.
    pub(crate) flags: Flags,
    /// Set by whatever needs the block to end after the current instruction.
    pub(crate) stop: bool,
    /// What decoding depends on.
    pub(crate) mode: Mode,
    /// Raised whenever a block's bytes or the translation of its address may have changed: blocks
    /// validated in an older epoch are compared with memory before they run.
    pub(crate) epoch: u64,
    /// Mode and base of CS as blocks are keyed by them.
    pub(crate) context: u64,
    /// Something may have to be done at the next block boundary.
    pub(crate) attention: bool,
    /// The count of stores into code at which this epoch began.
    pub(crate) code_generation: u64,
    /// The next instruction completes what the hypervisor answered.
    pub(crate) completing: bool,
    /// The current block is one instruction, after which there is something to settle.
    pub(crate) alone: bool,
    /// [`Mode::SINGLE`] is wanted for the next instruction only.
    pub(crate) single_once: bool,
    /// The current instruction is the one that an interrupt shadow protects.
    pub(crate) shadow_running: bool,
    /// RFLAGS.TF was set when the current instruction began.
    pub(crate) step_trap: bool,
    /// RFLAGS.RF was set when the current instruction began: it is cleared once that completes.
    pub(crate) resume_running: bool,
    /// RIP is at a repeated string instruction that has done some of its iterations.
    pub(crate) iterating: bool,
    /// Data accesses are made with user rights (CPL is 3).
    pub(crate) user: bool,
    /// Base of each segment as data accesses use it; the entries beyond GS are zero, so that
    /// index 7 is "none". In 64-bit mode all but FS and GS are zero here.
    pub(crate) seg_base: [u64; 8],
    /// Offsets that may be read, by segment.
    pub(crate) readable: [Window; 8],
    /// Offsets that may be written, by segment.
    pub(crate) writable: [Window; 8],
    /// x87 and vector registers. While `float` is live, MXCSR is in the host's register.
    pub(crate) vectors: FpuState,
    /// Where the guest's MXCSR is at the moment.
    pub(crate) float: crate::simd::FloatUnit,
    /// Guest memory: translation caches, second stage, MMIO in progress.
    pub(crate) mem: Memory,

    /// Current privilege level.
    pub(crate) cpl: u8,
    /// Segment registers in the order of [`seg`].
    pub(crate) segment: [Segment; 6],
    /// Task register.
    pub(crate) tr: Segment,
    /// Local descriptor table.
    pub(crate) ldt: Segment,
    /// Global descriptor table.
    pub(crate) gdt: TableRegister,
    /// Interrupt descriptor table.
    pub(crate) idt: TableRegister,
    /// CR0.
    pub(crate) cr0: u64,
    /// CR2.
    pub(crate) cr2: u64,
    /// CR3.
    pub(crate) cr3: u64,
    /// CR4.
    pub(crate) cr4: u64,
    /// CR8.
    pub(crate) cr8: u64,
    /// Lowering CR8 leaves with [`Exit::TaskPriority`].
    pub(crate) cr8_leaves: bool,
    /// IA32_EFER.
    pub(crate) efer: u64,
    /// DR0 to DR7.
    pub(crate) debug: DebugRegisters,
    /// MSRs that instructions use.
    pub(crate) msrs: Msrs,
    /// RDMSR and WRMSR of the registers in `msrs` are the hypervisor's too.
    pub(crate) msrs_leave: bool,
    /// The processor runs a TD.
    pub(crate) td: bool,
    /// An event is being delivered.
    pub(crate) delivering: bool,
    /// Events that wait.
    pub(crate) events: Events,
    /// The hypervisor wants to know when an interrupt can be delivered.
    pub(crate) window_requested: bool,
    /// CR8 has to be below this for the window to count as open; 16 if it does not matter.
    pub(crate) window_limit: u64,
    /// The breakpoints that the debug registers arm.
    pub(crate) breakpoints: Breakpoints,
    /// What the hypervisor wants to see of debug events.
    pub(crate) debug_control: DebugControl,
    /// The instruction that waits for the hypervisor, and the RIP at which it does.
    pub(crate) pending: Pending,
    /// RIP of `pending`.
    pub(crate) pending_rip: u64,
    /// The pending I/O instruction is INS or OUTS.
    pub(crate) io_string: bool,
    /// Data of port I/O.
    pub(crate) io_buffer: Vec<u8>,
    /// CPUID table.
    pub(crate) cpuid: Vec<CpuidEntry>,
    /// MAXPHYADDR as the guest sees it.
    pub(crate) physical_bits: u8,
    /// Bits of CR4 that the guest may set.
    pub(crate) cr4_allowed: u64,
    /// Bits of XCR0 that the guest may set.
    pub(crate) xcr0_allowed: u64,
    /// Details of [`Trap::Exception`].
    pub(crate) fault: Exception,
    /// Details of [`Trap::Exit`].
    pub(crate) exit: Exit,
    /// Length of the instruction that left, 0 while an event was being delivered; `None` before
    /// that is known.
    pub(crate) exit_length: Option<u8>,
    /// What has been done so far.
    pub(crate) counters: Counters,
    /// The line over which other threads reach this processor.
    pub(crate) line: Arc<Line>,
    /// What all processors of a virtual machine share.
    pub(crate) machine: Arc<Machine>,
}

impl Core {
    /// Records an exception and gives the token for it.
    #[cold]
    pub(crate) fn raise(&mut self, exception: Exception) -> Trap {
        self.fault = exception;
        Trap::Exception
    }

    /// #GP with an error code.
    #[cold]
    pub(crate) fn general_protection(&mut self, error_code: u32) -> Trap {
        self.raise(Exception {
            vector: vector::GP,
            error_code: Some(error_code),
            payload: None,
        })
    }

    /// #AC.
    #[cold]
    pub(crate) fn alignment_check(&mut self) -> Trap {
        self.raise(Exception {
            vector: vector::AC,
            error_code: Some(0),
            payload: None,
        })
    }

    /// #UD.
    #[cold]
    pub(crate) fn invalid_opcode(&mut self) -> Trap {
        self.raise(Exception {
            vector: vector::UD,
            error_code: None,
            payload: None,
        })
    }

    /// #NM.
    #[cold]
    pub(crate) fn device_not_available(&mut self) -> Trap {
        self.raise(Exception {
            vector: vector::NM,
            error_code: None,
            payload: None,
        })
    }

    /// Records why the hypervisor has to act and gives the token for it.
    #[cold]
    pub(crate) fn leave(&mut self, exit: Exit) -> Trap {
        self.exit = exit;
        Trap::Exit
    }
}

impl Core {
    /// Works out base and windows of one segment for data accesses.
    pub(crate) fn update_segment(&mut self, i: usize) {
        const EMPTY: Window = Window { low: 1, high: 0 };
        const ALL: Window = Window {
            low: 0,
            high: u64::MAX,
        };
        let segment = &self.segment[i];
        if self.mode.has(Mode::CODE64) {
            let has_base = i == usize::from(seg::FS) || i == usize::from(seg::GS);
            self.seg_base[i] = if has_base { segment.base } else { 0 };
            self.readable[i] = ALL;
            self.writable[i] = ALL;
            return;
        }
        self.seg_base[i] = segment.base;
        let limit = u64::from(segment.limit);
        let code = segment.kind & 8 != 0;
        let window = if !code && segment.kind & 4 != 0 {
            let high = if segment.big {
                u64::from(u32::MAX)
            } else {
                0xffff
            };
            Window {
                low: limit + 1,
                high,
            }
        } else {
            Window {
                low: 0,
                high: limit,
            }
        };
        if !self.mode.has(Mode::PROTECTED) {
            self.readable[i] = window;
            self.writable[i] = window;
            return;
        }
        let usable = segment.present && segment.code_or_data && !segment.unusable;
        let readable = usable && (!code || segment.kind & 2 != 0);
        let writable = usable && !code && segment.kind & 2 != 0;
        self.readable[i] = if readable { window } else { EMPTY };
        self.writable[i] = if writable { window } else { EMPTY };
    }

    /// Whether an external interrupt could be delivered now.
    pub(crate) fn interrupt_window_open(&self) -> bool {
        let events = &self.events;
        self.flags.system() & rflags::IF != 0
            && !events.sti_shadow
            && !events.mov_ss_shadow
            && events.interrupt.is_none()
            && events.exception.is_none()
            && !events.nmi_injected
    }
}
