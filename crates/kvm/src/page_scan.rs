//! `PAGEMAP_SCAN` (Linux 6.7): which pages of a range are present, and of what kind, several times
//! faster than page by page.

use crate::pagemap;
use rustix::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};

/// `_IOWR('f', 16, struct pm_scan_arg)`
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;

/// Under userfaultfd write protection: writes wait for a handler, unless [`WRITTEN`].
pub(crate) const WRITE_PROTECTION_ALLOWED: u64 = 1 << 0;
/// Not write-protected by a userfaultfd.
pub(crate) const WRITTEN: u64 = 1 << 1;
/// In memory.
pub(crate) const PRESENT: u64 = 1 << 3;
/// The kernel's page of zeros.
pub(crate) const ZERO: u64 = 1 << 5;
/// Mapped with a huge page.
pub(crate) const HUGE: u64 = 1 << 6;

/// `struct page_region`: consecutive pages of one kind, by address.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Region {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) categories: u64,
}

/// `struct pm_scan_arg`
#[repr(C)]
#[derive(Default)]
struct Argument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// Whether the kernel has been found not to know the request.
static CANNOT_SCAN: AtomicBool = AtomicBool::new(false);

/// Finds the pages from `start` to `end` that are of all the kinds in `wanted`. How many regions were
/// filled in (with the kinds in `told`), and up to where the range was looked at; `None` if the
/// kernel does not tell.
pub(crate) fn scan(
    start: u64,
    end: u64,
    wanted: u64,
    told: u64,
    regions: &mut [Region],
) -> Option<(usize, u64)> {
    if CANNOT_SCAN.load(Ordering::Relaxed) {
        return None;
    }
    let mut argument = Argument {
        size: size_of::<Argument>() as u64,
        start,
        end,
        vec: regions.as_mut_ptr() as u64,
        vec_len: regions.len() as u64,
        category_mask: wanted,
        return_mask: told,
        ..Argument::default()
    };
    let found = pagemap::with_file(|file| {
        // UNSAFETY: an ioctl that writes to memory.
        #[expect(unsafe_code)]
        // SAFETY: the kernel fills at most as many regions as there are, and the argument itself;
        // both have the layout of its ABI.
        unsafe {
            libc::syscall(
                libc::SYS_ioctl,
                file.as_raw_fd(),
                PAGEMAP_SCAN,
                &raw mut argument,
            )
        }
    })?;
    match usize::try_from(found) {
        Ok(found) => Some((found.min(regions.len()), argument.walk_end)),
        Err(_) => {
            let error = std::io::Error::last_os_error();
            if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) {
                tracing::info!(%error, "the kernel does not tell quickly which pages are present");
                CANNOT_SCAN.store(true, Ordering::Relaxed);
                return None;
            }
            // Nothing is mapped there, or a signal came: nothing was found.
            Some((0, end))
        }
    }
}
