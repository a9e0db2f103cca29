//! Guests' memory.

use super::setting::*;
use crate::error::Error;
use crate::guest::GuestPage;
use crate::page::{Pages, State};
use crate::run::{Exit, Reason, WRITE_TO_NOTHING};
use crate::shared::HostVcpu;
use crate::testing::{Accesses, Ram};
use std::sync::atomic::Ordering::SeqCst;
use twofold_arch::stage2::{Execute, Stage2Flags};
use twofold_arch::{Gfn, Hfn, Hpa, PAGE_SIZE};

const PLACE: Place = Place(100);
const MEM_SHARE: u64 = 0xc600_0003;
const MEM_UNSHARE: u64 = 0xc600_0004;
const INVALID: u64 = -3i64 as u64;

fn stock() -> Vec<Hfn> {
    (120..128).map(Ram::page).collect()
}

#[test]
fn what_the_guest_has_the_host_has_not_even_through_its_tlb() {
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    let handle = start(&hyp, PLACE, true, &stock());
    let (page, gfn) = (Ram::page(140), Gfn::new(7));
    // The host's TLB holds the page now.
    assert!(hyp.host_reaches(page));
    with(&hyp, handle, || hyp.donate_guest(page, gfn)).unwrap();
    assert!(!hyp.host_reaches(page));
    let stage2 = stage2(&hyp, handle);
    let found = hyp.guest_reaches(stage2, gfn.address().get()).unwrap();
    assert_eq!(found.page, page);
    assert!(found.flags.contains(Stage2Flags::READ | Stage2Flags::WRITE));

    let address = gfn.address().get();
    assert_eq!(
        guest_call(&hyp, handle, [MEM_SHARE, address, 0, 0]),
        Some(0)
    );
    assert!(hyp.host_reaches(page));
    assert_eq!(
        guest_call(&hyp, handle, [MEM_SHARE, address, 0, 0]),
        Some(INVALID)
    );
    assert_eq!(
        guest_call(&hyp, handle, [MEM_UNSHARE, address, 0, 0]),
        Some(0)
    );
    assert!(!hyp.host_reaches(page));
    assert_eq!(
        guest_call(&hyp, handle, [MEM_UNSHARE, address, 0, 0]),
        Some(INVALID)
    );

    hyp.platform().word(page, 9).store(0x5ec2e7, SeqCst);
    hyp.force_reclaim_guest_page(page).unwrap();
    assert!(
        hyp.platform().is_zero(page),
        "the host must not see the secret"
    );
    assert!(hyp.host_reaches(page));
    assert_eq!(hyp.guest_reaches(stage2, address), None);
    assert_eq!(hyp.guest_page(handle, gfn), Ok(GuestPage::Poisoned));
    let again = with(&hyp, handle, || hyp.donate_guest(Ram::page(141), gfn));
    assert_eq!(again, Err(Error::NotPermitted));
    end(&hyp, PLACE, handle);
    hyp.audit().unwrap();
}

#[test]
fn a_dying_guests_page_is_wiped_unless_it_was_lent() {
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    let handle = start(&hyp, PLACE, true, &stock());
    for (page, gfn) in [(140, 7), (141, 8)] {
        with(&hyp, handle, || {
            hyp.donate_guest(Ram::page(page), Gfn::new(gfn))
        })
        .unwrap();
        hyp.platform().word(Ram::page(page), 3).store(77, SeqCst);
    }
    assert_eq!(
        guest_call(&hyp, handle, [MEM_SHARE, 8 * PAGE_SIZE, 0, 0]),
        Some(0)
    );
    hyp.start_teardown_vm(handle).unwrap();
    for gfn in [7, 8] {
        hyp.reclaim_dying_guest_page(handle, Gfn::new(gfn)).unwrap();
    }
    assert!(hyp.platform().is_zero(Ram::page(140)));
    assert_eq!(hyp.platform().word(Ram::page(141), 3).load(SeqCst), 77);
    hyp.finalize_teardown_vm(handle).unwrap();
    hyp.audit().unwrap();
}

