//! Page faults: permissions of one page, by the format of the tables.

use crate::case::{Case, cr0, flag, seg};
use crate::layout::{PAGE_TABLES, SEGMENTS};

/// The page that is tried: the first of the second 2 MiB.
const LINEAR: u32 = 0x20_0000;
/// Where it leads.
const PHYSICAL: u64 = 0x5_8000;

/// CR4 bits.
const SMEP: u32 = 1 << 20;
const SMAP: u32 = 1 << 21;
const PKE: u32 = 1 << 22;

/// What is done with the page.
const ACCESSES: [(&str, &[u8]); 4] = [
    ("read", &[0x8a, 0x07]),
    ("write", &[0x88, 0x07]),
    ("change", &[0x80, 0x07, 0x01]),
    ("fetch", &[0xff, 0xe7]),
];

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for level in [0u8, 3] {
        for (name, code) in ACCESSES {
            for entry in 0..8u64 {
                for high in [0, 1 << 63, 1 << 51, 1 << 62] {
                    for directory in [7u64, 5, 3, 6, 7 | 1 << 63] {
                        for control in [0, SMEP, SMAP, SMEP | SMAP] {
                            for flags in [0, flag::AC] {
                                for protect in [0, cr0::WP] {
                                    if level == 3 && (control != 0 || protect == 0) {
                                        continue;
                                    }
                                    let name = format!(
                                        "page {name} entry {:x} directory {directory:x} cpl {level} \
                                         cr4 {control:x} wp {protect:x} flags {flags:x}",
                                        entry | high
                                    );
                                    let mut case = Case::long(name, level).with_code(code);
                                    case.cr4 |= control;
                                    case.cr0 = case.cr0 & !cr0::WP | protect;
                                    case.flags |= flags;
                                    place(&mut case, entry | high, directory);
                                    cases.push(case);
                                }
                            }
                        }
                    }
                }
            }
        }
    }
    cases.extend(keys());
    cases.extend(narrow());
    cases
}

/// Puts the entries in place, and makes the pages of level 0 those of the supervisor.
fn place(case: &mut Case, entry: u64, directory: u64) {
    let table = PAGE_TABLES + 0x4000;
    case.patch64(PAGE_TABLES + 0x2000 + 8, u64::from(table) | directory);
    case.patch64(table, PHYSICAL | entry);
    if case.segments[seg::CS] & 3 == 0 {
        for base in [SEGMENTS[seg::CS], SEGMENTS[seg::SS]] {
            for page in [base + 0x7000, base + 0x8000] {
                case.patch64(PAGE_TABLES + 0x3000 + (page >> 12) * 8, u64::from(page) | 3);
            }
        }
    }
    case.patches.push((PHYSICAL as u32, vec![0xcc]));
    case.gpr[7] = LINEAR.into();
}

/// Protection keys, in 64-bit mode.
fn keys() -> Vec<Case> {
    let mut cases = Vec::new();
    for level in [0u8, 3] {
        for (name, code) in ACCESSES {
            for rights in 0..4u32 {
                for entry in [3u64, 5, 7] {
                    for protect in [0, cr0::WP] {
                        let name = format!(
                            "key {name} entry {entry:x} rights {rights} cpl {level} wp {protect:x}"
                        );
                        let mut case = Case::long(name, level).with_code(code);
                        case.cr4 |= PKE;
                        case.pkru = rights << 10;
                        case.cr0 = case.cr0 & !cr0::WP | protect;
                        place(&mut case, entry | 5 << 59, 7);
                        cases.push(case);
                    }
                }
            }
        }
    }
    cases
}

/// PAE and 32-bit tables, from 32-bit code in flat segments.
fn narrow() -> Vec<Case> {
    let mut cases = Vec::new();
    for pae in [true, false] {
        for level in [0u8, 3] {
            for (name, code) in ACCESSES {
                for entry in 0..8u64 {
                    for high in [0u64, 1 << 63, 1 << 51, 1 << 52] {
                        for directory in [7u64, 5, 3, 6] {
                            for protect in [0, cr0::WP] {
                                if !pae && high != 0 || level == 3 && protect == 0 {
                                    continue;
                                }
                                let name = format!(
                                    "page {name} pae {pae} entry {:x} directory {directory:x} \
                                     cpl {level} wp {protect:x}",
                                    entry | high
                                );
                                cases.push(narrow_case(
                                    name,
                                    pae,
                                    level,
                                    code,
                                    entry | high,
                                    directory,
                                    protect,
                                ));
                            }
                        }
                    }
                }
            }
        }
    }
    cases
}

fn narrow_case(
    name: String,
    pae: bool,
    level: u8,
    code: &[u8],
    entry: u64,
    directory: u64,
    protect: u32,
) -> Case {
    let mut case = Case::protected(name, 32, level).with_code(code);
    case.windows = crate::case::Windows::Paging;
    case.cr0 |= cr0::PG | protect;
    // From the segments' bases the flat address of the page.
    let table = PAGE_TABLES + 0x4000;
    if pae {
        case.cr4 = 0x20;
        case.efer = 0x800;
        case.cr3 = PAGE_TABLES + 0x7000;
        case.patch64(case.cr3, (u64::from(PAGE_TABLES) + 0x2000) | 1);
        case.patch64(PAGE_TABLES + 0x2000 + 8, u64::from(table) | directory);
        case.patch64(table, PHYSICAL | entry);
    } else {
        case.cr3 = PAGE_TABLES + 0x5000;
        let word = |value: u64| (value as u32).to_le_bytes().to_vec();
        case.patches
            .push((case.cr3, word((u64::from(PAGE_TABLES) + 0x6000) | 7)));
        for page in 0..0x80u32 {
            let user = (0x10..0x70).contains(&page);
            let flags = if user { 7 } else { 3 };
            let place = PAGE_TABLES + 0x6000 + page * 4;
            case.patches
                .push((place, word(u64::from(page) << 12 | flags)));
        }
        // The second 4 MiB.
        case.patches
            .push((case.cr3 + 4, word(u64::from(table) | directory)));
        case.patches.push((table, word(PHYSICAL | entry)));
    }
    let linear = if pae { LINEAR } else { 0x40_0000 };
    case.patches.push((PHYSICAL as u32, vec![0xcc]));
    let all = crate::layout::access::BIG | crate::layout::access::PAGES;
    let kind = crate::layout::access::PRESENT | level << 5;
    for (register, base) in [(seg::DS, 0), (seg::CS, SEGMENTS[seg::CS])] {
        let what = if register == seg::CS {
            crate::layout::access::CODE
        } else {
            crate::layout::access::DATA
        };
        case.set_slot(register, base, 0xf_ffff, kind | what, all);
        case.segments[register] |= u16::from(level);
    }
    let jumps = code[0] == 0xff;
    case.gpr[7] = u64::from(if jumps {
        linear - SEGMENTS[seg::CS]
    } else {
        linear
    });
    case
}
