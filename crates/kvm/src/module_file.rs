//! The files under `/sys/module` that describe a loaded KVM.
//!
//! A machine without `/dev/kvm` has none of them, and programs take their absence for the absence
//! of KVM. The answers are those of a processor with two-dimensional paging.

use crate::second_stage::{self, Kind};
use std::ffi::CStr;

static COMMON: &[(&str, &[u8])] = &[
    ("/sys/module/kvm/parameters/force_emulation_prefix", b"0\n"),
    ("/sys/module/kvm/parameters/tdp_mmu", b"Y\n"),
    ("/sys/module/kvm/parameters/eager_page_split", b"Y\n"),
    ("/sys/module/kvm/parameters/enable_vmware_backdoor", b"N\n"),
    ("/sys/module/kvm/parameters/enable_pmu", b"N\n"),
    ("/sys/module/kvm/parameters/halt_poll_ns", b"0\n"),
    ("/sys/module/kvm/parameters/ignore_msrs", b"N\n"),
    ("/sys/module/kvm/parameters/report_ignored_msrs", b"Y\n"),
    ("/sys/module/kvm/parameters/nx_huge_pages", b"N\n"),
];

static INTEL: &[(&str, &[u8])] = &[
    ("/sys/module/kvm_intel/parameters/ept", b"Y\n"),
    ("/sys/module/kvm_intel/parameters/eptad", b"Y\n"),
    (
        "/sys/module/kvm_intel/parameters/unrestricted_guest",
        b"Y\n",
    ),
    ("/sys/module/kvm_intel/parameters/nested", b"N\n"),
    ("/sys/module/kvm_intel/parameters/pml", b"Y\n"),
    (
        "/sys/module/kvm_intel/parameters/allow_smaller_maxphyaddr",
        b"N\n",
    ),
];

static AMD: &[(&str, &[u8])] = &[
    ("/sys/module/kvm_amd/parameters/npt", b"Y\n"),
    ("/sys/module/kvm_amd/parameters/nested", b"0\n"),
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
    let off = match path {
        "/sys/module/kvm_intel/parameters/eptad" => !second_stage::has_accessed_dirty(),
        "/sys/module/kvm_intel/parameters/pml" => !second_stage::has_pml(),
        _ => false,
    };
    if off {
        return Some(b"N\n");
    }
    [COMMON, INTEL, AMD]
        .into_iter()
        .flatten()
        .find(|(known, _)| *known == path)
        .map(|(_, text)| *text)
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
