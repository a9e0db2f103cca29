//! Running a vCPU: what the guest asks is answered here if it is the hypervisor's to answer; the
//! host sees the rest, and of a protected guest only what it needs to serve it.

use crate::error::Error;
use crate::hypervisor::Hypervisor;
use crate::platform::Platform;
use crate::shared::HostVcpu;
use crate::vm::{Registers, Vcpu, VcpuInner, Vm};
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

/// Exception classes of ESR_EL2.
mod class {
    pub(super) const WAIT: u64 = 0x01;
    pub(super) const HVC: u64 = 0x16;
    pub(super) const SMC: u64 = 0x17;
    pub(super) const INSTRUCTION_ABORT: u64 = 0x20;
    pub(super) const DATA_ABORT: u64 = 0x24;
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
    /// [`Error::Invalid`] with no vCPU loaded.
    pub fn vcpu_run(
        &self,
        enter: &mut dyn FnMut(&mut Registers, Stage2) -> Exit,
    ) -> Result<Reason, Error> {
        self.with_loaded(|vm, vcpu| {
            let record = HostVcpu::at(vcpu.host_vcpu)?;
            let stage2 = self.stage2(vm);
            let mut inner = vcpu.inner.lock();
            if core::mem::take(&mut inner.awaits_answer) {
                let answer = record.call(self.platform());
                inner.registers.x[..4].copy_from_slice(&answer);
            }
            loop {
                let exit = enter(&mut inner.registers, stage2);
                if let Some(reason) = self.left(vm, vcpu, &mut inner, record, exit) {
                    return Ok(reason);
                }
            }
        })
    }

    fn stage2(&self, vm: &Vm) -> Stage2 {
        let guest = vm.guest.lock();
        Stage2 {
            vttbr: vttbr(guest.root().address(), vm.handle.vmid().0),
            vtcr: vtcr(guest.geometry(), self.caps),
        }
    }

    /// `None` if the guest goes on at once.
    fn left(
        &self,
        vm: &Vm,
        _vcpu: &Vcpu,
        inner: &mut VcpuInner,
        record: HostVcpu,
        exit: Exit,
    ) -> Option<Reason> {
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
                if vm.protected {
                    let page = address & !(PAGE_SIZE - 1);
                    record.report(platform, syndrome & ABORT_PARTS, page);
                } else {
                    record.report(platform, syndrome, address);
                }
                Some(Reason::Abort)
            }
            class::WAIT => {
                inner.registers.pc = inner.registers.pc.wrapping_add(4);
                Some(Reason::Wait)
            }
            class => {
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
