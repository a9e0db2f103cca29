//! Private memory and pre-faulting as a program sees them: runs `private-client` under Twofold, and
//! KVM's own selftest where it is built.

use crate::client::{beside_this_program, run};
use crate::measure::{Comparison, Meter, Samples};
use crate::report::{Reach, Row};
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

/// The rows. Their instructions are not counted: two processes and a kernel take part.
pub(crate) fn rows(meter: Meter) -> Result<Vec<Row>> {
    if meter == Meter::Instructions {
        return Ok(Vec::new());
    }
    let twofold = beside_this_program("twofold")?;
    let client = beside_this_program("private-client")?;
    let figures = run(Command::new(&twofold).args(["run", "--"]).arg(&client))?;
    let figure = |name: &str, scale: f64| {
        let figure = figures.get(name).map(|figure| figure * scale);
        Samples::one(figure.unwrap_or(f64::NAN))
    };
    let beside = |what, ours, peer: (&'static str, &str), reach, obstacle: &'static str| {
        let mut comparison = Comparison::of(figure(ours, 1.0));
        comparison.peers.push((peer.0, figure(peer.1, 1.0)));
        Row {
            what,
            unit: "ns",
            reach,
            figures: comparison,
            obstacle: obstacle.into(),
        }
    };
    let touching = "the guest touches each page";
    let mut rows = vec![
        beside(
            "pre-fault 1 GiB as 4K, host memory present, a page",
            "prefault_4k",
            (touching, "touch_4k"),
            Reach::AtMost(25.0),
            "the kernel is asked about every page",
        ),
        beside(
            "pre-fault 1 GiB with huge host pages, a 4K page's share",
            "prefault_2m",
            (touching, "touch_2m"),
            Reach::AtMost(25.0),
            "the host has no huge pages",
        ),
        alone(
            "the host kernel's own zeroing, a 4K page",
            "ns",
            figure("zero_4k", 1.0),
        ),
        alone(
            "convert 1 GiB that is mapped as 4K to private and back",
            "µs",
            figure("convert", 1e-3),
        ),
        alone(
            "flip one page's attribute among 1,000,000 ranges, by ioctl",
            "ns",
            figure("flip", 1.0),
        ),
    ];
    if let Some(test) = selftest() {
        rows.push(alone(
            "private_mem_conversions_test, all of it",
            "s",
            Samples::one(seconds(&twofold, &test)?),
        ));
    }
    Ok(rows)
}

/// A figure that nothing is set beside and that has no goal.
fn alone(what: &'static str, unit: &'static str, figure: Samples) -> Row {
    Row {
        what,
        unit,
        reach: Reach::Anything,
        figures: Comparison::of(figure),
        obstacle: "".into(),
    }
}

/// KVM's selftest, if `make conformance` has built it.
fn selftest() -> Option<PathBuf> {
    let folder = std::env::var_os("TWOFOLD_CONFORMANCE_DIR").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/conformance"),
        PathBuf::from,
    );
    let test = folder.join("selftests/bin/x86_64/private_mem_conversions_test");
    test.exists().then_some(test)
}

fn seconds(twofold: &Path, test: &Path) -> Result<f64> {
    let start = Instant::now();
    let status = Command::new(twofold)
        .args(["run", "--"])
        .arg(test)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .with_context(|| format!("starting {}", test.display()))?;
    ensure!(status.success(), "{} failed: {status}", test.display());
    Ok(start.elapsed().as_secs_f64())
}
