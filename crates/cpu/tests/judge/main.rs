//! The host's processor judges Twofold's: every instruction form that Twofold says it executes is
//! executed by both, over random encodings, registers, flags and memory, and everything that user
//! code can see afterwards is compared, exceptions included.
//!
//! `TWOFOLD_JUDGE_CASES` is the number of cases a form gets, `TWOFOLD_JUDGE_SEED` another seed,
//! `TWOFOLD_JUDGE_ONLY` part of a form's name as iced-x86 spells it (`Add_rm8_r8`).
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]
#![allow(missing_docs, unreachable_pub, clippy::unwrap_used)]

mod areas;
mod coverage;
mod encoding;
mod exclusions;
mod forms;
mod guest;
mod native;
mod rng;
mod sequences;
mod state;
#[path = "../support/mod.rs"]
mod support;
mod undefined;
mod units;
mod verdict;

use forms::Generator;
use guest::Guest;
use iced_x86::{Code, Instruction};
use native::Native;
use rng::Rng;
use sequences::Sequences;
use state::{CODE, CODE_BYTES, Case, DATA_BYTES, Outcome};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use twofold_cpu::Support;

/// Cases a form gets unless the environment says otherwise.
const CASES: u64 = 400;
/// Examples of a difference that are printed for one form.
const EXAMPLES: usize = 2;

fn from_environment(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|value| value.parse().ok())
        .unwrap_or(default)
}

/// Whether Twofold executes an instruction.
fn executes(instruction: &Instruction, bitness: u32) -> bool {
    twofold_cpu::support(instruction, bitness) == Support::Executed
}

/// What was found.
#[derive(Default)]
struct Report {
    forms: usize,
    cases: u64,
    faults: u64,
    /// By form: how many cases differ, and some of them described.
    differences: BTreeMap<String, (u64, Vec<String>)>,
    /// Forms that were not judged, by reason.
    unverified: BTreeMap<&'static str, Vec<String>>,
    not_executed: usize,
    /// Forms for which no encoding was found: those that a decoder knows only by another name, or
    /// only if asked for a processor long gone.
    no_encoding: Vec<String>,
}

struct Court {
    native: Native,
    guest: Guest,
    pattern: Vec<u8>,
}

impl Court {
    fn new() -> Self {
        Self {
            native: Native::new(),
            guest: Guest::new(),
            pattern: vec![0; DATA_BYTES],
        }
    }

    /// Puts code and data in place on both sides.
    fn prepare(&mut self, case: &Case) {
        place_code(case, self.native.code());
        place_code(case, self.guest.code());
        place_data(case, &self.pattern, self.native.data());
        place_data(case, &self.pattern, self.guest.data());
    }

    fn judge(&mut self, case: &Case, instruction: &Instruction) -> (Outcome, Option<String>) {
        self.prepare(case);
        let expected = self.native.run(case);
        let difference = match self.guest.run(case) {
            Err(problem) => Some(problem),
            Ok(found) => {
                let memory = (&*self.native.data(), &*self.guest.data());
                verdict::compare(case, instruction, &expected, &found, memory)
            }
        };
        (expected, difference)
    }
}

/// Puts the instruction among breakpoints.
fn place_code(case: &Case, code: &mut [u8]) {
    let at = (case.registers.rip - CODE) as usize;
    code.fill(0xcc);
    code[at..at + case.bytes.len()].copy_from_slice(&case.bytes);
}

/// Puts the case's values over the pattern.
fn place_data(case: &Case, pattern: &[u8], data: &mut [u8]) {
    data.copy_from_slice(pattern);
    for (offset, bytes) in &case.patches {
        data[*offset..offset + bytes.len()].copy_from_slice(bytes);
    }
}

