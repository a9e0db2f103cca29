//! The architectural state of a processor, in shapes close to those of KVM's ioctls.
//!
//! Nothing here validates: what KVM refuses, it refuses before these structures reach the
//! processor.

/// Index of a general register, in the order of their encoding.
pub mod gpr {
    /// RAX.
    pub const RAX: usize = 0;
    /// RCX.
    pub const RCX: usize = 1;
    /// RDX.
    pub const RDX: usize = 2;
    /// RBX.
    pub const RBX: usize = 3;
    /// RSP.
    pub const RSP: usize = 4;
    /// RBP.
    pub const RBP: usize = 5;
    /// RSI.
    pub const RSI: usize = 6;
    /// RDI.
    pub const RDI: usize = 7;
}

/// The general registers, RIP and RFLAGS.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Registers {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15: the order of their encoding.
    pub gpr: [u64; 16],
    /// The instruction pointer: an offset in CS.
    pub rip: u64,
    /// The flags. Bit 1 always reads as one.
    pub rflags: u64,
}

/// A segment register with its hidden part (SDM Vol. 3, "Segment Registers").
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Segment {
    /// The visible part.
    pub selector: u16,
    /// Linear address of the first byte.
    pub base: u64,
    /// Largest valid offset in bytes, granularity already applied.
    pub limit: u32,
    /// The descriptor's type field, 0 to 15.
    pub kind: u8,
    /// Descriptor privilege level.
    pub dpl: u8,
    /// A code or data segment, not a system one (the S bit).
    pub code_or_data: bool,
    /// The P bit.
    pub present: bool,
    /// The AVL bit.
    pub available: bool,
    /// The L bit: 64-bit code.
    pub long: bool,
    /// The D/B bit: 32-bit code or stack.
    pub big: bool,
    /// The G bit: the limit was given in units of 4 KiB.
    pub granular: bool,
    /// The register holds no usable segment (a null selector was loaded).
    pub unusable: bool,
}

/// GDTR or IDTR.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TableRegister {
    /// Linear address of the first byte.
    pub base: u64,
    /// Offset of the last byte.
    pub limit: u16,
}

/// Segments, descriptor tables and control registers: what `struct kvm_sregs` holds, without the
/// interrupt bitmap and the APIC base.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SystemRegisters {
    /// Code segment. Its `dpl` is the current privilege level only through SS.
    pub cs: Segment,
    /// Data segment.
    pub ds: Segment,
    /// Extra segment.
    pub es: Segment,
    /// FS.
    pub fs: Segment,
    /// GS.
    pub gs: Segment,
    /// Stack segment. Its `dpl` is the current privilege level.
    pub ss: Segment,
    /// Task register.
    pub tr: Segment,
    /// Local descriptor table.
    pub ldt: Segment,
    /// Global descriptor table.
    pub gdt: TableRegister,
    /// Interrupt descriptor table.
    pub idt: TableRegister,
    /// CR0.
    pub cr0: u64,
    /// CR2: the last page fault's linear address.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// CR8: the task priority, 0 to 15.
    pub cr8: u64,
    /// IA32_EFER.
    pub efer: u64,
}

/// Bits of CR0.
pub mod cr0 {
    /// Protection enable.
    pub const PE: u64 = 1 << 0;
    /// Monitor coprocessor.
    pub const MP: u64 = 1 << 1;
    /// Emulation: no x87.
    pub const EM: u64 = 1 << 2;
    /// Task switched.
    pub const TS: u64 = 1 << 3;
    /// Extension type, always one.
    pub const ET: u64 = 1 << 4;
    /// Numeric error.
    pub const NE: u64 = 1 << 5;
    /// Write protect.
    pub const WP: u64 = 1 << 16;
    /// Alignment mask.
    pub const AM: u64 = 1 << 18;
    /// Not write-through.
    pub const NW: u64 = 1 << 29;
    /// Cache disable.
    pub const CD: u64 = 1 << 30;
    /// Paging.
    pub const PG: u64 = 1 << 31;
}

