//! The command as its user meets it: what it prints, and its exit status.

#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn twofold(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_twofold"))
        .args(arguments)
        .env_remove("LD_PRELOAD")
        .env_remove("TWOFOLD_LIB")
        .output()
        .unwrap()
}

/// Standard output and standard error, in this order.
fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[track_caller]
fn assert_says(output: &Output, status: i32, words: &[&str]) {
    let text = text(output);
    assert_eq!(output.status.code(), Some(status), "{text}");
    for word in words {
        assert!(text.contains(word), "`{word}` is missing in: {text}");
    }
}

/// A folder of this test's own.
fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::create_dir_all(&folder).unwrap();
    folder
}

/// Compiles an empty program.
fn compile(name: &str, options: &[&str]) -> String {
    let folder = folder(name);
    let source = folder.join("empty.c");
    let program = folder.join(name);
    fs::write(&source, "int main(void) { return 0; }\n").unwrap();
    let output = Command::new("gcc")
        .args(options)
        .arg("-o")
        .arg(&program)
        .arg(source)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", text(&output));
    program.into_os_string().into_string().unwrap()
}

fn script(name: &str, contents: &[u8]) -> String {
    let path = folder("scripts").join(name);
    fs::write(&path, contents).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path.into_os_string().into_string().unwrap()
}

#[test]
fn help_names_the_two_commands() {
    assert_says(&twofold(&["--help"]), 0, &["run", "doctor", "/dev/kvm"]);
    assert_says(
        &twofold(&["run", "--help"]),
        0,
        &["--summary", "--second-stage", "--log", "-- "],
    );
    assert_says(&twofold(&[]), 2, &["Usage"]);
}

#[test]
fn a_program_that_does_not_exist_is_named_with_the_next_step() {
    let output = twofold(&["run", "--", "no-such-program"]);
    assert_says(
        &output,
        127,
        &["no-such-program", "PATH", "./no-such-program"],
    );
    assert_says(
        &twofold(&["run", "--", "./none/at/all"]),
        127,
        &["does not exist"],
    );
    assert_says(
        &twofold(&["doctor", "no-such-program"]),
        127,
        &["no-such-program"],
    );
}

#[test]
fn what_cannot_be_executed_is_refused() {
    assert_says(
        &twofold(&["run", "--", "/etc/passwd"]),
        126,
        &["not executable", "chmod"],
    );
    assert_says(&twofold(&["run", "--", "/etc/"]), 126, &["folder"]);
}

#[test]
fn a_missing_library_is_named_with_the_next_step() {
    let output = Command::new(env!("CARGO_BIN_EXE_twofold"))
        .args(["run", "--", "/bin/true"])
        .env("TWOFOLD_LIB", "/nonexistent/libtwofold.so")
        .output()
        .unwrap();
    assert_says(&output, 126, &["TWOFOLD_LIB", "/nonexistent/libtwofold.so"]);
}

#[test]
fn a_static_program_is_refused_with_the_reason_and_the_remedy() {
    let program = compile("static", &["-static"]);
    assert_says(
        &twofold(&["doctor", &program]),
        1,
        &["statically linked", "dynamically"],
    );
    assert_says(
        &twofold(&["run", "--", &program]),
        126,
        &["statically linked", "dynamically"],
    );
    let program = compile("static-pie", &["-static-pie"]);
    assert_says(&twofold(&["doctor", &program]), 1, &["statically linked"]);
}

#[test]
fn a_program_for_another_machine_is_refused() {
    let program = compile("foreign", &[]);
    let mut image = fs::read(&program).unwrap();
    // e_machine: EM_AARCH64.
    image[18..20].copy_from_slice(&183_u16.to_le_bytes());
    fs::write(&program, image).unwrap();
    assert_says(&twofold(&["doctor", &program]), 1, &["AARCH64", "x86-64"]);
}

#[test]
fn an_ordinary_program_has_nothing_in_the_way() {
    let program = compile("ordinary", &[]);
    assert_says(
        &twofold(&["doctor", &program]),
        0,
        &["Nothing is in the way"],
    );
    assert_says(
        &twofold(&["doctor", "sh"]),
        0,
        &["/sh", "Nothing is in the way"],
    );
}

#[test]
fn a_script_is_judged_by_its_interpreter() {
    let good = script("good", b"#!/bin/sh\n");
    assert_says(&twofold(&["doctor", &good]), 0, &["interpreted by /bin/sh"]);
    let program = compile("interpreter", &["-static"]);
    let bad = script("bad", format!("#!{program}\n").as_bytes());
    assert_says(&twofold(&["doctor", &bad]), 1, &["statically linked"]);
    let lost = script("lost", b"#!/nonexistent/sh\n");
    assert_says(&twofold(&["doctor", &lost]), 127, &["/nonexistent/sh"]);
    let circle = folder("scripts").join("circle");
    let circle = script("circle", format!("#!{}\n", circle.display()).as_bytes());
    assert_says(&twofold(&["doctor", &circle]), 126, &["circle"]);
    let none = script("none", b"echo\n");
    assert_says(
        &twofold(&["doctor", &none]),
        1,
        &["neither an ELF program nor a script"],
    );
}

