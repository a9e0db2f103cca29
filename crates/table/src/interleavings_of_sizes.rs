//! Every interleaving of splits and collapses with what else may happen to an entry, explored by
//! `loom`.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

use crate::build::BuildError;
use crate::change::Debt;
use crate::format::{Entry, Format, Height};
use crate::interleaving_world::{World, beside, finish, gpa, map, source};
use crate::testing::Arena;
use crate::toy::{SHIFT, ToyBreak, ToyDirect, leaf};
use crate::walk::Table;
use loom::sync::Arc;
use loom::thread;
use twofold_arch::Gpa;

const LARGE: Height = Height::new(2);
/// A bit that neither the processor nor the engine reads.
const SOFT: u64 = 1 << 40;
/// The large leaf of these models: pages 4 to 7 are at 20 to 23, read-only.
const WHOLE: u64 = leaf(20, 1);
const FIRST: u64 = 4;

fn part(gpa: Gpa) -> u64 {
    leaf(16 + (gpa.get() >> SHIFT), 1)
}

/// A world in which pages 4 to 7 are mapped by one leaf. Root, the table above it, and a page to
/// split it with for each thread.
fn with_large_leaf<F: Format>() -> Arc<World> {
    let world = World::new::<F>(4);
    let table = world.table::<F>();
    let seen = table.lookup(gpa(FIRST), LARGE);
    let mut pages = source(&world.arena);
    table
        .link_leaf(seen, gpa(FIRST), LARGE, WHOLE, &mut pages)
        .unwrap();
    world
}

/// Splits the large leaf as often as someone else changes it meanwhile; whether it was there.
fn split<F: Format>(table: &Table<'_, F, Arena>) -> bool {
    loop {
        let seen = table.lookup(gpa(FIRST), LARGE);
        match seen.entry::<F>() {
            Entry::Leaf => {}
            Entry::Frozen => {
                thread::yield_now();
                continue;
            }
            _ => return false,
        }
        let inherited = seen.value() & (SOFT | 7 << 8);
        let mut pages = source(table.storage);
        let child = |at: Gpa| part(at) & !(7 << 8) | inherited;
        match table.split(seen, child, 0, &mut pages, |_| {}) {
            Ok(()) => return true,
            Err(BuildError::Raced) => {}
            Err(BuildError::OutOfPages) => panic!("the arena is too small"),
        }
    }
}

/// Gives the leaf of `page`, whatever its size, another bit: what a fast fault does.
fn fast_fault<F: Format>(table: &Table<'_, F, Arena>, page: u64) {
    loop {
        let seen = table.lookup(gpa(page), Height::LEAF);
        if seen.entry::<F>() == Entry::Frozen {
            thread::yield_now();
        } else if table.widen(seen, seen.value() | SOFT).is_ok() {
            return;
        }
    }
}

#[test]
fn a_fast_fault_beside_a_split_is_not_lost() {
    fn model<F: Format>() {
        loom::model(|| {
            let world = with_large_leaf::<F>();
            let fault = beside(&world, |world| fast_fault(&world.table::<F>(), 6));
            assert!(split(&world.table::<F>()));
            fault.join().unwrap();
            let seen = world.table::<F>().lookup(gpa(6), Height::LEAF);
            assert_eq!(seen.value(), part(gpa(6)) | SOFT);
            finish::<F>(&world.arena, world.root);
        });
    }
    model::<ToyDirect>();
    model::<ToyBreak>();
}

#[test]
fn a_walker_beside_a_split_meets_no_hole() {
    loom::model(|| {
        let world = with_large_leaf::<ToyDirect>();
        let walker = beside(&world, |world| {
            for _ in 0..2 {
                let seen = world.table::<ToyDirect>().lookup(gpa(6), Height::LEAF);
                let expected = if seen.place().height() == LARGE {
                    WHOLE
                } else {
                    part(gpa(6))
                };
                assert_eq!(seen.value(), expected);
            }
        });
        assert!(split(&world.table::<ToyDirect>()));
        walker.join().unwrap();
        finish::<ToyDirect>(&world.arena, world.root);
    });
}

#[test]
fn of_two_that_split_one_does_and_the_other_gives_its_page_back() {
    fn model<F: Format>() {
        loom::model(|| {
            let world = with_large_leaf::<F>();
            let other = beside(&world, |world| split(&world.table::<F>()));
            let mine = split(&world.table::<F>());
            assert!(mine != other.join().unwrap());
            assert_eq!(world.arena.allocated(), 3);
            finish::<F>(&world.arena, world.root);
        });
    }
    model::<ToyDirect>();
    model::<ToyBreak>();
}