/// Bits of CR4.
pub mod cr4 {
    /// Virtual-8086 extensions.
    pub const VME: u64 = 1 << 0;
    /// Protected-mode virtual interrupts.
    pub const PVI: u64 = 1 << 1;
    /// Time stamp disable.
    pub const TSD: u64 = 1 << 2;
    /// Debugging extensions.
    pub const DE: u64 = 1 << 3;
    /// 4 MiB pages in 32-bit paging.
    pub const PSE: u64 = 1 << 4;
    /// Physical address extension.
    pub const PAE: u64 = 1 << 5;
    /// Machine check enable.
    pub const MCE: u64 = 1 << 6;
    /// Global pages.
    pub const PGE: u64 = 1 << 7;
    /// RDPMC at any privilege level.
    pub const PCE: u64 = 1 << 8;
    /// FXSAVE, FXRSTOR and SSE.
    pub const OSFXSR: u64 = 1 << 9;
    /// SIMD floating-point exceptions are delivered as #XM.
    pub const OSXMMEXCPT: u64 = 1 << 10;
    /// User-mode instruction prevention.
    pub const UMIP: u64 = 1 << 11;
    /// 57-bit linear addresses.
    pub const LA57: u64 = 1 << 12;
    /// RDFSBASE and its family.
    pub const FSGSBASE: u64 = 1 << 16;
    /// Process-context identifiers.
    pub const PCIDE: u64 = 1 << 17;
    /// XSAVE.
    pub const OSXSAVE: u64 = 1 << 18;
    /// Supervisor-mode execution prevention.
    pub const SMEP: u64 = 1 << 20;
    /// Supervisor-mode access prevention.
    pub const SMAP: u64 = 1 << 21;
    /// Protection keys for user pages.
    pub const PKE: u64 = 1 << 22;
}

/// Bits of IA32_EFER.
pub mod efer {
    /// SYSCALL enable.
    pub const SCE: u64 = 1 << 0;
    /// Long mode enable.
    pub const LME: u64 = 1 << 8;
    /// Long mode active.
    pub const LMA: u64 = 1 << 10;
    /// No-execute enable.
    pub const NXE: u64 = 1 << 11;
}

/// Bits of RFLAGS.
pub mod rflags {
    /// Carry.
    pub const CF: u64 = 1 << 0;
    /// Bit 1, always one.
    pub const ONE: u64 = 1 << 1;
    /// Parity of the low byte.
    pub const PF: u64 = 1 << 2;
    /// Carry out of bit 3.
    pub const AF: u64 = 1 << 4;
    /// Zero.
    pub const ZF: u64 = 1 << 6;
    /// Sign.
    pub const SF: u64 = 1 << 7;
    /// Trap: single step.
    pub const TF: u64 = 1 << 8;
    /// Interrupts enabled.
    pub const IF: u64 = 1 << 9;
    /// Direction of string instructions.
    pub const DF: u64 = 1 << 10;
    /// Overflow.
    pub const OF: u64 = 1 << 11;
    /// I/O privilege level.
    pub const IOPL: u64 = 3 << 12;
    /// Nested task.
    pub const NT: u64 = 1 << 14;
    /// Resume.
    pub const RF: u64 = 1 << 16;
    /// Virtual-8086 mode.
    pub const VM: u64 = 1 << 17;
    /// Alignment check, or access control under SMAP.
    pub const AC: u64 = 1 << 18;
    /// Virtual interrupt flag.
    pub const VIF: u64 = 1 << 19;
    /// Virtual interrupt pending.
    pub const VIP: u64 = 1 << 20;
    /// CPUID is there.
    pub const ID: u64 = 1 << 21;
    /// The six arithmetic flags.
    pub const ARITHMETIC: u64 = CF | PF | AF | ZF | SF | OF;
}

/// Debug registers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DebugRegisters {
    /// DR0 to DR3: linear addresses.
    pub db: [u64; 4],
    /// DR6: status.
    pub dr6: u64,
    /// DR7: control.
    pub dr7: u64,
}

impl Default for DebugRegisters {
    /// The values after reset.
    fn default() -> Self {
        Self {
            db: [0; 4],
            dr6: 0xffff_0ff0,
            dr7: 0x400,
        }
    }
}

