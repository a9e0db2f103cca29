//! Which memory of the program is shared and writable, as `/proc/self/maps` tells it.
//!
//! Asked about shared pages only, and one mapping usually answers for many faults, so each thread
//! remembers the last. What it remembers may be out of date when the program maps something else
//! there: the answer only says whether to map a page writable at once or after a second fault, and
//! a write that the host does not allow is found out by the host.

use rustix::fs::{Mode, OFlags};
use std::cell::Cell;

/// One mapping: first address, first address behind it, shared and writable.
type Mapping = (u64, u64, bool);

thread_local! {
    static LAST: Cell<Mapping> = const { Cell::new((0, 0, false)) };
}

/// Whether stores to `hva` go to memory that is shared, so that they copy nothing first.
pub(crate) fn is_shared_and_writable(hva: u64) -> bool {
    let (start, end, answer) = LAST.get();
    if (start..end).contains(&hva) {
        return answer;
    }
    let found = read_maps().and_then(|maps| find(&maps, hva));
    let mapping = found.unwrap_or((0, 0, false));
    LAST.set(mapping);
    mapping.2
}

#[cold]
fn read_maps() -> Option<Vec<u8>> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let file = rustix::fs::open("/proc/self/maps", flags, Mode::empty()).ok()?;
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
    fn the_process_finds_its_own_stack_private() {
        let local = 0_u8;
        assert!(!is_shared_and_writable(&raw const local as u64));
    }
}
