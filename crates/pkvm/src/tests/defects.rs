//! The defects of SPEC 2.16, each by its number: those that this design could have.

use super::setting::*;
use crate::error::Error;
use crate::page::Pages;
use crate::shared::HostVm;
use crate::testing::{Accesses, Ram};
use crate::vm::{HANDLE_OFFSET, Handle, MAX_VCPUS, MAX_VMS, VMID_BITS};
use std::sync::atomic::Ordering::SeqCst;
use twofold_arch::{Gfn, Hpa};

const PLACE: Place = Place(100);

#[test]
fn p1_no_handle_is_also_an_error() {
    for error in Error::ALL {
        assert!(error.code() < 0);
        assert_eq!(Handle::new(error.code() as u64), None);
        assert_eq!(Handle::new(u64::from(error.code() as u32)), None);
        assert_eq!(Error::from_code(error.code()), Some(error));
    }
    assert_eq!(Error::from_code(i64::from(HANDLE_OFFSET)), None);
}

#[test]
fn p2_a_full_table_is_noticed_by_the_scan_itself() {
    // There is no counter that could be wrong: a table that is full apart from its last slot still
    // gives it out, and then says that it is full.
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    let host_vm = |number: u64| Hpa::new(number * 64);
    for number in 0..MAX_VMS as u64 {
        hyp.reserve_vm(host_vm(number)).unwrap();
    }
    let last = Handle::new(u64::from(HANDLE_OFFSET) + MAX_VMS as u64 - 1).unwrap();
    hyp.unreserve_vm(last).unwrap();
    assert_eq!(hyp.reserve_vm(host_vm(1000)), Ok(last));
    assert_eq!(hyp.reserve_vm(host_vm(1001)), Err(Error::NoMemory));
}

#[test]
fn p3_every_handle_has_a_vmid_of_its_own_that_fits_and_is_not_the_hosts() {
    let vmids: Vec<_> = (0..MAX_VMS as u64)
        .map(|index| {
            Handle::new(u64::from(HANDLE_OFFSET) + index)
                .unwrap()
                .vmid()
                .0
        })
        .collect();
    assert!(vmids.iter().all(|&vmid| vmid != 0 && vmid < 1 << VMID_BITS));
    assert!(vmids.windows(2).all(|pair| pair[0] < pair[1]));
}

#[test]
fn p4_a_processor_finalises_once() {
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    hyp.finalise().unwrap();
    assert_eq!(hyp.finalise(), Err(Error::NotPermitted));
}

#[test]
fn p5_a_host_vcpu_and_an_index_are_used_once() {
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    let handle = reserve(&hyp, PLACE, 3, true);
    hyp.init_vm(PLACE.host_vm(), PLACE.area(), PLACE.root())
        .unwrap();
    for index in 0..2 {
        fill_vcpu(&hyp, PLACE, index, &[]);
    }
    hyp.init_vcpu(handle, PLACE.host_vcpu(0), PLACE.vcpu_area(0))
        .unwrap();
    let again = hyp.init_vcpu(handle, PLACE.host_vcpu(0), PLACE.vcpu_area(1));
    assert_eq!(again, Err(Error::Exists));
    // The host changes the index in the record that is in use: still the same host vCPU.
    hyp.host_writes(PLACE.host_vcpu(0), &[2]);
    let again = hyp.init_vcpu(handle, PLACE.host_vcpu(0), PLACE.vcpu_area(1));
    assert_eq!(again, Err(Error::Exists));
    // Another record with an index that is taken.
    hyp.host_writes(PLACE.host_vcpu(1), &[0]);
    let again = hyp.init_vcpu(handle, PLACE.host_vcpu(1), PLACE.vcpu_area(1));
    assert_eq!(again, Err(Error::Invalid));
    // Nor does another VM take it.
    let other = start(&hyp, Place(110), true, &[]);
    let stolen = hyp.init_vcpu(other, PLACE.host_vcpu(0), PLACE.vcpu_area(1));
    assert_eq!(stolen, Err(Error::Exists));
    assert!(
        hyp.host_reaches(PLACE.vcpu_area(1)),
        "the page came back each time"
    );
    assert_eq!(
        hyp.init_vm(PLACE.host_vm(), Ram::page(130), Ram::page(131)),
        Err(Error::Exists)
    );
    hyp.audit().unwrap();
}

