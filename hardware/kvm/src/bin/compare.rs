//! Compares what the real KVM and Twofold did to their entries while the same program ran.

use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use twofold_transitions::event::{self, Event, Unreadable};
use twofold_transitions::history::{History, Operation};
use twofold_transitions::known::Known;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("= entries as KVM's | FAILED | {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (Some(theirs), Some(ours)) = (arguments.next(), arguments.next()) else {
        bail!("usage: compare TRACE LOG: the kernel's trace and Twofold's messages");
    };
    let theirs = read(&theirs, event::from_kernel)?;
    let ours = read(&ours, event::from_twofold)?;
    let mut known = Known::default();
    let (mut equal, mut different, mut entries) = (0, 0, 0);
    for (theirs, ours) in theirs.iter().zip(&ours) {
        entries += ours
            .steps
            .iter()
            .map(|step| step.changes.len())
            .sum::<usize>();
        if theirs == ours {
            equal += 1;
        }
        if !known.is_equal(theirs, ours) {
            different += 1;
            println!("KVM: {theirs}Twofold: {ours}");
        }
    }
    for (reason, count) in known.counts() {
        println!("{count:6} times: {}", reason.text());
    }
    if theirs.len() != ours.len() {
        bail!(
            "{} things were done there and {} here",
            theirs.len(),
            ours.len()
        );
    }
    ensure!(
        different == 0,
        "{different} of {} things have other effects on entries",
        theirs.len()
    );
    println!(
        "= entries as KVM's | ok | {equal} of {} things have the same effects on {entries} entries, \
         the others as explained",
        theirs.len()
    );
    Ok(())
}

fn read(
    path: &str,
    parse: impl Fn(&str) -> Result<Option<Event>, Unreadable>,
) -> Result<Vec<Operation>> {
    let text = std::fs::read(path).with_context(|| path.to_owned())?;
    let mut history = History::default();
    for line in String::from_utf8_lossy(&text).lines() {
        let event = parse(line).map_err(|Unreadable(line)| {
            anyhow::anyhow!("{path}: a line that was not understood: {line}")
        })?;
        if let Some(event) = event {
            history
                .add(event)
                .map_err(|why| anyhow::anyhow!("{path}: {line}: {why}"))?;
        }
    }
    Ok(history.operations())
}
