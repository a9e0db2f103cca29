//! What the MMU writes into entries: the one place that knows the software bits (SPEC 4.3) and
//! builds a leaf (SPEC 4.4).
//!
//! | bits | EPT | NPT |
//! |---|---|---|
//! | 11 | present for the MMU | the same |
//! | 9, 10 | D, XU | host-writable, MMU-writable |
//! | 53:52 | [`AdBits`] | the same |
//! | 54, 56 | R and X that access tracking took away | – |
//! | 55 | private | private |
//! | 57, 58 | host-writable, MMU-writable | – |
//! | 61 | writes are judged by the sub-page's permission | – |
//! | 63 | suppress #VE, in every entry but MMIO | NX in a present entry; set in an empty one |
//!
//! Whether a leaf may be written has three parts (SPEC 4.5): the host allows it, the MMU allows it,
//! and W itself. W without MMU-writable, or MMU-writable without host-writable, never exists. A leaf
//! that is MMU-writable but lacks W was protected for dirty logging, or lost its permissions to
//! access tracking; W may be given back with one exchange and without asking the host.
//!
//! The leaf of a frame whose sub-pages are protected ([`sub_pages`](crate::sub_pages)) never has W.
//! Bit 61 stands in its place, and comes and goes as W does: where it is clear a write faults, where
//! it is set the processor asks the sub-page permission table. So what a leaf that lacks both
//! gets back is not in the leaf: the frame's protection decides.

use crate::format::MmuFormat;
use twofold_arch::{Hpa, Level, Pferr};
use twofold_table::x86::MMU_PRESENT;

/// Bit 55: the leaf maps the private half of confidential memory. Ignored by both processors.
pub const PRIVATE: u64 = 1 << 55;

/// The lower of the two bits that hold [`AdBits`].
const AD_SHIFT: u32 = 52;
/// How far R and X move when access tracking takes them away.
const SAVED_SHIFT: u32 = 54;

/// Why and how far a leaf is writable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Writable {
    /// The host's page is read-only.
    ReadOnly,
    /// The host would allow writes, the MMU does not.
    Protected,
    /// W, or what stands in its place, is clear until the next write, so that the write is noticed.
    Logged,
    /// The guest may write.
    Yes,
    /// The guest may write those sub-pages that the frame's access map allows. Only in a leaf of 4K.
    SubPages,
}

impl Writable {
    /// How a frame is writable that may be written at all.
    #[inline(always)]
    pub const fn guarded(guarded: bool) -> Self {
        match guarded {
            true => Self::SubPages,
            false => Self::Yes,
        }
    }

    /// Whether there is a write that the processor carries out without asking anyone.
    #[inline(always)]
    pub const fn allows_any(self) -> bool {
        matches!(self, Self::Yes | Self::SubPages)
    }
}

/// What is known of a page's use from its leaf: bits 53:52.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum AdBits {
    /// The processor sets accessed and dirty bits, and both mean what they say.
    #[default]
    Hardware = 0,
    /// The processor sets none. A page's use is found out by taking every permission away.
    Off = 1,
    /// The processor sets accessed and dirty bits, but writes are noticed by taking W away: what a
    /// processor would log is not a frame of this VM's (the tables of a nested guest).
    WriteProtect = 2,
}

/// Everything that decides a leaf's bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Leaf {
    /// The page, aligned to `level`.
    pub hpa: Hpa,
    /// How large the mapping is.
    pub level: Level,
    /// Whether and why it is writable.
    pub writable: Writable,
    /// Whether instructions may be fetched.
    pub executable: bool,
    /// Whether the access that asks for it counts as one (not if it is only prepared).
    pub accessed: bool,
    /// The private half of confidential memory.
    pub private: bool,
    /// How its use is tracked.
    pub ad: AdBits,
}

