//! What the functions on memory do, and what they refuse.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{World, info, refused};
use std::sync::atomic::Ordering;
use twofold_arch::{Gpa, Hpa};
use twofold_tdx::measurement::Measurement;
use twofold_tdx::{Accept, PageType, Point, State, Status, Violation};

const GPA: Gpa = Gpa::new(0x5000);

#[test]
fn a_page_that_is_added_is_copied_mapped_and_measured() {
    let world = World::initialized(0, 0);
    world.tables(GPA, 0);
    let (source, page) = (world.fresh(), world.fresh());
    world.machine().write(source, &[0x5a; 4096]);
    let module = &world.module;
    module
        .page_add(info(GPA, 0), world.tdr, page, source)
        .unwrap();
    assert_eq!(world.machine().bytes(page), [0x5a; 4096]);
    assert_eq!(world.entry(GPA, 0).state(), Some(State::Mapped));
    for chunk in 0..16 {
        module
            .mr_extend(GPA.get() + 256 * chunk, world.tdr)
            .unwrap();
    }
    module.mr_finalize(world.tdr).unwrap();
    let mut expected = Measurement::new();
    expected.add_page(GPA.get());
    for chunk in 0..16 {
        expected.extend(GPA.get() + 256 * chunk, &[0x5a; 256]);
    }
    assert_eq!(module.measurement(world.tdr), Some(expected.finish()));
}

#[test]
fn a_page_cannot_be_added_twice_nor_after_the_measurement_ended() {
    let world = World::initialized(0, 0);
    world.tables(GPA, 0);
    let (source, page) = (world.fresh(), world.fresh());
    let module = &world.module;
    module
        .page_add(info(GPA, 0), world.tdr, page, source)
        .unwrap();
    let again = module.page_add(info(GPA, 0), world.tdr, world.fresh(), source);
    refused(again, Status::EPT_ENTRY_STATE_INCORRECT);
    let elsewhere = Gpa::new(0x6000);
    let in_use = module.page_add(info(elsewhere, 0), world.tdr, page, source);
    refused(in_use, Status::PAGE_METADATA_INCORRECT);
    module.mr_finalize(world.tdr).unwrap();
    let late = module.page_add(info(elsewhere, 0), world.tdr, world.fresh(), source);
    refused(late, Status::OP_STATE_INCORRECT);
    refused(
        module.mr_extend(GPA.get(), world.tdr),
        Status::OP_STATE_INCORRECT,
    );
    refused(module.mr_finalize(world.tdr), Status::OP_STATE_INCORRECT);
}

#[test]
fn a_source_that_is_not_there_changes_nothing() {
    let world = World::initialized(0, 0);
    world.tables(GPA, 0);
    let page = world.fresh();
    let result = world
        .module
        .page_add(info(GPA, 0), world.tdr, page, Hpa::new(0x1000));
    refused(result, Status::OPERAND_INVALID);
    assert_eq!(world.module.metadata(page), None);
    assert_eq!(world.entry(GPA, 0).state(), Some(State::Free));
}

#[test]
fn a_missing_table_is_named_with_its_level() {
    let world = World::initialized(0, 0);
    let failure = world
        .module
        .page_aug(info(GPA, 0), world.tdr, world.fresh())
        .unwrap_err();
    assert!(failure.status.is(Status::EPT_WALK_FAILED));
    assert_eq!(failure.entry.map(|(_, level)| level), Some(3));
}

#[test]
fn the_guest_accepts_a_page_once_and_finds_zeros() {
    let world = World::runnable();
    let page = world.fresh();
    world.machine().write(page, &[0xff; 4096]);
    world
        .module
        .page_aug(info(GPA, 0), world.tdr, page)
        .unwrap();
    let guest = world.enter(0);
    assert_eq!(guest.violation(GPA), Violation::Ve);
    assert_eq!(
        guest.accept(info(GPA, 0)),
        Accept::Returned(Status::SUCCESS)
    );
    assert_eq!(world.machine().bytes(page), [0; 4096]);
    assert_eq!(world.entry(GPA, 0).state(), Some(State::Mapped));
    assert_eq!(guest.violation(GPA), Violation::Present);
    let Accept::Returned(again) = guest.accept(info(GPA, 0)) else {
        panic!("left");
    };
    assert!(again.is(Status::PAGE_ALREADY_ACCEPTED));
    assert!(!again.is_error());
}

