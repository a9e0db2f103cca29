//! The calls that open files or ask about them: `/dev/kvm` and the module parameters in `/sys`.

// UNSAFETY: exports functions in libc's place, which take raw pointers.
#![expect(unsafe_code)]
#![allow(
    non_snake_case,
    reason = "libc's names for its checked and versioned variants begin with underscores"
)]

use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::os::fd::IntoRawFd;
use std::ptr;

use libc::{FILE, c_char, c_int, c_uint, mode_t, stat as Stat, statx as Statx};
use rustix::fs::MemfdFlags;
use rustix::io::Errno;

use crate::paths::{Place, place};
use crate::{descriptors, process, raw, real};

/// KVM's device numbers: the misc major, and its minor in it.
const DEVICE_MAJOR: u32 = 10;
const DEVICE_MINOR: u32 = 232;

// ---- open ---------------------------------------------------------------------------------------

/// Opens what `place` names, in the manner of `open`.
fn open_place(place: Place, flags: c_int) -> c_int {
    let descriptor = match place {
        Place::Device if flags & libc::O_DIRECTORY != 0 => Err(Errno::NOTDIR),
        Place::Device if flags & (libc::O_CREAT | libc::O_EXCL) == libc::O_CREAT | libc::O_EXCL => {
            Err(Errno::EXIST)
        }
        Place::Device => process::open_kvm(flags),
        Place::Parameter(contents) => open_parameter(contents, flags),
        Place::ModuleFolder => open_folder(flags),
        Place::Missing => Err(Errno::NOENT),
    };
    match descriptor {
        Ok(descriptor) => descriptor,
        Err(reason) => raw::fail(reason.raw_os_error()),
    }
}

/// A module parameter, as a file in memory. Parameters cannot be changed.
fn open_parameter(contents: &[u8], flags: c_int) -> Result<c_int, Errno> {
    if flags & libc::O_ACCMODE != libc::O_RDONLY {
        return Err(Errno::ACCESS);
    }
    let mut kind = MemfdFlags::empty();
    if flags & libc::O_CLOEXEC != 0 {
        kind |= MemfdFlags::CLOEXEC;
    }
    let file = rustix::fs::memfd_create(c"kvm-parameter", kind)?;
    rustix::io::pwrite(&file, contents, 0)?;
    Ok(file.into_raw_fd())
}

/// A module's folder: programs open it to see that it is there, not to list it.
fn open_folder(flags: c_int) -> Result<c_int, Errno> {
    let flags = rustix::fs::OFlags::from_bits_retain(flags as u32);
    let folder = rustix::fs::open(c"/sys/module", flags, rustix::fs::Mode::empty())?;
    Ok(folder.into_raw_fd())
}

macro_rules! open_functions {
    ($($name:ident($($dir:ident)?; $($mode:ident)?);)*) => { $(
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C" fn $name(
            $($dir: c_int,)? path: *const c_char, flags: c_int $(, $mode: mode_t)?
        ) -> c_int {
            // SAFETY: the caller passes what libc's function asks for.
            unsafe {
                match place(path) {
                    None => real::$name($($dir,)? path, flags $(, $mode)?),
                    Some(place) => open_place(place, flags),
                }
            }
        }
    )* };
}

open_functions! {
    open(; mode);
    open64(; mode);
    openat(dir; mode);
    openat64(dir; mode);
    __open_2(;);
    __open64_2(;);
    __openat_2(dir;);
    __openat64_2(dir;);
}

macro_rules! creat_functions {
    ($($name:ident)*) => { $(
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C" fn $name(path: *const c_char, mode: mode_t) -> c_int {
            // SAFETY: the caller passes what libc's function asks for.
            unsafe {
                match place(path) {
                    None => real::$name(path, mode),
                    Some(place) => {
                        open_place(place, libc::O_CREAT | libc::O_WRONLY | libc::O_TRUNC)
                    }
                }
            }
        }
    )* };
}

creat_functions! { creat creat64 }

macro_rules! fopen_functions {
    ($($name:ident)*) => { $(
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C" fn $name(path: *const c_char, mode: *const c_char) -> *mut FILE {
            // SAFETY: the caller passes what libc's function asks for.
            unsafe {
                match place(path) {
                    None => real::$name(path, mode),
                    Some(place) => fopen_place(place, mode),
                }
            }
        }
    )* };
}

