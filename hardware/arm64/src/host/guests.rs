//! A protected guest and an ordinary one, and what the host may not do with them.

use crate::calls::call;
use crate::vm::{ENTRY, PAGE, Pages, Program, Vm, check, get, set};
use crate::{probe, second};
use bare::say;
use twofold_pkvm::hypercall::Call;
use twofold_pkvm::request::Request;
use twofold_pkvm::run::WRITE_TO_NOTHING;
use twofold_pkvm::{Error, HostVcpu};

/// A protected guest, from its first instruction to its end. `two` processors can be used.
pub(crate) fn protected(pages: &mut Pages, two: bool) {
    let vm = Vm::new(pages, true, 8);
    say!("host: a protected VM, handle {:#x}", vm.handle);
    let text = pages.take();
    Program::Protected.copy_to(text);
    check!(
        call(Call::DonateGuest, &[text / PAGE, ENTRY / PAGE]) == Err(Error::Invalid),
        "no vCPU is loaded: a page cannot be given"
    );
    assert_eq!(call(Call::VcpuLoad, &[vm.handle, 0]), Ok(0));
    check!(
        call(Call::VcpuLoad, &[vm.handle, 0]) == Err(Error::Busy),
        "this processor has one vCPU and cannot load a second"
    );
    if two {
        check!(
            second::loads(vm.handle) == Error::Busy.code(),
            "nor can the other processor load the same"
        );
    }
    assert_eq!(vm.run_to_abort(), ENTRY);
    assert_eq!(call(Call::DonateGuest, &[text / PAGE, ENTRY / PAGE]), Ok(0));
    check!(
        probe::read(text).is_none(),
        "the guest's code, donated, can no longer be read"
    );
    let secret = pages.take();
    check!(
        vm.run_to_abort() == 0x9_0000,
        "the guest runs, and wants a page at 0x90000"
    );
    vm.set_word(HostVcpu::REQUEST, Request::Skip as u64);
    check!(
        call(Call::VcpuRun, &[]) == Err(Error::NotPermitted) && vm.word(HostVcpu::DATA) == 0,
        "the host sees nothing of what is to be stored there, and cannot pass over the store"
    );
    vm.set_word(HostVcpu::REQUEST, 0);
    assert_eq!(call(Call::DonateGuest, &[secret / PAGE, 0x90]), Ok(0));
    let shown = pages.take();
    let wanted = vm.run_to_abort();
    check!(
        wanted == 0xa_0000 && vm.word(HostVcpu::SYNDROME) == WRITE_TO_NOTHING,
        "it shares 0xa0000, which is not there: the host sees a write fault and gives a page"
    );
    assert_eq!(call(Call::DonateGuest, &[shown / PAGE, 0xa0]), Ok(0));
    let [features, shared, _] = vm.run_to_call(0x1000_0001);
    check!(
        features == 0b11101 && shared == 0,
        "the guest's MEM_SHARE has succeeded"
    );
    check!(
        get(shown) == 0x6f_6c6c_6548,
        "the host reads what it shows: Hello"
    );
    check!(
        probe::read(secret).is_none() && !probe::write(secret, 0),
        "and not its secret"
    );
    refusals(&vm, text, shown);
    set(vm.vcpu + HostVcpu::CALL as u64 * 8, 42);
    let [unshared, intact, answer] = vm.run_to_call(0x1000_0002);
    check!(
        unshared == 0 && probe::read(shown).is_none(),
        "after MEM_UNSHARE the host reads nothing there"
    );
    check!(
        intact == 1 && answer == 42,
        "the guest still has its secret, and got the host's answer"
    );
    assert_eq!(call(Call::ForceReclaimGuestPage, &[secret / PAGE]), Ok(0));
    check!(
        get(secret) == 0,
        "the host takes the page by force and finds it empty"
    );
    assert_eq!(vm.run_to_abort(), 0x9_0000);
    check!(
        call(Call::VcpuInPoisonFault, &[]) == Ok(1),
        "the guest's next access never comes back: the page is poisoned"
    );
    let other = pages.take();
    check!(
        call(Call::DonateGuest, &[other / PAGE, 0x90]) == Err(Error::NotPermitted),
        "and no other page can take its place"
    );
    check!(
        call(Call::StartTeardownVm, &[vm.handle]) == Err(Error::Invalid),
        "while a vCPU is loaded the VM cannot end"
    );
    assert_eq!(call(Call::VcpuPut, &[]), Ok(0));
    let back = vm.end(&[ENTRY / PAGE, 0xa0]);
    check!(
        get(text) == 0 && get(shown) == 0,
        "the VM is gone: {back} pages of tables and records came back empty, and so did its memory"
    );
}