#[test]
fn a_zap_beside_a_split_takes_the_leaf_or_the_table() {
    loom::model(|| {
        let world = with_large_leaf::<ToyDirect>();
        let splitter = beside(&world, |world| {
            let _section = world.section();
            split(&world.table::<ToyDirect>())
        });
        let table = world.table::<ToyDirect>();
        let mut debt = Debt::none();
        while table
            .remove(table.lookup(gpa(FIRST), LARGE), &mut debt)
            .is_err()
        {}
        let leaves = world.pay(debt);
        let was_split = splitter.join().unwrap();
        let counted = (leaves.at(Height::LEAF), leaves.at(LARGE));
        assert_eq!(counted, if was_split { (4, 0) } else { (0, 1) });
        let seen = table.lookup(gpa(6), Height::LEAF);
        assert_eq!(seen.entry::<ToyDirect>(), Entry::Empty);
        finish::<ToyDirect>(&world.arena, world.root);
    });
}

#[test]
fn neither_a_split_nor_a_collapse_nor_a_zap_changes_a_frozen_entry() {
    loom::model(|| {
        let world = with_large_leaf::<ToyDirect>();
        let other = beside(&world, |world| {
            let table = world.table::<ToyDirect>();
            let seen = table.lookup(gpa(FIRST), LARGE);
            if seen.entry::<ToyDirect>() == Entry::Frozen {
                let (mut pages, mut debt) = (source(&world.arena), Debt::none());
                assert!(table.split(seen, part, 0, &mut pages, |_| {}).is_err());
                assert!(table.collapse(seen, WHOLE, &mut debt, |_| {}).is_err());
                assert!(table.remove(seen, &mut debt).is_err());
                assert!(debt.is_none());
            }
        });
        let table = world.table::<ToyDirect>();
        let frozen = table.freeze(table.lookup(gpa(FIRST), LARGE)).unwrap();
        frozen.publish(WHOLE | SOFT);
        other.join().unwrap();
        assert_eq!(table.lookup(gpa(FIRST), LARGE).value(), WHOLE | SOFT);
        finish::<ToyDirect>(&world.arena, world.root);
    });
}

#[test]
fn a_fault_beside_a_collapse_finds_the_leaf_or_goes_with_the_table() {
    loom::model(|| {
        let world = World::new::<ToyDirect>(3);
        assert!(map(&world.table::<ToyDirect>(), 5, part(gpa(5))));
        let fault = beside(&world, |world| {
            let _section = world.section();
            let table = world.table::<ToyDirect>();
            // The entry that the list of retired tables takes for itself, and another.
            [4, 6].map(|page| {
                let seen = table.lookup(gpa(page), Height::LEAF);
                if seen.place().height() == LARGE {
                    assert_eq!(seen.value(), WHOLE, "never a hole");
                    return false;
                }
                seen.entry::<ToyDirect>() == Entry::Empty
                    && table.install(seen, part(gpa(page))).is_ok()
            })
        });
        let table = world.table::<ToyDirect>();
        let mut debt = Debt::none();
        let seen = table.lookup(gpa(FIRST), LARGE);
        table.collapse(seen, WHOLE, &mut debt, |_| {}).unwrap();
        let leaves = world.pay(debt);
        let installed = fault.join().unwrap();
        let expected = 1 + installed.iter().filter(|&&installed| installed).count() as u64;
        assert_eq!(
            leaves.at(Height::LEAF),
            expected,
            "every leaf is counted once"
        );
        assert_eq!(table.lookup(gpa(6), Height::LEAF).value(), WHOLE);
        assert_eq!(world.arena.allocated(), 2);
        finish::<ToyDirect>(&world.arena, world.root);
    });
}

#[test]
fn a_table_that_is_collapsed_and_zapped_at_once_is_given_back_once() {
    loom::model(|| {
        let world = World::new::<ToyDirect>(3);
        assert!(map(&world.table::<ToyDirect>(), 5, part(gpa(5))));
        let collapse = beside(&world, |world| {
            let mut debt = Debt::none();
            let section = world.section();
            let table = world.table::<ToyDirect>();
            let seen = table.lookup(gpa(FIRST), LARGE);
            let done = table.collapse(seen, WHOLE, &mut debt, |_| {}).is_ok();
            drop(section);
            // This thread is the only reader, and has left its section.
            let leaves = world.pay(debt);
            assert_eq!(leaves.at(Height::LEAF), u64::from(done));
            done
        });
        let table = world.table::<ToyDirect>();
        let mut debt = Debt::none();
        while table
            .remove(table.lookup(gpa(FIRST), LARGE), &mut debt)
            .is_err()
        {}
        let leaves = world.pay(debt);
        let collapsed = collapse.join().unwrap();
        let taken = leaves.at(Height::LEAF) + leaves.at(LARGE);
        // Zapped as a table, or as the leaf that took its place, or before the collapse.
        assert_eq!(taken, 1);
        assert_eq!(leaves.at(LARGE) == 1, collapsed);
        let seen = table.lookup(gpa(6), Height::LEAF);
        assert_eq!(seen.entry::<ToyDirect>(), Entry::Empty);
        finish::<ToyDirect>(&world.arena, world.root);
    });
}
