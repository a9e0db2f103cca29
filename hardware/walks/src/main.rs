//! Reads what the image printed about its walks, makes the same walks with `twofold-cpu`, and says
//! where the two differ.
//!
//! Differences that are the simulator's, by the manual's word, are counted and named
//! ([`known`]); any other is an error.

mod known;
mod processor;

use processor::Processor;
use std::collections::BTreeMap;
use std::process::ExitCode;
use twofold_walks::{CASES, Case, Walked};

/// Differences that are printed in full.
const PRINTED: usize = 10;

fn main() -> ExitCode {
    let Some(path) = std::env::args().nth(1) else {
        eprintln!("usage: twofold-walks LOG: compares the lines in LOG that begin with ~");
        return ExitCode::from(2);
    };
    let log = match std::fs::read(&path) {
        Ok(log) => log,
        Err(error) => {
            eprintln!("{path}: {error}");
            return ExitCode::from(2);
        }
    };
    match compare(&String::from_utf8_lossy(&log)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            println!("= walks like twofold-cpu's | FAILED | {failure}");
            ExitCode::FAILURE
        }
    }
}

fn compare(log: &str) -> Result<(), String> {
    let mut processors: BTreeMap<&'static str, Processor> = BTreeMap::new();
    let mut known = BTreeMap::new();
    let (mut walks, mut equal, mut different) = (0, 0, 0);
    for line in log.lines().filter(|line| line.starts_with("~ ")) {
        let theirs: Walked = line
            .parse()
            .map_err(|_| format!("a line that was not understood: {line}"))?;
        walks += 1;
        let processor = match processors.entry(theirs.kind.name()) {
            std::collections::btree_map::Entry::Occupied(there) => there.into_mut(),
            std::collections::btree_map::Entry::Vacant(place) => {
                let new = Processor::new(theirs.kind).map_err(|error| error.to_string())?;
                place.insert(new)
            }
        };
        match known::explain(processor, &theirs) {
            Some(reasons) if reasons.is_empty() => equal += 1,
            Some(reasons) => {
                for reason in reasons {
                    *known.entry(reason).or_insert(0u64) += 1;
                }
            }
            None => {
                different += 1;
                if different <= PRINTED {
                    let case = Case::new(theirs.kind, theirs.number);
                    let ours = processor.walk(theirs.number, case);
                    println!("{case:x?}\n   there: {theirs}\n   here:  {ours}");
                }
            }
        }
    }
    for (which, count) in &known {
        println!("{count:6} walks: {which}");
    }
    let expected = CASES * (processors.len() as u64).max(1);
    if walks != expected {
        return Err(format!("{walks} walks in the log instead of {expected}"));
    }
    if different != 0 {
        return Err(format!("{different} of {walks} walks differ"));
    }
    println!("= walks like twofold-cpu's | ok | {equal} of {walks} equal, the others as explained");
    Ok(())
}
