//! Sub-page write protection as a program sees it: runs `spp-client` under Twofold, and the example
//! that guards a kernel's structures.

use crate::client::{Figures, beside_this_program, run};
use crate::measure::{Comparison, Meter, Samples};
use crate::report::{Reach, Row};
use anyhow::{Context, Result, ensure};
use std::process::Command;

/// The rows. Their instructions are not counted: two processes take part.
pub(crate) fn rows(meter: Meter) -> Result<Vec<Row>> {
    if meter == Meter::Instructions {
        return Ok(Vec::new());
    }
    let twofold = beside_this_program("twofold")?;
    let client = beside_this_program("spp-client")?;
    let on_twofold = || {
        let mut command = Command::new(&twofold);
        command.args(["run", "--second-stage", "ept", "--"]);
        command
    };
    let mut figures = run(on_twofold().arg(&client))?;
    figures.extend(watching(on_twofold().arg(beside_this_program("spp")?))?);
    let figure = |name: &str, scale: f64| {
        let figure = figures.get(name).map(|figure| figure * scale);
        Samples::one(figure.unwrap_or(f64::NAN))
    };
    let row = |what, unit, ours, scale, peer: Option<(&'static str, &str)>, reach| {
        let mut comparison = Comparison::of(figure(ours, scale));
        comparison
            .peers
            .extend(peer.map(|(name, peer)| (name, figure(peer, scale))));
        Row {
            what,
            unit,
            reach,
            figures: comparison,
            obstacle: "".into(),
        }
    };
    let anything = Reach::Anything;
    let ordinary = Some(("sub-pages not enabled", "store_without"));
    Ok(vec![
        row(
            "a store in a loop, sub-pages enabled, page not protected",
            "ns",
            "store_with",
            1.0,
            ordinary,
            anything,
        ),
        row(
            "a permitted store in a loop, page protected",
            "ns",
            "store_permitted",
            1.0,
            ordinary,
            anything,
        ),
        row(
            "a denied store: exit to the program and re-entry",
            "ns",
            "denied",
            1.0,
            Some(("`out` exit", "out")),
            anything,
        ),
        row(
            "set other maps for 512 pages, by ioctl",
            "µs",
            "set_512",
            1e-3,
            Some(("get them", "get_512")),
            anything,
        ),
        row(
            "examples/spp, 4,000 writes beside what is guarded: exits",
            "",
            "pieces_exits",
            1.0,
            Some(("the whole page guarded", "page_exits")),
            anything,
        ),
        row(
            "the same: time",
            "ms",
            "pieces_ms",
            1.0,
            Some(("the whole page guarded", "page_ms")),
            anything,
        ),
    ])
}

/// What the example says of its two ways to guard: `guarding pieces took 8 exits and 0.1 ms`.
fn watching(command: &mut Command) -> Result<Figures> {
    let output = command.output().context("starting the example")?;
    ensure!(output.status.success(), "examples/spp failed");
    let mut figures = Figures::new();
    for line in String::from_utf8(output.stdout)?.lines() {
        let Some(rest) = line.trim().strip_prefix("guarding ") else {
            continue;
        };
        let name = if rest.starts_with("pieces") {
            "pieces"
        } else {
            "page"
        };
        let numbers: Vec<f64> = rest
            .split_whitespace()
            .filter_map(|word| word.parse().ok())
            .collect();
        if let [exits, ms] = numbers[..] {
            figures.insert(format!("{name}_exits"), exits);
            figures.insert(format!("{name}_ms"), ms);
        }
    }
    Ok(figures)
}
