//! The same tests with every way to follow the guest's writes and accesses: the processor's log, its
//! dirty bits without a log, no accessed and dirty bits at all, and huge pages that are split late.

use std::process::Command;

#[test]
fn all_of_this_holds_in_every_mode_of_dirty_and_access_tracking() {
    let this = std::env::current_exe().unwrap();
    for (variable, value) in [
        ("TWOFOLD_PML", "N"),
        ("TWOFOLD_EPTAD", "N"),
        ("TWOFOLD_EAGER_PAGE_SPLIT", "N"),
        ("TWOFOLD_NX_HUGE_PAGES", "Y"),
    ] {
        let output = Command::new(&this)
            .env(variable, value)
            .args(["--skip", "in_every_mode"])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{variable}={value}:\n{text}");
        assert!(text.contains("row_10_"), "{variable}={value} ran nothing");
    }
}

/// What the processor cannot do is refused, not imitated.
#[test]
fn amds_processors_have_no_sub_pages_in_every_mode() {
    const NAME: &str = "modes::without_sub_pages_everything_about_them_is_refused";
    let output = Command::new(std::env::current_exe().unwrap())
        .env("TWOFOLD_SECOND_STAGE", "npt")
        .args(["--exact", NAME, "--ignored"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("1 passed"), "{text}");
}

#[test]
#[ignore = "needs an AMD processor: the test above runs it with one"]
fn without_sub_pages_everything_about_them_is_refused() {
    use super::*;
    let kvm = Fd::open();
    let vm = kvm.descriptor(KVM_CREATE_VM, 0);
    for fd in [&kvm, &vm] {
        assert_eq!(
            fd.call(KVM_CHECK_EXTENSION, KVM_CAP_X86_SPP as usize),
            Ok(0)
        );
    }
    assert_eq!(enable(&vm, KVM_CAP_X86_SPP, 0), Err(Errno::NODEV));
    assert_eq!(set_access(&vm, 0, &[]), Err(Errno::NODEV));
    assert_eq!(get_access(&vm, 0, 1), Err(Errno::NODEV));
}
