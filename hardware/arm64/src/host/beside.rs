//! What takes two processors.

use crate::calls::{audit, call};
use crate::clock::wait_until;
use crate::vm::{ENTRY, PAGE, Pages, Program, Vm, check, get, set};
use crate::{probe, second};
use twofold_pkvm::hypercall::Call;
use twofold_pkvm::run::Reason;
use twofold_pkvm::{Error, HostVcpu};

/// Translations that only the other processor holds, and calls at the same moment.
pub(crate) fn two_processors(pages: &mut Pages) {
    let vm = Vm::new(pages, true, 8);
    assert_eq!(call(Call::VcpuLoad, &[vm.handle, 0]), Ok(0));
    let rounds = 64;
    let first = pages.0;
    for round in 0..rounds {
        let page = pages.take();
        assert!(second::reads(page), "before");
        assert_eq!(
            call(Call::DonateGuest, &[page / PAGE, 0x200 + round]),
            Ok(0)
        );
        assert!(
            !second::reads(page),
            "the other processor still reads a donated page"
        );
        assert_eq!(call(Call::ForceReclaimGuestPage, &[page / PAGE]), Ok(0));
        assert!(second::reads(page), "after");
    }
    check!(
        pages.0 == first + rounds * PAGE,
        "{rounds} pages that the other processor had in its TLB were given away; it could not read one of them"
    );
    let (page, mine) = (pages.take() / PAGE, pages.take() / PAGE);
    let mut won = 0;
    let theirs = second::churns(page, || {
        for round in 0..200 {
            let gfn = 0x400 + round;
            if call(Call::DonateGuest, &[mine, gfn]) == Ok(0)
                && call(Call::ForceReclaimGuestPage, &[mine]) == Ok(0)
            {
                won += 1;
            }
        }
    });
    check!(
        theirs == 2000 && won == 200,
        "both processors change different pages at once: {theirs} and {won} rounds, none lost"
    );
    let mut got = 0;
    let theirs = second::churns(page, || {
        for round in 0..200 {
            // The very page that the other lends and takes back.
            let gfn = 0x800 + round;
            match call(Call::DonateGuest, &[page, gfn]) {
                Ok(_) => {
                    got += 1;
                    assert_eq!(call(Call::ForceReclaimGuestPage, &[page]), Ok(0));
                }
                Err(error) => assert_eq!(error, Error::NotPermitted),
            }
        }
    });
    // What the other side lost half way through it has left lent.
    let _ = call(Call::UnshareHyp, &[page]);
    assert!(audit().is_some(), "a page is in no legal state");
    check!(
        theirs <= 2000,
        "and one page at once: {got} donations and {theirs} rounds of lending, every page in a legal state"
    );
    assert_eq!(call(Call::VcpuPut, &[]), Ok(0));
    assert_eq!(second::loads(vm.handle), 0);
    check!(
        call(Call::StartTeardownVm, &[vm.handle]) == Err(Error::Invalid),
        "a VM whose vCPU the other processor has loaded cannot end"
    );
    assert_eq!(second::puts(), 0);
    vm.end(&[]);
}

/// A guest that runs on the other processor loses a page.
pub(crate) fn while_it_runs(pages: &mut Pages) {
    let vm = Vm::new(pages, true, 8);
    let (text, secret, shown) = (pages.take(), pages.take(), pages.take());
    Program::Spinning.copy_to(text);
    set(shown, 0);
    assert_eq!(call(Call::VcpuLoad, &[vm.handle, 0]), Ok(0));
    for (page, gfn) in [(text, ENTRY / PAGE), (secret, 0x90), (shown, 0xa0)] {
        assert_eq!(call(Call::DonateGuest, &[page / PAGE, gfn]), Ok(0));
    }
    assert_eq!(call(Call::VcpuPut, &[]), Ok(0));
    let reason = second::runs(vm.handle, || {
        // Nothing can be read there until the guest has shared it.
        wait_until("the guest does not run", || {
            probe::read(shown).unwrap_or(0) >= 1000
        });
        assert_eq!(call(Call::ForceReclaimGuestPage, &[secret / PAGE]), Ok(0));
        let after = get(shown);
        for _ in 0..100_000 {
            core::hint::spin_loop();
        }
        // It may have been between the read and the count.
        assert!(
            get(shown) <= after + 1,
            "the guest still reads the page that was taken from it"
        );
    });
    check!(
        reason == Reason::Abort as i64 && vm.word(HostVcpu::ADDRESS) == 0x9_0000,
        "a guest that was running on the other processor stopped at the page that was taken"
    );
    vm.end(&[ENTRY / PAGE, 0xa0]);
}
