//! The engine over the toy format, against a plain map.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

use crate::build::{BuildError, PageSource};
use crate::change::Debt;
use crate::cursor::Cursor;
use crate::format::{Entry, Format, Height};
use crate::section::{ReaderWord, wait_for_readers};
use crate::testing::{Arena, Source};
use crate::toy::{SHIFT, ToyBreak, ToyDirect, leaf, special};
use crate::walk::{RootTable, Table};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::ops::Range;
use std::vec::Vec;
use twofold_arch::Gpa;

const PAGES: u64 = 64;

fn gpa(page: u64) -> Gpa {
    Gpa::new(page << SHIFT)
}

fn pay<F: Format>(arena: &Arena, debt: Debt<F>) -> (u64, Option<Range<Gpa>>) {
    let mut flushed = None;
    let settled = debt.settle(|range| flushed = Some(range));
    let none: [ReaderWord; 0] = [];
    let readers = wait_for_readers(none.iter(), || {});
    let leaves = settled.reclaim(&readers, arena, |page| arena.free(page));
    (leaves.at(Height::LEAF) + leaves.at(Height::new(2)), flushed)
}

/// Maps `page` at `height`, unless something stands in the way.
fn map<F: Format>(
    table: &Table<'_, F, Arena>,
    source: &mut Source<'_>,
    page: u64,
    height: Height,
    value: u64,
) -> Result<(), BuildError> {
    let seen = table.lookup(gpa(page), height);
    match seen.entry::<F>() {
        Entry::Empty | Entry::Special => table
            .link_leaf(seen, gpa(page), height, value, source)
            .map(|_| ()),
        _ => Err(BuildError::Raced),
    }
}

fn mapped<F: Format>(table: &Table<'_, F, Arena>, page: u64) -> Option<(u64, Height)> {
    let seen = table.lookup(gpa(page), Height::LEAF);
    let leaf = (seen.entry::<F>() == Entry::Leaf).then_some((seen.value(), seen.place().height()));
    assert_eq!(table.find_leaf(gpa(page)), leaf);
    leaf
}

fn zap<F: Format>(table: Table<'_, F, Arena>, pages: Range<u64>) -> Debt<F> {
    let mut debt = Debt::none();
    let mut cursor = Cursor::new(table, gpa(pages.start)..gpa(pages.end));
    while let Some(seen) = cursor.next() {
        let first = seen.place().gpa().get() >> SHIFT;
        let count = F::bytes(seen.place().height()) >> SHIFT;
        match seen.entry::<F>() {
            Entry::Empty => continue,
            Entry::Table(_) if first < pages.start || first + count > pages.end => continue,
            Entry::Table(_) => cursor.skip(),
            _ => {}
        }
        table.remove(seen, &mut debt).unwrap();
    }
    debt
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Map { page: u64, height: u8, frame: u64 },
    MapRange { start: u64, end: u64 },
    Special { page: u64 },
    Protect { start: u64, end: u64 },
    Zap { start: u64, end: u64 },
    Budget { pages: usize },
}

fn ops() -> impl Strategy<Value = Op> {
    let range = || (0..PAGES, 1..=PAGES).prop_map(|(a, b)| (a.min(b - 1), b.max(a + 1)));
    prop_oneof![
        6 => (0..PAGES, 1u8..=2, 1u64..1000)
            .prop_map(|(page, height, frame)| Op::Map { page, height, frame }),
        2 => range().prop_map(|(start, end)| Op::MapRange { start, end }),
        1 => (0..PAGES).prop_map(|page| Op::Special { page }),
        1 => range().prop_map(|(start, end)| Op::Protect { start, end }),
        2 => range().prop_map(|(start, end)| Op::Zap { start, end }),
        1 => (0usize..8).prop_map(|pages| Op::Budget { pages }),
    ]
}

/// What is mapped: first page to value and height.
type Model = BTreeMap<u64, (u64, u8)>;