impl Leaf {
    /// The entry.
    #[inline(always)]
    pub fn encode<F: MmuFormat>(self) -> u64 {
        let mut entry = self.hpa.get() | MMU_PRESENT | F::LEAF | (self.ad as u64) << AD_SHIFT;
        if self.accessed && self.ad != AdBits::Off {
            entry |= F::ACCESSED;
        }
        entry |= if self.executable {
            F::EXECUTE
        } else {
            F::NO_EXECUTE
        };
        if self.level != Level::L4K {
            entry |= F::LARGE;
        }
        entry |= match self.writable {
            Writable::ReadOnly => 0,
            Writable::Protected => F::HOST_WRITABLE,
            Writable::Logged => F::HOST_WRITABLE | F::MMU_WRITABLE,
            Writable::Yes => F::HOST_WRITABLE | F::MMU_WRITABLE | write_bits::<F>(self.ad, false),
            Writable::SubPages => {
                F::HOST_WRITABLE | F::MMU_WRITABLE | write_bits::<F>(self.ad, true)
            }
        };
        if self.private {
            entry |= PRIVATE;
        }
        if !self.accessed && self.ad == AdBits::Off {
            entry = unused::<F>(entry);
        }
        entry
    }
}

/// W or, in the leaf of a frame that is `guarded`, what stands in its place; and D where it means
/// something.
#[inline(always)]
fn write_bits<F: MmuFormat>(ad: AdBits, guarded: bool) -> u64 {
    let write = match guarded {
        true => F::SUB_PAGE_WRITE,
        false => F::WRITE,
    };
    match ad {
        AdBits::Off => write,
        AdBits::Hardware | AdBits::WriteProtect => write | F::DIRTY,
    }
}

/// Whether the leaf `entry` has the bit that stands in W's place.
#[inline(always)]
pub const fn has_sub_pages<F: MmuFormat>(entry: u64) -> bool {
    entry & F::SUB_PAGE_WRITE != 0
}

/// How the use of the leaf `entry` is tracked.
#[inline(always)]
pub fn ad_bits(entry: u64) -> AdBits {
    match entry >> AD_SHIFT & 3 {
        0 => AdBits::Hardware,
        1 => AdBits::Off,
        _ => AdBits::WriteProtect,
    }
}

/// Whether and why the leaf `entry` is writable, or `None` for a combination that never exists.
pub fn writable<F: MmuFormat>(entry: u64) -> Option<Writable> {
    let has = |bit| entry & bit != 0;
    let write = (has(F::WRITE), has_sub_pages::<F>(entry));
    match (has(F::HOST_WRITABLE), has(F::MMU_WRITABLE), write) {
        (false, false, (false, false)) => Some(Writable::ReadOnly),
        (true, false, (false, false)) => Some(Writable::Protected),
        (true, true, (false, false)) => Some(Writable::Logged),
        (true, true, (true, false)) => Some(Writable::Yes),
        (true, true, (false, true)) => Some(Writable::SubPages),
        _ => None,
    }
}

/// Whether the leaf `entry` allows the access that `error` describes. A write to a frame whose
/// sub-pages are protected: as far as the leaf is concerned.
#[inline]
pub fn allows<F: MmuFormat>(entry: u64, error: Pferr) -> bool {
    if error.is_write() {
        // Access tracking leaves the bit that stands in W's place, which means nothing without R.
        entry & F::WRITE != 0 || has_sub_pages::<F>(entry) && entry & F::READ != 0
    } else if error.is_fetch() {
        entry & F::EXECUTE == F::EXECUTE && entry & F::NO_EXECUTE == 0
    } else {
        entry & F::READ != 0
    }
}

/// The leaf `entry` with W, or what stands in its place if the frame is `guarded`, given back after
/// it was taken away to notice the next write.
#[inline]
pub fn with_write<F: MmuFormat>(entry: u64, guarded: bool) -> u64 {
    entry | write_bits::<F>(ad_bits(entry), guarded)
}

/// The leaf `entry` without W and without what stands in its place, so that the next write is
/// noticed.
#[inline]
pub fn without_write<F: MmuFormat>(entry: u64) -> u64 {
    entry & !(F::WRITE | F::SUB_PAGE_WRITE)
}

/// The leaf `entry`, of 4K, as it has to be for a frame that is `guarded` now, or is not: W gives
/// way to what stands in its place; where that is no longer wanted, the next write fetches W.
#[inline]
pub fn guarded<F: MmuFormat>(entry: u64, guarded: bool) -> u64 {
    match guarded {
        true if entry & F::WRITE != 0 => entry & !F::WRITE | F::SUB_PAGE_WRITE,
        false => entry & !F::SUB_PAGE_WRITE,
        true => entry,
    }
}

