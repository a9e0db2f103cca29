//! A virtual processor: `KVM_CREATE_VCPU` and the ioctls on its descriptor.

mod cancellation;
mod chipset_msr;
mod controllers;
mod counters;
mod events;
mod exit;
mod fault;
mod fpu;
mod hypercall;
mod inbox;
mod lapic;
mod machine_check;
mod msr;
mod msr_exit;
mod paravirt;
mod prefault;
mod prove_ve;
mod registers;
mod reset;
mod run;
mod run_page;
mod signal;
mod sub_pages;
mod task_priority;
mod tdcall;
mod trust_domain;
mod wait;
mod write_log;

pub use run_page::VCPU_MMAP_SIZE;
pub use signal::{RunSignals, register_run_signals};

pub(crate) use cancellation::{interrupt_run_of, is_cancellable, set_cancellable};
pub(crate) use counters::Counters;
pub(crate) use fpu::XSAVE_WORDS;
pub(crate) use inbox::{Ask, NEVER};
pub(crate) use machine_check::{
    MAX_BANKS as MACHINE_CHECK_BANKS, SUPPORTED as MACHINE_CHECK_SUPPORTED,
};
pub(crate) use msr::{FEATURES as FEATURE_MSRS, SAVED as SAVED_MSRS, feature as feature_msr};
pub(crate) use signal::interrupt_current_run;

use crate::irqchip::Model;
use crate::sync::Mutex;
use crate::td::{self, TdVcpu};
use crate::vm::Vm;
use crate::{cpuid, tsc, usercopy};
use exit::Answer;
use inbox::Inbox;
use kvm_bindings::{
    KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED,
    kvm_cpuid_entry2, kvm_debugregs, kvm_enable_cap, kvm_fpu, kvm_guest_debug, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_sregs2, kvm_translation, kvm_vcpu_events,
    kvm_xcrs,
};
use lapic::Lapic;
use machine_check::MachineCheck;
use run_page::{RunPage, mapping_check};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, MutexGuard};
use twofold_cpu::{Cpu, CpuidEntry, Line, Pml};
use twofold_mmu::{Reader, Root, TdRoots};
use write_log::{LogState, WriteLog};

/// IA32_APIC_BASE after reset: the default page, enabled.
const APIC_BASE_RESET: u64 = 0xfee0_0800;
/// The bit of IA32_APIC_BASE that marks the bootstrap processor.
const APIC_BASE_BSP: u64 = 1 << 8;

/// What the VM keeps of a vCPU, for as long as the VM lives.
pub(crate) struct VcpuCore {
    pub(crate) id: u32,
    pub(crate) run: RunPage,
    pub(crate) counters: Counters,
    line: Arc<Line>,
    /// What other threads leave for the vCPU.
    pub(crate) inbox: Arc<Inbox>,
    pub(crate) log: LogState,
    /// A signal came while the vCPU ran; `KVM_RUN` returns `EINTR`.
    signalled: AtomicBool,
    /// Its CPUID table offers the guest nested virtualization. Changes under the VM's configuration
    /// lock.
    pub(crate) is_nested: AtomicBool,
    /// Everything that one ioctl at a time may touch (KVM's `vcpu->mutex`).
    state: Mutex<VcpuState>,
}

/// What a vCPU consists of.
pub(crate) struct VcpuState {
    cpu: Cpu,
    /// Where the processor writes down what it writes to.
    write_log: Option<WriteLog>,
    /// Where the processor tells of #VE, if it is to prove that there is none.
    ve_page: Option<prove_ve::VePage>,
    reader: Reader,
    root: Option<Root>,
    /// What the vCPU is to the TDX module, once `INIT_VCPU` has made it known there.
    td: Option<TdVcpu>,
    td_roots: Option<TdRoots>,
    /// Sub-page permissions were enabled when `root` was loaded.
    asks_sub_pages: bool,
    /// What the program has to supply before the guest goes on.
    answer: Answer,
    cpuid: Vec<kvm_cpuid_entry2>,
    has_run: bool,
    mp_state: u32,
    apic_base: u64,
    lapic: Option<Lapic>,
    /// Another vCPU wanted it to go on, which it does when it halts next.
    unhalted: bool,
    /// An interrupt that the program has for the guest beside those of a split interrupt
    /// controller.
    external: Option<u8>,
    /// The vector of an interrupt that has ended, which the program's I/O APIC is to be told.
    ended: Option<u8>,
    stored_msrs: msr::Stored,
    paravirt: paravirt::Paravirt,
    machine_check: MachineCheck,
    /// The exception that waits has been injected, rather than being pending.
    exception_injected: bool,
    signal_mask: Option<u64>,
    tsc_khz: u32,
    /// Where host memory vanished last, and how many instructions had been executed then.
    last_host_fault: Option<(u64, u64)>,
}

