//! The walk over tables in a map, against the manual's rules.

use super::*;
use std::collections::BTreeMap;
use std::convert::Infallible;

const P: u64 = PRESENT;
const W: u64 = WRITABLE;
const U: u64 = USER;
const A: u64 = ACCESSED;
const D: u64 = DIRTY;
const PS: u64 = PAGE_SIZE_BIT;
const NX: u64 = NO_EXECUTE;

const READ: LinearAccess = LinearAccess {
    write: false,
    fetch: false,
    user: false,
    smap_suspended: false,
};
const WRITE: LinearAccess = LinearAccess {
    write: true,
    ..READ
};
const FETCH: LinearAccess = LinearAccess {
    fetch: true,
    ..READ
};

fn by_user(access: LinearAccess) -> LinearAccess {
    LinearAccess {
        user: true,
        ..access
    }
}

/// Guest memory that holds only what was put there, as words of 4 bytes.
#[derive(Default)]
struct Fake(BTreeMap<u64, u32>);

impl Fake {
    fn put(&mut self, gpa: u64, entry: u64) {
        self.0.insert(gpa, entry as u32);
        self.0.insert(gpa + 4, (entry >> 32) as u32);
    }

    fn get(&self, gpa: u64) -> u64 {
        let word = |at| u64::from(*self.0.get(&at).unwrap_or(&0));
        word(gpa) | word(gpa + 4) << 32
    }
}

impl GuestTables for Fake {
    type Error = Infallible;

    fn read(&mut self, gpa: u64, bytes: u64) -> Result<Option<u64>, Infallible> {
        let low = self.0.get(&gpa).copied().map(u64::from);
        Ok(low.map(|low| {
            if bytes == 4 {
                low
            } else {
                low | self.get(gpa) & !0xffff_ffff
            }
        }))
    }

    fn set_flags(
        &mut self,
        gpa: u64,
        bytes: u64,
        old: u64,
        flags: u64,
    ) -> Result<bool, Infallible> {
        assert_eq!(self.read(gpa, bytes), Ok(Some(old)));
        self.0.insert(gpa, (old | flags) as u32);
        Ok(true)
    }
}

const LONG_CR4: u64 = cr4::PAE;
const LONG_EFER: u64 = efer::LME | efer::LMA | efer::NXE;

fn long(cr0_extra: u64, cr4_extra: u64) -> Paging {
    Paging::new(
        cr0::PG | cr0::PE | cr0_extra,
        0x1000,
        LONG_CR4 | cr4_extra,
        LONG_EFER,
        46,
    )
}

/// Tables in which linear address 0x40_2010_3000 + x is mapped by one entry a level.
fn tables(entries: [u64; 4]) -> Fake {
    let mut fake = Fake::default();
    for (level, (table, entry)) in [0x4000u64, 0x3000, 0x2000, 0x1000]
        .into_iter()
        .zip(entries)
        .enumerate()
    {
        let index = LINEAR >> (12 + 9 * level) & 511;
        fake.put(table + index * 8, entry);
    }
    fake
}
const LINEAR: u64 = 0x00c0_8060_3abc;

fn four_k(leaf: u64) -> Fake {
    tables([
        leaf,
        0x4000 | P | W | U,
        0x3000 | P | W | U,
        0x2000 | P | W | U,
    ])
}

fn fault(paging: Paging, mut fake: Fake, access: LinearAccess) -> u32 {
    let before = fake.0.clone();
    let error = match paging.walk(&mut fake, LINEAR, access) {
        Err(Failure::PageFault(error)) => error,
        other => panic!("expected a page fault, got {other:?}"),
    };
    assert_eq!(fake.0, before, "a refused access marks nothing");
    error
}

fn gpa(paging: Paging, fake: &mut Fake, linear: u64, access: LinearAccess) -> u64 {
    paging.walk(fake, linear, access).unwrap().gpa
}

#[test]
fn pages_of_all_sizes_are_found() {
    let table = P | W | U;
    let mut fake = four_k(0x1234_5000 | P | U);
    assert_eq!(gpa(long(0, 0), &mut fake, LINEAR, READ), 0x1234_5abc);
    let mut fake = tables([0, 0x1220_0000 | P | PS, 0x3000 | table, 0x2000 | table]);
    let mapping = long(0, 0).walk(&mut fake, LINEAR, READ).unwrap();
    assert_eq!(
        (mapping.gpa, mapping.size),
        (0x1220_0000 | LINEAR & 0x1f_ffff, 2 << 20)
    );
    let mut fake = tables([0, 0, 0x8000_0000 | P | PS, 0x2000 | table]);
    let mapping = long(0, 0).walk(&mut fake, LINEAR, READ).unwrap();
    assert_eq!(
        (mapping.gpa, mapping.size),
        (0x8000_0000 | LINEAR & 0x3fff_ffff, 1 << 30)
    );
}

