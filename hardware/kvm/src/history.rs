//! What each thing that the program did has changed.
//!
//! A trace is cut where the program says what it does next, and again at each fault of the guest.
//! In each piece the changes are put together by entry: a lock that is taken and released is no
//! change, and a table that goes takes along what is known to be below it, whether the trace lists
//! that or not.

use crate::entry::State;
use crate::event::{Event, error};
use std::collections::BTreeMap;
use std::fmt;

/// An entry: its level, and the first frame that it covers.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Place {
    /// 1 is the last.
    pub level: u8,
    /// The frame.
    pub gfn: u64,
}

impl Place {
    /// The frames that the entry covers.
    pub const fn frames(self) -> u64 {
        frames(self.level)
    }

    /// Whether the other entry is below this one.
    pub const fn covers(self, other: Self) -> bool {
        other.level < self.level && other.gfn & !(self.frames() - 1) == self.gfn
    }
}

/// What became of one entry: the states that it went through, from the one before.
pub type Path = Vec<State>;

/// Why entries changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cause {
    /// A call of the program.
    Call,
    /// A fault.
    Fault {
        /// Where.
        gpa: u64,
        /// Its [error code](error).
        error: u64,
    },
}

/// The changes for one cause.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Step {
    /// Why.
    pub cause: Cause,
    /// What became of each entry.
    pub changes: BTreeMap<Place, Path>,
}

/// One thing that the program did.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Operation {
    /// What, in its words.
    pub what: String,
    /// The call, and then each fault.
    pub steps: Vec<Step>,
    /// What came of it, in its words.
    pub exits: Vec<String>,
}

/// Reads a history.
#[derive(Debug, Default)]
pub struct History {
    operations: Vec<Operation>,
    now: BTreeMap<Place, State>,
}

impl History {
    /// Adds what a line says.
    ///
    /// # Errors
    /// It contradicts what came before.
    pub fn add(&mut self, event: Event) -> Result<(), String> {
        match event {
            Event::Said(text) => self.said(text),
            Event::Fault { gpa, error } => self.begin(Cause::Fault { gpa, error }),
            Event::Changed {
                gfn,
                level,
                old,
                new,
            } => self.changed(Place { level, gfn }, old, new),
            Event::Restored { gpa, old, new } => {
                let place = self
                    .leaf(gpa >> 12)
                    .ok_or_else(|| format!("no leaf is known at {gpa:#x}"))?;
                self.changed(place, old, new)
            }
        }
    }

    /// What has been read.
    pub fn operations(self) -> Vec<Operation> {
        self.operations
    }

    fn said(&mut self, text: String) -> Result<(), String> {
        if let Some(exit) = text.strip_prefix("exit: ") {
            let operation = self.operations.last_mut();
            let operation = operation.ok_or("an exit before anything was done")?;
            operation.exits.push(exit.to_owned());
            return Ok(());
        }
        if !(text.starts_with("call: ") || text.starts_with("guest: ")) {
            return Err(format!("unexpected: {text}"));
        }
        if text.starts_with("call: make a VM") {
            self.now.clear();
        }
        let ending = text.starts_with("call: end the VM");
        self.operations.push(Operation {
            what: text,
            steps: Vec::new(),
            exits: Vec::new(),
        });
        self.begin(Cause::Call)?;
        // Whatever is left goes with the VM, whether the trace lists that or not.
        if ending {
            let left: Vec<_> = self
                .now
                .iter()
                .map(|(place, state)| (*place, *state))
                .collect();
            for (place, state) in left.into_iter().filter(|(_, state)| state.is_something()) {
                self.note(place, state, State::Empty)?;
            }
        }
        Ok(())
    }

    fn begin(&mut self, cause: Cause) -> Result<(), String> {
        let operation = self.operations.last_mut();
        let operation = operation.ok_or("something happened before anything was done")?;
        operation.steps.push(Step {
            cause,
            changes: BTreeMap::new(),
        });
        Ok(())
    }

    fn leaf(&self, gfn: u64) -> Option<Place> {
        (1..=3)
            .map(|level| Place {
                level,
                gfn: gfn & !(frames(level) - 1),
            })
            .find(|place| matches!(self.now.get(place), Some(State::Leaf(_))))
    }

