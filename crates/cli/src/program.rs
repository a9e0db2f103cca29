//! What a program is, and what in it would keep Twofold out.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use goblin::elf::{Elf, header, program_header};

/// A program that is not there.
#[derive(Debug)]
pub(crate) struct NotFound(OsString);

impl fmt::Display for NotFound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.0.display();
        if self.0.as_bytes().contains(&b'/') {
            write!(f, "{name} does not exist; check the path")
        } else {
            write!(
                f,
                "{name} was not found in PATH; give its path, for example ./{name}"
            )
        }
    }
}

impl std::error::Error for NotFound {}

/// Finds a program as a shell would: by its path, or by its name in `PATH`.
///
/// # Errors
/// [`NotFound`], or what was found cannot be executed.
pub(crate) fn find(name: &OsStr) -> Result<PathBuf> {
    if name.as_bytes().contains(&b'/') {
        let path = PathBuf::from(name);
        let status = fs::metadata(&path).map_err(|_| NotFound(name.to_owned()))?;
        anyhow::ensure!(
            !status.is_dir(),
            "{} is a folder, not a program",
            path.display()
        );
        anyhow::ensure!(
            is_executable(&status),
            "{0} is not executable; `chmod +x {0}` if it is a program",
            path.display()
        );
        return Ok(path);
    }
    env::split_paths(&env::var_os("PATH").unwrap_or_default())
        .map(|folder| folder.join(name))
        .find(|path| fs::metadata(path).is_ok_and(|status| is_executable(&status)))
        .ok_or_else(|| NotFound(name.to_owned()).into())
}

fn is_executable(status: &fs::Metadata) -> bool {
    status.is_file() && status.permissions().mode() & 0o111 != 0
}

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Weight {
    /// The program cannot work on Twofold.
    Prevents,
    /// It may work; or parts of it do not.
    Warns,
}

/// Something about a program that stands between it and Twofold.
#[derive(Debug)]
pub(crate) struct Finding {
    /// How much it matters.
    pub(crate) weight: Weight,
    /// What it is: a clause without a capital or a full stop.
    pub(crate) what: String,
    /// What to do about it: a sentence.
    pub(crate) next: &'static str,
}

/// What an examination of a program found.
#[derive(Debug)]
pub(crate) struct Examination {
    /// What the kernel will load: the program itself, or the interpreters of a script before it.
    pub(crate) chain: Vec<PathBuf>,
    /// What stands in the way, in the order in which it was met.
    pub(crate) findings: Vec<Finding>,
}

/// The kernel follows so many interpreters of interpreters.
const MOST_INTERPRETERS: usize = 4;

