//! What this machine has: its own `/dev/kvm`, and what Twofold needs of its kernel.

// UNSAFETY: asks the kernel by requests (`ioctl`, `madvise`) that have no safe form.
#![expect(unsafe_code)]

use std::fs;
use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::ptr;

use rustix::fs::{MemfdFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{IntegerSetter, Ioctl, IoctlOutput, Opcode, opcode};
use rustix::mm::{Advice, MapFlags, ProtFlags};
use rustix::thread::MembarrierQuery;

const PAGE: usize = 4096;

/// What a program that opens the machine's own `/dev/kvm` meets.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum RealKvm {
    /// It works, and has this API version.
    Usable(i32),
    /// There is none.
    Absent,
    /// There is one, but this user may not open it.
    Forbidden,
    /// There is a file of that name that does not answer as KVM does.
    Broken(String),
}

/// Looks at the machine's own `/dev/kvm`.
pub(crate) fn real_kvm() -> RealKvm {
    match fs::metadata("/dev/kvm") {
        Err(error) if error.kind() == ErrorKind::NotFound => return RealKvm::Absent,
        Ok(status) if !status.file_type().is_char_device() => {
            return RealKvm::Broken("it is not a device".to_owned());
        }
        _ => {}
    }
    match rustix::fs::open("/dev/kvm", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
        Err(Errno::ACCESS | Errno::PERM) => RealKvm::Forbidden,
        Err(Errno::NODEV | Errno::NXIO) => RealKvm::Absent,
        Err(error) => RealKvm::Broken(error.to_string()),
        Ok(device) => {
            // SAFETY: KVM_GET_API_VERSION takes 0 and touches no memory.
            match unsafe { rustix::ioctl::ioctl(&device, GetApiVersion) } {
                Ok(version) => RealKvm::Usable(version),
                Err(error) => RealKvm::Broken(error.to_string()),
            }
        }
    }
}

/// `KVM_GET_API_VERSION`, whose answer is the result of the call.
struct GetApiVersion;

// SAFETY: the request has neither input nor output in memory.
unsafe impl Ioctl for GetApiVersion {
    type Output = i32;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        opcode::none(0xae, 0x00)
    }

    fn as_ptr(&mut self) -> *mut libc::c_void {
        ptr::null_mut()
    }

    unsafe fn output_from_ptr(
        answer: IoctlOutput,
        _: *mut libc::c_void,
    ) -> rustix::io::Result<i32> {
        Ok(answer)
    }
}

/// One thing that Twofold uses of the kernel.
#[derive(Debug)]
pub(crate) struct Need {
    /// What it is called.
    pub(crate) name: &'static str,
    /// Whether it is there.
    pub(crate) present: bool,
    /// Whether Twofold cannot work without it.
    pub(crate) required: bool,
    /// What its lack means, and what to do.
    pub(crate) without: &'static str,
}

/// Tries everything that Twofold uses.
pub(crate) fn needs() -> Vec<Need> {
    let barriers = rustix::thread::membarrier_query();
    let barriers_needed =
        MembarrierQuery::PRIVATE_EXPEDITED | MembarrierQuery::REGISTER_PRIVATE_EXPEDITED;
    vec![
        Need {
            name: "membarrier (private expedited)",
            present: barriers.contains(barriers_needed),
            required: true,
            without: "vCPUs cannot be stopped safely. Use Linux 4.14 or later, and allow the \
                      system call in the container's seccomp profile.",
        },
        Need {
            name: "MADV_POPULATE_READ and _WRITE",
            present: can_populate(),
            required: true,
            without: "guest memory cannot be reached safely. Use Linux 5.14 or later.",
        },
        Need {
            name: "memfd_create",
            present: rustix::fs::memfd_create(c"twofold-doctor", MemfdFlags::CLOEXEC).is_ok(),
            required: true,
            without: "KVM's descriptors cannot be made. Use Linux 3.17 or later, and allow the \
                      system call in the container's seccomp profile.",
        },
        Need {
            name: "process_vm_readv and _writev",
            present: can_copy_safely(),
            required: true,
            without: "the pointers that come with ioctls cannot be followed safely. Allow the \
                      system calls in the container's seccomp profile.",
        },
        Need {
            name: "/proc/self/pagemap",
            present: rustix::fs::open("/proc/self/pagemap", OFlags::RDONLY, Mode::empty()).is_ok(),
            required: false,
            without: "the first write to a page that was read before faults twice. Mount /proc.",
        },
        Need {
            name: "PAGEMAP_SCAN",
            present: can_scan(),
            required: false,
            without: "large ranges are examined page by page. Linux 6.7 or later is faster.",
        },
    ]
}

/// Populates a page of its own.
fn can_populate() -> bool {
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
    let page =
        unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), PAGE, protection, MapFlags::PRIVATE) };
    let Ok(page) = page else { return false };
    // SAFETY: the page belongs to this function, which refers to nothing in it.
    unsafe {
        let populated = [Advice::LinuxPopulateRead, Advice::LinuxPopulateWrite]
            .into_iter()
            .all(|advice| rustix::mm::madvise(page, PAGE, advice).is_ok());
        let _ = rustix::mm::munmap(page, PAGE);
        populated
    }
}

/// Copies a byte within this process, there and back.
fn can_copy_safely() -> bool {
    let mut bytes = [1_u8, 2];
    let [first, second] = &mut bytes;
    let process = rustix::process::getpid().as_raw_pid();
    let vector = |byte: *mut u8| libc::iovec {
        iov_base: byte.cast(),
        iov_len: 1,
    };
    let (local, remote) = (vector(first), vector(second));
    // SAFETY: both vectors name one byte of this function's.
    let copied = unsafe {
        libc::process_vm_readv(process, &raw const local, 1, &raw const remote, 1, 0) == 1
            && libc::process_vm_writev(process, &raw const local, 1, &raw const remote, 1, 0) == 1
    };
    copied && bytes == [2, 2]
}

/// `struct pm_scan_arg` of `linux/fs.h`.
#[repr(C)]
struct ScanArgument {
    size: u64,
    rest: [u64; 11],
}

/// `PAGEMAP_SCAN`: `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: Opcode = opcode::read_write::<ScanArgument>(b'f', 16);

/// A kernel that knows the request refuses an argument of size 0 as invalid; another one does not
/// know the request.
fn can_scan() -> bool {
    let opened = rustix::fs::open("/proc/self/pagemap", OFlags::RDONLY, Mode::empty());
    let Ok(pagemap) = opened else { return false };
    // SAFETY: the kernel reads the argument at most; a null pointer makes it fail with EFAULT.
    let answer = unsafe {
        let scan = IntegerSetter::<PAGEMAP_SCAN>::new_usize(0);
        rustix::ioctl::ioctl(pagemap.as_fd(), scan)
    };
    !matches!(answer, Err(Errno::NOTTY))
}

/// The kernel's release, for example `6.12.48`.
pub(crate) fn kernel_release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease").map_or_else(
        |_| "unknown".to_owned(),
        |release| release.trim().to_owned(),
    )
}
