//! A host with VMs, for the tests.

#![cfg_attr(loom, allow(dead_code, reason = "the models use less of it"))]

use crate::error::Error;
use crate::hypervisor::Hypervisor;
use crate::run::{Exit, Stage2};
use crate::shared::HostVm;
use crate::testing::{Accesses, Machine, Ram};
use crate::vm::Handle;
use twofold_arch::{Hfn, Hpa};

pub(crate) type Hyp<'m> = Hypervisor<'m, Machine<'m>>;

/// Where the host keeps what belongs to one VM: eight pages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place(pub(crate) u64);

impl Place {
    pub(crate) fn host_vm(self) -> Hpa {
        Ram::page(self.0).address()
    }

    pub(crate) fn host_vcpu(self, index: u64) -> Hpa {
        Hpa::new(self.host_vm().get() + 512 + index * 512)
    }

    pub(crate) fn area(self) -> Hfn {
        Ram::page(self.0 + 1)
    }

    pub(crate) fn root(self) -> Hfn {
        Ram::page(self.0 + 2)
    }

    pub(crate) fn vcpu_area(self, index: u64) -> Hfn {
        Ram::page(self.0 + 3 + index)
    }

    pub(crate) fn record_page(self) -> Hfn {
        Ram::page(self.0)
    }

    /// Where the host describes rings of events, in the records' page.
    pub(crate) fn ring_description(self) -> Hpa {
        Hpa::new(self.host_vm().get() + 3072)
    }

    /// Pages for such a ring.
    pub(crate) fn ring_pages(self) -> [Hfn; 2] {
        [Ram::page(self.0 + 6), Ram::page(self.0 + 7)]
    }
}

/// The IPA size of the tests' VMs: one root page.
pub(crate) const IPA_BITS: u64 = 35;

/// The words of a VM's record.
pub(crate) fn vm_words(handle: u64, vcpus: u64, protected: bool) -> [u64; 8] {
    let kind = u64::from(protected) | (IPA_BITS << HostVm::IPA_SHIFT);
    [handle, vcpus, kind, 0, 0, 0, 0, 0]
}

/// Shares the records' page, reserves a handle and fills the record.
pub(crate) fn reserve(hyp: &Hyp<'_>, place: Place, vcpus: u64, protected: bool) -> Handle {
    hyp.host_share_hyp(place.record_page()).unwrap();
    let handle = hyp.reserve_vm(place.host_vm()).unwrap();
    let words = vm_words(u64::from(handle.get()), vcpus, protected);
    hyp.host_writes(place.host_vm(), &words);
    handle
}

/// A stack of pages for tables, linked as the host links them.
pub(crate) fn link(hyp: &Hyp<'_>, pages: &[Hfn]) -> [u64; 2] {
    let mut head = 0;
    for &page in pages.iter().rev() {
        hyp.host_writes(page.address(), &[head]);
        head = page.address().get();
    }
    [head, pages.len() as u64]
}

/// Fills the record of a vCPU.
pub(crate) fn fill_vcpu(hyp: &Hyp<'_>, place: Place, index: u64, tables: &[Hfn]) {
    let [head, count] = link(hyp, tables);
    let words = [index, 0x1000, 0x2000, head, count];
    hyp.host_writes(place.host_vcpu(index), &words);
}

/// Gives a vCPU another stack.
pub(crate) fn restock(hyp: &Hyp<'_>, place: Place, index: u64, tables: &[Hfn]) {
    let stack = link(hyp, tables);
    let address = Hpa::new(place.host_vcpu(index).get() + 3 * 8);
    hyp.host_writes(address, &stack);
}

/// A complete VM with one vCPU.
pub(crate) fn start(hyp: &Hyp<'_>, place: Place, protected: bool, tables: &[Hfn]) -> Handle {
    let handle = reserve(hyp, place, 1, protected);
    hyp.init_vm(place.host_vm(), place.area(), place.root())
        .unwrap();
    fill_vcpu(hyp, place, 0, tables);
    hyp.init_vcpu(handle, place.host_vcpu(0), place.vcpu_area(0))
        .unwrap();
    handle
}

