//! Taking private pages away: which operations do, and in which order.

use crate::common::Found;
use crate::common::td::{PRIVATE, SHARED, TdMachine};
use std::sync::atomic::Ordering;
use twofold_arch::Level;
use twofold_mmu::{FaultError, Outcome};
use twofold_tdx::{Accept, PageType, Point, State, Status};

/// Frames 0..8 are private and mapped, 8..16 shared and mapped; the TD runs.
fn half_and_half() -> TdMachine {
    let machine = TdMachine::new(false, 2);
    machine.slot(0, 0, 16);
    machine.set(0..8, true);
    let (mut reader, roots) = (machine.mmu.reader(), machine.roots());
    for gfn in 0..16 {
        let error = if gfn < 8 { PRIVATE } else { SHARED };
        let outcome = machine.fault(&mut reader, &roots, gfn, error);
        assert_eq!(outcome, Ok(Outcome::Fixed { level: Level::L4K }));
    }
    machine.td.finalize();
    machine
}

/// Which frames are mapped: private ones, and shared ones.
fn mapped(machine: &TdMachine) -> (Vec<u64>, Vec<u64>) {
    let roots = machine.roots();
    let private = (0..16).filter(|&gfn| machine.td.secure(gfn).is_some());
    let shared = (0..16).filter(|&gfn| machine.shared(&roots, gfn) != Found::Nothing);
    let found = (private.collect::<Vec<_>>(), shared.collect());
    for gfn in 0..16 {
        let secure = machine.td.secure(gfn).map(|(page, _)| page);
        assert_eq!(machine.mirrored(&roots, gfn), secure);
    }
    found
}

fn frames(range: std::ops::Range<u64>) -> Vec<u64> {
    range.collect()
}

/// SPEC row 45.
#[test]
fn a_host_change_never_takes_private_pages_and_a_hole_never_shared_ones() {
    let machine = half_and_half();
    machine.punch(8..16);
    assert_eq!(mapped(&machine), (frames(0..8), frames(8..16)));
    machine.change_host(0..8);
    assert_eq!(mapped(&machine), (frames(0..8), frames(8..16)));
    machine.punch(2..12);
    assert_eq!(mapped(&machine), (frames(0..2), frames(8..16)));
    machine.change_host(0..10);
    assert_eq!(mapped(&machine), (frames(0..2), frames(10..16)));
    // Neither has an age.
    assert!(!machine.mmu.clear_young_gfns(0, gfns(0..2)));
    assert!(machine.mmu.clear_young_gfns(0, gfns(0..16)));
    assert_eq!(mapped(&machine), (frames(0..2), frames(10..16)));
    machine.mmu.zap_all();
    assert_eq!(mapped(&machine), (frames(0..2), frames(0..0)));
    machine.delete_slot(0);
    assert_eq!(mapped(&machine), (frames(0..0), frames(0..0)));
    machine.finish();
}

fn gfns(range: std::ops::Range<u64>) -> std::ops::Range<twofold_arch::Gfn> {
    twofold_arch::Gfn::new(range.start)..twofold_arch::Gfn::new(range.end)
}

/// SPEC row 45, and what the mail of seed 004 is about.
#[test]
fn a_conversion_takes_the_other_half_only_and_keeps_what_the_guest_has_accepted() {
    let machine = half_and_half();
    assert!(machine.td.enter(0));
    let accepted = machine.td.accept(0, 3);
    assert_eq!(accepted, Some(Accept::Returned(Status::SUCCESS)));
    let page = machine.memory.page_of(3).unwrap();
    machine.memory.write_word(page, 0x1234);
    // What is private becomes private.
    machine.set(0..10, true);
    assert_eq!(mapped(&machine), (frames(0..8), frames(10..16)));
    assert_eq!(machine.td.secure(3), Some((page, State::Mapped)));
    assert_eq!(machine.memory.word(page), 0x1234);
    assert_eq!(machine.td.tracks.load(Ordering::SeqCst), 0);
    // What is shared becomes shared.
    machine.set(6..16, false);
    assert_eq!(mapped(&machine), (frames(0..6), frames(10..16)));
    machine.finish();
}