fn run<F: Format>(ops: &[Op]) {
    let arena = Arena::new(40);
    let root = arena.root::<F>(1);
    let table = arena.table::<F>(root);
    let mut source = Source {
        arena: &arena,
        limit: 100,
    };
    let mut model = Model::new();
    for &op in ops {
        let before = arena.allocated();
        match op {
            Op::Map {
                page,
                height,
                frame,
            } => {
                let count = if height == 2 { 4 } else { 1 };
                let first = page & !(count - 1);
                let result = map(
                    &table,
                    &mut source,
                    page,
                    Height::new(height),
                    leaf(frame, 7),
                );
                match result {
                    Ok(()) => {
                        assert!(!overlaps(&model, first, count));
                        model.insert(first, (leaf(frame, 7), height));
                    }
                    // A table without leaves in it may stand where a large page was to go.
                    Err(BuildError::Raced) => assert_eq!(arena.allocated(), before),
                    Err(BuildError::OutOfPages) => {
                        assert_eq!(arena.allocated(), before, "a failed build keeps pages");
                        source.limit = 100;
                    }
                }
            }
            Op::MapRange { start, end } => {
                let seen = table.lookup(gpa(start), Height::LEAF);
                if seen.entry::<F>() == Entry::Empty && seen.place().height() > Height::LEAF {
                    let make = |at: Gpa| leaf((at.get() >> SHIFT) + 100, 7);
                    match table.link_range(
                        seen,
                        gpa(start)..gpa(end),
                        Height::LEAF,
                        make,
                        &mut source,
                    ) {
                        Ok(()) => {
                            let covered = F::bytes(seen.place().height()) >> SHIFT;
                            let block = start & !(covered - 1);
                            for page in start..end.min(block + covered) {
                                model.insert(page, (leaf(page + 100, 7), 1));
                            }
                        }
                        Err(error) => {
                            assert_eq!(error, BuildError::OutOfPages);
                            assert_eq!(arena.allocated(), before);
                            source.limit = 100;
                        }
                    }
                }
            }
            Op::Special { page } => {
                let seen = table.lookup(gpa(page), Height::LEAF);
                if seen.entry::<F>() == Entry::Empty && seen.place().height() == Height::LEAF {
                    table.install(seen, special(page)).unwrap();
                }
            }
            Op::Protect { start, end } => {
                let mut debt = Debt::none();
                let mut cursor = Cursor::new(table, gpa(start)..gpa(end));
                while let Some(seen) = cursor.next() {
                    if seen.entry::<F>() == Entry::Leaf {
                        table
                            .shrink(seen, seen.value() & !0x200, &mut debt)
                            .unwrap();
                    }
                }
                let hit = |(first, entry): &(&u64, &mut (u64, u8))| {
                    **first < end && start < **first + if entry.1 == 2 { 4 } else { 1 }
                };
                let mut any = false;
                for (_, (value, _)) in model.iter_mut().filter(hit) {
                    *value &= !0x200;
                    any = true;
                }
                assert_eq!(
                    pay(&arena, debt).1.is_some(),
                    any,
                    "flush exactly what shrank"
                );
            }
            Op::Zap { start, end } => {
                let debt = zap(table, start..end);
                let before = model.len();
                model.retain(|&first, &mut (_, height)| {
                    let count = if height == 2 { 4 } else { 1 };
                    first + count <= start || end <= first
                });
                let (leaves, flushed) = pay(&arena, debt);
                assert_eq!(leaves, (before - model.len()) as u64);
                if leaves != 0 {
                    let flushed = flushed.unwrap();
                    assert!(flushed.start < gpa(end) && gpa(start) < flushed.end);
                }
            }
            Op::Budget { pages } => source.limit = pages,
        }
        check(&table, &model);
    }
    finish(&arena, table);
}

fn overlaps(model: &Model, first: u64, count: u64) -> bool {
    model.iter().any(|(&page, &(_, height))| {
        page < first + count && first < page + if height == 2 { 4 } else { 1 }
    })
}

fn check<F: Format>(table: &Table<'_, F, Arena>, model: &Model) {
    for page in 0..PAGES {
        let small = model.get(&page).filter(|(_, height)| *height == 1);
        let large = model.get(&(page & !3)).filter(|(_, height)| *height == 2);
        let expected = small
            .or(large)
            .map(|&(value, height)| (value, Height::new(height)));
        assert_eq!(mapped(table, page), expected, "page {page}");
    }
}

fn finish<F: Format>(arena: &Arena, table: Table<'_, F, Arena>) {
    let mut debt = Debt::none();
    table.retire_root(&mut debt);
    pay(arena, debt);
    assert_eq!(arena.allocated(), 0, "pages leaked");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_engine_agrees_with_a_map(ops in prop::collection::vec(ops(), 1..80)) {
        run::<ToyDirect>(&ops);
        run::<ToyBreak>(&ops);
    }
}

fn full_table(arena: &Arena) -> (RootTable, Source<'_>) {
    let root = arena.root::<ToyDirect>(1);
    let mut source = Source { arena, limit: 100 };
    let table = arena.table::<ToyDirect>(root);
    for page in 0..PAGES {
        map(&table, &mut source, page, Height::LEAF, leaf(page + 1, 7)).unwrap();
    }
    (root, source)
}

#[test]
fn every_range_can_be_zapped_and_exactly_it_is_gone() {
    for start in 0..PAGES {
        for end in start + 1..=PAGES {
            let arena = Arena::new(21);
            let (root, _) = full_table(&arena);
            let table = arena.table::<ToyDirect>(root);
            let (leaves, _) = pay(&arena, zap(table, start..end));
            assert_eq!(leaves, end - start);
            for page in 0..PAGES {
                let expected =
                    (!(start..end).contains(&page)).then_some((leaf(page + 1, 7), Height::LEAF));
                assert_eq!(mapped(&table, page), expected);
            }
            finish(&arena, table);
        }
    }
}

