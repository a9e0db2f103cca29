use super::*;

const K4: Layout = Layout::new(Granule::K4, false);
const K16: Layout = Layout::new(Granule::K16, false);
const K64: Layout = Layout::new(Granule::K64, false);

fn layouts() -> impl Iterator<Item = Layout> {
    Granule::ALL
        .into_iter()
        .flat_map(|granule| [false, true].map(|lpa2| Layout::new(granule, lpa2)))
}

/// The start level and root size for IPA sizes of 32 to 52 bits, worked out by hand from the
/// table sizes: (granule, lpa2, ipa bits, start level, root pages).
const BY_HAND: &[(Granule, bool, u32, i8, u32)] = &[
    // 4K: a level-2 table covers 1G, level 1 512G, level 0 256T.
    (Granule::K4, false, 32, 2, 4),
    (Granule::K4, false, 33, 2, 8),
    (Granule::K4, false, 34, 2, 16),
    (Granule::K4, false, 35, 1, 1),
    (Granule::K4, false, 39, 1, 1),
    (Granule::K4, false, 40, 1, 2),
    (Granule::K4, false, 42, 1, 8),
    (Granule::K4, false, 43, 1, 16),
    (Granule::K4, false, 44, 0, 1),
    (Granule::K4, false, 48, 0, 1),
    (Granule::K4, true, 48, 0, 1),
    (Granule::K4, true, 49, 0, 2),
    (Granule::K4, true, 52, 0, 16),
    // 16K: level 2 covers 64G, level 1 128T.
    (Granule::K16, false, 32, 2, 1),
    (Granule::K16, false, 36, 2, 1),
    (Granule::K16, false, 37, 2, 2),
    (Granule::K16, false, 40, 2, 16),
    (Granule::K16, false, 41, 1, 1),
    (Granule::K16, false, 47, 1, 1),
    (Granule::K16, false, 48, 1, 2),
    (Granule::K16, true, 51, 1, 16),
    (Granule::K16, true, 52, 0, 1),
    // 64K: level 2 covers 4T.
    (Granule::K64, false, 32, 2, 1),
    (Granule::K64, false, 42, 2, 1),
    (Granule::K64, false, 46, 2, 16),
    (Granule::K64, false, 47, 1, 1),
    (Granule::K64, false, 52, 1, 1),
];

#[test]
fn start_levels_and_roots_are_those_worked_out_by_hand() {
    for &(granule, lpa2, ipa_bits, start_level, root_pages) in BY_HAND {
        let geometry = Geometry::new(Layout::new(granule, lpa2), ipa_bits).unwrap();
        assert_eq!(
            (geometry.start_level, geometry.root_pages),
            (start_level, root_pages),
            "{granule:?} lpa2={lpa2} {ipa_bits} bits"
        );
    }
}

#[test]
fn every_ipa_size_is_covered_exactly_and_with_as_few_levels_as_allowed() {
    for layout in layouts() {
        for ipa_bits in 32..=layout.address_bits() {
            let geometry = Geometry::new(layout, ipa_bits).unwrap();
            let granule = layout.granule;
            let table = granule.level_shift(geometry.start_level - 1);
            let size = u128::from(geometry.root_pages) << table;
            assert!(size >= 1 << ipa_bits, "{geometry:?} is too small");
            assert!(geometry.root_pages.is_power_of_two() && geometry.root_pages <= 16);
            if geometry.root_pages > 1 {
                assert_eq!(size, 1 << ipa_bits, "{geometry:?} is too large");
            }
            // One level less would need more than 16 tables, or be a single level.
            if geometry.levels() > 2 {
                let below = granule.level_shift(geometry.start_level);
                assert!(1u128 << ipa_bits > 16 << below, "{geometry:?}");
            }
            assert!(geometry.levels() >= 2 && geometry.start_level >= 0);
            assert_eq!(geometry.tables_per_page(), geometry.levels() - 1);
        }
    }
}

#[test]
fn ipa_sizes_that_cannot_be_translated_are_refused() {
    for layout in layouts() {
        for bits in [0, 31, 53, 64, u32::MAX] {
            assert_eq!(
                Geometry::new(layout, bits),
                Err(GeometryError::IpaBits(bits))
            );
        }
    }
    for layout in [K4, K16] {
        for bits in 49..=52 {
            assert_eq!(
                Geometry::new(layout, bits),
                Err(GeometryError::NeedsWideAddresses(bits))
            );
        }
    }
}

