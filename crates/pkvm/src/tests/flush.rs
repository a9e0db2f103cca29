//! What the TLB calls make a processor forget, and what not.

use super::setting::*;
use crate::error::Error;
use crate::flush::Reach;
use crate::page::Pages;
use crate::run::Stage2;
use crate::testing::{Accesses, Ram, become_processor};
use crate::vm::Handle;
use twofold_arch::{Gfn, PAGE_SIZE};

const PLACE: Place = Place(100);
const GFN: u64 = 0x200;

/// An ordinary guest with two pages at [`GFN`], which both processors have in their TLBs, and one
/// far away.
fn guest<'m>(hyp: &Hyp<'m>) -> (Handle, Stage2) {
    let stock: Vec<_> = (120..130).map(Ram::page).collect();
    let handle = start(hyp, PLACE, false, &stock);
    for (page, gfn) in [(140, GFN), (141, GFN + 1), (142, 0x1_0000)] {
        with(hyp, handle, || {
            hyp.share_guest(Pages::one(Ram::page(page)), Gfn::new(gfn), 0b011)
        })
        .unwrap();
    }
    (handle, stage2(hyp, handle))
}

/// Breaks the guest's table behind everybody's back, so that only the TLBs still know; then says
/// for each processor and page whether they do after `flush`.
fn remembered(flush: impl FnOnce(&Hyp<'_>, Handle)) -> [[bool; 3]; 2] {
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    let (handle, stage2) = guest(&hyp);
    let touch = |processor| {
        become_processor(processor);
        let pages = [GFN, GFN + 1, 0x1_0000]
            .map(|gfn| hyp.guest_reaches(stage2, gfn * PAGE_SIZE).is_some());
        become_processor(0);
        pages
    };
    assert_eq!([touch(0), touch(1)], [[true; 3]; 2]);
    let root = PLACE.root();
    let entries: Vec<u64> = (0..512)
        .map(|index| {
            let word = hyp.platform().word(root, index);
            word.swap(0, std::sync::atomic::Ordering::SeqCst)
        })
        .collect();
    flush(&hyp, handle);
    let result = [touch(0), touch(1)];
    for (index, entry) in entries.into_iter().enumerate() {
        let word = hyp.platform().word(root, index);
        word.store(entry, std::sync::atomic::Ordering::SeqCst);
    }
    end(&hyp, PLACE, handle);
    hyp.audit().unwrap();
    result
}

const ADDRESS: u64 = GFN * PAGE_SIZE;

#[test]
fn a_page_a_block_a_range_and_a_whole_vm_are_forgotten_everywhere() {
    let page = [false, true, true];
    let found = remembered(|hyp, vm| {
        hyp.flush_guest_ipa(vm, ADDRESS, 3, Reach::Everywhere)
            .unwrap();
    });
    assert_eq!(found, [page; 2]);
    let block = [false, false, true];
    let found = remembered(|hyp, vm| {
        hyp.flush_guest_ipa(vm, ADDRESS + PAGE_SIZE, 2, Reach::Everywhere)
            .unwrap();
    });
    assert_eq!(found, [block; 2]);
    let found = remembered(|hyp, vm| hyp.flush_guest_range(vm, ADDRESS, 2).unwrap());
    assert_eq!(found, [block; 2]);
    let found = remembered(|hyp, vm| {
        hyp.flush_guest_ipa(vm, ADDRESS, 0, Reach::Everywhere)
            .unwrap();
    });
    assert_eq!(found, [[false; 3]; 2], "the level is not known");
    let found = remembered(|hyp, vm| hyp.flush_guest(vm).unwrap());
    assert_eq!(found, [[false; 3]; 2]);
    let found = remembered(|hyp, _| hyp.flush_everything());
    assert_eq!(found, [[false; 3]; 2]);
}

#[test]
fn what_is_meant_for_this_processor_leaves_the_others_alone() {
    let found = remembered(|hyp, vm| {
        hyp.flush_guest_ipa(vm, ADDRESS, 3, Reach::Here).unwrap();
    });
    assert_eq!(found, [[false, true, true], [true; 3]]);
    let found = remembered(|hyp, vm| hyp.forget_guest_here(vm).unwrap());
    assert_eq!(found, [[false; 3], [true; 3]]);
}

#[test]
fn the_translations_of_others_stay() {
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    let (first, stage2) = guest(&hyp);
    let second = start(&hyp, Place(200), false, &[]);
    assert!(hyp.guest_reaches(stage2, ADDRESS).is_some());
    let word = hyp.platform().word(PLACE.root(), 0);
    let entry = word.swap(0, std::sync::atomic::Ordering::SeqCst);
    hyp.flush_guest(second).unwrap();
    hyp.forget_guest_here(second).unwrap();
    hyp.flush_guest_range(second, ADDRESS, 1).unwrap();
    assert!(hyp.guest_reaches(stage2, ADDRESS).is_some());
    hyp.flush_guest(first).unwrap();
    assert!(hyp.guest_reaches(stage2, ADDRESS).is_none());
    word.store(entry, std::sync::atomic::Ordering::SeqCst);
}

#[test]
fn addresses_sizes_and_handles_are_checked() {
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    let (handle, _) = guest(&hyp);
    let absent = Handle::new(0x1080).unwrap();
    let end = 1 << IPA_BITS;
    for reach in [Reach::Everywhere, Reach::Here] {
        let flush = |handle, ipa, level| hyp.flush_guest_ipa(handle, ipa, level, reach);
        assert_eq!(flush(absent, 0, 3), Err(Error::NotFound));
        for (ipa, level) in [
            (1, 3),
            (end, 3),
            (end - 1, 3),
            (!0xfff, 3),
            (0, 4),
            (0, 1 << 32),
            (0, u64::MAX),
        ] {
            assert_eq!(
                flush(handle, ipa, level),
                Err(Error::Invalid),
                "{ipa:#x} {level}"
            );
        }
        for level in 0..=3 {
            assert_eq!(flush(handle, end - PAGE_SIZE, level), Ok(()), "{level}");
        }
    }
    let range = |ipa, pages| hyp.flush_guest_range(handle, ipa, pages);
    assert_eq!(hyp.flush_guest_range(absent, 0, 1), Err(Error::NotFound));
    for (ipa, pages) in [
        (0, 0),
        (8, 1),
        (end - PAGE_SIZE, 2),
        (0, (end >> 12) + 1),
        (PAGE_SIZE, u64::MAX),
        (!0xfff, 1),
    ] {
        assert_eq!(range(ipa, pages), Err(Error::Invalid), "{ipa:#x} {pages}");
    }
    assert_eq!(range(0, end >> 12), Ok(()));
    assert_eq!(hyp.flush_guest(absent), Err(Error::NotFound));
    assert_eq!(hyp.forget_guest_here(absent), Err(Error::NotFound));
}
