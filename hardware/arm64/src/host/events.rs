//! What the hypervisor tells of itself.

use crate::calls::call;
use crate::clock::{nanoseconds_per_tick, ticks};
use crate::vm::{PAGE, Pages, check, get, set};
use crate::{probe, second};
use bare::say;
use twofold_pkvm::Error;
use twofold_pkvm::hypercall::Call;
use twofold_pkvm::trace::{EVENT_WORDS, Event, HEADER_WORDS};

const PROCESSORS: u64 = 2;
/// Of each ring.
const RING: u64 = 3;

/// Rings of events that the host has lent.
pub(crate) struct Rings {
    description: u64,
    first: u64,
}

impl Rings {
    /// Lends them; every event is wanted.
    pub(crate) fn load(pages: &mut Pages) -> Self {
        let description = pages.take();
        let first = pages.0;
        set(description, PROCESSORS);
        set(description + 8, RING);
        assert_eq!(call(Call::ShareHyp, &[description / PAGE]), Ok(0));
        for number in 0..PROCESSORS * RING {
            let page = pages.take();
            assert_eq!(call(Call::ShareHyp, &[page / PAGE]), Ok(0));
            set(description + 16 + number * 8, page / PAGE);
        }
        let bytes = (2 + PROCESSORS * RING) * 8;
        assert_eq!(call(Call::TracingLoad, &[description, bytes]), Ok(0));
        for event in Event::ALL {
            assert_eq!(call(Call::TracingEnableEvent, &[event as u64, 1]), Ok(0));
        }
        Self { description, first }
    }

    /// The pages that are lent.
    fn pages(&self) -> impl Iterator<Item = u64> {
        (0..PROCESSORS * RING).map(|number| self.first + number * PAGE)
    }

    /// The oldest page of a processor's ring.
    fn read(&self, processor: u64) -> Result<u64, Error> {
        let index = call(Call::TracingSwapReader, &[processor])?;
        Ok(self.first + (processor * RING + index) * PAGE)
    }

    /// Takes them back.
    pub(crate) fn unload(self) {
        assert_eq!(call(Call::TracingUnload, &[]), Ok(0));
        for page in self.pages().chain([self.description]) {
            assert_eq!(
                call(Call::ShareHyp, &[page / PAGE]),
                Err(Error::NotPermitted)
            );
            assert_eq!(call(Call::UnshareHyp, &[page / PAGE]), Ok(0));
        }
    }
}

/// The events of a page: time, number, and what they are about.
fn events(page: u64) -> impl Iterator<Item = [u64; 4]> {
    (0..get(page)).map(move |number| {
        let first = page + (HEADER_WORDS as u64 + number * EVENT_WORDS as u64) * 8;
        [0, 8, 16, 24].map(|offset| get(first + offset))
    })
}

/// How an event reads.
fn tell([time, event, a, b]: [u64; 4]) {
    let shown = match event {
        event if event == Event::HostHcall as u64 => {
            let name = Call::of_function(a).map_or("unknown", Call::name);
            say!("event: {time:>8} ns  host_hcall {name} = {}", b as i64);
            return;
        }
        event if event == Event::HypEnter as u64 => "hyp_enter",
        event if event == Event::HypExit as u64 => "hyp_exit",
        event if event == Event::HostMemAbort as u64 => "host_mem_abort",
        _ => "selftest",
    };
    say!("event: {time:>8} ns  {shown} {a:#x} {b}");
}

/// Whether a page tells of an event.
fn has(page: u64, event: Event, about: [u64; 2]) -> bool {
    let [a, b] = about;
    events(page).any(|found| found[1..] == [event as u64, a, b])
}

/// The host lends rings, and reads there what it and the hypervisor have done.
pub(crate) fn told(pages: &mut Pages, hypervisor: u64, two: bool) {
    let spare = pages.take() / PAGE;
    check!(
        call(Call::TracingEnable, &[1]) == Err(Error::Invalid)
            && call(Call::TracingSwapReader, &[0]) == Err(Error::NoDevice),
        "there is nothing to trace into yet"
    );
    let rings = Rings::load(pages);
    // Nanoseconds from now on, in 256ths.
    let clock = [nanoseconds_per_tick() << 8, 8, 0, ticks()];
    assert_eq!(call(Call::TracingUpdateClock, &clock), Ok(0));
    assert_eq!(call(Call::TracingEnable, &[1]), Ok(0));
    assert_eq!(call(Call::ShareHyp, &[spare]), Ok(0));
    assert_eq!(call(Call::DonateGuest, &[spare, 0]), Err(Error::Invalid));
    assert_eq!(call(Call::UnshareHyp, &[spare]), Ok(0));
    assert!(probe::read(hypervisor).is_none());
    assert_eq!(call(Call::TracingWriteEvent, &[42]), Ok(0));
    assert_eq!(call(Call::TracingEnable, &[0]), Ok(0));
    let Ok(page) = rings.read(0) else {
        panic!("no events");
    };
    events(page).for_each(tell);
    let no = Error::Invalid.code() as u64;
    check!(
        has(page, Event::HostHcall, [Call::ShareHyp.function(), 0])
            && has(page, Event::HostHcall, [Call::DonateGuest.function(), no])
            && has(page, Event::HostMemAbort, [hypervisor, 2])
            && has(page, Event::Selftest, [42, 0]),
        "in a page that it shares the host reads what happened: its calls, an access that was denied, an event of its own"
    );
    check!(
        call(Call::UnshareHyp, &[page / PAGE]) == Err(Error::Busy),
        "it cannot take such a page back as long as it is written"
    );
    assert_eq!(call(Call::TracingEnable, &[1]), Ok(0));
    if two {
        assert!(!second::reads(hypervisor));
        let Ok(page) = rings.read(1) else {
            panic!("no events of the second processor");
        };
        check!(
            has(page, Event::HostMemAbort, [hypervisor, 2]),
            "the second processor's ring tells what was denied there"
        );
    }
    for _ in 0..200 {
        assert_eq!(call(Call::TracingWriteEvent, &[7]), Ok(0));
    }
    let Ok(page) = rings.read(0) else {
        panic!("no events");
    };
    check!(
        get(page + 8) > 0 && get(page) == 127,
        "800 events into room for 254: the oldest {} are lost and counted, the page is full",
        get(page + 8)
    );
    assert_eq!(call(Call::TracingReset, &[0]), Ok(0));
    rings.unload();
    check!(
        call(Call::TracingSwapReader, &[0]) == Err(Error::NoDevice),
        "after unloading the pages are the host's alone again"
    );
}
