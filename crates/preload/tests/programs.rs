//! Small C programs, run with `libtwofold.so` in front of their libc.
//!
//! Each checks itself and names what failed. Those that say nothing about Twofold alone are also
//! run without it where this machine has a usable `/dev/kvm`: what they expect must be what KVM
//! does.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a helper that fails fails its test"
)]

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

/// The library in this test's profile. Cargo builds no `cdylib` for tests, as they cannot link to
/// it, so this does.
fn library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["build", "--quiet", "--package", "twofold-preload"]);
        if !cfg!(debug_assertions) {
            cargo.arg("--release");
        }
        let output = cargo
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .output()
            .unwrap();
        assert_success("cargo build", &output);
        let test = std::env::current_exe().unwrap();
        let library = test.with_file_name("libtwofold.so");
        assert!(library.is_file(), "{} is missing", library.display());
        library
    })
}

fn has_real_kvm() -> bool {
    File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_ok()
}

/// Compiles `tests/programs/NAME.c`.
fn compile(name: &str) -> PathBuf {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs");
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let output = Command::new("gcc")
        .args(["-Wall", "-Wextra", "-Werror", "-O1", "-pthread", "-o"])
        .arg(&program)
        .arg(sources.join(name).with_extension("c"))
        .output()
        .expect("gcc should be installed");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    program
}

/// A command that is killed if it hangs.
fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("timeout");
    command
        .args(["--kill-after=1", "60"])
        .arg(program)
        .env_remove("LD_PRELOAD");
    command
}

fn on_twofold(program: impl AsRef<OsStr>) -> Command {
    let mut command = command(program);
    command.env("LD_PRELOAD", library());
    command
}

#[track_caller]
fn assert_success(what: &str, output: &Output) {
    assert!(
        output.status.success(),
        "{what} ended with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
}

#[track_caller]
fn check_on_twofold(name: &str) {
    let program = compile(name);
    assert_success(
        &format!("{name} on Twofold"),
        &on_twofold(&program).output().unwrap(),
    );
}

#[track_caller]
fn check_on_both(name: &str) {
    check_on_twofold(name);
    if has_real_kvm() {
        let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        assert_success(
            &format!("{name} on the real KVM"),
            &command(&program).output().unwrap(),
        );
    }
}

#[test]
fn the_device_and_the_module_parameters_are_found_by_every_call() {
    check_on_both("paths");
}

#[test]
fn descriptors_are_copied_and_closed_by_every_call() {
    check_on_both("descriptors");
}

#[test]
fn handlers_run_when_kvm_run_has_returned() {
    check_on_both("deferred_signals");
}

#[test]
fn a_signal_let_through_by_the_run_mask_stays_pending() {
    check_on_both("signal_mask");
}

#[test]
fn faults_of_the_program_go_to_the_program() {
    check_on_both("faults");
}

#[test]
fn a_child_cannot_use_its_parents_vm() {
    check_on_both("children");
}

#[test]
fn guest_memory_that_vanishes_ends_the_run_and_not_the_program() {
    check_on_twofold("vanished_memory");
}

#[test]
fn an_allocator_that_unmaps_what_is_freed_does_not_block_the_library() {
    check_on_both("allocator");
}

// ---- programs that have nothing to do with KVM --------------------------------------------------

/// What `script` prints and how it ends, without and with the library.
#[track_caller]
fn assert_same(script: &str) {
    let run = |mut command: Command| command.args(["-c", script]).output().unwrap();
    let without = run(command("sh"));
    let with = run(on_twofold("sh"));
    assert_eq!(with.status.code(), without.status.code(), "{script}");
    assert_eq!(
        String::from_utf8_lossy(&with.stdout),
        String::from_utf8_lossy(&without.stdout),
        "{script}"
    );
    assert_eq!(
        String::from_utf8_lossy(&with.stderr),
        String::from_utf8_lossy(&without.stderr),
        "{script}"
    );
}

#[test]
fn other_programs_do_not_notice() {
    for script in [
        "cat /etc/passwd | sort | head -n 3; exit 3",
        "ls -l /proc/self/exe /nonexistent | wc -l",
        "trap 'echo caught' USR1; kill -USR1 $$; (exit 7); echo $?",
        "sh -c 'kill -SEGV $$'; echo $?",
        "grep -E '^Sig(Cgt|Ign|Blk)' /proc/self/status",
        "ls /proc/self/fd | wc -l",
        "stat -c '%F %a' /dev/null /sys/kernel /etc/passwd",
    ] {
        assert_same(script);
    }
}

/// The names that a shared library defines, without the versions that glibc adds.
fn exported_names(library: &Path) -> HashSet<String> {
    let output = Command::new("nm")
        .args(["--dynamic", "--defined-only", "--format=posix"])
        .arg(library)
        .output()
        .expect("nm should be installed, as it comes with gcc");
    assert_success("nm", &output);
    let names = String::from_utf8(output.stdout).unwrap();
    names
        .lines()
        .filter_map(|line| line.split([' ', '@']).next())
        .map(str::to_owned)
        .collect()
}

#[test]
fn the_library_exports_names_of_libc_and_nothing_else() {
    let libc = Command::new("gcc")
        .arg("-print-file-name=libc.so.6")
        .output()
        .unwrap();
    let libc = exported_names(Path::new(String::from_utf8(libc.stdout).unwrap().trim()));
    let ours = exported_names(library());
    assert!(ours.contains("ioctl"));
    assert_eq!(
        ours.difference(&libc).collect::<Vec<_>>(),
        Vec::<&String>::new()
    );
}
