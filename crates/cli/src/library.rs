//! Where `libtwofold.so` is.

use std::env;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

const NAME: &str = "libtwofold.so";

/// Names another place for the library.
const VARIABLE: &str = "TWOFOLD_LIB";

/// Finds the library: where `TWOFOLD_LIB` says, beside the command, or in a `lib` folder beside
/// the command's own.
///
/// # Errors
/// It is nowhere, or its path cannot be written in `LD_PRELOAD`.
pub(crate) fn find() -> Result<PathBuf> {
    let path = match env::var_os(VARIABLE) {
        Some(path) => {
            let path = PathBuf::from(path);
            let path = if path.is_dir() { path.join(NAME) } else { path };
            ensure!(
                path.is_file(),
                "{VARIABLE} names {}, which is not a file",
                path.display()
            );
            path
        }
        None => find_beside(&env::current_exe().context("cannot find out where twofold is")?)?,
    };
    let path = path
        .canonicalize()
        .with_context(|| format!("cannot reach {}", path.display()))?;
    ensure!(
        can_be_preloaded(path.as_os_str()),
        "{} cannot be named in LD_PRELOAD, which ends names at spaces and colons; \
         put a copy elsewhere and set {VARIABLE} to its path",
        path.display()
    );
    Ok(path)
}

fn find_beside(command: &Path) -> Result<PathBuf> {
    let places = places(command);
    match places.iter().find(|place| place.is_file()) {
        Some(place) => Ok(place.clone()),
        None => {
            let places: Vec<_> = places
                .iter()
                .map(|place| place.display().to_string())
                .collect();
            bail!(
                "{NAME} is missing (looked for {}); build it with `cargo build -p twofold-preload` \
                 in the profile of this command, or set {VARIABLE} to its path",
                places.join(", ")
            )
        }
    }
}

/// The folders to look in, the likeliest first: cargo's and an archive's, then that of an installed
/// prefix.
fn places(command: &Path) -> Vec<PathBuf> {
    let folder = command.parent().unwrap_or(Path::new("/"));
    let mut places = vec![folder.join(NAME), folder.join("deps").join(NAME)];
    if let Some(prefix) = folder.parent() {
        places.push(prefix.join("lib").join(NAME));
        places.push(prefix.join("lib/twofold").join(NAME));
    }
    places
}

/// Whether the dynamic linker reads `path` as one name.
fn can_be_preloaded(path: &OsStr) -> bool {
    !path
        .as_bytes()
        .iter()
        .any(|byte| matches!(byte, b' ' | b':'))
}

/// `LD_PRELOAD` with the library in front of what is there already, once.
pub(crate) fn preload_list(library: &Path, already: Option<&OsStr>) -> std::ffi::OsString {
    let mut list = library.as_os_str().to_owned();
    let already = already.unwrap_or_default().as_bytes();
    for name in already.split(|byte| matches!(byte, b' ' | b':')) {
        if !name.is_empty() && name != library.as_os_str().as_bytes() {
            list.push(":");
            list.push(OsStr::from_bytes(name));
        }
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_library_comes_before_other_preloaded_ones_and_only_once() {
        let library = Path::new("/opt/lib/libtwofold.so");
        let list = |already: &str| preload_list(library, Some(OsStr::new(already)));
        assert_eq!(preload_list(library, None), "/opt/lib/libtwofold.so");
        assert_eq!(list(""), "/opt/lib/libtwofold.so");
        assert_eq!(list("/opt/lib/libtwofold.so"), "/opt/lib/libtwofold.so");
        assert_eq!(list("a.so /b.so"), "/opt/lib/libtwofold.so:a.so:/b.so");
    }

    #[test]
    fn a_path_with_a_space_or_a_colon_is_refused() {
        assert!(can_be_preloaded(OsStr::new("/a/libtwofold.so")));
        assert!(!can_be_preloaded(OsStr::new("/a b/libtwofold.so")));
        assert!(!can_be_preloaded(OsStr::new("/a:b/libtwofold.so")));
    }

    #[test]
    fn a_missing_library_is_reported_with_the_places_and_the_next_step() {
        let error = find_beside(Path::new("/nowhere/bin/twofold"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("/nowhere/bin/libtwofold.so"), "{error}");
        assert!(error.contains("/nowhere/lib/libtwofold.so"), "{error}");
        assert!(error.contains("TWOFOLD_LIB"), "{error}");
    }
}
