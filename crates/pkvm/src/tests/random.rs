//! Random calls: whatever the host and its guests do, every page stays in a legal state, and
//! everything comes back in the end.

use super::setting::*;
use crate::hypercall::{Call, FUNCTION_BASE, REGISTERS};
use crate::page::State;
use crate::run::Exit;
use crate::shared::HostVcpu;
use crate::testing::{Accesses, Ram};
use crate::vm::Handle;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::sync::atomic::Ordering::SeqCst;
use twofold_arch::{Gfn, Hfn};

const VMS: u64 = 3;
const PAGES: u64 = 256;
/// A description of one ring of two pages.
const RING_BYTES: u64 = 32;

fn place(number: u64) -> Place {
    Place(72 + 8 * number)
}

#[derive(Clone, Copy, Debug)]
struct Asked {
    call: usize,
    vm: u64,
    page: u64,
    gfn: u64,
    odd: u64,
}

fn asked() -> impl Strategy<Value = Asked> {
    // Few pages and frames, so that calls meet.
    let odd =
        prop_oneof![8 => Just(0u64), 1 => any::<u64>(), 1 => (0u64..64).prop_map(|bit| 1 << bit)];
    (
        0..Call::ALL.len() + 6,
        0..VMS + 1,
        100u64..124,
        0u64..6,
        odd,
    )
        .prop_map(|(call, vm, page, gfn, odd)| Asked {
            call,
            vm,
            page,
            gfn,
            odd,
        })
}

struct World<'m> {
    hyp: Hyp<'m>,
    /// Where each guest's calls go.
    guest_asks: [u64; 4],
    seen: u64,
}

