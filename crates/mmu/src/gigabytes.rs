//! A value for each gigabyte of guest-physical memory, made when it is needed first.
//!
//! Found without a lock and without a read section: nothing is freed before the whole is dropped.

use crate::mmu::OutOfMemory;
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ops::Range;
use spin::Once;
use twofold_arch::{Gfn, PAGE_SHIFT};

/// Frames of a gigabyte.
pub(crate) const FRAMES: u64 = 1 << 18;
/// Frames of a 2M region.
pub(crate) const REGION: u64 = 512;
/// Gigabytes whose values are made together.
const DIRECTORY: u64 = 64;

type Directory<T> = Box<[T]>;

/// Values of type `T`, one for each gigabyte.
#[derive(Debug)]
pub(crate) struct Gigabytes<T> {
    directories: Once<Box<[Once<Directory<T>>]>>,
    /// Frames that can have values.
    frames: u64,
}

/// `count` values, or an error where a plain allocation would end the program.
pub(crate) fn allocate<T>(count: usize, new: impl FnMut() -> T) -> Result<Box<[T]>, OutOfMemory> {
    let mut values = Vec::new();
    values.try_reserve_exact(count).map_err(|_| OutOfMemory)?;
    values.resize_with(count, new);
    Ok(values.into_boxed_slice())
}

impl<T> Gigabytes<T> {
    /// For guest-physical addresses of so many bits.
    pub(crate) fn new(address_bits: u8) -> Self {
        Self {
            directories: Once::new(),
            frames: 1 << (u32::from(address_bits.clamp(32, 52)) - PAGE_SHIFT),
        }
    }

    /// Whether all of `gfns` can have values.
    pub(crate) fn covers(&self, gfns: &Range<Gfn>) -> bool {
        gfns.end.get() <= self.frames
    }

    /// The value of the gigabyte with this number, if it was ever needed.
    #[inline(always)]
    pub(crate) fn get(&self, number: u64) -> Option<&T> {
        let directory = self
            .directories
            .get()?
            .get((number / DIRECTORY) as usize)?
            .get()?;
        directory.get((number % DIRECTORY) as usize)
    }

    /// The value of the gigabyte that holds `gfn`, if it was ever needed.
    #[inline(always)]
    pub(crate) fn at(&self, gfn: Gfn) -> Option<&T> {
        self.get(gfn.get() / FRAMES)
    }

    /// The value of the gigabyte with this number, which `new` makes if there is none.
    pub(crate) fn need(&self, number: u64, new: impl FnMut() -> T) -> Result<&T, OutOfMemory> {
        let directories = self.directories.try_call_once(|| {
            let count = self.frames.div_ceil(FRAMES * DIRECTORY);
            allocate(count as usize, Once::new)
        })?;
        directories
            .get((number / DIRECTORY) as usize)
            .ok_or(OutOfMemory)?
            .try_call_once(|| allocate(DIRECTORY as usize, new))?
            .get((number % DIRECTORY) as usize)
            .ok_or(OutOfMemory)
    }
}