/// Looks at a program, and at the interpreters that it needs if it is a script.
///
/// # Errors
/// A file cannot be read, or an interpreter does not exist.
pub(crate) fn examine(program: &Path) -> Result<Examination> {
    let mut examination = Examination {
        chain: Vec::new(),
        findings: Vec::new(),
    };
    let mut path = program.to_owned();
    loop {
        examination.chain.push(path.clone());
        let contents = read(&path)?;
        let Some((interpreter, argument)) = interpreter(&contents) else {
            examination.findings.extend(privileges(&path)?);
            examination.findings.extend(examine_image(&contents));
            return Ok(examination);
        };
        anyhow::ensure!(
            examination.chain.len() <= MOST_INTERPRETERS,
            "{}: the interpreters of this script go round in a circle",
            program.display()
        );
        let next = interpreter_program(&interpreter, argument.as_deref());
        path = find(&next).with_context(|| {
            format!(
                "{} needs the interpreter {}",
                path.display(),
                next.display()
            )
        })?;
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let mut contents = Vec::new();
    File::open(path)
        .and_then(|mut file| file.read_to_end(&mut contents))
        .with_context(|| format!("cannot read {}", path.display()))?;
    Ok(contents)
}

/// Interpreter and argument of a script's first line.
fn interpreter(contents: &[u8]) -> Option<(OsString, Option<OsString>)> {
    let line = contents
        .strip_prefix(b"#!")?
        .split(|byte| *byte == b'\n')
        .next()?;
    let line = line.trim_ascii();
    let end = line
        .iter()
        .position(u8::is_ascii_whitespace)
        .unwrap_or(line.len());
    let (interpreter, argument) = line.split_at(end);
    if interpreter.is_empty() {
        return None;
    }
    let argument = argument.trim_ascii();
    let argument = (!argument.is_empty()).then(|| OsString::from_vec(argument.to_vec()));
    Some((OsString::from_vec(interpreter.to_vec()), argument))
}

/// What will really interpret: `/usr/bin/env NAME` looks `NAME` up.
fn interpreter_program(interpreter: &OsStr, argument: Option<&OsStr>) -> OsString {
    let is_env = Path::new(interpreter).file_name() == Some(OsStr::new("env"));
    match argument {
        Some(argument) if is_env => argument
            .as_bytes()
            .split(u8::is_ascii_whitespace)
            .find(|word| !word.is_empty() && !word.starts_with(b"-") && !word.contains(&b'='))
            .map_or_else(
                || interpreter.to_owned(),
                |word| OsString::from_vec(word.to_vec()),
            ),
        _ => interpreter.to_owned(),
    }
}

// ---- privileges ---------------------------------------------------------------------------------

/// What makes the kernel start a program in secure mode, in which nothing is preloaded.
fn privileges(path: &Path) -> Result<Option<Finding>> {
    let status = fs::metadata(path)?;
    let what = elevation(
        status.mode(),
        (status.uid(), rustix::process::getuid().as_raw()),
        (status.gid(), rustix::process::getgid().as_raw()),
    );
    let what = what.or_else(|| {
        let mut value = [0_u8; 64];
        let name = c"security.capability";
        let present = rustix::fs::getxattr(path, name, &mut value).is_ok();
        (present && !rustix::process::getuid().is_root()).then_some("has file capabilities")
    });
    Ok(what.map(|what| Finding {
        weight: Weight::Prevents,
        what: format!("it {what}, so the dynamic linker ignores LD_PRELOAD"),
        next: "Run a copy of it: `cp` leaves these privileges behind.",
    }))
}

/// Whether a file with this mode gains an identity; owner and runner are given in pairs.
fn elevation(mode: u32, user: (u32, u32), group: (u32, u32)) -> Option<&'static str> {
    if mode & libc::S_ISUID != 0 && user.0 != user.1 {
        return Some("is set-uid");
    }
    // Without the execute bit of the group, set-gid means mandatory locking.
    let set_gid = libc::S_ISGID | libc::S_IXGRP;
    (mode & set_gid == set_gid && group.0 != group.1).then_some("is set-gid")
}

// ---- the image ----------------------------------------------------------------------------------

/// What in an executable file stands in the way.
fn examine_image(contents: &[u8]) -> Vec<Finding> {
    if !contents.starts_with(header::ELFMAG) {
        return vec![Finding {
            weight: Weight::Prevents,
            what: "it is neither an ELF program nor a script with an interpreter".to_owned(),
            next: "Give a program for Linux on x86-64.",
        }];
    }
    let elf = match Elf::parse(contents) {
        Ok(elf) => elf,
        Err(error) => {
            return vec![Finding {
                weight: Weight::Prevents,
                what: format!("its ELF structures are broken ({error})"),
                next: "Build or download it again.",
            }];
        }
    };
    if elf.header.e_machine != header::EM_X86_64 || !elf.is_64 {
        let machine = header::machine_to_str(elf.header.e_machine);
        let bits = if elf.is_64 { 64 } else { 32 };
        return vec![Finding {
            weight: Weight::Prevents,
            what: format!("it is a {bits}-bit program for {machine}"),
            next: "Twofold runs 64-bit x86-64 programs: build it for that.",
        }];
    }
    // The reasons that follow exclude one another's remedies; the first one is the one to solve.
    let found = if is_go(&elf) {
        Some(Finding {
            weight: Weight::Prevents,
            what: "it is a Go program, which makes its system calls without libc".to_owned(),
            next: "Twofold cannot reach these calls yet; there is no build option that helps.",
        })
    } else {
        linking(&elf).or_else(|| inline_ioctl(&elf, contents))
    };
    found.into_iter().collect()
}

fn is_go(elf: &Elf<'_>) -> bool {
    elf.section_headers.iter().any(|section| {
        let name = elf.shdr_strtab.get_at(section.sh_name);
        matches!(
            name,
            Some(".go.buildinfo" | ".note.go.buildid" | ".gopclntab")
        )
    })
}

fn linking(elf: &Elf<'_>) -> Option<Finding> {
    match elf.interpreter {
        None => Some(Finding {
            weight: Weight::Prevents,
            what: "it is statically linked, so nothing can be preloaded into it".to_owned(),
            next: "Link it dynamically: without -static; in Rust for x86_64-unknown-linux-gnu \
                   without `-C target-feature=+crt-static`.",
        }),
        Some(linker) if linker.contains("ld-musl") => Some(Finding {
            weight: Weight::Prevents,
            what: "it is linked against musl, and libtwofold.so needs glibc".to_owned(),
            next: "Build it for a glibc target (in Rust: x86_64-unknown-linux-gnu).",
        }),
        Some(_) => None,
    }
}