    fn changed(&mut self, place: Place, old: u64, new: u64) -> Result<(), String> {
        let (old, new) = (State::of(old, place.level), State::of(new, place.level));
        let before = self.now.get(&place).copied().unwrap_or(State::Empty);
        if !old.is_something() && new == State::Frozen {
            return Ok(());
        }
        // It went with a table above it, and that was told first.
        if before == State::Empty && new == State::Frozen {
            return Ok(());
        }
        self.note(place, old, new)?;
        match (old, new) {
            (State::Table(_), State::Table(_)) => Ok(()),
            (State::Table(_), _) => self.forget_below(place),
            (State::Leaf(_), State::Table(_)) => {
                self.split(place, old);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// A table came in the place of a leaf: it is full of parts of it.
    fn split(&mut self, leaf: Place, state: State) {
        let level = leaf.level - 1;
        let part = state.part(level);
        for number in 0..512 {
            let gfn = leaf.gfn + number * frames(level);
            self.now.insert(Place { level, gfn }, part);
        }
    }

    /// Everything below a table goes with it.
    fn forget_below(&mut self, table: Place) -> Result<(), String> {
        let below: Vec<_> = self
            .now
            .iter()
            .filter(|(place, state)| table.covers(**place) && state.is_something())
            .map(|(place, state)| (*place, *state))
            .collect();
        for (place, state) in below {
            self.note(place, state, State::Empty)?;
        }
        Ok(())
    }

    fn note(&mut self, place: Place, old: State, new: State) -> Result<(), String> {
        let visible = if new == State::Frozen {
            State::Empty
        } else {
            new
        };
        self.now.insert(place, visible);
        let step = self
            .operations
            .last_mut()
            .and_then(|operation| operation.steps.last_mut())
            .ok_or("an entry changed before anything was done")?;
        let old = old.without_use();
        let path = step.changes.entry(place).or_insert_with(|| vec![old]);
        // A lock is no state, and what was locked before this step is empty.
        if path == &[State::Frozen] {
            *path = vec![State::Empty];
        }
        if path.last() != Some(&visible) {
            path.push(visible);
        }
        if path.len() == 1 {
            step.changes.remove(&place);
        }
        Ok(())
    }
}

/// The frames that an entry at a level covers.
const fn frames(level: u8) -> u64 {
    1 << (9 * (level as u32 - 1))
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.what)?;
        for step in &self.steps {
            match step.cause {
                Cause::Call if step.changes.is_empty() => {}
                Cause::Call => writeln!(f, "    at once")?,
                Cause::Fault { gpa, error } => {
                    write!(f, "    fault at {gpa:#x}:")?;
                    for (bit, name) in [
                        (error::PRESENT, "present"),
                        (error::WRITE, "write"),
                        (error::USER, "user"),
                        (error::RESERVED, "reserved"),
                        (error::FETCH, "fetch"),
                        (error::FINAL, "final"),
                        (error::TABLE, "table"),
                    ] {
                        if error & bit != 0 {
                            write!(f, " {name}")?;
                        }
                    }
                    writeln!(f)?;
                }
            }
            const SHOWN: usize = 12;
            for (place, path) in step.changes.iter().take(SHOWN) {
                let path: Vec<_> = path.iter().map(State::to_string).collect();
                let path = path.join(" -> ");
                writeln!(
                    f,
                    "        level {} gfn {:#x}: {path}",
                    place.level, place.gfn
                )?;
            }
            if step.changes.len() > SHOWN {
                writeln!(f, "        and {} more", step.changes.len() - SHOWN)?;
            }
        }
        for exit in &self.exits {
            writeln!(f, "    {exit}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may fail")]

    use super::*;
    use crate::event::{from_kernel, from_twofold};

    const EMPTY: &str = "8000000000000000";
    const FROZEN: &str = "80000000000005a0";

    fn said(text: &str) -> String {
        format!("tracing_mark_write: {text}")
    }

    fn changed(gfn: u64, level: u8, old: &str, new: &str) -> String {
        format!(
            "kvm_tdp_mmu_spte_changed: as id 0 gfn {gfn:x} level {level} old_spte {old} new_spte {new}"
        )
    }

    fn history(lines: &[String]) -> Vec<Operation> {
        let mut history = History::default();
        for line in lines {
            history.add(from_kernel(line).unwrap().unwrap()).unwrap();
        }
        history.operations()
    }

    fn states(operation: &Operation) -> Vec<(u8, u64, Vec<State>)> {
        let changes = operation.steps.iter().flat_map(|step| &step.changes);
        changes
            .map(|(place, path)| (place.level, place.gfn, path.clone()))
            .collect()
    }

    const LEAF: State = State::Leaf(0xe07);
    const TABLE: State = State::Table(0x827);

    #[test]
    fn a_table_that_goes_takes_along_what_is_below_it_however_that_is_told() {
        let before = [
            said("guest: read 0x201000"),
            changed(0x200, 2, EMPTY, "1000827"),
            changed(0x201, 1, EMPTY, "2000e07"),
        ];
        let gone = changed(0x200, 2, "1000827", EMPTY);
        let expected = vec![
            (1, 0x201, vec![LEAF, State::Empty]),
            (2, 0x200, vec![TABLE, State::Empty]),
        ];
        // All at once; as KVM tells it, with an entry that was empty; and leaf by leaf.
        let ways: [&[String]; 3] = [
            std::slice::from_ref(&gone),
            &[
                gone.clone(),
                changed(0x200, 1, EMPTY, FROZEN),
                changed(0x201, 1, "2000e67", FROZEN),
            ],
            &[
                changed(0x201, 1, "2000e67", FROZEN),
                changed(0x201, 1, FROZEN, EMPTY),
                gone.clone(),
            ],
        ];
        for way in ways {
            let call = [said("call: delete slot 1")];
            let lines = [&before[..], &call[..], way].concat();
            assert_eq!(states(&history(&lines)[1]), expected);
        }
    }

    #[test]
    fn parts_of_a_split_leaf_are_known() {
        let lines = [
            said("guest: read 0x200000"),
            changed(0x200, 2, EMPTY, "8000000000200e87"),
            said("call: slot 1 logs"),
            changed(0x200, 2, "8000000000200e87", "1000827"),
            changed(0x210, 1, "210e07", "210e05"),
            said("call: end the VM"),
        ];
        let operations = history(&lines);
        assert_eq!(
            states(&operations[1]),
            [
                (1, 0x210, vec![LEAF, State::Leaf(0xe05)]),
                (2, 0x200, vec![State::Leaf(1 << 63 | 0xe87), TABLE])
            ]
        );
        let end = states(&operations[2]);
        assert_eq!(end.len(), 513);
        assert!(end.contains(&(1, 0x3ff, vec![LEAF, State::Empty])));
        assert!(end.contains(&(1, 0x210, vec![State::Leaf(0xe05), State::Empty])));
    }

    #[test]
    fn what_comes_and_goes_within_a_step_is_seen() {
        let lines = [
            said("guest: write 0x201000"),
            changed(0x201, 1, EMPTY, "2000827"),
            "kvm_page_fault: vcpu 0 rip 0x1 address 0x201000 error_code 0x7".to_owned(),
            changed(0x201, 1, "2000827", EMPTY),
            changed(0x201, 1, EMPTY, "3000e07"),
            said("exit: halted"),
        ];
        let [operation] = &history(&lines)[..] else {
            panic!("one operation")
        };
        let path = vec![State::Leaf(0x807), State::Empty, LEAF];
        let place = Place {
            level: 1,
            gfn: 0x201,
        };
        assert_eq!(operation.steps[1].changes, BTreeMap::from([(place, path)]));
        assert_eq!(operation.exits, ["halted"]);
    }

    #[test]
    fn a_line_that_contradicts_the_ones_before_is_an_error() {
        let mut history = History::default();
        let mut add = |line: &str| history.add(from_twofold(line).unwrap().unwrap());
        add("exit: halted").unwrap_err();
        add("a line of somebody else").unwrap_err();
        add("TRACE twofold_mmu: entry changed gfn=0x1 level=1 old=0x8 new=0x9").unwrap_err();
        add("guest: read 0x1000").unwrap();
        add("TRACE twofold_mmu: entry changed gfn=0x1 level=1 old=0x8 new=0x9").unwrap();
        let restored = Event::Restored {
            gpa: 0x5000,
            old: 0,
            new: 0,
        };
        history.add(restored).unwrap_err();
    }
}
