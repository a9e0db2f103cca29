//! Splitting, collapsing, whole ranges, and tables without company, over the toy format.

#![allow(clippy::unwrap_used, reason = "a test may fail")]
// UNSAFETY: the tests are alone with their arenas.
#![expect(unsafe_code)]

use crate::build::BuildError;
use crate::change::Debt;
use crate::exclusive::Exclusive;
use crate::format::{Entry, Format, Height};
use crate::section::{ReaderWord, wait_for_readers};
use crate::testing::{Arena, Source};
use crate::toy::{SHIFT, ToyBreak, ToyDirect, leaf, special};
use crate::walk::{Seen, Table};
use std::vec::Vec;
use twofold_arch::Gpa;

const PAGES: u64 = 64;
const LARGE: Height = Height::new(2);

fn gpa(page: u64) -> Gpa {
    Gpa::new(page << SHIFT)
}

fn source(arena: &Arena) -> Source<'_> {
    Source { arena, limit: 100 }
}

/// Maps the four pages from `page` on with one leaf.
fn map_large<F: Format>(table: &Table<'_, F, Arena>, page: u64, frame: u64) -> Seen {
    let seen = table.lookup(gpa(page), LARGE);
    let mut source = source(table.storage);
    table
        .link_leaf(seen, gpa(page), LARGE, leaf(frame, 5), &mut source)
        .unwrap();
    table.lookup(gpa(page), LARGE)
}

fn small(frame: u64, first: u64) -> impl FnMut(Gpa) -> u64 {
    move |at| leaf(frame + (at.get() >> SHIFT) - first, 5)
}

fn at<F: Format>(table: &Table<'_, F, Arena>, page: u64) -> (Entry, u64) {
    let seen = table.lookup(gpa(page), Height::LEAF);
    (seen.entry::<F>(), seen.value())
}

fn pay<F: Format>(arena: &Arena, debt: Debt<F>) -> [u64; 2] {
    let none: [ReaderWord; 0] = [];
    let readers = wait_for_readers(none.iter(), || {});
    let leaves = debt
        .settle(|_| {})
        .reclaim(&readers, arena, |page| arena.free(page));
    [leaves.at(Height::LEAF), leaves.at(LARGE)]
}

fn finish<F: Format>(arena: &Arena, table: Table<'_, F, Arena>) {
    let mut debt = Debt::none();
    table.retire_root(&mut debt);
    pay(arena, debt);
    assert_eq!(arena.allocated(), 0, "pages leaked");
}

#[test]
fn a_leaf_becomes_a_full_table_and_a_leaf_again() {
    fn check<F: Format>(flush_in_between: bool) {
        let arena = Arena::new(8);
        let root = arena.root::<F>(1);
        let table = arena.table::<F>(root);
        let seen = map_large(&table, 20, 100);
        let mut flushed = 0;
        let flush = |range| {
            assert_eq!(range, gpa(20)..gpa(24));
            assert_eq!(at(&table, 21).0, Entry::Frozen);
            flushed += 1;
        };
        let (child, mut pages) = (small(100, 20), source(&arena));
        table.split(seen, child, 0, &mut pages, flush).unwrap();
        for page in 20..24 {
            assert_eq!(at(&table, page), (Entry::Leaf, leaf(80 + page, 5)));
        }
        assert_eq!(flushed, u32::from(flush_in_between));

        let mut debt = Debt::none();
        let seen = table.lookup(gpa(20), LARGE);
        table
            .collapse(seen, leaf(100, 7), &mut debt, |_| flushed += 1)
            .unwrap();
        assert_eq!(at(&table, 23), (Entry::Leaf, leaf(100, 7)));
        assert_eq!(flushed, 2 * u32::from(flush_in_between));
        assert_eq!(debt.is_none(), flush_in_between);
        assert_eq!(pay(&arena, debt), [4, 0]);
        assert_eq!(arena.allocated(), 2);
        finish(&arena, table);
    }
    check::<ToyDirect>(false);
    check::<ToyBreak>(true);
}

