//! Watching entries change.
//!
//! A storage may name a [`Tracer`]. The engine tells it of each change right after others can see it.
//! Of tables that are linked in together, every new mapping and every table on the way to it are
//! named, from the top. An entry that was locked changes when it is unlocked. A table that is taken out goes as one change, and one that takes a leaf's
//! place comes as one: what stands below them is not listed. Nor are bits that processors set, and
//! what the sole owner of tables does to them ([`Exclusive`](crate::Exclusive)).

use crate::format::{Entry, Format, Height};
use crate::storage::{At, Storage, TablePage};
use crate::walk::{Place, Seen, Table};
use twofold_arch::Gpa;

/// A change of one entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Change {
    /// The first address that the entry covers.
    pub gpa: Gpa,
    /// The height of the table that holds the entry.
    pub height: Height,
    /// What it was.
    pub old: u64,
    /// What it is now.
    pub new: u64,
}

/// Somebody who wants to know how entries change.
pub trait Tracer {
    /// An entry has changed. Called in read sections and with locks held: it may not wait for
    /// another thread that uses the tables.
    fn changed(&self, change: Change);
}

/// Tells the storage's tracer, if it has one.
#[inline(always)]
pub(crate) fn tell<S: Storage>(storage: &S, place: &Place, old: u64, new: u64) {
    if let Some(tracer) = storage.tracer() {
        tell_tracer(tracer, place, old, new);
    }
}

#[cold]
#[inline(never)]
fn tell_tracer(tracer: &dyn Tracer, place: &Place, old: u64, new: u64) {
    tracer.changed(Change {
        gpa: place.gpa,
        height: place.height,
        old,
        new,
    });
}

/// [`tell`] of an entry that had mapped nothing and links new tables in.
#[inline(always)]
pub(crate) fn tell_linked<F: Format, S: Storage>(table: &Table<'_, F, S>, seen: &Seen, new: u64) {
    if let Some(tracer) = table.storage.tracer() {
        tell_tracer(tracer, &seen.place, seen.value, new);
        tell_below::<F, S>(table.storage, tracer, &seen.place, new);
    }
}

