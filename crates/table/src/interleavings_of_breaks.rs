//! Every interleaving of break-before-make, explored by `loom`.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

use crate::change::Debt;
use crate::format::{Entry, Format, Height};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::testing::{Arena, Source};
use crate::toy::{SHIFT, ToyBreak, leaf};
use crate::walk::RootTable;
use loom::sync::Arc;
use loom::thread;
use twofold_arch::Gpa;

const GPA: Gpa = Gpa::new(5 << SHIFT);

struct World {
    arena: Arena,
    root: RootTable,
    /// What the one TLB holds for the page: 0, or the leaf without its permissions.
    tlb: AtomicU64,
}

impl World {
    fn new() -> Arc<Self> {
        let arena = Arena::new(3);
        let root = arena.root::<ToyBreak>(1);
        let world = Self {
            arena,
            root,
            tlb: AtomicU64::new(0),
        };
        let table = world.arena.table::<ToyBreak>(root);
        let mut source = Source {
            arena: &world.arena,
            limit: 10,
        };
        let seen = table.lookup(GPA, Height::LEAF);
        table
            .link_leaf(seen, GPA, Height::LEAF, leaf(1, 7), &mut source)
            .unwrap();
        world.tlb.store(leaf(1, 0), Ordering::SeqCst);
        Arc::new(world)
    }

    /// Changes the page to `value` once, unless another change is under way or came first.
    fn change(&self, value: u64) -> bool {
        let table = self.arena.table::<ToyBreak>(self.root);
        let seen = table.lookup(GPA, Height::LEAF);
        if seen.entry::<ToyBreak>() == Entry::Frozen {
            return false;
        }
        let mut debt = Debt::none();
        let changed = match table.break_entry(seen) {
            Ok(broken) => {
                let gap = broken.invalidate(|_| self.tlb.store(0, Ordering::SeqCst));
                // The entry is locked and in no TLB: whatever comes now is the only translation.
                assert_eq!(self.tlb.load(Ordering::SeqCst), 0);
                self.tlb.store(value & !(7 << 8), Ordering::SeqCst);
                gap.make(value, &mut debt);
                true
            }
            Err(_) => false,
        };
        let _ = debt.settle(|_| panic!("break-before-make owes no flush"));
        changed
    }
}

#[test]
fn of_two_that_replace_a_page_each_breaks_before_it_makes() {
    loom::model(|| {
        let world = World::new();
        let other = {
            let world = Arc::clone(&world);
            thread::spawn(move || world.change(leaf(2, 7)))
        };
        let mine = world.change(leaf(3, 7));
        let others = other.join().unwrap();
        assert!(mine || others);
        let value = world
            .arena
            .table::<ToyBreak>(world.root)
            .lookup(GPA, Height::LEAF)
            .value();
        assert_eq!(value & !(7 << 8), world.tlb.load(Ordering::SeqCst));
        match (mine, others) {
            (true, false) => assert_eq!(value, leaf(3, 7)),
            (false, true) => assert_eq!(value, leaf(2, 7)),
            _ => assert!(value == leaf(2, 7) || value == leaf(3, 7)),
        }
    });
}

#[test]
fn a_change_of_permissions_beside_a_replacement_is_refused_or_comes_before_it() {
    loom::model(|| {
        let world = World::new();
        let other = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                let table = world.arena.table::<ToyBreak>(world.root);
                let seen = table.lookup(GPA, Height::LEAF);
                if seen.value() != leaf(1, 7) {
                    return false;
                }
                let mut debt = Debt::none();
                let done = table.set(seen, leaf(1, 1), |_| {}, &mut debt).is_ok();
                let _ = debt.settle(|_| {});
                done
            })
        };
        let mine = world.change(leaf(2, 7));
        let others = other.join().unwrap();
        let value = world
            .arena
            .table::<ToyBreak>(world.root)
            .lookup(GPA, Height::LEAF)
            .value();
        assert!(mine || others);
        assert_eq!(value, if mine { leaf(2, 7) } else { leaf(1, 1) });
        assert_ne!(value, ToyBreak::FROZEN);
    });
}
