//! Differences that are not ours to remove, each with a test that tells it from others.
//!
//! The reasons, with the manual's sections, are in `docs/hardware.md`.

use crate::case::{Case, flag};
use crate::image::Outcome;

/// Takes a difference out of both outcomes.
type Undo = fn(&Case, &mut Outcome, &mut Outcome);

/// The kind of a difference that is known, if it is one.
pub fn known(case: &Case, ours: &Outcome, bochs: &Outcome) -> Option<&'static str> {
    let kinds: [(&str, Undo); 12] = [
        ("ADOX in Bochs computes OF wrongly", |case, ours, bochs| {
            if case.name.contains("Adox_") {
                without_flags(ours, 1 << 11);
                without_flags(bochs, 1 << 11);
            }
        }),
        ("Bochs saves RF for a double fault", |_, ours, bochs| {
            if ours.vector == 8 {
                without_flags(ours, flag::RF);
                without_flags(bochs, flag::RF);
            }
        }),
        (
            "Bochs looks at protection keys by the level, not by the page",
            |case, ours, bochs| {
                let supervisor = case.segments[1] & 3 == 0 || case.name.contains(" entry 3 ");
                if case.pkru != 0 && supervisor {
                    *bochs = ours.clone();
                }
            },
        ),
        (
            "Bochs names SS when a stack of the table is not canonical",
            |case, ours, bochs| {
                let stack = u32::from(case.segments[2]) & !3;
                let code = |outcome: &Outcome| u32::from(outcome.frame[0]) & !1;
                if ours.handler == 2 && ours.vector == 12 && code(bochs) == stack {
                    let place = ours.gpr[4] as u32;
                    bochs.frame[0] = ours.frame[0];
                    for outcome in [ours, bochs] {
                        outcome.changes.retain(|change| change.0 != place);
                    }
                }
            },
        ),
        (
            "Bochs does not save RF between the iterations of a repeated instruction",
            |case, ours, bochs| {
                let repeated = case
                    .code
                    .first()
                    .is_some_and(|byte| matches!(byte, 0xf2 | 0xf3));
                if repeated && case.flags & flag::TF != 0 {
                    without_flags(ours, flag::RF);
                    without_flags(bochs, flag::RF);
                }
            },
        ),
        (
            "Bochs stores the first part of what faults later",
            |_, ours, bochs| {
                if matches!(ours.vector, 12..=14) {
                    // What it stored before it found out; the frame is compared as such.
                    bochs
                        .changes
                        .retain(|change| ours.changes.iter().any(|our| our.0 == change.0));
                }
            },
        ),
        (
            "Bochs reads two bytes of the stack for a segment register",
            |case, ours, bochs| {
                if ours.vector == 17 && case.name.contains(" Popd_") {
                    *bochs = ours.clone();
                }
            },
        ),
        (
            "Bochs looks at the stack before the target of a call",
            |case, ours, bochs| {
                let call = case.name.contains(" Call_rel");
                if call && ours.vector == 13 && matches!(bochs.vector, 12 | 17) {
                    *bochs = ours.clone();
                }
            },
        ),
        (
            "another order of an alignment check and another fault of the same instruction",
            |_, ours, bochs| {
                let one = |outcome: &Outcome| outcome.vector == 17;
                let other = |outcome: &Outcome| matches!(outcome.vector, 12..=14);
                if one(ours) && other(bochs) || other(ours) && one(bochs) {
                    *bochs = ours.clone();
                }
            },
        ),
        (
            "Bochs wraps the second part of an operand at 64 KiB",
            |case, ours, bochs| {
                let parts = ["_m1616", "_m1632", "Sgdt_", "Sidt_", "Lgdt_", "Lidt_"];
                if matches!(ours.vector, 12 | 13)
                    && parts.iter().any(|part| case.name.contains(part))
                {
                    *bochs = ours.clone();
                }
            },
        ),
        (
            "Bochs truncates the EIP that IRETD returns to in virtual-8086 mode",
            |case, ours, bochs| {
                if ours.vector == 13 && case.name == "v86 Iretd" {
                    *bochs = ours.clone();
                }
            },
        ),
        (
            "Bochs wants a writable segment for an ARPL that changes nothing",
            |case, ours, bochs| {
                if case.name.contains(" Arpl_") && bochs.vector == 13 {
                    *bochs = ours.clone();
                }
            },
        ),
    ];
    kinds.into_iter().find_map(|(kind, undo)| {
        let (mut left, mut right) = (ours.defined(case), bochs.defined(case));
        undo(case, &mut left, &mut right);
        (left == right).then_some(kind)
    })
}

/// Takes flags out of everything that shows them.
fn without_flags(outcome: &mut Outcome, mask: u64) {
    outcome.flags &= !mask;
    let at = outcome.flags_offset();
    let place = outcome
        .stack_base
        .wrapping_add(outcome.gpr[4] as u32)
        .wrapping_add(at as u32);
    for byte in 0..4 {
        if let Some(value) = outcome.frame.get_mut(at + byte) {
            *value &= !((mask >> (8 * byte)) as u8);
        }
        let word = place.wrapping_add(byte as u32) & !3;
        outcome.changes.retain(|(changed, _)| *changed != word);
    }
}
