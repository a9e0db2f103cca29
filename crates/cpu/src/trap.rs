//! Why an instruction, or a whole run, ended early.
//!
//! [`Trap`] is what the parts of the processor hand to each other: one byte, so that
//! `Result<u64, Trap>` travels in two registers. Its details are left in the processor.
//! [`Exit`] is what the hypervisor sees when [`Cpu::run`](crate::Cpu::run) returns.

use crate::memory::VeInfo;
use std::fmt;
use twofold_arch::Gpa;

/// A token that says that the current instruction cannot complete. The details are in
/// [`Core::fault`](crate::core_state::Core) or [`Core::exit`](crate::core_state::Core), put there
/// by [`Core::raise`](crate::core_state::Core::raise) and
/// [`Core::leave`](crate::core_state::Core::leave).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum Trap {
    /// An exception is to be delivered to the guest.
    Exception,
    /// The hypervisor has to act.
    Exit,
    /// The instruction has done part of its work and is to be executed again from where its
    /// registers say: a repeated string instruction between two iterations.
    Again,
}

/// An exception that an instruction raised, or that the hypervisor queued.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Exception {
    /// The vector, 0 to 31 (SDM Vol. 3, "Exception and interrupt reference").
    pub vector: u8,
    /// The error code, for the vectors that push one.
    pub error_code: Option<u32>,
    /// The address that goes into CR2 (page faults) or DR6's bits (debug exceptions).
    pub payload: Option<u64>,
}

/// Vectors of exceptions.
pub mod vector {
    /// #DE, divide error.
    pub const DE: u8 = 0;
    /// #DB, debug.
    pub const DB: u8 = 1;
    /// Non-maskable interrupt.
    pub const NMI: u8 = 2;
    /// #BP, breakpoint.
    pub const BP: u8 = 3;
    /// #OF, overflow.
    pub const OF: u8 = 4;
    /// #BR, bound range.
    pub const BR: u8 = 5;
    /// #UD, invalid opcode.
    pub const UD: u8 = 6;
    /// #NM, device not available.
    pub const NM: u8 = 7;
    /// #DF, double fault.
    pub const DF: u8 = 8;
    /// #TS, invalid TSS.
    pub const TS: u8 = 10;
    /// #NP, segment not present.
    pub const NP: u8 = 11;
    /// #SS, stack fault.
    pub const SS: u8 = 12;
    /// #GP, general protection.
    pub const GP: u8 = 13;
    /// #PF, page fault.
    pub const PF: u8 = 14;
    /// #MF, x87 floating-point error.
    pub const MF: u8 = 16;
    /// #AC, alignment check.
    pub const AC: u8 = 17;
    /// #MC, machine check.
    pub const MC: u8 = 18;
    /// #XM, SIMD floating-point error.
    pub const XM: u8 = 19;
    /// #VE, virtualization exception.
    pub const VE: u8 = 20;
    /// #CP, control protection.
    pub const CP: u8 = 21;
}

