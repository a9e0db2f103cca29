//! `twofold doctor`: says what is there, and what is in the way.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::io::Write as _;
use std::process::ExitCode;

use anyhow::Result;
use twofold_kvm::capability;

use crate::host::{self, RealKvm};
use crate::library;
use crate::program::{self, Weight};

/// Says what this machine has and what Twofold offers.
///
/// # Errors
/// None; what is missing is part of the answer, and of the exit status.
pub(crate) fn examine_host() -> Result<ExitCode> {
    let mut report = Report::default();

    report.heading("This machine");
    report.line("kernel", &host::kernel_release());
    report.line(
        "/dev/kvm of its own",
        &match host::real_kvm() {
            RealKvm::Usable(version) => {
                format!("yes, usable (API version {version}); `twofold run` does not use it")
            }
            RealKvm::Absent => "no; `twofold run` supplies one".to_owned(),
            RealKvm::Forbidden => "yes, but not for this user (join its group, usually kvm); \
                                   `twofold run` works without it"
                .to_owned(),
            RealKvm::Broken(why) => format!("unusable: {why}; `twofold run` works without it"),
        },
    );

    report.heading("What Twofold needs");
    match library::find() {
        Ok(path) => report.line("libtwofold.so", &path.display().to_string()),
        Err(error) => {
            report.line("libtwofold.so", &format!("NO: {error:#}"));
            report.well = false;
        }
    }
    for need in host::needs() {
        match (need.present, need.required) {
            (true, _) => report.line(need.name, "yes"),
            (false, true) => report.line(need.name, &format!("NO: {}", need.without)),
            (false, false) => {
                report.line(need.name, &format!("no, which is slower: {}", need.without));
            }
        }
        report.well &= need.present || !need.required;
    }

    report.heading("What Twofold offers");
    report.line(
        "KVM API version",
        &kvm_bindings::KVM_API_VERSION.to_string(),
    );
    report.line(
        "vCPUs of a VM",
        &format!(
            "{}, with ids below {}",
            capability::MAX_VCPUS,
            capability::MAX_VCPU_ID
        ),
    );
    report.line("memory slots of a VM", &capability::NR_MEMSLOTS.to_string());
    report.line(
        "processors",
        "Intel with EPT; AMD with NPT (--second-stage npt)",
    );
    report.text("capabilities, with what KVM_CHECK_EXTENSION answers:");
    for capability in capability::all() {
        report.line(
            &format!("  KVM_CAP_{}", capability.name),
            &capability.value.to_string(),
        );
    }

    if !report.well {
        report.heading("Twofold cannot work here: see what it needs, above.");
    }
    Ok(report.print())
}

/// Says what would keep a program from working on Twofold.
///
/// # Errors
/// The program is not there, or cannot be read.
pub(crate) fn examine_program(name: &OsStr) -> Result<ExitCode> {
    let path = program::find(name)?;
    let examination = program::examine(&path)?;
    let chain: Vec<_> = examination
        .chain
        .iter()
        .map(|path| path.display().to_string())
        .collect();

    let mut report = Report::default();
    report.heading(&chain.join(", which is interpreted by "));
    for finding in &examination.findings {
        let mark = match finding.weight {
            Weight::Prevents => {
                report.well = false;
                "cannot work"
            }
            Weight::Warns => "may not work",
        };
        report.text(&format!("{mark}: {}.\n    {}", finding.what, finding.next));
    }
    if examination.findings.is_empty() {
        report.text(&format!(
            "Nothing is in the way: `twofold run -- {}`",
            name.display()
        ));
    }
    Ok(report.print())
}

/// What is going to be printed, in headed groups of lines.
struct Report {
    text: String,
    /// Whether everything needed is there.
    well: bool,
}

impl Default for Report {
    fn default() -> Self {
        Self {
            text: String::new(),
            well: true,
        }
    }
}

impl Report {
    fn heading(&mut self, heading: &str) {
        let gap = if self.text.is_empty() { "" } else { "\n" };
        // Writing to a string cannot fail.
        let _ = writeln!(self.text, "{gap}{heading}");
    }

    fn line(&mut self, name: &str, value: &str) {
        let _ = writeln!(self.text, "  {name:<38} {value}");
    }

    fn text(&mut self, text: &str) {
        let _ = writeln!(self.text, "  {text}");
    }

    /// Prints the report; the exit status is 1 if something needed is missing.
    fn print(self) -> ExitCode {
        // Whoever closes the pipe early, like `head`, has read enough.
        let _ = std::io::stdout().write_all(self.text.as_bytes());
        if self.well {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }
}