#[test]
fn five_levels_start_one_level_higher() {
    let mut fake = four_k(0x1234_5000 | P);
    let linear = LINEAR | 5 << 48;
    fake.put(0x9000 + 5 * 8, 0x1000 | P | W | U);
    let paging = Paging::new(cr0::PG, 0x9000, LONG_CR4 | cr4::LA57, LONG_EFER, 46);
    assert_eq!(gpa(paging, &mut fake, linear, READ), 0x1234_5abc);
    assert!(paging.is_canonical(0x00ff_ffff_ffff_ffff));
    assert!(!paging.is_canonical(0x0100_0000_0000_0000));
    assert!(!long(0, 0).is_canonical(0x0000_8000_0000_0000));
    assert!(long(0, 0).is_canonical(0xffff_8000_0000_0000));
}

#[test]
fn pae_has_four_bare_entries_on_top() {
    let mut fake = Fake::default();
    fake.put(0x1020 + 3 * 8, 0x2000 | P);
    fake.put(0x2000 + 2 * 8, 0x3000 | P | W | U);
    fake.put(0x3000 + 8, 0x5_1234_5000 | P | W | U | NX);
    fake.put(0x2000 + 3 * 8, 0x4_0060_0000 | P | PS);
    let paging = Paging::new(cr0::PG, 0x1020, cr4::PAE, efer::NXE, 40);
    assert_eq!(
        gpa(paging, &mut fake, 0xc040_1987, by_user(WRITE)),
        0x5_1234_5987
    );
    assert_eq!(gpa(paging, &mut fake, 0xc07f_ffff, READ), 0x4_007f_ffff);
    assert_eq!(
        paging.walk(&mut fake, 0xc040_1987, FETCH),
        Err(Failure::PageFault(code::PRESENT | code::FETCH))
    );
    assert_eq!(
        fake.get(0x1020 + 3 * 8),
        0x2000 | P,
        "the topmost entry has no flags"
    );
    fake.put(0x1020, 0x2000 | P | W);
    assert_eq!(
        paging.walk(&mut fake, 0, READ),
        Err(Failure::PageFault(code::PRESENT | code::RESERVED))
    );
}

#[test]
fn legacy_paging_has_entries_of_four_bytes() {
    let mut fake = Fake::default();
    fake.0
        .insert(0x1000 + 0x123 * 4, (0x2000 | P | W | U) as u32);
    fake.0
        .insert(0x2000 + 0x45 * 4, (0xabcd_e000 | P | W) as u32);
    fake.0
        .insert(0x1000 + 0x124 * 4, (0x0840_0000 | P | PS | 3 << 13) as u32);
    let paging = Paging::new(cr0::PG, 0x1000, cr4::PSE, 0, 40);
    assert_eq!(gpa(paging, &mut fake, 0x48c4_5678, WRITE), 0xabcd_e678);
    assert_eq!(fake.0[&(0x2000 + 0x45 * 4)] as u64 & (A | D), A | D);
    assert_eq!(gpa(paging, &mut fake, 0x4912_3456, READ), 0x3_0852_3456);
    let narrow = Paging::new(cr0::PG, 0x1000, cr4::PSE, 0, 32);
    assert_eq!(
        narrow.walk(&mut fake, 0x4912_3456, READ),
        Err(Failure::PageFault(code::PRESENT | code::RESERVED))
    );
    let small = Paging::new(cr0::PG, 0x1000, 0, 0, 40);
    assert_eq!(
        small.walk(&mut fake, 0x4912_3456, READ),
        Err(Failure::PageFault(0)),
        "without PSE the entry points to a table"
    );
}