/// Calls `body` with vCPU 0 loaded.
pub(crate) fn with<T>(
    hyp: &Hyp<'_>,
    handle: Handle,
    body: impl FnOnce() -> Result<T, Error>,
) -> Result<T, Error> {
    hyp.vcpu_load(handle, 0)?;
    let result = body();
    hyp.vcpu_put().unwrap();
    result
}

/// The stage 2 that a VM's loaded vCPU runs with.
pub(crate) fn stage2(hyp: &Hyp<'_>, handle: Handle) -> Stage2 {
    let mut found = None;
    with(hyp, handle, || {
        hyp.vcpu_run(&mut |_, context| {
            found = Some(context.stage2);
            Exit::Interrupt
        })
    })
    .unwrap();
    found.unwrap()
}

/// What the guest's call leaves in x0, or `None` if the host was needed.
pub(crate) fn guest_call(hyp: &Hyp<'_>, handle: Handle, x: [u64; 4]) -> Option<u64> {
    let mut answer = None;
    with(hyp, handle, || {
        let mut calls = 0;
        hyp.vcpu_run(&mut |registers, _| {
            calls += 1;
            if calls == 1 {
                registers.x[..4].copy_from_slice(&x);
                registers.pc = registers.pc.wrapping_add(4);
                let syndrome = 0x16 << 26;
                return Exit::Exception {
                    syndrome,
                    far: 0,
                    hpfar: 0,
                };
            }
            answer = Some(registers.x[0]);
            Exit::Interrupt
        })
    })
    .unwrap();
    answer
}

/// A word of the host's memory.
pub(crate) fn word(hyp: &Hyp<'_>, address: Hpa, number: usize) -> u64 {
    let index = address.page_offset() as usize / 8 + number;
    let word = hyp.platform().word(address.frame(), index);
    word.load(std::sync::atomic::Ordering::SeqCst)
}

/// Changes a word of it.
pub(crate) fn set_word(hyp: &Hyp<'_>, address: Hpa, number: usize, value: u64) {
    hyp.host_writes(Hpa::new(address.get() + number as u64 * 8), &[value]);
}

/// Ends a VM and gives the records' page back.
pub(crate) fn end(hyp: &Hyp<'_>, place: Place, handle: Handle) {
    hyp.start_teardown_vm(handle).unwrap();
    let mut pages = Vec::new();
    hyp.guest_pages(handle, |gfn, _, state| pages.push((gfn, state)))
        .unwrap();
    for (gfn, state) in pages {
        if state == crate::page::State::SharedBorrowed {
            hyp.unshare_guest(handle, gfn, 1).unwrap();
        } else {
            hyp.reclaim_dying_guest_page(handle, gfn).unwrap();
        }
    }
    hyp.finalize_teardown_vm(handle).unwrap();
    hyp.host_unshare_hyp(place.record_page()).unwrap();
}

/// The pages of one of the host's stacks in a VM's record.
pub(crate) fn returned(hyp: &Hyp<'_>, place: Place, word: u64) -> Vec<Hfn> {
    use std::sync::atomic::Ordering::SeqCst;
    let read = |address: u64| {
        let address = Hpa::new(address);
        let index = address.page_offset() as usize / 8;
        hyp.platform().word(address.frame(), index).load(SeqCst)
    };
    let base = place.host_vm().get() + word * 8;
    let (mut head, count) = (read(base), read(base + 8));
    let mut pages = Vec::new();
    while head != 0 {
        let page = Hpa::new(head).frame();
        pages.push(page);
        head = read(head);
        for index in 1..512 {
            let word = hyp.platform().word(page, index).load(SeqCst);
            assert_eq!(word, 0, "page {page} tells something");
        }
    }
    assert_eq!(pages.len() as u64, count);
    pages
}
