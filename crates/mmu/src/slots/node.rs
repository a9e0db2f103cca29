//! The nodes of the tree of slots, and copies of them.

use super::{Slot, SlotInfo};
use crate::region::RegionFlags;
use crate::sync::atomic::{AtomicPtr, Ordering};
use alloc::boxed::Box;
use core::ptr::null_mut;
use twofold_arch::Gfn;

/// Links of an inner node.
const INNER: usize = 64;
/// Slots of a leaf: few, so that a copy is cheap and all keys are compared at once.
const LEAF: usize = 16;
/// The key of an unused entry: greater than any frame number.
const UNUSED: u64 = 1 << 62;
/// Keys in a cache line.
const LINE: usize = 8;

/// The number of `keys` that are at most `key`.
#[inline(always)]
fn count<const N: usize>(keys: &[u64; N], key: u64) -> usize {
    // Counting without a branch is faster than halving: the comparisons do not wait for each
    // other. All keys are below 2^63, so that the sign of a difference is the comparison.
    keys.iter()
        .map(|&k| k.wrapping_sub(key + 1) >> 63)
        .sum::<u64>() as usize
}

/// A node as an ordered list.
pub(super) trait Node: Sized {
    /// The most entries it has.
    const FANOUT: usize;
    type Item: Copy;

    /// A node of the same kind without entries.
    fn empty_like(&self) -> Box<Self>;
    fn len(&self) -> usize;
    fn item(&self, index: usize) -> Self::Item;
    /// Appends an entry to a node that is not full.
    fn push(&mut self, item: Self::Item);
    /// The key of the first entry.
    fn first_key(&self) -> u64;
}

/// An inner node. Its links lead to inner nodes or, all of them, to leaves.
#[repr(C, align(64))]
pub(super) struct Inner {
    /// The first key of each line of keys but the first: a search looks at two lines.
    marks: [u64; INNER / LINE],
    keys: [[u64; LINE]; INNER / LINE],
    links: [AtomicPtr<()>; INNER],
    len: usize,
    above_leaves: bool,
}

impl Inner {
    pub(super) fn new(above_leaves: bool) -> Box<Self> {
        Box::new(Self {
            marks: [UNUSED; INNER / LINE],
            keys: [[UNUSED; LINE]; INNER / LINE],
            links: [const { AtomicPtr::new(null_mut()) }; INNER],
            len: 0,
            above_leaves,
        })
    }

    /// Whether the links lead to leaves.
    #[inline(always)]
    pub(super) fn above_leaves(&self) -> bool {
        self.above_leaves
    }

    #[inline(always)]
    pub(super) fn link(&self, index: usize) -> *mut () {
        self.links[index].load(Ordering::Acquire)
    }

    /// Publishes a complete node in the place of another.
    pub(super) fn set_link(&self, index: usize, link: *mut ()) {
        self.links[index].store(link, Ordering::Release);
    }

    /// The number of keys that are at most `key`.
    #[inline(always)]
    pub(super) fn rank(&self, key: u64) -> usize {
        let line = count(&self.marks, key) % (INNER / LINE);
        line * LINE + count(&self.keys[line], key)
    }
}

impl Node for Inner {
    const FANOUT: usize = INNER;
    type Item = (u64, *mut ());

    fn empty_like(&self) -> Box<Self> {
        Self::new(self.above_leaves)
    }

    fn len(&self) -> usize {
        self.len
    }

    fn item(&self, index: usize) -> Self::Item {
        (self.keys[index / LINE][index % LINE], self.link(index))
    }

    fn push(&mut self, (key, link): Self::Item) {
        self.keys[self.len / LINE][self.len % LINE] = key;
        if self.len.is_multiple_of(LINE) && self.len > 0 {
            self.marks[self.len / LINE - 1] = key;
        }
        *self.links[self.len].get_mut() = link;
        self.len += 1;
    }

    fn first_key(&self) -> u64 {
        self.keys[0][0]
    }
}

/// What a slot is, except for its first frame.
#[derive(Clone, Copy)]
struct Facts {
    /// Host-virtual address of the first byte; flags in the bits below the page.
    hva: u64,
    /// At most `MAX_SLOT_PAGES`.
    pages: u32,
    id: u16,
    as_id: u16,
}

impl Facts {
    const NONE: Self = Self {
        hva: 0,
        pages: 0,
        id: 0,
        as_id: 0,
    };
    const FLAGS: u64 = RegionFlags::all().bits() as u64;
}

const _: () = assert!(Facts::FLAGS < twofold_arch::PAGE_SIZE);
const _: () = assert!(crate::region::MAX_SLOT_PAGES <= u32::MAX as u64);