/// The number of the system call that all of KVM goes through.
const IOCTL: u8 = 16;

/// How far before a `syscall` instruction its number is looked for, in bytes.
const NUMBER_DISTANCE: usize = 24;

/// Looks for `ioctl` made without libc: a `syscall` instruction shortly after its number was put
/// into eax.
fn inline_ioctl(elf: &Elf<'_>, contents: &[u8]) -> Option<Finding> {
    let code = elf.program_headers.iter().filter(|header| {
        header.p_type == program_header::PT_LOAD && header.p_flags & program_header::PF_X != 0
    });
    let count: usize = code
        .filter_map(|header| contents.get(header.file_range()))
        .map(count_inline_ioctls)
        .sum();
    (count > 0).then(|| Finding {
        weight: Weight::Warns,
        what: format!("it seems to make ioctl system calls without libc, in {count} place(s)"),
        next: "KVM calls made that way do not reach Twofold. In Rust, crates like rustix do so \
               unless built with their libc backend.",
    })
}

fn count_inline_ioctls(code: &[u8]) -> usize {
    const SYSCALL: [u8; 2] = [0x0f, 0x05];
    const MOV_EAX: [u8; 5] = [0xb8, IOCTL, 0, 0, 0];
    const PUSH_POP_RAX: [u8; 3] = [0x6a, IOCTL, 0x58];
    let calls = code
        .windows(SYSCALL.len())
        .enumerate()
        .filter(|(_, bytes)| *bytes == SYSCALL);
    calls
        .filter(|(at, _)| {
            let before = &code[at.saturating_sub(NUMBER_DISTANCE)..*at];
            before.windows(MOV_EAX.len()).any(|bytes| bytes == MOV_EAX)
                || before
                    .windows(PUSH_POP_RAX.len())
                    .any(|bytes| bytes == PUSH_POP_RAX)
        })
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(contents: &str) -> Option<(String, Option<String>)> {
        let text = |word: OsString| word.into_string().unwrap();
        interpreter(contents.as_bytes()).map(|(path, argument)| (text(path), argument.map(text)))
    }

    #[test]
    fn a_script_names_its_interpreter_and_one_argument() {
        assert_eq!(words("#!/bin/sh\necho"), Some(("/bin/sh".into(), None)));
        assert_eq!(
            words("#! /usr/bin/env  python3 -u \n"),
            Some(("/usr/bin/env".into(), Some("python3 -u".into())))
        );
        assert_eq!(words("#!\n"), None);
        assert_eq!(words("\x7fELF"), None);
    }

    #[test]
    fn env_stands_for_the_program_that_it_starts() {
        let program = |argument: &str| {
            interpreter_program(OsStr::new("/usr/bin/env"), Some(OsStr::new(argument)))
        };
        assert_eq!(program("python3"), "python3");
        assert_eq!(program("-S A=1 perl -w"), "perl");
        assert_eq!(
            interpreter_program(OsStr::new("/bin/sh"), Some(OsStr::new("-e"))),
            "/bin/sh"
        );
    }

    #[test]
    fn only_an_identity_that_is_gained_matters() {
        assert_eq!(
            elevation(0o104_755, (0, 1000), (0, 1000)),
            Some("is set-uid")
        );
        assert_eq!(elevation(0o104_755, (1000, 1000), (0, 1000)), None);
        assert_eq!(
            elevation(0o102_755, (0, 1000), (0, 1000)),
            Some("is set-gid")
        );
        assert_eq!(elevation(0o102_745, (0, 1000), (0, 1000)), None);
        assert_eq!(elevation(0o100_755, (0, 1000), (0, 1000)), None);
    }

    #[test]
    fn an_inline_ioctl_is_found_by_its_number_before_the_instruction() {
        let call = [0xb8, 16, 0, 0, 0, 0x48, 0x89, 0xd6, 0x0f, 0x05];
        assert_eq!(count_inline_ioctls(&call), 1);
        assert_eq!(count_inline_ioctls(&[0x6a, 16, 0x58, 0x0f, 0x05]), 1);
        let read = [0xb8, 0, 0, 0, 0, 0x0f, 0x05];
        assert_eq!(count_inline_ioctls(&read), 0);
        assert_eq!(count_inline_ioctls(&[]), 0);
    }

    #[test]
    fn what_is_no_program_is_named_as_such() {
        for contents in [&b"hello"[..], b"", b"\x7fELF\x02\x01\x01"] {
            let findings = examine_image(contents);
            assert_eq!(findings.len(), 1);
            assert_eq!(findings[0].weight, Weight::Prevents);
        }
    }
}