#[test]
fn a_guest_that_shares_what_it_has_not_yet_touched_asks_again_after_a_fault() {
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    let handle = start(&hyp, PLACE, true, &stock());
    hyp.vcpu_load(handle, 0).unwrap();
    let gfn = Gfn::new(0x30);
    let call = Exit::Exception {
        syndrome: 0x16 << 26,
        far: 0,
        hpfar: 0,
    };
    let reason = hyp.vcpu_run(&mut |registers, _| {
        registers.x[..4].copy_from_slice(&[MEM_SHARE, gfn.address().get(), 0, 0]);
        registers.pc = 0x8004;
        call
    });
    assert_eq!(reason, Ok(Reason::Abort));
    let record = PLACE.host_vcpu(0);
    let word = |number: usize| {
        let index = record.page_offset() as usize / 8 + number;
        hyp.platform().word(record.frame(), index).load(SeqCst)
    };
    assert_eq!(word(HostVcpu::SYNDROME), WRITE_TO_NOTHING);
    assert_eq!(word(HostVcpu::ADDRESS), gfn.address().get());
    assert_eq!(hyp.vcpu_in_poison_fault(), Ok(false));
    hyp.donate_guest(Ram::page(140), gfn).unwrap();
    let mut answer = None;
    let reason = hyp.vcpu_run(&mut |registers, _| {
        if answer.is_none() && registers.pc == 0x8000 {
            registers.pc = 0x8004;
            answer = Some(u64::MAX);
            return call;
        }
        answer = Some(registers.x[0]);
        Exit::Interrupt
    });
    assert_eq!((reason, answer), (Ok(Reason::Interrupt), Some(0)));
    assert!(hyp.host_reaches(Ram::page(140)));
}

#[test]
fn a_protected_guests_calls_refuse_what_makes_no_sense_and_hide_what_they_need_not_show() {
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    let handle = start(&hyp, PLACE, true, &stock());
    let ask = |x| guest_call(&hyp, handle, x);
    assert_eq!(ask([0x8600_0000, 0, 0, 0]), Some(0b11101));
    assert_eq!(ask([0xc600_0002, 0, 0, 0]), Some(PAGE_SIZE));
    for bad in [
        [0xc600_0002, 1, 0, 0],
        [MEM_SHARE, 0x1001, 0, 0],
        [MEM_SHARE, 0x1000, 1, 0],
        [MEM_SHARE, 0x1000, 0, 1],
        [MEM_SHARE, 1 << 35, 0, 0],
        [MEM_SHARE, !0xfff, 0, 0],
        [MEM_UNSHARE, 0x1000, 0, 0],
    ] {
        assert_eq!(ask(bad), Some(INVALID), "{bad:x?}");
    }
    // A call that is the host's to answer shows x0 to x3 and nothing else, and brings the answer.
    hyp.vcpu_load(handle, 0).unwrap();
    let psci = 0x8400_0008;
    let reason = hyp.vcpu_run(&mut |registers, _| {
        registers.x = std::array::from_fn(|index| 0x1000 + index as u64);
        registers.x[0] = psci;
        Exit::Exception {
            syndrome: 0x16 << 26,
            far: 0,
            hpfar: 0,
        }
    });
    assert_eq!(reason, Ok(Reason::Call));
    let record = PLACE.host_vcpu(0);
    let first = record.page_offset() as usize / 8;
    let page: Vec<_> = (0..512)
        .map(|index| hyp.platform().word(record.frame(), index).load(SeqCst))
        .collect();
    assert_eq!(
        page[first + HostVcpu::CALL..][..4],
        [psci, 0x1001, 0x1002, 0x1003]
    );
    assert!(!page.contains(&0x1004), "x4 is the guest's own business");
    hyp.host_writes(Hpa::new(record.get() + 8 * 8), &[1, 2, 3, 4]);
    hyp.vcpu_run(&mut |registers, _| {
        assert_eq!(registers.x[..5], [1, 2, 3, 4, 0x1004]);
        Exit::Interrupt
    })
    .unwrap();
    // Of an abort it sees the page and the kind, not the register or the offset.
    let reason = hyp.vcpu_run(&mut |_, _| Exit::Exception {
        syndrome: 0x24 << 26 | 1 << 25 | 1 << 24 | 3 << 22 | 17 << 16 | 1 << 6 | 7,
        far: 0xabc,
        hpfar: 0x123 << 4,
    });
    assert_eq!(reason, Ok(Reason::Abort));
    let word = |number| {
        let index = first + number;
        hyp.platform().word(record.frame(), index).load(SeqCst)
    };
    assert_eq!(word(HostVcpu::SYNDROME), WRITE_TO_NOTHING);
    assert_eq!(word(HostVcpu::ADDRESS), 0x123_000);
}