/// Bits of XCR0: state components that XSAVE and its relatives manage (SDM Vol. 1, "XSAVE-Supported
/// Features and State-Component Bitmaps").
pub mod xcr0 {
    /// x87 registers.
    pub const X87: u64 = 1 << 0;
    /// XMM registers and MXCSR.
    pub const SSE: u64 = 1 << 1;
    /// Upper halves of the YMM registers.
    pub const AVX: u64 = 1 << 2;
    /// PKRU.
    pub const PKRU: u64 = 1 << 9;
}

/// x87, SSE and AVX state, its fields in the order of an XSAVE image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(align(64))]
pub struct FpuState {
    /// Control word.
    pub fcw: u16,
    /// Status word.
    pub fsw: u16,
    /// Abridged tag word: one bit per register, set when it is not empty.
    pub ftw: u8,
    /// Last opcode.
    pub fop: u16,
    /// Last instruction pointer.
    pub fip: u64,
    /// Last data pointer.
    pub fdp: u64,
    /// SSE control and status.
    pub mxcsr: u32,
    /// ST0 to ST7: 80-bit values, each in the low ten bytes.
    pub st: [u128; 8],
    /// XMM0 to XMM15.
    pub xmm: [u128; 16],
    /// Upper halves of YMM0 to YMM15.
    pub ymm_high: [u128; 16],
}

impl Default for FpuState {
    /// The initial configuration, which XRSTOR gives and FNINIT: every exception masked.
    fn default() -> Self {
        Self {
            fcw: 0x37f,
            fsw: 0,
            ftw: 0,
            fop: 0,
            fip: 0,
            fdp: 0,
            mxcsr: 0x1f80,
            st: [0; 8],
            xmm: [0; 16],
            ymm_high: [0; 16],
        }
    }
}

/// The model-specific registers that instructions themselves use. All others are the
/// hypervisor's: RDMSR and WRMSR of them leave with [`Exit::Rdmsr`](crate::Exit::Rdmsr) and
/// [`Exit::Wrmsr`](crate::Exit::Wrmsr). IA32_EFER and the bases of FS and GS are in
/// [`SystemRegisters`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Msrs {
    /// IA32_STAR: selectors of SYSCALL and SYSRET.
    pub star: u64,
    /// IA32_LSTAR: RIP of SYSCALL from 64-bit code.
    pub lstar: u64,
    /// IA32_CSTAR: RIP of SYSCALL from compatibility mode.
    pub cstar: u64,
    /// IA32_FMASK: flags that SYSCALL clears.
    pub sfmask: u64,
    /// IA32_KERNEL_GS_BASE: the other side of SWAPGS.
    pub kernel_gs_base: u64,
    /// IA32_SYSENTER_CS.
    pub sysenter_cs: u64,
    /// IA32_SYSENTER_ESP.
    pub sysenter_esp: u64,
    /// IA32_SYSENTER_EIP.
    pub sysenter_eip: u64,
    /// IA32_TSC_AUX: what RDTSCP and RDPID return.
    pub tsc_aux: u64,
    /// IA32_PAT.
    pub pat: u64,
    /// Added to the host's time stamp counter to give the guest's.
    pub tsc_offset: u64,
    /// Guest ticks for each tick of the host's time stamp counter, in units of 2^-48 (VMX's TSC
    /// multiplier).
    pub tsc_multiplier: u64,
    /// IA32_TSC_ADJUST: what the guest has added to its time stamp counter.
    pub tsc_adjust: u64,
    /// PKRU, which WRPKRU writes: what each protection key of user pages forbids. (Not an MSR,
    /// but kept where the other such registers are.)
    pub pkru: u32,
    /// XCR0, which XSETBV writes. (Not an MSR, but kept where the other such registers are.)
    pub xcr0: u64,
}

impl Msrs {
    /// The host's time stamp counter at the guest's rate, without the guest's offset.
    pub fn scaled_host_tsc(&self) -> u64 {
        let host = crate::time::host_tsc();
        if self.tsc_multiplier == 1 << 48 {
            host
        } else {
            ((u128::from(host) * u128::from(self.tsc_multiplier)) >> 48) as u64
        }
    }