#[test]
fn a_split_that_cannot_be_leaves_everything_as_it_was() {
    let arena = Arena::new(8);
    let root = arena.root::<ToyDirect>(1);
    let table = arena.table::<ToyDirect>(root);
    let seen = map_large(&table, 20, 100);
    let before = arena.allocated();
    let mut nothing = Source {
        arena: &arena,
        limit: 0,
    };
    let result = table.split(seen, small(100, 20), 0, &mut nothing, |_| {});
    assert_eq!(result, Err(BuildError::OutOfPages));
    let mut pages = source(&arena);
    let mut debt = Debt::none();
    table.shrink(seen, leaf(100, 1), &mut debt).unwrap();
    let result = table.split(seen, small(100, 20), 0, &mut pages, |_| {});
    assert_eq!(result, Err(BuildError::Raced));
    let collapsed = table.collapse(table.look(*seen.place()), leaf(9, 7), &mut debt, |_| {});
    assert!(collapsed.is_err(), "a leaf is no table");
    assert_eq!(at(&table, 22), (Entry::Leaf, leaf(100, 1)));
    assert_eq!(arena.allocated(), before);
    pay(&arena, debt);
    finish(&arena, table);
}

#[test]
fn every_range_is_mapped_around_what_is_there() {
    for (target, step) in [(Height::LEAF, 1), (LARGE, 4)] {
        for start in (0..PAGES).step_by(step) {
            for end in (start + step as u64..=PAGES).step_by(step) {
                let arena = Arena::new(30);
                let root = arena.root::<ToyDirect>(1);
                let table = arena.table::<ToyDirect>(root);
                let mut pages = source(&arena);
                map_large(&table, 20, 1000);
                let seen = table.lookup(gpa(33), Height::LEAF);
                table
                    .link_leaf(seen, gpa(33), Height::LEAF, leaf(2000, 5), &mut pages)
                    .unwrap();
                let make = |at: Gpa| leaf((at.get() >> SHIFT) + 1, 5);
                let made = table
                    .map_range(gpa(start)..gpa(end), target, make, &mut pages)
                    .unwrap();
                let mut found = 0;
                for page in 0..PAGES {
                    let there = (20..24).contains(&page) || page == 33;
                    let in_the_way = step == 4 && (32..36).contains(&page);
                    let expected = (start..end).contains(&page) && !there && !in_the_way;
                    let (entry, value) = at(&table, page);
                    assert_eq!(entry == Entry::Leaf, expected || there, "page {page}");
                    if expected {
                        found += 1;
                        assert_eq!(value, leaf((page & !(step as u64 - 1)) + 1, 5));
                    }
                }
                assert_eq!(made * step as u64, found);
                finish(&arena, table);
            }
        }
    }
}

#[test]
fn an_exclusive_owner_changes_and_zaps_exactly_the_range() {
    for start in 0..2 * PAGES {
        for end in (start + 1..=2 * PAGES).step_by(3) {
            let arena = Arena::new(46);
            let root = arena.root::<ToyDirect>(2);
            let table = arena.table::<ToyDirect>(root);
            let mut pages = source(&arena);
            map_large(&table, 20, 1000);
            let seen = table.lookup(gpa(50), Height::LEAF);
            let mmio = special(5);
            table
                .link_leaf(seen, gpa(50), Height::LEAF, mmio, &mut pages)
                .unwrap();
            // SAFETY: this thread alone has the arena.
            let mut exclusive = unsafe { Exclusive::new(table) };
            let make = |at: Gpa| leaf((at.get() >> SHIFT) + 1, 5);
            exclusive
                .map_range(gpa(0)..gpa(2 * PAGES), Height::LEAF, make, &mut pages)
                .unwrap();
            let touched = |page: u64| match page {
                20..24 => start < 24 && end > 20,
                _ => (start..end).contains(&page),
            };
            exclusive.update_leaves(gpa(start)..gpa(end), |_, value| value | 0x200);
            for page in (0..2 * PAGES).filter(|page| *page != 50) {
                let (entry, value) = at(exclusive.table(), page);
                assert_eq!(entry, Entry::Leaf);
                assert_eq!(value & 0x200 != 0, touched(page), "page {page}");
            }
            assert_eq!(at(exclusive.table(), 50), (Entry::Special, mmio));

            let leaves = exclusive.zap(gpa(start)..gpa(end), |page| arena.free(page));
            let gone: Vec<_> = (0..2 * PAGES).filter(|page| touched(*page)).collect();
            let large = u64::from(touched(20));
            let zapped_special = u64::from(touched(50));
            assert_eq!(leaves.at(LARGE), large);
            assert_eq!(
                leaves.at(Height::LEAF),
                gone.len() as u64 - 4 * large - zapped_special
            );
            for page in 0..2 * PAGES {
                assert_eq!(
                    at(&table, page).0 == Entry::Empty,
                    touched(page),
                    "page {page}"
                );
            }
            finish(&arena, table);
        }
    }
}
