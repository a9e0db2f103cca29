//! Life and death of VMs and vCPUs.

use super::setting::*;
use crate::error::Error;
use crate::hypercall::{Call, NOT_SUPPORTED};
use crate::run::Exit;
use crate::testing::{Accesses, Ram, become_processor};
use crate::vm::{HANDLE_OFFSET, Handle, MAX_VMS};
use twofold_arch::{Gfn, Hpa};

const PLACE: Place = Place(100);

fn tables(first: u64, count: u64) -> Vec<twofold_arch::Hfn> {
    (first..first + count).map(Ram::page).collect()
}

#[test]
fn there_are_255_handles_and_reservations_can_be_given_up() {
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    let host_vm = |number: u64| Hpa::new(0x4000_0000 + number * 64);
    let handles: Vec<_> = (0..MAX_VMS as u64)
        .map(|number| hyp.reserve_vm(host_vm(number)).unwrap())
        .collect();
    assert_eq!(handles[0].get(), HANDLE_OFFSET);
    assert_eq!(hyp.reserve_vm(host_vm(999)), Err(Error::NoMemory));
    assert_eq!(hyp.reserve_vm(host_vm(3)), Err(Error::Exists));
    hyp.unreserve_vm(handles[7]).unwrap();
    assert_eq!(hyp.unreserve_vm(handles[7]), Err(Error::Invalid));
    assert_eq!(hyp.reserve_vm(host_vm(999)), Ok(handles[7]));
    assert_eq!(Handle::new(0xfff), None);
    assert_eq!(Handle::new(0x1000 + 255), None);
    assert_eq!(Handle::new(1 << 32 | 0x1000), None);
}

#[test]
fn a_vm_uses_donated_pages_which_the_host_cannot_reach_and_gets_back_empty() {
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    let stock = tables(120, 4);
    // The host leaves something in the pages; the hypervisor must not take it for its own.
    for page in [PLACE.area(), PLACE.root(), PLACE.vcpu_area(0)] {
        hyp.host_writes(page.address(), &[!0; 512]);
    }
    let handle = start(&hyp, PLACE, true, &stock);
    for page in [PLACE.area(), PLACE.root(), PLACE.vcpu_area(0)] {
        assert!(!hyp.host_reaches(page), "{page}");
    }
    assert!(hyp.host_reaches(PLACE.record_page()));
    with(&hyp, handle, || {
        hyp.donate_guest(Ram::page(130), Gfn::new(5))
    })
    .unwrap();
    assert!(!hyp.host_reaches(stock[0]), "a page that became a table");
    end(&hyp, PLACE, handle);
    let mut own = returned(&hyp, PLACE, 4);
    own.sort();
    assert_eq!(own, [PLACE.area(), PLACE.vcpu_area(0)]);
    // The root, and the two tables that the vCPU was stocked with.
    assert_eq!(returned(&hyp, PLACE, 6).len(), 3);
    for number in 64..256 {
        let page = Ram::page(number);
        assert!(hyp.host_reaches(page), "{page} is lost");
        assert!(hyp.pages().record(page).unwrap().is_untouched());
    }
    assert_eq!(
        hyp.reserve_vm(PLACE.host_vm()),
        Ok(handle),
        "the slot is free again"
    );
}

#[test]
fn a_vcpu_is_loaded_once_and_a_processor_loads_one() {
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    let handle = start(&hyp, PLACE, false, &[]);
    let other = start(&hyp, Place(110), false, &[]);
    assert_eq!(hyp.vcpu_put(), Err(Error::Invalid));
    assert_eq!(hyp.vcpu_load(handle, 1), Err(Error::NotFound));
    assert_eq!(hyp.vcpu_load(handle, u64::MAX), Err(Error::NotFound));
    hyp.vcpu_load(handle, 0).unwrap();
    assert_eq!(
        hyp.vcpu_load(other, 0),
        Err(Error::Busy),
        "this processor has one"
    );
    become_processor(1);
    assert_eq!(
        hyp.vcpu_load(handle, 0),
        Err(Error::Busy),
        "the vCPU is loaded"
    );
    hyp.vcpu_load(other, 0).unwrap();
    hyp.vcpu_put().unwrap();
    become_processor(0);
    hyp.vcpu_put().unwrap();
    hyp.vcpu_load(handle, 0).unwrap();
}

#[test]
fn a_vm_ends_in_two_steps() {
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    let handle = start(&hyp, PLACE, true, &tables(120, 4));
    let gfn = Gfn::new(5);
    with(&hyp, handle, || hyp.donate_guest(Ram::page(130), gfn)).unwrap();
    assert_eq!(hyp.finalize_teardown_vm(handle), Err(Error::Invalid));
    assert_eq!(
        hyp.reclaim_dying_guest_page(handle, gfn),
        Err(Error::Invalid)
    );
    hyp.vcpu_load(handle, 0).unwrap();
    assert_eq!(
        hyp.start_teardown_vm(handle),
        Err(Error::Invalid),
        "a vCPU is loaded"
    );
    hyp.vcpu_put().unwrap();
    hyp.start_teardown_vm(handle).unwrap();
    assert_eq!(hyp.start_teardown_vm(handle), Err(Error::Invalid));
    assert_eq!(hyp.vcpu_load(handle, 0), Err(Error::Invalid));
    assert_eq!(
        hyp.finalize_teardown_vm(handle),
        Err(Error::Busy),
        "a page is left"
    );
    hyp.reclaim_dying_guest_page(handle, gfn).unwrap();
    assert_eq!(
        hyp.reclaim_dying_guest_page(handle, gfn),
        Err(Error::NotFound)
    );
    hyp.finalize_teardown_vm(handle).unwrap();
    assert_eq!(hyp.finalize_teardown_vm(handle), Err(Error::Invalid));
    assert_eq!(hyp.vcpu_load(handle, 0), Err(Error::NotFound));
    hyp.audit().unwrap();
}

#[test]
fn calls_belong_to_the_time_before_or_after_finalising() {
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    let call = |call: Call, arguments: [u64; 2]| {
        let mut x = [call.function(), arguments[0], arguments[1], 0, 0, 0];
        hyp.hypercall(&mut x, &mut |_, _| Exit::Interrupt);
        (x[0], x[1] as i64)
    };
    assert_eq!(call(Call::Init, [0; 2]), (0, 0));
    let page = Ram::page(100).get();
    assert_eq!(call(Call::ShareHyp, [page, 0]).0, NOT_SUPPORTED);
    assert_eq!(call(Call::ProtFinalize, [0; 2]), (0, 0));
    assert_eq!(
        call(Call::ProtFinalize, [0; 2]),
        (0, -1),
        "once on a processor"
    );
    assert_eq!(call(Call::Init, [0; 2]).0, NOT_SUPPORTED);
    assert_eq!(call(Call::ShareHyp, [page, 0]), (0, 0));
    assert_eq!(call(Call::ShareHyp, [page, 0]), (0, -1));
    become_processor(1);
    assert_eq!(call(Call::ProtFinalize, [0; 2]), (0, 0));
    let mut x = [0xdead_beef, 1, 2, 3, 4, 5];
    hyp.hypercall(&mut x, &mut |_, _| Exit::Interrupt);
    assert_eq!(x, [NOT_SUPPORTED, 0, 0, 0, 0, 0]);
}
