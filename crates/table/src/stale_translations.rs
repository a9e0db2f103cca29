//! No sequence of changes lets two TLBs hold different translations of one address.
//!
//! The storage below is watched by the worst TLB there can be: one that caches every valid leaf
//! the moment it can be reached, and forgets only what it is told to. A second leaf that differs
//! from the first in more than permissions is what break-before-make exists to prevent.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

use crate::break_before_make::BreakRule;
use crate::build::BuildError;
use crate::change::Debt;
use crate::format::{Entry, Format, Height};
use crate::section::wait_for_readers;
use crate::stage2::{Stage2K4, Stage2K16, Stage2K64, annotation};
use crate::storage::{At, PageAccess, RawPages, Storage, TablePage};
use crate::testing::{Arena, Source};
use crate::toy::{SHIFT, ToyBreak, leaf};
use crate::walk::{RootTable, Table};
use proptest::prelude::*;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use twofold_arch::{Gpa, Hpa};

const PAGES: u64 = 128;
/// What a TLB remembers of a page: where it is; permissions may differ for a while.
type Output = u64;

struct Watched<'a> {
    arena: &'a Arena,
    root: RootTable,
    tlb: RefCell<BTreeMap<u64, Output>>,
}

impl Watched<'_> {
    /// Caches everything that can be reached now.
    fn speculate(&self) {
        let table = self.arena.table::<ToyBreak>(self.root);
        let mut tlb = self.tlb.borrow_mut();
        for page in 0..table.end() >> SHIFT {
            let seen = table.lookup(Gpa::new(page << SHIFT), Height::LEAF);
            if seen.entry::<ToyBreak>() != Entry::Leaf {
                continue;
            }
            let height = seen.place().height();
            let offset = page - (seen.place().gpa().get() >> SHIFT);
            let output = (ToyBreak::leaf_address(seen.value(), height).get() >> SHIFT) + offset;
            // The size of the mapping is part of what must not differ.
            let output = output << 8 | u64::from(height.get());
            let cached = *tlb.entry(page).or_insert(output);
            assert_eq!(cached, output, "two translations of page {page}");
        }
    }

    fn forget(&self, range: Range<Gpa>) {
        let pages = range.start.get() >> SHIFT..range.end.get() >> SHIFT;
        self.tlb
            .borrow_mut()
            .retain(|page, _| !pages.contains(page));
    }
}

impl Storage for Watched<'_> {
    fn load(&self, at: At) -> u64 {
        self.arena.load(at)
    }

    fn store(&self, at: At, value: u64) {
        self.arena.store(at, value);
        self.speculate();
    }

    fn swap(&self, at: At, value: u64) -> u64 {
        let old = self.arena.swap(at, value);
        self.speculate();
        old
    }

    fn compare_exchange(&self, at: At, old: u64, new: u64) -> Result<(), u64> {
        let result = self.arena.compare_exchange(at, old, new);
        self.speculate();
        result
    }

    fn fill(&self, page: TablePage, entries: usize, value: u64) {
        self.arena.fill(page, entries, value);
    }

    fn fill_with(&self, page: TablePage, range: Range<usize>, value: impl FnMut(usize) -> u64) {
        self.arena.fill_with(page, range, value);
    }

    fn update(&self, page: TablePage, range: Range<usize>, change: impl FnMut(u64) -> u64) {
        self.arena.update(page, range, change);
    }
}

#[derive(Clone, Copy, Debug)]
struct Op {
    page: u64,
    height: u8,
    frame: u64,
    permissions: u64,
    keep_neighbours: bool,
    unmap: bool,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = (0..PAGES, 1u8..=2, 1u64..40, 0u64..8, any::<bool>(), 0..4u8).prop_map(
        |(page, height, frame, permissions, keep_neighbours, unmap)| Op {
            page,
            height,
            frame: frame * 4,
            permissions,
            keep_neighbours,
            unmap: unmap == 0,
        },
    );
    proptest::collection::vec(op, 1..40)
}

fn split(block: u64, gpa: Gpa, height: Height) -> u64 {
    let base = ToyBreak::leaf_address(block, height.above()).get() >> SHIFT;
    let offset = (gpa.get() & (ToyBreak::bytes(height.above()) - 1)) >> SHIFT;
    leaf(base + offset, block >> 8)
}

