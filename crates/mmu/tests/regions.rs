//! `set_region` against a plain list of slots that knows the order of KVM's errors (SPEC 6.10).

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use common::{TestHost, World};
use proptest::prelude::*;
use twofold_arch::Gfn;
use twofold_mmu::{Config, Ept, Mmu, Region, RegionErrorKind};

const HVA_END: u64 = 0x7fff_ffff_f000;

#[derive(Clone, Copy, Debug)]
struct Slot {
    as_id: u32,
    id: u32,
    region: Region,
}

#[derive(Default)]
struct Model {
    slots: Vec<Slot>,
}

impl Model {
    fn set(&mut self, region: Region) -> Result<(), RegionErrorKind> {
        use RegionErrorKind::{Exists, Invalid};
        let (id, as_id) = (region.slot & 0xffff, region.slot >> 16);
        let hva_end = u128::from(region.hva) + u128::from(region.size);
        if region.flags & !3 != 0
            || !region.size.is_multiple_of(4096)
            || !region.gpa.is_multiple_of(4096)
            || !region.hva.is_multiple_of(4096)
            || hva_end > u128::from(HVA_END)
            || as_id > 1
            || id > 32763
            || u128::from(region.gpa) + u128::from(region.size) > u128::from(u64::MAX)
            || region.size >> 12 > 0x7fff_ffff
        {
            return Err(Invalid);
        }
        let old = self
            .slots
            .iter()
            .position(|slot| slot.as_id == as_id && slot.id == id);
        if region.size == 0 {
            self.slots.remove(old.ok_or(Invalid)?);
            return Ok(());
        }
        if let Some(old) = old {
            let was = &self.slots[old].region;
            if was.hva != region.hva
                || was.size != region.size
                || (was.flags ^ region.flags) & 2 != 0
            {
                return Err(Invalid);
            }
        }
        let moves = old.is_none_or(|old| self.slots[old].region.gpa != region.gpa);
        if moves {
            let overlap = self.slots.iter().enumerate().any(|(number, slot)| {
                Some(number) != old
                    && slot.as_id == as_id
                    && slot.region.gpa < region.gpa + region.size
                    && region.gpa < slot.region.gpa + slot.region.size
            });
            if overlap {
                return Err(Exists);
            }
            if (region.gpa + region.size) >> 51 != 0 && region.gpa + region.size != 1 << 51 {
                return Err(Invalid);
            }
        }
        let slot = Slot { as_id, id, region };
        match old {
            Some(old) => self.slots[old] = slot,
            None => self.slots.push(slot),
        }
        Ok(())
    }

    fn at(&self, as_id: u32, gfn: u64) -> Option<&Slot> {
        self.slots.iter().find(|slot| {
            slot.as_id == as_id
                && (slot.region.gpa >> 12..(slot.region.gpa + slot.region.size) >> 12)
                    .contains(&gfn)
        })
    }
}

/// Mostly small numbers that collide, sometimes numbers at every limit.
fn regions() -> impl Strategy<Value = Region> {
    let slot = prop_oneof![
        12 => 0u32..6,
        4 => (0u32..6).prop_map(|id| 1 << 16 | id),
        1 => prop::sample::select(vec![32763, 32764, 0xffff, 2 << 16, u32::MAX]),
    ];
    let flags =
        prop_oneof![8 => 0u32..2, 2 => 2u32..4, 1 => prop::sample::select(vec![4, 8, 1 << 31])];
    let gpa = prop_oneof![
        20 => (0u64..24).prop_map(|page| page << 12),
        1 => prop::sample::select(vec![
            1, 0x1fff, 1 << 51, (1 << 51) - 4096, (1 << 51) - 8192, 1 << 40, u64::MAX - 4095,
        ]),
    ];
    let size = prop_oneof![
        16 => (1u64..5).prop_map(|pages| pages << 12),
        6 => Just(0u64),
        1 => prop::sample::select(vec![
            1, 0x1800, 0x7fff_ffff << 12, 0x8000_0000 << 12, u64::MAX - 4095, 1 << 63,
        ]),
    ];
    let hva = prop_oneof![
        20 => (0u64..3).prop_map(|page| (0x1000 + page * 16) << 12),
        1 => prop::sample::select(vec![
            1, 0x7fff_ffff_e000, 0x7fff_ffff_f000, 0x8000_0000_0000, u64::MAX - 4095, 0,
        ]),
    ];
    (slot, flags, gpa, size, hva).prop_map(|(slot, flags, gpa, size, hva)| Region {
        slot,
        flags,
        gpa,
        size,
        hva,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_request_is_answered_as_kvm_answers_it(
        requests in prop::collection::vec(regions(), 1..150),
        zap_all in any::<bool>(),
    ) {
        let config = Config { slot_zap_all: zap_all, hva_end: HVA_END, ..Config::default() };
        let mmu = Mmu::<Ept, _>::new(TestHost(World::new(0)), config);
        let mut reader = mmu.reader();
        let mut model = Model::default();
        let mut generations = mmu.stats().slots_generation;
        for request in requests {
            let before = model.slots.len();
            let expected = model.set(request);
            let answer = mmu.set_region(request);
            prop_assert_eq!(answer.map_err(|error| error.kind()), expected, "{:?}", request);
            let now = mmu.stats().slots_generation;
            let as_id = (request.slot >> 16) as usize;
            if expected.is_ok() {
                prop_assert!(now[as_id] >= generations[as_id]);
                if before != model.slots.len() {
                    prop_assert!(now[as_id] > generations[as_id]);
                }
                prop_assert!(now[0] != now[1]);
            } else {
                prop_assert_eq!(now, generations);
            }
            generations = now;
            for as_id in 0..2u32 {
                for gfn in 0..32 {
                    let expected = model.at(as_id, gfn).map(|slot| slot.id);
                    let found = mmu.slot_at(as_id as u16, Gfn::new(gfn));
                    prop_assert_eq!(found.map(|slot| u32::from(slot.id)), expected);
                    let quick = mmu.lookup(&mut reader, as_id as u16, Gfn::new(gfn).address());
                    prop_assert_eq!(quick, found);
                }
            }
        }
        for slot in &model.slots {
            let info = mmu.slot(slot.as_id as u16, slot.id as u16).unwrap();
            prop_assert_eq!(info.hva, slot.region.hva);
            prop_assert_eq!(info.base, Gfn::new(slot.region.gpa >> 12));
            prop_assert_eq!(info.flags.bits(), slot.region.flags);
        }
    }
}

#[test]
fn all_slots_that_kvm_offers_fit_and_each_is_found() {
    let config = Config {
        slot_zap_all: false,
        ..Config::default()
    };
    let mmu = Mmu::<Ept, _>::new(TestHost(World::new(0)), config);
    for id in 0..32764u64 {
        mmu.set_region(common::region(id as u32, id * 3, 2, 0x10000 + id * 2, 0))
            .unwrap();
    }
    let mut reader = mmu.reader();
    for id in 0..32764u64 {
        let gpa = Gfn::new(id * 3 + 1).address();
        assert_eq!(mmu.lookup(&mut reader, 0, gpa).unwrap().id, id as u16);
        assert_eq!(
            mmu.lookup(&mut reader, 0, Gfn::new(id * 3 + 2).address()),
            None
        );
    }
    let error = mmu
        .set_region(common::region(32764, 1 << 20, 1, 0x10000, 0))
        .unwrap_err();
    assert_eq!(error.kind(), RegionErrorKind::Invalid);
}
