//! `twofold run`.

use std::env;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

use crate::program::{self, Weight};
use crate::{RunArguments, SecondStage, library};

/// Replaces this process by the program, with Twofold in front of its libc.
///
/// # Errors
/// The library or the program is missing, or the program cannot work on Twofold.
pub(crate) fn run(arguments: &RunArguments) -> Result<ExitCode> {
    let (name, rest) = arguments
        .program
        .split_first()
        .context("no program was given")?;
    let program = program::find(name)?;
    let examination = program::examine(&program)?;
    let mut prevented = false;
    for finding in &examination.findings {
        eprintln!(
            "twofold: {}: {}\n         {}",
            program.display(),
            finding.what,
            finding.next
        );
        prevented |= finding.weight == Weight::Prevents;
    }
    if prevented {
        bail!(
            "{} would not reach Twofold, so it was not started",
            program.display()
        );
    }

    let library = library::find()?;
    let mut command = Command::new(&program);
    command.arg0(name).args(rest);
    command.env(
        "LD_PRELOAD",
        library::preload_list(&library, env::var_os("LD_PRELOAD").as_deref()),
    );
    command.env(
        "TWOFOLD_SECOND_STAGE",
        match arguments.second_stage {
            SecondStage::Ept => "ept",
            SecondStage::Npt => "npt",
        },
    );
    if let Some(filter) = &arguments.log {
        command.env("TWOFOLD_LOG", filter);
    }
    if arguments.summary {
        command.env("TWOFOLD_SUMMARY", "1");
    }
    let error = command.exec();
    Err(error).with_context(|| format!("cannot start {}", program.display()))
}
