//! Making many pages present at once, for pre-faulting.
//!
//! `PAGEMAP_SCAN` says of a whole range which pages are there and of what kind; the kernel is asked
//! for the others, a run at a time.

use crate::page_scan::{self, Region};
use rustix::io::Errno;
use rustix::mm::Advice;
use twofold_arch::{Hpa, Level, PAGE_SIZE};
use twofold_mmu::{HostPage, PopulateError};

/// Runs of pages that one scan tells about.
const REGIONS: usize = 64;

/// Kinds that the kernel reads off its page table. Whether a page is a file's it would have to look up
/// elsewhere, page by page.
const KINDS: u64 =
    page_scan::PRESENT | page_scan::ZERO | page_scan::WRITE_PROTECTION_ALLOWED | page_scan::WRITTEN;

/// Makes pages from `address` on present, for reading or (`private`: memory of this library's own)
/// for writing. How many, and why not all; `None` if the kernel does not tell what is present.
pub(crate) fn populate_range(
    address: u64,
    private: bool,
    pages: &mut [HostPage],
) -> Option<(usize, Option<PopulateError>)> {
    let wanted = pages.len();
    let mut done = fill(address, private, pages, 0)?;
    while done < wanted {
        // Up to the next page that is there, at least one.
        let from = address + done as u64 * PAGE_SIZE;
        let result = populate(from, (wanted - done) * PAGE_SIZE as usize, private);
        let now = fill(address, private, pages, done)?;
        match result {
            Err(error) => return Some((now, Some(error))),
            // It was made present and is gone again.
            Ok(()) if now == done => return Some((now, Some(PopulateError::Again))),
            Ok(()) => done = now,
        }
    }
    Some((done, None))
}

/// Fills in what is known of the pages from the number `first` on, up to the first that is not
/// present: its number.
fn fill(address: u64, private: bool, pages: &mut [HostPage], first: usize) -> Option<usize> {
    let end = address + pages.len() as u64 * PAGE_SIZE;
    let mut at = address + first as u64 * PAGE_SIZE;
    let mut regions = [Region::default(); REGIONS];
    while at < end {
        let (found, walked) = page_scan::scan(at, end, page_scan::PRESENT, KINDS, &mut regions)?;
        for region in regions.get(..found)? {
            if region.start != at {
                return Some(((at - address) / PAGE_SIZE) as usize);
            }
            while at < region.end.min(end) {
                let number = ((at - address) / PAGE_SIZE) as usize;
                *pages.get_mut(number)? = HostPage {
                    hpa: Hpa::new(at),
                    writable: private || may_write(region.categories),
                    level: Level::L4K,
                };
                at += PAGE_SIZE;
            }
        }
        if found < REGIONS || walked >= end {
            break;
        }
    }
    Some(((at - address) / PAGE_SIZE) as usize)
}

/// Whether a guest may write to a page of these kinds without asking first.
///
/// Guests write through this process's own mapping. So where a write needs a copy, of a page that is
/// shared with a forked child or is a file's, the kernel makes it; and where nothing may be written it
/// says so. Only a write that would wait for a userfaultfd's handler must not happen in the guest.
/// The page of zeros is left to the first write, as the mapping would be one of another page then.
const fn may_write(kinds: u64) -> bool {
    let protected = page_scan::WRITE_PROTECTION_ALLOWED;
    kinds & page_scan::ZERO == 0 && kinds & (protected | page_scan::WRITTEN) != protected
}

fn populate(address: u64, length: usize, write: bool) -> Result<(), PopulateError> {
    let advice = match write {
        true => Advice::LinuxPopulateWrite,
        false => Advice::LinuxPopulateRead,
    };
    let pointer = std::ptr::with_exposed_provenance_mut(address as usize);
    // UNSAFETY: madvise is unsafe for the sake of other kinds of advice.
    #[expect(unsafe_code)]
    // SAFETY: populating changes no byte that a program can observe.
    let result = unsafe { rustix::mm::madvise(pointer, length, advice) };
    match result {
        Ok(()) => Ok(()),
        Err(Errno::INTR) => Err(PopulateError::Interrupted),
        Err(Errno::AGAIN) => Err(PopulateError::Again),
        Err(Errno::HWPOISON) => Err(PopulateError::Poisoned),
        Err(_) => Err(PopulateError::Fault),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::mm::{MapFlags, ProtFlags};

    const PAGES: usize = 300;

    /// Pages of a new mapping, of which every third was written.
    fn checkered() -> u64 {
        // UNSAFETY: maps memory to look at, and writes to it.
        #[expect(unsafe_code)]
        // SAFETY: a new mapping, used only here, which stays.
        unsafe {
            let start = rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                PAGES * PAGE_SIZE as usize,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
            .unwrap();
            let _ = rustix::mm::madvise(start, PAGES * 4096, Advice::LinuxNoHugepage);
            for page in (0..PAGES).step_by(3) {
                start.cast::<u8>().add(page * 4096).write_volatile(1);
            }
            start.expose_provenance() as u64
        }
    }

    #[test]
    fn pages_are_made_present_and_only_written_ones_are_writable() {
        const NO_PAGE: HostPage = HostPage {
            hpa: Hpa::new(1),
            writable: false,
            level: Level::L4K,
        };
        for private in [false, true] {
            let address = checkered();
            let mut pages = [NO_PAGE; PAGES];
            let Some(result) = populate_range(address, private, &mut pages) else {
                // A kernel before 6.7.
                return;
            };
            assert_eq!(result, (PAGES, None));
            for (number, page) in pages.iter().enumerate() {
                assert_eq!(page.hpa.get(), address + number as u64 * PAGE_SIZE);
                assert_eq!(page.writable, private || number % 3 == 0, "{number}");
            }
            // Nothing is mapped behind the end of the address space that programs have.
            let beyond = populate_range(0x1000, private, &mut pages);
            assert_eq!(beyond, Some((0, Some(PopulateError::Fault))));
        }
    }
}
