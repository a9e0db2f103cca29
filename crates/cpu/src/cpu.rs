//! A virtual processor as the hypervisor sees it: state in and out, answers to exits, and running.

use crate::blocks::BlockCache;
use crate::core_state::{Core, Pending};
use crate::line::Line;
use crate::machine::Machine;
use crate::memory::{InvalidSppt, Pml, SecondStage, Translation, VeBusy, VeControl, VeInfo};
use crate::state::{
    Counters, CpuidEntry, DebugControl, DebugRegisters, Events, FpuState, Msrs, Registers,
    SystemRegisters,
};
use crate::trap::{Exception, Exit};
use crate::x87;
use std::sync::Arc;
use twofold_arch::{Gpa, Hpa, Level};

/// One virtual processor.
///
/// A new one is as after reset: real mode, about to execute at F000:FFF0.
///
/// It belongs to one thread at a time. Other threads use its [`Line`].
pub struct Cpu {
    pub(crate) core: Core,
    blocks: BlockCache,
}

impl Cpu {
    /// Makes a processor of `machine`. `index` only serves to tell processors apart.
    pub fn new(machine: Arc<Machine>, index: u32) -> Self {
        let core = Core::after_reset(machine, index);
        let mut cpu = Self {
            core,
            blocks: BlockCache::default(),
        };
        let system = SystemRegisters::reset();
        cpu.set_system_registers(&system);
        cpu
    }

    /// The line over which other threads reach this processor.
    pub fn line(&self) -> &Arc<Line> {
        &self.core.line
    }

    /// The machine that this processor belongs to.
    pub fn machine(&self) -> &Arc<Machine> {
        &self.core.machine
    }

    /// Chooses the second-stage tables. Forgets every translation.
    pub fn set_second_stage(&mut self, second_stage: SecondStage) {
        self.core.set_second_stage(second_stage);
    }

    /// Chooses the sub-page permission table (SPPTP, with the control "sub-page write permissions
    /// for EPT"), or none: its root, of four levels (SDM Vol. 3, "Sub-Page Write Permissions").
    /// Stays when [other tables](Self::set_second_stage) are chosen. Forgets every translation.
    ///
    /// A write to a page of 4 KiB whose EPT entry has the sub-page bit, and which may be read but
    /// not written, is then allowed if every sub-page that it touches may be written. That is
    /// looked up for each write; the table is read as memory holds it, and what is cached of its
    /// upper levels goes with [`Machine::flush_tlbs`](crate::Machine::flush_tlbs).
    ///
    /// # Errors
    /// [`InvalidSppt`] where VM entry would fail: the root is not 4 KiB aligned or beyond the
    /// physical addresses that there are, or the second stage is NPT. Nothing has changed then.
    pub fn set_sppt(&mut self, root: Option<Hpa>) -> Result<(), InvalidSppt> {
        match self.core.set_sppt(root) {
            true => Ok(()),
            false => Err(InvalidSppt { root }),
        }
    }

    /// Chooses the log of EPT dirty flags that this processor sets, or none (SDM Vol. 3,
    /// "Page-Modification Logging").
    ///
    /// From then on each 0 to 1 transition of a leaf's dirty flag, whatever the leaf's size, writes
    /// the 4 KiB aligned guest-physical address of the access to the log; also that of a guest page
    /// table, since reading one counts as a write. A page that is already dirty is not logged: the
    /// hypervisor clears the flags and then [flushes](crate::Machine::flush_tlbs). Nothing is
    /// logged through an EPT pointer without accessed and dirty flags, nor through NPT.
    ///
    /// Cached translations stay. The page has to stay what it is as long as it is chosen.
    pub fn set_pml(&mut self, pml: Option<Pml>) {
        self.core.mem.pml = pml;
    }

    /// The log that was chosen, with its index as the processor has moved it: the entries above
    /// the index, up to [`Pml::FIRST`], are valid.
    pub fn pml(&self) -> Option<Pml> {
        self.core.mem.pml
    }

