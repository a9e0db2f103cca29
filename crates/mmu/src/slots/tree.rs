//! Slots ordered by guest frame, for readers without a lock.
//!
//! A B+tree whose nodes never change except for their links. Adding or removing a slot copies one
//! leaf (and, when it splits or empties, the nodes above as far as needed) and publishes the copy
//! with one store of a link. Replaced nodes and slots wait in [`Garbage`]. Keys of inner nodes are
//! lower bounds: a key may be smaller than everything below its link.

// UNSAFETY: readers follow pointers that writers replace.
#![expect(unsafe_code)]

use super::{Slot, UPDATE_IN_PROGRESS};
use crate::garbage::Garbage;
use alloc::boxed::Box;
use core::ptr::{NonNull, null_mut};
use core::sync::atomic::{AtomicPtr, Ordering};
use twofold_arch::Gfn;
use twofold_table::Section;

const FANOUT: usize = 64;
/// The key of an unused entry: greater than any frame number.
const UNUSED: u64 = 1 << 62;
/// Keys in a cache line.
const LINE: usize = 8;
/// 64^6 slots.
const MAX_HEIGHT: usize = 6;

/// A node. Links lead to nodes, or in a leaf to slots.
struct Node {
    len: usize,
    leaf: bool,
    /// The first key of each line of keys but the first: a search looks at two lines.
    marks: [u64; FANOUT / LINE],
    keys: [u64; FANOUT],
    links: [AtomicPtr<()>; FANOUT],
}

impl Node {
    fn new(leaf: bool) -> Box<Self> {
        Box::new(Self {
            len: 0,
            leaf,
            marks: [UNUSED; FANOUT / LINE],
            keys: [UNUSED; FANOUT],
            links: [const { AtomicPtr::new(null_mut()) }; FANOUT],
        })
    }

    fn push(&mut self, key: u64, link: *mut ()) {
        self.keys[self.len] = key;
        if self.len.is_multiple_of(LINE) && self.len > 0 {
            self.marks[self.len / LINE - 1] = key;
        }
        *self.links[self.len].get_mut() = link;
        self.len += 1;
    }

    fn link(&self, index: usize) -> *mut () {
        self.links[index].load(Ordering::Acquire)
    }

    /// The number of keys that are at most `key`.
    #[inline(always)]
    fn rank(&self, key: u64) -> usize {
        // Counting without a branch is faster than halving: the comparisons do not wait for each
        // other. All keys are below 2^63, so that the sign of a difference is the comparison.
        let count = |keys: &[u64]| {
            keys.iter()
                .map(|&k| k.wrapping_sub(key + 1) >> 63)
                .sum::<u64>() as usize
        };
        let line = count(&self.marks) % (FANOUT / LINE);
        line * LINE + count(&self.keys[line * LINE..][..LINE])
    }

    /// Copies of this node with `edit` applied to its list of keys and links: one, or two if it is
    /// too long for one. `appended` says that the new key is the last one: then the first copy
    /// stays full, since more such will follow.
    fn rebuilt(&self, edit: &Edit) -> (Box<Self>, Option<Box<Self>>) {
        let total = self.len + edit.added.len() - edit.removed;
        let appended = edit.at + edit.removed >= self.len;
        let first_len = match total {
            ..=FANOUT => total,
            _ if appended => FANOUT,
            _ => total / 2,
        };
        let mut first = Self::new(self.leaf);
        let mut second = (total > FANOUT).then(|| Self::new(self.leaf));
        let kept = |index: usize| (self.keys[index], self.link(index));
        let all = (0..edit.at)
            .map(kept)
            .chain(edit.added.iter().copied())
            .chain((edit.at + edit.removed..self.len).map(kept));
        for (number, (key, link)) in all.enumerate() {
            match &mut second {
                Some(second) if number >= first_len => second.push(key, link),
                _ => first.push(key, link),
            }
        }
        (first, second)
    }
}

/// Replaces `removed` entries at `at` by `added`.
struct Edit<'a> {
    at: usize,
    removed: usize,
    added: &'a [(u64, *mut ())],
}

/// What became of a node.
enum Change {
    /// Only something below it was replaced.
    None,
    /// It has a successor.
    One(Box<Node>),
    /// It was split; the key of the second half.
    Two(Box<Node>, Box<Node>),
    /// Nothing is left of it.
    Gone,
}

