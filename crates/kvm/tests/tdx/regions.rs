//! `KVM_TDX_INIT_MEM_REGION`: what it adds, what it refuses, and how far it came.

use super::*;

/// What `Measurement` says of pages with one byte all over them.
fn measurement(pages: &[(u64, u8, bool)]) -> [u8; DIGEST] {
    let mut measurement = Measurement::new();
    for &(gpa, byte, measured) in pages {
        measurement.add_page(gpa);
        if measured {
            for at in (0..PAGE).step_by(EXTENSION) {
                measurement.extend(gpa + at, &[byte; EXTENSION]);
            }
        }
    }
    measurement.finish()
}

#[test]
fn a_region_moves_on_as_its_pages_are_added() {
    let td = Td::new();
    let source = Memory::new((3 * PAGE) as usize);
    let mut region = Region {
        source: source.address(),
        gpa: DATA,
        pages: 3,
    };
    assert_eq!(td.add(&mut region, 0), Ok(0));
    let end = Region {
        source: source.address() + 3 * PAGE,
        gpa: DATA + 3 * PAGE,
        pages: 0,
    };
    assert_eq!(region, end);
}

#[test]
fn malformed_regions_are_refused_and_stay_what_they_were() {
    let td = Td::new();
    let source = page_of(1);
    let good = Region {
        source: source.address(),
        gpa: DATA,
        pages: 1,
    };
    let bad: [(&str, Region); 9] = [
        ("no page", Region { pages: 0, ..good }),
        (
            "address",
            Region {
                gpa: DATA + 1,
                ..good
            },
        ),
        (
            "source",
            Region {
                source: good.source + 8,
                ..good
            },
        ),
        (
            "wraps",
            Region {
                pages: u64::MAX,
                ..good
            },
        ),
        (
            "wraps in bytes",
            Region {
                pages: 1 << 52,
                ..good
            },
        ),
        (
            "shared",
            Region {
                gpa: DATA | SHARED_BIT,
                ..good
            },
        ),
        (
            "ends in shared",
            Region {
                gpa: SHARED_BIT - PAGE,
                pages: 2,
                ..good
            },
        ),
        (
            "no slot",
            Region {
                gpa: 0x20_0000,
                ..good
            },
        ),
        (
            "beyond every address",
            Region {
                gpa: !(PAGE - 1),
                ..good
            },
        ),
    ];
    for (what, mut region) in bad {
        let before = region;
        assert_eq!(td.add(&mut region, 0), Err(Errno::INVAL), "{what}");
        assert_eq!(region, before, "{what}");
    }
    let mut region = good;
    assert_eq!(td.add(&mut region, 2), Err(Errno::INVAL), "flag");
    assert_eq!(
        command(&td.vcpu, INIT_MEM_REGION, 0, 8),
        Err(Errno::FAULT),
        "pointer"
    );
    assert_eq!(td.add(&mut region, 0), Ok(0), "nothing was added before");
}

#[test]
fn sources_that_point_nowhere_add_nothing() {
    let td = Td::new();
    let add = |source| {
        let mut region = Region {
            source,
            gpa: DATA,
            pages: 1,
        };
        (td.add(&mut region, MEASURE), region.pages)
    };
    assert_eq!(add(0), (Err(Errno::OPNOTSUPP), 1));
    assert_eq!(add(PAGE), (Err(Errno::FAULT), 1));
    assert_eq!(add(1 << 63), (Err(Errno::FAULT), 1));
    let half = Memory::new((2 * PAGE) as usize);
    let hole = half.address() + 2 * PAGE;
    drop(half);
    assert_eq!(add(hole - PAGE), (Err(Errno::FAULT), 1));
    assert_eq!(td.add_page(DATA, &page_of(1)), Ok(0));
}

#[test]
fn memory_that_is_shared_or_has_no_private_half_is_not_added() {
    let td = Td::new();
    let source = page_of(1);
    td.set_private(DATA + PAGE, 1, false);
    assert_eq!(td.add_page(DATA + PAGE, &source), Err(Errno::INVAL));
    let plain = Memory::new(PAGE as usize);
    let region = region(2, 0x40_0000, PAGE, plain.address());
    assert_eq!(td.vm.set(KVM_SET_USER_MEMORY_REGION, region), Ok(0));
    td.set_private(0x40_0000, 1, true);
    assert_eq!(td.add_page(0x40_0000, &source), Err(Errno::INVAL));
}

#[test]
fn a_region_that_ends_too_early_says_how_far_it_came() {
    let td = Td::new();
    let source = Memory::new((4 * PAGE) as usize);
    td.set_private(DATA + 2 * PAGE, 1, false);
    let mut region = Region {
        source: source.address(),
        gpa: DATA,
        pages: 4,
    };
    assert_eq!(td.add(&mut region, MEASURE), Err(Errno::INVAL));
    assert_eq!((region.gpa, region.pages), (DATA + 2 * PAGE, 2));
    td.set_private(DATA + 2 * PAGE, 1, true);
    assert_eq!(td.add(&mut region, MEASURE), Ok(0), "the rest");
    assert_eq!(region.pages, 0);
}

#[test]
fn row_33_memory_that_was_added_is_measured_and_is_added_once() {
    let td = Td::new();
    let (first, second) = (page_of(0x11), page_of(0x22));
    assert_eq!(td.add_page(DATA, &first), Ok(0));
    let mut unmeasured = Region {
        source: second.address(),
        gpa: DATA + PAGE,
        pages: 1,
    };
    assert_eq!(td.add(&mut unmeasured, 0), Ok(0));
    for gpa in [DATA, DATA + PAGE] {
        assert_eq!(td.add_page(gpa, &first), Err(Errno::IO), "added before");
    }
    assert_eq!(td.finalize(), Ok(0));
    assert_eq!(td.add_page(DATA + 2 * PAGE, &first), Err(Errno::INVAL));
    let expected = measurement(&[(DATA, 0x11, true), (DATA + PAGE, 0x22, false)]);
    assert_eq!(td.measurement(), Some(expected));
}

#[test]
fn what_is_taken_away_before_finalize_can_be_added_again() {
    let td = Td::new();
    let source = page_of(1);
    assert_eq!(td.add_page(DATA, &source), Ok(0));
    td.set_private(DATA, 1, false);
    td.set_private(DATA, 1, true);
    assert_eq!(td.add_page(DATA, &source), Ok(0));
    assert_eq!(td.finalize(), Ok(0));
    let twice = measurement(&[(DATA, 1, true), (DATA, 1, true)]);
    assert_eq!(td.measurement(), Some(twice));
}