#[test]
fn accepting_what_the_host_has_not_given_leaves_the_guest() {
    let world = World::runnable();
    let guest = world.enter(0);
    for gpa in [GPA, Gpa::new(0x40_0000_0000)] {
        assert!(matches!(guest.accept(info(gpa, 0)), Accept::Exit { gpa: at, .. } if at == gpa));
        assert_eq!(guest.violation(gpa), Violation::Exit);
    }
}

#[test]
fn accept_refuses_addresses_that_are_shared_or_not_aligned() {
    let world = World::runnable();
    let guest = world.enter(0);
    for rcx in [1 << 47, 0x1001 << 12 | 1, 0x5008, 2, 1 << 60] {
        let Accept::Returned(status) = guest.accept(rcx) else {
            panic!("{rcx:#x} left the guest");
        };
        assert!(status.is(Status::OPERAND_INVALID), "{rcx:#x}: {status}");
    }
}

#[test]
fn a_guest_that_wants_no_ve_leaves_on_a_page_that_waits() {
    let world = World::initialized(twofold_tdx::SEPT_VE_DISABLE, 1);
    world.tables(GPA, 0);
    world.module.mr_finalize(world.tdr).unwrap();
    world
        .module
        .page_aug(info(GPA, 0), world.tdr, world.fresh())
        .unwrap();
    assert_eq!(world.enter(0).violation(GPA), Violation::PendingExit);
}

#[test]
fn a_size_that_differs_from_the_mapping_is_told_apart() {
    let world = World::runnable();
    let guest = world.enter(0);
    // 2M asked for, 4K tables there.
    let Accept::Returned(status) = guest.accept(info(Gpa::new(0), 1)) else {
        panic!("left");
    };
    assert!(status.is(Status::PAGE_SIZE_MISMATCH));
    assert_eq!(status.detail(), 1);
    // 4K asked for, 2M mapped and accepted.
    let large = Gpa::new(0x20_0000);
    let page = world.machine().large(0);
    world
        .module
        .page_aug(info(large, 1), world.tdr, page)
        .unwrap();
    assert_eq!(
        guest.accept(info(large, 1)),
        Accept::Returned(Status::SUCCESS)
    );
    let Accept::Returned(status) = guest.accept(info(large, 0)) else {
        panic!("left");
    };
    assert!(status.is(Status::PAGE_ALREADY_ACCEPTED));
    assert_eq!(status.detail(), 1);
}

