//! `make bench-instructions`: how many instructions each contender executes per item.
//!
//! The program runs itself under `callgrind`, which counts only inside `measure::counted` and
//! writes one file each time that function returns. The inner run announces on its output what each
//! file is about. The figures are the same on a busy machine.

use crate::report::{Style, number};
use anyhow::{Context, Result, ensure};
use std::path::Path;
use std::process::Command;

/// The function that is counted, as `callgrind` names it.
const COUNTED: &str = "twofold_bench::measure::counted";

/// Our name in the announcements.
pub(crate) const OURS: &str = "ours";

/// The argument with which the program starts itself under `callgrind`.
pub(crate) const INNER: &str = "--under-callgrind";

/// Says what the next file of counts is about.
pub(crate) fn announce(what: &str, contender: &str, items: u64) {
    println!("{what}\t{contender}\t{items}");
}

/// Instructions that one file of counts adds up to.
fn total(path: &Path) -> Result<f64> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let line = text.lines().find_map(|line| line.strip_prefix("summary: "));
    let count = line.and_then(|line| line.split_whitespace().next());
    count
        .with_context(|| format!("{} has no summary", path.display()))?
        .parse()
        .with_context(|| format!("the summary of {}", path.display()))
}

/// Runs `subjects`, or all if there are none, under `callgrind` and prints instructions per item.
pub(crate) fn print(style: Style, subjects: &[String]) -> Result<()> {
    let own = std::env::current_exe().context("finding this program")?;
    let directory = std::env::temp_dir().join(format!("twofold-bench-{}", std::process::id()));
    std::fs::create_dir_all(&directory)
        .with_context(|| format!("creating {}", directory.display()))?;
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--quiet", "--collect-atstart=no"])
        .arg(format!("--toggle-collect={COUNTED}"))
        .arg(format!("--dump-after={COUNTED}"))
        .arg(format!(
            "--callgrind-out-file={}",
            directory.join("counts").display()
        ))
        .arg(&own)
        .arg(INNER)
        .args(subjects)
        .output()
        .context("starting valgrind; `make bench-instructions` installs it where it can")?;
    ensure!(
        output.status.success(),
        "the run under valgrind failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let mut lines: Vec<[String; 3]> = Vec::new();
    for (number_of_file, line) in String::from_utf8(output.stdout)?.lines().enumerate() {
        let fields: Vec<_> = line.split('\t').collect();
        let [what, contender, items] = fields[..] else {
            anyhow::bail!("the run under valgrind said {line:?}");
        };
        let file = directory.join(format!("counts.{}", number_of_file + 1));
        let per_item = number(total(&file)? / items.parse::<f64>()?);
        if lines.last().is_none_or(|line| line[0] != what) {
            lines.push([what.to_owned(), String::new(), String::new()]);
        }
        if let Some([_, ours, others]) = lines.last_mut() {
            if contender == OURS {
                *ours = per_item;
            } else {
                let comma = if others.is_empty() { "" } else { ", " };
                *others += &format!("{comma}{contender} {per_item}");
            }
        }
    }
    style.print_table(["instructions per item", "ours", "others"], &lines);
    std::fs::remove_dir_all(&directory).with_context(|| format!("removing {}", directory.display()))
}
