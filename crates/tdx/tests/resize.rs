//! Larger and smaller pages (SPEC chapter 7, row 54): what may become one page, what keeps its
//! state, and what is refused without a trace.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{PAGE, World, info, refused};
use std::sync::atomic::Ordering;
use twofold_arch::{Gpa, Hpa};
use twofold_tdx::{Accept, State, Status};

const REGION: Gpa = Gpa::new(0x40_0000);

fn small(index: u64) -> Gpa {
    Gpa::new(REGION.get() + index * PAGE)
}

/// A running TD with a table for the region.
fn with_table() -> World {
    let world = World::runnable();
    world.tables(REGION, 0);
    world
}

/// Maps the small pages of the region with these pages of the host, all of them waiting.
fn map(world: &World, page: impl Fn(u64) -> Option<Hpa>) {
    for index in 0..512 {
        if let Some(page) = page(index) {
            let result = world
                .module
                .page_aug(info(small(index), 0), world.tdr, page);
            result.unwrap();
        }
    }
}

fn accept(world: &World, indices: impl Iterator<Item = u64>) {
    let guest = world.enter(0);
    for index in indices {
        let accepted = guest.accept(info(small(index), 0));
        assert_eq!(accepted, Accept::Returned(Status::SUCCESS));
    }
}

/// Blocks the region as a whole, so that nobody uses a translation below it.
fn block(world: &World) {
    world
        .module
        .range_block(info(REGION, 1), world.tdr)
        .unwrap();
    world.module.track(world.tdr).unwrap();
}

fn is_refused_and_nothing_changes(world: &World) {
    block(world);
    let before: Vec<_> = (0..512).map(|index| look(world, index)).collect();
    refused(
        world.module.page_promote(info(REGION, 1), world.tdr),
        Status::EPT_INVALID_PROMOTE_CONDITIONS,
    );
    let after: Vec<_> = (0..512).map(|index| look(world, index)).collect();
    assert_eq!(before, after);
    world
        .module
        .range_unblock(info(REGION, 1), world.tdr)
        .unwrap();
}

/// The entry of a small page, in the table that the region's entry points to.
fn look(world: &World, index: usize) -> u64 {
    let table = world.entry(REGION, 1).page(1);
    world.machine().entry(table, index).load(Ordering::SeqCst)
}

fn at(block: Hpa, index: u64) -> Hpa {
    Hpa::new(block.get() + index * PAGE)
}

#[test]
fn pages_that_all_wait_become_one_that_waits() {
    let world = with_table();
    let block_of = world.machine().large(0);
    map(&world, |index| Some(at(block_of, index)));
    block(&world);
    world
        .module
        .page_promote(info(REGION, 1), world.tdr)
        .unwrap();
    assert_eq!(world.entry(REGION, 1).state(), Some(State::Pending));
    assert_eq!(world.entry(REGION, 1).page(1), block_of);
    // The guest accepts it as a whole.
    let accepted = world.enter(0).accept(info(REGION, 1));
    assert_eq!(accepted, Accept::Returned(Status::SUCCESS));
}

#[test]
fn one_page_that_waits_among_others_is_no_part_of_a_larger_one() {
    for odd in [0, 1, 511] {
        let world = with_table();
        let block_of = world.machine().large(0);
        map(&world, |index| Some(at(block_of, index)));
        accept(&world, (0..512).filter(|&index| index != odd));
        is_refused_and_nothing_changes(&world);
        accept(&world, [odd].into_iter());
        block(&world);
        let table = world.entry(REGION, 1).page(1);
        let promoted = world.module.page_promote(info(REGION, 1), world.tdr);
        assert_eq!(promoted, Ok(table));
        assert_eq!(world.entry(REGION, 1).state(), Some(State::Mapped));
    }
}

#[test]
fn a_missing_page_and_pages_in_another_order_make_no_larger_one() {
    for odd in [0, 1, 511] {
        let world = with_table();
        let block_of = world.machine().large(0);
        map(&world, |index| (index != odd).then(|| at(block_of, index)));
        is_refused_and_nothing_changes(&world);
    }
    let world = with_table();
    let block_of = world.machine().large(0);
    map(&world, |index| Some(at(block_of, index ^ 1)));
    is_refused_and_nothing_changes(&world);
}

#[test]
fn pages_that_are_contiguous_but_not_aligned_make_no_larger_one() {
    let world = with_table();
    let block_of = world.machine().large(0);
    // Half of one block of 2 MiB and half of the next.
    map(&world, |index| Some(at(block_of, index + 256)));
    is_refused_and_nothing_changes(&world);
}

#[test]
fn a_page_that_is_split_while_it_waits_is_accepted_piece_by_piece() {
    let world = World::runnable();
    let (module, tdr) = (&world.module, world.tdr);
    world.tables(REGION, 1);
    let block_of = world.machine().large(1);
    module.page_aug(info(REGION, 1), tdr, block_of).unwrap();
    block(&world);
    module
        .page_demote(info(REGION, 1), tdr, world.fresh())
        .unwrap();
    let guest = world.enter(0);
    for index in [0, 1, 511] {
        assert_eq!(world.entry(small(index), 0).state(), Some(State::Pending));
        assert_eq!(world.entry(small(index), 0).page(0), at(block_of, index));
    }
    let accepted = guest.accept(info(small(7), 0));
    assert_eq!(accepted, Accept::Returned(Status::SUCCESS));
    assert_eq!(world.entry(small(7), 0).state(), Some(State::Mapped));
    assert_eq!(world.entry(small(8), 0).state(), Some(State::Pending));
    // And asked for in the old size it is told apart.
    let Accept::Returned(status) = guest.accept(info(REGION, 1)) else {
        panic!("a table is there");
    };
    assert!(status.is(Status::PAGE_SIZE_MISMATCH), "{status}");
}
