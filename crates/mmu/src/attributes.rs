//! Which guest frames are private: `KVM_SET_MEMORY_ATTRIBUTES` (SPEC 5.2).
//!
//! One bit a frame, kept as a bitmap with a summary: each gigabyte has two bits for each of its
//! 2M regions (all shared, all private, or mixed), and a bitmap that is allocated when a region
//! becomes mixed for the first time. So a gigabyte is set with a few stores, one frame with one,
//! however many ranges there are; and whether a huge page would mix both kinds is the summary
//! itself.
//!
//! Reading takes no lock and may go on while one writer changes things: it sees each frame as it
//! was before the change or as it is after. Nothing is freed before the whole is dropped.

use crate::gigabytes::{self, Gigabytes, REGION, allocate};
use crate::mmu::OutOfMemory;
use crate::sync::atomic::{AtomicU64, Ordering};
use alloc::boxed::Box;
use core::ops::Range;
use spin::Once;
use twofold_arch::{Gfn, Level};

/// Frames of a chunk.
const CHUNK: u64 = gigabytes::FRAMES;
/// Words of a chunk's summary, 32 regions each.
const SUMMARY_WORDS: usize = 16;
/// Words of a region in a chunk's bitmap.
const REGION_WORDS: usize = 8;

/// A region in the summary.
const SHARED: u64 = 0;
const PRIVATE: u64 = 1;
const MIXED: u64 = 2;
/// [`PRIVATE`] in each region of a word.
const ALL_PRIVATE: u64 = 0x5555_5555_5555_5555;

type Bitmap = Box<[AtomicU64]>;

/// The attributes of one gigabyte.
#[derive(Debug)]
struct Chunk {
    summary: [AtomicU64; SUMMARY_WORDS],
    bitmap: Once<Bitmap>,
}

/// The attributes of a VM's frames. All are shared at first.
#[derive(Debug)]
pub(crate) struct Attributes {
    chunks: Gigabytes<Chunk>,
}

/// What each region of a summary word would be if all were `private`.
const fn uniform_word(private: bool) -> u64 {
    if private { ALL_PRIVATE } else { 0 }
}

const fn uniform_bits(private: bool) -> u64 {
    if private { u64::MAX } else { 0 }
}

impl Chunk {
    fn new() -> Self {
        Self {
            summary: [const { AtomicU64::new(0) }; SUMMARY_WORDS],
            bitmap: Once::new(),
        }
    }

    #[inline(always)]
    fn region(&self, region: usize) -> u64 {
        self.summary[region / 32 % SUMMARY_WORDS].load(Ordering::Acquire) >> (region % 32 * 2) & 3
    }

    fn set_region(&self, region: usize, state: u64) {
        let word = &self.summary[region / 32 % SUMMARY_WORDS];
        let shift = region % 32 * 2;
        let rest = word.load(Ordering::Relaxed) & !(3 << shift);
        word.store(rest | state << shift, Ordering::Release);
    }

    #[inline(always)]
    fn word(&self, index: usize) -> Option<&AtomicU64> {
        self.bitmap.get()?.get(index)
    }

    /// Whether the frame with this number in the chunk is private.
    #[inline(always)]
    fn is_private(&self, frame: usize) -> bool {
        match self.region(frame / REGION as usize) {
            MIXED => self
                .word(frame / 64)
                .is_some_and(|word| word.load(Ordering::Acquire) >> (frame % 64) & 1 != 0),
            state => state == PRIVATE,
        }
    }

    /// Whether all 2M regions are alike and none is mixed.
    fn is_uniform(&self) -> bool {
        let first = self.summary[0].load(Ordering::Acquire);
        (first == 0 || first == ALL_PRIVATE)
            && self
                .summary
                .iter()
                .all(|word| word.load(Ordering::Acquire) == first)
    }

    /// The words of the bitmap that hold `frames` (numbers in the chunk, not empty), each with a mask
    /// of the frames that are meant.
    #[inline]
    fn words_of(&self, frames: Range<usize>) -> impl Iterator<Item = (&AtomicU64, u64)> {
        let (first, last) = (frames.start / 64, (frames.end - 1) / 64);
        let words = self.bitmap.get().and_then(|words| words.get(first..=last));
        words
            .unwrap_or_default()
            .iter()
            .zip(first..)
            .map(move |(word, number)| {
                let (from, to) = (
                    frames.start.max(number * 64),
                    frames.end.min(number * 64 + 64),
                );
                (word, u64::MAX >> (64 - (to - from)) << (from % 64))
            })
    }

    /// Whether all of `frames`, which are in one region and not empty, are `private`, or all are not.
    #[inline]
    fn is_all(&self, frames: Range<usize>, private: bool) -> bool {
        match self.region(frames.start / REGION as usize) {
            MIXED => self.words_of(frames).all(|(word, mask)| {
                let bits = word.load(Ordering::Acquire) & mask;
                bits == uniform_bits(private) & mask
            }),
            state => (state == PRIVATE) == private,
        }
    }

