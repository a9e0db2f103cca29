//! Slots ordered by guest frame, for readers without a lock.
//!
//! A B+tree whose nodes never change except for the links of inner nodes. A leaf holds what a
//! lookup wants to know of its slots, packed, so that 32,764 slots are searched within a core's
//! cache; the slots themselves are reached only by those who need more. Adding, removing or
//! replacing a slot copies one leaf (and, when it splits or empties, the nodes above as far as
//! needed) and publishes the copy with one store of a link. Replaced nodes and slots wait in
//! [`Garbage`]. Keys of inner nodes are lower bounds: a key may be smaller than everything below
//! its link.

// UNSAFETY: readers follow pointers that writers replace.
#![expect(unsafe_code)]

use super::node::{Change, Entry, Inner, Leaf, Node, edited};
use super::{Slot, SlotInfo, UPDATE_IN_PROGRESS};
use crate::garbage::Garbage;
use crate::sync::atomic::{AtomicPtr, Ordering};
use alloc::boxed::Box;
use core::ptr::{NonNull, null_mut};
use twofold_arch::Gfn;
use twofold_table::Section;

/// Levels of inner nodes: more than ids can fill.
const MAX_HEIGHT: usize = 6;

/// A slot that was found, and the generation under which it was: a way back to it without a search.
#[derive(Clone, Copy)]
pub(crate) struct SlotHint {
    /// Where the leaf keeps the pointer to the slot.
    place: NonNull<*mut Slot>,
    generation: u64,
}

impl SlotHint {
    /// Whether the slot was found under this generation.
    #[inline(always)]
    pub(crate) fn is_of(&self, generation: u64) -> bool {
        self.generation == generation
    }
}

// SAFETY: the pointer is only followed by `SlotTree::recall`, which needs a read section.
unsafe impl Send for SlotHint {}

/// A slot in its leaf.
#[derive(Clone, Copy)]
pub(crate) struct Found<'s> {
    leaf: &'s Leaf,
    index: usize,
}

impl<'s> Found<'s> {
    /// What the slot is, from the leaf alone.
    #[inline(always)]
    pub(crate) fn info(&self) -> SlotInfo {
        self.leaf.info(self.index)
    }

    /// The slot itself.
    #[inline(always)]
    pub(crate) fn slot(&self) -> Option<&'s Slot> {
        // SAFETY: a slot is freed like the leaves that lead to it: whoever may look at the leaf
        // may look at the slot.
        unsafe { self.leaf.place(self.index).as_ref() }
    }

    /// How to come back to the slot, which was found when the generation was `generation`.
    #[inline(always)]
    pub(crate) fn hint(&self, generation: u64) -> SlotHint {
        // While the slots are changing nothing may be remembered: no generation has all bits set.
        let changing = generation & UPDATE_IN_PROGRESS != 0;
        SlotHint {
            place: NonNull::from(self.leaf.place(self.index)),
            generation: if changing { u64::MAX } else { generation },
        }
    }

    fn if_holds(self, gfn: Gfn) -> Option<Self> {
        self.info().contains(gfn).then_some(self)
    }
}

/// The slots of one address space.
pub(crate) struct SlotTree {
    root: AtomicPtr<Inner>,
}

impl SlotTree {
    pub(crate) const fn new() -> Self {
        Self {
            root: AtomicPtr::new(null_mut()),
        }
    }

    /// The slot with the largest first frame that is at most `gfn`.
    ///
    /// # Safety
    /// The caller is in a read section or holds the writers' lock, for as long as `'s`.
    #[inline(always)]
    unsafe fn floor<'s>(&self, gfn: u64) -> Option<Found<'s>> {
        // SAFETY: published nodes are complete and freed only after readers have passed.
        let mut node: &'s Inner = unsafe { self.root.load(Ordering::Acquire).as_ref() }?;
        // The link left of the path, nearest to the leaf: below it the slot is if the path's leaf
        // has only larger keys.
        let mut left = None;
        for _ in 0..MAX_HEIGHT {
            let index = node.rank(gfn).saturating_sub(1);
            if index > 0 {
                left = Some((node, index - 1));
            }
            let next = node.link(index);
            if node.above_leaves() {
                // SAFETY: links of such nodes are leaves, freed like nodes.
                let leaf: &'s Leaf = unsafe { next.cast::<Leaf>().as_ref() }?;
                return match leaf.rank(gfn).checked_sub(1) {
                    Some(index) => Some(Found { leaf, index }),
                    // SAFETY: the caller's promise.
                    None => left.and_then(|(node, index)| unsafe { Self::last_below(node, index) }),
                };
            }
            // SAFETY: links of other nodes are inner nodes.
            node = unsafe { next.cast::<Inner>().as_ref() }?;
        }
        None
    }

