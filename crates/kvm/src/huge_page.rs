//! How large the host's mapping at an address is.
//!
//! Host-physical addresses are this process's virtual addresses, so any aligned range is
//! contiguous; what matters is that all of it is there and has one permission, which a huge
//! page of the host guarantees. The kernel tells which ranges it maps with huge pages
//! (`PAGEMAP_SCAN`, Linux 6.7), transparent ones and those of hugetlbfs. Kernels before that tell
//! only in `/proc/self/smaps` how large the pages of a mapping are.

use crate::{mappings, page_scan};
use std::sync::OnceLock;
use twofold_arch::Level;

/// The largest level at which the page at `hva`, which is present, may be mapped.
pub(crate) fn level(hva: u64) -> Level {
    let level = match is_huge(hva, Level::L2M) {
        Some(true) => Level::L2M,
        Some(false) => return Level::L4K,
        None => return mappings::page_level(hva),
    };
    // Only hugetlbfs has such pages, and few machines have any.
    if has_gigantic_pages() && mappings::page_level(hva) == Level::L1G {
        Level::L1G
    } else {
        level
    }
}

/// Whether the kernel maps everything at `level` around `hva` with huge pages; `None` if it does
/// not tell.
fn is_huge(hva: u64, level: Level) -> Option<bool> {
    let start = hva & !(level.bytes() - 1);
    let end = start + level.bytes();
    let mut region = [page_scan::Region::default()];
    let kinds = page_scan::PRESENT | page_scan::HUGE;
    let (found, _) = page_scan::scan(start, end, kinds, kinds, &mut region)?;
    let [region] = region;
    Some(found == 1 && region.start <= start && end <= region.end)
}

/// Whether the machine had pages of 1 GiB when this was asked first.
fn has_gigantic_pages() -> bool {
    static ANY: OnceLock<bool> = OnceLock::new();
    *ANY.get_or_init(|| {
        std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages")
            .is_ok_and(|count| count.trim() != "0")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::mm::{Advice, MapFlags, ProtFlags};

    #[test]
    fn small_pages_are_small_and_a_transparent_huge_page_is_huge() {
        const SIZE: usize = 4 << 20;
        // UNSAFETY: maps memory to look at.
        #[expect(unsafe_code)]
        // SAFETY: a new mapping, used only here.
        let start = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                SIZE,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }
        .unwrap();
        let aligned = (start as u64).next_multiple_of(2 << 20);
        let touch = |hva: u64| {
            let pointer = std::ptr::with_exposed_provenance_mut::<u8>(hva as usize);
            // UNSAFETY: writes to the mapping.
            #[expect(unsafe_code)]
            // SAFETY: within the mapping.
            unsafe {
                pointer.write_volatile(1);
            }
        };
        let _ = start.expose_provenance();
        // UNSAFETY: advice about the mapping.
        #[expect(unsafe_code)]
        // SAFETY: changes no content.
        let advise = |advice| unsafe {
            let at = std::ptr::with_exposed_provenance_mut(aligned as usize);
            rustix::mm::madvise(at, 2 << 20, advice)
        };
        let _ = advise(Advice::LinuxNoHugepage);
        touch(aligned);
        assert_eq!(level(aligned), Level::L4K);
        // SAFETY is the same: the page goes, nobody needs its content.
        advise(Advice::LinuxDontNeed).unwrap();
        let huge = advise(Advice::LinuxHugepage).is_ok() && {
            touch(aligned + 5);
            is_huge(aligned, Level::L2M) == Some(true)
        };
        assert_eq!(level(aligned + 0x5000) == Level::L2M, huge);
        // UNSAFETY: unmaps it.
        #[expect(unsafe_code)]
        // SAFETY: nothing refers to it any more.
        unsafe {
            rustix::mm::munmap(start, SIZE).unwrap();
        }
    }
}
