//! The cache of translations from linear addresses to host memory.
//!
//! Direct mapped, 4 KiB pages, one tag for each kind of access. A tag stands for the linear address
//! of a page; the test for a hit compares it with the page of the access's *last* byte while the index
//! comes from the first, so that an access across a page never hits. An entry is only filled with
//! a tag for writing when the dirty flags of both stages are set and no code was decoded from the
//! page: a hit needs nothing else.

use super::{PAGE_MASK, PAGE_SHIFT};

/// Entries of one set.
pub(crate) const ENTRIES: usize = 1024;
const SETS: usize = 4;
/// No page's tag: an empty cache is all zeros, and costs no memory until it is filled.
const NO_PAGE: u64 = 0;

/// The tag that an entry must have for an access of `size` bytes to hit: the address of the last
/// byte of the page that the access ends in, which is never zero.
#[inline(always)]
pub(crate) const fn tag(linear: u64, size: u64) -> u64 {
    linear.wrapping_add(size - 1) | !PAGE_MASK
}

/// Whose translations a set holds. Which pages may be accessed differs, so each has its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum Set {
    /// Accesses with supervisor rights, explicit ones while SMAP is not suspended, and fetches.
    Supervisor = 0,
    /// Accesses and fetches with user rights.
    User = 1,
    /// Explicit supervisor accesses while RFLAGS.AC suspends SMAP.
    SupervisorAc = 2,
    /// None: what is looked up here while alignment is checked is never found, so that every access
    /// with user rights comes to where the check is made.
    Checked = 3,
}

impl Set {
    /// The index of the set's first entry.
    pub(crate) const fn base(self) -> usize {
        self as usize * ENTRIES
    }
}

/// The translation of one linear page.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(32))]
pub(crate) struct Entry {
    /// The page's [`tag`], if data may be read from it.
    pub(crate) read: u64,
    /// The page's tag, if data may be written to it.
    pub(crate) write: u64,
    /// The page's tag, if instructions may be fetched from it.
    pub(crate) execute: u64,
    /// Added to a linear address, wrapping, it gives the address in this process.
    pub(crate) addend: u64,
}

#[expect(unsafe_code)]
// UNSAFETY: the trait is the promise that all zeros is a value.
// SAFETY: the fields are integers.
unsafe impl bytemuck::Zeroable for Entry {}

impl Entry {
    const EMPTY: Self = Self {
        read: NO_PAGE,
        write: NO_PAGE,
        execute: NO_PAGE,
        addend: 0,
    };

    fn holds(&self, tag: u64) -> bool {
        self.read == tag || self.write == tag || self.execute == tag
    }
}

/// A page that may be written but holds code, so that no entry may say so.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct BesideCode {
    set: Set,
    tag: u64,
    addend: u64,
}

/// What a new entry allows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Allowed {
    pub(crate) read: bool,
    pub(crate) write: bool,
    pub(crate) execute: bool,
}

/// All sets of one vCPU.
pub(crate) struct Tlb {
    entries: Box<[Entry; SETS * ENTRIES]>,
    /// Where entries were filled since the last flush, as long as there is room: a flush that
    /// follows soon need not walk the whole cache.
    filled: [u16; Self::REMEMBERED],
    filled_count: usize,
    /// Linear addresses that pages larger than 4 KiB were cached from: invalidating one address of
    /// such a page has to find entries for all of it.
    large: Option<(u64, u64)>,
    /// Pages with code that may be written, by the page's number.
    beside_code: [Option<BesideCode>; Self::BESIDE_CODE],
}

impl Tlb {
    const REMEMBERED: usize = 96;
    const BESIDE_CODE: usize = 8;

    pub(crate) fn new() -> Self {
        let entries = bytemuck::zeroed_box();
        Self {
            entries,
            filled: [0; Self::REMEMBERED],
            filled_count: 0,
            large: None,
            beside_code: [None; Self::BESIDE_CODE],
        }
    }

    fn beside_code_index(linear: u64) -> usize {
        (linear >> PAGE_SHIFT) as usize & (Self::BESIDE_CODE - 1)
    }

