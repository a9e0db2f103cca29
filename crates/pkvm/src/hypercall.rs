//! What the host asks: SMCCC calls of the vendor-hypervisor range.
//!
//! x0 has the function number, x1 on the arguments; x0 comes back as 0 or NOT_SUPPORTED, x1 with
//! the result: 0 or more, or a negative error number (SPEC 2.8). Every argument is the host's to
//! choose and is taken from the registers once.

use crate::error::Error;
use crate::flush::Reach;
use crate::hypervisor::Hypervisor;
use crate::page::Pages;
use crate::platform::Platform;
use crate::run::{Context, Exit};
use crate::trace::{Cause, Event};
use crate::vm::{Handle, Registers};
use twofold_arch::{Gfn, Hfn, Hpa};

/// Fast, 64-bit, vendor-specific hypervisor service.
pub const FUNCTION_BASE: u64 = 0xc600_0000;
/// SMCCC: the function is not there.
pub const NOT_SUPPORTED: u64 = -1i64 as u64;
/// Registers that a call may use: x0 to x5.
pub const REGISTERS: usize = 6;
/// SMCCC: the caller has nothing in its SVE registers. No part of the function.
const HINTS: u64 = 1 << 16;

macro_rules! calls {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $text:literal;)*) => {
        /// The calls, by number.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[repr(u16)]
        pub enum Call {
            $($(#[$doc])* $name = $number,)*
        }

        impl Call {
            /// Every call.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The call with a function number.
            pub const fn of_function(function: u64) -> Option<Self> {
                match function.wrapping_sub(FUNCTION_BASE) {
                    $($number => Some(Self::$name),)*
                    _ => None,
                }
            }

            /// What upstream calls it.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }
        }
    };
}

calls! {
    /// Checks that the hypervisor is there; this call and the next five only before the first
    /// [`Call::ProtFinalize`].
    Init = 0, "pkvm_init";
    /// (address, bytes, access): where EL2 has mapped the device
    CreatePrivateMapping = 1, "create_private_mapping";
    /// (way): how exceptions reach EL2 on this processor
    CpuSetVector = 2, "cpu_set_vector";
    /// (): speculative store bypass safe at EL2
    EnableSsbs = 3, "enable_ssbs";
    /// (): empties this processor's list registers
    VgicV3InitLrs = 4, "vgic_v3_init_lrs";
    /// (): ICH_VTR_EL2
    VgicV3GetGicConfig = 5, "vgic_v3_get_gic_config";
    /// This processor runs below the host's stage 2 from now on.
    ProtFinalize = 16, "prot_finalize";
    /// (host_vcpu): does at once what the record asks
    AdjustPc = 17, "adjust_pc";
    /// Runs the loaded vCPU; returns a [`Reason`](crate::run::Reason).
    VcpuRun = 18, "vcpu_run";
    /// (): every translation below EL2, everywhere
    FlushVmContext = 19, "flush_vm_context";
    /// (handle, address, level)
    TlbFlushVmidIpa = 20, "tlb_flush_vmid_ipa";
    /// (handle, address, level): on this processor
    TlbFlushVmidIpaNsh = 21, "tlb_flush_vmid_ipa_nsh";
    /// (handle)
    TlbFlushVmid = 22, "tlb_flush_vmid";
    /// (handle, address, pages)
    TlbFlushVmidRange = 23, "tlb_flush_vmid_range";
    /// (handle): everything of the VM, on this processor
    FlushCpuContext = 24, "flush_cpu_context";
    /// (offset): of ordinary guests' virtual counters, on this processor
    TimerSetCntvoff = 25, "timer_set_cntvoff";
    /// (description, bytes)
    TracingLoad = 26, "tracing_load";
    /// ()
    TracingUnload = 27, "tracing_unload";
    /// (whether)
    TracingEnable = 28, "tracing_enable";
    /// (processor): which page of its ring is the reader's now
    TracingSwapReader = 29, "tracing_swap_reader";
    /// (multiplier, shift, epoch in nanoseconds, epoch of the counter)
    TracingUpdateClock = 30, "tracing_update_clock";
    /// (processor)
    TracingReset = 31, "tracing_reset";
    /// (event, whether)
    TracingEnableEvent = 32, "tracing_enable_event";
    /// (anything): an event of the host's own
    TracingWriteEvent = 33, "tracing_write_event";
    /// (host_vcpu)
    VgicV3SaveAprs = 34, "vgic_v3_save_aprs";
    /// (host_vcpu)
    VgicV3RestoreVmcrAprs = 35, "vgic_v3_restore_vmcr_aprs";
    /// Not supported: there is no GICv5.
    VgicV5SaveApr = 36, "vgic_v5_save_apr";
    /// Not supported: there is no GICv5.
    VgicV5RestoreVmcrApr = 37, "vgic_v5_restore_vmcr_apr";
    /// (page)
    ShareHyp = 64, "share_hyp";
    /// (page)
    UnshareHyp = 65, "unshare_hyp";
    /// (page, gfn)
    DonateGuest = 66, "donate_guest";
    /// (page, gfn, pages, access)
    ShareGuest = 67, "share_guest";
    /// (handle, gfn, pages)
    UnshareGuest = 68, "unshare_guest";
    /// (gfn, access)
    RelaxPermsGuest = 69, "relax_perms_guest";
    /// (handle, gfn, pages)
    WrprotectGuest = 70, "wrprotect_guest";
    /// (handle, gfn, pages, clear)
    TestClearYoungGuest = 71, "test_clear_young_guest";
    /// (gfn)
    MkyoungGuest = 72, "mkyoung_guest";
    /// (host_vm): a handle
    ReserveVm = 73, "reserve_vm";
    /// (handle)
    UnreserveVm = 74, "unreserve_vm";
    /// (host_vm, area page, root page): the handle
    InitVm = 75, "init_vm";
    /// (handle, host_vcpu, area page)
    InitVcpu = 76, "init_vcpu";
    /// (): 1 if the last fault met a page that was taken by force
    VcpuInPoisonFault = 77, "vcpu_in_poison_fault";
    /// (page)
    ForceReclaimGuestPage = 78, "force_reclaim_guest_page";
    /// (handle, gfn)
    ReclaimDyingGuestPage = 79, "reclaim_dying_guest_page";
    /// (handle)
    StartTeardownVm = 80, "start_teardown_vm";
    /// (handle)
    FinalizeTeardownVm = 81, "finalize_teardown_vm";
    /// (handle, index)
    VcpuLoad = 82, "vcpu_load";
    /// ()
    VcpuPut = 83, "vcpu_put";
    /// (handle)
    PkvmTlbFlushVmid = 84, "pkvm_tlb_flush_vmid";
    /// (page, pages): to the secure world; stands for the FF-A proxy
    ShareFfa = 85, "ffa_mem_share";
    /// (page, pages)
    UnshareFfa = 86, "ffa_mem_reclaim";
}

impl Call {
    /// The function number.
    pub const fn function(self) -> u64 {
        FUNCTION_BASE + self as u64
    }

    /// Whether it is over once a processor has finalised.
    const fn is_early(self) -> bool {
        (self as u16) < Self::ProtFinalize as u16
    }

    /// Whether it is there only once a processor has finalised.
    const fn needs_protection(self) -> bool {
        self as u16 >= Self::ShareHyp as u16
    }
}

fn handle(number: u64) -> Result<Handle, Error> {
    Handle::new(number).ok_or(Error::Invalid)
}

fn done(result: Result<(), Error>) -> Result<u64, Error> {
    result.map(|()| 0)
}

impl<P: Platform> Hypervisor<'_, P> {
    /// Answers a call of the host. `x` are its first registers; `enter` runs a guest (see
    /// [`vcpu_run`](Self::vcpu_run)).
    pub fn hypercall(
        &self,
        x: &mut [u64; REGISTERS],
        enter: &mut dyn FnMut(&mut Registers, &mut Context) -> Exit,
    ) {
        let [function, a, b, c, d, _] = *x;
        self.trace(Event::HypEnter, Cause::Hypercall as u64, 0);
        *x = [0; REGISTERS];
        match Call::of_function(function & !HINTS).filter(|call| self.is_offered(*call)) {
            Some(call) => {
                x[1] = match self.answer(call, [a, b, c, d], enter) {
                    Ok(value) => value,
                    Err(error) => error.code() as u64,
                };
            }
            None => x[0] = NOT_SUPPORTED,
        }
        self.trace(Event::HostHcall, function, x[1]);
        self.trace(Event::HypExit, Cause::Hypercall as u64, 0);
    }

    /// Whether a call is there now, on this machine.
    fn is_offered(&self, call: Call) -> bool {
        let finalised = self.is_finalised();
        if call.is_early() && finalised || call.needs_protection() && !finalised {
            return false;
        }
        match call {
            Call::EnableSsbs => self.platform().has_ssbs(),
            Call::VgicV3InitLrs
            | Call::VgicV3GetGicConfig
            | Call::VgicV3SaveAprs
            | Call::VgicV3RestoreVmcrAprs => self.platform().virtual_gic().is_some(),
            Call::VgicV5SaveApr | Call::VgicV5RestoreVmcrApr => false,
            _ => true,
        }
    }

    fn answer(
        &self,
        call: Call,
        [a, b, c, d]: [u64; 4],
        enter: &mut dyn FnMut(&mut Registers, &mut Context) -> Exit,
    ) -> Result<u64, Error> {
        let page = |number| Hfn::new(number);
        let frame = |number| Gfn::new(number);
        let pages = |start, count| Pages {
            start: Hfn::new(start),
            count,
        };
        match call {
            // Not offered.
            Call::VgicV5SaveApr | Call::VgicV5RestoreVmcrApr => Err(Error::NoDevice),
            Call::Init => Ok(0),
            Call::CreatePrivateMapping => self.create_private_mapping(a, b, c),
            Call::CpuSetVector => done(self.set_vectors(a)),
            Call::EnableSsbs => {
                self.platform().enable_ssbs();
                Ok(0)
            }
            Call::VgicV3InitLrs => {
                self.clear_list_registers();
                Ok(0)
            }
            Call::VgicV3GetGicConfig => Ok(self.gic_config()),
            Call::AdjustPc => done(self.adjust_pc(Hpa::new(a))),
            Call::FlushVmContext => {
                self.flush_everything();
                Ok(0)
            }
            Call::TlbFlushVmidIpa => {
                done(self.flush_guest_ipa(handle(a)?, b, c, Reach::Everywhere))
            }
            Call::TlbFlushVmidIpaNsh => done(self.flush_guest_ipa(handle(a)?, b, c, Reach::Here)),
            Call::TlbFlushVmid | Call::PkvmTlbFlushVmid => done(self.flush_guest(handle(a)?)),
            Call::TlbFlushVmidRange => done(self.flush_guest_range(handle(a)?, b, c)),
            Call::FlushCpuContext => done(self.forget_guest_here(handle(a)?)),
            Call::TimerSetCntvoff => done(self.set_counter_offset(a)),
            Call::TracingLoad => done(self.tracing_load(Hpa::new(a), b)),
            Call::TracingUnload => {
                self.tracing_unload();
                Ok(0)
            }
            Call::TracingEnable => done(self.tracing_enable(a != 0)),
            Call::TracingSwapReader => self.tracing_swap_reader(a).map(|page| page as u64),
            Call::TracingUpdateClock => done(self.tracing_update_clock(a, b, c, d)),
            Call::TracingReset => done(self.tracing_reset(a)),
            Call::TracingEnableEvent => done(self.tracing_enable_event(a, b != 0)),
            Call::TracingWriteEvent => {
                self.trace(Event::Selftest, a, 0);
                Ok(0)
            }
            Call::VgicV3SaveAprs => done(self.save_interface(Hpa::new(a))),
            Call::VgicV3RestoreVmcrAprs => done(self.restore_interface(Hpa::new(a))),
            Call::ProtFinalize => done(self.finalise()),
            Call::VcpuRun => self.vcpu_run(enter).map(|reason| reason as u64),
            Call::ShareHyp => done(self.host_share_hyp(page(a))),
            Call::UnshareHyp => done(self.host_unshare_hyp(page(a))),
            Call::DonateGuest => done(self.donate_guest(page(a), frame(b))),
            Call::ShareGuest => done(self.share_guest(pages(a, c), frame(b), d)),
            Call::UnshareGuest => done(self.unshare_guest(handle(a)?, frame(b), c)),
            Call::RelaxPermsGuest => done(self.relax_perms_guest(frame(a), b)),
            Call::WrprotectGuest => done(self.wrprotect_guest(handle(a)?, frame(b), c)),
            Call::TestClearYoungGuest => self
                .test_clear_young_guest(handle(a)?, frame(b), c, d != 0)
                .map(u64::from),
            Call::MkyoungGuest => done(self.make_young_guest(frame(a))),
            Call::ReserveVm => self
                .reserve_vm(Hpa::new(a))
                .map(|handle| u64::from(handle.get())),
            Call::UnreserveVm => done(self.unreserve_vm(handle(a)?)),
            Call::InitVm => self
                .init_vm(Hpa::new(a), page(b), page(c))
                .map(|handle| u64::from(handle.get())),
            Call::InitVcpu => done(self.init_vcpu(handle(a)?, Hpa::new(b), page(c))),
            Call::VcpuInPoisonFault => self.vcpu_in_poison_fault().map(u64::from),
            Call::ForceReclaimGuestPage => done(self.force_reclaim_guest_page(page(a))),
            Call::ReclaimDyingGuestPage => {
                done(self.reclaim_dying_guest_page(handle(a)?, frame(b)))
            }
            Call::StartTeardownVm => done(self.start_teardown_vm(handle(a)?)),
            Call::FinalizeTeardownVm => done(self.finalize_teardown_vm(handle(a)?)),
            Call::VcpuLoad => done(self.vcpu_load(handle(a)?, b)),
            Call::VcpuPut => done(self.vcpu_put()),
            Call::ShareFfa => done(self.host_share_ffa(pages(a, b))),
            Call::UnshareFfa => done(self.host_unshare_ffa(pages(a, b))),
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_names_are_each_used_once() {
        for (index, call) in Call::ALL.iter().enumerate() {
            assert_eq!(Call::of_function(call.function()), Some(*call));
            for other in &Call::ALL[..index] {
                assert_ne!(call.name(), other.name());
                assert!((*other as u16) < *call as u16, "in order");
            }
        }
        for function in [0, 0xc5ff_ffff, 0xc600_0006, 0x8600_0000, u64::MAX] {
            assert_eq!(Call::of_function(function), None);
        }
    }
}