/// A slot in a leaf.
#[derive(Clone, Copy)]
pub(super) struct Entry {
    key: u64,
    facts: Facts,
    slot: *mut Slot,
}

impl Entry {
    /// An entry for a slot, which moves into a box.
    pub(super) fn new(slot: Slot) -> Self {
        let info = slot.info;
        Self {
            key: info.base.get(),
            facts: Facts {
                hva: info.hva | u64::from(info.flags.bits()),
                pages: info.pages as u32,
                id: info.id,
                as_id: info.as_id,
            },
            slot: Box::into_raw(Box::new(slot)),
        }
    }

    /// The first frame.
    pub(super) fn key(&self) -> u64 {
        self.key
    }

    /// The slot, in a box of its own.
    pub(super) fn slot(&self) -> *mut Slot {
        self.slot
    }
}

/// A leaf. It never changes once it is published.
#[repr(C, align(64))]
pub(super) struct Leaf {
    keys: [u64; LEAF],
    facts: [Facts; LEAF],
    slots: [*mut Slot; LEAF],
    len: usize,
}

// UNSAFETY: shares the pointers of a leaf.
// SAFETY: a leaf only holds the pointers, and what they lead to may be shared and sent.
#[expect(unsafe_code)]
unsafe impl Send for Leaf {}
// UNSAFETY: shares the pointers of a leaf.
// SAFETY: the same.
#[expect(unsafe_code)]
unsafe impl Sync for Leaf {}

const _: () = {
    const fn shared<T: Send + Sync>() {}
    shared::<Slot>();
};

impl Leaf {
    pub(super) fn new() -> Box<Self> {
        Box::new(Self {
            keys: [UNUSED; LEAF],
            facts: [Facts::NONE; LEAF],
            slots: [null_mut(); LEAF],
            len: 0,
        })
    }

    /// The number of slots that begin at `key` or below.
    #[inline(always)]
    pub(super) fn rank(&self, key: u64) -> usize {
        count(&self.keys, key)
    }

    /// What the slot at `index` is.
    #[inline(always)]
    pub(super) fn info(&self, index: usize) -> SlotInfo {
        let facts = &self.facts[index];
        SlotInfo {
            id: facts.id,
            as_id: facts.as_id,
            base: Gfn::new(self.keys[index]),
            pages: facts.pages.into(),
            hva: facts.hva & !Facts::FLAGS,
            flags: RegionFlags::from_bits_truncate((facts.hva & Facts::FLAGS) as u32),
        }
    }

    /// Where the pointer to the slot at `index` is.
    #[inline(always)]
    pub(super) fn place(&self, index: usize) -> &*mut Slot {
        &self.slots[index]
    }
}

impl Node for Leaf {
    const FANOUT: usize = LEAF;
    type Item = Entry;

    fn empty_like(&self) -> Box<Self> {
        Self::new()
    }

    fn len(&self) -> usize {
        self.len
    }

    fn item(&self, index: usize) -> Self::Item {
        Entry {
            key: self.keys[index],
            facts: self.facts[index],
            slot: self.slots[index],
        }
    }

    fn push(&mut self, entry: Self::Item) {
        self.keys[self.len] = entry.key;
        self.facts[self.len] = entry.facts;
        self.slots[self.len] = entry.slot;
        self.len += 1;
    }

    fn first_key(&self) -> u64 {
        self.keys[0]
    }
}

/// What became of a node.
pub(super) enum Change<N> {
    /// Nothing, or only something below it was replaced.
    None,
    /// It has a successor.
    One(Box<N>),
    /// It was split.
    Two(Box<N>, Box<N>),
    /// Nothing is left of it.
    Gone,
}

/// Copies of `node` with `added` in the place of the `removed` entries at `at`.
///
/// If the new entries are the last ones, the first of two copies stays full, since more such will
/// follow.
pub(super) fn edited<N: Node>(node: &N, at: usize, removed: usize, added: &[N::Item]) -> Change<N> {
    let total = node.len() + added.len() - removed;
    if total == 0 {
        return Change::Gone;
    }
    let appended = at + removed >= node.len();
    let first_len = match total {
        _ if total <= N::FANOUT => total,
        _ if appended => N::FANOUT,
        _ => total / 2,
    };
    let mut first = node.empty_like();
    let mut second = (total > N::FANOUT).then(|| node.empty_like());
    let all = (0..at)
        .map(|index| node.item(index))
        .chain(added.iter().copied())
        .chain((at + removed..node.len()).map(|index| node.item(index)));
    for (number, item) in all.enumerate() {
        match &mut second {
            Some(second) if number >= first_len => second.push(item),
            _ => first.push(item),
        }
    }
    match second {
        Some(second) => Change::Two(first, second),
        None => Change::One(first),
    }
}