fn judge_all(bitness: u32) -> Report {
    let cases = from_environment("TWOFOLD_JUDGE_CASES", CASES);
    let seed = from_environment("TWOFOLD_JUDGE_SEED", 0x2f01d);
    let only = std::env::var("TWOFOLD_JUDGE_ONLY").unwrap_or_default();
    let mut report = Report::default();
    let mut court = Court::new();
    let mut generator = Generator::new(bitness);
    for code in Code::values() {
        let name = format!("{code:?}");
        let op = code.op_code();
        if !generator.knows(op) || !name.contains(&only) {
            continue;
        }
        let mut rng = Rng::new(seed ^ (code as u64) << 32 ^ u64::from(bitness));
        let Some((_, sample)) = generator.case(code, &mut rng) else {
            report
                .unverified
                .entry("no encoding was found")
                .or_default()
                .push(name);
            continue;
        };
        if !executes(&sample, bitness) {
            report.not_executed += 1;
            continue;
        }
        if let Some(reason) = exclusions::excluded(code) {
            report.unverified.entry(reason).or_default().push(name);
            continue;
        }
        if !verdict::host_has(code) {
            report
                .unverified
                .entry("this host lacks it")
                .or_default()
                .push(name);
            continue;
        }
        report.forms += 1;
        for byte in court.pattern.chunks_mut(8) {
            byte.copy_from_slice(&rng.next().to_le_bytes());
        }
        for _ in 0..cases {
            let Some((case, instruction)) = generator.case(code, &mut rng) else {
                continue;
            };
            if !verdict::is_defined(&case, &instruction) || !executes(&instruction, bitness) {
                continue;
            }
            report.cases += 1;
            let (expected, difference) = court.judge(&case, &instruction);
            report.faults += u64::from(expected.vector != 3);
            if let Some(difference) = difference {
                let (count, examples) = report.differences.entry(name.clone()).or_default();
                *count += 1;
                if examples.len() < EXAMPLES {
                    examples.push(verdict::describe(
                        &case,
                        &instruction,
                        &expected,
                        &difference,
                    ));
                }
            }
        }
    }
    report
}

fn print(report: &Report, bitness: u32) {
    let mut out = String::new();
    let _ = writeln!(
        out,
        "{bitness}-bit: {} forms of {} executed, {} cases ({} with an exception); {} forms are not \
         executed",
        report.forms,
        executed(report),
        report.cases,
        report.faults,
        report.not_executed
    );
    for (reason, forms) in &report.unverified {
        let _ = writeln!(out, "unverified, {reason}: {}", forms.join(" "));
    }
    let _ = writeln!(
        out,
        "no encoding was found: {}",
        report.no_encoding.join(" ")
    );
    for (form, (count, examples)) in &report.differences {
        let _ = writeln!(out, "DIFFERENCE {form}: {count} cases");
        for example in examples {
            let _ = writeln!(out, "{example}");
        }
    }
    println!("{out}");
}

/// Forms that the processor says it executes, judged or not.
fn executed(report: &Report) -> usize {
    report.forms + report.unverified.values().map(Vec::len).sum::<usize>()
}

/// A form that is not executed any more is not judged either, so their number is watched (unless
/// only some are asked for).
fn assert_none_lost(report: &Report, least: usize) {
    let only = std::env::var_os("TWOFOLD_JUDGE_ONLY").is_some();
    let executed = executed(report);
    assert!(
        only || executed >= least,
        "{executed} forms are executed, {least} were"
    );
}

#[test]
fn every_form_does_what_the_host_does_in_64_bit_code() {
    let report = judge_all(64);
    print(&report, 64);
    assert_none_lost(&report, 1310);
    assert!(
        report.differences.is_empty(),
        "{} forms differ",
        report.differences.len()
    );
}

#[test]
fn every_form_does_what_the_host_does_in_32_bit_code() {
    let report = judge_all(32);
    print(&report, 32);
    assert_none_lost(&report, 1250);
    assert!(
        report.differences.is_empty(),
        "{} forms differ",
        report.differences.len()
    );
}

/// Sequences that are tried for each case that a form gets.
const SEQUENCES: u64 = 60;

fn judge_sequences(bitness: u32, mut sequences: Sequences) {
    let count = SEQUENCES * from_environment("TWOFOLD_JUDGE_CASES", CASES);
    let mut rng = Rng::new(from_environment("TWOFOLD_JUDGE_SEED", 0x5e0) ^ u64::from(bitness));
    let mut court = Court::new();
    let (mut judged, mut differences) = (0, Vec::new());
    for _ in 0..count {
        let Some((case, last)) = sequences.case(&mut rng) else {
            continue;
        };
        judged += 1;
        let (expected, difference) = court.judge(&case, &last);
        if let Some(difference) = difference {
            differences.push(verdict::describe(&case, &last, &expected, &difference));
        }
    }
    println!(
        "{bitness}-bit: {judged} sequences of {count} tried, {} differ",
        differences.len()
    );
    for difference in differences.iter().take(10) {
        println!("{difference}");
    }
    assert!(judged > count / 10, "too few sequences were found");
    assert!(
        differences.is_empty(),
        "{} sequences differ",
        differences.len()
    );
}

