//! `make bench`: each figure beside what it is compared with, in one run.

mod attributes;
mod client;
mod dirty;
mod faults;
mod floor;
mod guest;
mod host;
mod huge;
mod instructions;
mod machine;
mod map;
mod mapper;
mod measure;
mod memory;
mod peers;
mod pkvm;
mod pool;
mod private;
mod protect;
mod query;
mod random;
mod report;
mod slots;
mod speed;
mod split;
mod spp;
mod sub_pages;
mod tables;
mod td;
mod threads;
mod zap;

use measure::Meter;
use report::{Row, Style};

/// Makes the rows of one subject.
type Subject = fn(Meter) -> anyhow::Result<Vec<Row>>;

/// Subjects in the order of the table, each with the name that chooses it.
const SUBJECTS: [(&str, Subject); 18] = [
    ("client", client::rows),
    ("slots", slots::rows),
    ("map", map::rows),
    ("split", split::rows),
    ("protect", protect::rows),
    ("zap", zap::rows),
    ("query", query::rows),
    ("faults", faults::rows),
    ("threads", threads::rows),
    ("dirty", dirty::rows),
    ("attributes", attributes::rows),
    ("memory", memory::rows),
    ("private", private::rows),
    ("td", td::rows),
    ("pkvm", pkvm::rows),
    ("sub-pages", sub_pages::rows),
    ("spp", spp::rows),
    ("speed", speed::rows),
];

const USAGE: &str = "\
usage: twofold-bench [--instructions] [--markdown] [SUBJECT...]
  --instructions  count instructions with valgrind instead of measuring time
  --markdown      print tables for docs/performance.md
  SUBJECT         measure only this";

fn main() -> anyhow::Result<()> {
    let mut style = Style::Terminal;
    let mut under_callgrind = false;
    let mut meter = Meter::Time;
    let mut chosen = Vec::new();
    for argument in std::env::args().skip(1) {
        match argument.as_str() {
            "--markdown" => style = Style::Markdown,
            "--instructions" => meter = Meter::Instructions,
            instructions::INNER => under_callgrind = true,
            name if SUBJECTS.iter().any(|(subject, _)| *subject == name) => chosen.push(argument),
            other => {
                let names: Vec<_> = SUBJECTS.iter().map(|(name, _)| *name).collect();
                anyhow::bail!(
                    "{other}: no such option or subject\n{USAGE}: {}",
                    names.join(" ")
                );
            }
        }
    }
    if meter == Meter::Instructions {
        return instructions::print(style, &chosen);
    }
    if under_callgrind {
        meter = Meter::Instructions;
    }
    let load = machine::load();
    let mut rows = Vec::new();
    for (name, subject) in SUBJECTS {
        if chosen.is_empty() || chosen.iter().any(|chosen| chosen == name) {
            rows.extend(subject(meter)?);
        }
    }
    if !under_callgrind {
        println!(
            "{}; load average {load} before, {} after\n",
            machine::describe(),
            machine::load()
        );
        report::print(&rows, style);
    }
    Ok(())
}
