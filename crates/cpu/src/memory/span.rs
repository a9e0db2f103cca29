//! Many bytes at once, for repeated string instructions.
//!
//! Each function does as much as lies in one page on each side and is plain memory, and says how
//! much that was. Where it says zero, the caller goes element by element: that is always right.

use super::access::{self, Vanished};
use super::sub_page::rest_of_sub_page;
use super::tlb::{Set, tag};
use super::{Place, rest_of_page};
use crate::core_state::Core;
use crate::trap::Trap;

impl Core {
    /// Compares 16 bytes with `old` and, if they are equal, replaces them by `new`, atomically.
    /// Returns what was there. Faults as a write does in either case; raises #GP for an address
    /// that is not a multiple of 16.
    pub(crate) fn cmpxchg16(&mut self, linear: u64, old: u128, new: u128) -> Result<u128, Trap> {
        let (found, _) =
            self.rmw::<u128>(linear, true, |found| if found == old { new } else { found })?;
        Ok(found)
    }

    /// Copies up to `bytes` bytes, a multiple of `element`, upwards as elements of that size would
    /// be moved one after the other. Returns how many bytes were copied, a multiple of `element`.
    /// A part of a `large` copy goes past the caches.
    pub(crate) fn copy_span(
        &mut self,
        to: u64,
        from: u64,
        bytes: u64,
        element: u64,
        large: bool,
    ) -> Result<u64, Trap> {
        let mut length = bytes.min(rest_of_page(to)).min(rest_of_page(from)) & !(element - 1);
        if length == 0 {
            return Ok(0);
        }
        let Some((source, _)) = self.plain(from, element, false)? else {
            return Ok(0);
        };
        let Some((target, room)) = self.plain(to, element, true)? else {
            return Ok(0);
        };
        length = length.min(room) & !(element - 1);
        if length == 0 {
            return Ok(0);
        }
        // Elements that overlap those they are copied to spread; bytes spread the same way only
        // if the distance is at least an element.
        let distance = target.wrapping_sub(source);
        if distance != 0 && (distance as u64) < element {
            return Ok(0);
        }
        #[expect(unsafe_code)]
        // UNSAFETY: guest memory is raw memory.
        // SAFETY: both pages were translated since the last flush, in guest mode, the target for
        // writing; the length stays within both.
        let copied = unsafe {
            let to = std::ptr::with_exposed_provenance_mut(target);
            let from = std::ptr::with_exposed_provenance(source);
            match large {
                true => access::copy_past_caches(to, from, length as usize),
                false => access::copy(to, from, length as usize),
            }
        };
        match copied {
            Ok(()) => Ok(length),
            Err(Vanished) => Err(self.vanished(target)),
        }
    }

    /// Stores `value`, of `element` bytes, up to `bytes / element` times upwards. Returns how many
    /// bytes were stored, a multiple of `element`.
    pub(crate) fn fill_span(
        &mut self,
        to: u64,
        value: u64,
        element: u64,
        bytes: u64,
    ) -> Result<u64, Trap> {
        // Eight bytes at a time, whatever the element.
        let mut length = bytes.min(rest_of_page(to)) & !7;
        if length == 0 {
            return Ok(0);
        }
        let pattern = match element {
            1 => u64::from(value as u8) * 0x0101_0101_0101_0101,
            2 => u64::from(value as u16) * 0x0001_0001_0001_0001,
            4 => u64::from(value as u32) * 0x0000_0001_0000_0001,
            _ => value,
        };
        let Some((target, room)) = self.plain(to, element, true)? else {
            return Ok(0);
        };
        length = length.min(room) & !7;
        if length == 0 {
            return Ok(0);
        }
        #[expect(unsafe_code)]
        // UNSAFETY: guest memory is raw memory.
        // SAFETY: the page was translated for writing since the last flush, in guest mode; the
        // length stays within it.
        let filled = unsafe {
            access::fill(
                std::ptr::with_exposed_provenance_mut(target),
                pattern,
                length as usize / 8,
            )
        };
        match filled {
            Ok(()) => Ok(length),
            Err(Vanished) => Err(self.vanished(target)),
        }
    }

    /// Where `element` bytes of plain memory, of which the first page holds at least one, are, and
    /// how many bytes may be accessed from there. `None` if the page is emulated or has a breakpoint
    /// or, to write it, holds code; and if alignment is checked and wrong.
    fn plain(
        &mut self,
        linear: u64,
        element: u64,
        write: bool,
    ) -> Result<Option<(usize, u64)>, Trap> {
        if self.checks_alignment() && !linear.is_multiple_of(element) {
            return Ok(None);
        }
        let page = rest_of_page(linear);
        let entry = self.mem.tlb.entry(self.mem.data_base, linear);
        let cached = if write { entry.write } else { entry.read };
        if cached == tag(linear, 1) {
            return Ok(Some((linear.wrapping_add(entry.addend) as usize, page)));
        }
        if self.breakpoints.watches_page(linear, write) {
            return Ok(None);
        }
        let set: Set = self.data_set();
        let target = self.translate_data(linear, element.min(page), write, set)?;
        Ok(match target.place {
            Place::Host(host) if !(write && target.code) => {
                // The verdict on one byte of a sub-page is that on all of them.
                let room = match target.sub_page {
                    true => rest_of_sub_page(linear),
                    false => page,
                };
                Some((host, room))
            }
            _ => None,
        })
    }
}
