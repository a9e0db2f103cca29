//! Differences that are not ours to remove, each with a test that tells it from others.
//!
//! The reasons, with the manual's sections, are in `docs/hardware.md`.

use crate::case::{Case, flag};
use crate::image::Outcome;

/// Takes a difference out of both outcomes.
type Undo = fn(&Case, &mut Outcome, &mut Outcome);

/// The kind of a difference that is known, if it is one.
pub fn known(case: &Case, ours: &Outcome, bochs: &Outcome) -> Option<&'static str> {
    let kinds: [(&str, Undo); 6] = [
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