/// The leaf `entry` at `level` changed so that the next write to it is noticed: by the processor's
/// log, for which D is cleared (`pml`), or by a fault.
///
/// Processors log a large leaf once, with the page that made it dirty; so those lose W.
#[inline]
pub fn noticing_writes<F: MmuFormat>(entry: u64, level: Level, pml: bool) -> u64 {
    if pml && level == Level::L4K && ad_bits(entry) == AdBits::Hardware {
        entry & !F::DIRTY
    } else {
        without_write::<F>(entry)
    }
}

/// Whether access tracking has taken every permission of the leaf `entry`.
#[inline]
pub fn is_access_tracked<F: MmuFormat>(entry: u64) -> bool {
    F::TRACKED != 0 && ad_bits(entry) == AdBits::Off && entry & F::TRACKED == 0
}

/// Whether the page of the leaf `entry` was used since [`unused`] was written.
#[inline]
pub fn is_young<F: MmuFormat>(entry: u64) -> bool {
    match ad_bits(entry) {
        AdBits::Off => !is_access_tracked::<F>(entry),
        AdBits::Hardware | AdBits::WriteProtect => entry & F::ACCESSED != 0,
    }
}

/// The leaf `entry` as one whose next use is noticed: without A, or without R, W and X, of which R
/// and X are kept elsewhere and W is implied by MMU-writable.
#[inline]
pub fn unused<F: MmuFormat>(entry: u64) -> u64 {
    match ad_bits(entry) {
        AdBits::Off if is_access_tracked::<F>(entry) => entry,
        AdBits::Off => entry & !F::TRACKED | (entry & saved::<F>()) << SAVED_SHIFT,
        AdBits::Hardware | AdBits::WriteProtect => entry & !F::ACCESSED,
    }
}

/// The leaf `entry` with R and X given back after [`unused`] took them.
#[inline]
pub fn used<F: MmuFormat>(entry: u64) -> u64 {
    if is_access_tracked::<F>(entry) {
        let kept = saved::<F>() << SAVED_SHIFT;
        entry & !kept | (entry & kept) >> SAVED_SHIFT
    } else {
        entry
    }
}

