//! Runs `kvm-client` under Twofold, and on the machine's own KVM where there is one.

use crate::measure::{Comparison, Meter, Samples};
use crate::report::{Reach, Row};
use anyhow::{Context, Result, ensure};
use std::borrow::Cow;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;

pub(crate) type Figures = HashMap<String, f64>;

pub(crate) fn run(command: &mut Command) -> Result<Figures> {
    let output = command
        .output()
        .with_context(|| format!("starting {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?} failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout)?
        .lines()
        .map(|line| {
            let (name, figure) = line.split_once(' ').with_context(|| line.to_owned())?;
            Ok((name.to_owned(), figure.parse()?))
        })
        .collect()
}

pub(crate) fn beside_this_program(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().context("finding this program")?;
    let path = own.with_file_name(name);
    ensure!(
        path.exists(),
        "{} is not built; `make bench` builds it",
        path.display()
    );
    Ok(path)
}

/// The rows about what a KVM program sees. Their instructions are not counted: two processes and
/// a kernel take part.
pub(crate) fn rows(meter: Meter) -> Result<Vec<Row>> {
    if meter == Meter::Instructions {
        return Ok(Vec::new());
    }
    let client = beside_this_program("kvm-client")?;
    let twofold = beside_this_program("twofold")?;
    let ours = run(Command::new(twofold).args(["run", "--"]).arg(&client))?;
    let kernel = match Path::new("/dev/kvm").exists() {
        true => run(&mut Command::new(&client))
            .inspect_err(|error| {
                eprintln!("the machine's own /dev/kvm was not measured: {error:#}")
            })
            .unwrap_or_default(),
        false => Figures::new(),
    };
    let row = |what, name: &str, scale: f64, unit, reach, obstacle| {
        let figure =
            |figures: &Figures| figures.get(name).map(|figure| Samples::one(figure * scale));
        let mut comparison = Comparison::of(figure(&ours).unwrap_or(Samples::one(f64::NAN)));
        comparison
            .peers
            .extend(figure(&kernel).map(|figure| ("this machine's /dev/kvm", figure)));
        Row {
            what,
            unit,
            reach,
            figures: comparison,
            obstacle: Cow::Borrowed(obstacle),
        }
    };
    Ok(vec![
        row(
            "`out` exit and re-entry through the ioctl",
            "out_exit",
            1e-3,
            "µs",
            Reach::AtMost(0.12),
            "the way from the instruction to the program and back",
        ),
        row(
            "second-stage fault, 4K, store to guest resumed",
            "fault_4k",
            1e-3,
            "µs",
            Reach::AtMost(1.0),
            "host memory is asked for page by page",
        ),
        row(
            "slot add and delete, 32,764 slots, by ioctl",
            "slot_add_delete",
            1.0,
            "ns",
            Reach::AtMost(1000.0),
            "deleting a slot waits for every thread of the guest",
        ),
    ])
}