proptest! {
    #[test]
    fn no_sequence_of_changes_shows_two_translations_of_a_page(ops in ops()) {
        let arena = Arena::new(60);
        let root = arena.root::<ToyBreak>(2);
        let watched = Watched { arena: &arena, root, tlb: RefCell::new(BTreeMap::new()) };
        // SAFETY: the arena checks each access.
        #[expect(unsafe_code)]
        let table = unsafe { Table::<ToyBreak, _>::new(&watched, root) };
        let mut source = Source { arena: &arena, limit: 1000 };
        let mut model: BTreeMap<u64, u64> = BTreeMap::new();
        for op in ops {
            let target = Height::new(op.height);
            let pages = 1 << (2 * (op.height - 1));
            let first = op.page & !(pages - 1);
            let gpa = Gpa::new(first << SHIFT);
            let new = if op.unmap { ToyBreak::EMPTY } else { leaf(op.frame, op.permissions) };
            let seen = table.lookup(gpa, target);
            let old = seen.value();
            let was_block = seen.entry::<ToyBreak>() == Entry::Leaf
                && seen.place().height() > target;
            let keep = op.keep_neighbours && was_block;
            let mut debt = Debt::none();
            let result = if seen.place().height() == target {
                table
                    .set(seen, new, |range| watched.forget(range), &mut debt)
                    .map_err(|_| BuildError::Raced)
            } else {
                table.set_below(
                    seen,
                    gpa,
                    target,
                    new,
                    |gpa, height| if keep { split(old, gpa, height) } else { ToyBreak::EMPTY },
                    &mut source,
                    |range| watched.forget(range),
                    &mut debt,
                )
            };
            prop_assert_eq!(result, Ok(()));
            let readers = wait_for_readers([].into_iter(), || {});
            debt.settle(|range| watched.forget(range))
                .reclaim(&readers, &watched, |page| arena.free(page));
            if was_block && !keep {
                let block = op.page & !3;
                for page in block..block + 4 {
                    model.remove(&page);
                }
            }
            for page in first..first + pages {
                if op.unmap {
                    model.remove(&page);
                } else {
                    model.insert(page, op.frame + page - first);
                }
            }
            for page in 0..PAGES {
                let seen = table.lookup(Gpa::new(page << SHIFT), Height::LEAF);
                let found = (seen.entry::<ToyBreak>() == Entry::Leaf).then(|| {
                    let offset = page - (seen.place().gpa().get() >> SHIFT);
                    (ToyBreak::leaf_address(seen.value(), seen.place().height()).get() >> SHIFT)
                        + offset
                });
                prop_assert_eq!(found, model.get(&page).copied(), "page {}", page);
            }
        }
        let mut debt = Debt::none();
        table.retire_root(&mut debt);
        let readers = wait_for_readers([].into_iter(), || {});
        debt.settle(|_| {}).reclaim(&readers, &arena, |page| arena.free(page));
        prop_assert_eq!(arena.allocated(), 0);
    }
}

#[test]
#[should_panic(expected = "two translations of page 5")]
fn the_watching_tlb_notices_a_replacement_without_an_invalidation() {
    let arena = Arena::new(10);
    let root = arena.root::<ToyBreak>(1);
    let watched = Watched {
        arena: &arena,
        root,
        tlb: RefCell::new(BTreeMap::new()),
    };
    // SAFETY: the arena checks each access.
    #[expect(unsafe_code)]
    let table = unsafe { Table::<ToyBreak, _>::new(&watched, root) };
    let gpa = Gpa::new(5 << SHIFT);
    let mut source = Source {
        arena: &arena,
        limit: 10,
    };
    let seen = table.lookup(gpa, Height::LEAF);
    table
        .link_leaf(seen, gpa, Height::LEAF, leaf(1, 7), &mut source)
        .unwrap();
    let mut debt = Debt::none();
    let seen = table.lookup(gpa, Height::LEAF);
    let _ = table.set(seen, leaf(2, 7), |_| {}, &mut debt);
}

#[test]
fn a_broken_entry_that_is_dropped_is_what_it_was_and_a_gap_is_empty() {
    let arena = Arena::new(10);
    let root = arena.root::<ToyBreak>(1);
    let table = arena.table::<ToyBreak>(root);
    let gpa = Gpa::new(5 << SHIFT);
    let mut source = Source {
        arena: &arena,
        limit: 10,
    };
    let seen = table.lookup(gpa, Height::LEAF);
    assert!(
        table.break_entry(seen).is_err(),
        "an empty entry has nothing to break"
    );
    table
        .link_leaf(seen, gpa, Height::LEAF, leaf(1, 7), &mut source)
        .unwrap();
    let seen = table.lookup(gpa, Height::LEAF);
    {
        let _broken = table.break_entry(seen).unwrap();
        let met = table.lookup(gpa, Height::LEAF);
        assert_eq!(met.entry::<ToyBreak>(), Entry::Frozen);
        assert!(
            table
                .set(met, leaf(2, 7), |_| {}, &mut Debt::none())
                .is_err()
        );
    }
    assert_eq!(table.lookup(gpa, Height::LEAF).value(), leaf(1, 7));
    let mut told = None;
    drop(
        table
            .break_entry(seen)
            .unwrap()
            .invalidate(|range| told = Some(range)),
    );
    assert_eq!(told, Some(gpa..Gpa::new(6 << SHIFT)));
    assert_eq!(table.lookup(gpa, Height::LEAF).value(), ToyBreak::EMPTY);
}

