//! The files under `/sys/module` that describe a loaded KVM.
//!
//! A machine without `/dev/kvm` has none of them, and programs take their absence for the absence
//! of KVM. The answers are those of a processor with two-dimensional paging.

use crate::parameter::{self, Parameter};
use crate::second_stage::Kind;
use std::ffi::CStr;

/// What a file holds.
enum Text {
    Fixed(&'static str),
    /// What the environment says, or the default.
    Of(&'static Parameter),
}
use Text::{Fixed, Of};

static COMMON: &[(&str, Text)] = &[
    (
        "/sys/module/kvm/parameters/force_emulation_prefix",
        Fixed("0\n"),
    ),
    ("/sys/module/kvm/parameters/tdp_mmu", Fixed("Y\n")),
    (
        "/sys/module/kvm/parameters/eager_page_split",
        Of(&parameter::EAGER_PAGE_SPLIT),
    ),
    (
        "/sys/module/kvm/parameters/enable_vmware_backdoor",
        Fixed("N\n"),
    ),
    ("/sys/module/kvm/parameters/enable_pmu", Fixed("N\n")),
    ("/sys/module/kvm/parameters/halt_poll_ns", Fixed("0\n")),
    ("/sys/module/kvm/parameters/ignore_msrs", Fixed("N\n")),
    (
        "/sys/module/kvm/parameters/report_ignored_msrs",
        Fixed("Y\n"),
    ),
    (
        "/sys/module/kvm/parameters/nx_huge_pages",
        Of(&parameter::NX_HUGE_PAGES),
    ),
    (
        "/sys/module/kvm/parameters/nx_huge_pages_recovery_ratio",
        Of(&parameter::NX_RECOVERY_RATIO),
    ),
    (
        "/sys/module/kvm/parameters/nx_huge_pages_recovery_period_ms",
        Of(&parameter::NX_RECOVERY_PERIOD),
    ),
];

static INTEL: &[(&str, Text)] = &[
    ("/sys/module/kvm_intel/parameters/ept", Fixed("Y\n")),
    (
        "/sys/module/kvm_intel/parameters/eptad",
        Of(&parameter::EPTAD),
    ),
    (
        "/sys/module/kvm_intel/parameters/unrestricted_guest",
        Fixed("Y\n"),
    ),
    ("/sys/module/kvm_intel/parameters/nested", Fixed("N\n")),
    ("/sys/module/kvm_intel/parameters/pml", Of(&parameter::PML)),
    (
        "/sys/module/kvm_intel/parameters/allow_smaller_maxphyaddr",
        Fixed("N\n"),
    ),
];

static AMD: &[(&str, Text)] = &[
    ("/sys/module/kvm_amd/parameters/npt", Fixed("Y\n")),
    ("/sys/module/kvm_amd/parameters/nested", Fixed("0\n")),
    // Local APICs are not virtualised by a processor, with its faults.
    ("/sys/module/kvm_amd/parameters/avic", Fixed("N\n")),
];

/// The content of a module file that programs read, or `None` for any other path.
///
/// Programs choose between `kvm_intel` and `kvm_amd` by the processor that they run on, so the
/// files of both are there.
pub(crate) fn content(path: &CStr) -> Option<&'static [u8]> {
    let path = path.to_str().ok()?;
    if !path.starts_with("/sys/module/kvm") {
        return None;
    }
    [COMMON, INTEL, AMD]
        .into_iter()
        .flatten()
        .find(|(known, _)| *known == path)
        .map(|(_, text)| match text {
            Fixed(text) => text.as_bytes(),
            Of(parameter) => parameter.text().as_bytes(),
        })
}

/// The files of the module that a second stage belongs to.
pub fn paths(kind: Kind) -> impl Iterator<Item = &'static str> {
    let vendor = match kind {
        Kind::Ept => INTEL,
        Kind::Npt => AMD,
    };
    COMMON.iter().chain(vendor).map(|(path, _)| *path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_modules_own_files_are_answered() {
        assert_eq!(
            content(c"/sys/module/kvm/parameters/force_emulation_prefix"),
            Some(&b"0\n"[..])
        );
        assert_eq!(content(c"/sys/module/kvm/parameters/nonsense"), None);
        assert_eq!(content(c"/sys/module/loop/parameters/max_part"), None);
        assert!(paths(Kind::Npt).any(|path| path.ends_with("/npt")));
    }
}