    /// Where to write at `linear`, if its page is known to be writable although it holds code. The
    /// store has to be announced.
    pub(super) fn beside_code(&self, set: Set, linear: u64) -> Option<usize> {
        let known = self.beside_code[Self::beside_code_index(linear)]?;
        (known.set == set && known.tag == tag(linear, 1))
            .then(|| linear.wrapping_add(known.addend) as usize)
    }

    /// Remembers a page for [`Tlb::beside_code`].
    pub(super) fn fill_beside_code(&mut self, set: Set, linear: u64, addend: u64) {
        let tag = tag(linear, 1);
        self.beside_code[Self::beside_code_index(linear)] = Some(BesideCode { set, tag, addend });
    }

    /// The entry that may hold the translation of `linear` in the set that starts at `base`.
    #[inline(always)]
    pub(crate) fn entry(&self, base: usize, linear: u64) -> &Entry {
        &self.entries[Self::index(base, linear)]
    }

    #[inline(always)]
    fn index(base: usize, linear: u64) -> usize {
        (base | (linear >> PAGE_SHIFT) as usize & (ENTRIES - 1)) & (SETS * ENTRIES - 1)
    }

    /// Caches a translation. What the entry already allows for the same page in the same place it
    /// goes on allowing. `large` is the size of the guest's page in bytes if it is more than 4 KiB.
    pub(crate) fn fill(
        &mut self,
        set: Set,
        linear: u64,
        addend: u64,
        allowed: Allowed,
        large: Option<u64>,
    ) {
        let new = tag(linear, 1);
        let index = Self::index(set.base(), linear);
        let place = &mut self.beside_code[Self::beside_code_index(linear)];
        if place.is_some_and(|known| known.set == set && known.tag == new) {
            *place = None;
        }
        let entry = &mut self.entries[index];
        if !entry.holds(new) || entry.addend != addend {
            *entry = Entry::EMPTY;
            entry.addend = addend;
        }
        let choose = |allowed, old| if allowed { new } else { old };
        entry.read = choose(allowed.read, entry.read);
        entry.write = choose(allowed.write, entry.write);
        entry.execute = choose(allowed.execute, entry.execute);
        if self.filled_count < Self::REMEMBERED {
            self.filled[self.filled_count] = index as u16;
        }
        self.filled_count = self.filled_count.saturating_add(1);
        if let Some(size) = large {
            let first = linear & !(size - 1);
            let last = first | (size - 1);
            self.large = Some(match self.large {
                Some((low, high)) => (low.min(first), high.max(last)),
                None => (first, last),
            });
        }
    }

    /// Forgets everything.
    pub(crate) fn flush(&mut self) {
        if self.filled_count <= Self::REMEMBERED {
            for &index in &self.filled[..self.filled_count] {
                self.entries[usize::from(index) & (SETS * ENTRIES - 1)] = Entry::EMPTY;
            }
        } else {
            self.entries.fill(Entry::EMPTY);
        }
        self.filled_count = 0;
        self.large = None;
        self.beside_code = [None; Self::BESIDE_CODE];
    }

    /// Forgets the guest page that holds `linear`, of whatever size it is.
    pub(crate) fn flush_page(&mut self, linear: u64) {
        if self
            .large
            .is_some_and(|(low, high)| (low..=high).contains(&linear))
        {
            self.flush();
            return;
        }
        let page = tag(linear, 1);
        self.beside_code[Self::beside_code_index(linear)] = None;
        for base in (0..SETS).map(|set| set * ENTRIES) {
            let entry = &mut self.entries[Self::index(base, linear)];
            if entry.holds(page) {
                *entry = Entry::EMPTY;
            }
        }
    }