    /// The last slot below the link at `index`.
    ///
    /// # Safety
    /// As for [`floor`](Self::floor).
    #[cold]
    unsafe fn last_below<'s>(mut node: &'s Inner, mut index: usize) -> Option<Found<'s>> {
        for _ in 0..MAX_HEIGHT {
            let next = node.link(index);
            if node.above_leaves() {
                // SAFETY: links of such nodes are leaves.
                let leaf: &'s Leaf = unsafe { next.cast::<Leaf>().as_ref() }?;
                let index = leaf.len().checked_sub(1)?;
                return Some(Found { leaf, index });
            }
            // SAFETY: links of other nodes are inner nodes.
            node = unsafe { next.cast::<Inner>().as_ref() }?;
            index = node.len().checked_sub(1)?;
        }
        None
    }

    /// The slot that holds `gfn`, in its leaf: for those who only want to know what it is.
    #[inline(always)]
    pub(crate) fn find_entry<'s>(&self, gfn: Gfn, _section: &'s Section<'_>) -> Option<Found<'s>> {
        // SAFETY: in a read section of the MMU that the tree belongs to.
        unsafe { self.floor(gfn.get()) }?.if_holds(gfn)
    }

    /// The slot that holds `gfn`.
    pub(crate) fn find<'s>(&self, gfn: Gfn, section: &'s Section<'_>) -> Option<&'s Slot> {
        self.find_entry(gfn, section)?.slot()
    }

    /// The slot that holds `gfn`, for the holder of the writers' lock, until it changes the tree.
    pub(crate) fn find_locked(&self, gfn: Gfn) -> Option<&Slot> {
        // SAFETY: only the holder of the lock changes the tree or frees what it replaced.
        unsafe { self.floor(gfn.get()) }?.if_holds(gfn)?.slot()
    }

    /// The slot of a hint, if the generation, read in this section, still is the one of the hint.
    #[inline(always)]
    pub(crate) fn recall<'s>(
        hint: SlotHint,
        generation: u64,
        _section: &'s Section<'_>,
    ) -> Option<&'s Slot> {
        if hint.generation != generation {
            return None;
        }
        // SAFETY: leaves and slots are replaced only after the generation was marked as changing,
        // and freed only after every section that began before that has ended. This section has
        // seen the generation of the time when the leaf was in the tree, so it began before.
        unsafe { hint.place.as_ref().as_ref() }
    }

    /// Whether any slot overlaps `base..base + pages`, except one that begins at `except`. For the
    /// holder of the writers' lock.
    pub(crate) fn overlaps(&self, base: Gfn, pages: u64, except: Option<Gfn>) -> bool {
        // From the last slot that begins before the end towards lower addresses: the first that is
        // not the excepted one decides, since slots do not overlap each other.
        let mut before = base.get() + pages;
        loop {
            let Some(key) = before.checked_sub(1) else {
                return false;
            };
            // SAFETY: the lock is held.
            let Some(found) = (unsafe { self.floor(key) }) else {
                return false;
            };
            let info = found.info();
            if Some(info.base) != except {
                return info.end() > base;
            }
            before = info.base.get();
        }
    }

    /// Adds `slot`, or replaces the one that begins at the same frame. For the holder of the
    /// writers' lock.
    pub(crate) fn insert(&self, slot: Slot, garbage: &mut Garbage) {
        let entry = Entry::new(slot);
        let Some(root) = NonNull::new(self.root.load(Ordering::Acquire)) else {
            let mut leaf = Leaf::new();
            leaf.push(entry);
            let mut root = Inner::new(true);
            root.push((entry.key(), Box::into_raw(leaf).cast()));
            self.root.store(Box::into_raw(root), Ordering::Release);
            return;
        };
        let change = self.change_below(root, entry.key(), Some(entry), garbage);
        self.publish_root(root, change, garbage);
    }

    /// Removes the slot that begins at `base`. For the holder of the writers' lock.
    pub(crate) fn remove(&self, base: Gfn, garbage: &mut Garbage) {
        if let Some(root) = NonNull::new(self.root.load(Ordering::Acquire)) {
            let change = self.change_below(root, base.get(), None, garbage);
            self.publish_root(root, change, garbage);
        }
    }

    /// Puts `new` in the place of the slot that begins at `key`, if there is one.
    fn change_below(
        &self,
        node: NonNull<Inner>,
        key: u64,
        new: Option<Entry>,
        garbage: &mut Garbage,
    ) -> Change<Inner> {
        // SAFETY: the node is in the tree and the lock is held.
        let this = unsafe { node.as_ref() };
        let index = this.rank(key).saturating_sub(1);
        let Some(child) = NonNull::new(this.link(index)) else {
            return Change::None;
        };
        if this.above_leaves() {
            let leaf = child.cast::<Leaf>();
            // SAFETY: links of such nodes are leaves; the lock is held.
            let change = change_leaf(unsafe { leaf.as_ref() }, key, new, garbage);
            replace_child(this, index, leaf, change, garbage)
        } else {
            let inner = child.cast::<Inner>();
            let change = self.change_below(inner, key, new, garbage);
            replace_child(this, index, inner, change, garbage)
        }
    }

    fn publish_root(&self, old: NonNull<Inner>, change: Change<Inner>, garbage: &mut Garbage) {
        let new = match change {
            Change::None => return,
            // A root with one inner node below it is not needed.
            Change::One(node) if !node.above_leaves() && node.len() == 1 => {
                let child = node.link(0).cast::<Inner>();
                drop(node);
                child
            }
            Change::One(node) => Box::into_raw(node),
            Change::Two(first, second) => {
                let mut root = Inner::new(false);
                let (a, b) = (first.first_key(), second.first_key());
                root.push((a, Box::into_raw(first).cast()));
                root.push((b, Box::into_raw(second).cast()));
                Box::into_raw(root)
            }
            Change::Gone => null_mut(),
        };
        self.root.store(new, Ordering::Release);
        // SAFETY: the node came from a box and has just been unlinked.
        unsafe { garbage.add(old) };
    }
}