impl VcpuState {
    /// A CPUID table with the parts that follow CR4 and XCR0 as they are now.
    fn current_cpuid(&self, table: &[kvm_cpuid_entry2]) -> Vec<kvm_cpuid_entry2> {
        let current =
            |entry| cpuid::from_processor(&self.cpu.current_cpuid(cpuid::to_processor(entry)));
        table
            .iter()
            .map(|entry| kvm_cpuid_entry2 {
                flags: entry.flags,
                index: entry.index,
                padding: entry.padding,
                ..current(entry)
            })
            .collect()
    }
}

impl VcpuCore {
    /// A vCPU after reset, and the file that its program maps.
    pub(crate) fn new(vm: &Vm, id: u32, index: u32) -> Result<(Arc<Self>, OwnedFd), Errno> {
        let tables = vm.tables();
        let ring_entries = tables.ring_entries();
        let (run, file) = RunPage::new(id, ring_entries)?;
        let reader = match ring_entries {
            0 => tables.reader(),
            entries => tables.ring_reader(Arc::new(run.ring(entries))),
        };
        let mut cpu = Cpu::new(Arc::clone(vm.machine()), index);
        let mut msrs = cpu.msrs();
        let tsc_khz = vm.get_tsc_khz();
        msrs.tsc_multiplier = tsc::multiplier(tsc_khz).unwrap_or(tsc::HOST_RATE);
        msrs.tsc_offset = vm
            .tsc_sync()
            .offset(tsc_khz, 0, msrs.scaled_host_tsc(), false);
        cpu.set_msrs(&msrs);
        let write_log = tables.logs_by_pml().then(WriteLog::new);
        cpu.set_pml(write_log.as_ref().map(|log| Pml::empty(log.page())));
        let is_bsp = id == vm.boot_cpu_id();
        let irqchip = vm.irqchip_model();
        let inbox = Arc::new(Inbox::default());
        let apic_base = APIC_BASE_RESET | if is_bsp { APIC_BASE_BSP } else { 0 };
        let mut state = VcpuState {
            reader,
            write_log,
            ve_page: None,
            root: None,
            asks_sub_pages: false,
            answer: Answer::None,
            cpuid: Vec::new(),
            has_run: false,
            mp_state: if irqchip == Model::None || is_bsp {
                KVM_MP_STATE_RUNNABLE
            } else {
                KVM_MP_STATE_UNINITIALIZED
            },
            apic_base,
            lapic: (irqchip != Model::None)
                .then(|| Lapic::new(id, apic_base, vm.apic_cycle(), Arc::clone(&inbox))),
            unhalted: false,
            external: None,
            ended: None,
            stored_msrs: msr::Stored::default(),
            paravirt: paravirt::Paravirt::default(),
            machine_check: MachineCheck::default(),
            exception_injected: false,
            signal_mask: None,
            tsc_khz,
            last_host_fault: None,
            td: None,
            td_roots: None,
            cpu,
        };
        if prove_ve::wanted(vm) {
            state.prove_ve();
        }
        let core = Arc::new(Self {
            id,
            run,
            counters: Counters::default(),
            log: LogState::default(),
            line: Arc::clone(state.cpu.line()),
            inbox,
            signalled: AtomicBool::new(false),
            is_nested: AtomicBool::new(false),
            state: Mutex::new(state),
        });
        Ok((core, file))
    }
}

/// A CPUID table as the processor takes it.
fn processor_table(table: &[kvm_cpuid_entry2]) -> Vec<CpuidEntry> {
    table.iter().map(cpuid::to_processor).collect()
}

/// A virtual processor: what a vCPU descriptor refers to. Clones refer to the same vCPU, and keep
/// its VM alive.
///
/// One method at a time works on a vCPU; others wait, for as long as the guest runs.
#[derive(Clone)]
pub struct Vcpu {
    vm: Arc<Vm>,
    core: Arc<VcpuCore>,
}

impl Vcpu {
    pub(crate) fn new(vm: Arc<Vm>, core: Arc<VcpuCore>) -> Self {
        Self { vm, core }
    }

