//! How large a mapping may be (SPEC 6.5), and leaves of another size.

use crate::format::MmuFormat;
use crate::host::{Host, HostPage};
use crate::mmu::Mmu;
use crate::region::RegionFlags;
use crate::slots::SlotInfo;
use crate::spte;
use twofold_arch::{Gfn, Level, PAGE_SHIFT};
use twofold_table::Height;

/// The sizes above 4K that a leaf may have, largest first.
const HUGE: [Level; 2] = [Level::L1G, Level::L2M];

impl<F: MmuFormat, H: Host> Mmu<F, H> {
    /// Whether a leaf at `level` around `gfn`, a frame of `slot`, may exist at all: the slot holds
    /// all of it, guest and host addresses are congruent, it does not mix shared and private
    /// memory, and no frame's sub-pages are protected. Whatever forbids huge leaves for longer than
    /// one fault is asked here and nowhere else.
    pub(crate) fn may_be_huge(&self, slot: &SlotInfo, gfn: Gfn, level: Level) -> bool {
        let frames = level.frames();
        let first = gfn.align_down(frames);
        first >= slot.base
            && first.get() + frames <= slot.end().get()
            && (slot.hva_of(gfn) >> PAGE_SHIFT) & (frames - 1) == gfn.get() - first.get()
            && (self.config.private_memory.is_none() || self.attributes.is_uniform(gfn, level))
            && !self.guards(slot.as_id, gfn, level)
    }

    /// The largest level at which `gfn` may be mapped now as far as the slot is concerned. A slot
    /// that logs is mapped with 4K pages only.
    pub(crate) fn largest_level(&self, slot: &SlotInfo, gfn: Gfn) -> Level {
        if slot.flags.contains(RegionFlags::LOG_DIRTY) {
            return Level::L4K;
        }
        HUGE.into_iter()
            .find(|level| self.may_be_huge(slot, gfn, *level))
            .unwrap_or(Level::L4K)
    }

    /// The largest level at which `gfn`, which has the host page `page`, may be mapped now.
    pub(crate) fn mapping_level(&self, slot: &SlotInfo, gfn: Gfn, page: &HostPage) -> Level {
        if page.level == Level::L4K || slot.flags.contains(RegionFlags::LOG_DIRTY) {
            return Level::L4K;
        }
        let congruent =
            |level: Level| (page.hpa.get() >> PAGE_SHIFT ^ gfn.get()) & (level.frames() - 1) == 0;
        HUGE.into_iter()
            .find(|&level| {
                level <= page.level && congruent(level) && self.may_be_huge(slot, gfn, level)
            })
            .unwrap_or(Level::L4K)
    }
}

/// The leaf `entry`, above the last level, as a leaf one level smaller (at `level`) of the first
/// part of its page; the others differ in the address alone. Permissions, A, D and the software's
/// bits are inherited; only the execute permission that a 4K leaf may have and a larger one may not
/// is given back with `executable`.
pub(crate) fn smaller_leaf<F: MmuFormat>(entry: u64, level: Level, executable: bool) -> u64 {
    if level != Level::L4K {
        return entry;
    }
    let entry = entry & !F::LARGE;
    match executable {
        true => with_execute::<F>(entry, true),
        false => entry,
    }
}

/// The leaf `entry` at `height` as a leaf of the larger page at `level` that holds its page, or
/// `None` if the two are not congruent: `gfn` is the frame that `entry` maps.
pub(crate) fn larger_leaf<F: MmuFormat>(
    entry: u64,
    height: Height,
    gfn: Gfn,
    level: Level,
    executable: bool,
) -> Option<u64> {
    let address = F::leaf_address(entry, height).get();
    let offset = (gfn.get() & (level.frames() - 1)) << PAGE_SHIFT;
    let first = address.checked_sub(offset)?;
    if first & (level.bytes() - 1) != 0 {
        return None;
    }
    let entry = (entry - offset) | F::LARGE;
    Some(match executable {
        true => entry,
        false => with_execute::<F>(entry, false),
    })
}

/// The leaf `entry` with or without the permission to fetch instructions, also if access
/// tracking keeps its permissions elsewhere.
fn with_execute<F: MmuFormat>(entry: u64, executable: bool) -> u64 {
    let tracked = spte::is_access_tracked::<F>(entry);
    let entry = spte::used::<F>(entry) & !(F::EXECUTE | F::NO_EXECUTE);
    let entry = entry
        | if executable {
            F::EXECUTE
        } else {
            F::NO_EXECUTE
        };
    if tracked {
        spte::unused::<F>(entry)
    } else {
        entry
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{Ept, Npt};
    use crate::spte::{AdBits, Leaf, Writable};
    use twofold_arch::Hpa;
    use twofold_table::{Entry, Format};

    fn leaf(ad: AdBits, accessed: bool, level: Level, page: u64) -> Leaf {
        Leaf {
            hpa: Hpa::new(page << PAGE_SHIFT),
            level,
            writable: Writable::Logged,
            executable: true,
            accessed,
            private: true,
            ad,
        }
    }

    fn sizes_agree<F: MmuFormat>(kinds: &[AdBits]) {
        for &ad in kinds {
            for accessed in [false, true] {
                for (large, small) in [(Level::L2M, Level::L4K), (Level::L1G, Level::L2M)] {
                    let whole = leaf(ad, accessed, large, 0x8_0000).encode::<F>();
                    let part = leaf(ad, accessed, small, 0x8_0000).encode::<F>();
                    assert_eq!(smaller_leaf::<F>(whole, small, false), part);
                    let third = 3 * small.frames();
                    let other = leaf(ad, accessed, small, 0x8_0000 + third).encode::<F>();
                    let larger = |gfn, executable| {
                        larger_leaf::<F>(
                            other,
                            Height::from(small),
                            Gfn::new(gfn),
                            large,
                            executable,
                        )
                    };
                    assert_eq!(larger(0x4_0000 + third, true), Some(whole));
                    assert_eq!(larger(0x4_0000 + third + small.frames(), true), None);
                    let no_execute = larger(third, false).unwrap();
                    assert_eq!(F::decode(no_execute, Height::from(large)), Entry::Leaf);
                    let mut expected = leaf(ad, accessed, large, 0x8_0000);
                    expected.executable = false;
                    assert_eq!(no_execute, expected.encode::<F>());
                    let back = smaller_leaf::<F>(no_execute, small, true);
                    assert_eq!(back == part, small == Level::L4K);
                }
            }
        }
    }

    #[test]
    fn leaves_of_all_sizes_differ_in_address_and_size_alone() {
        sizes_agree::<Ept>(&[AdBits::Hardware, AdBits::Off, AdBits::WriteProtect]);
        sizes_agree::<Npt>(&[AdBits::Hardware, AdBits::WriteProtect]);
        assert_eq!(Ept::MAX_HEIGHT, Npt::MAX_HEIGHT);
    }
}