#[test]
fn p6_a_vm_that_is_not_complete_cannot_be_found() {
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    let handle = reserve(&hyp, PLACE, 1, true);
    let absent = [
        hyp.vcpu_load(handle, 0),
        hyp.init_vcpu(handle, PLACE.host_vcpu(0), PLACE.vcpu_area(0)),
        hyp.guest_page(handle, Gfn::new(0)).map(|_| ()),
        hyp.flush_guest(handle),
    ];
    assert_eq!(absent, [Err(Error::NotFound); 4]);
    assert_eq!(hyp.start_teardown_vm(handle), Err(Error::Invalid));
    assert_eq!(
        hyp.reclaim_dying_guest_page(handle, Gfn::new(0)),
        Err(Error::Invalid)
    );
}

#[test]
fn p7_pages_of_a_vm_that_could_not_be_built_come_back_wiped() {
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    let handle = reserve(&hyp, PLACE, 1, true);
    // The root is not the host's to give: the area has been taken already.
    hyp.host_donate_hyp(Pages::one(PLACE.root())).unwrap();
    hyp.host_writes(PLACE.area().address(), &[7; 512]);
    let wiped = hyp.platform().wiped();
    let built = hyp.init_vm(PLACE.host_vm(), PLACE.area(), PLACE.root());
    assert_eq!(built, Err(Error::NotPermitted));
    assert!(hyp.platform().is_zero(PLACE.area()));
    assert!(hyp.platform().wiped() > wiped);
    assert!(!hyp.platform().is_mapped(PLACE.area()));
    assert!(hyp.host_reaches(PLACE.area()));
    hyp.hyp_donate_host(Pages::one(PLACE.root())).unwrap();
    // The reservation still stands.
    assert_eq!(
        hyp.init_vm(PLACE.host_vm(), PLACE.area(), PLACE.root()),
        Ok(handle)
    );
}

#[test]
fn p8_sizes_are_read_once_and_bounded() {
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    let handle = reserve(&hyp, PLACE, 1, true);
    for vcpus in [0, MAX_VCPUS as u64 + 1, 1 << 32, 1 << 61, u64::MAX] {
        hyp.host_writes(
            PLACE.host_vm(),
            &vm_words(u64::from(handle.get()), vcpus, true),
        );
        let built = hyp.init_vm(PLACE.host_vm(), PLACE.area(), PLACE.root());
        assert_eq!(built, Err(Error::Invalid), "{vcpus}");
    }
    hyp.host_writes(PLACE.host_vm(), &vm_words(u64::from(handle.get()), 1, true));
    hyp.init_vm(PLACE.host_vm(), PLACE.area(), PLACE.root())
        .unwrap();
    // What the host writes afterwards changes nothing.
    hyp.host_writes(
        PLACE.host_vm(),
        &vm_words(u64::from(handle.get()), 100, true),
    );
    fill_vcpu(&hyp, PLACE, 1, &[]);
    let second = hyp.init_vcpu(handle, PLACE.host_vcpu(1), PLACE.vcpu_area(1));
    assert_eq!(second, Err(Error::Invalid), "it was created with one");
}

#[test]
fn p9_a_record_that_is_not_shared_is_a_matter_of_permission_not_of_patience() {
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    hyp.reserve_vm(PLACE.host_vm()).unwrap();
    let built = hyp.init_vm(PLACE.host_vm(), PLACE.area(), PLACE.root());
    assert_eq!(built, Err(Error::NotPermitted));
    let handle = start(&hyp, Place(110), true, &[]);
    let unshared = Ram::page(140).address();
    let vcpu = hyp.init_vcpu(handle, unshared, Ram::page(141));
    assert_eq!(vcpu, Err(Error::NotPermitted));
    assert!(hyp.host_reaches(Ram::page(141)));
}

