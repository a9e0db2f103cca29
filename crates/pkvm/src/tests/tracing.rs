//! Rings of events.

use super::setting::*;
use crate::error::Error;
use crate::hypercall::{Call, REGISTERS};
use crate::run::{Exit, Reason};
use crate::testing::{Accesses, Ram, become_processor};
use crate::trace::{Cause, EVENT_WORDS, EVENTS, Event, HEADER_WORDS, MAX_PAGES};
use std::sync::atomic::Ordering::SeqCst;
use twofold_arch::{Hfn, Hpa, PAGE_SIZE};

/// The page with the description, and the first of a ring.
const DESCRIPTION: u64 = 100;
const RINGS: u64 = 110;

fn page(number: u64) -> Hfn {
    Ram::page(number)
}

fn description() -> Hpa {
    page(DESCRIPTION).address()
}

/// Describes rings of `pages` pages for `processors` processors; how many bytes that takes.
fn describe(hyp: &Hyp<'_>, processors: u64, pages: u64) -> u64 {
    let frames = (0..processors * pages).map(|number| page(RINGS + number).get());
    let words: Vec<u64> = [processors, pages].into_iter().chain(frames).collect();
    hyp.host_writes(description(), &words);
    words.len() as u64 * 8
}

/// Loads such rings, all of whose pages are shared first.
fn load(hyp: &Hyp<'_>, processors: u64, pages: u64) {
    hyp.host_share_hyp(page(DESCRIPTION)).unwrap();
    for number in 0..processors * pages {
        hyp.host_share_hyp(page(RINGS + number)).unwrap();
    }
    let size = describe(hyp, processors, pages);
    hyp.tracing_load(description(), size).unwrap();
}

fn read(hyp: &Hyp<'_>, page: Hfn, index: usize) -> u64 {
    hyp.platform().word(page, index).load(SeqCst)
}

/// Takes the oldest page of a ring of `pages` pages: what was lost before it, and its events.
fn take(hyp: &Hyp<'_>, processor: u64, pages: u64) -> Result<(u64, Vec<[u64; 4]>), Error> {
    let index = hyp.tracing_swap_reader(processor)? as u64;
    assert!(index < pages);
    let page = page(RINGS + processor * pages + index);
    let events = (0..read(hyp, page, 0) as usize)
        .map(|number| {
            let first = HEADER_WORDS + number * EVENT_WORDS;
            core::array::from_fn(|word| read(hyp, page, first + word))
        })
        .collect();
    Ok((read(hyp, page, 1), events))
}

fn write(hyp: &Hyp<'_>, number: u64) {
    hyp.trace(Event::Selftest, number, 0);
}

fn only_selftest(hyp: &Hyp<'_>) {
    hyp.tracing_enable_event(Event::Selftest as u64, true)
        .unwrap();
    hyp.tracing_enable(true).unwrap();
}

#[test]
fn the_host_reads_what_happened_in_order_and_with_its_time() {
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    hyp.finalise().unwrap();
    load(&hyp, 1, 3);
    for event in Event::ALL {
        hyp.tracing_enable_event(event as u64, true).unwrap();
    }
    // Two counts are one nanosecond, and 1000 counts the epoch 5.
    hyp.tracing_update_clock(1, 1, 5, 1000).unwrap();
    hyp.tracing_enable(true).unwrap();
    let mut x = [0; REGISTERS];
    x[..2].copy_from_slice(&[Call::ShareHyp.function(), page(90).get()]);
    hyp.hypercall(&mut x, &mut |_, _| Exit::Interrupt);
    assert!(!hyp.host_reaches(page(3)));
    let handle = start(&hyp, Place(200), true, &[]);
    with(&hyp, handle, || {
        let reason = hyp.vcpu_run(&mut |_, _| Exit::Interrupt);
        assert_eq!(reason, Ok(Reason::Interrupt));
        Ok(())
    })
    .unwrap();
    let (lost, events) = take(&hyp, 0, 3).unwrap();
    assert_eq!(lost, 0);
    let times: Vec<u64> = events.iter().map(|event| event[0]).collect();
    assert!(times.is_sorted());
    assert_eq!(times[0], 5, "the first count is 1000");
    assert_eq!(times[2], 6);
    let [enter, exit, call, fault] = [
        Event::HypEnter,
        Event::HypExit,
        Event::HostHcall,
        Event::HostMemAbort,
    ];
    let told = |event: Event, a: u64, b: u64| [event as u64, a, b];
    let own = page(3).address().get();
    let expected = [
        told(enter, Cause::Hypercall as u64, 0),
        told(call, Call::ShareHyp.function(), 0),
        told(exit, Cause::Hypercall as u64, 0),
        told(enter, Cause::HostAbort as u64, 0),
        told(fault, own, 2),
        told(exit, Cause::HostAbort as u64, 0),
    ];
    let found: Vec<[u64; 3]> = events
        .iter()
        .map(|event| [event[1], event[2], event[3]])
        .collect();
    assert_eq!(found[..6], expected);
    let guest = [
        told(exit, Cause::Guest as u64, 0),
        told(enter, Cause::Guest as u64, Reason::Interrupt as u64),
    ];
    assert!(found.windows(2).any(|pair| pair == guest));
    assert_eq!(take(&hyp, 0, 3), Err(Error::Again), "nothing new");
}

