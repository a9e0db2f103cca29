//! The same machine code on `twofold-cpu`, on Bochs and on QEMU: what the host's processor cannot
//! judge because it runs 64-bit user code only.
//!
//! One [image] holds a driver and a table of cases: a state of the processor, memory, a few
//! instructions. The driver enters each, catches the exception that ends it, and writes down
//! everything it can find. The image runs unmodified on each machine, and what it wrote is compared.
//!
//! `TWOFOLD_JUDGE_CASES` is the number of cases that a form gets in each mode, `TWOFOLD_JUDGE_SEED`
//! another seed, `TWOFOLD_JUDGE_FAMILIES` how many cases about privilege one is taken of,
//! `TWOFOLD_JUDGE_ONLY` part of the names of the cases that are wanted.
#![allow(missing_docs, unreachable_pub)]

mod case;
mod compare;
mod families;
mod forms;
mod image;
mod initial;
mod known;
mod layout;
mod simulators;
mod twofold;
mod values;

// What the host's judge of `crates/cpu` is made of too.
#[path = "../../../crates/cpu/tests/judge/encoding.rs"]
mod encoding;
#[path = "../../../crates/cpu/tests/judge/rng.rs"]
#[allow(dead_code)]
mod rng;
#[path = "../../../crates/cpu/tests/judge/state.rs"]
#[allow(dead_code)]
mod state;
#[path = "../../../crates/cpu/tests/support/mod.rs"]
mod support;
#[path = "../../../crates/cpu/tests/judge/undefined.rs"]
mod undefined;

use anyhow::{Context, Result};
use case::Case;
use iced_x86::Code;
use image::Outcome;
use rng::Rng;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use twofold_cpu::Support;

/// Cases that a form gets in each mode unless the environment says otherwise.
const CASES: u64 = 3;
/// One in so many cases about privilege is tried unless the environment says otherwise.
const FAMILIES: u64 = 7;
/// Cases of one image.
const BATCH: usize = 40_000;
/// Differences that are printed.
const EXAMPLES: usize = 40;

fn from_environment(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|value| value.parse().ok())
        .unwrap_or(default)
}

/// The programs and files that the machines are made of.
struct Machines {
    driver: Vec<u8>,
    rom: PathBuf,
    configuration: PathBuf,
    work: PathBuf,
}

/// What was found.
#[derive(Default)]
struct Report {
    compared: usize,
    equal: usize,
    known: BTreeMap<&'static str, usize>,
    /// Cases that our processor left without an exception, by how it did.
    left: BTreeMap<&'static str, Vec<String>>,
    /// Task switches, which end in an emulation error as they should.
    switches: usize,
    unexplained: Vec<String>,
}

impl Machines {
    fn bochs(&self, image: &[u8]) -> Result<Vec<u8>> {
        simulators::bochs(image, &self.rom, &self.configuration, &self.work)
    }

    /// Runs the cases and compares. Those that our processor leaves without an exception are not
    /// put before the others: what a machine does after a shutdown cannot be seen from inside.
    fn compare(&self, cases: Vec<Case>, report: &mut Report) -> Result<()> {
        let image = image::build(&self.driver, &cases, false)?;
        let ours = image::records(&twofold::run(&self.driver, &image)?, cases.len())?;
        if let Some(case) = cases.get(ours.len()) {
            let case = compare::describe(case);
            report
                .unexplained
                .push(format!("twofold-cpu does not come back from\n{case}"));
        }
        let mut kept = Vec::new();
        for (case, outcome) in cases.into_iter().zip(ours) {
            match twofold::left::name(outcome.vector) {
                Some(how) if case.leaves != Some(how) => {
                    report
                        .left
                        .entry(how)
                        .or_default()
                        .push(compare::describe(&case));
                }
                Some(_) => report.switches += 1,
                None => kept.push((case, outcome)),
            }
        }
        // Once more, so that all machines run the same cases one after another.
        let mut cases: Vec<_> = kept.into_iter().map(|(case, _)| case).collect();
        let image = image::build(&self.driver, &cases, false)?;
        let mut ours = image::records(&twofold::run(&self.driver, &image)?, cases.len())?;
        let (image, theirs) = loop {
            let image = image::build(&self.driver, &cases, false)?;
            let problem = match self.bochs(&image) {
                Ok(memory) => break (image, image::records(&memory, cases.len())?),
                Err(problem) => problem,
            };
            // Once more, to learn where.
            let told = image::build(&self.driver, &cases, true)?;
            let _ = self.bochs(&told);
            let number = simulators::last_told(&self.work).filter(|&at| at < cases.len());
            let Some(number) = number else {
                return Err(problem);
            };
            let case = compare::describe(&cases.remove(number));
            ours.remove(number);
            report.unexplained.push(format!("Bochs stops in\n{case}"));
        };
        let mut third: Option<Vec<Outcome>> = None;
        for (i, ((case, ours), theirs)) in cases.iter().zip(&ours).zip(&theirs).enumerate() {
            report.compared += 1;
            let Some(text) = compare::difference(case, ours, theirs, ["ours", "Bochs"]) else {
                report.equal += 1;
                continue;
            };
            if let Some(kind) = known::known(case, ours, theirs) {
                *report.known.entry(kind).or_default() += 1;
                continue;
            }
            if third.is_none() {
                let memory = simulators::qemu(&image, &self.work)?;
                third = Some(image::records(&memory, cases.len())?);
            }
            let agrees = match third.as_ref().and_then(|third| third.get(i)) {
                None => "QEMU did not come so far".into(),
                Some(third) => {
                    match (
                        compare::difference(case, ours, third, ["ours", "QEMU"]),
                        compare::difference(case, theirs, third, ["Bochs", "QEMU"]),
                    ) {
                        (None, _) => "QEMU agrees with us".into(),
                        (_, None) => "QEMU agrees with Bochs".into(),
                        (Some(text), _) => format!("QEMU agrees with neither:\n{text}"),
                    }
                }
            };
            report
                .unexplained
                .push(format!("{}\n{text}      {agrees}", compare::describe(case)));
        }
        Ok(())
    }
}