#[test]
fn accepting_2m_goes_on_where_an_interrupt_ended_it() {
    let world = World::runnable();
    let large = Gpa::new(0x20_0000);
    let page = world.machine().large(1);
    world
        .module
        .page_aug(info(large, 1), world.tdr, page)
        .unwrap();
    let guest = world.enter(0);
    let mut rounds = 0;
    loop {
        world.machine().interrupt_after.store(99, Ordering::Relaxed);
        rounds += 1;
        match guest.accept(info(large, 1)) {
            Accept::Again => {
                let entry = world.entry(large, 1);
                assert_eq!(entry.state(), Some(State::Pending));
                assert_eq!(entry.page(1), page, "the count is no part of the address");
            }
            Accept::Returned(Status::SUCCESS) => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(rounds, 6);
    let last = Hpa::new(page.get() + 511 * 4096);
    assert_eq!(world.machine().bytes(page), [0; 4096]);
    assert_eq!(world.machine().bytes(last), [0; 4096]);
    assert_eq!(world.entry(large, 1).state(), Some(State::Mapped));
}

#[test]
fn a_running_td_loses_a_page_only_after_block_and_track() {
    let world = World::runnable();
    let page = world.fresh();
    let module = &world.module;
    module.page_aug(info(GPA, 0), world.tdr, page).unwrap();
    let guest = world.enter(0);
    let _ = guest.accept(info(GPA, 0));
    let remove = || module.page_remove(info(GPA, 0), world.tdr);
    refused(remove(), Status::GPA_RANGE_NOT_BLOCKED);
    module.range_block(info(GPA, 0), world.tdr).unwrap();
    refused(
        module.range_block(info(GPA, 0), world.tdr),
        Status::GPA_RANGE_ALREADY_BLOCKED,
    );
    refused(remove(), Status::TLB_TRACKING_NOT_DONE);
    module.track(world.tdr).unwrap();
    // The guest has been inside all the time.
    refused(remove(), Status::TLB_TRACKING_NOT_DONE);
    refused(module.track(world.tdr), Status::PREVIOUS_TLB_EPOCH_BUSY);
    assert_eq!(guest.violation(GPA), Violation::Exit);
    drop(guest);
    assert_eq!(remove(), Ok(page));
    assert_eq!(module.metadata(page), None);
    assert_eq!(world.entry(GPA, 0).state(), Some(State::Free));
}

#[test]
fn a_guest_that_enters_after_a_new_epoch_has_to_flush_once() {
    let world = World::runnable();
    assert!(world.enter(0).must_flush());
    assert!(!world.enter(0).must_flush());
    world.module.track(world.tdr).unwrap();
    assert!(world.enter(0).must_flush());
    assert!(!world.enter(0).must_flush());
}

#[test]
fn before_the_td_runs_nothing_has_to_be_tracked() {
    let world = World::initialized(0, 0);
    world.tables(GPA, 0);
    let page = world.fresh();
    let module = &world.module;
    module.page_aug(info(GPA, 0), world.tdr, page).unwrap();
    assert_eq!(module.page_remove(info(GPA, 0), world.tdr), Ok(page));
    assert!(module.sept_remove(info(GPA, 1), world.tdr).is_ok());
}

#[test]
fn unblocking_gives_the_guest_its_page_back_with_its_content() {
    let world = World::runnable();
    let page = world.fresh();
    let module = &world.module;
    module.page_aug(info(GPA, 0), world.tdr, page).unwrap();
    let _ = world.enter(0).accept(info(GPA, 0));
    world.machine().write(page, b"mine");
    module.range_block(info(GPA, 0), world.tdr).unwrap();
    refused(
        module.range_unblock(info(GPA, 0), world.tdr),
        Status::TLB_TRACKING_NOT_DONE,
    );
    module.track(world.tdr).unwrap();
    module.range_unblock(info(GPA, 0), world.tdr).unwrap();
    assert_eq!(world.enter(0).violation(GPA), Violation::Present);
    assert_eq!(&world.machine().bytes(page)[..4], b"mine");
}

#[test]
fn a_table_goes_only_when_it_maps_nothing() {
    let world = World::runnable();
    let module = &world.module;
    module
        .page_aug(info(GPA, 0), world.tdr, world.fresh())
        .unwrap();
    module.range_block(info(GPA, 1), world.tdr).unwrap();
    module.track(world.tdr).unwrap();
    refused(
        module.sept_remove(info(GPA, 1), world.tdr),
        Status::EPT_PAGE_NOT_FREE,
    );
    // What is below a blocked table is out of reach.
    refused(
        module.page_remove(info(GPA, 0), world.tdr),
        Status::EPT_WALK_FAILED,
    );
    module.range_unblock(info(GPA, 1), world.tdr).unwrap();
    world.remove(GPA, 0);
    module.range_block(info(GPA, 1), world.tdr).unwrap();
    module.track(world.tdr).unwrap();
    let table = module.sept_remove(info(GPA, 1), world.tdr).unwrap();
    assert_eq!(module.metadata(table), None);
}

#[test]
fn splitting_and_merging_keep_content_and_state() {
    let world = World::runnable();
    let module = &world.module;
    let large = Gpa::new(0x40_0000);
    let page = world.machine().large(2);
    module.page_aug(info(large, 1), world.tdr, page).unwrap();
    let _ = world.enter(0).accept(info(large, 1));
    let third = Hpa::new(page.get() + 3 * 4096);
    world.machine().write(third, b"kept");
    let table = world.fresh();
    refused(
        module.page_demote(info(large, 1), world.tdr, table),
        Status::GPA_RANGE_NOT_BLOCKED,
    );
    module.range_block(info(large, 1), world.tdr).unwrap();
    module.track(world.tdr).unwrap();
    module
        .page_demote(info(large, 1), world.tdr, table)
        .unwrap();
    let guest = world.enter(0);
    let small = Gpa::new(large.get() + 3 * 4096);
    assert_eq!(world.entry(small, 0).page(0), third);
    assert_eq!(guest.violation(small), Violation::Present);
    assert_eq!(&world.machine().bytes(third)[..4], b"kept");
    drop(guest);
    // One page that differs stands in the way.
    module.range_block(info(small, 0), world.tdr).unwrap();
    module.range_block(info(large, 1), world.tdr).unwrap();
    module.track(world.tdr).unwrap();
    refused(
        module.page_promote(info(large, 1), world.tdr),
        Status::EPT_INVALID_PROMOTE_CONDITIONS,
    );
    module.range_unblock(info(large, 1), world.tdr).unwrap();
    module.range_unblock(info(small, 0), world.tdr).unwrap();
    module.range_block(info(large, 1), world.tdr).unwrap();
    module.track(world.tdr).unwrap();
    assert_eq!(module.page_promote(info(large, 1), world.tdr), Ok(table));
    assert_eq!(world.entry(large, 1).state(), Some(State::Mapped));
    assert_eq!(world.entry(large, 1).page(1), page);
    assert_eq!(module.metadata(page).map(|page| page.level), Some(1));
    assert_eq!(module.metadata(third), None);
}

#[test]
fn a_page_that_moves_takes_its_content_along() {
    let world = World::runnable();
    let module = &world.module;
    let (old, new) = (world.fresh(), world.fresh());
    module.page_aug(info(GPA, 0), world.tdr, old).unwrap();
    let _ = world.enter(0).accept(info(GPA, 0));
    world.machine().write(old, b"moved");
    module.range_block(info(GPA, 0), world.tdr).unwrap();
    module.track(world.tdr).unwrap();
    assert_eq!(module.page_relocate(info(GPA, 0), world.tdr, new), Ok(old));
    assert_eq!(&world.machine().bytes(new)[..5], b"moved");
    assert_eq!(world.entry(GPA, 0).page(0), new);
    assert_eq!(module.metadata(old), None);
    assert_eq!(
        module.metadata(new).map(|page| page.kind),
        Some(PageType::Regular)
    );
}

#[test]
fn every_lock_that_is_taken_is_an_answer_and_changes_nothing() {
    let world = World::runnable();
    let module = &world.module;
    module
        .page_aug(info(GPA, 0), world.tdr, world.fresh())
        .unwrap();
    for point in [Point::Td, Point::SeptTree, Point::SeptEntry] {
        world.machine().busy.lock().unwrap().push((point, 1));
        refused(
            module.range_block(info(GPA, 0), world.tdr),
            Status::OPERAND_BUSY,
        );
        assert_eq!(world.entry(GPA, 0).state(), Some(State::Pending));
    }
    world
        .machine()
        .busy
        .lock()
        .unwrap()
        .push((Point::TdEpoch, 1));
    refused(module.track(world.tdr), Status::OPERAND_BUSY);
    module.range_block(info(GPA, 0), world.tdr).unwrap();
    module.track(world.tdr).unwrap();
}
