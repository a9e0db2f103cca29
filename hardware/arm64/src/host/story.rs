//! What happens, in order.

// UNSAFETY: entry points by name.
#![expect(unsafe_code)]

use crate::calls::{audit, call, power_off, start_second};
use crate::vm::{Pages, check};
use crate::{
    before, beside, devices, events, figures, guests, interrupts, nonsense, probe, second,
};
use bare::say;
use twofold_pkvm::Error;
use twofold_pkvm::hypercall::Call;

unsafe extern "C" {
    fn second_entry();
}

/// Memory that the host hands out, page by page.
pub(crate) const FREE: u64 = 0x4500_0000;

#[panic_handler]
fn panicked(info: &core::panic::PanicInfo<'_>) -> ! {
    say!("host: {info}");
    power_off(1)
}

#[unsafe(no_mangle)]
extern "C" fn rust_unexpected(syndrome: u64, pc: u64, address: u64) -> ! {
    panic!("exception at EL1: syndrome {syndrome:#x} at {pc:#x}, address {address:#x}");
}

/// Finalises this processor; the first one tells the story.
#[unsafe(no_mangle)]
extern "C" fn rust_main(processor: u64, hypervisor: u64) -> ! {
    if processor == 1 {
        assert_eq!(call(Call::ProtFinalize, &[]), Ok(0));
        second::work();
    }
    say!("host: running at EL1, below the hypervisor's stage 2");
    let gic = before::set_up(hypervisor);
    assert_eq!(call(Call::ProtFinalize, &[]), Ok(0));
    check!(
        call(Call::ProtFinalize, &[]) == Err(Error::NotPermitted),
        "finalising twice is refused"
    );
    before::over();
    check!(
        probe::read(hypervisor).is_none(),
        "reading the hypervisor at {hypervisor:#x} is answered with an abort, syndrome {:#x}",
        probe::syndrome()
    );
    check!(!probe::write(hypervisor + 0x1000, 0), "writing it too");
    check!(
        !probe::forbidden(),
        "an instruction that the hypervisor keeps for itself is undefined"
    );
    let entry = second_entry as *const () as u64;
    let two = start_second(entry) == 0;
    if two {
        check!(
            start_second(entry) == -4,
            "the second processor starts, once"
        );
    } else {
        say!("host: this machine has one processor; what takes two is NOT tried");
    }
    let mut pages = Pages(FREE);
    guests::protected(&mut pages, two);
    guests::ordinary(&mut pages);
    devices::emulated(&mut pages);
    if gic {
        interrupts::by_a_timer(&mut pages);
    } else {
        say!("host: this machine has no GICv3; interrupts of guests are NOT tried");
    }
    if two {
        beside::two_processors(&mut pages);
        beside::while_it_runs(&mut pages);
    }
    events::told(&mut pages, hypervisor, two);
    figures::figures(&mut pages);
    nonsense::afterwards(&mut pages);
    let Some([guests, own, served, denied]) = audit() else {
        panic!("a page is in no legal state");
    };
    check!(
        guests == 0,
        "in the end guests have 0 pages, the hypervisor {own}; {served} faults were served, {denied} answered with an abort"
    );
    say!("PASS");
    power_off(0)
}
