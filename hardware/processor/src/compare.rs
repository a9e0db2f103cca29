//! Comparing what two machines made of a case.

use crate::case::Case;
use crate::image::Outcome;
use crate::state::flag;
use iced_x86::{Decoder, DecoderOptions, Formatter, NasmFormatter};
use std::fmt::Write as _;

/// Whether an exception pushes an error code.
fn has_error_code(vector: u32) -> bool {
    matches!(vector, 8 | 10..=14 | 17 | 21)
}

impl Outcome {
    /// Where the flags lie in the frame that the handler found, if its gate is of the handler's
    /// width.
    pub fn flags_offset(&self) -> usize {
        let (word, code) = match self.handler {
            0 => (2, false),
            1 => (4, has_error_code(self.vector)),
            _ => (8, has_error_code(self.vector)),
        };
        word * (2 + usize::from(code))
    }

    /// Without what the architecture leaves undefined.
    pub fn defined(&self, case: &Case) -> Self {
        let mut new = self.clone();
        let completed = matches!(self.vector, 1 | 3);
        // What a repeated instruction that faults has made of the flags is not told either.
        let mask = if completed {
            case.undefined
        } else {
            flag::ARITHMETIC
        };
        if mask == 0 {
            return new;
        }
        new.flags &= !mask;
        let at = self.flags_offset();
        let base = self.gpr[4];
        let wrap = if self.handler == 0 { 0xffff } else { u64::MAX };
        for byte in 0..2 {
            let clear = !((mask >> (8 * byte)) as u8);
            if clear == 0xff {
                continue;
            }
            if let Some(place) = new.frame.get_mut(at + byte) {
                *place &= clear;
            }
            let offset = base.wrapping_add((at + byte) as u64) & wrap;
            let address = self.stack_base.wrapping_add(offset as u32);
            // The frame says it already; here it may look changed on one side only.
            new.changes.retain(|(changed, _)| *changed != address & !3);
        }
        if let (true, Some(register)) = (completed, case.undefined_register)
            && self.frame[at] & flag::ZF as u8 != 0
        {
            new.gpr[register] = 0;
        }
        new
    }
}

/// What differs, in words; `None` if nothing does. `names` are those of the two machines.
pub fn difference(
    case: &Case,
    left: &Outcome,
    right: &Outcome,
    names: [&str; 2],
) -> Option<String> {
    let (left, right) = (left.defined(case), right.defined(case));
    if left == right {
        return None;
    }
    let mut text = String::new();
    let mut differ = |name: &str, left: u64, right: u64| {
        if left != right {
            let _ = writeln!(
                text,
                "      {name}: {} {left:#x}, {} {right:#x}",
                names[0], names[1]
            );
        }
    };
    differ("vector", left.vector.into(), right.vector.into());
    differ("handler", left.handler.into(), right.handler.into());
    for (i, name) in [
        "eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi", "r8", "r9", "r10", "r11", "r12",
        "r13", "r14", "r15",
    ]
    .into_iter()
    .enumerate()
    {
        differ(name, left.gpr[i], right.gpr[i]);
    }
    differ("flags in the handler", left.flags, right.flags);
    for (i, name) in ["cs", "ss", "ds", "es", "fs", "gs", "tr", "ldtr"]
        .into_iter()
        .enumerate()
    {
        differ(name, left.selectors[i].into(), right.selectors[i].into());
    }
    for (name, left, right) in [
        ("cr0", left.cr0, right.cr0),
        ("cr3", left.cr3, right.cr3),
        ("cr4", left.cr4, right.cr4),
        ("efer", left.efer, right.efer),
        ("dr6", left.dr6, right.dr6),
        ("dr7", left.dr7, right.dr7),
        ("base of the stack", left.stack_base, right.stack_base),
    ] {
        differ(name, left.into(), right.into());
    }
    differ("cr2", left.cr2, right.cr2);
    if left.tables != right.tables {
        let _ = writeln!(text, "      tables: {:x?} {:x?}", left.tables, right.tables);
    }
    let words = |frame: &[u8]| {
        frame
            .chunks(2)
            .take(16)
            .map(|word| format!("{:02x}{:02x}", word[1], word[0]))
            .collect::<Vec<_>>()
            .join(" ")
    };
    if left.frame != right.frame {
        let _ = writeln!(
            text,
            "      frame: {} {}\n             {} {}",
            names[0],
            words(&left.frame),
            names[1],
            words(&right.frame)
        );
    }
    if left.changes != right.changes {
        let only = |these: &[(u32, u32)], those: &[(u32, u32)]| {
            these
                .iter()
                .filter(|change| !those.contains(change))
                .take(6)
                .map(|(address, value)| format!("[{address:x}]={value:08x}"))
                .collect::<Vec<_>>()
                .join(" ")
        };
        let _ = writeln!(
            text,
            "      memory: {} {}; {} {}",
            names[0],
            only(&left.changes, &right.changes),
            names[1],
            only(&right.changes, &left.changes)
        );
    }
    Some(text)
}

/// A case in words.
pub fn describe(case: &Case) -> String {
    let mut text = format!("   {}: ", case.name);
    let mut decoder = Decoder::with_ip(case.bitness, &case.code, case.rip, DecoderOptions::NONE);
    while decoder.can_decode() {
        let instruction = decoder.decode();
        let mut one = String::new();
        NasmFormatter::new().format(&instruction, &mut one);
        let _ = write!(text, "{one}; ");
    }
    let _ = write!(text, "[");
    for (i, byte) in case.code.iter().enumerate() {
        let _ = write!(text, "{}{byte:02x}", if i == 0 { "" } else { " " });
    }
    let [es, cs, ss, ds, fs, gs] = case.segments;
    let _ = write!(
        text,
        "]\n      at {cs:x}:{:x}, flags {:x}, cr0 {:x}, cr4 {:x}; es {es:x} ss {ss:x} ds {ds:x} fs {fs:x} gs {gs:x};",
        case.rip, case.flags, case.cr0, case.cr4
    );
    for value in &case.gpr[..8] {
        let _ = write!(text, " {value:x}");
    }
    text
}