fopen_functions! { fopen fopen64 }

/// # Safety
/// `mode` is null or a string that ends in a zero byte.
unsafe fn fopen_place(place: Place, mode: *const c_char) -> *mut FILE {
    let letters = if mode.is_null() {
        &[]
    } else {
        // SAFETY: a string by the contract.
        unsafe { CStr::from_ptr(mode) }.to_bytes()
    };
    let Some(flags) = open_flags(letters) else {
        raw::set_errno(libc::EINVAL);
        return ptr::null_mut();
    };
    let descriptor = open_place(place, flags);
    if descriptor < 0 {
        return ptr::null_mut();
    }
    // SAFETY: `mode` is the string read above; the descriptor becomes the stream's.
    unsafe { libc::fdopen(descriptor, mode) }
}

/// The flags of `open` that a mode of `fopen` stands for.
fn open_flags(mode: &[u8]) -> Option<c_int> {
    let (first, rest) = mode.split_first()?;
    let access = match (first, rest.contains(&b'+')) {
        (b'r' | b'w' | b'a', true) => libc::O_RDWR,
        (b'r', false) => libc::O_RDONLY,
        (b'w' | b'a', false) => libc::O_WRONLY,
        _ => return None,
    };
    let cloexec = if rest.contains(&b'e') {
        libc::O_CLOEXEC
    } else {
        0
    };
    Some(access | cloexec)
}

/// Streams close their descriptor inside libc, where `close` is not seen.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn fclose(stream: *mut FILE) -> c_int {
    // SAFETY: the caller passes an open stream.
    unsafe {
        if !stream.is_null() {
            descriptors::closing(libc::fileno(stream));
        }
        real::fclose(stream)
    }
}

// ---- access -------------------------------------------------------------------------------------

fn access_place(place: Place, wanted: c_int) -> c_int {
    let refused = match place {
        Place::Device => libc::X_OK,
        Place::Parameter(_) => libc::X_OK | libc::W_OK,
        Place::ModuleFolder => libc::W_OK,
        Place::Missing => return raw::fail(libc::ENOENT),
    };
    if wanted & !(libc::R_OK | libc::W_OK | libc::X_OK) != 0 {
        return raw::fail(libc::EINVAL);
    }
    if wanted & refused != 0 {
        return raw::fail(libc::EACCES);
    }
    0
}

macro_rules! access_functions {
    ($($name:ident($($dir:ident)?; $($flags:ident)?);)*) => { $(
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C" fn $name(
            $($dir: c_int,)? path: *const c_char, mode: c_int $(, $flags: c_int)?
        ) -> c_int {
            // SAFETY: the caller passes what libc's function asks for.
            unsafe {
                match place(path) {
                    None => real::$name($($dir,)? path, mode $(, $flags)?),
                    Some(place) => access_place(place, mode),
                }
            }
        }
    )* };
}

access_functions! {
    access(;);
    euidaccess(;);
    eaccess(;);
    faccessat(dir; flags);
}

// ---- stat ---------------------------------------------------------------------------------------

/// Type and permissions, as in `st_mode`.
const fn mode_of(place: Place) -> Option<mode_t> {
    match place {
        Place::Device => Some(libc::S_IFCHR | 0o666),
        Place::Parameter(_) => Some(libc::S_IFREG | 0o444),
        Place::ModuleFolder => Some(libc::S_IFDIR | 0o755),
        Place::Missing => None,
    }
}

/// What sysfs says of any of its files.
const PARAMETER_SIZE: u32 = 4096;