impl World<'_> {
    fn handle(&self, vm: u64) -> u64 {
        0x1000 + vm
    }

    fn call(&mut self, call: Call, arguments: [u64; 4]) -> (u64, i64) {
        let [a, b, c, d] = arguments;
        let mut x: [u64; REGISTERS] = [call.function(), a, b, c, d, 0];
        let asks = self.guest_asks;
        let mut exits = 0;
        self.hyp.hypercall(&mut x, &mut |registers, _| {
            exits += 1;
            if exits == 1 {
                registers.x[..4].copy_from_slice(&asks);
                return Exit::Exception {
                    syndrome: 0x16 << 26,
                    far: 0,
                    hpfar: 0,
                };
            }
            Exit::Interrupt
        });
        (x[0], x[1] as i64)
    }

    fn step(&mut self, asked: Asked) {
        let Asked {
            call,
            vm,
            page,
            gfn,
            odd,
        } = asked;
        self.seen += 1;
        let number = Ram::page(page).get() ^ odd;
        let handle = self.handle(vm);
        let gfn = gfn ^ odd.rotate_left(7);
        let spot = place(vm.min(VMS - 1));
        self.guest_asks = [0xc600_0003 + (page & 1), gfn << 12, 0, 0];
        let Some(&call) = Call::ALL.get(call) else {
            // The host fills its records, if it may, with what makes sense and what does not.
            if self.hyp.host_reaches(spot.record_page()) {
                let words = vm_words(handle ^ odd, 1 + (odd & 1), vm != 1);
                self.hyp.host_writes(spot.host_vm(), &words);
                let stock: Vec<Hfn> = (page..page + 3)
                    .map(Ram::page)
                    .filter(|&page| self.hyp.host_reaches(page))
                    .collect();
                fill_vcpu(&self.hyp, spot, 0, &stock);
                self.fill_beside(spot, gfn, odd);
            }
            return;
        };
        let arguments = match call {
            Call::Init | Call::ProtFinalize | Call::VcpuRun | Call::VcpuPut => [odd; 4],
            Call::VcpuInPoisonFault => [odd; 4],
            Call::ShareHyp | Call::UnshareHyp if page % 3 == 0 => {
                [spot.record_page().get() ^ odd, 0, 0, 0]
            }
            Call::ShareHyp | Call::UnshareHyp | Call::ForceReclaimGuestPage => [number, 0, 0, 0],
            Call::DonateGuest => [number, gfn, 0, 0],
            Call::ShareGuest => [number, gfn, 1 ^ odd, 7 ^ odd],
            Call::UnshareGuest | Call::WrprotectGuest | Call::TestClearYoungGuest => {
                [handle, gfn, 1, page & 1]
            }
            Call::RelaxPermsGuest | Call::MkyoungGuest => [gfn, 7, 0, 0],
            Call::ReserveVm => [spot.host_vm().get() ^ odd, 0, 0, 0],
            Call::UnreserveVm => [handle ^ odd, 0, 0, 0],
            Call::InitVm => [
                spot.host_vm().get() ^ odd,
                spot.area().get(),
                spot.root().get() ^ odd,
                0,
            ],
            Call::InitVcpu => [
                handle,
                spot.host_vcpu(0).get() ^ odd,
                spot.vcpu_area(0).get(),
                0,
            ],
            Call::ReclaimDyingGuestPage => [handle, gfn, 0, 0],
            Call::StartTeardownVm
            | Call::FinalizeTeardownVm
            | Call::TlbFlushVmid
            | Call::PkvmTlbFlushVmid
            | Call::FlushCpuContext => [handle ^ odd, 0, 0, 0],
            Call::TlbFlushVmidIpa | Call::TlbFlushVmidIpaNsh | Call::TlbFlushVmidRange => {
                [handle, gfn << 12, odd & 3, 0]
            }
            Call::AdjustPc | Call::VgicV3SaveAprs | Call::VgicV3RestoreVmcrAprs => {
                [spot.host_vcpu(0).get() ^ odd, 0, 0, 0]
            }
            Call::TracingLoad => [spot.ring_description().get(), RING_BYTES ^ odd, 0, 0],
            Call::TracingEnable
            | Call::TracingSwapReader
            | Call::TracingReset
            | Call::TracingEnableEvent => [(page % 5) ^ odd, 1, 0, 0],
            Call::CreatePrivateMapping
            | Call::CpuSetVector
            | Call::EnableSsbs
            | Call::VgicV3InitLrs
            | Call::VgicV3GetGicConfig
            | Call::FlushVmContext
            | Call::TimerSetCntvoff
            | Call::TracingUnload
            | Call::TracingUpdateClock
            | Call::TracingWriteEvent
            | Call::VgicV5SaveApr
            | Call::VgicV5RestoreVmcrApr => [odd; 4],
            Call::VcpuLoad => [handle, odd, 0, 0],
            Call::ShareFfa | Call::UnshareFfa => [number, 1 + (odd & 3), 0, 0],
        };
        self.call(call, arguments);
    }

    /// The words that say what a guest runs with, and those that describe rings of events.
    fn fill_beside(&mut self, spot: Place, gfn: u64, odd: u64) {
        for (word, value) in [
            (HostVcpu::REQUEST, gfn),
            (HostVcpu::GIC_CONTROL, 1 ^ odd & 0xff00),
            (HostVcpu::LISTS_USED, gfn ^ odd),
            (HostVcpu::LISTS, odd),
        ] {
            set_word(&self.hyp, spot.host_vcpu(0), word, value);
        }
        let [first, second] = spot.ring_pages().map(Hfn::get);
        for page in [first, second] {
            self.call(Call::ShareHyp, [page, 0, 0, 0]);
        }
        let words = [1, 2, first, second ^ odd];
        self.hyp.host_writes(spot.ring_description(), &words);
    }

    /// The joint states, and that guests and records agree page by page.
    fn check(&self) {
        self.hyp
            .audit()
            .unwrap_or_else(|violation| panic!("{violation}"));
        let mut borrowed: BTreeMap<Hfn, u32> = BTreeMap::new();
        for number in 0..8 {
            let handle = Handle::new(0x1000 + number).unwrap();
            let _ = self.hyp.guest_pages(handle, |_, page, state| {
                if state == State::SharedBorrowed {
                    *borrowed.entry(page).or_default() += 1;
                }
            });
        }
        for number in 0..PAGES {
            let page = Ram::page(number);
            let record = self.hyp.pages().record(page).unwrap();
            let expected = borrowed.get(&page).copied().unwrap_or(0);
            assert_eq!(record.shares(), expected, "page {page}");
            let hosts = !matches!(record.host(), State::NoPage);
            assert_eq!(self.hyp.host_reaches(page), hosts, "page {page}");
            let at_el2 = record.hyp() == State::Owned
                || record.hyp() == State::SharedBorrowed && record.count() > 0;
            assert_eq!(
                self.hyp.platform().is_mapped(page),
                at_el2,
                "page {page} at EL2"
            );
        }
    }

    /// Ends everything; every page must be the host's again.
    fn finish(&mut self) {
        let _ = self.hyp.vcpu_put();
        self.hyp.tracing_unload();
        for number in 0..255 {
            let handle = Handle::new(0x1000 + number).unwrap();
            let _ = self.hyp.unreserve_vm(handle);
            let mut pages: Vec<(Gfn, Hfn, State)> = Vec::new();
            if self
                .hyp
                .guest_pages(handle, |gfn, page, state| pages.push((gfn, page, state)))
                .is_err()
            {
                continue;
            }
            let _ = self.hyp.start_teardown_vm(handle);
            for (gfn, page, state) in pages {
                match state {
                    State::SharedBorrowed => self.hyp.unshare_guest(handle, gfn, 1).unwrap(),
                    _ => {
                        // A secret that must not outlive the guest, unless it was lent.
                        self.hyp.platform().word(page, 5).store(0x5ec2e7, SeqCst);
                        self.hyp.reclaim_dying_guest_page(handle, gfn).unwrap();
                        if state == State::Owned {
                            assert!(self.hyp.platform().is_zero(page));
                        }
                    }
                }
            }
            self.hyp.finalize_teardown_vm(handle).unwrap();
        }
        for number in 64..PAGES {
            let page = Ram::page(number);
            let one = crate::page::Pages::one(page);
            let _ = self.hyp.host_unshare_hyp(page);
            let _ = self.hyp.host_unshare_ffa(one);
            let record = self.hyp.pages().record(page).unwrap();
            assert!(record.is_untouched(), "page {page} is lost: {record:?}");
            assert!(self.hyp.host_reaches(page));
        }
        self.check();
    }
}