#[test]
fn nothing_is_written_unless_it_is_wanted() {
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    write(&hyp, 0);
    assert_eq!(
        hyp.tracing_enable(true),
        Err(Error::Invalid),
        "nothing is loaded"
    );
    assert_eq!(hyp.tracing_enable(false), Ok(()));
    load(&hyp, 1, 2);
    write(&hyp, 1);
    hyp.tracing_enable(true).unwrap();
    write(&hyp, 2);
    hyp.tracing_enable_event(Event::Selftest as u64, true)
        .unwrap();
    hyp.trace(Event::HypEnter, 3, 0);
    write(&hyp, 4);
    hyp.tracing_enable_event(Event::Selftest as u64, false)
        .unwrap();
    write(&hyp, 5);
    hyp.tracing_enable_event(Event::Selftest as u64, true)
        .unwrap();
    hyp.tracing_enable(false).unwrap();
    write(&hyp, 6);
    // Another processor has no ring: what it does is nowhere.
    hyp.tracing_enable(true).unwrap();
    become_processor(1);
    write(&hyp, 7);
    become_processor(0);
    let (_, events) = take(&hyp, 0, 2).unwrap();
    let written: Vec<u64> = events.iter().map(|event| event[2]).collect();
    assert_eq!(written, [4]);
    assert_eq!(hyp.tracing_swap_reader(1), Err(Error::NoDevice));
    assert_eq!(hyp.tracing_enable_event(5, true), Err(Error::Invalid));
    assert_eq!(hyp.tracing_enable_event(1 << 16, true), Err(Error::Invalid));
}

#[test]
fn whatever_is_not_read_in_time_is_counted_and_the_rest_stays_in_order() {
    for pages in 2..=MAX_PAGES as u64 {
        for written in [1, EVENTS, EVENTS + 1, 3 * EVENTS, 20 * EVENTS + 7] {
            let ram = Ram::new(256, 64);
            let hyp = ram.boot();
            load(&hyp, 1, pages);
            only_selftest(&hyp);
            for number in 0..written as u64 {
                write(&hyp, number);
            }
            let (mut next, mut lost) = (0, 0);
            while let Ok((missed, events)) = take(&hyp, 0, pages) {
                (next, lost) = (next + missed, lost + missed);
                for event in events {
                    assert_eq!(event[2], next);
                    next += 1;
                }
            }
            assert_eq!(next, written as u64, "{pages} pages, {written} events");
            let room = (pages as usize - 1) * EVENTS;
            assert_eq!(
                lost == 0,
                written <= room,
                "{pages} pages, {written} events"
            );
        }
    }
}

#[test]
fn reading_and_writing_in_turn_loses_nothing_that_there_is_room_for() {
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    load(&hyp, 2, 4);
    only_selftest(&hyp);
    let (mut next, mut written) = (0, 0);
    for round in 0..200u64 {
        for _ in 0..(round * 37) % (2 * EVENTS as u64) {
            write(&hyp, written);
            written += 1;
        }
        while let Ok((lost, events)) = take(&hyp, 0, 4) {
            assert_eq!(lost, 0);
            for event in events {
                assert_eq!(event[2], next);
                next += 1;
            }
            if round % 3 == 0 {
                break;
            }
        }
        if round % 3 == 0 && written - next > EVENTS as u64 {
            while let Ok((0, events)) = take(&hyp, 0, 4) {
                next += events.len() as u64;
            }
        }
    }
    assert!(written > 1000 && next == written, "{next} of {written}");
    // The other processor's ring is its own.
    become_processor(1);
    write(&hyp, 77);
    become_processor(0);
    assert_eq!(take(&hyp, 0, 4), Err(Error::Again));
    let (_, events) = take(&hyp, 1, 4).unwrap();
    assert_eq!(events[0][2], 77);
    write(&hyp, 78);
    hyp.tracing_reset(0).unwrap();
    assert_eq!(take(&hyp, 0, 4), Err(Error::Again));
}

#[test]
fn what_the_host_writes_into_its_pages_misleads_only_itself() {
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    load(&hyp, 1, 2);
    only_selftest(&hyp);
    for number in 0..3 * EVENTS as u64 {
        for ring_page in 0..2 {
            hyp.host_writes(page(RINGS + ring_page).address(), &[u64::MAX; 512]);
        }
        write(&hyp, number);
    }
    let (_, events) = take(&hyp, 0, 2).unwrap();
    assert_eq!(events.last().unwrap()[2], 3 * EVENTS as u64 - 1);
    // The words after the ring's pages are untouched.
    assert_eq!(read(&hyp, page(RINGS + 2), 0), 0);
    hyp.audit().unwrap();
}

