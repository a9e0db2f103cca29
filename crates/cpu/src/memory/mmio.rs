//! Memory that the hypervisor emulates: what is known so far about the instruction that touches
//! it.
//!
//! An instruction that touches emulated memory is executed several times. Each time it runs from
//! its beginning: reads that the hypervisor has already answered are taken from a log in order,
//! the first that is not answered ends the attempt with [`Exit::MmioRead`]. Writes are only noted.
//! When the instruction completes, the log is dropped and the noted writes are delivered one by
//! one. Everything is in arrays of fixed size; an instruction that needs more is unknown to this
//! processor, as it is to KVM's emulator.

use crate::trap::Exit;
use twofold_arch::{Gpa, PAGE_SHIFT};

/// Fragments of at most 8 bytes that one instruction may read, and as many that it may write.
const FRAGMENTS: usize = 16;
/// Different pages of emulated memory that one instruction may touch.
const PAGES: usize = 4;

/// Up to 8 bytes of emulated memory.
#[derive(Clone, Copy, Debug, Default)]
struct Fragment {
    gpa: u64,
    len: u8,
    data: [u8; 8],
}

/// Why emulated memory could not be accessed now.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Stop {
    /// The hypervisor has to supply bytes.
    Exit(Exit),
    /// More fragments than there is room for.
    TooMany,
}

/// The emulated accesses of the instruction in progress.
#[derive(Debug, Default)]
pub(crate) struct Mmio {
    /// RIP of the instruction; meaningful while `pages` or `posted` are in use.
    rip: u64,
    allowed: [u64; PAGES],
    allowed_count: usize,
    answered: [Fragment; FRAGMENTS],
    answered_count: usize,
    /// How many answers the current attempt has used.
    used: usize,
    /// The read that the hypervisor was asked for.
    asked: Option<Fragment>,
    posted: [Fragment; FRAGMENTS],
    posted_count: usize,
    /// How many posted writes have been delivered.
    delivered: usize,
}

impl Mmio {
    /// Whether an instruction that touches emulated memory is in progress: it must be executed
    /// alone, and then [retired](Mmio::retire).
    #[inline(always)]
    pub(crate) fn in_progress(&self) -> bool {
        self.allowed_count != 0
    }

    /// Whether the hypervisor owes an answer, or is owed writes.
    pub(crate) fn owes(&self) -> bool {
        self.answered_count != 0 || self.asked.is_some() || self.delivered < self.posted_count
    }

    /// Forgets everything: the instruction was abandoned.
    pub(crate) fn abandon(&mut self) {
        self.allowed_count = 0;
        self.answered_count = 0;
        self.used = 0;
        self.asked = None;
        self.posted_count = 0;
        self.delivered = 0;
    }

    /// Starts an attempt to execute the instruction at `rip`. What was logged for another
    /// instruction is forgotten.
    pub(crate) fn attempt(&mut self, rip: u64) {
        if self.rip != rip {
            self.abandon();
        }
        self.used = 0;
        self.asked = None;
        self.posted_count = 0;
        self.delivered = 0;
    }

    /// The instruction at `rip` may treat the page of `gpa` as emulated.
    pub(crate) fn allow(&mut self, rip: u64, gpa: Gpa) {
        if self.rip != rip {
            self.abandon();
            self.rip = rip;
        }
        let page = gpa.get() >> PAGE_SHIFT;
        if self.allowed[..self.allowed_count].contains(&page) {
            return;
        }
        if self.allowed_count == PAGES {
            // The oldest goes: an instruction that needs it again will ask again.
            self.allowed.rotate_left(1);
            self.allowed_count -= 1;
        }
        self.allowed[self.allowed_count] = page;
        self.allowed_count += 1;
    }

    /// Whether the page of `gpa` is emulated for the instruction in progress.
    pub(crate) fn allows(&self, gpa: u64) -> bool {
        self.allowed[..self.allowed_count].contains(&(gpa >> PAGE_SHIFT))
    }

    /// Reads `buffer.len()` bytes within one page, from the log or not at all.
    pub(crate) fn read(&mut self, gpa: u64, buffer: &mut [u8]) -> Result<(), Stop> {
        let mut at = gpa;
        for chunk in buffer.chunks_mut(8) {
            let len = chunk.len();
            if self.used == FRAGMENTS {
                return Err(Stop::TooMany);
            }
            let answer = &self.answered[self.used];
            if self.used < self.answered_count && answer.gpa == at && usize::from(answer.len) == len
            {
                chunk.copy_from_slice(&answer.data[..len]);
                self.used += 1;
            } else {
                // An answer for something else was given to an instruction that has since
                // changed its mind (its operands were changed from outside): start over.
                self.answered_count = self.used;
                self.asked = Some(Fragment {
                    gpa: at,
                    len: len as u8,
                    data: [0; 8],
                });
                return Err(Stop::Exit(Exit::MmioRead {
                    gpa: Gpa::new(at),
                    len: len as u8,
                }));
            }
            at += len as u64;
        }
        Ok(())
    }