#[test]
fn an_ordinary_guests_page_is_counted_for_every_frame_that_borrows_it() {
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    let handle = start(&hyp, PLACE, false, &stock());
    let page = Ram::page(140);
    let record = hyp.pages().record(page).unwrap();
    let share = |gfn| {
        with(&hyp, handle, || {
            hyp.share_guest(Pages::one(page), Gfn::new(gfn), 7)
        })
    };
    share(7).unwrap();
    share(9).unwrap();
    assert_eq!((record.host(), record.shares()), (State::SharedOwned, 2));
    assert!(hyp.host_reaches(page), "lent is not given away");
    hyp.unshare_guest(handle, Gfn::new(7), 1).unwrap();
    assert_eq!((record.host(), record.shares()), (State::SharedOwned, 1));
    hyp.unshare_guest(handle, Gfn::new(9), 1).unwrap();
    assert!(record.is_untouched());
    assert_eq!(
        hyp.unshare_guest(handle, Gfn::new(9), 1),
        Err(Error::NotFound)
    );
    // A guest that is not protected answers no call itself.
    assert_eq!(guest_call(&hyp, handle, [MEM_SHARE, 0x1000, 0, 0]), None);
    end(&hyp, PLACE, handle);
}

#[test]
fn a_block_is_lent_whole_also_where_an_empty_table_stands() {
    let ram = Ram::new(2048, 64);
    let hyp = ram.boot();
    let handle = start(&hyp, PLACE, false, &stock());
    let block = Pages {
        start: Ram::page(1024),
        count: 512,
    };
    let share = |pages, gfn| with(&hyp, handle, || hyp.share_guest(pages, Gfn::new(gfn), 7));
    let small = Pages::one(Ram::page(1024));
    share(small, 512 + 3).unwrap();
    assert_eq!(
        share(block, 512),
        Err(Error::NotPermitted),
        "a page is there"
    );
    hyp.unshare_guest(handle, Gfn::new(512 + 3), 1).unwrap();
    share(block, 512).unwrap();
    let stage2 = stage2(&hyp, handle);
    let found = hyp.guest_reaches(stage2, (512 + 5) * PAGE_SIZE).unwrap();
    assert_eq!(found.page, Ram::page(1024 + 5));
    assert_eq!(
        hyp.unshare_guest(handle, Gfn::new(512), 1),
        Err(Error::TooBig)
    );
    assert_eq!(
        hyp.unshare_guest(handle, Gfn::new(513), 512),
        Err(Error::Invalid)
    );
    assert_eq!(
        hyp.unshare_guest(handle, Gfn::new(512), 3),
        Err(Error::Invalid)
    );
    assert_eq!(share(block, 513), Err(Error::Invalid), "unaligned");
    let two = Pages { count: 2, ..small };
    assert_eq!(share(two, 1024), Err(Error::Invalid));
    hyp.audit().unwrap();
    hyp.unshare_guest(handle, Gfn::new(512), 512).unwrap();
    assert_eq!(hyp.guest_reaches(stage2, (512 + 5) * PAGE_SIZE), None);
    end(&hyp, PLACE, handle);
    hyp.audit().unwrap();
}

