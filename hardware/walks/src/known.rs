//! Differences between a simulator and `twofold-cpu` that are understood, each with the manual's answer.
//!
//! A difference is explained by making ours like theirs in one named respect; what is different
//! even then is a difference that nobody understands.

use crate::processor::Processor;
use std::fmt;
use twofold_arch::ept::{EptFlags, Qualification};
use twofold_arch::npt::NptFlags;
use twofold_arch::{Level, Pferr};
use twofold_walks::{Case, End, Kind, LEVELS, Walked};

/// A difference that is understood.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Known {
    /// `twofold-cpu` has a feature that Bochs' models lack.
    AdvancedInformation,
    /// Neither simulator knows that bit 8 is reserved.
    BitEight,
    /// Bochs does not know that bit 12 of a large EPT page is reserved.
    BitTwelve,
    /// Bochs asks the sub-page permission table about pages that may not be read.
    UnreadableSubPages,
    /// Bochs does not know that every second bit of a vector of permissions is reserved.
    OddBits,
    /// QEMU reports a reserved bit as if the entry were not present.
    ReservedNotPresent,
    /// QEMU marks entries as accessed while it walks.
    AccessedOnTheWay,
}

impl fmt::Display for Known {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AdvancedInformation => {
                "twofold-cpu says in bits 9 to 11 what the guest's tables allow; these models do \
                 not offer that (IA32_VMX_EPT_VPID_CAP bit 22) and leave the bits 0. Both right"
            }
            Self::BitEight => {
                "the simulator ignores bit 8 of a level 4 or 3 entry that points to a table; it \
                 must be zero (APM volume 2, the figures of PML4E and PDPE). twofold-cpu is right"
            }
            Self::BitTwelve => {
                "the simulator ignores bit 12 of an EPT entry that maps a 2M or 1G page; bits 20:12 \
                 and 29:12 are reserved (SDM volume 3C, the formats of EPT PDE and PDPTE). \
                 twofold-cpu is right"
            }
            Self::UnreadableSubPages => {
                "the simulator asks the sub-page permission table about a write to a page that may \
                 be executed but not read; such a write is not eligible (SDM volume 3C, \
                 \"Sub-Page Write Permissions\"; later versions of Bochs know it). twofold-cpu is \
                 right"
            }
            Self::OddBits => {
                "the simulator ignores the odd bits of the permissions of a page's sub-pages; they \
                 are reserved, and one that is set is a misconfiguration (SDM volume 3C, \"Sub-Page \
                 Write Permissions\"). twofold-cpu is right"
            }
            Self::ReservedNotPresent => {
                "the simulator leaves P clear in the error code of a reserved bit, which only a \
                 present entry can have (APM volume 2, \"Page-Fault Error Code\"). twofold-cpu is \
                 right"
            }
            Self::AccessedOnTheWay => {
                "the simulator sets A in the entries it passes before the one that faults; \
                 twofold-cpu sets none then. The manual allows both"
            }
        })
    }
}

/// Compares, and says which known differences it took to make the two equal; `None` if nothing does.
pub(crate) fn explain(processor: &mut Processor, theirs: &Walked) -> Option<Vec<Known>> {
    let case = Case::new(theirs.kind, theirs.number);
    let mut ours = processor.walk(theirs.number, case);
    let mut reasons = Vec::new();
    if ours.end != theirs.end || ours.entries != theirs.entries {
        // The same walk without what the simulators do not look at.
        let (ignored, reason) = match theirs.kind {
            Kind::Npt => (bits_eight(&case), Known::BitEight),
            _ => (bits_twelve(&case), Known::BitTwelve),
        };
        if ignored != [0; 4] {
            let mut without = case;
            for (entry, bit) in without.entries.iter_mut().zip(ignored) {
                *entry &= !bit;
            }
            ours = processor.walk(theirs.number, without);
            for (entry, bit) in ours.entries.iter_mut().zip(ignored) {
                *entry |= bit;
            }
            reasons.push(reason);
        }
    }
    if theirs.kind == Kind::EptWithSubPages && ours.end != theirs.end {
        explain_sub_pages(processor, &case, theirs, &mut ours, &mut reasons);
    }
    match (&mut ours.end, theirs.end) {
        (End::Violation(ours), End::Violation(theirs))
        | (End::Exception(ours), End::Exception(theirs))
            if *ours != theirs =>
        {
            let advanced = Qualification::LINEAR_USER
                | Qualification::LINEAR_WRITABLE
                | Qualification::LINEAR_NO_EXECUTE;
            *ours &= !advanced.bits();
            reasons.push(Known::AdvancedInformation);
        }
        (End::NestedFault(ours), End::NestedFault(theirs))
            if *ours != theirs && theirs & Pferr::RSVD.bits() != 0 =>
        {
            *ours &= !Pferr::PRESENT.bits();
            reasons.push(Known::ReservedNotPresent);
        }
        _ => {}
    }
    if matches!(theirs.end, End::NestedFault(_)) && ours.entries != theirs.entries {
        for (ours, theirs) in ours.entries.iter_mut().zip(theirs.entries) {
            *ours |= theirs & NptFlags::ACCESSED.bits();
        }
        reasons.push(Known::AccessedOnTheWay);
    }
    (ours == *theirs).then_some(reasons)
}

/// Bit 8 where it is set and must not be: in present entries of levels 4 and 3 that point to tables.
fn bits_eight(case: &Case) -> [u64; 4] {
    let mut bits = [0; 4];
    for (step, level) in LEVELS.into_iter().enumerate() {
        let entry = NptFlags::from_bits_truncate(case.entries[step]);
        let table = level == Level::L512G || !entry.contains(NptFlags::LARGE);
        if level >= Level::L1G && table {
            bits[step] = (entry & NptFlags::GLOBAL).bits();
        }
    }
    bits
}

/// What Bochs does otherwise where a page asks the sub-page permission table.
fn explain_sub_pages(
    processor: &mut Processor,
    case: &Case,
    theirs: &Walked,
    ours: &mut Walked,
    reasons: &mut Vec<Known>,
) {
    let mut without = *case;
    let mut readable = [0; 4];
    if let (End::Violation(_), End::Done(_) | End::SubPages(_)) = (ours.end, theirs.end) {
        readable = bits_read(case);
        for (entry, bit) in without.entries.iter_mut().zip(readable) {
            *entry |= bit;
        }
        *ours = processor.walk(theirs.number, without);
        reasons.push(Known::UnreadableSubPages);
    }
    if ours.end == End::SubPages(0) && ours.end != theirs.end {
        const ODD: u64 = 0xaaaa_aaaa_aaaa_aaaa;
        without.sub_pages[3] &= !ODD;
        *ours = processor.walk(theirs.number, without);
        reasons.push(Known::OddBits);
    }
    for (entry, bit) in ours.entries.iter_mut().zip(readable) {
        *entry &= !bit;
    }
}

/// R where it is clear in an entry that is present.
fn bits_read(case: &Case) -> [u64; 4] {
    case.entries.map(|entry| {
        let present = entry & EptFlags::RWX.bits() != 0;
        if present {
            EptFlags::READ.bits() & !entry
        } else {
            0
        }
    })
}

/// Bit 12 where it is set and must not be: in entries that map large pages.
fn bits_twelve(case: &Case) -> [u64; 4] {
    let mut bits = [0; 4];
    for (step, level) in LEVELS.into_iter().enumerate() {
        let large = case.entries[step] & EptFlags::LARGE.bits() != 0;
        if matches!(level, Level::L1G | Level::L2M) && large {
            bits[step] = case.entries[step] & 1 << 12;
        }
    }
    bits
}