#[test]
fn vtcr_has_its_fields_where_the_manual_puts_them() {
    for layout in layouts() {
        for ipa_bits in 32..=layout.address_bits() {
            for (range, pa_bits) in PA_RANGES.into_iter().enumerate() {
                for features in 0..4 {
                    let caps = Stage2Caps {
                        pa_bits,
                        vmid16: features & 1 != 0,
                        hardware_access_flag: features & 2 != 0,
                        hardware_dirty: false,
                    };
                    let geometry = Geometry::new(layout, ipa_bits).unwrap();
                    let value = vtcr(geometry, caps);
                    let field = |low: u32, width: u32| value >> low & ((1 << width) - 1);
                    assert_eq!(field(0, 6), u64::from(64 - ipa_bits));
                    let base = if layout.granule == Granule::K4 { 2 } else { 3 };
                    assert_eq!(base - field(6, 2) as i8, geometry.start_level);
                    assert_eq!((field(8, 2), field(10, 2), field(12, 2)), (1, 1, 3));
                    let tg0 = match layout.granule {
                        Granule::K4 => 0,
                        Granule::K64 => 1,
                        Granule::K16 => 2,
                    };
                    assert_eq!(field(14, 2), tg0);
                    let expected = if layout.address_bits() == 48 {
                        range.min(5)
                    } else {
                        range
                    };
                    assert_eq!(field(16, 3), expected as u64);
                    assert_eq!(field(19, 1), u64::from(caps.vmid16));
                    assert_eq!(field(21, 1), u64::from(caps.hardware_access_flag));
                    assert_eq!(field(22, 1), 0);
                    assert_eq!(field(31, 1), 1);
                    assert_eq!(field(32, 1), u64::from(layout.lpa2));
                    assert_eq!(value >> 33, 0);
                }
            }
        }
    }
}

#[test]
fn the_value_for_a_common_machine_is_the_one_that_was_seen_to_work() {
    // 40-bit IPA, 4K pages, start level 1, 40-bit physical addresses.
    let geometry = Geometry::new(K4, 40).unwrap();
    let caps = Stage2Caps::from_id_registers(2, 0);
    assert_eq!(caps.pa_bits, 40);
    assert_eq!(
        vtcr(geometry, caps),
        1 << 31 | 2 << 16 | 3 << 12 | 1 << 10 | 1 << 8 | 1 << 6 | 24
    );
}

#[test]
fn capabilities_come_from_the_id_registers() {
    let caps = Stage2Caps::from_id_registers(6, 0x22);
    assert_eq!((caps.pa_bits, caps.vmid_bits()), (52, 16));
    assert!(caps.hardware_access_flag && caps.hardware_dirty);
    let caps = Stage2Caps::from_id_registers(0xf, 0x01);
    assert_eq!((caps.pa_bits, caps.vmid_bits()), (52, 8));
    assert!(caps.hardware_access_flag && !caps.hardware_dirty);
}

#[test]
fn addresses_survive_every_layout() {
    for layout in layouts() {
        for bit in layout.granule.shift()..layout.address_bits() {
            let hpa = Hpa::new(1 << bit);
            let field = layout.encode_address(hpa);
            assert_eq!(field.count_ones(), 1, "{layout:?} bit {bit}");
            assert_eq!(field & !layout.address_mask(), 0);
            assert_eq!(layout.decode_address(field), hpa);
            assert_eq!(layout.decode_address(!layout.address_mask()), Hpa::new(0));
        }
        for bit in layout.address_bits()..64 {
            assert_eq!(layout.encode_address(Hpa::new(1 << bit)), 0);
        }
    }
    // The places that differ.
    assert_eq!(K64.encode_address(Hpa::new(0x5 << 48)), 0x5 << 12);
    let wide = Layout::new(Granule::K4, true);
    assert_eq!(wide.encode_address(Hpa::new(0x3 << 50)), 0x3 << 8);
    assert_eq!(wide.encode_address(Hpa::new(0x3 << 48)), 0x3 << 48);
}

/// The kind of a descriptor, by the manual's figures.
fn kind_by_the_manual(low: u64, level: i8, layout: Layout) -> &'static str {
    match (low & 3, level) {
        (0 | 2, _) => "invalid",
        (3, 3) => "page",
        (1, 3) => "reserved",
        (3, _) => "table",
        (1, 2) => "block",
        (1, 1) if layout.granule == Granule::K4 => "block",
        (1, 1) if layout.granule == Granule::K16 && layout.lpa2 => "block",
        (1, 0) if layout.granule == Granule::K4 && layout.lpa2 => "block",
        _ => "reserved",
    }
}

