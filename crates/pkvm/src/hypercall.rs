//! What the host asks: SMCCC calls of the vendor-hypervisor range.
//!
//! x0 has the function number, x1 on the arguments; x0 comes back as 0 or NOT_SUPPORTED, x1 with
//! the result: 0 or more, or a negative error number (SPEC 2.8). Every argument is the host's to
//! choose and is taken from the registers once.

use crate::error::Error;
use crate::hypervisor::Hypervisor;
use crate::page::Pages;
use crate::platform::Platform;
use crate::run::{Exit, Stage2};
use crate::vm::{Handle, Registers};
use twofold_arch::{Gfn, Hfn, Hpa};

/// Fast, 64-bit, vendor-specific hypervisor service.
pub const FUNCTION_BASE: u64 = 0xc600_0000;
/// SMCCC: the function is not there.
pub const NOT_SUPPORTED: u64 = -1i64 as u64;
/// Registers that a call may use: x0 to x5.
pub const REGISTERS: usize = 6;

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
    /// Checks that the hypervisor is there; only before the first [`Call::ProtFinalize`].
    Init = 0, "pkvm_init";
    /// This processor runs below the host's stage 2 from now on.
    ProtFinalize = 16, "prot_finalize";
    /// Runs the loaded vCPU; returns a [`Reason`](crate::run::Reason).
    VcpuRun = 17, "vcpu_run";
    /// (page)
    ShareHyp = 32, "share_hyp";
    /// (page)
    UnshareHyp = 33, "unshare_hyp";
    /// (page, gfn)
    DonateGuest = 34, "donate_guest";
    /// (page, gfn, pages, access)
    ShareGuest = 35, "share_guest";
    /// (handle, gfn, pages)
    UnshareGuest = 36, "unshare_guest";
    /// (gfn, access)
    RelaxPermsGuest = 37, "relax_perms_guest";
    /// (handle, gfn, pages)
    WrprotectGuest = 38, "wrprotect_guest";
    /// (handle, gfn, pages, clear)
    TestClearYoungGuest = 39, "test_clear_young_guest";
    /// (gfn)
    MkyoungGuest = 40, "mkyoung_guest";
    /// (host_vm): a handle
    ReserveVm = 41, "reserve_vm";
    /// (handle)
    UnreserveVm = 42, "unreserve_vm";
    /// (host_vm, area page, root page): the handle
    InitVm = 43, "init_vm";
    /// (handle, host_vcpu, area page)
    InitVcpu = 44, "init_vcpu";
    /// (): 1 if the last fault met a page that was taken by force
    VcpuInPoisonFault = 45, "vcpu_in_poison_fault";
    /// (page)
    ForceReclaimGuestPage = 46, "force_reclaim_guest_page";
    /// (handle, gfn)
    ReclaimDyingGuestPage = 47, "reclaim_dying_guest_page";
    /// (handle)
    StartTeardownVm = 48, "start_teardown_vm";
    /// (handle)
    FinalizeTeardownVm = 49, "finalize_teardown_vm";
    /// (handle, index)
    VcpuLoad = 50, "vcpu_load";
    /// ()
    VcpuPut = 51, "vcpu_put";
    /// (handle)
    TlbFlushVmid = 52, "tlb_flush_vmid";
    /// (page, pages): to the secure world; stands for the FF-A proxy
    ShareFfa = 53, "ffa_mem_share";
    /// (page, pages)
    UnshareFfa = 54, "ffa_mem_reclaim";
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

    /// Whether it needs the host below its own stage 2.
    const fn needs_protection(self) -> bool {
        self as u16 > Self::ProtFinalize as u16
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
        enter: &mut dyn FnMut(&mut Registers, Stage2) -> Exit,
    ) {
        let [function, a, b, c, d, _] = *x;
        *x = [0; REGISTERS];
        let call = Call::of_function(function).filter(|call| {
            let finalised = self.is_finalised();
            !(call.is_early() && finalised || call.needs_protection() && !finalised)
        });
        let Some(call) = call else {
            x[0] = NOT_SUPPORTED;
            return;
        };
        x[1] = match self.answer(call, [a, b, c, d], enter) {
            Ok(value) => value,
            Err(error) => error.code() as u64,
        };
    }

    fn answer(
        &self,
        call: Call,
        [a, b, c, d]: [u64; 4],
        enter: &mut dyn FnMut(&mut Registers, Stage2) -> Exit,
    ) -> Result<u64, Error> {
        let page = |number| Hfn::new(number);
        let frame = |number| Gfn::new(number);
        let pages = |start, count| Pages {
            start: Hfn::new(start),
            count,
        };
        match call {
            Call::Init => Ok(0),
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
            Call::TlbFlushVmid => done(self.flush_guest(handle(a)?)),
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
        for function in [0, 0xc5ff_ffff, 0xc600_0001, 0x8600_0000, u64::MAX] {
            assert_eq!(Call::of_function(function), None);
        }
    }
}
