//! Differences that are explained (`docs/hardware.md`).
//!
//! Each of them is undone on the side that has it, and what is left has to be equal. So none of them
//! hides another one.

use crate::entry::State;
use crate::event::error;
use crate::history::{Cause, Operation, Path, Place, Step};
use std::collections::{BTreeMap, BTreeSet};

/// The explanations.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Reason {
    /// QEMU leaves P out of the error code of a reserved bit.
    ReservedWithoutPresent,
    /// A deletion changes KVM's slots twice, so that its generation is another.
    Generations,
    /// KVM's host puts another page in the place of the page of zeros, and says so: the entry goes,
    /// and the access is tried again. Twofold's frames are addresses of the process, behind which
    /// the page is replaced.
    CopyOnWrite,
    /// A fault that KVM tries again since host memory has changed meanwhile.
    TriedAgain,
    /// KVM writes the leaf that was executed again after it has split a larger one.
    WrittenAgain,
    /// The mark of tables that were split for the sake of execution: KVM keeps it elsewhere.
    SplitMark,
    /// Until 6.12, KVM drops small leaves when logging ends; later versions, and Twofold, put the
    /// large leaf in their place.
    Recovery,
    /// Twofold maps a page writable although the program has made its mapping read-only: the
    /// host's own tables stop a write, and then the entry goes.
    ReadOnlyMapping,
    /// Twofold says in `kvm_run` where host memory is missing, as KVM's documentation has it
    /// (`KVM_CAP_MEMORY_FAULT_INFO`).
    MemoryFaultInfo,
}

impl Reason {
    /// In a few words.
    pub const fn text(self) -> &'static str {
        match self {
            Self::ReservedWithoutPresent => "QEMU reports a reserved bit without P",
            Self::Generations => "KVM's slots change twice when one is deleted",
            Self::CopyOnWrite => "a page that is copied goes and comes back in KVM",
            Self::TriedAgain => "KVM tries again while host memory changes",
            Self::WrittenAgain => "KVM writes a leaf again that it has just split off",
            Self::SplitMark => "Twofold marks tables that were split for execution",
            Self::Recovery => "KVM 6.12 drops small leaves when logging ends",
            Self::ReadOnlyMapping => "Twofold leaves a read-only mapping to the host",
            Self::MemoryFaultInfo => "Twofold says where host memory is missing",
        }
    }
}

/// What is remembered from one operation to the next, and how often each explanation was needed.
#[derive(Debug, Default)]
pub struct Known {
    counts: BTreeMap<Reason, u64>,
    state: Remembered,
}

#[derive(Clone, Debug, Default)]
struct Remembered {
    /// Generations in the order in which they were met, KVM's and Twofold's.
    generations: [Vec<u64>; 2],
    /// Large leaves that Twofold has recovered: KVM's entry and Twofold's.
    recovered: BTreeMap<Place, [State; 2]>,
    /// Pages whose mapping was made read-only.
    read_only: BTreeSet<Place>,
    /// Those of them that Twofold has mapped writable, and those that only KVM maps.
    writable: BTreeSet<Place>,
    only_theirs: BTreeSet<Place>,
}

impl Known {
    /// How often each explanation was needed.
    pub const fn counts(&self) -> &BTreeMap<Reason, u64> {
        &self.counts
    }

    /// Whether both have done the same but for what is explained. Operations are given in order.
    pub fn is_equal(&mut self, theirs: &Operation, ours: &Operation) -> bool {
        let (mut theirs, mut ours) = (theirs.clone(), ours.clone());
        if theirs.what.starts_with("call: make a VM") {
            self.state = Remembered::default();
        }
        let state = &mut self.state;
        let needed = [
            (
                Reason::ReservedWithoutPresent,
                reserved_without_present(&mut theirs),
            ),
            (
                Reason::Generations,
                state.number_generations(&mut theirs, &mut ours),
            ),
            (Reason::CopyOnWrite, copy_on_write(&mut theirs)),
            (Reason::TriedAgain, tried_again(&mut theirs)),
            (Reason::WrittenAgain, written_again(&mut theirs)),
            (Reason::SplitMark, split_mark(&mut ours)),
            (Reason::Recovery, state.recovery(&mut theirs, &mut ours)),
            (
                Reason::ReadOnlyMapping,
                state.read_only_mapping(&mut theirs, &mut ours),
            ),
            (Reason::MemoryFaultInfo, memory_fault_info(&mut ours)),
        ];
        // Every VM ends with nothing left to explain.
        let left = theirs.what.starts_with("call: end") && !state.recovered.is_empty();
        if theirs != ours || left {
            return false;
        }
        for (reason, _) in needed.into_iter().filter(|(_, needed)| *needed) {
            *self.counts.entry(reason).or_default() += 1;
        }
        true
    }
}