/// The permissions that are kept: all that is taken but W.
#[inline(always)]
const fn saved<F: MmuFormat>() -> u64 {
    F::TRACKED & !F::WRITE
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{Ept, Npt};
    use alloc::vec::Vec;
    use twofold_arch::ept::{self, EptCaps, EptEntry, EptFlags, MemoryType};
    use twofold_arch::npt::{self, NptCaps, NptEntry, NptFlags};
    use twofold_table::{Entry, Height};

    const WRITABLE: [Writable; 5] = [
        Writable::ReadOnly,
        Writable::Protected,
        Writable::Logged,
        Writable::Yes,
        Writable::SubPages,
    ];
    const LEVELS: [Level; 3] = [Level::L4K, Level::L2M, Level::L1G];

    /// Every leaf that is built for a format whose processors may have these kinds of A and D bits.
    fn every_leaf<F: MmuFormat>(kinds: &[AdBits]) -> Vec<Leaf> {
        let mut leaves = Vec::new();
        for level in LEVELS {
            for writable in WRITABLE {
                if writable == Writable::SubPages && (level != Level::L4K || F::SUB_PAGE_WRITE == 0)
                {
                    continue;
                }
                for bits in 0..8 {
                    leaves.extend(kinds.iter().map(|&ad| Leaf {
                        hpa: Hpa::new(0x0007_ffff_c000_0000 & !(level.bytes() - 1)),
                        level,
                        writable,
                        executable: bits & 1 != 0,
                        accessed: bits & 2 != 0,
                        private: bits & 4 != 0,
                        ad,
                    }));
                }
            }
        }
        leaves
    }

    const EPT_KINDS: [AdBits; 3] = [AdBits::Hardware, AdBits::Off, AdBits::WriteProtect];
    const NPT_KINDS: [AdBits; 2] = [AdBits::Hardware, AdBits::WriteProtect];

    #[test]
    fn an_intel_processor_reads_from_each_leaf_what_was_meant() {
        for leaf in every_leaf::<Ept>(&EPT_KINDS) {
            let entry = leaf.encode::<Ept>();
            let decoded = ept::decode(entry, leaf.level, EptCaps::full(51));
            if !leaf.accessed && leaf.ad == AdBits::Off {
                assert!(matches!(
                    decoded,
                    EptEntry::NotPresent { flags } if flags.contains(EptFlags::SUPPRESS_VE)
                ));
                continue;
            }
            let EptEntry::Leaf {
                hpa,
                memory_type,
                flags,
            } = decoded
            else {
                panic!("{leaf:?}");
            };
            let has_flags = leaf.ad != AdBits::Off;
            assert_eq!(hpa, leaf.hpa);
            assert_eq!(memory_type, MemoryType::WriteBack);
            assert!(flags.contains(EptFlags::READ | EptFlags::SUPPRESS_VE | EptFlags::IGNORE_PAT));
            assert_eq!(
                flags.contains(EptFlags::WRITE),
                leaf.writable == Writable::Yes
            );
            assert_eq!(
                flags.contains(EptFlags::SUB_PAGE_WRITE),
                leaf.writable == Writable::SubPages
            );
            assert_eq!(
                flags.contains(EptFlags::DIRTY),
                leaf.writable.allows_any() && has_flags
            );
            assert_eq!(flags.contains(EptFlags::EXECUTE), leaf.executable);
            assert_eq!(
                flags.contains(EptFlags::ACCESSED),
                leaf.accessed && has_flags
            );
            assert_eq!(flags.contains(EptFlags::LARGE), leaf.level != Level::L4K);
        }
    }

    #[test]
    fn an_amd_processor_reads_from_each_leaf_what_was_meant() {
        for leaf in every_leaf::<Npt>(&NPT_KINDS) {
            let entry = leaf.encode::<Npt>();
            let NptEntry::Leaf { hpa, flags } = npt::decode(entry, leaf.level, NptCaps::full(51))
            else {
                panic!("{leaf:?}");
            };
            assert_eq!(hpa, leaf.hpa);
            assert!(flags.contains(NptFlags::PRESENT | NptFlags::USER));
            assert_eq!(
                flags.contains(NptFlags::WRITE),
                leaf.writable == Writable::Yes
            );
            assert_eq!(
                flags.contains(NptFlags::DIRTY),
                leaf.writable == Writable::Yes
            );
            assert_eq!(flags.contains(NptFlags::NO_EXECUTE), !leaf.executable);
            assert_eq!(flags.contains(NptFlags::ACCESSED), leaf.accessed);
            assert!(!flags.intersects(NptFlags::WRITE_THROUGH | NptFlags::CACHE_DISABLE));
        }
    }

    fn the_engine_and_the_states_agree<F: MmuFormat>(kinds: &[AdBits]) {
        for leaf in every_leaf::<F>(kinds) {
            let built = leaf.encode::<F>();
            let height = Height::from(leaf.level);
            assert_eq!(F::decode(built, height), Entry::Leaf);
            assert_eq!(F::leaf_address(built, height), leaf.hpa);
            assert_eq!(ad_bits(built), leaf.ad);
            assert_eq!(built & PRIVATE != 0, leaf.private);
            assert_eq!(is_young::<F>(built), leaf.accessed);
            // What an access that only tracking prevents finds.
            let mut entry = used::<F>(built);
            let guards = leaf.writable == Writable::SubPages;
            if leaf.writable.allows_any() {
                entry = with_write::<F>(entry, guards);
            }
            assert_eq!(writable::<F>(entry), Some(leaf.writable));
            assert!(allows::<F>(entry, Pferr::USER));
            assert_eq!(allows::<F>(entry, Pferr::WRITE), leaf.writable.allows_any());
            assert_eq!(allows::<F>(entry, Pferr::FETCH), leaf.executable);
            if leaf.writable.allows_any() {
                let protected = without_write::<F>(entry);
                assert_eq!(writable::<F>(protected), Some(Writable::Logged));
                assert_eq!(with_write::<F>(protected, guards), entry);
            }
        }
    }

    #[test]
    fn the_engine_and_the_writable_states_agree_on_every_leaf() {
        the_engine_and_the_states_agree::<Ept>(&EPT_KINDS);
        the_engine_and_the_states_agree::<Npt>(&NPT_KINDS);
    }

    /// Whatever is done to a leaf, in whatever order, its writable state stays one of the five.
    fn every_change_keeps_a_legal_state<F: MmuFormat>(kinds: &[AdBits]) {
        let mut seen = alloc::collections::BTreeSet::new();
        let mut unvisited: Vec<(u64, Level)> = every_leaf::<F>(kinds)
            .into_iter()
            .map(|leaf| (leaf.encode::<F>(), leaf.level))
            .collect();
        while let Some((entry, level)) = unvisited.pop() {
            if !seen.insert((entry, level.number())) {
                continue;
            }
            let state = writable::<F>(entry);
            assert!(state.is_some(), "{entry:#x}");
            let mut next = Vec::from([unused::<F>(entry), used::<F>(entry)]);
            next.extend([false, true].map(|pml| noticing_writes::<F>(entry, level, pml)));
            if state == Some(Writable::Logged) && !is_access_tracked::<F>(entry) {
                next.push(with_write::<F>(entry, false));
            }
            if level == Level::L4K && F::SUB_PAGE_WRITE != 0 {
                next.extend([false, true].map(|on| guarded::<F>(entry, on)));
                if state == Some(Writable::Logged) && !is_access_tracked::<F>(entry) {
                    next.push(with_write::<F>(entry, true));
                }
            }
            // The processor's part.
            if entry & F::READ != 0 && ad_bits(entry) != AdBits::Off {
                next.push(entry | F::ACCESSED);
                if entry & (F::WRITE | F::SUB_PAGE_WRITE) != 0 {
                    next.push(entry | F::ACCESSED | F::DIRTY);
                }
            }
            for changed in next {
                let height = Height::from(level);
                assert_eq!(F::decode(changed, height), Entry::Leaf);
                assert_eq!(
                    F::leaf_address(changed, height),
                    F::leaf_address(entry, height)
                );
                assert_eq!(ad_bits(changed), ad_bits(entry));
                assert_eq!((changed ^ entry) & PRIVATE, 0);
                unvisited.push((changed, level));
            }
        }
    }

    #[test]
    fn only_the_five_writable_states_ever_appear() {
        every_change_keeps_a_legal_state::<Ept>(&EPT_KINDS);
        every_change_keeps_a_legal_state::<Npt>(&NPT_KINDS);
    }

    #[test]
    fn access_tracking_takes_every_permission_and_gives_back_all_but_write() {
        for leaf in every_leaf::<Ept>(&[AdBits::Off])
            .into_iter()
            .filter(|leaf| leaf.accessed)
        {
            let entry = leaf.encode::<Ept>();
            let tracked = unused::<Ept>(entry);
            assert!(is_access_tracked::<Ept>(tracked) && !is_access_tracked::<Ept>(entry));
            assert!(!is_young::<Ept>(tracked) && is_young::<Ept>(entry));
            assert_eq!(unused::<Ept>(tracked), tracked, "twice is once");
            for access in [Pferr::USER, Pferr::WRITE, Pferr::FETCH] {
                assert!(!allows::<Ept>(tracked, access));
            }
            // Bits 54 and 56: SPEC 4.3.
            assert_eq!(tracked >> 54 & 5, 1 | u64::from(leaf.executable) << 2);
            assert_eq!(used::<Ept>(tracked), entry & !Ept::WRITE);
        }
    }

    #[test]
    fn a_leaf_with_accessed_bits_only_loses_its_bit() {
        for leaf in every_leaf::<Npt>(&NPT_KINDS) {
            let (ept, npt) = (leaf.encode::<Ept>(), leaf.encode::<Npt>());
            assert_eq!(unused::<Ept>(ept), ept & !Ept::ACCESSED);
            assert_eq!(unused::<Npt>(npt), npt & !Npt::ACCESSED);
            assert_eq!((used::<Ept>(ept), used::<Npt>(npt)), (ept, npt));
        }
    }

    #[test]
    fn writes_are_noticed_by_the_log_only_where_it_tells_the_page() {
        let leaf = |level, ad| Leaf {
            hpa: Hpa::new(0x4000_0000),
            level,
            writable: Writable::Yes,
            executable: true,
            accessed: true,
            private: false,
            ad,
        };
        for (level, ad, pml, by_log) in [
            (Level::L4K, AdBits::Hardware, true, true),
            (Level::L4K, AdBits::Hardware, false, false),
            (Level::L2M, AdBits::Hardware, true, false),
            (Level::L4K, AdBits::WriteProtect, true, false),
            (Level::L4K, AdBits::Off, true, false),
        ] {
            let entry = leaf(level, ad).encode::<Ept>();
            let lost = entry ^ noticing_writes::<Ept>(entry, level, pml);
            let expected = if by_log { Ept::DIRTY } else { Ept::WRITE };
            assert_eq!(lost, expected, "{level:?} {ad:?}");
        }
    }

    #[test]
    fn a_frame_that_becomes_guarded_trades_write_for_the_sub_page_bit_and_never_gets_write_back() {
        for leaf in every_leaf::<Ept>(&EPT_KINDS) {
            if leaf.level != Level::L4K {
                continue;
            }
            let entry = leaf.encode::<Ept>();
            let (on, off) = (guarded::<Ept>(entry, true), guarded::<Ept>(entry, false));
            assert_eq!(on & Ept::WRITE, 0);
            assert_eq!(
                guarded::<Ept>(on, false) & (Ept::WRITE | Ept::SUB_PAGE_WRITE),
                0
            );
            assert_eq!(off & Ept::SUB_PAGE_WRITE, 0);
            if writable::<Ept>(entry) == Some(Writable::Yes) {
                assert_eq!(writable::<Ept>(on), Some(Writable::SubPages));
            } else {
                assert_eq!(on, entry);
            }
            if leaf.writable == Writable::SubPages {
                assert_eq!(writable::<Ept>(off), Some(Writable::Logged));
            } else {
                assert_eq!(off, entry);
            }
        }
    }

    #[test]
    fn a_guarded_leaf_is_logged_by_its_dirty_bit_or_loses_the_sub_page_bit() {
        let entry = Leaf {
            hpa: Hpa::new(0x4000_0000),
            level: Level::L4K,
            writable: Writable::SubPages,
            executable: true,
            accessed: true,
            private: false,
            ad: AdBits::Hardware,
        }
        .encode::<Ept>();
        let noticed = |pml| noticing_writes::<Ept>(entry, Level::L4K, pml);
        assert_eq!(noticed(true), entry & !Ept::DIRTY);
        assert_eq!(noticed(false), entry & !Ept::SUB_PAGE_WRITE);
        assert_eq!(with_write::<Ept>(noticed(false), true), entry);
    }

    fn impossible_states_are_named<F: MmuFormat>() {
        let leaf = F::LEAF | MMU_PRESENT;
        for bits in [F::WRITE, F::MMU_WRITABLE, F::WRITE | F::MMU_WRITABLE] {
            assert_eq!(writable::<F>(leaf | bits), None);
        }
        assert_eq!(writable::<F>(leaf | F::WRITE | F::HOST_WRITABLE), None);
        if F::SUB_PAGE_WRITE != 0 {
            let may = F::HOST_WRITABLE | F::MMU_WRITABLE;
            for bits in [0, F::HOST_WRITABLE, F::MMU_WRITABLE, may | F::WRITE] {
                assert_eq!(writable::<F>(leaf | bits | F::SUB_PAGE_WRITE), None);
            }
        }
    }

    #[test]
    fn writable_without_permission_is_no_state() {
        impossible_states_are_named::<Ept>();
        impossible_states_are_named::<Npt>();
    }

    #[test]
    fn software_bits_are_where_the_table_says() {
        assert_eq!((Ept::HOST_WRITABLE, Ept::MMU_WRITABLE), (1 << 57, 1 << 58));
        assert_eq!((Npt::HOST_WRITABLE, Npt::MMU_WRITABLE), (1 << 9, 1 << 10));
        assert_eq!(MMU_PRESENT, 1 << 11);
        assert_eq!(AdBits::Off as u64, 1);
        assert_eq!(AdBits::WriteProtect as u64, 2);
    }
}