#[test]
fn sequences_do_what_the_host_does_in_64_bit_code() {
    judge_sequences(64, Sequences::new(64));
}

#[test]
fn sequences_do_what_the_host_does_in_32_bit_code() {
    judge_sequences(32, Sequences::new(32));
}

#[test]
fn x87_sequences_do_what_the_host_does_in_64_bit_code() {
    judge_sequences(64, Sequences::x87(64));
}

#[test]
fn x87_sequences_do_what_the_host_does_in_32_bit_code() {
    judge_sequences(32, Sequences::x87(32));
}

/// The judge must be able to convict: each kind of difference is seen.
#[test]
fn a_difference_in_anything_that_is_compared_is_seen() {
    let mut generator = Generator::new(64);
    let (case, instruction) = generator
        .case(Code::Add_rm64_r64, &mut Rng::new(1))
        .unwrap();
    let right = Outcome {
        registers: case.registers.clone(),
        vector: 3,
        error: 0,
        address: 0,
    };
    let memory = vec![0u8; DATA_BYTES];
    let verdict = |ours: &Outcome, ours_memory: &[u8]| {
        verdict::compare(&case, &instruction, &right, ours, (&memory, ours_memory))
    };
    assert_eq!(verdict(&right, &memory), None);
    let changes: [fn(&mut Outcome); 13] = [
        |o| o.vector = 13,
        |o| o.error = 1,
        |o| o.address = 1,
        |o| o.registers.rip += 1,
        |o| o.registers.gpr[15] ^= 1 << 63,
        |o| o.registers.rflags ^= state::flag::AF,
        |o| o.registers.xmm[15] ^= 1,
        |o| o.registers.ymm_high[15] ^= 1,
        |o| o.registers.mxcsr ^= 1,
        |o| o.registers.st[7] ^= 1,
        |o| o.registers.fcw ^= 1,
        |o| o.registers.fsw ^= 1,
        |o| o.registers.ftw ^= 1,
    ];
    for (i, change) in changes.into_iter().enumerate() {
        let mut wrong = right.clone();
        change(&mut wrong);
        assert!(verdict(&wrong, &memory).is_some(), "change {i}");
    }
    let mut wrong = memory.clone();
    wrong[DATA_BYTES - 1] = 1;
    assert!(verdict(&right, &wrong).is_some());
}

/// What the judge says must not depend on anything but the case.
#[test]
fn the_host_agrees_with_itself() {
    const CASES: u64 = 4;
    let mut native = Native::new();
    let mut forms = 0;
    for bitness in [64, 32] {
        let mut generator = Generator::new(bitness);
        for code in Code::values() {
            if !generator.knows(code.op_code())
                || exclusions::excluded(code).is_some()
                || !verdict::host_has(code)
            {
                continue;
            }
            let mut rng = Rng::new(code as u64);
            for _ in 0..CASES {
                let Some((case, instruction)) = generator.case(code, &mut rng) else {
                    continue;
                };
                if !executes(&instruction, bitness) {
                    continue;
                }
                forms += 1;
                let pattern = vec![0x5a; DATA_BYTES];
                let mut run = || {
                    place_code(&case, native.code());
                    place_data(&case, &pattern, native.data());
                    let outcome = native.run(&case);
                    (outcome, native.data().to_vec())
                };
                let (first, memory) = run();
                let (second, again) = run();
                let difference =
                    verdict::compare(&case, &instruction, &first, &second, (&memory, &again));
                assert_eq!(difference, None, "{:02x?}", case.bytes);
            }
        }
    }
    assert!(forms > 0, "nothing was run");
}

const _: () = assert!(CODE_BYTES == DATA_BYTES, "both regions are two pages");