#[test]
fn every_range_can_be_built_in_private_with_each_number_of_pages() {
    for start in 0..16 {
        for end in start + 1..=16 {
            for limit in 0..6 {
                let arena = Arena::new(21);
                let root = arena.root::<ToyDirect>(1);
                let table = arena.table::<ToyDirect>(root);
                let mut source = Source {
                    arena: &arena,
                    limit,
                };
                let seen = table.lookup(gpa(start), Height::LEAF);
                let make = |at: Gpa| leaf((at.get() >> SHIFT) + 1, 7);
                let result =
                    table.link_range(seen, gpa(start)..gpa(end), Height::LEAF, make, &mut source);
                let tables = 1 + ((end - 1) / 4 - start / 4 + 1) as usize;
                assert_eq!(result.is_ok(), tables <= limit);
                for page in 0..PAGES {
                    let expected = (result.is_ok() && (start..end).contains(&page))
                        .then_some((leaf(page + 1, 7), Height::LEAF));
                    assert_eq!(mapped(&table, page), expected);
                }
                finish(&arena, table);
            }
        }
    }
}

#[test]
fn a_concatenated_root_continues_in_the_next_page() {
    let arena = Arena::new(24);
    let root = arena.root::<ToyDirect>(2);
    let table = arena.table::<ToyDirect>(root);
    assert_eq!(table.end(), (2 * PAGES) << SHIFT);
    let mut source = Source {
        arena: &arena,
        limit: 100,
    };
    for page in [0, 63, 64, 127] {
        map(&table, &mut source, page, Height::LEAF, leaf(page + 1, 7)).unwrap();
    }
    for page in 0..2 * PAGES {
        let expected = [0, 63, 64, 127].contains(&page);
        assert_eq!(mapped(&table, page).is_some(), expected, "page {page}");
    }
    let mut visited = Vec::new();
    let mut cursor = Cursor::new(table, gpa(0)..gpa(2 * PAGES));
    while let Some(seen) = cursor.next() {
        if seen.entry::<ToyDirect>() == Entry::Leaf {
            visited.push(seen.place().gpa().get() >> SHIFT);
        }
    }
    assert_eq!(visited, [0, 63, 64, 127]);
    finish(&arena, table);
}

#[test]
fn a_replaced_entry_has_no_hole_or_is_locked_while_the_flush_runs() {
    fn swap_page<F: Format>(flush_in_between: bool) {
        let arena = Arena::new(21);
        let root = arena.root::<F>(1);
        let table = arena.table::<F>(root);
        let mut source = Source {
            arena: &arena,
            limit: 100,
        };
        map(&table, &mut source, 5, Height::LEAF, leaf(1, 7)).unwrap();
        let seen = table.lookup(gpa(5), Height::LEAF);
        let mut debt = Debt::none();
        let mut flushed = false;
        table
            .replace(seen, leaf(2, 7), &mut debt, |range| {
                assert_eq!(range, gpa(5)..gpa(6));
                let now = table.lookup(gpa(5), Height::LEAF);
                assert_eq!(now.entry::<F>(), Entry::Frozen);
                assert!(table.install(now, leaf(3, 7)).is_err());
                flushed = true;
            })
            .unwrap();
        assert_eq!(flushed, flush_in_between);
        assert_eq!(debt.is_none(), flush_in_between);
        assert_eq!(mapped(&table, 5), Some((leaf(2, 7), Height::LEAF)));
        pay(&arena, debt);
        finish(&arena, table);
    }
    swap_page::<ToyDirect>(false);
    swap_page::<ToyBreak>(true);
}

#[test]
fn a_frozen_entry_gets_its_value_back_unless_it_is_published() {
    let arena = Arena::new(21);
    let (root, _) = full_table(&arena);
    let table = arena.table::<ToyDirect>(root);
    let seen = table.lookup(gpa(9), Height::LEAF);
    let frozen = table.freeze(seen).unwrap();
    assert!(table.freeze(table.look(*seen.place())).is_err());
    assert!(
        table
            .remove(table.look(*seen.place()), &mut Debt::none())
            .is_err()
    );
    drop(frozen);
    assert_eq!(table.look(*seen.place()), seen);
    table.freeze(seen).unwrap().publish(leaf(999, 1));
    assert_eq!(mapped(&table, 9), Some((leaf(999, 1), Height::LEAF)));
    finish(&arena, table);
}

#[test]
fn a_change_from_a_value_that_is_gone_is_refused() {
    let arena = Arena::new(21);
    let (root, mut source) = full_table(&arena);
    let table = arena.table::<ToyDirect>(root);
    let seen = table.lookup(gpa(9), Height::LEAF);
    let mut debt = Debt::none();
    table
        .shrink(seen, seen.value() & !0x200, &mut debt)
        .unwrap();
    assert!(table.widen(seen, seen.value()).is_err());
    let mut nothing = Debt::none();
    assert!(table.shrink(seen, seen.value(), &mut nothing).is_err());
    assert!(table.remove(seen, &mut nothing).is_err());
    assert!(nothing.is_none());
    pay(&arena, debt);
    assert!(source.take().is_none(), "the arena is full");
    finish(&arena, table);
}
