//! What operations cost, in ticks of the machine's counter.

use crate::calls::call;
use crate::clock::{nanoseconds_per_tick, ticks};
use crate::events::Rings;
use crate::probe;
use crate::vm::{ENTRY, PAGE, Pages, Program, Vm};
use bare::say;
use twofold_pkvm::Error;
use twofold_pkvm::hypercall::Call;

/// Blocks of memory that are touched only to measure the first touch.
const UNTOUCHED: u64 = 0x4680_0000;
const BLOCK: u64 = 2 << 20;
/// How often each operation is done: on as many pages, where it is about pages.
const ROUNDS: u64 = 128;
/// Where the guests have those pages.
const FRAMES: u64 = 0x200;

/// Says what one of `rounds` takes.
fn measure(what: &str, rounds: u64, mut body: impl FnMut(u64) -> Result<u64, Error>) {
    let mut result = Ok(0);
    let start = ticks();
    for round in 0..rounds {
        result = result.and(body(round));
    }
    let each = (ticks() - start) * nanoseconds_per_tick() / rounds;
    assert!(result.is_ok(), "{what}: {result:?}");
    say!("figure: {what}: {each} ns");
}

/// Measures everything.
pub(crate) fn figures(pages: &mut Pages) {
    let first = pages.0 / PAGE;
    for _ in 0..ROUNDS {
        pages.take();
    }
    let lent = |round| first + round;
    measure("a call that is answered at once", ROUNDS, |_| {
        call(Call::TracingUnload, &[])
    });
    measure("share_hyp", ROUNDS, |round| {
        call(Call::ShareHyp, &[lent(round)])
    });
    measure("unshare_hyp", ROUNDS, |round| {
        call(Call::UnshareHyp, &[lent(round)])
    });
    protected(pages, first);
    ordinary(pages, first);
    // Memory that nobody has touched yet: each block of 2 MiB is one fault.
    measure(
        "a fault of the host's stage 2, a block mapped",
        10,
        |round| probe::read(UNTOUCHED + round * BLOCK).ok_or(Error::Fault),
    );
    let rings = Rings::load(pages);
    assert_eq!(call(Call::TracingEnable, &[1]), Ok(0));
    measure("a call that is answered at once, traced", ROUNDS, |_| {
        call(Call::TimerSetCntvoff, &[0])
    });
    rings.unload();
}

/// Pages of a protected guest, taken back by force and when it ends.
fn protected(pages: &mut Pages, first: u64) {
    let vm = Vm::new(pages, true, 8);
    assert_eq!(call(Call::VcpuLoad, &[vm.handle, 0]), Ok(0));
    // The tables exist after this.
    assert_eq!(call(Call::DonateGuest, &[first, FRAMES - 1]), Ok(0));
    assert_eq!(call(Call::ForceReclaimGuestPage, &[first]), Ok(0));
    measure("donate_guest", ROUNDS, |round| {
        call(Call::DonateGuest, &[first + round, FRAMES + round])
    });
    measure("force_reclaim_guest_page, wiped", ROUNDS, |round| {
        call(Call::ForceReclaimGuestPage, &[first + round])
    });
    // Those frames are poisoned.
    for round in 0..ROUNDS {
        let (page, frame) = (first + round, FRAMES + ROUNDS + round);
        assert_eq!(call(Call::DonateGuest, &[page, frame]), Ok(0));
    }
    let text = pages.take();
    Program::Calling.copy_to(text);
    assert_eq!(call(Call::DonateGuest, &[text / PAGE, ENTRY / PAGE]), Ok(0));
    measure("vcpu_run of a guest that calls the host", ROUNDS, |_| {
        call(Call::VcpuRun, &[])
    });
    assert_eq!(call(Call::VcpuPut, &[]), Ok(0));
    assert_eq!(call(Call::StartTeardownVm, &[vm.handle]), Ok(0));
    measure("reclaim_dying_guest_page, wiped", ROUNDS, |round| {
        let frame = FRAMES + ROUNDS + round;
        call(Call::ReclaimDyingGuestPage, &[vm.handle, frame])
    });
    vm.finish(&[ENTRY / PAGE]);
}

/// Pages that an ordinary guest borrows.
fn ordinary(pages: &mut Pages, first: u64) {
    let vm = Vm::new(pages, false, 8);
    assert_eq!(call(Call::VcpuLoad, &[vm.handle, 0]), Ok(0));
    // The tables exist after this.
    let share = |page: u64, frame: u64| call(Call::ShareGuest, &[page, frame, 1, 0b011]);
    let unshare = |frame: u64| call(Call::UnshareGuest, &[vm.handle, frame, 1]);
    assert_eq!(share(first, FRAMES), Ok(0));
    assert_eq!(unshare(FRAMES), Ok(0));
    measure("share_guest", ROUNDS, |round| {
        share(first + round, FRAMES + round)
    });
    measure("unshare_guest", ROUNDS, |round| unshare(FRAMES + round));
    assert_eq!(call(Call::VcpuPut, &[]), Ok(0));
    vm.end(&[]);
}