#[test]
fn accessed_is_set_on_the_way_and_dirty_in_the_leaf() {
    let mut fake = four_k(0x1234_5000 | P | W);
    let leaf = 0x4000 + (LINEAR >> 12 & 511) * 8;
    let mapping = long(0, 0).walk(&mut fake, LINEAR, READ).unwrap();
    assert!(!mapping.dirty);
    assert_eq!(fake.get(leaf), 0x1234_5000 | P | W | A);
    for (table, shift) in [(0x3000, 21), (0x2000, 30), (0x1000, 39)] {
        assert_eq!(fake.get(table + (LINEAR >> shift & 511) * 8) & (A | D), A);
    }
    assert!(long(0, 0).walk(&mut fake, LINEAR, WRITE).unwrap().dirty);
    assert_eq!(fake.get(leaf), 0x1234_5000 | P | W | A | D);
}

#[test]
fn error_codes_tell_what_was_tried_and_why_it_failed() {
    let absent = || four_k(0);
    assert_eq!(fault(long(0, 0), absent(), READ), 0);
    assert_eq!(
        fault(long(0, 0), absent(), by_user(WRITE)),
        code::WRITE | code::USER
    );
    assert_eq!(fault(long(0, 0), absent(), FETCH), code::FETCH);
    let no_nx = Paging::new(cr0::PG, 0x1000, LONG_CR4, efer::LMA, 46);
    assert_eq!(
        fault(no_nx, absent(), FETCH),
        0,
        "neither NXE nor SMEP: no fetch bit"
    );
    let smep = Paging::new(cr0::PG, 0x1000, LONG_CR4 | cr4::SMEP, efer::LMA, 46);
    assert_eq!(fault(smep, absent(), FETCH), code::FETCH);
    let reserved = code::PRESENT | code::RESERVED;
    assert_eq!(fault(long(0, 0), four_k(P | 1 << 46), READ), reserved);
    assert_eq!(fault(no_nx, four_k(P | NX), READ), reserved);
    let table = P | W | U;
    let odd = tables([0, P | PS | 1 << 13, 0x3000 | table, 0x2000 | table]);
    assert_eq!(fault(long(0, 0), odd, by_user(READ)), reserved | code::USER);
    let top = tables([0, 0, 0, P | PS]);
    assert_eq!(fault(long(0, 0), top, READ), reserved);
}

/// Every combination of rights and access, against the rules as the manual's prose has them.
#[test]
fn access_rights_follow_the_manual() {
    for bits in 0..1u32 << 10 {
        let on = |bit: u32| bits >> bit & 1 != 0;
        let (page_user, page_writable, page_nx) = (on(0), on(1), on(2));
        let (wp, smep, smap) = (on(3), on(4), on(5));
        let access = LinearAccess {
            write: on(6) && !on(7),
            fetch: on(7),
            user: on(8),
            smap_suspended: on(9) && !on(8),
        };
        let mut cr4 = 0;
        if smep {
            cr4 |= cr4::SMEP;
        }
        if smap {
            cr4 |= cr4::SMAP;
        }
        let paging = long(if wp { cr0::WP } else { 0 }, cr4);
        let leaf = 0x1234_5000
            | P
            | if page_user { U } else { 0 }
            | if page_writable { W } else { 0 }
            | if page_nx { NX } else { 0 };
        let allowed = match (access.user, page_user) {
            (false, false) => {
                if access.fetch {
                    !page_nx
                } else {
                    !access.write || page_writable || !wp
                }
            }
            (false, true) => {
                if access.fetch {
                    !page_nx && !smep
                } else {
                    (!smap || access.smap_suspended) && (!access.write || page_writable || !wp)
                }
            }
            (true, false) => false,
            (true, true) => {
                if access.fetch {
                    !page_nx
                } else {
                    !access.write || page_writable
                }
            }
        };
        let result = paging.walk(&mut four_k(leaf), LINEAR, access);
        assert_eq!(result.is_ok(), allowed, "{bits:#b} {access:?} {result:?}");
    }
}

#[test]
fn an_upper_level_takes_rights_away() {
    let all = P | W | U;
    for weak in 1..4 {
        let mut entries = [0x1234_5000 | all, 0x4000 | all, 0x3000 | all, 0x2000 | all];
        entries[weak] &= !W;
        assert_eq!(
            fault(long(0, 0), tables(entries), by_user(WRITE)),
            code::PRESENT | code::WRITE | code::USER
        );
        entries[weak] = entries[weak] & !U | W;
        assert_eq!(
            fault(long(0, 0), tables(entries), by_user(READ)),
            code::PRESENT | code::USER
        );
        entries[weak] |= U | NX;
        assert_eq!(
            fault(long(0, 0), tables(entries), FETCH),
            code::PRESENT | code::FETCH
        );
    }
}