    /// The index of the log that was chosen: the entry that is written next, above
    /// [`Pml::FIRST`] if there is no room.
    pub fn pml_index(&self) -> Option<u16> {
        self.core.mem.pml.map(|pml| pml.index)
    }

    /// Chooses whether some EPT violations become virtualization exceptions in the guest, and where
    /// they are described (SDM Vol. 3, "Virtualization Exceptions").
    ///
    /// The page has to stay what it is as long as it is chosen.
    pub fn set_ve(&mut self, control: Option<VeControl>) {
        self.core.mem.ve = control;
    }

    /// Delivers #VE before the next instruction, and fills the information page, as the TDX module
    /// does for instructions that a TD does not execute.
    ///
    /// # Errors
    /// [`VeBusy`] if the page still describes another, or [none was chosen](Self::set_ve). Nothing
    /// has changed then.
    pub fn inject_ve(&mut self, info: &VeInfo) -> Result<(), VeBusy> {
        self.core.inject_ve(info)
    }

    /// Takes what the information page describes, and makes the page free for the next. `None` if it
    /// describes nothing.
    pub fn take_ve(&mut self) -> Option<VeInfo> {
        self.core.take_ve()
    }

    /// Chooses whether the processor runs a TD: there is TDCALL, which leaves with
    /// [`Exit::Tdcall`], and instructions that a TD does not execute by itself leave with
    /// [`Exit::Intercepted`].
    ///
    /// These are HLT, port I/O, VMCALL, MONITOR, MWAIT, INVD, WBINVD, RDMSR and WRMSR of registers
    /// that the processor does not hold (but not those of the local APIC that processors virtualise) and
    /// of the time stamp counter (reading it is allowed), and
    /// CPUID of leaves that [the table](Self::set_cpuid) does not have. VMMCALL is #UD. Addresses in
    /// the guest's tables may have 52 bits.
    pub fn set_td(&mut self, on: bool) {
        self.core.td = on;
        self.core.update_features();
    }

    /// Answers [`Exit::Tdcall`]: the general registers become `gpr` at once, and the next run goes on
    /// after the instruction. Without an answer the instruction is executed again, after events that
    /// wait.
    pub fn complete_tdcall(&mut self, gpr: &[u64; 16]) {
        self.core.regs[..16].copy_from_slice(gpr);
        self.core.pending = Pending::Tdcall;
        self.core.pending_rip = self.core.rip;
    }

    /// The entries of the second-stage tables on the way to `gpa`, from the root down to the entry
    /// that maps it or is not present, as a look at memory finds them now: for a report of what is
    /// wrong with them.
    pub fn second_stage_walk(&self, gpa: Gpa) -> Vec<(Level, u64)> {
        self.core.mem.trace_second_stage(&self.core.machine, gpa)
    }

    /// Executes until something needs the hypervisor.
    ///
    /// Whatever waits for an answer is completed first, even if the line has been kicked: then the
    /// waiting instruction is completed and the answer is [`Exit::Kicked`].
    pub fn run(&mut self) -> Exit {
        self.core.line.enter();
        let exit = crate::execute::run(&mut self.core, &mut self.blocks);
        self.core.leave_float();
        self.core.line.leave();
        exit
    }

    /// General registers, RIP and RFLAGS.
    pub fn registers(&self) -> Registers {
        let mut gpr = [0; 16];
        gpr.copy_from_slice(&self.core.regs[..16]);
        Registers {
            gpr,
            rip: self.core.rip,
            rflags: self.core.flags.image(),
        }
    }

    /// Replaces general registers, RIP and RFLAGS. An exception that waits for delivery is dropped,
    /// as KVM does.
    pub fn set_registers(&mut self, registers: &Registers) {
        let core = &mut self.core;
        core.regs[..16].copy_from_slice(&registers.gpr);
        if core.rip != registers.rip {
            // What the instruction before left to be reported belongs to where it was.
            core.breakpoints.pending = 0;
            core.iterating = false;
        }
        core.rip = registers.rip;
        core.flags.set_image(registers.rflags);
        core.events.exception = None;
        core.update_mode();
    }