fn reserved_without_present(theirs: &mut Operation) -> bool {
    let mut found = false;
    for step in &mut theirs.steps {
        if let Cause::Fault { error, .. } = &mut step.cause
            && *error & error::RESERVED != 0
        {
            *error |= error::PRESENT;
            found = true;
        }
    }
    found
}

fn copy_on_write(theirs: &mut Operation) -> bool {
    let goes = |step: &Step| match (step.cause, one_path(step)) {
        (Cause::Fault { gpa, error }, Some((place, [leaf, State::Empty])))
            if error & error::WRITE != 0 && !leaf.is_host_writable() =>
        {
            Some((gpa, error, place, *leaf))
        }
        _ => None,
    };
    for first in 0..theirs.steps.len().saturating_sub(1) {
        let Some((gpa, error, place, leaf)) = goes(&theirs.steps[first]) else {
            continue;
        };
        let again = Cause::Fault {
            gpa,
            error: error & !error::PRESENT,
        };
        let second = &mut theirs.steps[first + 1];
        if second.cause != again {
            continue;
        }
        let Some([State::Empty, new]) = second.changes.get(&place).map(Vec::as_slice) else {
            continue;
        };
        let path = vec![leaf, *new];
        second.changes.insert(place, path);
        second.cause = Cause::Fault { gpa, error };
        theirs.steps.remove(first);
        return true;
    }
    false
}

fn tried_again(theirs: &mut Operation) -> bool {
    let before = theirs.steps.len();
    let mut kept: Vec<Step> = Vec::new();
    for step in theirs.steps.drain(..) {
        if let (Some(last), Cause::Fault { .. }) = (kept.last(), step.cause)
            && last.cause == step.cause
            && last.changes.is_empty()
        {
            kept.pop();
        }
        kept.push(step);
    }
    theirs.steps = kept;
    theirs.steps.len() != before
}

fn written_again(theirs: &mut Operation) -> bool {
    let mut found = false;
    for step in &mut theirs.steps {
        let was_split = |(place, path): (&Place, &Path)| {
            matches!(path[..], [State::Leaf(_), State::Table(_)]).then_some(*place)
        };
        let split: Vec<_> = step.changes.iter().filter_map(was_split).collect();
        step.changes.retain(|place, path| {
            let same = matches!(path[..], [old, new] if old == new.without_use())
                && split.iter().any(|table| table.covers(*place));
            found |= same;
            !same
        });
    }
    found
}

fn split_mark(ours: &mut Operation) -> bool {
    /// Bit 56 of an entry that points to a table.
    const MARK: u64 = 1 << 56;
    let mut found = false;
    let states = ours
        .steps
        .iter_mut()
        .flat_map(|step| step.changes.values_mut().flatten());
    for state in states {
        if let State::Table(bits) = state
            && *bits & MARK != 0
        {
            *bits &= !MARK;
            found = true;
        }
    }
    found
}

fn memory_fault_info(ours: &mut Operation) -> bool {
    let mut found = false;
    for exit in &mut ours.exits {
        if let Some((errno, _)) = exit.split_once(", memory fault") {
            *exit = errno.to_owned();
            found = true;
        }
    }
    found
}

impl Remembered {
    fn number_generations(&mut self, theirs: &mut Operation, ours: &mut Operation) -> bool {
        let mut found = false;
        for (operation, known) in [theirs, ours].into_iter().zip(&mut self.generations) {
            let paths = operation
                .steps
                .iter_mut()
                .flat_map(|step| step.changes.values_mut());
            for state in paths.flatten() {
                if let State::NoMemory { generation, .. } = state {
                    let number = known.iter().position(|known| known == generation);
                    let number = number.unwrap_or_else(|| {
                        known.push(*generation);
                        known.len() - 1
                    });
                    *generation = number as u64;
                    found = true;
                }
            }
        }
        found && self.generations[0] != self.generations[1]
    }

    fn recovery(&mut self, theirs: &mut Operation, ours: &mut Operation) -> bool {
        let mut found = false;
        // When logging ends, a table becomes empty there and a leaf here.
        if theirs.what.starts_with("call: slot")
            && let ([theirs], [ours]) = (&mut theirs.steps[..], &mut ours.steps[..])
        {
            for (place, path) in &mut ours.changes {
                let gone = theirs.changes.get(place).map(Vec::as_slice);
                if let ([table @ State::Table(_), leaf @ State::Leaf(_)], Some([_, State::Empty])) =
                    (&path[..], gone)
                {
                    let (table, leaf) = (*table, *leaf);
                    self.recovered
                        .insert(*place, [State::Empty, leaf.without_use()]);
                    *path = vec![table, State::Empty];
                    found = true;
                }
            }
        }
        // KVM makes the leaf at the next access; Twofold may have to allow writes.
        for (place, [there, here]) in &mut self.recovered {
            let took = |steps: &mut Vec<Step>, now: &mut State| {
                let before = steps.len();
                steps.retain(|step| match (step.cause, one_path(step)) {
                    (Cause::Fault { .. }, Some((at, [old, new])))
                        if at == *place && *old == *now =>
                    {
                        *now = new.without_use();
                        false
                    }
                    _ => true,
                });
                steps.len() != before
            };
            found |= took(&mut theirs.steps, there) | took(&mut ours.steps, here);
        }
        self.recovered.retain(|_, [there, here]| there != here);
        found
    }

