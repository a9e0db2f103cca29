//! What the MMU writes into entries: the one place that knows the software bits (SPEC 4.3) and
//! builds a leaf (SPEC 4.4).
//!
//! | bits | EPT | NPT |
//! |---|---|---|
//! | 11 | present for the MMU | the same |
//! | 9, 10 | D, XU | host-writable, MMU-writable |
//! | 55 | private | private |
//! | 57, 58 | host-writable, MMU-writable | – |
//! | 63 | suppress #VE, in every entry but MMIO | NX in a present entry; set in an empty one |
//!
//! Whether a leaf may be written has three parts (SPEC 4.5): the host allows it, the MMU allows it,
//! and W itself. W without MMU-writable, or MMU-writable without host-writable, never exists. A leaf
//! that is MMU-writable but lacks W was protected for dirty logging; W may be given back with one
//! exchange and without asking the host.

use crate::format::MmuFormat;
use twofold_arch::{Hpa, Level, Pferr};
use twofold_table::x86::MMU_PRESENT;

/// Bit 55: the leaf maps the private half of confidential memory. Ignored by both processors.
pub const PRIVATE: u64 = 1 << 55;

/// Why and how far a leaf is writable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Writable {
    /// The host's page is read-only.
    ReadOnly,
    /// The host would allow writes, the MMU does not.
    Protected,
    /// W is clear until the next write, so that the write is noticed.
    Logged,
    /// The guest may write.
    Yes,
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
}

impl Leaf {
    /// The entry.
    #[inline(always)]
    pub fn encode<F: MmuFormat>(self) -> u64 {
        let mut entry = self.hpa.get() | MMU_PRESENT | F::LEAF;
        if self.accessed {
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
            Writable::Yes => F::HOST_WRITABLE | F::MMU_WRITABLE | F::WRITE | F::DIRTY,
        };
        if self.private {
            entry |= PRIVATE;
        }
        entry
    }
}

/// Whether and why the leaf `entry` is writable, or `None` for a combination that never exists.
pub fn writable<F: MmuFormat>(entry: u64) -> Option<Writable> {
    let has = |bit| entry & bit != 0;
    match (has(F::HOST_WRITABLE), has(F::MMU_WRITABLE), has(F::WRITE)) {
        (false, false, false) => Some(Writable::ReadOnly),
        (true, false, false) => Some(Writable::Protected),
        (true, true, false) => Some(Writable::Logged),
        (true, true, true) => Some(Writable::Yes),
        _ => None,
    }
}

/// Whether the leaf `entry` allows the access that `error` describes.
#[inline]
pub fn allows<F: MmuFormat>(entry: u64, error: Pferr) -> bool {
    if error.is_write() {
        entry & F::WRITE != 0
    } else if error.is_fetch() {
        entry & F::EXECUTE == F::EXECUTE && entry & F::NO_EXECUTE == 0
    } else {
        true
    }
}

/// The leaf `entry` with W given back after it was taken for logging.
#[inline]
pub fn with_write<F: MmuFormat>(entry: u64) -> u64 {
    entry | F::WRITE | F::DIRTY
}

/// The leaf `entry` without W, so that the next write is noticed.
#[inline]
pub fn without_write<F: MmuFormat>(entry: u64) -> u64 {
    entry & !F::WRITE
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{Ept, Npt};
    use twofold_arch::ept::{self, EptCaps, EptEntry, EptFlags, MemoryType};
    use twofold_arch::npt::{self, NptCaps, NptEntry, NptFlags};
    use twofold_table::{Entry, Height};

    fn every_leaf() -> impl Iterator<Item = Leaf> {
        [Level::L4K, Level::L2M, Level::L1G]
            .into_iter()
            .flat_map(|level| {
                (0..4 * 8).map(move |bits| Leaf {
                    hpa: Hpa::new(0x0007_ffff_c000_0000 & !(level.bytes() - 1)),
                    level,
                    writable: [
                        Writable::ReadOnly,
                        Writable::Protected,
                        Writable::Logged,
                        Writable::Yes,
                    ][bits & 3],
                    executable: bits & 4 != 0,
                    accessed: bits & 8 != 0,
                    private: bits & 16 != 0,
                })
            })
    }

    #[test]
    fn an_intel_processor_reads_from_each_leaf_what_was_meant() {
        for leaf in every_leaf() {
            let entry = leaf.encode::<Ept>();
            let EptEntry::Leaf {
                hpa,
                memory_type,
                flags,
            } = ept::decode(entry, leaf.level, EptCaps::full(51))
            else {
                panic!("{leaf:?}");
            };
            assert_eq!(hpa, leaf.hpa);
            assert_eq!(memory_type, MemoryType::WriteBack);
            assert!(flags.contains(EptFlags::READ | EptFlags::SUPPRESS_VE | EptFlags::IGNORE_PAT));
            assert_eq!(
                flags.contains(EptFlags::WRITE),
                leaf.writable == Writable::Yes
            );
            assert_eq!(
                flags.contains(EptFlags::DIRTY),
                leaf.writable == Writable::Yes
            );
            assert_eq!(flags.contains(EptFlags::EXECUTE), leaf.executable);
            assert_eq!(flags.contains(EptFlags::ACCESSED), leaf.accessed);
            assert_eq!(flags.contains(EptFlags::LARGE), leaf.level != Level::L4K);
            assert!(!flags.contains(EptFlags::SUB_PAGE_WRITE));
        }
    }

    #[test]
    fn an_amd_processor_reads_from_each_leaf_what_was_meant() {
        for leaf in every_leaf() {
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

    fn the_engine_and_the_states_agree<F: MmuFormat>() {
        for leaf in every_leaf() {
            let entry = leaf.encode::<F>();
            let height = Height::from(leaf.level);
            assert_eq!(F::decode(entry, height), Entry::Leaf);
            assert_eq!(F::leaf_address(entry, height), leaf.hpa);
            assert_eq!(writable::<F>(entry), Some(leaf.writable));
            assert_eq!(entry & PRIVATE != 0, leaf.private);
            assert!(allows::<F>(entry, Pferr::USER));
            assert_eq!(
                allows::<F>(entry, Pferr::WRITE),
                leaf.writable == Writable::Yes
            );
            assert_eq!(allows::<F>(entry, Pferr::FETCH), leaf.executable);
            if leaf.writable == Writable::Yes {
                let protected = without_write::<F>(entry);
                assert_eq!(writable::<F>(protected), Some(Writable::Logged));
                assert_eq!(with_write::<F>(protected), entry);
            }
        }
    }

    #[test]
    fn the_engine_and_the_writable_states_agree_on_every_leaf() {
        the_engine_and_the_states_agree::<Ept>();
        the_engine_and_the_states_agree::<Npt>();
    }

    fn impossible_states_are_named<F: MmuFormat>() {
        let leaf = F::LEAF | MMU_PRESENT;
        for bits in [F::WRITE, F::MMU_WRITABLE, F::WRITE | F::MMU_WRITABLE] {
            assert_eq!(writable::<F>(leaf | bits), None);
        }
        assert_eq!(writable::<F>(leaf | F::WRITE | F::HOST_WRITABLE), None);
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
    }
}
