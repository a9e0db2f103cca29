//! What operations cost, in ticks of the machine's counter.

use crate::calls::call;
use crate::clock::{nanoseconds_per_tick, ticks};
use crate::events::Rings;
use crate::probe;
use crate::vm::{ENTRY, PAGE, Pages, Program, Vm};
use bare::say;
use twofold_pkvm::hypercall::Call;

/// Blocks of memory that are touched only to measure the first touch.
const UNTOUCHED: u64 = 0x4680_0000;
const BLOCK: u64 = 2 << 20;

/// Measures them.
pub(crate) fn figures(pages: &mut Pages) {
    let vm = Vm::new(pages, true, 8);
    assert_eq!(call(Call::VcpuLoad, &[vm.handle, 0]), Ok(0));
    let page = pages.take() / PAGE;
    // The tables exist after this one.
    assert_eq!(call(Call::DonateGuest, &[page, 0x3ff]), Ok(0));
    assert_eq!(call(Call::ForceReclaimGuestPage, &[page]), Ok(0));
    let measure = |what: &str, rounds: u64, body: &mut dyn FnMut(u64)| {
        let start = ticks();
        for round in 0..rounds {
            body(round);
        }
        let each = (ticks() - start) * nanoseconds_per_tick() / rounds;
        say!("figure: {what}: {each} ns");
    };
    measure("a call that is answered at once", 200, &mut |_| {
        let _ = call(Call::UnreserveVm, &[0]);
    });
    measure("share_hyp and unshare_hyp", 200, &mut |_| {
        let _ = call(Call::ShareHyp, &[page]);
        let _ = call(Call::UnshareHyp, &[page]);
    });
    measure(
        "donate_guest and force_reclaim, page wiped",
        200,
        &mut |round| {
            let _ = call(Call::DonateGuest, &[page, 0x200 + round]);
            let _ = call(Call::ForceReclaimGuestPage, &[page]);
        },
    );
    // Memory that nobody has touched yet: each block of 2 MiB is one fault.
    measure(
        "a fault of the host's stage 2, a block mapped",
        10,
        &mut |round| {
            let _ = probe::read(UNTOUCHED + round * BLOCK);
        },
    );
    let text = pages.take();
    Program::Calling.copy_to(text);
    assert_eq!(call(Call::DonateGuest, &[text / PAGE, ENTRY / PAGE]), Ok(0));
    measure("vcpu_run of a guest that calls the host", 200, &mut |_| {
        let _ = call(Call::VcpuRun, &[]);
    });
    let rings = Rings::load(pages);
    assert_eq!(call(Call::TracingEnable, &[1]), Ok(0));
    measure("a call that is answered at once, traced", 200, &mut |_| {
        let _ = call(Call::UnreserveVm, &[0]);
    });
    rings.unload();
    assert_eq!(call(Call::VcpuPut, &[]), Ok(0));
    vm.end(&[ENTRY / PAGE]);
}
