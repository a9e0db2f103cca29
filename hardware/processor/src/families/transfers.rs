//! Far jumps, calls and returns, IRET.

use super::{OTHER, STACK, SUBJECT, accesses, code, levels, put, segment, subject};
use crate::case::{Case, flag, seg};
use crate::layout::{SEGMENTS, access, descriptor};

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (cpl, rpl) in levels() {
        for kind in accesses() {
            for (name, opcode) in [("jmp far", 0xea), ("call far", 0x9a)] {
                // Where a gate leads: to inner code, to conforming code, to the same level.
                let is_call_gate = matches!(kind & 0x1f, 4 | 12);
                let targets: &[u8] = if is_call_gate {
                    &[0x9a, 0x9e, 0xba, 0xfa, 0x92, 0x1a]
                } else {
                    &[0x9a]
                };
                for &target in targets {
                    cases.push(forward(name, opcode, kind, target, cpl, rpl));
                }
            }
            for (name, opcode) in [("retf", 0xcb), ("iretd", 0xcf)] {
                let name = format!("{name} kind {kind:02x} cpl {cpl} rpl {rpl}");
                let stack = access::PRESENT | access::DATA | rpl << 5;
                cases.push(back(name, opcode, kind, cpl, rpl, stack, rpl));
            }
        }
    }
    for kind in accesses() {
        for rpl in 0..4 {
            for (name, opcode) in [("retf", 0xcb), ("iretd", 0xcf)] {
                let name = format!("{name} to level 2, stack kind {kind:02x} rpl {rpl}");
                cases.push(back(name, opcode, 0xda, 1, 2, kind, rpl));
            }
        }
    }
    cases.extend(virtual_8086());
    cases.extend(long());
    cases
}

fn forward(name: &str, opcode: u8, kind: u8, target: u8, cpl: u8, rpl: u8) -> Case {
    let name = format!("{name} kind {kind:02x} target {target:02x} cpl {cpl} rpl {rpl}");
    let [low, high] = (SUBJECT | u16::from(rpl)).to_le_bytes();
    let mut case = Case::protected(name, 32, cpl).with_code(&[opcode, 0, 0x90, 0, 0, low, high]);
    put(&mut case, SUBJECT, subject(SEGMENTS[seg::CS], kind));
    put(&mut case, OTHER, code(target));
    if matches!(kind & 0x1f, 1 | 5 | 9) {
        case.leaves = Some("emulation error");
    }
    case
}

/// A frame with the subject as CS and `STACK` as SS.
fn back(name: String, opcode: u8, kind: u8, cpl: u8, rpl: u8, stack: u8, stack_rpl: u8) -> Case {
    let mut case = Case::protected(name, 32, cpl).with_code(&[opcode]);
    put(&mut case, SUBJECT, segment(SEGMENTS[seg::CS], kind));
    put(&mut case, STACK, segment(SEGMENTS[seg::ES], stack));
    let code = u32::from(SUBJECT | u16::from(rpl));
    let stack = u32::from(STACK | u16::from(stack_rpl));
    let frame = if opcode == 0xcf {
        [0x9000, code, 0x3a93, 0x8080, stack]
    } else {
        [0x9000, code, 0x8080, stack, 0]
    };
    push(&mut case, &frame);
    case
}

/// Puts words where the stack pointer is.
fn push(case: &mut Case, words: &[u32]) {
    let place = SEGMENTS[seg::SS] + case.gpr[4] as u32 - 0x40;
    case.gpr[4] -= 0x40;
    let bytes = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    case.patches.push((place, bytes));
}

/// IRETD to virtual-8086 mode and flags of all kinds; IRET and IRETD in it.
fn virtual_8086() -> Vec<Case> {
    let mut cases = Vec::new();
    for bit in 0..32 {
        for cpl in [0, 3] {
            for iopl in [0, 3] {
                let name = format!("iretd flag {bit} cpl {cpl} iopl {iopl}");
                let mut case = Case::protected(name, 32, cpl).with_code(&[0xcf]);
                case.flags |= iopl << 12;
                let code = u32::from(case.segments[seg::CS]);
                let image = 1 << bit;
                let to_virtual = image as u64 == flag::VM && cpl == 0;
                let code = if to_virtual { 0x1000 } else { code };
                push(
                    &mut case,
                    &[
                        0x9000, code, image, 0x8090, 0x4000, 0x3000, 0x2000, 0x5000, 0x6000,
                    ],
                );
                cases.push(case);
                for (name, code) in [
                    ("iret", &[0xcf][..]),
                    ("iretd", &[0x66, 0xcf]),
                    ("popf", &[0x9d]),
                    ("popfd", &[0x66, 0x9d]),
                ] {
                    let name = format!("v86 {name} flag {bit} iopl {iopl}");
                    let mut case = Case::virtual_8086(name, iopl).with_code(code);
                    let frame: &[u32] = match code {
                        [0xcf] => &[0x1000_9000, image],
                        [0x66, 0xcf] => &[0x9000, 0x1000, image],
                        _ => &[image],
                    };
                    push(&mut case, frame);
                    // With single stepping or breakpoints behind it the end is another exception.
                    cases.push(case);
                }
                for (name, bitness) in [("popf", 16), ("popfd", 32)] {
                    let name = format!("{name} flag {bit} cpl {cpl} iopl {iopl}");
                    let mut case = Case::protected(name, bitness, cpl).with_code(&[0x9d]);
                    case.flags |= iopl << 12;
                    push(&mut case, &[image]);
                    cases.push(case);
                }
            }
        }
    }
    cases
}

/// IRETQ and RETF between 64-bit and compatibility code, with every kind of code and stack.
fn long() -> Vec<Case> {
    let mut cases = Vec::new();
    for (cpl, rpl) in [(0, 0), (0, 3), (3, 3), (3, 0)] {
        for kind in accesses() {
            for flags in [0, access::BIG, access::LONG, access::BIG | access::LONG] {
                for (name, opcode) in [("iretq", [0x48, 0xcf]), ("retfq", [0x48, 0xcb])] {
                    let name = format!("{name} kind {kind:02x}/{flags} cpl {cpl} rpl {rpl}");
                    let mut case = Case::long(name, cpl).with_code(&opcode);
                    put(
                        &mut case,
                        SUBJECT,
                        descriptor(0, 0xf_ffff, kind, flags | access::PAGES),
                    );
                    let stack = access::PRESENT | access::DATA | rpl << 5;
                    put(
                        &mut case,
                        STACK,
                        descriptor(0, 0xf_ffff, stack, access::BIG | access::PAGES),
                    );
                    let code = u64::from(SUBJECT | u16::from(rpl));
                    let stack = u64::from(STACK | u16::from(rpl));
                    let frame = if opcode[1] == 0xcf {
                        [0x1_9000, code, 0x3a93, 0x4_8080, stack]
                    } else {
                        [0x1_9000, code, 0x4_8080, stack, 0]
                    };
                    case.gpr[4] -= 0x40;
                    let bytes = frame
                        .iter()
                        .flat_map(|word: &u64| word.to_le_bytes())
                        .collect();
                    case.patches.push((case.gpr[4] as u32, bytes));
                    cases.push(case);
                }
            }
        }
    }
    cases
}
