//! A module that is busy and interrupted on purpose: programs notice nothing but `EBUSY` from
//! `FINALIZE_VM`, as on hardware.

use super::*;
use std::process::Command as Process;

const VARIABLE: &str = "TWOFOLD_TDX_INJECT";

/// Runs tests of this file's neighbours in a process whose module fails on purpose.
fn passes_with(injection: &str, tests: &[&str]) {
    let output = Process::new(std::env::current_exe().unwrap())
        .args(tests)
        .env(VARIABLE, injection)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "with {injection}:\n{text}");
    assert!(!text.contains("running 0 tests"), "{text}");
}

#[test]
fn every_other_test_passes_although_locks_are_found_taken() {
    for injection in [
        "busy=2",
        "busy=3,interrupt=2",
        "busy=2,seed=5",
        "tree=2,entry=3",
    ] {
        passes_with(injection, &["--skip", "busy::"]);
    }
}

#[test]
fn a_module_that_is_always_busy_ends_in_an_error_that_names_it() {
    const NAME: &str = "busy::a_module_that_is_always_busy_ends_in_an_error_that_names_it";
    if std::env::var_os(VARIABLE).is_none() {
        return passes_with("td=1", &["--exact", NAME]);
    }
    let kvm = Fd::open();
    let vm = kvm.descriptor(KVM_CREATE_VM, KVM_X86_TDX_VM as usize);
    let request = InitVm::new(48);
    let mut command = Command {
        id: INIT_VM,
        data: address(&request),
        ..Default::default()
    };
    let result = vm.with(KVM_MEMORY_ENCRYPT_OP, &mut command);
    assert_eq!(result, Err(Errno::IO));
    assert_eq!(command.hw_error, 0x8000_0200_0000_0080, "OPERAND_BUSY, TDR");
    assert_eq!(init_vm(&vm, &request), Err(Errno::IO), "it is dead");
}

#[test]
fn finalize_says_that_the_module_is_busy_and_succeeds_later() {
    const NAME: &str = "busy::finalize_says_that_the_module_is_busy_and_succeeds_later";
    if std::env::var_os(VARIABLE).is_none() {
        return passes_with("td=2", &["--exact", NAME]);
    }
    let td = Td::new();
    let try_it = || {
        let mut command = Command {
            id: FINALIZE_VM,
            ..Default::default()
        };
        let result = td.vm.with(KVM_MEMORY_ENCRYPT_OP, &mut command);
        (result, command.hw_error >> 32)
    };
    let answers = [try_it(), try_it()];
    let busy = (Err(Errno::BUSY), 0x8000_0200);
    assert!(answers.contains(&(Ok(0), 0)), "{answers:?}");
    assert!(answers[0] == busy || answers[1] == (Err(Errno::INVAL), 0));
}
