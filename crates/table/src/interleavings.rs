//! Every interleaving of the small protocols, explored by `loom`:
//! `RUSTFLAGS="--cfg loom" cargo test -p twofold-table --lib interleavings`.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

use crate::build::PageSource;
use crate::change::Debt;
use crate::format::{Entry, Format, Height};
use crate::interleaving_world::{World, beside, finish, gpa, map, source};
use crate::sync::atomic::Ordering;
use crate::testing::Arena;
use crate::toy::{ToyBreak, ToyDirect, leaf};
use loom::sync::Arc;
use loom::thread;

#[test]
fn of_two_that_map_the_same_page_one_wins_and_no_table_is_lost() {
    loom::model(|| {
        let world = World::new::<ToyDirect>(5);
        let other = beside(&world, move |world| {
            map(&world.table::<ToyDirect>(), 5, leaf(1, 7))
        });
        let mine = map(&world.table::<ToyDirect>(), 5, leaf(2, 7));
        let others = other.join().unwrap();
        assert!(mine != others);
        let value = world
            .table::<ToyDirect>()
            .lookup(gpa(5), Height::LEAF)
            .value();
        assert_eq!(value, if mine { leaf(2, 7) } else { leaf(1, 7) });
        assert_eq!(world.arena.allocated(), 3);
        finish::<ToyDirect>(&world.arena, world.root);
    });
}

#[test]
fn two_that_map_neighbours_share_the_tables() {
    loom::model(|| {
        let world = World::new::<ToyDirect>(5);
        let other = beside(&world, move |world| {
            map(&world.table::<ToyDirect>(), 5, leaf(1, 7))
        });
        assert!(map(&world.table::<ToyDirect>(), 6, leaf(2, 7)));
        assert!(other.join().unwrap());
        for (page, value) in [(5, leaf(1, 7)), (6, leaf(2, 7))] {
            assert_eq!(
                world
                    .table::<ToyDirect>()
                    .lookup(gpa(page), Height::LEAF)
                    .value(),
                value
            );
        }
        assert_eq!(world.arena.allocated(), 3);
        finish::<ToyDirect>(&world.arena, world.root);
    });
}

#[test]
fn a_walker_in_a_section_never_meets_a_freed_table() {
    loom::model(|| {
        let world = World::new::<ToyDirect>(3);
        assert!(map(&world.table::<ToyDirect>(), 5, leaf(1, 7)));
        let walker = beside(&world, move |world| {
            let _section = world.section();
            // The arena answers an access to a freed page with a panic.
            let seen = world.table::<ToyDirect>().lookup(gpa(5), Height::LEAF);
            assert!(matches!(
                seen.entry::<ToyDirect>(),
                Entry::Leaf | Entry::Empty | Entry::Frozen
            ));
        });
        let table = world.table::<ToyDirect>();
        let mut debt = Debt::none();
        table
            .remove(table.lookup(gpa(5), Height::new(3)), &mut debt)
            .unwrap();
        let settled = debt.settle(|_| {});
        let readers = world.synchronize();
        let leaves = settled.reclaim(&readers, &world.arena, |page| world.arena.free(page));
        assert_eq!(leaves.at(Height::LEAF), 1);
        walker.join().unwrap();
        finish::<ToyDirect>(&world.arena, world.root);
    });
}

#[test]
fn a_fault_either_sees_the_zap_coming_or_is_zapped() {
    loom::model(|| {
        let world = World::new::<ToyDirect>(3);
        let fault = beside(&world, move |world| {
            let _section = world.section();
            if !world.zapping.load(Ordering::Acquire) {
                assert!(map(&world.table::<ToyDirect>(), 5, leaf(1, 7)));
            }
        });
        world.zapping.store(true, Ordering::Release);
        let readers = world.synchronize();
        let table = world.table::<ToyDirect>();
        let seen = table.lookup(gpa(5), Height::new(3));
        let mut debt = Debt::none();
        if seen.entry::<ToyDirect>() != Entry::Empty {
            table.remove(seen, &mut debt).unwrap();
        }
        debt.settle(|_| {})
            .reclaim(&readers, &world.arena, |page| world.arena.free(page));
        fault.join().unwrap();
        // Nothing is mapped, and nothing will be.
        let seen = table.lookup(gpa(5), Height::LEAF);
        assert_eq!(seen.entry::<ToyDirect>(), Entry::Empty);
        finish::<ToyDirect>(&world.arena, world.root);
    });
}