fn cases() -> u32 {
    std::env::var("TWOFOLD_FUZZ_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok())
        .unwrap_or(48)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases()))]

    #[test]
    fn no_sequence_of_calls_breaks_a_joint_state_or_loses_a_page(
        complete in any::<bool>(),
        steps in proptest::collection::vec(asked(), 1..120),
    ) {
        let ram = Ram::new(PAGES, 64);
        let hyp = ram.boot();
        hyp.finalise().unwrap();
        if complete {
            // VMs that are there from the start, so that the calls go further.
            for vm in 0..VMS {
                let stock = [200 + 3 * vm, 201 + 3 * vm].map(Ram::page);
                start(&hyp, place(vm), vm != 1, &stock);
            }
            hyp.vcpu_load(Handle::new(0x1000).unwrap(), 0).unwrap();
        }
        let mut world = World { hyp, guest_asks: [0; 4], seen: 0 };
        for (number, asked) in steps.into_iter().enumerate() {
            world.step(asked);
            if number % 8 == 0 {
                world.check();
            }
        }
        world.check();
        world.finish();
    }

    #[test]
    fn numbers_that_mean_nothing_change_nothing_that_they_should_not(
        calls in proptest::collection::vec(
            (prop_oneof![any::<u64>(), FUNCTION_BASE..FUNCTION_BASE + 96], any::<[u64; 5]>()),
            1..60,
        ),
        exits in proptest::collection::vec((any::<u64>(), any::<u64>(), any::<u64>()), 1..20),
    ) {
        let ram = Ram::new(PAGES, 64);
        let hyp = ram.boot();
        hyp.finalise().unwrap();
        let handle = start(&hyp, place(0), true, &[Ram::page(200), Ram::page(201)]);
        hyp.vcpu_load(handle, 0).unwrap();
        for (function, [a, b, c, d, e]) in calls {
            let mut left = exits.clone();
            let mut x = [function, a, b, c, d, e];
            hyp.hypercall(&mut x, &mut |registers, _| match left.pop() {
                Some((syndrome, far, hpfar)) => {
                    registers.x[0] = far;
                    registers.x[1] = hpfar;
                    Exit::Exception { syndrome, far, hpfar }
                }
                None => Exit::Interrupt,
            });
            prop_assert_eq!(&x[2..], &[0; 4]);
        }
        hyp.audit().unwrap();
    }
}