#[test]
fn doctor_lists_what_there_is() {
    let output = twofold(&["doctor"]);
    let text = text(&output);
    for word in [
        "/dev/kvm",
        "membarrier",
        "KVM_CAP_USER_MEMORY ",
        "memory slots",
        "32764",
    ] {
        assert!(text.contains(word), "`{word}` is missing in: {text}");
    }
}

#[test]
fn a_reader_that_stops_early_is_no_error() {
    let output = Command::new("sh")
        .args([
            "-c",
            "\"$0\" doctor | head -n 1",
            env!("CARGO_BIN_EXE_twofold"),
        ])
        .output()
        .unwrap();
    assert!(output.stderr.is_empty(), "{}", text(&output));
}

#[test]
fn the_hello_guest_runs_on_twofold() {
    let profile: &[&str] = if cfg!(debug_assertions) {
        &[]
    } else {
        &["--release"]
    };
    let built = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "-p", "twofold-preload", "-p", "hello"])
        .args(profile)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(built.status.success(), "{}", text(&built));
    let hello = Path::new(env!("CARGO_BIN_EXE_twofold")).with_file_name("hello");
    let hello = hello.to_str().unwrap();

    for second_stage in ["ept", "npt"] {
        let arguments = [
            "run",
            "--summary",
            "--second-stage",
            second_stage,
            "--",
            hello,
        ];
        let output = twofold(&arguments);
        assert_says(
            &output,
            0,
            &[
                "running on Twofold",
                "Page fault at 0x00000001c0123458",
                "guest finished",
                "mmio 2",
                "hlt 1",
            ],
        );
        // How many pages depends on how large the host's are, but there are some.
        let summary = text(&output);
        assert!(summary.contains("mappings made"), "{summary}");
        assert!(!summary.contains("4K 0, 2M 0, 1G 0"), "{summary}");
    }
}

#[test]
fn the_tdx_guest_is_what_its_vmm_measured_whether_the_module_is_busy_or_not() {
    let profile: &[&str] = if cfg!(debug_assertions) {
        &[]
    } else {
        &["--release"]
    };
    let built = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "-p", "twofold-preload", "-p", "tdx"])
        .args(profile)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(built.status.success(), "{}", text(&built));
    let tdx = Path::new(env!("CARGO_BIN_EXE_twofold")).with_file_name("tdx");
    let tdx = tdx.to_str().unwrap();

    for injection in ["", "busy=2", "busy=5,seed=1"] {
        let output = Command::new(env!("CARGO_BIN_EXE_twofold"))
            .args(["run", "--", tdx])
            .env("TWOFOLD_TDX_INJECT", injection)
            .output()
            .unwrap();
        assert_says(
            &output,
            0,
            &[
                "built and measured: ",
                "registers cannot be read: Invalid argument",
                "the guest reads the device",
                "the guest is what was measured",
            ],
        );
    }
}

#[test]
fn the_private_guest_keeps_its_secrets_from_the_program_that_runs_it() {
    let profile: &[&str] = if cfg!(debug_assertions) {
        &[]
    } else {
        &["--release"]
    };
    let built = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "-p", "twofold-preload", "-p", "private"])
        .args(profile)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(built.status.success(), "{}", text(&built));
    let private = Path::new(env!("CARGO_BIN_EXE_twofold")).with_file_name("private");
    let private = private.to_str().unwrap();

    for second_stage in ["ept", "npt"] {
        let output = twofold(&["run", "--second-stage", second_stage, "--", private]);
        assert_says(
            &output,
            0,
            &[
                "cannot be mapped: No such device",
                "step 1: from outside the pages look like ................",
                "step 3: from outside the pages look like 0.0.0.0.0.0.0.0.",
                "a private access to 0x40200000",
                "step 6: from outside the pages look like 0000000000000000",
                "no private byte was seen outside",
            ],
        );
    }
}

#[test]
fn the_guarded_guest_changes_its_kernel_only_as_the_kernel_does() {
    let profile: &[&str] = if cfg!(debug_assertions) {
        &[]
    } else {
        &["--release"]
    };
    let built = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "-p", "twofold-preload", "-p", "spp"])
        .args(profile)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(built.status.success(), "{}", text(&built));
    let spp = Path::new(env!("CARGO_BIN_EXE_twofold")).with_file_name("spp");
    let spp = spp.to_str().unwrap();

    let output = twofold(&["run", "--summary", "--second-stage", "ept", "--", spp]);
    assert_says(
        &output,
        0,
        &[
            "exploit+0x0 wants to write credentials+0x0",
            "gpa 0x180310): dropped",
            "hook+0x7 wants to write system calls+0xd8",
            "overflow+0xf wants to write credentials+0x0",
            "set_user+0x0 wants to write credentials+0x0",
            "both are intact: user 1001, group 1000, no capabilities",
            // The boot, five reports, one step, the end; of 4000 other writes none.
            "guarding pieces   took      8 exits",
        ],
    );
    assert!(text(&output).contains("spp 4"), "{}", text(&output));

    let output = twofold(&["run", "--second-stage", "npt", "--", spp]);
    assert_says(&output, 1, &["this KVM does not protect sub-pages"]);
}