/// Puts `new` in the place of the slot that begins at `key`, if there is one.
fn change_leaf(leaf: &Leaf, key: u64, new: Option<Entry>, garbage: &mut Garbage) -> Change<Leaf> {
    let rank = leaf.rank(key);
    let old = rank
        .checked_sub(1)
        .map(|index| leaf.item(index))
        .filter(|entry| entry.key() == key);
    if let Some(slot) = old.and_then(|entry| NonNull::new(entry.slot())) {
        // SAFETY: the slot came from a box; the copy of the leaf without it is published before
        // the lock is released, and garbage is cleared only under the lock.
        unsafe { garbage.add(slot) };
    }
    let removed = usize::from(old.is_some());
    if removed == 0 && new.is_none() {
        return Change::None;
    }
    edited(leaf, rank - removed, removed, new.as_slice())
}

/// Applies the change of the child at `index`, which was `child`.
fn replace_child<C: Node + Send + Sync + 'static>(
    node: &Inner,
    index: usize,
    child: NonNull<C>,
    change: Change<C>,
    garbage: &mut Garbage,
) -> Change<Inner> {
    let change = match change {
        Change::None => return Change::None,
        Change::One(new) => {
            node.set_link(index, Box::into_raw(new).cast());
            Change::None
        }
        Change::Two(first, second) => {
            let key = node.item(index).0.min(first.first_key());
            let second_key = second.first_key();
            let added = [
                (key, Box::into_raw(first).cast::<()>()),
                (second_key, Box::into_raw(second).cast::<()>()),
            ];
            edited(node, index, 1, &added)
        }
        Change::Gone => edited(node, index, 1, &[]),
    };
    // SAFETY: the node came from a box; its successor is published, or will be before the lock is
    // released, and garbage is cleared only under the lock.
    unsafe { garbage.add(child) };
    change
}