/// Everything that must not work on a guest's pages.
fn refusals(vm: &Vm, text: u64, shown: u64) {
    let mut refused = 0;
    for page in [text / PAGE, shown / PAGE] {
        for (which, arguments) in [
            (Call::ShareHyp, [page, 0, 0, 0]),
            (Call::UnshareHyp, [page, 0, 0, 0]),
            (Call::DonateGuest, [page, 0xd0, 0, 0]),
            (Call::ShareGuest, [page, 0xd0, 1, 7]),
            (Call::ShareFfa, [page, 1, 0, 0]),
            (Call::UnshareFfa, [page, 1, 0, 0]),
        ] {
            assert_eq!(
                call(which, &arguments),
                Err(Error::NotPermitted),
                "{}",
                which.name()
            );
            refused += 1;
        }
    }
    for (which, expected) in [
        (Call::WrprotectGuest, Error::NotPermitted),
        (Call::UnshareGuest, Error::NotPermitted),
        (Call::ReclaimDyingGuestPage, Error::Invalid),
        (Call::FinalizeTeardownVm, Error::Invalid),
        (Call::UnreserveVm, Error::Invalid),
    ] {
        assert_eq!(
            call(which, &[vm.handle, ENTRY / PAGE, 1, 0]),
            Err(expected),
            "{}",
            which.name()
        );
        refused += 1;
    }
    check!(
        call(Call::ForceReclaimGuestPage, &[shown / PAGE]) == Err(Error::NotPermitted),
        "{} other attempts on the guest's pages are refused, a shared page cannot be taken either",
        refused
    );
}

/// An ordinary guest, which borrows its memory.
pub(crate) fn ordinary(pages: &mut Pages) {
    let vm = Vm::new(pages, false, 8);
    let text = pages.take();
    Program::Ordinary.copy_to(text);
    assert_eq!(call(Call::VcpuLoad, &[vm.handle, 0]), Ok(0));
    let share =
        |page: u64, gfn: u64, access: u64| call(Call::ShareGuest, &[page / PAGE, gfn, 1, access]);
    assert_eq!(share(text, ENTRY / PAGE, 0b101), Ok(0));
    let (both, small) = (pages.take(), pages.take());
    for gfn in [0x90, 0xb0] {
        assert_eq!(vm.run_to_abort(), gfn * PAGE);
        assert_eq!(share(both, gfn, 0b011), Ok(0));
    }
    let [seen, ..] = vm.run_to_call(0x1000_0001);
    check!(
        seen == 0x77 && get(both) == 0x77,
        "an ordinary guest borrows one page at two addresses, and the host still reads it"
    );
    assert_eq!(vm.run_to_abort(), 0xc_0000);
    assert_eq!(share(small, 0xc0, 0b001), Ok(0));
    assert_eq!(vm.run_to_abort(), 0xc_0000);
    let syndrome = vm.word(HostVcpu::SYNDROME);
    check!(
        syndrome & 0x3c == 0xc && get(small) == 0,
        "its write to a page that it may only read is a permission fault"
    );
    assert_eq!(call(Call::RelaxPermsGuest, &[0xc0, 0b011]), Ok(0));
    let [seen, ..] = vm.run_to_call(0x1000_0002);
    check!(seen == 0x77 && get(small) == 0x77, "until the host relents");
    assert_eq!(call(Call::VcpuPut, &[]), Ok(0));
    check!(
        call(Call::UnshareGuest, &[vm.handle, 0x90, 512]) == Err(Error::TooBig),
        "taking back a block where a page was lent is refused"
    );
    for gfn in [ENTRY / PAGE, 0x90, 0xb0, 0xc0] {
        assert_eq!(call(Call::UnshareGuest, &[vm.handle, gfn, 1]), Ok(0));
    }
    let back = vm.end(&[]);
    say!("host: the ordinary VM is gone, {back} pages came back");
}