    /// Segments, descriptor tables, control registers.
    pub fn system_registers(&self) -> SystemRegisters {
        let core = &self.core;
        let [es, cs, ss, ds, fs, gs] = core.segment;
        SystemRegisters {
            cs,
            ds,
            es,
            fs,
            gs,
            ss,
            tr: core.tr,
            ldt: core.ldt,
            gdt: core.gdt,
            idt: core.idt,
            cr0: core.cr0,
            cr2: core.cr2,
            cr3: core.cr3,
            cr4: core.cr4,
            cr8: core.cr8,
            efer: core.efer,
        }
    }

    /// Replaces segments, descriptor tables, control registers. Forgets cached translations if
    /// paging changes. The current privilege level becomes the DPL of SS.
    pub fn set_system_registers(&mut self, system: &SystemRegisters) {
        let core = &mut self.core;
        core.segment = [
            system.es, system.cs, system.ss, system.ds, system.fs, system.gs,
        ];
        core.tr = system.tr;
        core.ldt = system.ldt;
        core.gdt = system.gdt;
        core.idt = system.idt;
        core.cr2 = system.cr2;
        core.cr8 = system.cr8;
        let paging_before = (core.cr0, core.cr3, core.cr4, core.efer);
        core.cr0 = system.cr0;
        core.cr3 = system.cr3;
        core.cr4 = system.cr4;
        core.efer = system.efer;
        if paging_before != (core.cr0, core.cr3, core.cr4, core.efer) {
            core.flush_tlb();
        }
        core.cpl = system.ss.dpl & 3;
        // Also updates the mode.
        core.update_breakpoints();
    }

    /// Debug registers.
    pub fn debug_registers(&self) -> DebugRegisters {
        self.core.debug
    }

    /// Replaces the debug registers.
    pub fn set_debug_registers(&mut self, debug: &DebugRegisters) {
        self.core.debug = *debug;
        self.core.update_breakpoints();
    }

    /// x87, SSE and AVX state.
    pub fn fpu(&self) -> FpuState {
        self.core.vectors
    }

    /// Replaces x87, SSE and AVX state. Bits of MXCSR and of the x87 control word that do not exist
    /// are dropped, and the summary in the status word says what its flags and the masks do.
    pub fn set_fpu(&mut self, fpu: &FpuState) {
        let state = &mut self.core.vectors;
        *state = FpuState {
            mxcsr: fpu.mxcsr & 0xffff,
            ..*fpu
        };
        x87::set_words(state, fpu.fcw, fpu.fsw);
    }

    /// The MSRs that instructions use, and XCR0.
    pub fn msrs(&self) -> Msrs {
        self.core.msrs
    }

    /// Replaces the MSRs that instructions use, and XCR0.
    pub fn set_msrs(&mut self, msrs: &Msrs) {
        // Also where translations depend on it.
        self.core.set_pkru(msrs.pkru);
        let changed = self.core.msrs.xcr0 != msrs.xcr0;
        self.core.msrs = *msrs;
        if changed {
            // XCR0 decides which instructions there are.
            self.core.update_mode();
        }
    }

    /// Whether RDMSR and WRMSR of every register leave with [`Exit::Rdmsr`] and [`Exit::Wrmsr`],
    /// those in [`Msrs`] and [`SystemRegisters`] included, since the hypervisor filters them.
    #[inline]
    pub fn set_msr_exits(&mut self, all: bool) {
        self.core.msrs_leave = all;
    }

    /// Whether a guest that lowers CR8 leaves with [`Exit::TaskPriority`], since the hypervisor may
    /// hold an interrupt that CR8 kept back.
    #[inline]
    pub fn set_cr8_exits(&mut self, lowering: bool) {
        self.core.cr8_leaves = lowering;
    }

    /// What the guest's RDTSC would return now.
    pub fn tsc(&self) -> u64 {
        self.core.msrs.tsc()
    }