#[test]
fn loaded_pages_stay_pinned_until_they_are_unloaded() {
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    load(&hyp, 2, 2);
    let size = describe(&hyp, 2, 2);
    assert_eq!(
        hyp.tracing_load(description(), size),
        Err(Error::Invalid),
        "a second time"
    );
    hyp.host_unshare_hyp(page(DESCRIPTION)).unwrap();
    for number in 0..4 {
        assert_eq!(hyp.host_unshare_hyp(page(RINGS + number)), Err(Error::Busy));
    }
    only_selftest(&hyp);
    hyp.tracing_unload();
    hyp.tracing_unload();
    write(&hyp, 1);
    for number in 0..4 {
        hyp.host_unshare_hyp(page(RINGS + number)).unwrap();
        assert_eq!(read(&hyp, page(RINGS + number), 0), 0);
    }
    assert_eq!(hyp.tracing_swap_reader(0), Err(Error::NoDevice));
    assert_eq!(hyp.tracing_reset(0), Err(Error::NoDevice));
    hyp.audit().unwrap();
}

#[test]
fn a_description_that_makes_no_sense_pins_nothing() {
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    let size = describe(&hyp, 1, 2);
    let load = |address: Hpa, size| hyp.tracing_load(address, size);
    assert_eq!(
        load(description(), size),
        Err(Error::NotPermitted),
        "it is not shared"
    );
    hyp.host_share_hyp(page(DESCRIPTION)).unwrap();
    assert_eq!(
        load(description(), size),
        Err(Error::NotPermitted),
        "its pages are not"
    );
    hyp.host_share_hyp(page(RINGS)).unwrap();
    assert_eq!(
        load(description(), size),
        Err(Error::NotPermitted),
        "its second is not"
    );
    let unchanged = |what: &str| {
        for number in [DESCRIPTION, RINGS] {
            let count = hyp.pages().record(page(number)).unwrap().count();
            assert_eq!(count, 0, "{what}");
        }
    };
    unchanged("not shared");
    let frame = page(RINGS).get();
    for words in [
        [0, 2, frame, frame],
        [17, 2, frame, frame],
        [1, 1, frame, frame],
        [1, 9, frame, frame],
        [u64::MAX, u64::MAX, frame, frame],
        [1 << 32, 1 << 32, frame, frame],
        [1, 2, frame, frame],
        [1, 2, frame, u64::MAX],
        [1, 2, u64::MAX, frame],
    ] {
        hyp.host_writes(description(), &words);
        assert_eq!(load(description(), 32), Err(Error::Invalid), "{words:?}");
        unchanged("nonsense");
    }
    // Not memory, and the hypervisor's own.
    for stranger in [0, page(3).get()] {
        hyp.host_writes(description(), &[1, 2, frame, stranger]);
        assert_eq!(load(description(), 32), Err(Error::NotPermitted));
        unchanged("not the host's");
    }
    hyp.host_share_hyp(page(RINGS + 1)).unwrap();
    describe(&hyp, 1, 2);
    for size in [0, 24, 33, 40, u64::MAX] {
        assert_eq!(load(description(), size), Err(Error::Invalid), "{size}");
    }
    let late = Hpa::new(description().get() + PAGE_SIZE - 24);
    hyp.host_writes(late, &[1, 2, frame]);
    assert_eq!(
        load(late, 32),
        Err(Error::Invalid),
        "beyond the end of the page"
    );
    for address in [description().get() + 1, u64::MAX, 0] {
        assert!(load(Hpa::new(address), 32).is_err());
    }
    unchanged("all of it");
    assert_eq!(load(description(), 32), Ok(()));
}

#[test]
fn clocks_of_every_kind_are_computed_without_overflow() {
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    let update =
        |multiplier, shift| hyp.tracing_update_clock(multiplier, shift, u64::MAX, u64::MAX);
    assert_eq!(update(1 << 32, 0), Err(Error::Invalid));
    assert_eq!(update(1, 64), Err(Error::Invalid));
    assert_eq!(update(1, 1 << 32), Err(Error::Invalid));
    load(&hyp, 1, 2);
    only_selftest(&hyp);
    for (multiplier, shift) in [(0, 0), (1, 63), (0xffff_ffff, 0), (0xffff_ffff, 63)] {
        assert_eq!(update(multiplier, shift), Ok(()));
        write(&hyp, 1);
    }
    assert_eq!(take(&hyp, 0, 2).unwrap().1.len(), 4);
    for processor in [16, 1 << 32, u64::MAX] {
        assert_eq!(hyp.tracing_swap_reader(processor), Err(Error::Invalid));
        assert_eq!(hyp.tracing_reset(processor), Err(Error::Invalid));
    }
}