    /// Sets part of one region, which is not empty; the bitmap has been reserved. `frames` are
    /// numbers in the chunk.
    fn set_part(&self, frames: Range<usize>, private: bool) {
        let region = frames.start / REGION as usize;
        let Some(words) = self
            .bitmap
            .get()
            .and_then(|words| words.get(region * REGION_WORDS..(region + 1) * REGION_WORDS))
        else {
            return;
        };
        let old = self.region(region);
        if old != MIXED {
            // While the summary does not say "mixed" these words mean nothing. A reader that looked at
            // it earlier finds what the region is now.
            for word in words {
                word.store(uniform_bits(old == PRIVATE), Ordering::Relaxed);
            }
        }
        for (word, mask) in self.words_of(frames) {
            let value = word.load(Ordering::Relaxed);
            let value = if private { value | mask } else { value & !mask };
            word.store(value, Ordering::Release);
        }
        let bits = uniform_bits(private);
        let uniform = words
            .iter()
            .all(|word| word.load(Ordering::Relaxed) == bits);
        let state = match (uniform, private) {
            (true, true) => PRIVATE,
            (true, false) => SHARED,
            (false, _) => MIXED,
        };
        if state != old {
            self.set_region(region, state);
        }
    }

    /// Sets whole regions.
    fn set_regions(&self, regions: Range<usize>, private: bool) {
        for (index, word) in self.summary.iter().enumerate() {
            let (from, to) = (
                regions.start.max(index * 32),
                regions.end.min(index * 32 + 32),
            );
            if from >= to {
                continue;
            }
            let mask = u64::MAX >> (64 - 2 * (to - from)) << (from % 32 * 2);
            let rest = word.load(Ordering::Relaxed) & !mask;
            word.store(rest | uniform_word(private) & mask, Ordering::Release);
        }
    }
}

/// The part of a range that lies in one chunk.
#[derive(Clone, Copy)]
struct Part {
    chunk: u64,
    /// Numbers in the chunk.
    start: usize,
    end: usize,
}

impl Part {
    /// The frames before the first whole region, the whole regions, and the frames after them.
    fn split(self) -> (Range<usize>, Range<usize>, Range<usize>) {
        let region = REGION as usize;
        let first = self.start.next_multiple_of(region);
        let last = self.end / region * region;
        if first > last {
            // Within one region.
            return (self.start..self.end, 0..0, 0..0);
        }
        (
            self.start..first,
            first / region..last / region,
            last..self.end,
        )
    }
}

fn parts(gfns: &Range<Gfn>) -> impl Iterator<Item = Part> + use<> {
    let (mut start, end) = (gfns.start.get(), gfns.end.get());
    core::iter::from_fn(move || {
        if start >= end {
            return None;
        }
        let chunk = start / CHUNK;
        let stop = end.min((chunk + 1) * CHUNK);
        let part = Part {
            chunk,
            start: (start % CHUNK) as usize,
            end: (stop - chunk * CHUNK) as usize,
        };
        start = stop;
        Some(part)
    })
}

impl Attributes {
    /// For guest-physical addresses of so many bits.
    pub(crate) fn new(address_bits: u8) -> Self {
        Self {
            chunks: Gigabytes::new(address_bits),
        }
    }

    /// Whether `gfns` can have attributes.
    pub(crate) fn covers(&self, gfns: &Range<Gfn>) -> bool {
        self.chunks.covers(gfns)
    }

    /// Whether `gfn` is private.
    #[inline(always)]
    pub(crate) fn is_private(&self, gfn: Gfn) -> bool {
        self.chunks
            .at(gfn)
            .is_some_and(|chunk| chunk.is_private((gfn.get() % CHUNK) as usize))
    }

    /// Whether all frames of the page of this level around `gfn` are of one kind, so that a
    /// leaf may cover them.
    #[inline]
    pub(crate) fn is_uniform(&self, gfn: Gfn, level: Level) -> bool {
        let Some(chunk) = self.chunks.at(gfn) else {
            return level <= Level::L1G;
        };
        match level {
            Level::L4K => true,
            Level::L2M => chunk.region((gfn.get() % CHUNK / REGION) as usize) != MIXED,
            Level::L1G => chunk.is_uniform(),
            _ => false,
        }
    }

    /// Whether all of `gfns` are `private`, or all are not.
    pub(crate) fn all(&self, gfns: &Range<Gfn>, private: bool) -> bool {
        parts(gfns).all(|part| {
            let Some(chunk) = self.chunks.get(part.chunk) else {
                return !private;
            };
            let region = REGION as usize;
            let mut frame = part.start;
            while frame < part.end {
                let end = ((frame / region + 1) * region).min(part.end);
                if !chunk.is_all(frame..end, private) {
                    return false;
                }
                frame = end;
            }
            true
        })
    }