#[test]
fn permissions_and_ages_of_an_ordinary_guest_change_and_are_flushed() {
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    let handle = start(&hyp, PLACE, false, &stock());
    let gfn = Gfn::new(7);
    with(&hyp, handle, || {
        hyp.share_guest(Pages::one(Ram::page(140)), gfn, 0b011)
    })
    .unwrap();
    let stage2 = stage2(&hyp, handle);
    let flags = || {
        hyp.guest_reaches(stage2, gfn.address().get())
            .unwrap()
            .flags
    };
    let (write, used) = (Stage2Flags::WRITE, Stage2Flags::ACCESSED);
    assert!(flags().contains(write | used));
    assert_eq!(Execute::of(flags().bits()), Execute::None);
    hyp.wrprotect_guest(handle, gfn, 1).unwrap();
    assert!(!flags().contains(write), "the TLB has forgotten");
    with(&hyp, handle, || hyp.relax_perms_guest(gfn, 0b111)).unwrap();
    assert!(flags().contains(write));
    assert_eq!(Execute::of(flags().bits()), Execute::All);
    assert_eq!(hyp.test_clear_young_guest(handle, gfn, 1, false), Ok(true));
    assert_eq!(hyp.test_clear_young_guest(handle, gfn, 1, true), Ok(true));
    assert_eq!(hyp.test_clear_young_guest(handle, gfn, 1, true), Ok(false));
    assert!(!flags().contains(used));
    with(&hyp, handle, || hyp.make_young_guest(gfn)).unwrap();
    assert!(flags().contains(used));
    assert_eq!(
        with(&hyp, handle, || hyp.relax_perms_guest(Gfn::new(8), 1)),
        Err(Error::Again)
    );
    // None of it for a protected guest.
    let protected = start(&hyp, Place(110), true, &[]);
    assert_eq!(
        hyp.wrprotect_guest(protected, gfn, 1),
        Err(Error::NotPermitted)
    );
    let no = Err(Error::NotPermitted);
    assert_eq!(with(&hyp, protected, || hyp.relax_perms_guest(gfn, 1)), no);
    assert_eq!(with(&hyp, protected, || hyp.make_young_guest(gfn)), no);
}

#[test]
fn without_tables_a_mapping_is_refused_and_nothing_is_lost() {
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    let handle = start(&hyp, PLACE, true, &[]);
    let give = || {
        with(&hyp, handle, || {
            hyp.donate_guest(Ram::page(140), Gfn::new(7))
        })
    };
    assert_eq!(give(), Err(Error::NoMemory));
    // Not aligned, not memory, and not the host's: the host's stack is not believed.
    hyp.host_writes(Hpa::new(PLACE.host_vcpu(0).get() + 24), &[0x4000_0001, 1]);
    assert_eq!(give(), Err(Error::Invalid));
    hyp.host_writes(Hpa::new(PLACE.host_vcpu(0).get() + 24), &[0x1000, 1]);
    assert_eq!(give(), Err(Error::NotPermitted));
    hyp.host_writes(
        Hpa::new(PLACE.host_vcpu(0).get() + 24),
        &[PLACE.area().address().get(), 1],
    );
    assert_eq!(give(), Err(Error::NotPermitted));
    // One page is not enough, and stays with the vCPU.
    restock(&hyp, PLACE, 0, &[Ram::page(150)]);
    assert_eq!(give(), Err(Error::NoMemory));
    restock(&hyp, PLACE, 0, &[Ram::page(151)]);
    give().unwrap();
    hyp.audit().unwrap();
    end(&hyp, PLACE, handle);
    assert!(hyp.host_reaches(Ram::page(150)) && hyp.host_reaches(Ram::page(151)));
}
