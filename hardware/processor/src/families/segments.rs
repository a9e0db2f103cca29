//! Loading segment registers and looking at descriptors.

use super::{SUBJECT, accesses, levels, put, segment, subject};
use crate::case::{Case, seg};
use crate::layout::SEGMENTS;

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (cpl, rpl) in levels() {
        for kind in accesses() {
            for (name, code, register) in
                [("ss", [0x8e, 0xd0], seg::SS), ("ds", [0x8e, 0xd8], seg::DS)]
            {
                let name = format!("mov {name} kind {kind:02x} cpl {cpl} rpl {rpl}");
                let mut case = Case::protected(name, 32, cpl).with_code(&code);
                case.gpr[0] = u64::from(SUBJECT | u16::from(rpl));
                put(&mut case, SUBJECT, segment(SEGMENTS[register], kind));
                cases.push(case);
            }
            cases.push(looks(kind, cpl, rpl));
        }
    }
    cases.extend(odd_selectors());
    cases.extend(tables());
    cases
}

/// LAR, LSL, VERR and VERW, each with ZF in a byte register.
fn looks(kind: u8, cpl: u8, rpl: u8) -> Case {
    let name = format!("lar lsl verr verw kind {kind:02x} cpl {cpl} rpl {rpl}");
    let mut case = Case::protected(name, 32, cpl).with_code(&[
        0x0f, 0x02, 0xc6, 0x0f, 0x94, 0xc2, 0x0f, 0x03, 0xce, 0x0f, 0x94, 0xc6, 0x0f, 0x00, 0xe6,
        0x0f, 0x94, 0xc3, 0x0f, 0x00, 0xee, 0x0f, 0x94, 0xc7,
    ]);
    case.gpr[6] = u64::from(SUBJECT | u16::from(rpl));
    put(&mut case, SUBJECT, subject(0x1234_5678, kind));
    case
}

/// Selectors outside tables, null ones, and those of the local table.
fn odd_selectors() -> Vec<Case> {
    let mut cases = Vec::new();
    for cpl in 0..4 {
        for chosen in [0, 1, 2, 3, 4, 7, 0xc, 0xfc, 0x104, 0x800, 0x7f8, 0xffff] {
            for (name, code) in [
                ("mov ss", &[0x8e, 0xd0][..]),
                ("mov ds", &[0x8e, 0xd8]),
                ("mov fs", &[0x8e, 0xe0]),
                ("lar", &[0x0f, 0x02, 0xc8]),
                ("verr", &[0x0f, 0x00, 0xe0]),
                ("lldt", &[0x0f, 0x00, 0xd0]),
                ("ltr", &[0x0f, 0x00, 0xd8]),
            ] {
                for local in [true, false] {
                    let name = format!("{name} {chosen:x} cpl {cpl} ldt {local}");
                    let mut case = Case::protected(name, 32, cpl).with_code(code);
                    case.gpr[0] = chosen;
                    if !local {
                        case.ldt = 0;
                    }
                    let place = crate::layout::LDT + 8;
                    case.patch64(place, segment(SEGMENTS[seg::DS], 0x92 | (cpl << 5)));
                    cases.push(case);
                }
            }
        }
    }
    // The end of the table in the middle of a descriptor.
    for cut in [0, 1, 6, 7] {
        let mut case = Case::protected(format!("table cut {cut}"), 32, 0).with_code(&[0x8e, 0xd8]);
        case.gdt_limit = SUBJECT + cut;
        case.gpr[0] = SUBJECT.into();
        put(&mut case, SUBJECT, segment(SEGMENTS[seg::DS], 0x92));
        cases.push(case);
    }
    cases
}

/// LLDT and LTR of every kind of descriptor.
fn tables() -> Vec<Case> {
    let mut cases = Vec::new();
    for kind in accesses() {
        for (name, code) in [("lldt", [0x0f, 0x00, 0xd0]), ("ltr", [0x0f, 0x00, 0xd8])] {
            for level in [0, 3] {
                let name = format!("{name} kind {kind:02x} rpl {level}");
                let mut case = Case::protected(name.clone(), 32, 0).with_code(&code);
                case.gpr[0] = u64::from(SUBJECT) | level;
                put(&mut case, SUBJECT, segment(0x9000, kind));
                cases.push(case);
                if name.starts_with("ltr") {
                    // Bochs does not come back from some of these in long mode.
                    continue;
                }
                let name = format!("long mode, {name}");
                let mut case = Case::long(name, 0).with_code(&code);
                case.gpr[0] = u64::from(SUBJECT) | level;
                put(&mut case, SUBJECT, segment(0x9000, kind));
                cases.push(case);
            }
        }
    }
    cases
}