#[test]
fn every_combination_of_attributes_decodes_as_the_manual_says_at_every_level() {
    for layout in layouts() {
        for level in 0..=3 {
            for low in 0..1u64 << 11 {
                for high in [0, 1 << 51, 1 << 53, 2 << 53, 0xf << 55, 0xff << 51] {
                    let descriptor = low | high | 0x40_0000_0000;
                    let expected = kind_by_the_manual(low, level, layout);
                    let entry = decode(descriptor, level, layout, 52);
                    let kind = match entry {
                        Stage2Entry::Invalid => "invalid",
                        Stage2Entry::Table { .. } => "table",
                        Stage2Entry::Reserved => "reserved",
                        Stage2Entry::Leaf { .. } if level == 3 => "page",
                        Stage2Entry::Leaf { .. } => "block",
                        Stage2Entry::AddressSize { hpa } => panic!("{hpa} has 52 bits"),
                    };
                    assert_eq!(kind, expected, "{descriptor:#x} at {level} of {layout:?}");
                    if let Stage2Entry::Leaf { hpa, flags } = entry {
                        let mask = (1 << layout.granule.level_shift(level)) - 1;
                        assert_eq!(hpa.get() & mask, 0);
                        assert_eq!(flags.contains(Stage2Flags::READ), low >> 6 & 1 == 1);
                        assert_eq!(flags.contains(Stage2Flags::WRITE), low >> 7 & 1 == 1);
                        assert_eq!(flags.contains(Stage2Flags::ACCESSED), low >> 10 & 1 == 1);
                        if layout.lpa2 {
                            assert!(!flags.intersects(Stage2Flags::SHAREABILITY));
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn leaves_and_tables_decode_to_what_they_were_made_of() {
    let attributes = MemoryType::Normal.bits()
        | Shareability::Inner.bits()
        | Execute::El0.bits()
        | (Stage2Flags::READ | Stage2Flags::ACCESSED).bits();
    for layout in layouts() {
        for level in 0..=3i8 {
            let hpa = Hpa::new(1 << layout.granule.level_shift(level).min(47));
            if layout.may_map(level) {
                let leaf = layout.leaf(hpa, level, attributes);
                assert!(matches!(
                    decode(leaf, level, layout, 52),
                    Stage2Entry::Leaf { hpa: found, flags }
                        if found == hpa && flags.contains(Stage2Flags::READ)
                ));
                assert_eq!(MemoryType::of(leaf), Some(MemoryType::Normal));
                assert_eq!(Execute::of(leaf), Execute::El0);
            }
            if level < 3 {
                let table = layout.table(Hpa::new(0x1234_0000));
                assert_eq!(
                    decode(table, level, layout, 52),
                    Stage2Entry::Table {
                        hpa: Hpa::new(0x1234_0000)
                    }
                );
            }
        }
    }
}

#[test]
fn an_address_beyond_the_machine_is_an_address_size_fault() {
    let leaf = K4.leaf(Hpa::new(1 << 40), 3, 0);
    assert!(matches!(
        decode(leaf, 3, K4, 40),
        Stage2Entry::AddressSize { .. }
    ));
    assert!(matches!(decode(leaf, 3, K4, 42), Stage2Entry::Leaf { .. }));
    let table = K4.table(Hpa::new(1 << 44));
    assert!(matches!(
        decode(table, 1, K4, 44),
        Stage2Entry::AddressSize { .. }
    ));
}

#[test]
fn fields_of_several_bits_have_the_documented_values() {
    assert_eq!(MemoryType::Normal.bits(), 0x3c);
    assert_eq!(MemoryType::Device.bits(), 0x04);
    for kind in [
        MemoryType::Device,
        MemoryType::NormalNonCacheable,
        MemoryType::Normal,
    ] {
        assert_eq!(MemoryType::of(kind.bits()), Some(kind));
        assert_eq!(kind.bits() & !Stage2Flags::MEM_ATTR.bits(), 0);
    }
    for execute in [Execute::All, Execute::El0, Execute::None, Execute::El1] {
        assert_eq!(Execute::of(execute.bits()), execute);
    }
    assert_eq!(Execute::None.bits(), 1 << 54);
    assert_eq!(Shareability::Inner.bits(), 0x300);
    assert_eq!(vttbr(Hpa::new(0x4000_1000), 255), 255 << 48 | 0x4000_1000);
    assert_eq!(
        vttbr(Hpa::new(0x5 << 48 | 0x1_0000), 1),
        1 << 48 | 0x1_0000 | 0x5 << 2
    );
}
