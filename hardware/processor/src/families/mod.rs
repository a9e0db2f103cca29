//! Cases about privilege: products of descriptor types, privilege levels and instructions, written
//! by hand where the generator of forms does not get by chance.

mod gates;
mod paging;
mod privileged;
mod segments;
mod transfers;

use crate::case::Case;
use crate::layout::{SEGMENTS, access, descriptor, gdt_entry, selector};

/// All of them.
pub fn cases() -> Vec<Case> {
    [
        segments::cases(),
        transfers::cases(),
        gates::cases(),
        privileged::cases(),
        paging::cases(),
    ]
    .concat()
}

/// Whether Bochs does not come back from some cases of this kind: its processor stops, and with it
/// the image.
pub fn stops_bochs(case: &Case) -> bool {
    case.name.starts_with("long mode, lldt")
}

/// The slot that a family tries things with.
const SUBJECT: u16 = selector::FREE;
/// A second one, for what the first refers to.
const OTHER: u16 = selector::FREE + 8;
/// A third one, for stacks.
const STACK: u16 = selector::FREE + 16;

/// Access bytes of every kind of descriptor: present ones of all 32 types and levels, and those of
/// level 0 that are not present.
fn accesses() -> impl Iterator<Item = u8> {
    (0..128).map(|low| low | access::PRESENT).chain(0..32)
}

/// Levels of a selector and of the code that uses it.
fn levels() -> impl Iterator<Item = (u8, u8)> {
    (0..4).flat_map(|cpl| (0..4).map(move |rpl| (cpl, rpl)))
}

/// A segment of 64 KiB, of which the upper half is left if it expands down.
fn segment(base: u32, kind: u8) -> u64 {
    let expands_down = kind & 0x1c == 0x14;
    let limit = if expands_down { 0x7fff } else { 0xffff };
    descriptor(base, limit, kind, 0)
}

/// What the kinds of descriptors that are gates refer to: 0x9000 in `OTHER`, with parameters; others
/// are segments of 64 KiB at `base`.
fn subject(base: u32, kind: u8) -> u64 {
    let gate = matches!(kind & 0x1f, 4..=7 | 12 | 14 | 15);
    if gate {
        crate::layout::gate(OTHER, 0x9000, kind, 2)
    } else {
        segment(base, kind)
    }
}

/// Puts a descriptor into a slot of the global table.
fn put(case: &mut Case, slot: u16, value: u64) {
    case.patch64(gdt_entry(slot), value);
}

/// A code segment where breakpoints are.
fn code(kind: u8) -> u64 {
    descriptor(SEGMENTS[crate::case::seg::CS], 0xffff, kind, access::BIG)
}