    /// Events that wait, and what blocks them.
    pub fn events(&self) -> Events {
        self.core.events
    }

    /// Replaces the events that wait, and what blocks them.
    pub fn set_events(&mut self, events: &Events) {
        self.core.events = *events;
    }

    /// Chooses which debug events leave the processor.
    pub fn set_debug_control(&mut self, control: &DebugControl) {
        let outside = self.core.debugged_from_outside();
        self.core.debug_control = *control;
        if outside && !self.core.debugged_from_outside() {
            // What was to be reported to the hypervisor is not the guest's.
            self.core.breakpoints.pending = 0;
        }
        self.core.update_breakpoints();
    }

    /// Which debug events leave the processor.
    #[inline]
    pub fn debug_control(&self) -> &DebugControl {
        &self.core.debug_control
    }

    /// Replaces the CPUID table. What it says of the width of physical addresses and of features that
    /// CR4 controls holds from then on.
    pub fn set_cpuid(&mut self, table: Vec<CpuidEntry>) {
        self.core.cpuid = table;
        self.core.update_features();
    }

    /// The bits of CR4 that the guest may set: what the processor has and its CPUID table, if it has
    /// one, names.
    pub fn cr4_allowed(&self) -> u64 {
        self.core.cr4_allowed
    }

    /// The bits of XCR0 that the guest may set: state components that the processor has and its
    /// CPUID table, if it has one, names.
    pub fn xcr0_allowed(&self) -> u64 {
        self.core.xcr0_allowed
    }

    /// Whether XCR0 takes a value: XSETBV of another raises #GP.
    pub fn may_hold_xcr0(&self, value: u64) -> bool {
        self.core.may_hold_xcr0(value)
    }

    /// What CPUID makes of an entry now: the parts that follow CR4 and XCR0 are filled in.
    pub fn current_cpuid(&self, entry: CpuidEntry) -> CpuidEntry {
        self.core.current_cpuid(entry)
    }

    /// The CPUID table.
    pub fn cpuid(&self) -> &[CpuidEntry] {
        &self.core.cpuid
    }

    /// Delivers an external interrupt before the next instruction. The hypervisor asks for
    /// [`Cpu::interrupt_window_open`] first; the interrupt is delivered whatever RFLAGS.IF says.
    pub fn inject_interrupt(&mut self, vector: u8) {
        self.core.events.interrupt = Some(vector);
    }

    /// Delivers a non-maskable interrupt as soon as NMIs are not blocked.
    pub fn inject_nmi(&mut self) {
        self.core.events.nmi_pending = true;
    }

    /// Delivers an exception before the next instruction.
    pub fn queue_exception(&mut self, exception: Exception) {
        self.core.events.exception = Some(exception);
    }

    /// Whether an external interrupt could be delivered now: RFLAGS.IF is set, nothing shadows it
    /// and no other event waits.
    pub fn interrupt_window_open(&self) -> bool {
        self.core.interrupt_window_open()
    }

    /// Whether to leave with [`Exit::InterruptWindow`] as soon as the window is open.
    pub fn request_interrupt_window(&mut self, wanted: bool) {
        self.core.window_requested = wanted;
    }

    /// With a limit, [`Exit::InterruptWindow`] also waits until CR8 is below it: for an interrupt that
    /// the task priority holds back (the TPR threshold of SDM Vol. 3, "Virtualizing the TPR").
    pub fn limit_interrupt_window(&mut self, cr8_below: Option<u64>) {
        self.core.window_limit = cr8_below.unwrap_or(16);
    }

    /// Translates a guest-linear address by the guest's page tables, as a supervisor's read would,
    /// without changing anything. `None` if the address does not translate.
    ///
    /// The tables are read by `read`, 8 bytes at a guest-physical address that is a multiple of 8,
    /// since the second stage may not map them yet; it answers `None` where no memory is.
    pub fn translate(
        &self,
        gva: u64,
        mut read: impl FnMut(Gpa) -> Option<u64>,
    ) -> Option<Translation> {
        self.core.translate(gva, &mut read)
    }

