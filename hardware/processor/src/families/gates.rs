//! Interrupts and exceptions: gates, the stacks they change to, faults while one is delivered.

use super::{OTHER, STACK, SUBJECT, accesses, code, levels, put, segment};
use crate::case::{Case, seg};
use crate::layout::{IDT32, IDT64, SEGMENTS, TSS32, TSS64, gate, gdt_entry, selector};

/// The vector of the gate that is tried.
const VECTOR: u8 = 0x31;

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    // Every kind of gate.
    for cpl in 0..4 {
        for kind in accesses() {
            let name = format!("int gate {kind:02x} cpl {cpl}");
            let mut case = Case::protected(name, 32, cpl).with_code(&[0xcd, VECTOR]);
            case.patch64(IDT32 + u32::from(VECTOR) * 8, gate(OTHER, 0x9000, kind, 0));
            put(&mut case, OTHER, code(0x9a));
            if kind & 0x1f == 5 {
                case.leaves = Some("emulation error");
            }
            cases.push(case);
            if cpl % 3 == 0 {
                let name = format!("int gate {kind:02x} in long mode, cpl {cpl}");
                let mut case = Case::long(name, cpl).with_code(&[0xcd, VECTOR]);
                let low = gate(selector::CODE64, 0x1_9000, kind, kind & 1);
                case.patch64(IDT64 + u32::from(VECTOR) * 16, low);
                cases.push(case);
            }
        }
    }
    // Every kind of code behind each kind of gate.
    for (cpl, rpl) in levels() {
        for target in accesses() {
            for kind in [0xe6, 0xef] {
                let name = format!("int gate {kind:02x} to {target:02x} rpl {rpl} cpl {cpl}");
                let mut case = Case::protected(name, 32, cpl).with_code(&[0xcd, VECTOR]);
                let chosen = OTHER | u16::from(rpl);
                case.patch64(IDT32 + u32::from(VECTOR) * 8, gate(chosen, 0x9000, kind, 0));
                put(&mut case, OTHER, code(target));
                cases.push(case);
            }
        }
    }
    cases.extend(stacks());
    cases.extend(double());
    cases.extend(stepping());
    cases
}

/// Stacks of the inner level in the task state segment.
fn stacks() -> Vec<Case> {
    let mut cases = Vec::new();
    for kind in accesses() {
        for rpl in 0..4 {
            for (name, code) in [("int", &[0xcd, VECTOR][..]), ("ud2", &[0x0f, 0x0b])] {
                let name = format!("{name}, stack kind {kind:02x} rpl {rpl}");
                let mut case = Case::protected(name, 32, 3).with_code(code);
                put(&mut case, STACK, segment(SEGMENTS[seg::SS], kind));
                // Level 1, so that the fault itself is delivered on a good stack.
                put(&mut case, OTHER, super::code(0xba));
                let vector = if code[0] == 0xcd { VECTOR } else { 6 };
                case.patch64(
                    IDT32 + u32::from(vector) * 8,
                    gate(OTHER | 1, 0x9000, 0xee, 0),
                );
                case.patches.push((
                    TSS32 + 12,
                    [0x8040, u32::from(STACK | rpl)]
                        .iter()
                        .flat_map(|word| word.to_le_bytes())
                        .collect(),
                ));
                cases.push(case);
            }
        }
    }
    for limit in [0x03, 0x07, 0x09, 0x0a, 0x0b, 0x0d, 0x0f, 0x13, 0x15] {
        for (name, task, kind) in [("32", selector::TSS32, 0x89), ("16", selector::TSS16, 0x81)] {
            let name = format!("tss of {name} bits, limit {limit:x}");
            let mut case = Case::protected(name, 32, 3).with_code(&[0xcd, VECTOR]);
            case.tr = task;
            put(&mut case, OTHER, super::code(0xba));
            case.patch64(
                IDT32 + u32::from(VECTOR) * 8,
                gate(OTHER | 1, 0x9000, 0xee, 0),
            );
            let base = if task == selector::TSS32 {
                TSS32
            } else {
                crate::layout::TSS16
            };
            case.patch64(
                gdt_entry(task),
                crate::layout::descriptor(base, limit, kind, 0),
            );
            cases.push(case);
        }
    }
    // 64-bit: stacks of the table, good and not canonical, and misaligned ones.
    for ist in 0..4u8 {
        for cpl in [0, 3] {
            for pointer in [0xe000u64, 0xdfff, 0x8000_0000_0000, 0xffff_8000_0000_0000] {
                for vector in [VECTOR, 6] {
                    let name = format!("ist {ist} {pointer:x} cpl {cpl} vector {vector:x}");
                    let code: &[u8] = if vector == 6 {
                        &[0x0f, 0x0b]
                    } else {
                        &[0xcd, VECTOR]
                    };
                    let mut case = Case::long(name, cpl).with_code(code);
                    case.patch64(
                        IDT64 + u32::from(vector) * 16,
                        gate(selector::CODE64, 0x1_9000, 0xee, ist),
                    );
                    case.patch64(TSS64 + 0x24 + 16, pointer);
                    // Delivered where there is a stack.
                    for vector in [8, 10, 12, 13, 14u32] {
                        case.patches.push((IDT64 + vector * 16 + 4, vec![1]));
                    }
                    cases.push(case);
                }
            }
        }
    }
    cases
}