/// Answers in the form of `stat`. What is not KVM's own (owner, times, file system) is that of
/// `/dev/null`, another device that everyone may open.
///
/// # Safety
/// `to` is null or points to room for a `stat`.
unsafe fn stat_place(place: Place, to: *mut Stat) -> c_int {
    let Some(mode) = mode_of(place) else {
        return raw::fail(libc::ENOENT);
    };
    let mut answer = MaybeUninit::<Stat>::zeroed();
    let null = c"/dev/null".as_ptr().addr();
    // SAFETY: the kernel reads the string and fills in the structure, whose layout libc shares.
    let result = unsafe {
        let here = libc::AT_FDCWD as usize;
        raw::syscall(
            libc::SYS_newfstatat,
            [here, null, answer.as_mut_ptr().addr(), 0, 0, 0],
        )
    };
    if let Err(reason) = result {
        return raw::fail(reason);
    }
    // SAFETY: zeroed at first; all of its fields are integers.
    let mut answer = unsafe { answer.assume_init() };
    answer.st_mode = mode;
    answer.st_ino = u64::from(DEVICE_MINOR);
    answer.st_rdev = 0;
    match place {
        Place::Device => answer.st_rdev = libc::makedev(DEVICE_MAJOR, DEVICE_MINOR),
        Place::Parameter(_) => answer.st_size = i64::from(PARAMETER_SIZE),
        Place::ModuleFolder | Place::Missing => {}
    }
    if to.is_null() {
        return raw::fail(libc::EFAULT);
    }
    // SAFETY: room for a `stat` by the contract.
    unsafe { to.write(answer) };
    0
}

macro_rules! stat_functions {
    ($($name:ident($($version:ident)?; $($dir:ident)?; $($flags:ident)?);)*) => { $(
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C" fn $name(
            $($version: c_int,)? $($dir: c_int,)? path: *const c_char, to: *mut Stat
            $(, $flags: c_int)?
        ) -> c_int {
            // SAFETY: the caller passes what libc's function asks for.
            unsafe {
                match place(path) {
                    None => real::$name($($version,)? $($dir,)? path, to $(, $flags)?),
                    Some(place) => stat_place(place, to),
                }
            }
        }
    )* };
}

stat_functions! {
    stat(;;);
    stat64(;;);
    lstat(;;);
    lstat64(;;);
    fstatat(;dir; flags);
    fstatat64(;dir; flags);
    __xstat(version;;);
    __xstat64(version;;);
    __lxstat(version;;);
    __lxstat64(version;;);
    __fxstatat(version; dir; flags);
    __fxstatat64(version; dir; flags);
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn statx(
    dir: c_int,
    path: *const c_char,
    flags: c_int,
    mask: c_uint,
    to: *mut Statx,
) -> c_int {
    // SAFETY: the caller passes what libc's function asks for.
    unsafe {
        match place(path) {
            None => real::statx(dir, path, flags, mask, to),
            Some(place) => statx_place(place, mask, to),
        }
    }
}

/// As [`stat_place`], in the form of `statx`.
///
/// # Safety
/// `to` is null or points to room for a `statx`.
unsafe fn statx_place(place: Place, mask: c_uint, to: *mut Statx) -> c_int {
    let Some(mode) = mode_of(place) else {
        return raw::fail(libc::ENOENT);
    };
    let mut answer = MaybeUninit::<Statx>::zeroed();
    let null = c"/dev/null".as_ptr().addr();
    // SAFETY: the kernel reads the string and fills in the structure, whose layout libc shares.
    let result = unsafe {
        let here = libc::AT_FDCWD as usize;
        let answer = answer.as_mut_ptr().addr();
        raw::syscall(libc::SYS_statx, [here, null, 0, mask as usize, answer, 0])
    };
    if let Err(reason) = result {
        return raw::fail(reason);
    }
    // SAFETY: zeroed at first; all of its fields are integers.
    let mut answer = unsafe { answer.assume_init() };
    answer.stx_mode = mode as u16;
    answer.stx_ino = u64::from(DEVICE_MINOR);
    (answer.stx_rdev_major, answer.stx_rdev_minor) = (0, 0);
    match place {
        Place::Device => {
            (answer.stx_rdev_major, answer.stx_rdev_minor) = (DEVICE_MAJOR, DEVICE_MINOR);
        }
        Place::Parameter(_) => answer.stx_size = u64::from(PARAMETER_SIZE),
        Place::ModuleFolder | Place::Missing => {}
    }
    if to.is_null() {
        return raw::fail(libc::EFAULT);
    }
    // SAFETY: room for a `statx` by the contract.
    unsafe { to.write(answer) };
    0
}