    /// Forgets all permissions to write.
    pub(crate) fn drop_writes(&mut self) {
        self.beside_code = [None; Self::BESIDE_CODE];
        if self.filled_count <= Self::REMEMBERED {
            for &index in &self.filled[..self.filled_count] {
                self.entries[usize::from(index) & (SETS * ENTRIES - 1)].write = NO_PAGE;
            }
        } else {
            for entry in self.entries.iter_mut() {
                entry.write = NO_PAGE;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ: Allowed = Allowed {
        read: true,
        write: false,
        execute: false,
    };
    const WRITE: Allowed = Allowed {
        read: true,
        write: true,
        execute: false,
    };

    fn reads(tlb: &Tlb, set: Set, linear: u64, size: u64) -> bool {
        tlb.entry(set.base(), linear).read == tag(linear, size)
    }

    #[test]
    fn an_access_across_a_page_never_hits() {
        let mut tlb = Tlb::new();
        tlb.fill(Set::User, 0x1000, 0, READ, None);
        tlb.fill(Set::User, 0x2000, 0, READ, None);
        assert!(reads(&tlb, Set::User, 0x1ff8, 8));
        assert!(!reads(&tlb, Set::User, 0x1ff9, 8));
        assert!(!reads(&tlb, Set::Supervisor, 0x1ff8, 8));
        tlb.fill(Set::User, PAGE_MASK, 0, READ, None);
        tlb.fill(Set::User, 0, 0, READ, None);
        assert!(!reads(&tlb, Set::User, u64::MAX - 3, 8));
    }

    #[test]
    fn an_empty_cache_has_no_page_not_even_the_last() {
        let tlb = Tlb::new();
        assert!(!reads(&tlb, Set::User, 0, 1));
        assert!(!reads(&tlb, Set::User, u64::MAX, 1));
        assert!(!reads(&tlb, Set::User, u64::MAX - 7, 16));
    }

    #[test]
    fn a_flush_forgets_all_however_many_there_were() {
        for count in [1, Tlb::REMEMBERED, Tlb::REMEMBERED + 1, 3 * ENTRIES] {
            let mut tlb = Tlb::new();
            for i in 0..count as u64 {
                tlb.fill(Set::Supervisor, i << PAGE_SHIFT, 0, WRITE, None);
            }
            tlb.flush();
            assert!(
                tlb.entries
                    .iter()
                    .all(|e| e.read == NO_PAGE && e.write == NO_PAGE)
            );
        }
    }

    #[test]
    fn dropping_writes_keeps_reads() {
        let mut tlb = Tlb::new();
        tlb.fill(Set::Supervisor, 0x5000, 0, WRITE, None);
        tlb.drop_writes();
        assert!(reads(&tlb, Set::Supervisor, 0x5000, 1));
        assert_eq!(tlb.entry(Set::Supervisor.base(), 0x5000).write, NO_PAGE);
    }

    #[test]
    fn one_address_of_a_large_page_takes_the_whole_page_along() {
        let mut tlb = Tlb::new();
        tlb.fill(Set::Supervisor, 0x20_3000, 0, READ, Some(2 << 20));
        tlb.fill(Set::Supervisor, 0x80_0000, 0, READ, None);
        tlb.flush_page(0x3f_f000);
        assert!(!reads(&tlb, Set::Supervisor, 0x20_3000, 1));
        let mut tlb = Tlb::new();
        tlb.fill(Set::Supervisor, 0x80_0000, 0, READ, None);
        tlb.fill(Set::Supervisor, 0x80_1000, 0, READ, None);
        tlb.flush_page(0x80_0fff);
        assert!(!reads(&tlb, Set::Supervisor, 0x80_0000, 1));
        assert!(reads(&tlb, Set::Supervisor, 0x80_1000, 1));
    }

    #[test]
    fn a_page_that_moved_keeps_no_old_permission() {
        let mut tlb = Tlb::new();
        tlb.fill(Set::User, 0x7000, 0x100_0000, WRITE, None);
        tlb.fill(Set::User, 0x7000, 0x200_0000, READ, None);
        let entry = tlb.entry(Set::User.base(), 0x7000);
        assert_eq!(
            (entry.read, entry.write, entry.addend),
            (tag(0x7000, 1), NO_PAGE, 0x200_0000)
        );
    }
}