    /// The VM that the vCPU belongs to.
    pub fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    /// The number that the program gave the vCPU.
    pub fn id(&self) -> u32 {
        self.core.id
    }

    pub(crate) fn core(&self) -> &Arc<VcpuCore> {
        &self.core
    }

    /// Why KVM refuses to map `length` bytes at `offset` of the vCPU's file.
    pub(crate) fn mapping_check(
        &self,
        offset: u64,
        length: usize,
        shared: bool,
        executable: bool,
    ) -> Option<Errno> {
        let entries = self.vm.tables().ring_entries();
        mapping_check(entries, offset, length, shared, executable)
    }

    /// Takes the vCPU for one ioctl.
    pub(crate) fn state(&self) -> MutexGuard<'_, VcpuState> {
        self.core.state.lock()
    }

    /// `KVM_GET_REGS`
    pub fn get_regs(&self) -> kvm_regs {
        self.state().regs()
    }

    /// `KVM_SET_REGS`
    pub fn set_regs(&self, regs: &kvm_regs) {
        self.state().set_regs(regs);
    }

    /// `KVM_GET_SREGS`
    pub fn get_sregs(&self) -> kvm_sregs {
        self.state().sregs()
    }

    /// `KVM_SET_SREGS`
    ///
    /// # Errors
    /// `EINVAL` for a state that no processor can be in.
    pub fn set_sregs(&self, sregs: &kvm_sregs) -> Result<(), Errno> {
        self.state().set_sregs(sregs)
    }

    /// `KVM_GET_SREGS2`
    pub fn get_sregs2(&self) -> kvm_sregs2 {
        self.state().sregs2()
    }

    /// `KVM_SET_SREGS2`
    ///
    /// # Errors
    /// `EINVAL` for an unknown flag, for PDPTEs outside PAE paging, and for a state that no
    /// processor can be in.
    pub fn set_sregs2(&self, sregs: &kvm_sregs2) -> Result<(), Errno> {
        self.state().set_sregs2(sregs)
    }

    /// `KVM_GET_FPU`
    pub fn get_fpu(&self) -> kvm_fpu {
        self.state().fpu()
    }

    /// `KVM_SET_FPU`
    pub fn set_fpu(&self, fpu: &kvm_fpu) {
        self.state().set_fpu(fpu);
    }

    /// `KVM_GET_XSAVE`: the 4096 bytes of an XSAVE area in standard format, as 32-bit words.
    pub fn get_xsave(&self) -> [u32; XSAVE_WORDS] {
        self.state().xsave()
    }

    /// `KVM_SET_XSAVE`
    ///
    /// # Errors
    /// `EINVAL` for components that the processor does not have, and for reserved bits.
    pub fn set_xsave(&self, area: &[u32; XSAVE_WORDS]) -> Result<(), Errno> {
        self.state().set_xsave(area)
    }

    /// `KVM_GET_XCRS`
    pub fn get_xcrs(&self) -> kvm_xcrs {
        self.state().xcrs()
    }

    /// `KVM_SET_XCRS`
    ///
    /// # Errors
    /// `EINVAL` for an XCR0 that the processor cannot hold, too many registers, or a flag.
    pub fn set_xcrs(&self, xcrs: &kvm_xcrs) -> Result<(), Errno> {
        self.state().set_xcrs(xcrs)
    }

    /// `KVM_GET_DEBUGREGS`
    pub fn get_debugregs(&self) -> kvm_debugregs {
        self.state().debugregs()
    }

    /// `KVM_SET_DEBUGREGS`
    ///
    /// # Errors
    /// `EINVAL` for flags and for upper halves of DR6 and DR7.
    pub fn set_debugregs(&self, debug: &kvm_debugregs) -> Result<(), Errno> {
        self.state().set_debugregs(debug)
    }

    /// `KVM_GET_VCPU_EVENTS`
    pub fn get_vcpu_events(&self) -> kvm_vcpu_events {
        self.state().events(self.vm.exception_payload())
    }

    /// `KVM_SET_VCPU_EVENTS`
    ///
    /// # Errors
    /// `EINVAL` for unknown flags and for vectors that are no exception.
    pub fn set_vcpu_events(&self, events: &kvm_vcpu_events) -> Result<(), Errno> {
        self.state().set_events(events, self.vm.exception_payload())
    }

    /// `KVM_GET_MP_STATE`
    pub fn get_mp_state(&self) -> kvm_mp_state {
        let mut state = self.state();
        self.meet_requests(&mut state);
        state.mp_state()
    }

    /// `KVM_SET_MP_STATE`
    ///
    /// # Errors
    /// `EINVAL` for unknown states, and for all but "runnable" without an in-kernel local APIC.
    pub fn set_mp_state(&self, state: &kvm_mp_state) -> Result<(), Errno> {
        self.state()
            .set_mp_state(state, self.vm.irqchip_model(), &self.core.inbox)
    }

    /// `KVM_INTERRUPT`
    ///
    /// # Errors
    /// `EINVAL` above 255, `ENXIO` with an in-kernel interrupt controller, `EEXIST` while a split
    /// one still holds an interrupt.
    pub fn interrupt(&self, vector: u32) -> Result<(), Errno> {
        self.state().interrupt(vector, self.vm.irqchip_model())?;
        self.core.counters.irq_injections.increment();
        Ok(())
    }

    /// `KVM_NMI`
    pub fn nmi(&self) {
        self.state().cpu.inject_nmi();
        self.core.counters.nmi_injections.increment();
    }

    /// `KVM_SET_GUEST_DEBUG`
    ///
    /// # Errors
    /// `EBUSY` if an exception is to be injected while one waits.
    pub fn set_guest_debug(&self, debug: &kvm_guest_debug) -> Result<(), Errno> {
        self.state().set_guest_debug(debug)
    }

    /// `KVM_SET_CPUID2`
    ///
    /// # Errors
    /// `E2BIG` for more than 256 entries; `EINVAL` for a size of linear addresses other than 48 or
    /// 57, and for any change once the vCPU has run; `EPERM` for nested virtualization in a VM with
    /// sub-page permissions.
    pub fn set_cpuid2(&self, table: &[kvm_cpuid_entry2]) -> Result<(), Errno> {
        if table.len() > cpuid::MAX_ENTRIES {
            return Err(Errno::TOOBIG);
        }
        if self.vm.td().is_some() {
            return self.set_td_cpuid(table);
        }
        let mut table = table.to_vec();
        if self.vm.halts_in_guest() {
            cpuid::forget_unhalt(&mut table);
        }
        let mut state = self.state();
        let differs = || state.current_cpuid(&state.cpuid) != state.current_cpuid(&table);
        if state.has_run && differs() || !cpuid::is_possible(&table) {
            return Err(Errno::INVAL);
        }
        self.vm
            .offer_nesting(&self.core, cpuid::is_nested(&table))?;
        state.cpu.set_cpuid(processor_table(&table));
        state.cpuid = table;
        Ok(())
    }

    /// `KVM_GET_CPUID2`: the table, with the parts that follow CR4 and XCR0 as the guest sees them
    /// now.
    pub fn get_cpuid2(&self) -> Vec<kvm_cpuid_entry2> {
        let state = self.state();
        match state.td {
            None => state.current_cpuid(&state.cpuid),
            // Those registers of a trust domain are its own.
            Some(_) => state.cpuid.clone(),
        }
    }

    /// `KVM_GET_MSRS`: fills in the values up to the first register that the vCPU does not have.
    /// How many that were.
    pub fn get_msrs(&self, entries: &mut [kvm_msr_entry]) -> usize {
        let mut state = self.state();
        let is_td = self.vm.td().is_some();
        let mut done = 0;
        for entry in entries {
            if is_td && !td::emulates_msr(entry.index) {
                break;
            }
            let Some(value) = state.msr(entry.index, false) else {
                break;
            };
            entry.data = value;
            done += 1;
        }
        done
    }

    /// `KVM_SET_MSRS`: sets registers up to the first that does not take its value. How many that
    /// were.
    pub fn set_msrs(&self, entries: &[kvm_msr_entry]) -> usize {
        let is_td = self.vm.td().is_some();
        let mut state = self.state();
        entries
            .iter()
            .take_while(|entry| {
                let (index, data) = (entry.index, entry.data);
                if is_td && (!td::emulates_msr(index) || td::is_read_only_msr(index)) {
                    return false;
                }
                if index == msr::IA32_TSC {
                    state.set_tsc(data, self.vm.tsc_sync());
                    return true;
                }
                if let Some(taken) = self.write_paravirt_msr(&mut state, index, data) {
                    return taken;
                }
                match state.write_apic_msr(index, data) {
                    Some(Ok(effect)) => {
                        self.carry_out(&mut state, effect);
                        true
                    }
                    Some(Err(lapic::Refused)) => false,
                    None => state.set_msr(index, data, false),
                }
            })
            .count()
    }

    /// `KVM_GET_LAPIC`
    ///
    /// # Errors
    /// `EINVAL` without an in-kernel local APIC.
    pub fn get_lapic(&self) -> Result<kvm_lapic_state, Errno> {
        let mut state = self.state();
        let VcpuState { lapic, cpu, .. } = &mut *state;
        let lapic = lapic.as_mut().ok_or(Errno::INVAL)?;
        lapic.settle_timer(cpu);
        Ok(lapic.state(cpu.cr8(), self.vm.wide_apic_ids()))
    }

    /// `KVM_SET_LAPIC`
    ///
    /// # Errors
    /// `EINVAL` without an in-kernel local APIC, and for another id than the vCPU's in x2APIC mode
    /// if the program has asked for ids of 32 bits.
    pub fn set_lapic(&self, lapic: &kvm_lapic_state) -> Result<(), Errno> {
        let mut state = self.state();
        let own = state.lapic.as_mut().ok_or(Errno::INVAL)?;
        let cr8 = own
            .set_state(lapic, self.vm.wide_apic_ids())
            .map_err(|lapic::Refused| Errno::INVAL)?;
        state.cpu.set_cr8(cr8);
        self.set_alarm(&state);
        Ok(())
    }

    /// `KVM_TRANSLATE`
    pub fn translate(&self, linear_address: u64) -> kvm_translation {
        let mut state = self.state();
        let VcpuState { cpu, reader, .. } = &mut *state;
        let translated = cpu.translate(linear_address, |gpa| {
            let slot = self.vm.tables().lookup(reader, gpa)?;
            let page = slot.hva_of(gpa.frame());
            usercopy::read(page.wrapping_add(gpa.page_offset()) as usize).ok()
        });
        let physical = translated.map_or(u64::MAX, |translation| translation.gpa.get());
        kvm_translation {
            linear_address,
            physical_address: physical,
            valid: u8::from(physical != u64::MAX),
            writeable: 1,
            usermode: 0,
            pad: [0; 5],
        }
    }

    /// `KVM_GET_TSC_KHZ`
    pub fn get_tsc_khz(&self) -> u32 {
        self.state().tsc_khz
    }

    /// `KVM_SET_TSC_KHZ`: 0 asks for the host's rate. The counter goes on from its present value.
    ///
    /// # Errors
    /// `EINVAL` for a rate that the multiplier cannot express.
    pub fn set_tsc_khz(&self, khz: u32) -> Result<(), Errno> {
        let khz = if khz == 0 { tsc::khz() } else { khz };
        let multiplier = tsc::multiplier(khz).ok_or(Errno::INVAL)?;
        let mut state = self.state();
        let mut msrs = state.cpu.msrs();
        let now = msrs.tsc();
        msrs.tsc_multiplier = multiplier;
        msrs.set_tsc(now);
        state.cpu.set_msrs(&msrs);
        state.tsc_khz = khz;
        Ok(())
    }

    /// The attribute `KVM_VCPU_TSC_OFFSET`: what is added to the host's scaled counter.
    pub fn get_tsc_offset(&self) -> u64 {
        self.state().cpu.msrs().tsc_offset
    }

    /// Sets the attribute `KVM_VCPU_TSC_OFFSET`.
    pub fn set_tsc_offset(&self, offset: u64) {
        let mut state = self.state();
        let mut msrs = state.cpu.msrs();
        msrs.tsc_offset = offset;
        state.cpu.set_msrs(&msrs);
        self.vm
            .tsc_sync()
            .note_offset(state.tsc_khz, offset, msrs.scaled_host_tsc());
    }

    /// `KVM_ENABLE_CAP` on a vCPU.
    ///
    /// # Errors
    /// `EINVAL` for flags, and for capabilities that a vCPU does not have.
    pub fn enable_cap(&self, cap: &kvm_enable_cap) -> Result<(), Errno> {
        if cap.flags != 0 || cap.cap != KVM_CAP_ENFORCE_PV_FEATURE_CPUID {
            return Err(Errno::INVAL);
        }
        self.state().paravirt.enforced = cap.args[0] != 0;
        Ok(())
    }

    /// `KVM_SET_SIGNAL_MASK`: the signals that are blocked while the vCPU runs, or `None` for the
    /// thread's own.
    pub fn set_signal_mask(&self, mask: Option<u64>) {
        self.state().signal_mask = mask;
    }
}
