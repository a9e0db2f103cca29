//! Running a vCPU: what the guest asks is answered here if it is the hypervisor's to answer; the
//! host sees the rest, and of a protected guest only what it needs to serve it.

use crate::error::Error;
use crate::exception::class;
use crate::hypervisor::Hypervisor;
use crate::interrupts::Interrupts;
use crate::platform::Platform;
use crate::request::Stopped;
use crate::shared::HostVcpu;
use crate::trace::{Cause, Event};
use crate::vm::{Registers, VcpuInner, Vm, system};
use core::sync::atomic::Ordering;
use twofold_arch::stage2::{vtcr, vttbr};
use twofold_arch::{Gfn, PAGE_SIZE};

/// The stage 2 that a vCPU runs with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stage2 {
    /// VTTBR_EL2: the guest's root and VMID.
    pub vttbr: u64,
    /// VTCR_EL2, for the guest's own IPA size.
    pub vtcr: u64,
}

/// What a vCPU runs with beside its registers.
#[derive(Clone, Debug)]
pub struct Context {
    /// Its stage 2.
    pub stage2: Stage2,
    /// CNTVOFF_EL2: how far its virtual counter is behind the machine's.
    pub counter_offset: u64,
    /// Its list registers. What the guest makes of them is written here when it stops.
    pub interrupts: Interrupts,
}

/// Why the processor left the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exit {
    /// An interrupt is pending for the host.
    Interrupt,
    /// A synchronous exception.
    Exception {
        /// ESR_EL2.
        syndrome: u64,
        /// FAR_EL2.
        far: u64,
        /// HPFAR_EL2.
        hpfar: u64,
    },
}

/// Why the host gets the processor back: what the call to run a vCPU returns.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u64)]
pub enum Reason {
    /// An interrupt.
    Interrupt = 0,
    /// The guest touched what its stage 2 does not have. The record has syndrome and address.
    Abort = 1,
    /// The guest calls; the record has x0 to x3 and takes the answer.
    Call = 2,
    /// The guest waits for an interrupt.
    Wait = 3,
    /// Something that nobody emulates. The record has the syndrome's class.
    Unknown = 4,
}

/// ESR_EL2 of a data abort for a write to a page that level 3 does not map.
pub const WRITE_TO_NOTHING: u64 = class::DATA_ABORT << 26 | 1 << 25 | 1 << 6 | 0b000111;

/// The parts of an abort's syndrome that the host of a protected guest may see: class, length,
/// whether it was a write, a walk or a cache operation, and the fault's kind. Which register holds
/// the data is the guest's own business.
const ABORT_PARTS: u64 = 0x3f << 26 | 1 << 25 | 1 << 8 | 1 << 7 | 1 << 6 | 0x3f;

/// The calls of a protected guest (SPEC 2.13).
mod call {
    pub(super) const FEATURES: u64 = 0x8600_0000;
    pub(super) const HYP_MEMINFO: u64 = 0xc600_0002;
    pub(super) const MEM_SHARE: u64 = 0xc600_0003;
    pub(super) const MEM_UNSHARE: u64 = 0xc600_0004;
    /// Bits of the answer to FEATURES, by the calls' numbers.
    pub(super) const FEATURE_BITS: u64 = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 4;
    pub(super) const INVALID_PARAMETER: u64 = -3i64 as u64;
}

enum Answer {
    /// The hypervisor's answer, for x0.
    Done(u64),
    /// The host has to map a page first; then the guest asks again.
    NeedsPage(Gfn),
    /// Not the hypervisor's to answer.
    ForHost,
}