/// SPEC row 51.
#[test]
fn a_page_goes_only_after_block_and_track_and_when_the_guests_inside_have_left() {
    let machine = half_and_half();
    for vcpu in 0..2 {
        assert!(machine.td.enter(vcpu));
    }
    for gfn in 0..8 {
        let accepted = machine.td.accept(0, gfn);
        assert_eq!(accepted, Some(Accept::Returned(Status::SUCCESS)));
        assert_eq!(machine.td.use_private(1, gfn), Some(true));
    }
    machine.set(0..8, false);
    // All in one TRACK, and nobody was held: nothing was busy.
    assert_eq!(machine.td.tracks.load(Ordering::SeqCst), 1);
    assert_eq!(machine.td.holds.load(Ordering::SeqCst), 0);
    assert_eq!(machine.td.use_private(1, 3), None, "it was made to leave");
    // It comes back without the translations that it had.
    assert!(machine.td.enter(1));
    assert_eq!(machine.td.use_private(1, 3), Some(false));
    assert_eq!(machine.td.owned(PageType::Regular).len(), 0);
    machine.finish();
}

/// SPEC row 51: a hypervisor that does not make the guests leave.
#[test]
fn a_page_that_a_guest_inside_may_use_is_refused_to_the_host_and_stays_where_it_is() {
    let machine = half_and_half();
    assert!(machine.td.enter(0));
    machine.td.accept(0, 3).unwrap();
    assert_eq!(machine.td.use_private(0, 3), Some(true));
    machine.td.forgets_to_kick.store(true, Ordering::SeqCst);
    machine.set(3..4, false);
    let status = machine.mmu.bug().map(Status::from_raw);
    assert!(status.is_some_and(|status| status.is(Status::TLB_TRACKING_NOT_DONE)));
    let page = machine.memory.page_of(3).unwrap();
    assert_eq!(machine.td.secure(3), Some((page, State::Blocked)));
    assert_eq!(machine.mirrored(&machine.roots(), 3), Some(page));
    let mut reader = machine.mmu.reader();
    let outcome = machine.fault(&mut reader, &machine.roots(), 9, PRIVATE);
    assert_eq!(outcome, Err(FaultError::Bugged));
    drop(reader);
    machine.end();
}

/// SPEC row 49: on the way out nothing may fail for good.
#[test]
fn whatever_is_busy_on_the_way_out_the_guests_are_held_until_the_pages_are_gone() {
    let points = [Point::Td, Point::SeptTree, Point::SeptEntry, Point::TdEpoch];
    for (point, skip, times) in points
        .into_iter()
        .flat_map(|point| [0, 1, 5, 9].map(|skip| (point, skip)))
        .flat_map(|(point, skip)| [1, 3].map(|times| (point, skip, times)))
    {
        // There is only one TRACK to be busy.
        if point == Point::TdEpoch && skip != 0 {
            continue;
        }
        let machine = half_and_half();
        assert!(machine.td.enter(0));
        machine.memory.make_busy(point, skip, times);
        machine.set(0..8, false);
        assert_eq!(machine.memory.busy_left(), 0, "{point:?} {skip} {times}");
        assert_eq!(machine.td.holds.load(Ordering::SeqCst), 1);
        assert_eq!(mapped(&machine), (frames(0..0), frames(8..16)));
        assert_eq!(machine.td.owned(PageType::Regular).len(), 0);
        // And let go again.
        assert!(machine.td.enter(1));
        machine.finish();
    }
}

#[test]
fn a_long_range_is_taken_in_batches_with_one_track_each() {
    let machine = TdMachine::new(false, 1);
    machine.slot(0, 0, 200);
    machine.set(0..200, true);
    let (mut reader, roots) = (machine.mmu.reader(), machine.roots());
    machine.td.finalize();
    for gfn in 0..200 {
        machine.fault(&mut reader, &roots, gfn, PRIVATE).unwrap();
    }
    assert_eq!(machine.mmu.stats().pages_4k, 200);
    machine.punch(0..200);
    assert_eq!(machine.td.tracks.load(Ordering::SeqCst), 4);
    assert_eq!(machine.td.owned(PageType::Regular).len(), 0);
    assert_eq!(machine.mmu.stats().pages_4k, 0);
    // Nothing there: nothing to track.
    machine.set(0..200, false);
    assert_eq!(machine.td.tracks.load(Ordering::SeqCst), 4);
    drop((reader, roots));
    machine.finish();
}

#[test]
fn before_the_td_runs_its_pages_go_without_track() {
    let machine = TdMachine::new(false, 1);
    machine.slot(0, 0, 8);
    machine.set(0..8, true);
    let (mut reader, roots) = (machine.mmu.reader(), machine.roots());
    machine.fault(&mut reader, &roots, 1, PRIVATE).unwrap();
    machine.delete_slot(0);
    assert_eq!(machine.td.secure(1), None);
    assert_eq!(machine.mirrored(&roots, 1), None);
    drop((reader, roots));
    machine.finish();
}