#[cold]
#[inline(never)]
fn tell_below<F: Format, S: Storage>(storage: &S, tracer: &dyn Tracer, place: &Place, value: u64) {
    let (Entry::Table(child), Some(height)) =
        (F::decode(value, place.height), place.height.below())
    else {
        return;
    };
    for index in 0..F::ENTRIES {
        let at = At::new(TablePage::found(child), index);
        let value = storage.load(at);
        if F::decode(value, height) == Entry::Empty {
            continue;
        }
        let gpa = Gpa::new(place.gpa.get() + ((index as u64) << F::shift(height)));
        let below = Place { at, height, gpa };
        tell_tracer(tracer, &below, F::EMPTY, value);
        tell_below::<F, S>(storage, tracer, &below, value);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may fail")]

    use super::*;
    use crate::change::Debt;
    use crate::format::Format;
    use crate::testing::{Arena, Source};
    use crate::toy::{SHIFT, ToyBreak, ToyDirect, leaf};
    use core::marker::PhantomData;
    use std::vec::Vec;
    use twofold_arch::Hpa;

    struct World<F> {
        arena: Arena,
        root: crate::RootTable,
        format: PhantomData<F>,
    }

    const EMPTY: u64 = ToyDirect::EMPTY;

    fn gpa(page: u64) -> Gpa {
        Gpa::new(page << SHIFT)
    }

    fn table(page: u64) -> u64 {
        ToyDirect::table_entry(Hpa::new(page << SHIFT))
    }

    impl<F: Format> World<F> {
        fn new() -> Self {
            let arena = Arena::traced(10);
            let root = arena.root::<F>(1);
            Self {
                arena,
                root,
                format: PhantomData,
            }
        }

        fn table(&self) -> Table<'_, F, Arena> {
            self.arena.table(self.root)
        }

        fn source(&self) -> Source<'_> {
            Source {
                arena: &self.arena,
                limit: 8,
            }
        }

        fn look(&self, page: u64, height: u8) -> Seen {
            self.table().lookup(gpa(page), Height::new(height))
        }

        /// Maps a page in an empty world.
        fn link(&self, page: u64, height: u8, leaf: u64) -> Vec<(u64, u8, u64, u64)> {
            let height = Height::new(height);
            let seen = self.table().lookup(gpa(page), height);
            let mut source = self.source();
            self.table()
                .link_leaf(seen, gpa(page), height, leaf, &mut source)
                .unwrap();
            self.arena.changes()
        }
    }

    #[test]
    fn new_tables_are_told_from_the_top_and_everything_in_them() {
        let world = World::<ToyDirect>::new();
        assert_eq!(
            world.link(22, 1, leaf(7, 1)),
            [
                (16, 3, EMPTY, table(3)),
                (20, 2, EMPTY, table(2)),
                (22, 1, EMPTY, leaf(7, 1)),
            ]
        );
        let seen = world.look(33, 1);
        let made = |at: Gpa| leaf(at.get() >> SHIFT, 1);
        let range = gpa(34)..gpa(38);
        let result =
            (world.table()).link_range(seen, range, Height::LEAF, made, &mut world.source());
        result.unwrap();
        let told: Vec<_> = world.arena.changes();
        let places: Vec<_> = told
            .iter()
            .map(|&(page, height, ..)| (page, height))
            .collect();
        let expected = [
            (32, 3),
            (32, 2),
            (34, 1),
            (35, 1),
            (36, 2),
            (36, 1),
            (37, 1),
        ];
        assert_eq!(places, expected);
        assert!(told.iter().all(|&(_, _, old, _)| old == EMPTY));
    }

    #[test]
    fn a_change_of_one_entry_is_told_once_and_one_that_fails_is_not() {
        let world = World::<ToyDirect>::new();
        let (first, more, less) = (leaf(7, 1), leaf(7, 3), leaf(7, 0));
        world.link(5, 1, first);
        let mut debt = Debt::none();
        let stale = world.look(5, 1);
        world.table().widen(stale, more).unwrap();
        world.table().widen(stale, less).unwrap_err();
        world
            .table()
            .shrink(world.look(5, 1), less, &mut debt)
            .unwrap();
        world.table().remove(world.look(5, 1), &mut debt).unwrap();
        world.table().install(world.look(5, 1), first).unwrap();
        assert_eq!(
            world.arena.changes(),
            [
                (5, 1, first, more),
                (5, 1, more, less),
                (5, 1, less, EMPTY),
                (5, 1, EMPTY, first),
            ]
        );
    }

    #[test]
    fn tables_that_come_for_a_leaf_or_go_are_one_change() {
        let world = World::<ToyDirect>::new();
        world.link(4, 2, leaf(4, 1));
        let child = |at: Gpa| leaf(at.get() >> SHIFT, 1);
        let mut source = world.source();
        (world.table())
            .split(world.look(4, 2), child, 0, &mut source, |_| {})
            .unwrap();
        let mut debt = Debt::none();
        let whole = world.look(4, 2);
        world
            .table()
            .collapse(whole, leaf(4, 1), &mut debt, |_| {})
            .unwrap();
        world.table().remove(world.look(0, 3), &mut debt).unwrap();
        let told = world.arena.changes();
        let places: Vec<_> = told
            .iter()
            .map(|&(page, height, ..)| (page, height))
            .collect();
        assert_eq!(places, [(4, 2), (4, 2), (0, 3)]);
        assert_eq!(
            (told[0].2, told[1].3, told[2].3),
            (leaf(4, 1), leaf(4, 1), EMPTY)
        );
    }

    #[test]
    fn a_locked_entry_changes_when_it_is_unlocked_with_another_value() {
        let world = World::<ToyBreak>::new();
        let (first, second) = (leaf(7, 1), leaf(8, 1));
        world.link(5, 1, first);
        drop(world.table().freeze(world.look(5, 1)).unwrap());
        assert_eq!(world.arena.changes(), []);
        let frozen = world.table().freeze(world.look(5, 1)).unwrap();
        assert_eq!(world.arena.changes(), []);
        frozen.publish(second);
        assert_eq!(world.arena.changes(), [(5, 1, first, second)]);
        let broken = world.table().break_entry(world.look(5, 1)).unwrap();
        let mut debt = Debt::none();
        broken.invalidate(|_| {}).make(first, &mut debt);
        let broken = world.table().break_entry(world.look(5, 1)).unwrap();
        drop(broken.invalidate(|_| {}));
        assert_eq!(
            world.arena.changes(),
            [(5, 1, second, first), (5, 1, first, EMPTY)]
        );
    }
}