impl Drop for SlotTree {
    fn drop(&mut self) {
        fn free(node: *mut Inner) {
            if node.is_null() {
                return;
            }
            // SAFETY: `&mut` access: nobody else follows links, and each leads to a box of its own.
            let node = unsafe { Box::from_raw(node) };
            for index in 0..node.len() {
                if !node.above_leaves() {
                    free(node.link(index).cast());
                    continue;
                }
                // SAFETY: the same; links of such nodes are leaves.
                let leaf = unsafe { Box::from_raw(node.link(index).cast::<Leaf>()) };
                for index in 0..leaf.len() {
                    // SAFETY: the same; each slot is in one leaf of the tree.
                    drop(unsafe { Box::from_raw(leaf.item(index).slot()) });
                }
            }
        }
        free(*self.root.get_mut());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::region::{MAX_SLOT_PAGES, RegionFlags};
    use alloc::collections::BTreeMap;
    use alloc::vec::Vec;
    use proptest::prelude::*;
    use twofold_arch::PAGE_SIZE;
    use twofold_table::Quiesced;

    fn slot(base: u64, pages: u64, id: u16) -> Slot {
        let info = SlotInfo {
            id,
            as_id: 0,
            base: Gfn::new(base),
            pages,
            hva: base << 12,
            flags: RegionFlags::empty(),
        };
        Slot::new(info, None)
    }

    fn clear(garbage: &mut Garbage) {
        // SAFETY: the tests have no readers.
        garbage.clear(&unsafe { Quiesced::exclusive() });
    }

    fn model_find(model: &BTreeMap<u64, (u64, u16)>, gfn: u64) -> Option<u16> {
        let (base, (pages, id)) = model.range(..=gfn).next_back()?;
        (gfn - base < *pages).then_some(*id)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// Frames are few, so that slots are added next to, inside and over each other, and so many
        /// that inner nodes split, empty and vanish.
        #[test]
        fn the_tree_agrees_with_an_ordered_map(
            ops in prop::collection::vec((0u64..6000, 1u64..4, any::<bool>()), 1..1500),
            descending in any::<bool>(),
        ) {
            let tree = SlotTree::new();
            let mut garbage = Garbage::default();
            let mut model: BTreeMap<u64, (u64, u16)> = BTreeMap::new();
            if descending {
                for base in (0..3000u64).rev() {
                    tree.insert(slot(base * 2, 1, 9), &mut garbage);
                    model.insert(base * 2, (1, 9));
                }
            }
            for (number, &(base, pages, add)) in ops.iter().enumerate() {
                if add {
                    let free = (base..base + pages).all(|gfn| model_find(&model, gfn).is_none())
                        && model.range(base..base + pages).next().is_none();
                    prop_assert_eq!(!tree.overlaps(Gfn::new(base), pages, None), free);
                    if free {
                        tree.insert(slot(base, pages, number as u16), &mut garbage);
                        model.insert(base, (pages, number as u16));
                    }
                } else {
                    tree.remove(Gfn::new(base), &mut garbage);
                    model.remove(&base);
                }
                if number % 64 == 0 {
                    clear(&mut garbage);
                }
            }
            for gfn in 0..6010 {
                let found = tree.find_locked(Gfn::new(gfn)).map(|slot| slot.info.id);
                prop_assert_eq!(found, model_find(&model, gfn), "{}", gfn);
            }
            clear(&mut garbage);
        }
    }

    #[test]
    fn every_slot_is_found_at_the_greatest_number_and_all_can_go() {
        let tree = SlotTree::new();
        let mut garbage = Garbage::default();
        let bases: Vec<u64> = (0..32764u64).map(|n| (n * 7919) % 32764 * 3).collect();
        for (id, &base) in bases.iter().enumerate() {
            tree.insert(slot(base, 2, id as u16), &mut garbage);
        }
        clear(&mut garbage);
        for (id, &base) in bases.iter().enumerate() {
            for gfn in [base, base + 1] {
                let found = tree.find_locked(Gfn::new(gfn)).map(|slot| slot.info.id);
                assert_eq!(found, Some(id as u16));
            }
            assert!(tree.find_locked(Gfn::new(base + 2)).is_none());
        }
        for &base in &bases {
            tree.remove(Gfn::new(base), &mut garbage);
            assert!(tree.find_locked(Gfn::new(base)).is_none());
        }
        assert!(tree.root.load(Ordering::Relaxed).is_null());
        clear(&mut garbage);
    }

    #[test]
    fn a_leaf_says_of_a_slot_what_the_slot_says_also_after_it_was_replaced() {
        let tree = SlotTree::new();
        let mut garbage = Garbage::default();
        let extreme = |base: u64, flags| SlotInfo {
            id: u16::MAX,
            as_id: u16::MAX - 1,
            base: Gfn::new(base),
            pages: MAX_SLOT_PAGES,
            hva: !(PAGE_SIZE - 1),
            flags,
        };
        let bases = (0..100).map(|n| n * MAX_SLOT_PAGES);
        for flags in [
            RegionFlags::all(),
            RegionFlags::empty(),
            RegionFlags::READONLY,
            RegionFlags::LOG_DIRTY,
        ] {
            for base in bases.clone() {
                tree.insert(Slot::new(extreme(base, flags), None), &mut garbage);
            }
            for base in bases.clone() {
                // SAFETY: nobody changes the tree meanwhile.
                let found = unsafe { tree.floor(base + MAX_SLOT_PAGES - 1) }.unwrap();
                assert_eq!(found.info(), extreme(base, flags));
                assert_eq!(found.slot().unwrap().info, extreme(base, flags));
            }
        }
        clear(&mut garbage);
    }

    #[test]
    fn a_moving_slot_does_not_overlap_itself() {
        let tree = SlotTree::new();
        let mut garbage = Garbage::default();
        tree.insert(slot(10, 5, 0), &mut garbage);
        tree.insert(slot(20, 5, 1), &mut garbage);
        assert!(tree.overlaps(Gfn::new(12), 5, None));
        assert!(!tree.overlaps(Gfn::new(12), 5, Some(Gfn::new(10))));
        assert!(tree.overlaps(Gfn::new(12), 9, Some(Gfn::new(10))));
        assert!(!tree.overlaps(Gfn::new(0), 10, None));
        clear(&mut garbage);
    }
}
