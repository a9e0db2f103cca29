//! The `twofold` command: runs KVM programs where there is no `/dev/kvm`, and says what would keep
//! them from running.

mod doctor;
mod host;
mod library;
mod program;
mod run;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};

/// Run KVM programs where there is no KVM.
///
/// A program started with `twofold run` finds a /dev/kvm whether the machine has one or not. Its
/// guests execute on a software processor, and their memory is translated by real EPT or NPT
/// tables.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true, max_term_width = 90)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a program with Twofold as its /dev/kvm
    ///
    /// The program must be dynamically linked and reach KVM through libc; `twofold doctor PROGRAM`
    /// says whether it does. Programs that it starts find Twofold too.
    #[command(override_usage = "twofold run [OPTIONS] -- PROGRAM [ARGS]...")]
    #[command(after_long_help = "\
Examples:
  twofold run -- ./my-vmm --kernel bzImage
  twofold run --summary -- target/release/hello
  twofold run --log twofold_mmu=debug,warn -- ./my-vmm")]
    Run(RunArguments),

    /// Say what this machine and Twofold offer, or what would keep a program from working
    ///
    /// The exit status is 1 if something keeps the program, or Twofold itself, from working.
    Doctor {
        /// The program to examine: a path, or a name to be found in PATH
        program: Option<OsString>,
    },
}

#[derive(Debug, clap::Args)]
struct RunArguments {
    /// Which of Twofold's messages to show, for example `debug` or `twofold_mmu=trace,warn`
    #[arg(long, value_name = "FILTER")]
    log: Option<String>,

    /// How the processor translates guest-physical addresses: Intel's way or AMD's
    #[arg(long, value_enum, value_name = "KIND", default_value_t = SecondStage::Ept)]
    second_stage: SecondStage,

    /// When the program ends, print what its guests did to standard error
    #[arg(long)]
    summary: bool,

    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    #[arg(value_name = "PROGRAM")]
    program: Vec<OsString>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum SecondStage {
    /// An Intel processor with extended page tables
    Ept,
    /// An AMD processor with nested paging
    Npt,
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Run(arguments) => run::run(&arguments),
        Command::Doctor { program: None } => doctor::examine_host(),
        Command::Doctor {
            program: Some(program),
        } => doctor::examine_program(&program),
    };
    result.unwrap_or_else(|error| {
        eprintln!("twofold: {error:#}");
        // The shell's own statuses for a command that is not there or cannot be started.
        let not_found = error.downcast_ref::<program::NotFound>().is_some();
        ExitCode::from(if not_found { 127 } else { 126 })
    })
}