#[test]
fn p10_each_guest_has_its_own_ipa_size() {
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    for (bits, number) in [(32u64, 0), (33, 1), (36, 2)] {
        let place = Place(100 + 8 * number);
        let handle = reserve(&hyp, place, 1, true);
        let words = [
            u64::from(handle.get()),
            1,
            1 | bits << HostVm::IPA_SHIFT,
            0,
            0,
            0,
            0,
            0,
        ];
        hyp.host_writes(place.host_vm(), &words);
        // Up to eight pages side by side, aligned to their size.
        let root = Ram::page(160 + 8 * number);
        hyp.init_vm(place.host_vm(), place.area(), root).unwrap();
        fill_vcpu(&hyp, place, 0, &[]);
        hyp.init_vcpu(handle, place.host_vcpu(0), place.vcpu_area(0))
            .unwrap();
        assert_eq!(stage2(&hyp, handle).vtcr & 0x3f, 64 - bits);
        let beyond = Gfn::new(1 << (bits - 12));
        assert_eq!(hyp.guest_page(handle, beyond), Err(Error::Invalid));
        assert!(hyp.guest_page(handle, Gfn::new(beyond.get() - 1)).is_ok());
    }
    // More than the machine has, or a root that is not aligned.
    let place = Place(130);
    let handle = reserve(&hyp, place, 1, true);
    let kind = |bits: u64| [u64::from(handle.get()), 1, bits << HostVm::IPA_SHIFT];
    for bits in [31, 37, 52, 255] {
        hyp.host_writes(place.host_vm(), &kind(bits));
        let built = hyp.init_vm(place.host_vm(), place.area(), Ram::page(192));
        assert_eq!(built, Err(Error::Invalid), "{bits} bits");
    }
    hyp.host_writes(place.host_vm(), &kind(32));
    let built = hyp.init_vm(place.host_vm(), place.area(), Ram::page(193));
    assert_eq!(built, Err(Error::Invalid));
    hyp.audit().unwrap();
}

#[test]
fn p11_pages_that_come_back_carry_nothing_in_their_records() {
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    let handle = start(&hyp, PLACE, true, &[Ram::page(120), Ram::page(121)]);
    with(&hyp, handle, || {
        hyp.donate_guest(Ram::page(140), Gfn::new(1))
    })
    .unwrap();
    end(&hyp, PLACE, handle);
    for page in [PLACE.root(), PLACE.area(), Ram::page(120), Ram::page(140)] {
        assert!(hyp.pages().record(page).unwrap().is_untouched());
        // Shared and pinned, it is mapped at EL2 by the first pin and unmapped by the last.
        hyp.host_share_hyp(page).unwrap();
        assert!(!hyp.platform().is_mapped(page));
        hyp.pin(page).unwrap();
        assert!(hyp.platform().is_mapped(page));
        hyp.unpin(page).unwrap();
        assert!(!hyp.platform().is_mapped(page));
        hyp.host_unshare_hyp(page).unwrap();
    }
}

#[test]
fn p12_a_vcpu_that_could_not_be_registered_leaves_no_pin() {
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    let handle = start(&hyp, PLACE, true, &[]);
    let page = Ram::page(140);
    hyp.host_share_hyp(page).unwrap();
    hyp.host_writes(page.address(), &[99]);
    let record = hyp.pages().record(page).unwrap();
    let absent = Handle::new(0x1080).unwrap();
    let tries = [
        (
            hyp.init_vcpu(handle, page.address(), Ram::page(141)),
            Error::Invalid,
        ),
        (
            hyp.init_vcpu(absent, page.address(), Ram::page(141)),
            Error::NotFound,
        ),
        (
            hyp.init_vcpu(handle, page.address(), PLACE.area()),
            Error::NotPermitted,
        ),
    ];
    for (found, expected) in tries {
        assert_eq!(found, Err(expected));
    }
    assert_eq!(record.count(), 0);
    hyp.host_unshare_hyp(page).unwrap();
    assert!(hyp.host_reaches(Ram::page(141)));
    assert_eq!(hyp.platform().word(Ram::page(141), 0).load(SeqCst), 0);
}

#[test]
fn p13_access_without_reading_is_refused() {
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    let stock: Vec<_> = (120..130).map(Ram::page).collect();
    let handle = start(&hyp, PLACE, false, &stock);
    let share = |access| {
        with(&hyp, handle, || {
            hyp.share_guest(Pages::one(Ram::page(140)), Gfn::new(1), access)
        })
    };
    for access in [0, 0b010, 0b100, 0b110, 0b1000, 0b1111, u64::MAX] {
        assert_eq!(share(access), Err(Error::Invalid), "{access:#b}");
    }
    for access in [0b001, 0b011, 0b101, 0b111] {
        assert_eq!(share(access), Ok(()), "{access:#b}");
        hyp.unshare_guest(handle, Gfn::new(1), 1).unwrap();
    }
}
