//! Which memory of the program is shared and writable, as `/proc/self/maps` tells it.
//!
//! Asked about shared pages only, and one mapping usually answers for many faults, so each thread
//! remembers the last. What it remembers may be out of date when the program maps something else
//! there: the answer only says whether to map a page writable at once or after a second fault, and
//! a write that the host does not allow is found out by the host.

use rustix::fs::{Mode, OFlags};
use std::cell::Cell;
use std::ffi::CStr;
use std::sync::atomic::{AtomicU64, Ordering};
use twofold_arch::Level;

/// One mapping: first address, first address behind it, shared and writable.
type Mapping = (u64, u64, bool);

thread_local! {
    static LAST: Cell<Mapping> = const { Cell::new((0, 0, false)) };
    /// First address, first address behind it, [`CHANGES`] when it was read, size of its pages.
    static LAST_SIZE: Cell<(u64, u64, u64, Level)> = const { Cell::new((0, 0, 0, Level::L4K)) };
}

/// Changes of the program's mappings so far.
static CHANGES: AtomicU64 = AtomicU64::new(0);

/// Whether stores to `hva` go to memory that is shared, so that they copy nothing first.
pub(crate) fn is_shared_and_writable(hva: u64) -> bool {
    let (start, end, answer) = LAST.get();
    if (start..end).contains(&hva) {
        return answer;
    }
    let found = read(c"/proc/self/maps").and_then(|maps| find(&maps, hva));
    let mapping = found.unwrap_or((0, 0, false));
    LAST.set(mapping);
    mapping.2
}

/// How large the pages of the mapping at `hva` are, as far as hugetlbfs makes them so.
///
/// Reading this takes as long as the kernel needs to look at every page of the process; one
/// mapping usually answers for many faults here too.
pub(crate) fn page_level(hva: u64) -> Level {
    let (start, end, seen, level) = LAST_SIZE.get();
    if (start..end).contains(&hva) && seen == CHANGES.load(Ordering::Relaxed) {
        return level;
    }
    let seen = CHANGES.load(Ordering::Relaxed);
    let found = read(c"/proc/self/smaps").and_then(|text| find_page_size(&text, hva));
    let (start, end, level) = found.unwrap_or((0, 0, Level::L4K));
    LAST_SIZE.set((start, end, seen, level));
    level
}

/// The program changes its mappings.
pub(crate) fn forget_sizes() {
    CHANGES.fetch_add(1, Ordering::Relaxed);
}

/// The mapping that holds `hva` in `smaps`, where lines that describe a mapping follow its own.
fn find_page_size(smaps: &[u8], hva: u64) -> Option<(u64, u64, Level)> {
    let mut lines = smaps.split(|byte| *byte == b'\n');
    let (start, end, _) = lines.find_map(|line| find(line, hva))?;
    let kilobytes = lines.find_map(|line| {
        let line = std::str::from_utf8(line).ok()?;
        let size = line.strip_prefix("KernelPageSize:")?;
        size.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    })?;
    let level = match kilobytes {
        0..2048 => Level::L4K,
        2048..1_048_576 => Level::L2M,
        _ => Level::L1G,
    };
    Some((start, end, level))
}

#[cold]
fn read(path: &CStr) -> Option<Vec<u8>> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty()).ok()?;
    let mut text = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        match rustix::io::read(&file, &mut chunk) {
            Ok(0) => return Some(text),
            Ok(length) => text.extend_from_slice(&chunk[..length]),
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return None,
        }
    }
}

/// The mapping that holds `hva`. Lines are `start-end perms offset device inode path`.
fn find(maps: &[u8], hva: u64) -> Option<Mapping> {
    maps.split(|byte| *byte == b'\n').find_map(|line| {
        let line = std::str::from_utf8(line.get(..line.len().min(64))?).ok()?;
        let mut fields = line.split_ascii_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let start = u64::from_str_radix(start, 16).ok()?;
        let end = u64::from_str_radix(end, 16).ok()?;
        if !(start..end).contains(&hva) {
            return None;
        }
        let permissions = fields.next()?.as_bytes();
        let writable = permissions.get(1) == Some(&b'w') && permissions.get(3) == Some(&b's');
        Some((start, end, writable))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &[u8] = b"\
00400000-00452000 r-xp 00000000 08:02 173521      /usr/bin/dbus-daemon\n\
7f0000000000-7f0000004000 rw-s 00000000 00:01 1024      /dev/zero (deleted)\n\
7f0000004000-7f0000005000 rw-p 00000000 00:00 0\n\
7f0000005000-7f0000006000 r--s 00000000 00:01 7      /memfd:x (deleted)\n";

    #[test]
    fn only_shared_writable_mappings_are_written_in_place() {
        let answer = |hva| find(MAPS, hva).map(|(_, _, answer)| answer);
        assert_eq!(answer(0x7f00_0000_3fff), Some(true));
        assert_eq!(answer(0x7f00_0000_4000), Some(false));
        assert_eq!(answer(0x7f00_0000_5000), Some(false));
        assert_eq!(answer(0x40_0000), Some(false));
        assert_eq!(answer(0x7f00_0000_6000), None);
    }

    #[test]
    fn the_size_of_a_mappings_pages_follows_its_line() {
        let smaps = b"\
7f0000000000-7f0000400000 rw-p 00000000 00:0f 1024 /anon_hugepage (deleted)\n\
Size:               4096 kB\n\
KernelPageSize:     2048 kB\n\
7f0000400000-7f0000500000 rw-p 00000000 00:00 0\n\
KernelPageSize:        4 kB\n\
7f0040000000-7f0080000000 rw-p 00000000 00:0f 1025 /anon_hugepage (deleted)\n\
KernelPageSize:  1048576 kB\n";
        let level = |hva| find_page_size(smaps, hva).map(|(_, _, level)| level);
        assert_eq!(level(0x7f00_0030_0000), Some(Level::L2M));
        assert_eq!(level(0x7f00_0040_0000), Some(Level::L4K));
        assert_eq!(level(0x7f00_4000_0000), Some(Level::L1G));
        assert_eq!(level(0x7f00_0050_0000), None);
        assert_eq!(page_level(&raw const smaps as u64), Level::L4K);
    }

    #[test]
    fn the_process_finds_its_own_stack_private() {
        let local = 0_u8;
        assert!(!is_shared_and_writable(&raw const local as u64));
    }
}