    fn read_only_mapping(&mut self, theirs: &mut Operation, ours: &mut Operation) -> bool {
        let mut found = false;
        if theirs.what.starts_with("call: ReadOnly") {
            let pages = theirs.steps.iter().flat_map(|step| step.changes.keys());
            self.read_only.extend(pages);
        }
        // Read: writable here.
        for (theirs, ours) in theirs.steps.iter().zip(&mut ours.steps) {
            for (place, path) in &mut ours.changes {
                let (Some(there), [State::Empty, here]) = (theirs.changes.get(place), &path[..])
                else {
                    continue;
                };
                if self.read_only.contains(place)
                    && here.is_host_writable()
                    && matches!(there[..], [State::Empty, leaf] if !leaf.is_host_writable())
                {
                    self.writable.insert(*place);
                    path.clone_from(there);
                    found = true;
                }
            }
        }
        // Written: the entry goes here, and the access finds none; there it stays.
        if let [
            first,
            Step {
                cause: Cause::Fault { gpa, error },
                ..
            },
        ] = &mut ours.steps[..]
            && *error & error::WRITE != 0
        {
            let page = Place {
                level: 1,
                gfn: *gpa >> 12,
            };
            if self.writable.contains(&page)
                && matches!(
                    first.changes.get(&page).map(Vec::as_slice),
                    Some([_, State::Empty])
                )
            {
                first.changes.remove(&page);
                *error |= error::PRESENT;
                self.writable.remove(&page);
                self.only_theirs.insert(page);
                found = true;
            }
        }
        // The program changes the mapping again, and the entry goes there.
        if theirs.what.starts_with("call: Writable") {
            for step in &mut theirs.steps {
                step.changes.retain(|place, _| {
                    let known = self.only_theirs.remove(place);
                    found |= known;
                    !known
                });
            }
        }
        found
    }
}