/// A slot that was found, and the generation under which it was: a way back to it without a search.
#[derive(Clone, Copy)]
pub(crate) struct SlotHint {
    slot: NonNull<Slot>,
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

/// The slots of one address space.
pub(crate) struct SlotTree {
    root: AtomicPtr<Node>,
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
    #[inline]
    unsafe fn floor<'s>(&self, gfn: u64) -> Option<&'s Slot> {
        // SAFETY: published nodes are complete and freed only after readers have passed.
        let mut node = unsafe { self.root.load(Ordering::Acquire).as_ref() }?;
        // The subtree left of the path, nearest to the leaf: there the slot is if the path's leaf
        // has only larger keys.
        let mut left: Option<&Node> = None;
        for _ in 0..MAX_HEIGHT {
            let rank = node.rank(gfn);
            if node.leaf {
                if rank > 0 {
                    // SAFETY: links of leaves are slots, freed like nodes.
                    return unsafe { node.link(rank - 1).cast::<Slot>().as_ref() };
                }
                break;
            }
            let index = rank.saturating_sub(1);
            if index > 0 {
                // SAFETY: links of inner nodes are nodes.
                left = unsafe { node.link(index - 1).cast::<Node>().as_ref() };
            }
            let next = node.link(index).cast::<Node>();
            // SAFETY: the same.
            node = unsafe { next.as_ref() }?;
        }
        let mut node = left?;
        for _ in 0..MAX_HEIGHT {
            let last = node.link(node.len.checked_sub(1)?);
            if node.leaf {
                // SAFETY: links of leaves are slots, and all keys left of the path are smaller.
                return unsafe { last.cast::<Slot>().as_ref() };
            }
            // SAFETY: links of inner nodes are nodes.
            node = unsafe { last.cast::<Node>().as_ref() }?;
        }
        None
    }

    /// The slot that holds `gfn`.
    #[inline]
    pub(crate) fn find<'s>(&self, gfn: Gfn, _section: &'s Section<'_>) -> Option<&'s Slot> {
        // SAFETY: in a read section of the MMU that the tree belongs to.
        unsafe { self.floor(gfn.get()) }.filter(|slot| slot.info.contains(gfn))
    }

    /// The slot that holds `gfn`, for the holder of the writers' lock, until it changes the tree.
    pub(crate) fn find_locked(&self, gfn: Gfn) -> Option<&Slot> {
        // SAFETY: only the holder of the lock changes the tree or frees what it replaced.
        unsafe { self.floor(gfn.get()) }.filter(|slot| slot.info.contains(gfn))
    }

    /// How to come back to `slot`, which was found when the generation was `generation`.
    #[inline]
    pub(crate) fn hint(slot: &Slot, generation: u64) -> SlotHint {
        // While the slots are changing nothing may be remembered: no generation has all bits set.
        let changing = generation & UPDATE_IN_PROGRESS != 0;
        SlotHint {
            slot: NonNull::from(slot),
            generation: if changing { u64::MAX } else { generation },
        }
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
        // SAFETY: a slot is replaced only after the generation was marked as changing, and freed
        // only after every section that began before that has ended. This section has seen the
        // generation of the time when the slot was in the tree, so it began before.
        Some(unsafe { hint.slot.as_ref() })
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
            let Some(slot) = (unsafe { self.floor(key) }) else {
                return false;
            };
            if Some(slot.info.base) != except {
                return slot.info.end() > base;
            }
            before = slot.info.base.get();
        }
    }

    /// Adds `slot`, or replaces the one that begins at the same frame. For the holder of the
    /// writers' lock.
    pub(crate) fn insert(&self, slot: Slot, garbage: &mut Garbage) {
        let key = slot.info.base.get();
        let link = Box::into_raw(Box::new(slot)).cast::<()>();
        let Some(root) = NonNull::new(self.root.load(Ordering::Acquire)) else {
            let mut node = Node::new(true);
            node.push(key, link);
            self.root.store(Box::into_raw(node), Ordering::Release);
            return;
        };
        let change = self.insert_below(root, key, link, garbage);
        self.publish_root(root, change, garbage);
    }

    fn insert_below(
        &self,
        node: NonNull<Node>,
        key: u64,
        link: *mut (),
        garbage: &mut Garbage,
    ) -> Change {
        // SAFETY: the node is in the tree and the lock is held.
        let this = unsafe { node.as_ref() };
        let rank = this.rank(key);
        if this.leaf {
            if rank > 0 && this.keys[rank - 1] == key {
                let old = this.links[rank - 1].swap(link, Ordering::AcqRel);
                if let Some(old) = NonNull::new(old.cast::<Slot>()) {
                    // SAFETY: the slot came from a box and has just been unlinked.
                    unsafe { garbage.add(old) };
                }
                return Change::None;
            }
            return edited(
                this,
                &Edit {
                    at: rank,
                    removed: 0,
                    added: &[(key, link)],
                },
            );
        }
        let index = rank.saturating_sub(1);
        let Some(child) = NonNull::new(this.link(index).cast::<Node>()) else {
            return Change::None;
        };
        let change = self.insert_below(child, key, link, garbage);
        replace_child(this, index, child, change, garbage)
    }