/// The cases of every form, and the number of forms.
fn form_cases(count: u64, seed: u64, only: &str) -> (Vec<Case>, usize) {
    let mut generator = forms::Generator::new();
    let (mut cases, mut tried) = (Vec::new(), 0);
    for code in Code::values() {
        if forms::excluded(code).is_some() {
            continue;
        }
        let before = cases.len();
        for mode in forms::Mode::ALL {
            if !generator.knows(code, mode) {
                continue;
            }
            let mut rng = Rng::new(seed ^ (code as u64) << 32 ^ u64::from(mode.bitness()));
            for _ in 0..count {
                let Some((case, instruction)) = generator.case(code, mode, &mut rng) else {
                    continue;
                };
                let support = twofold_cpu::support(&instruction, mode.bitness());
                if support == Support::Executed && case.name.contains(only) {
                    cases.push(case);
                }
            }
        }
        tried += usize::from(cases.len() > before);
    }
    (cases, tried)
}

fn main() -> Result<ExitCode> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let mut next = |what| arguments.next().context(what);
    let machines = Machines {
        driver: std::fs::read(next("the assembled driver")?)?,
        rom: next("the ROM")?,
        configuration: next("the configuration of Bochs")?,
        work: next("a folder to work in")?,
    };
    let count = from_environment("TWOFOLD_JUDGE_CASES", CASES);
    let seed = from_environment("TWOFOLD_JUDGE_SEED", 0xb0c5);
    let step = from_environment("TWOFOLD_JUDGE_FAMILIES", FAMILIES).max(1) as usize;
    let only = std::env::var("TWOFOLD_JUDGE_ONLY").unwrap_or_default();
    let (mut cases, forms) = form_cases(count, seed, &only);
    let of_forms = cases.len();
    cases.extend(
        families::cases()
            .into_iter()
            .filter(|case| case.name.contains(&only))
            .skip(seed as usize % step)
            .step_by(step)
            .filter(|case| !families::stops_bochs(case)),
    );
    let of_families = cases.len() - of_forms;
    println!(
        "processor: {forms} forms of 16- and 32-bit code in {of_forms} cases, privilege in {of_families}"
    );
    let mut report = Report::default();
    for batch in cases.chunks(BATCH) {
        machines.compare(batch.to_vec(), &mut report)?;
    }
    let known: usize = report.known.values().sum();
    let left: usize = report.left.values().map(Vec::len).sum();
    println!(
        "processor: {} compared with Bochs, {} equal, {known} with a known difference, {} with another; \
         {left} not put before it",
        report.compared,
        report.equal,
        report.unexplained.len(),
    );
    println!(
        "  task switches, which end in an emulation error: {}",
        report.switches
    );
    for (kind, count) in &report.known {
        println!("  known: {kind}: {count}");
    }
    for (how, cases) in &report.left {
        println!("  {how}: {}, the first:\n{}", cases.len(), cases[0]);
    }
    for text in report.unexplained.iter().take(EXAMPLES) {
        println!("DIFFERENCE\n{text}");
    }
    // Less than half of what there should be is a broken generator.
    let enough = !only.is_empty() || forms > 500 && report.compared * 2 > cases.len();
    Ok(if report.unexplained.is_empty() && enough {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