    /// Notes a write of `bytes` within one page.
    pub(crate) fn write(&mut self, gpa: u64, bytes: &[u8]) -> Result<(), Stop> {
        let mut at = gpa;
        for chunk in bytes.chunks(8) {
            if self.posted_count == FRAGMENTS {
                return Err(Stop::TooMany);
            }
            let mut data = [0; 8];
            data[..chunk.len()].copy_from_slice(chunk);
            self.posted[self.posted_count] = Fragment {
                gpa: at,
                len: chunk.len() as u8,
                data,
            };
            self.posted_count += 1;
            at += chunk.len() as u64;
        }
        Ok(())
    }

    /// Takes the hypervisor's answer to the read it was asked for. Missing bytes read as zero,
    /// surplus ones are ignored. Without a question nothing happens.
    pub(crate) fn answer(&mut self, bytes: &[u8]) {
        let Some(mut fragment) = self.asked.take() else {
            return;
        };
        if self.answered_count == FRAGMENTS {
            return;
        }
        let count = bytes.len().min(usize::from(fragment.len));
        fragment.data[..count].copy_from_slice(&bytes[..count]);
        self.answered[self.answered_count] = fragment;
        self.answered_count += 1;
    }

    /// The instruction (or one iteration of a repeated one) has completed: its log is dropped, its
    /// writes are owed.
    pub(crate) fn retire(&mut self) {
        self.allowed_count = 0;
        self.answered_count = 0;
        self.used = 0;
        self.asked = None;
    }

    /// The next write that is owed to the hypervisor, if no instruction is in progress.
    pub(crate) fn deliver(&mut self) -> Option<Exit> {
        if self.in_progress() || self.delivered >= self.posted_count {
            return None;
        }
        let fragment = self.posted[self.delivered];
        self.delivered += 1;
        if self.delivered == self.posted_count {
            self.delivered = 0;
            self.posted_count = 0;
        }
        Some(Exit::MmioWrite {
            gpa: Gpa::new(fragment.gpa),
            len: fragment.len,
            data: fragment.data,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_are_answered_in_order_and_only_once_each() {
        let mut mmio = Mmio::default();
        mmio.allow(0x100, Gpa::new(0x8000));
        mmio.attempt(0x100);
        let mut bytes = [0; 16];
        let asked = mmio.read(0x8010, &mut bytes);
        assert_eq!(
            asked,
            Err(Stop::Exit(Exit::MmioRead {
                gpa: Gpa::new(0x8010),
                len: 8
            }))
        );
        mmio.answer(&1u64.to_le_bytes());
        mmio.attempt(0x100);
        let asked = mmio.read(0x8010, &mut bytes);
        assert_eq!(
            asked,
            Err(Stop::Exit(Exit::MmioRead {
                gpa: Gpa::new(0x8018),
                len: 8
            }))
        );
        mmio.answer(&[2]);
        mmio.attempt(0x100);
        assert_eq!(mmio.read(0x8010, &mut bytes), Ok(()));
        assert_eq!(u128::from_le_bytes(bytes), 2 << 64 | 1);
        mmio.retire();
        assert!(!mmio.in_progress() && !mmio.owes());
    }

    #[test]
    fn writes_are_delivered_after_the_instruction_one_by_one() {
        let mut mmio = Mmio::default();
        mmio.allow(0x100, Gpa::new(0x8000));
        mmio.attempt(0x100);
        assert_eq!(mmio.write(0x8000, &[7; 12]), Ok(()));
        assert_eq!(mmio.deliver(), None);
        mmio.retire();
        assert!(mmio.owes());
        assert!(matches!(
            mmio.deliver(),
            Some(Exit::MmioWrite {
                len: 8,
                data: [7, ..],
                ..
            })
        ));
        assert!(matches!(
            mmio.deliver(),
            Some(Exit::MmioWrite {
                len: 4,
                data: [7, ..],
                ..
            })
        ));
        assert_eq!(mmio.deliver(), None);
        assert!(!mmio.owes());
    }

    #[test]
    fn an_attempt_that_is_repeated_posts_its_writes_once() {
        let mut mmio = Mmio::default();
        mmio.allow(0x100, Gpa::new(0x8000));
        for _ in 0..3 {
            mmio.attempt(0x100);
            assert_eq!(mmio.write(0x8000, &[1]), Ok(()));
        }
        mmio.retire();
        assert!(mmio.deliver().is_some());
        assert_eq!(mmio.deliver(), None);
    }

    #[test]
    fn answers_do_not_survive_a_change_of_instruction() {
        let mut mmio = Mmio::default();
        mmio.allow(0x100, Gpa::new(0x8000));
        mmio.attempt(0x100);
        assert!(mmio.read(0x8000, &mut [0; 4]).is_err());
        mmio.answer(&[1; 4]);
        mmio.attempt(0x104);
        assert!(!mmio.in_progress());
        assert!(!mmio.allows(0x8000));
    }

    #[test]
    fn more_fragments_than_there_is_room_for_are_refused() {
        let mut mmio = Mmio::default();
        mmio.allow(0, Gpa::new(0));
        assert_eq!(mmio.write(0, &[0; 8 * FRAGMENTS]), Ok(()));
        assert_eq!(mmio.write(0, &[0]), Err(Stop::TooMany));
    }
}
