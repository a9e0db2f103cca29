//! Making many pages present at once, for pre-faulting.
//!
//! `/proc/self/pagemap` says of a whole range which pages are there; the kernel is asked for the
//! others, a run at a time.

use crate::{mappings, pagemap};
use rustix::io::Errno;
use rustix::mm::Advice;
use twofold_arch::{Hpa, Level, PAGE_SIZE};
use twofold_mmu::{HostPage, PopulateError};

/// Pages that one reading of the pagemap tells about.
const AT_ONCE: usize = 512;

/// Makes pages from `address` on present, for reading or (`private`: memory of this library's own)
/// for writing. How many, and why not all; `None` if the pagemap cannot be read.
pub(crate) fn populate_range(
    address: u64,
    private: bool,
    pages: &mut [HostPage],
) -> Option<(usize, Option<PopulateError>)> {
    let mut entries = [0; AT_ONCE];
    let mut done = 0;
    for part in pages.chunks_mut(AT_ONCE) {
        let start = address + done as u64 * PAGE_SIZE;
        let entries = entries.get_mut(..part.len())?;
        if !pagemap::read(start, entries) {
            return None;
        }
        if let Some(missing) = entries
            .iter()
            .position(|entry| !pagemap::is_present(*entry))
        {
            let from = start + missing as u64 * PAGE_SIZE;
            let length = (part.len() - missing) * PAGE_SIZE as usize;
            let result = populate(from, length, private);
            if !pagemap::read(start, entries) {
                return None;
            }
            if let Err(error) = result {
                // As far as it came.
                let present = entries
                    .iter()
                    .position(|entry| !pagemap::is_present(*entry));
                let present = present.unwrap_or(part.len());
                fill(start, private, entries, part.get_mut(..present)?);
                return Some((done + present, Some(error)));
            }
        }
        fill(start, private, entries, part);
        done += part.len();
    }
    Some((done, None))
}

/// What is known of pages that are present.
fn fill(start: u64, private: bool, entries: &[u64], pages: &mut [HostPage]) {
    let mut address = start;
    for (page, entry) in pages.iter_mut().zip(entries) {
        *page = HostPage {
            hpa: Hpa::new(address),
            writable: private
                || pagemap::allows_writing(*entry, || mappings::is_shared_and_writable(address)),
            level: Level::L4K,
        };
        address += PAGE_SIZE;
    }
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