impl<P: Platform> Hypervisor<'_, P> {
    /// Runs the vCPU that this processor has loaded until the host is needed. `enter` runs the
    /// guest with the registers and returns when the processor leaves it.
    ///
    /// # Errors
    /// [`Error::Invalid`] with no vCPU loaded, and if the host's record wants what makes no sense;
    /// [`Error::NotPermitted`] for a [`Request`](crate::request::Request) that does not belong to
    /// what the guest stopped at.
    pub fn vcpu_run(
        &self,
        enter: &mut dyn FnMut(&mut Registers, &mut Context) -> Exit,
    ) -> Result<Reason, Error> {
        self.with_loaded(|vm, vcpu| {
            let record = HostVcpu::at(vcpu.host_vcpu)?;
            let mut inner = vcpu.inner.lock();
            let mut context = Context {
                stage2: self.stage2(vm),
                counter_offset: self.counter_offset(vm),
                interrupts: self.interrupts_from(record)?,
            };
            self.serve_request(vm, &mut inner, record)?;
            if core::mem::take(&mut inner.awaits_answer) {
                let answer = record.call(self.platform());
                inner.registers.x[..4].copy_from_slice(&answer);
            }
            self.trace(Event::HypExit, Cause::Guest as u64, 0);
            let reason = loop {
                let exit = enter(&mut inner.registers, &mut context);
                if let Some(reason) = self.left(vm, &mut inner, record, exit) {
                    break reason;
                }
            };
            self.trace(Event::HypEnter, Cause::Guest as u64, reason as u64);
            self.interrupts_to(record, &context.interrupts);
            let registers = &inner.registers.system;
            for (number, register) in [system::TIMER_CONTROL, system::TIMER_COMPARE]
                .into_iter()
                .enumerate()
            {
                let word = HostVcpu::TIMER + number;
                record.set_word(self.platform(), word, registers[register]);
            }
            Ok(reason)
        })
    }

    /// How far the virtual counter of ordinary guests is behind the machine's counter when they run
    /// on this processor. A protected guest's is not the host's to move.
    ///
    /// # Errors
    /// [`Error::Invalid`] on a processor that the hypervisor does not serve.
    pub fn set_counter_offset(&self, offset: u64) -> Result<(), Error> {
        let offsets = self.counter_offsets.get(self.platform().processor());
        let mine = offsets.ok_or(Error::Invalid)?;
        mine.store(offset, Ordering::Relaxed);
        Ok(())
    }

    fn counter_offset(&self, vm: &Vm) -> u64 {
        if vm.protected {
            return 0;
        }
        let offsets = self.counter_offsets.get(self.platform().processor());
        offsets.map_or(0, |mine| mine.load(Ordering::Relaxed))
    }

    fn stage2(&self, vm: &Vm) -> Stage2 {
        let guest = vm.guest.lock();
        Stage2 {
            vttbr: vttbr(guest.root().address(), vm.handle.vmid().0),
            vtcr: vtcr(guest.geometry(), self.caps),
        }
    }

    /// `None` if the guest goes on at once.
    fn left(&self, vm: &Vm, inner: &mut VcpuInner, record: HostVcpu, exit: Exit) -> Option<Reason> {
        inner.stopped = Stopped::Nothing;
        let Exit::Exception {
            syndrome,
            far,
            hpfar,
        } = exit
        else {
            return Some(Reason::Interrupt);
        };
        let platform = self.platform();
        match syndrome >> 26 & 0x3f {
            class::HVC | class::SMC => {
                if syndrome >> 26 & 0x3f == class::SMC {
                    // The trapped instruction has not been passed, as HVC's has.
                    inner.registers.pc = inner.registers.pc.wrapping_add(4);
                }
                let asked = [0, 1, 2, 3].map(|index| inner.registers.x[index]);
                match self.guest_call(vm, asked) {
                    Answer::Done(value) => {
                        inner.registers.x[..4].copy_from_slice(&[value, 0, 0, 0]);
                        None
                    }
                    Answer::NeedsPage(gfn) => {
                        inner.registers.pc = inner.registers.pc.wrapping_sub(4);
                        inner.fault = Some(gfn);
                        record.report(platform, WRITE_TO_NOTHING, gfn.address().get());
                        Some(Reason::Abort)
                    }
                    Answer::ForHost => {
                        record.set_call(platform, asked);
                        inner.awaits_answer = true;
                        Some(Reason::Call)
                    }
                }
            }
            class::INSTRUCTION_ABORT | class::DATA_ABORT => {
                // HPFAR_EL2 has the page's address, bits 51:12, in bits 43:4.
                let address = (hpfar >> 4 & ((1 << 40) - 1)) << 12 | far & (PAGE_SIZE - 1);
                inner.fault = Some(Gfn::new(address / PAGE_SIZE));
                inner.stopped = Stopped::at_abort(syndrome, far);
                if vm.protected {
                    let page = address & !(PAGE_SIZE - 1);
                    record.report(platform, syndrome & ABORT_PARTS, page);
                } else {
                    record.report(platform, syndrome, address);
                    if let Some(data) = inner.stopped.written(&inner.registers) {
                        record.set_word(platform, HostVcpu::DATA, data);
                    }
                }
                Some(Reason::Abort)
            }
            class::WAIT => {
                inner.registers.pc = inner.registers.pc.wrapping_add(4);
                Some(Reason::Wait)
            }
            class => {
                inner.stopped = Stopped::Unknown;
                record.report(platform, class << 26, 0);
                Some(Reason::Unknown)
            }
        }
    }

    /// A call of the guest: function and three arguments.
    fn guest_call(&self, vm: &Vm, asked: [u64; 4]) -> Answer {
        if !vm.protected {
            return Answer::ForHost;
        }
        // A 32-bit function number is in w0.
        let function = asked[0] & 0xffff_ffff;
        let invalid = Answer::Done(call::INVALID_PARAMETER);
        match function {
            call::FEATURES => Answer::Done(call::FEATURE_BITS),
            call::HYP_MEMINFO => match asked {
                [_, 0, 0, 0] => Answer::Done(PAGE_SIZE),
                _ => invalid,
            },
            call::MEM_SHARE | call::MEM_UNSHARE => {
                let [_, address, 0, 0] = asked else {
                    return invalid;
                };
                if !address.is_multiple_of(PAGE_SIZE) {
                    return invalid;
                }
                let gfn = Gfn::new(address / PAGE_SIZE);
                let result = if function == call::MEM_SHARE {
                    self.guest_share_host(vm, gfn)
                } else {
                    self.guest_unshare_host(vm, gfn)
                };
                match result {
                    Ok(()) => Answer::Done(0),
                    Err(Error::NotFound) if function == call::MEM_SHARE => Answer::NeedsPage(gfn),
                    Err(_) => invalid,
                }
            }
            _ => Answer::ForHost,
        }
    }
}