/// Why [`Cpu::run`](crate::Cpu::run) returned.
///
/// Unless a variant says otherwise the state of the processor is as before the instruction.
#[derive(Clone, Copy, PartialEq, Debug)]
#[non_exhaustive]
pub enum Exit {
    /// Somebody asked for the processor's attention through its [`Line`](crate::Line). State is
    /// at an instruction boundary (or between two iterations of a repeated string instruction).
    Kicked,
    /// Port I/O. The instruction is completed by the next run. Data that goes out, and the place
    /// for data that comes in, is [`Cpu::io_data`](crate::Cpu::io_data).
    Io {
        /// Port number.
        port: u16,
        /// Bytes per item: 1, 2 or 4.
        size: u8,
        /// Whether data goes out.
        write: bool,
        /// Number of items: 1 unless a string instruction batches more.
        count: u32,
    },
    /// A read of memory that the hypervisor emulates. It answers with
    /// [`Cpu::complete_mmio_read`](crate::Cpu::complete_mmio_read) and runs again.
    MmioRead {
        /// First byte.
        gpa: Gpa,
        /// Bytes, 1 to 8; never across a page.
        len: u8,
    },
    /// A write to memory that the hypervisor emulates. State is as after the instruction.
    MmioWrite {
        /// First byte.
        gpa: Gpa,
        /// Bytes, 1 to 8; never across a page.
        len: u8,
        /// The first `len` bytes are valid.
        data: [u8; 8],
    },
    /// The second-stage tables do not translate an access. After the hypervisor has changed them,
    /// the instruction runs again.
    SecondStage(SecondStageFault),
    /// The page-modification log has no room for an EPT dirty flag that has to be set. Nothing was
    /// accessed and no flag set. After [`Cpu::set_pml`](crate::Cpu::set_pml) the instruction runs
    /// again.
    PmlFull,
    /// HLT. State is after the instruction.
    Halt,
    /// The guest has lowered CR8, and the hypervisor wants to know
    /// ([`Cpu::set_cr8_exits`](crate::Cpu::set_cr8_exits)). State is after the instruction.
    TaskPriority,
    /// VMCALL or VMMCALL. State is before the instruction; the hypervisor advances RIP with
    /// [`Cpu::complete_hypercall`](crate::Cpu::complete_hypercall).
    Hypercall {
        /// The instruction was Intel's VMCALL, not AMD's VMMCALL.
        vmcall: bool,
    },
    /// RDMSR of a register that the processor itself does not hold. Answer with
    /// [`Cpu::complete_rdmsr`](crate::Cpu::complete_rdmsr).
    Rdmsr {
        /// The register's number (ECX).
        index: u32,
    },
    /// WRMSR of a register that the processor itself does not hold. Answer with
    /// [`Cpu::complete_wrmsr`](crate::Cpu::complete_wrmsr).
    Wrmsr {
        /// The register's number (ECX).
        index: u32,
        /// EDX:EAX.
        value: u64,
    },
    /// TDCALL of a [TD](crate::Cpu::set_td). State is before the instruction; answer with
    /// [`Cpu::complete_tdcall`](crate::Cpu::complete_tdcall).
    Tdcall,
    /// An instruction that a [TD](crate::Cpu::set_td) does not execute by itself. State is before the
    /// instruction.
    Intercepted {
        /// The basic exit reason, one of [`reason`](crate::reason).
        reason: u32,
        /// The exit qualification: of port I/O, otherwise 0.
        qualification: u64,
        /// Bytes of the instruction.
        length: u8,
    },
    /// A virtualization exception that the hypervisor wants to see instead of the guest
    /// ([`VeControl::intercept`](crate::VeControl::intercept)). The information page is filled.
    VirtualizationException(VeInfo),
    /// The interrupt window that was asked for is open. State is at an instruction boundary.
    InterruptWindow,
    /// Triple fault.
    Shutdown,
    /// A debug event that the hypervisor asked to see (`KVM_SET_GUEST_DEBUG`).
    Debug {
        /// 1 for a single step or hardware breakpoint, 3 for INT3.
        exception: u8,
        /// Linear address of the next instruction (vector 1) or of INT3 (vector 3).
        pc: u64,
        /// What DR6 would hold.
        dr6: u64,
        /// The DR7 in force.
        dr7: u64,
    },
    /// An instruction that this processor does not execute.
    Unknown(UnknownInstruction),
    /// Host memory behind a guest access vanished.
    HostFault {
        /// The host address that could not be accessed.
        hva: u64,
    },
}

/// An instruction that the processor does not execute.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct UnknownInstruction {
    /// The instruction's bytes.
    pub bytes: [u8; 15],
    /// How many of `bytes` are valid, 1 to 15.
    pub len: u8,
    /// What the decoder makes of it.
    pub mnemonic: iced_x86::Mnemonic,
}

impl fmt::Debug for UnknownInstruction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} [", self.mnemonic)?;
        for (i, byte) in self.bytes.iter().take(usize::from(self.len)).enumerate() {
            write!(f, "{}{byte:02x}", if i == 0 { "" } else { " " })?;
        }
        f.write_str("]")
    }
}

/// An access that the second-stage tables did not translate.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SecondStageFault {
    /// EPT violation (SDM Vol. 3, "EPT Violations"). If sub-page permissions deny a write, the
    /// addresses are those of the first byte that must not be written.
    EptViolation {
        /// The guest-physical address.
        gpa: Gpa,
        /// The exit qualification.
        qualification: u64,
        /// The guest-linear address, where the qualification says that it is valid.
        gla: u64,
    },
    /// EPT misconfiguration.
    EptMisconfiguration {
        /// The guest-physical address.
        gpa: Gpa,
    },
    /// A write has to be judged by the sub-page permission table, and one of that table's levels is
    /// missing (exit reason 66 with bit 11 of the qualification set).
    SpptMiss {
        /// The guest-physical address of the write's first byte.
        gpa: Gpa,
        /// The guest-linear address.
        gla: u64,
    },
    /// As [`SpptMiss`](Self::SpptMiss), but an entry has a reserved bit set (bit 11 clear).
    SpptMisconfiguration {
        /// The guest-physical address of the write's first byte.
        gpa: Gpa,
        /// The guest-linear address.
        gla: u64,
    },
    /// AMD nested page fault (APM Vol. 2, "Nested versus Guest Page Faults").
    NestedPageFault {
        /// The guest-physical address (EXITINFO2).
        gpa: Gpa,
        /// The error code (EXITINFO1).
        error: u64,
    },
}