    /// Removes the slot that begins at `base`. For the holder of the writers' lock.
    pub(crate) fn remove(&self, base: Gfn, garbage: &mut Garbage) {
        if let Some(root) = NonNull::new(self.root.load(Ordering::Acquire)) {
            let change = self.remove_below(root, base.get(), garbage);
            self.publish_root(root, change, garbage);
        }
    }

    fn remove_below(&self, node: NonNull<Node>, key: u64, garbage: &mut Garbage) -> Change {
        // SAFETY: the node is in the tree and the lock is held.
        let this = unsafe { node.as_ref() };
        let rank = this.rank(key);
        if this.leaf {
            if rank == 0 || this.keys[rank - 1] != key {
                return Change::None;
            }
            if let Some(old) = NonNull::new(this.link(rank - 1).cast::<Slot>()) {
                // SAFETY: the slot came from a box; the copy without it is published before the
                // lock is released, and garbage is cleared only under the lock.
                unsafe { garbage.add(old) };
            }
            return edited(
                this,
                &Edit {
                    at: rank - 1,
                    removed: 1,
                    added: &[],
                },
            );
        }
        let index = rank.saturating_sub(1);
        let Some(child) = NonNull::new(this.link(index).cast::<Node>()) else {
            return Change::None;
        };
        let change = self.remove_below(child, key, garbage);
        replace_child(this, index, child, change, garbage)
    }

    fn publish_root(&self, old: NonNull<Node>, change: Change, garbage: &mut Garbage) {
        let new = match change {
            Change::None => return,
            // A root with one child is not needed.
            Change::One(node) if !node.leaf && node.len == 1 => {
                let child = node.link(0).cast::<Node>();
                drop(node);
                child
            }
            Change::One(node) => Box::into_raw(node),
            Change::Two(first, second) => {
                let mut root = Node::new(false);
                let (a, b) = (first.keys[0], second.keys[0]);
                root.push(a, Box::into_raw(first).cast());
                root.push(b, Box::into_raw(second).cast());
                Box::into_raw(root)
            }
            Change::Gone => null_mut(),
        };
        self.root.store(new, Ordering::Release);
        // SAFETY: the node came from a box and has just been unlinked.
        unsafe { garbage.add(old) };
    }
}

/// The change that `edit` makes of `node`.
fn edited(node: &Node, edit: &Edit) -> Change {
    match node.rebuilt(edit) {
        (first, Some(second)) => Change::Two(first, second),
        (first, None) if first.len == 0 => Change::Gone,
        (first, None) => Change::One(first),
    }
}

/// Applies the change of the child at `index`, which was `child`.
fn replace_child(
    node: &Node,
    index: usize,
    child: NonNull<Node>,
    change: Change,
    garbage: &mut Garbage,
) -> Change {
    let key = node.keys[index];
    let change = match change {
        Change::None => return Change::None,
        Change::One(new) => {
            node.links[index].store(Box::into_raw(new).cast(), Ordering::Release);
            Change::None
        }
        Change::Two(first, second) => {
            let second_key = second.keys[0];
            let key = key.min(first.keys[0]);
            let added = [
                (key, Box::into_raw(first).cast::<()>()),
                (second_key, Box::into_raw(second).cast::<()>()),
            ];
            edited(
                node,
                &Edit {
                    at: index,
                    removed: 1,
                    added: &added,
                },
            )
        }
        Change::Gone => edited(
            node,
            &Edit {
                at: index,
                removed: 1,
                added: &[],
            },
        ),
    };
    // SAFETY: the node came from a box; its successor is published, or will be before the lock is
    // released, and garbage is cleared only under the lock.
    unsafe { garbage.add(child) };
    change
}

impl Drop for SlotTree {
    fn drop(&mut self) {
        fn free(node: *mut Node) {
            if node.is_null() {
                return;
            }
            // SAFETY: `&mut` access: nobody else follows links, and each leads to a box of its own.
            let mut node = unsafe { Box::from_raw(node) };
            let (len, leaf) = (node.len, node.leaf);
            for link in &mut node.links[..len] {
                if leaf {
                    // SAFETY: the same; links of leaves are slots.
                    drop(unsafe { Box::from_raw(link.get_mut().cast::<Slot>()) });
                } else {
                    free(link.get_mut().cast());
                }
            }
        }
        free(*self.root.get_mut());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::region::RegionFlags;
    use crate::slots::SlotInfo;
    use alloc::collections::BTreeMap;
    use alloc::vec::Vec;
    use proptest::prelude::*;
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
