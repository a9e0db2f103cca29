//! A small virtual machine monitor whose guest uses its memory in every way that makes KVM change
//! second-stage entries, one access at a time.
//!
//! It says in a file what it is about to do, so that whoever traces the entries finds these lines in
//! between: the kernel's `trace_marker`, or wherever Twofold's log messages go. Nothing here knows
//! which of the two it runs on.
//!
//! ```text
//! guest-physical   0  the guest's code                                  4 pages
//!            256 MiB  memory of small pages                            64 pages
//!              1 GiB  memory of huge pages                                4 MiB
//!              2 GiB  nothing
//! ```

mod backing;
mod guest;
mod ring;
mod steps;
mod vm;

use std::process::ExitCode;

use anyhow::{Context, Result, bail};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("transitions: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (Some(part), Some(path)) = (arguments.next(), arguments.next()) else {
        bail!("usage: transitions PART FILE: does what PART names and says so in FILE");
    };
    let marks = std::fs::OpenOptions::new()
        .append(true)
        .open(&path)
        .with_context(|| format!("cannot write to {path}"))?;
    steps::run(&part, &marks)
}