/// The change of a step that has only one.
fn one_path(step: &Step) -> Option<(Place, &[State])> {
    let mut changes = step.changes.iter();
    match (changes.next(), changes.next()) {
        (Some((place, path)), None) => Some((*place, path)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may fail")]

    use super::*;
    use crate::event::{Event, from_twofold};
    use crate::history::History;

    const EMPTY: u64 = 1 << 63;
    const TABLE: u64 = 0x827;
    /// Leaves: writable, one whose writes are noticed, one whose host page is read-only, a large one.
    const LEAF: u64 = 0xe67;
    const NOTICED: u64 = 0xe65;
    const READ_ONLY: u64 = 0x825;
    const LARGE: u64 = LEAF | 1 << 7;

    const WRITE: u64 = error::WRITE | error::USER | error::FINAL;
    const READ: u64 = error::USER | error::FINAL;

    enum Line {
        Said(&'static str),
        Fault(u64, u64),
        Entry(u64, u8, u64, u64),
    }
    use Line::{Entry, Fault, Said};

    fn history(lines: &[Line]) -> Vec<Operation> {
        let mut history = History::default();
        for line in lines {
            let event = match *line {
                Said(text) => from_twofold(text).unwrap().unwrap(),
                Fault(gpa, error) => Event::Fault { gpa, error },
                Entry(gfn, level, old, new) => Event::Changed {
                    gfn,
                    level,
                    old,
                    new,
                },
            };
            history.add(event).unwrap();
        }
        history.operations()
    }

    /// The explanations that make the two equal, or where they differ first.
    fn compare(theirs: &[Line], ours: &[Line]) -> Result<Vec<Reason>, String> {
        let mut known = Known::default();
        for (theirs, ours) in history(theirs).iter().zip(&history(ours)) {
            if !known.is_equal(theirs, ours) {
                return Err(theirs.what.clone());
            }
        }
        Ok(known.counts().keys().copied().collect())
    }

    const WRITES: Line = Said("guest: write 0x1000");

    #[test]
    fn the_same_is_the_same_without_an_explanation() {
        let lines = || [WRITES, Fault(0x1000, WRITE), Entry(1, 1, EMPTY, LEAF)];
        assert_eq!(compare(&lines(), &lines()), Ok(vec![]));
    }

    #[test]
    fn whatever_else_differs_is_found() {
        let theirs = || [WRITES, Fault(0x1000, WRITE), Entry(1, 1, EMPTY, LEAF)];
        let ours: [&[Line]; 6] = [
            &[WRITES, Fault(0x1000, WRITE)],
            &[WRITES, Entry(1, 1, EMPTY, LEAF)],
            &[WRITES, Fault(0x1000, READ), Entry(1, 1, EMPTY, LEAF)],
            &[WRITES, Fault(0x1000, WRITE), Entry(2, 1, EMPTY, LEAF)],
            &[WRITES, Fault(0x1000, WRITE), Entry(1, 1, EMPTY, NOTICED)],
            &[
                WRITES,
                Fault(0x1000, WRITE),
                Entry(1, 1, EMPTY, NOTICED),
                Entry(1, 1, NOTICED, LEAF),
            ],
        ];
        for ours in ours {
            compare(&theirs(), ours).unwrap_err();
        }
        compare(&[WRITES], &[Said("guest: write 0x2000")]).unwrap_err();
        compare(&[WRITES, Said("exit: halted")], &[WRITES]).unwrap_err();
    }

    #[test]
    fn a_copied_page_is_explained_only_where_the_host_had_it_read_only() {
        let with = |leaf| {
            let theirs = [
                WRITES,
                Fault(0x1000, WRITE | error::PRESENT),
                Entry(1, 1, leaf, EMPTY),
                Fault(0x1000, WRITE),
                Entry(1, 1, EMPTY, LEAF),
            ];
            let ours = [
                WRITES,
                Fault(0x1000, WRITE | error::PRESENT),
                Entry(1, 1, leaf, LEAF),
            ];
            compare(&theirs, &ours)
        };
        assert_eq!(with(READ_ONLY), Ok(vec![Reason::CopyOnWrite]));
        with(NOTICED).unwrap_err();
    }

    #[test]
    fn a_recovered_leaf_has_to_be_the_one_that_kvm_makes_at_last() {
        const ENDS: Line = Said("call: slot 1 at 0x200000, Plain");
        let before = |line: Line| {
            [
                Said("guest: read 0x200000"),
                Entry(0x200, 2, EMPTY, TABLE),
                Entry(0x200, 1, EMPTY, NOTICED),
                ENDS,
                line,
                Said("guest: write 0x200000"),
            ]
        };
        let theirs = |leaf| {
            let mut lines = Vec::from(before(Entry(0x200, 2, TABLE, EMPTY)));
            lines.extend([Fault(0x20_0000, WRITE), Entry(0x200, 2, EMPTY, leaf)]);
            lines.push(Said("call: end the VM"));
            lines
        };
        let ours = || {
            let noticed = NOTICED | 1 << 7;
            let mut lines = Vec::from(before(Entry(0x200, 2, TABLE, noticed)));
            lines.extend([
                Fault(0x20_0000, WRITE | error::PRESENT),
                Entry(0x200, 2, noticed, LARGE),
                Said("call: end the VM"),
            ]);
            lines
        };
        assert_eq!(compare(&theirs(LARGE), &ours()), Ok(vec![Reason::Recovery]));
        let not_executable = LARGE | 1 << 63;
        compare(&theirs(not_executable), &ours()).unwrap_err();
        compare(&theirs(READ_ONLY | 1 << 7), &ours()).unwrap_err();
    }

    #[test]
    fn a_leaf_that_is_written_again_is_explained_only_below_a_split() {
        let executed = || Said("guest: execute 0x201000");
        let fault = || Fault(0x20_1000, READ | error::PRESENT | error::FETCH);
        let no_execute = LARGE | 1 << 63;
        let split = || Entry(0x200, 2, no_execute, TABLE);
        let again = || Entry(0x201, 1, LEAF, LEAF & !0x40);
        assert_eq!(
            compare(
                &[executed(), fault(), split(), again()],
                &[executed(), fault(), split()]
            ),
            Ok(vec![Reason::WrittenAgain])
        );
        compare(&[executed(), fault(), again()], &[executed(), fault()]).unwrap_err();
    }

    #[test]
    fn generations_may_be_others_but_not_fresh_where_kvms_are_not() {
        let no_memory = |generation: u64| 1 << 51 | generation << 3 | 7;
        let reads = || Said("guest: read 0x80000000");
        let lines = |first, second, third| {
            [
                reads(),
                Entry(0x8_0000, 1, EMPTY, no_memory(first)),
                reads(),
                Entry(0x8_0000, 1, no_memory(first), no_memory(second)),
                reads(),
                Entry(0x8_0001, 1, EMPTY, no_memory(third)),
            ]
        };
        let (theirs, ours) = (lines(2, 6, 6), lines(2, 4, 4));
        assert_eq!(compare(&theirs, &ours), Ok(vec![Reason::Generations]));
        compare(&theirs, &lines(2, 4, 6)).unwrap_err();
    }
}