#[test]
fn nobody_changes_a_frozen_entry_but_its_owner() {
    loom::model(|| {
        let world = World::new::<ToyDirect>(3);
        assert!(map(&world.table::<ToyDirect>(), 5, leaf(1, 7)));
        let other = beside(&world, move |world| {
            let table = world.table::<ToyDirect>();
            let seen = table.lookup(gpa(5), Height::LEAF);
            match seen.entry::<ToyDirect>() {
                Entry::Leaf => table.widen(seen, seen.value() | 1 << 40).is_ok(),
                Entry::Frozen => {
                    assert!(table.install(seen, leaf(9, 7)).is_err());
                    assert!(table.freeze(seen).is_err());
                    false
                }
                entry => panic!("{entry:?}"),
            }
        });
        let table = world.table::<ToyDirect>();
        let frozen = loop {
            if let Ok(frozen) = table.freeze(table.lookup(gpa(5), Height::LEAF)) {
                break frozen;
            }
        };
        let before = frozen.seen().value();
        frozen.publish(before & !0x200);
        let widened = other.join().unwrap();
        let after = table.lookup(gpa(5), Height::LEAF).value();
        // Whatever the order, no change is lost.
        assert_eq!(after & 1 << 40 != 0, widened);
        assert_eq!(after & 0x200, 0);
        finish::<ToyDirect>(&world.arena, world.root);
    });
}

#[test]
fn break_before_make_shows_the_old_page_or_the_lock_or_the_new_page() {
    loom::model(|| {
        let world = World::new::<ToyBreak>(3);
        assert!(map(&world.table::<ToyBreak>(), 5, leaf(1, 7)));
        let walker = beside(&world, move |world| {
            let mut last = 0;
            for _ in 0..2 {
                let seen = world.table::<ToyBreak>().lookup(gpa(5), Height::LEAF);
                let now = match seen.value() {
                    value if value == leaf(1, 7) => 0,
                    value if value == ToyBreak::FROZEN => 1,
                    value if value == leaf(2, 7) => 2,
                    value => panic!("{value:#x}"),
                };
                assert!(now >= last);
                last = now;
            }
        });
        let table = world.table::<ToyBreak>();
        let mut debt = Debt::none();
        let seen = table.lookup(gpa(5), Height::LEAF);
        table.replace(seen, leaf(2, 7), &mut debt, |_| {}).unwrap();
        assert!(debt.is_none());
        walker.join().unwrap();
        finish::<ToyBreak>(&world.arena, world.root);
    });
}

#[test]
fn a_fault_into_a_table_that_is_being_taken_out_is_taken_out_with_it() {
    loom::model(|| {
        let world = World::new::<ToyDirect>(3);
        assert!(map(&world.table::<ToyDirect>(), 5, leaf(1, 7)));
        let fault = beside(&world, move |world| {
            let _section = world.section();
            let table = world.table::<ToyDirect>();
            // Pages 4 and 6: the first entry of the table, which the list of retired tables
            // takes for itself, and one that it does not.
            [4, 6].map(|page| {
                let seen = table.lookup(gpa(page), Height::LEAF);
                seen.entry::<ToyDirect>() == Entry::Empty
                    && seen.place().height() == Height::LEAF
                    && table.install(seen, leaf(page, 7)).is_ok()
            })
        });
        let table = world.table::<ToyDirect>();
        let mut debt = Debt::none();
        table
            .remove(table.lookup(gpa(5), Height::new(3)), &mut debt)
            .unwrap();
        let settled = debt.settle(|_| {});
        let readers = world.synchronize();
        let leaves = settled.reclaim(&readers, &world.arena, |page| world.arena.free(page));
        let installed = fault.join().unwrap();
        let expected = 1 + installed.iter().filter(|&&installed| installed).count() as u64;
        assert_eq!(
            leaves.at(Height::LEAF),
            expected,
            "every leaf is counted once"
        );
        finish::<ToyDirect>(&world.arena, world.root);
    });
}

/// The arena itself hands out each page once.
#[test]
fn the_test_arena_gives_a_page_to_one_thread() {
    loom::model(|| {
        let arena = Arc::new(Arena::new(2));
        let other = {
            let arena = Arc::clone(&arena);
            thread::spawn(move || source(&arena).take().unwrap().hpa())
        };
        let mine = source(&arena).take().unwrap().hpa();
        assert_ne!(mine, other.join().unwrap());
    });
}