/// Ordinary memory as table pages.
struct Heap;

// SAFETY: the test passes addresses of live, page-aligned allocations.
#[expect(unsafe_code)]
unsafe impl PageAccess for Heap {
    fn table_ptr(&self, page: Hpa) -> std::ptr::NonNull<u64> {
        std::ptr::NonNull::new(page.get() as *mut u64).unwrap()
    }
}

struct Allocator {
    layout: std::alloc::Layout,
    live: Vec<TablePage>,
}

impl crate::build::PageSource for Allocator {
    #[expect(unsafe_code)]
    fn take(&mut self) -> Option<TablePage> {
        // SAFETY: the layout is not empty; the page lives until the end of the test.
        let page = unsafe { TablePage::assume(Hpa::new(std::alloc::alloc(self.layout) as u64)) };
        self.live.push(page);
        Some(page)
    }

    fn give_back(&mut self, page: TablePage) {
        panic!("{page:?} came back");
    }
}

/// Maps a block, annotates one page in it and keeps the rest, in a real stage-2 format.
fn split_a_real_block<F: BreakRule>(make: impl Fn(Hpa, Height) -> u64) {
    let page_size = 1usize << F::GRANULE_SHIFT;
    let mut pages = Allocator {
        layout: std::alloc::Layout::from_size_align(page_size, page_size).unwrap(),
        live: Vec::new(),
    };
    let root = RootTable {
        page: crate::build::PageSource::take(&mut pages).unwrap(),
        height: Height::new(3),
        pages: 1,
    };
    let storage = RawPages(Heap);
    storage.fill(root.page, F::ENTRIES, F::EMPTY);
    // SAFETY: pages are freed at the end.
    #[expect(unsafe_code)]
    let table = unsafe { Table::<F, _>::new(&storage, root) };
    let size = F::bytes(Height::new(2));
    let (gpa, hpa) = (Gpa::new(3 * size), Hpa::new(7 * size));
    let seen = table.lookup(gpa, Height::LEAF);
    let block = make(hpa, Height::new(2));
    table
        .link_leaf(seen, gpa, Height::new(2), block, &mut pages)
        .unwrap();
    let target = Gpa::new(gpa.get() + 5 * page_size as u64);
    let seen = table.lookup(target, Height::LEAF);
    assert_eq!(seen.value(), block);
    let note = annotation(2, 0x1230).unwrap();
    let mut debt = Debt::none();
    let mut told = Vec::new();
    let page = |at: Gpa| Hpa::new(hpa.get() + at.get() - gpa.get());
    table
        .set_below(
            seen,
            target,
            Height::LEAF,
            note,
            |at: Gpa, height: Height| make(page(at), height),
            &mut pages,
            |range| told.push(range),
            &mut debt,
        )
        .unwrap();
    assert_eq!(
        told,
        [gpa..Gpa::new(gpa.get() + size)],
        "the whole block is invalidated"
    );
    for index in 0..F::ENTRIES as u64 {
        let at = Gpa::new(gpa.get() + index * page_size as u64);
        let seen = table.lookup(at, Height::LEAF);
        if at == target {
            assert_eq!(seen.value(), note);
        } else {
            assert_eq!(seen.value(), make(page(at), Height::LEAF));
        }
    }
    let _ = debt.settle(|_| {});
    for page in pages.live {
        // SAFETY: allocated above, and no longer used.
        #[expect(unsafe_code)]
        unsafe {
            std::alloc::dealloc(page.hpa().get() as *mut u8, pages.layout);
        }
    }
}

#[test]
fn blocks_of_every_granule_split_around_an_annotated_page() {
    let attributes = 0x7fc;
    split_a_real_block::<Stage2K4>(|hpa, height| Stage2K4::leaf(hpa, height, attributes));
    split_a_real_block::<Stage2K16>(|hpa, height| Stage2K16::leaf(hpa, height, attributes));
    split_a_real_block::<Stage2K64>(|hpa, height| Stage2K64::leaf(hpa, height, attributes));
}