    /// Lets the next execution of the current instruction treat the page of `gpa` as memory that
    /// the hypervisor emulates.
    pub fn allow_mmio(&mut self, gpa: Gpa) {
        self.core.allow_mmio(gpa);
    }

    /// Answers [`Exit::MmioRead`]. Bytes beyond the length that the exit named are ignored,
    /// missing ones are zero.
    pub fn complete_mmio_read(&mut self, data: &[u8]) {
        self.core.complete_mmio_read(data);
    }

    /// The data of the [`Exit::Io`] that `run` returned last: `size * count` bytes.
    pub fn io_data(&self) -> &[u8] {
        &self.core.io_buffer
    }

    /// Answers an [`Exit::Io`] that reads. Missing bytes are zero, bytes in excess are ignored.
    pub fn complete_io_in(&mut self, data: &[u8]) {
        if let Pending::In { size, count, next } = self.core.pending {
            let wanted = usize::from(size) * count as usize;
            let buffer = &mut self.core.io_buffer;
            buffer.clear();
            buffer.extend_from_slice(&data[..wanted.min(data.len())]);
            buffer.resize(wanted, 0);
            self.core.pending = Pending::InReady { size, count, next };
        }
    }

    /// Answers [`Exit::Rdmsr`]: the value, or `None` for #GP.
    pub fn complete_rdmsr(&mut self, value: Option<u64>) {
        if let Pending::Rdmsr { answer, .. } = &mut self.core.pending {
            *answer = Some(value);
        }
    }

    /// Answers [`Exit::Wrmsr`]: done, or (`false`) #GP.
    pub fn complete_wrmsr(&mut self, accepted: bool) {
        if let Pending::Wrmsr { answer, .. } = &mut self.core.pending {
            *answer = Some(accepted);
        }
    }

    /// Answers [`Exit::Hypercall`]: the next run puts `result` into RAX and goes on after the
    /// instruction.
    pub fn complete_hypercall(&mut self, result: u64) {
        if let Pending::Hypercall { answer } = &mut self.core.pending {
            *answer = Some(result);
        }
    }

    /// RIP, without the other registers.
    #[inline]
    pub fn rip(&self) -> u64 {
        self.core.rip
    }

    /// Length in bytes of the instruction at RIP whose execution `run` left with the state before
    /// it. 0 if there is none: the exit came from fetching an instruction or between two, or while
    /// an event was being delivered, also that of an INT n, so that advancing RIP would undo
    /// something else than the access that left.
    #[inline]
    pub fn exit_instruction_length(&self) -> u8 {
        self.core.exit_length.unwrap_or(0)
    }

    /// The current privilege level, 0 to 3.
    #[inline]
    pub fn privilege_level(&self) -> u8 {
        self.core.cpl
    }

    /// Whether RFLAGS.IF is set.
    #[inline]
    pub fn interrupts_enabled(&self) -> bool {
        self.core.flags.system() & crate::state::rflags::IF != 0
    }

    /// CR8, the task priority.
    #[inline]
    pub fn cr8(&self) -> u64 {
        self.core.cr8
    }

    /// Replaces CR8: the low four bits of `priority`.
    #[inline]
    pub fn set_cr8(&mut self, priority: u64) {
        self.core.cr8 = priority & 0xf;
    }

    /// Whether an instruction waits to be completed by the next run: port I/O, an emulated memory
    /// access, an MSR access or a hypercall.
    pub fn has_pending_completion(&self) -> bool {
        self.core.pending != Pending::None || self.core.mmio_in_progress()
    }

    /// What has been done so far.
    pub fn counters(&self) -> Counters {
        self.core.counters
    }
}

impl Drop for Cpu {
    fn drop(&mut self) {
        self.core.machine.detach(&self.core.line);
    }
}

/// Bytes of string I/O that one exit carries at most: one page of `struct kvm_run`'s data area,
/// of which KVM uses 1024.
pub(crate) const IO_BATCH_BYTES: usize = 1024;
