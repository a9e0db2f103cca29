//! Which paths are about KVM.

// UNSAFETY: reads the strings that the program passes.
#![expect(unsafe_code)]

use std::ffi::CStr;

use libc::c_char;
use twofold_kvm::abi;

/// What a path names, seen from a program that runs on Twofold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// `/dev/kvm`.
    Device,
    /// A parameter of one of KVM's kernel modules, with its contents.
    Parameter(&'static [u8]),
    /// A folder of a kernel module that Twofold stands for.
    ModuleFolder,
    /// Below a kernel module's folder, but Twofold has nothing there: whatever a real KVM on this
    /// machine may have there is not what the program runs on.
    Missing,
}

const DEVICE: &CStr = c"/dev/kvm";
const MODULES: &str = "/sys/module/kvm";

/// What `path` names; `None`, after looking at its first bytes, if it has nothing to do with KVM.
///
/// # Safety
/// `path` is null or a string that ends in a zero byte.
#[inline]
pub(crate) unsafe fn place(path: *const c_char) -> Option<Place> {
    if path.is_null() {
        return None;
    }
    // SAFETY: a string by the contract; no byte after a zero byte is read.
    let (first, second) = unsafe {
        if *path.cast::<u8>() != b'/' {
            return None;
        }
        (*path.cast::<u8>(), *path.cast::<u8>().add(1))
    };
    debug_assert_eq!(first, b'/');
    if second != b'd' && second != b's' {
        return None;
    }
    // SAFETY: as above.
    classify(unsafe { CStr::from_ptr(path) })
}

fn classify(path: &CStr) -> Option<Place> {
    if path == DEVICE {
        return Some(Place::Device);
    }
    let rest = path.to_str().ok()?.strip_prefix(MODULES)?;
    let (module, below) = rest.split_once('/').unwrap_or((rest, ""));
    let parameters: &[&CStr] = match module {
        "" => return Some(below_module(path, below)),
        // A module exists if its best-known parameter does.
        "_intel" => &[c"/sys/module/kvm_intel/parameters/ept"],
        "_amd" => &[c"/sys/module/kvm_amd/parameters/npt"],
        _ => return None,
    };
    if parameters
        .iter()
        .all(|parameter| abi::module_file(parameter).is_none())
    {
        return Some(Place::Missing);
    }
    Some(below_module(path, below))
}

fn below_module(path: &CStr, below: &str) -> Place {
    match below.trim_end_matches('/') {
        "" | "parameters" => Place::ModuleFolder,
        _ => abi::module_file(path).map_or(Place::Missing, Place::Parameter),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place_of(path: &CStr) -> Option<Place> {
        // SAFETY: a string.
        unsafe { place(path.as_ptr()) }
    }

    #[test]
    fn only_the_device_and_the_modules_are_about_kvm() {
        assert_eq!(place_of(c"/dev/kvm"), Some(Place::Device));
        for other in [
            c"",
            c"/",
            c"kvm",
            c"/dev/kvm2",
            c"/dev/null",
            c"/dev/kvm/x",
            c"/sys/module",
            c"/sys/module/kvmfr/parameters/static_size_mb",
        ] {
            assert_eq!(place_of(other), None, "{other:?}");
        }
        // SAFETY: null is allowed.
        assert_eq!(unsafe { place(std::ptr::null()) }, None);
    }

    #[test]
    fn a_module_parameter_has_contents_and_an_unknown_one_is_missing() {
        assert_eq!(
            place_of(c"/sys/module/kvm/parameters/force_emulation_prefix"),
            Some(Place::Parameter(b"0\n"))
        );
        assert_eq!(
            place_of(c"/sys/module/kvm/parameters/no_such"),
            Some(Place::Missing)
        );
        assert_eq!(place_of(c"/sys/module/kvm"), Some(Place::ModuleFolder));
        assert_eq!(
            place_of(c"/sys/module/kvm/parameters/"),
            Some(Place::ModuleFolder)
        );
    }
}