    /// Makes sure that [`set`](Self::set) of these frames needs no memory.
    pub(crate) fn reserve(&self, gfns: &Range<Gfn>) -> Result<(), OutOfMemory> {
        for part in parts(gfns) {
            let chunk = self.chunks.need(part.chunk, Chunk::new)?;
            let (head, _, tail) = part.split();
            if !head.is_empty() || !tail.is_empty() {
                chunk
                    .bitmap
                    .try_call_once(|| allocate((CHUNK / 64) as usize, || AtomicU64::new(0)))?;
            }
        }
        Ok(())
    }

    /// Makes `gfns`, which have been reserved, private or shared. One writer at a time.
    pub(crate) fn set(&self, gfns: &Range<Gfn>, private: bool) {
        for part in parts(gfns) {
            let Some(chunk) = self.chunks.get(part.chunk) else {
                continue;
            };
            let (head, regions, tail) = part.split();
            for piece in [head, tail] {
                if !piece.is_empty() {
                    chunk.set_part(piece, private);
                }
            }
            if !regions.is_empty() {
                chunk.set_regions(regions, private);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use proptest::prelude::*;

    fn set(attributes: &Attributes, gfns: Range<u64>, private: bool) {
        let gfns = Gfn::new(gfns.start)..Gfn::new(gfns.end);
        attributes.reserve(&gfns).unwrap();
        attributes.set(&gfns, private);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

        /// Ranges begin and end near the edges of regions and chunks.
        #[test]
        fn every_frame_is_what_was_set_last_and_the_summary_tells_what_is_mixed(
            ops in prop::collection::vec(
                (0u64..5, 0u64..4, 0u64..4, 1u64..1600, any::<bool>(), any::<bool>()), 1..24),
        ) {
            const FRAMES: u64 = 2 * CHUNK + 4 * REGION;
            let attributes = Attributes::new(40);
            let mut model = vec![false; FRAMES as usize];
            for (chunk, region, offset, pages, whole, private) in ops {
                let start = match chunk {
                    0..3 => chunk * CHUNK + region * REGION + offset,
                    other => (other - 2) * CHUNK - region * REGION - offset,
                };
                let start = if whole { start / REGION * REGION } else { start };
                let pages = if whole { pages.next_multiple_of(REGION) } else { pages };
                let end = (start + pages).min(FRAMES);
                let before = attributes.all(&(Gfn::new(start)..Gfn::new(end)), private);
                prop_assert_eq!(before, model[start as usize..end as usize].iter().all(|p| *p == private));
                set(&attributes, start..end, private);
                model[start as usize..end as usize].fill(private);
            }
            for (gfn, private) in model.iter().enumerate() {
                prop_assert_eq!(attributes.is_private(Gfn::new(gfn as u64)), *private, "{}", gfn);
            }
            for (level, frames) in [(Level::L2M, REGION), (Level::L1G, CHUNK)] {
                for (number, block) in model.chunks_exact(frames as usize).enumerate() {
                    let gfn = Gfn::new(number as u64 * frames + 7);
                    let uniform = block.iter().all(|private| *private == block[0]);
                    prop_assert_eq!(attributes.is_uniform(gfn, level), uniform, "{:?}", gfn);
                }
            }
        }
    }

    #[test]
    fn a_frame_flipped_and_flipped_back_leaves_no_trace_in_the_summary() {
        let attributes = Attributes::new(51);
        let gfn = Gfn::new(3 * CHUNK + 5);
        assert!(attributes.is_uniform(gfn, Level::L1G));
        set(&attributes, gfn.get()..gfn.get() + 1, true);
        assert!(!attributes.is_uniform(gfn, Level::L2M));
        assert!(!attributes.is_uniform(gfn, Level::L1G));
        assert!(attributes.is_uniform(Gfn::new(gfn.get() + REGION), Level::L2M));
        set(&attributes, gfn.get()..gfn.get() + 1, false);
        assert!(attributes.is_uniform(gfn, Level::L2M));
        assert!(attributes.is_uniform(gfn, Level::L1G));
    }

    #[test]
    fn the_last_frame_can_have_attributes_and_the_next_cannot() {
        let attributes = Attributes::new(51);
        let last = (1u64 << 39) - 1;
        set(&attributes, last..last + 1, true);
        assert!(attributes.is_private(Gfn::new(last)));
        assert!(!attributes.is_private(Gfn::new(last - 1)));
        assert!(!attributes.is_private(Gfn::new(last + 1)));
        assert!(attributes.covers(&(Gfn::new(last)..Gfn::new(last + 1))));
        assert!(!attributes.covers(&(Gfn::new(last)..Gfn::new(last + 2))));
        assert!(
            attributes
                .reserve(&(Gfn::new(last + 1)..Gfn::new(last + 2)))
                .is_err()
        );
    }
}
