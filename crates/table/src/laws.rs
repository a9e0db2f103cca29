//! The laws of [`Format`], checked for every format that the crate has.

use crate::format::{Entry, Format, Height};
use crate::sppt::Sppt;
use crate::stage2::{Stage2K4, Stage2K4Lpa2, Stage2K16, Stage2K16Lpa2, Stage2K64};
use crate::toy::{SHIFT, ToyBreak, ToyDirect};
use crate::x86::{Ept, Npt};
use twofold_arch::{Gpa, Hpa};

fn heights<F: Format>() -> impl Iterator<Item = Height> {
    (1..=F::MAX_HEIGHT.get()).map(Height::new)
}

fn check<F: Format>(pages: &[Hpa]) {
    assert_ne!(F::EMPTY, F::FROZEN);
    for height in heights::<F>() {
        assert_eq!(F::decode(F::EMPTY, height), Entry::Empty);
        assert_eq!(F::decode(F::FROZEN, height), Entry::Frozen);
        assert_eq!(F::child(F::EMPTY, height), None);
        assert_eq!(F::child(F::FROZEN, height), None);
        assert_eq!(F::decode(F::link(None, height), height), Entry::Frozen);
        assert_eq!(F::link_target(F::link(None, height)), (None, height));
        for &page in pages {
            let link = F::link(Some(page), height);
            assert_eq!(F::decode(link, height), Entry::Frozen);
            assert_eq!(F::link_target(link), (Some(page), height));
            if height != Height::LEAF {
                assert_eq!(F::decode(F::table_entry(page), height), Entry::Table(page));
                assert_eq!(F::child(F::table_entry(page), height), Some(page));
                assert_eq!(F::child(link, height), None);
            }
        }
        if let Some(below) = height.below() {
            assert_eq!(F::bytes(height), F::bytes(below) << F::INDEX_BITS);
        }
    }
    assert_eq!(F::bytes(Height::LEAF), 1 << F::GRANULE_SHIFT);
    assert!(F::may_map(Height::LEAF));
    // The indices of all heights, put together again, are the address.
    let gpa = Gpa::new(0x0123_4567_89ab_cdef & (F::bytes(F::MAX_HEIGHT.above()) - 1));
    let rebuilt: u64 = heights::<F>()
        .map(|h| (F::index(gpa, h) as u64) << F::shift(h))
        .sum();
    assert_eq!(rebuilt, gpa.get() & !(F::bytes(Height::LEAF) - 1));
}

#[test]
fn every_format_obeys_the_laws_that_the_engine_relies_on() {
    let x86 = [
        0x1000,
        0x7fff_f000,
        0x000f_ffff_ffff_e000,
        0x0007_0000_0000_0000,
    ]
    .map(Hpa::new);
    check::<Ept>(&x86);
    check::<Npt>(&x86);
    check::<Sppt>(&x86);
    let stage2 = [0x1_0000, 0x7fff_0000, 0x0000_ffff_ffff_0000].map(Hpa::new);
    check::<Stage2K4>(&stage2);
    check::<Stage2K16>(&stage2);
    check::<Stage2K64>(&stage2);
    check::<Stage2K4Lpa2>(&stage2);
    check::<Stage2K16Lpa2>(&stage2);
    let toy = [1u64 << SHIFT, 1023 << SHIFT].map(Hpa::new);
    check::<ToyDirect>(&toy);
    check::<ToyBreak>(&toy);
    // Only LPA2 has blocks in the highest table: 512G.
    assert!(!Ept::may_map(Ept::MAX_HEIGHT) && !Npt::may_map(Npt::MAX_HEIGHT));
    assert!(!Stage2K4::may_map(Stage2K4::MAX_HEIGHT));
    assert!(Stage2K4Lpa2::may_map(Stage2K4Lpa2::MAX_HEIGHT));
}