/// Exceptions that the delivery of another one raises.
fn double() -> Vec<Case> {
    let mut cases = Vec::new();
    let firsts: [(&str, u8, &[u8]); 8] = [
        ("de", 0, &[0x31, 0xc9, 0xf7, 0xf1]),
        ("br", 5, &[0x62, 0x06]),
        ("ud", 6, &[0x0f, 0x0b]),
        ("np", 11, &[0xb8, 0x00, 0x01, 0, 0, 0x8e, 0xd8]),
        ("ss", 12, &[0x36, 0xa1, 0, 0, 2, 0]),
        ("gp", 13, &[0xb8, 0xf8, 0xff, 0, 0, 0x8e, 0xd8]),
        ("int3", 3, &[0xcc]),
        ("into", 4, &[0xb0, 0x7f, 0x04, 0x01, 0xce]),
    ];
    for (name, vector, code) in firsts {
        for cpl in [0, 3] {
            for (what, chosen, kind) in [
                ("absent gate", selector::CODE32, 0x0e),
                ("gate of no kind", selector::CODE32, 0x8c),
                ("null selector", 0, 0xee),
                ("selector outside", 0xfff8, 0xee),
                ("local selector", 0x14, 0xee),
                ("data", selector::DATA32, 0xee),
                ("absent code", OTHER, 0xee),
                ("beyond the limit", STACK, 0xee),
            ] {
                let name = format!("{name} meets {what}, cpl {cpl}");
                let mut case = Case::protected(name, 32, cpl).with_code(code);
                put(
                    &mut case,
                    SUBJECT,
                    segment(SEGMENTS[seg::DS], 0x12 | cpl << 5),
                );
                put(&mut case, OTHER, super::code(0x1a));
                put(&mut case, STACK, super::code(0x9a));
                case.gpr[6] = 0x8000;
                case.patch64(
                    IDT32 + u32::from(vector) * 8,
                    gate(chosen, 0x9_0000, kind, 0),
                );
                cases.push(case);
            }
        }
    }
    cases
}

/// The trap flag, alone and with what shadows it.
fn stepping() -> Vec<Case> {
    let mut cases = Vec::new();
    let codes: [(&str, &[u8]); 12] = [
        ("nop", &[0x90, 0x90]),
        ("mov ss", &[0x8e, 0xd0, 0x90, 0x90]),
        ("mov ds", &[0x8e, 0xd8, 0x90]),
        ("pop ss", &[0x16, 0x17, 0x90, 0x90]),
        ("pushf", &[0x9c, 0x90]),
        ("popf", &[0x9c, 0x9d, 0x90]),
        ("ud2", &[0x0f, 0x0b]),
        ("int", &[0xcd, 0x31]),
        ("int3", &[0xcc]),
        ("rep stosb", &[0xf3, 0xaa, 0x90]),
        ("jmp", &[0xeb, 0x01, 0x90, 0x90]),
        ("sti", &[0xfb, 0x90, 0x90]),
    ];
    for (name, code) in codes {
        for iopl in [0, 3] {
            let mut case = Case::protected(format!("tf {name} iopl {iopl}"), 32, 3).with_code(code);
            case.flags |= crate::case::flag::TF | iopl << 12;
            case.gpr[0] = case.segments[seg::SS].into();
            case.gpr[1] = 3;
            case.gpr[7] = 0x8000;
            cases.push(case);
            let name = format!("tf {name} v86 iopl {iopl}");
            let mut case = Case::virtual_8086(name, iopl).with_code(code);
            case.flags |= crate::case::flag::TF;
            case.gpr[0] = case.segments[seg::SS].into();
            case.gpr[1] = 3;
            case.gpr[7] = 0x8000;
            cases.push(case);
        }
        let mut case = Case::long(format!("tf {name} in long mode"), 3).with_code(code);
        case.flags |= crate::case::flag::TF;
        case.gpr[0] = case.segments[seg::SS].into();
        case.gpr[1] = 3;
        case.gpr[7] = 0x2_8000;
        cases.push(case);
    }
    cases
}
