//! Which half of a confidential guest's memory an operation is about (SPEC 5.1).
//!
//! Every operation on a range of guest frames says so, and none can mean "neither":
//!
//! | where it comes from | filter |
//! |---|---|
//! | a change of host memory | [`Shared`](RangeFilter::Shared) |
//! | a hole in a guest memory file, or its release | [`Private`](RangeFilter::Private) |
//! | a change of attributes | what [`Conversion`] says |
//! | deletion or move of a slot, the end of the VM | [`Both`](RangeFilter::Both) |

use crate::spte::PRIVATE;
use core::ops::Range;
use twofold_arch::Gfn;

/// The halves whose mappings an operation is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RangeFilter {
    /// Mappings of memory that the hypervisor's program shares with the guest.
    Shared,
    /// Mappings of the guest's own memory.
    Private,
    /// Both.
    Both,
}

impl RangeFilter {
    /// The filter for one half.
    pub const fn of(private: bool) -> Self {
        match private {
            true => Self::Private,
            false => Self::Shared,
        }
    }

    /// Whether mappings of this half are meant.
    #[inline(always)]
    pub const fn covers(self, private: bool) -> bool {
        match self {
            Self::Shared => !private,
            Self::Private => private,
            Self::Both => true,
        }
    }

    /// Whether the leaf `entry` is meant. Where both halves live under one root, a software bit
    /// tells them apart.
    #[inline(always)]
    pub(crate) const fn covers_leaf(self, entry: u64) -> bool {
        self.covers(entry & PRIVATE != 0)
    }
}

/// What a change of attributes takes out of the tables: the VM type's decision.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Conversion {
    /// The half that the memory no longer is. What is private already keeps its content when it
    /// is made private again. (Software-protected VMs, TDX.)
    #[default]
    ZapOpposite,
    /// Nothing: the guest memory file will say what goes. (SEV-SNP.)
    LeaveToFile,
}

impl Conversion {
    /// What to take out of memory that becomes `private`.
    pub const fn filter(self, private: bool) -> Option<RangeFilter> {
        match self {
            Self::ZapOpposite => Some(RangeFilter::of(!private)),
            Self::LeaveToFile => None,
        }
    }
}

/// Guest frames of one address space that are to lose mappings.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct RangeOperation {
    pub(crate) as_id: u16,
    pub(crate) gfns: Range<Gfn>,
    pub(crate) filter: RangeFilter,
    /// Whether the operation may give up the writers' lock in the middle, so that faults that need it and
    /// other changes have their turn.
    pub(crate) may_block: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_conversion_takes_only_the_half_that_the_memory_no_longer_is() {
        for private in [false, true] {
            let filter = Conversion::ZapOpposite.filter(private).unwrap();
            assert!(!filter.covers(private));
            assert!(filter.covers(!private));
            assert_eq!(Conversion::LeaveToFile.filter(private), None);
        }
    }

    #[test]
    fn every_filter_means_something_and_reads_it_from_the_leaf() {
        for filter in [RangeFilter::Shared, RangeFilter::Private, RangeFilter::Both] {
            assert!(filter.covers(false) || filter.covers(true));
            assert_eq!(filter.covers_leaf(0x1234_5000), filter.covers(false));
            assert_eq!(
                filter.covers_leaf(0x1234_5000 | PRIVATE),
                filter.covers(true)
            );
        }
    }
}