    /// What the guest's RDTSC returns now.
    pub fn tsc(&self) -> u64 {
        self.scaled_host_tsc().wrapping_add(self.tsc_offset)
    }

    /// Makes the guest's RDTSC return `value` now, and count on from there, unseen by the guest.
    pub fn set_tsc(&mut self, value: u64) {
        self.tsc_offset = value.wrapping_sub(self.scaled_host_tsc());
    }

    /// The guest writes IA32_TIME_STAMP_COUNTER: IA32_TSC_ADJUST takes part (SDM Vol. 3,
    /// "IA32_TSC_ADJUST Register Support").
    pub fn write_tsc(&mut self, value: u64) {
        let before = self.tsc_offset;
        self.set_tsc(value);
        let moved = self.tsc_offset.wrapping_sub(before);
        self.tsc_adjust = self.tsc_adjust.wrapping_add(moved);
    }

    /// The guest writes IA32_TSC_ADJUST: the counter moves by as much.
    pub fn write_tsc_adjust(&mut self, value: u64) {
        let moved = value.wrapping_sub(self.tsc_adjust);
        self.tsc_offset = self.tsc_offset.wrapping_add(moved);
        self.tsc_adjust = value;
    }
}

impl Default for Msrs {
    fn default() -> Self {
        Self {
            star: 0,
            lstar: 0,
            cstar: 0,
            sfmask: 0,
            kernel_gs_base: 0,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            tsc_aux: 0,
            pat: 0x0007_0406_0007_0406,
            tsc_offset: 0,
            tsc_multiplier: 1 << 48,
            tsc_adjust: 0,
            pkru: 0,
            xcr0: 1,
        }
    }
}

/// Events that wait for delivery, and what blocks them: what `struct kvm_vcpu_events` holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Events {
    /// An exception that will be delivered before the next instruction.
    pub exception: Option<crate::Exception>,
    /// An external interrupt that was injected and will be delivered before the next instruction.
    pub interrupt: Option<u8>,
    /// An NMI that was injected and will be delivered before the next instruction.
    pub nmi_injected: bool,
    /// An NMI that waits until NMIs are not blocked.
    pub nmi_pending: bool,
    /// NMIs are blocked until the next IRET.
    pub nmi_masked: bool,
    /// Interrupts are blocked for one instruction after STI.
    pub sti_shadow: bool,
    /// Interrupts and debug traps are blocked for one instruction after MOV SS or POP SS.
    pub mov_ss_shadow: bool,
}

/// What the hypervisor wants to see of debug events (`KVM_SET_GUEST_DEBUG`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct DebugControl {
    /// Leave with [`Exit::Debug`](crate::Exit::Debug) after each instruction, and instead of
    /// delivering any other debug exception.
    pub single_step: bool,
    /// Leave with [`Exit::Debug`](crate::Exit::Debug) at INT3 instead of delivering #BP.
    pub software_breakpoints: bool,
    /// Use these DR0 to DR3 and DR7 instead of the guest's, and leave when one matches.
    pub hardware_breakpoints: Option<([u64; 4], u64)>,
    /// Deliver no NMI that waits (`KVM_GUESTDBG_BLOCKIRQ`). Interrupts that were injected are
    /// delivered.
    pub block_interrupts: bool,
}

/// One entry of the CPUID table.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CpuidEntry {
    /// EAX on input.
    pub leaf: u32,
    /// ECX on input.
    pub subleaf: u32,
    /// Whether ECX selects among entries of this leaf.
    pub has_subleaf: bool,
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}

/// Counts of what a processor did since it was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// Instructions completed; an iteration of a repeated string instruction is not counted.
    pub instructions: u64,
    /// Blocks entered.
    pub blocks: u64,
    /// Blocks decoded.
    pub decoded: u64,
    /// Blocks that were decoded anew because their bytes had changed.
    pub changed: u64,
    /// Accesses whose translation was not cached.
    pub tlb_misses: u64,
    /// Whole flushes of the translation cache.
    pub tlb_flushes: u64,
    /// Exceptions and interrupts delivered.
    pub events: u64,
}
